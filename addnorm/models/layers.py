"""The branches of a Transformer: causal self-attention and the feed-forward.

Shapes: B batch, T query positions, S key positions, H heads, E = D / H width of a head, D stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addnorm.branches import Branch, Context, Matrix

AttentionPath = Literal["sdpa", "matmul"]
ATTENTION_PATHS: tuple[AttentionPath, ...] = ("sdpa", "matmul")
NORMS: dict[str, Callable[[int], nn.LayerNorm | nn.RMSNorm]] = {
    "layernorm": nn.LayerNorm,  # eps 1e-5
    "rmsnorm": functools.partial(nn.RMSNorm, eps=1e-6),  # torch's own default is the dtype's eps
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu-tanh": functools.partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


def check_heads(heads: int, dim: int) -> None:
    """Raise `ValueError` unless `heads` divides the width."""
    if heads < 1 or dim % heads:
        fits = [str(h) for h in range(1, dim + 1) if dim % h == 0]
        raise ValueError(f"heads {heads} does not divide dim {dim} (allowed: {', '.join(fits)})")


class Attention(Branch):
    """Causal multi-head self-attention with fused query, key and value: `(B, T, D) -> (B, T, D)`.

    softmax(Q K^T / sqrt(E)) V, then the output projection (Vaswani et al. 2017, section 3.2), and
    dropout on the output. `path` says how it is computed: `sdpa` calls
    `scaled_dot_product_attention`, `matmul` writes the products out, which is faster for short
    contexts on a CPU (`benchmarks/attention.py`). Raises `ValueError` when heads do not divide dim.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        path: AttentionPath = "sdpa",
    ) -> None:
        super().__init__()
        check_heads(heads, dim)
        self.heads = heads
        self.path: AttentionPath = path
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the attention's update `(B, T, D)` for `x (B, T, D)`."""
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        if context.cache is not None:  # k, v (B, H, S, E) with S = past + T
            if self in context.cache:
                past_k, past_v = context.cache[self]
                k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
            context.cache[self] = (k, v)
        y = self._attend(q, k, v, context.mask)  # (B, H, T, E)
        out: Tensor = self.dropout(self.out(y.transpose(1, 2).reshape(B, T, D)))
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        T, S = q.shape[2], k.shape[2]
        if self.path == "sdpa" and mask is None and T == S:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        look = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)  # (T, S)
        if mask is not None:
            look = look & mask
        if self.path == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=look)
        never = torch.finfo(q.dtype).min  # not -inf, whose row of softmax has a NaN gradient
        bias = torch.zeros(look.shape, dtype=q.dtype, device=q.device).masked_fill_(~look, never)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias  # (B, H, T, S)
        weights = torch.softmax(scores, dim=-1)
        if mask is not None:  # a query that may look nowhere gets 0, as from sdpa, and not NaN
            weights = weights.masked_fill(~look.any(dim=-1, keepdim=True), 0.0)
        return weights @ v

    def matrices(self) -> Sequence[Matrix]:
        """Return query, key, value (rows of the fused weight) and out, each `(D, D)`."""
        D, fused = self.out.in_features, self.qkv.weight
        roles = ("query", "key", "value")
        parts = [Matrix(role, fused, slice(i * D, (i + 1) * D)) for i, role in enumerate(roles)]
        return [*parts, Matrix("out", self.out.weight)]


class FeedForward(Branch):
    """W_out act(W_in x): `(..., D) -> (..., D)` through a hidden width, dropout on the output.

    Vaswani et al. 2017, section 3.3, with GELU by default. `hidden` defaults to 4 D.
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 0,
        *,
        activation: str = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.lift = nn.Linear(dim, hidden or 4 * dim, bias=bias)
        self.out = nn.Linear(hidden or 4 * dim, dim, bias=bias)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the feed-forward's update `(..., D)` for `x (..., D)`."""
        out: Tensor = self.dropout(self.out(self.activation(self.lift(x))))
        return out

    def matrices(self) -> Sequence[Matrix]:
        """Return in `(hidden, D)` and out `(D, hidden)`."""
        return [Matrix("in", self.lift.weight), Matrix("out", self.out.weight)]
