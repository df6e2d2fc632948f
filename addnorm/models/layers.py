"""The branches of a Transformer: self-attention, the feed-forward, and both in parallel.

Shapes: B batch, T query positions, S key positions, H heads, G heads of keys and values, E = D / H
width of a head, D stream, C channels of whatever a causal convolution runs over.

What reaches inside a branch is an option of the branch and not a wiring: `AttentionConfig` and
`FeedForwardConfig` name them, and every wiring combines with them. `EmbeddingConfig` says what
stands in front of the branches.
"""

from __future__ import annotations

import functools
import itertools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addnorm.branches import Branch, Context, Matrix, wide
from addnorm.contract import Stack, parse_spec, unknown
from addnorm.norms import NORMS, NormName

AttentionPath = Literal["sdpa", "matmul"]
ATTENTION_PATHS: tuple[AttentionPath, ...] = ("sdpa", "matmul")


class SquaredReLU(nn.Module):
    """max(x, 0)^2 (So et al. 2021, Primer, arXiv:2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return max(x, 0)^2."""
        return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu-tanh": functools.partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "relu2": SquaredReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
# A gated activation multiplies act(W_gate x) by W_in x.
GATES: dict[str, Callable[[], nn.Module]] = {"swiglu": nn.SiLU}
Activation = Literal["gelu", "gelu-tanh", "relu", "relu2", "silu", "tanh", "sigmoid", "swiglu"]
Biases = Literal["all", "qkv", "out", "none"]
Positions = Literal["learned", "rotary", "none"]
EmbeddingStart = Literal["normal", "gpt2", "torch"]
KERNEL = 4  # tokens that a canon layer sees, its own included
ROTARY_BASE = 10_000.0
GATED_MULTIPLE = 8  # a gated hidden width is a multiple of it, for 16-bit matrix products


def check_heads(heads: int, dim: int) -> None:
    """Raise `ValueError` unless `heads` divides the width."""
    if heads < 1 or dim % heads:
        fits = [str(h) for h in range(1, dim + 1) if dim % h == 0]
        raise ValueError(f"heads {heads} does not divide dim {dim} (allowed: {', '.join(fits)})")


def check_rate(name: str, rate: float) -> None:
    """Raise `ValueError` unless a dropout rate is in [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name} {rate} must be at least 0 and less than 1")


def check_choice(name: str, value: str, known: Any) -> None:
    """Raise `ValueError` unless `value` is one of the strings of a `Literal`."""
    if value not in typing.get_args(known):
        raise ValueError(unknown(name, value, typing.get_args(known)))


# -- parts that the branches share ------------------------------------------------------------


class Canon(nn.Module):
    """h <- h + conv(h), a causal depthwise convolution over 4 tokens: `(B, T, C) -> (B, T, C)`.

    Allen-Zhu 2025, "Physics of Language Models: Part 4.1" (canon layers), without bias and
    activation; what stands before the first token is 0. The kernel starts as `nn.Conv1d` does,
    U(-1/2, 1/2). With a cache it keeps its last 3 inputs there, so that a text read in pieces has
    the outputs of the whole.
    """

    if typing.TYPE_CHECKING:

        def __call__(self, h: Tensor, context: Context) -> Tensor:
            """Call as a module, so that hooks run."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, KERNEL))
        self.reset_parameters()

    def forward(self, h: Tensor, context: Context) -> Tensor:
        """Return h + conv(h)."""
        B, _, C = h.shape
        before = h.new_zeros(B, KERNEL - 1, C)
        if context.cache is not None and self in context.cache:
            (before,) = context.cache[self]
        window = torch.cat((before, h), dim=1)  # (B, 3 + T, C)
        if context.cache is not None:
            context.cache[self] = (window[:, 1 - KERNEL :],)
        return h + F.conv1d(window.mT, self.weight, groups=C).mT

    def reset_parameters(self) -> None:
        """Start the kernel in U(-1/2, 1/2)."""
        nn.init.uniform_(self.weight, -(KERNEL**-0.5), KERNEL**-0.5)

    def extra_repr(self) -> str:
        """Show the channels."""
        return str(self.weight.shape[0])


class ValueResidual(nn.Module):
    """V <- l1 V_1 + l2 V, V_1 the values of the first attention of the stack: `(B, H, T, E)`.

    Zhou et al. 2024 (arXiv:2410.17897), the learned form; l1 and l2 start at 1/2. The first
    attention leaves V_1 in `context.values["value"]`. It mixes V_1 with itself, (l1 + l2) V_1,
    where the paper leaves it alone; at the start both are V_1.
    """

    if typing.TYPE_CHECKING:

        def __call__(self, v: Tensor, context: Context) -> Tensor:
            """Call as a module, so that hooks run."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2))
        self.reset_parameters()

    def forward(self, v: Tensor, context: Context) -> Tensor:
        """Return l1 V_1 + l2 V."""
        first = context.values.setdefault("value", v)
        return self.weight[0] * first + self.weight[1] * v

    def reset_parameters(self) -> None:
        """Start l1 and l2 at 1/2."""
        nn.init.constant_(self.weight, 0.5)


class HeadScale(nn.Module):
    """gamma_h y_h: one learned factor for each head of `y (B, H, T, E)`, which starts at 1.

    Shleifer et al. 2021 (NormFormer, arXiv:2110.09456), section 2.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def forward(self, y: Tensor) -> Tensor:
        """Return gamma_h y_h."""
        return y * self.weight[:, None, None]

    def reset_parameters(self) -> None:
        """Start every factor at 1."""
        nn.init.ones_(self.weight)


def reset(*modules: nn.Module | None) -> None:
    """Call `reset_parameters` of every module that is one: not None, not the identity."""
    for module in modules:
        if module is not None and not isinstance(module, nn.Identity):
            typing.cast(Any, module).reset_parameters()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    path: AttentionPath,
    *,
    causal: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(q k^T / sqrt(E)) v `(B, H, T, E)` for q `(B, H, T, E)`.

    k and v are `(B, G, S, E)`, each of their heads read by H / G heads of q in a row. `mask` is
    True where a query may look; one that may look nowhere gets 0. `causal`: the last query sits at
    the last key, and none looks ahead. `dropout` falls on the weights, after the softmax.
    """
    T, S, shared = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if causal and path == "sdpa" and mask is None and T == S:
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=shared > 1
        )
    look = mask
    if causal:
        look = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)  # (T, S)
        look = look if mask is None else look & mask
    if path == "sdpa":
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=look, dropout_p=dropout, enable_gqa=shared > 1
        )
    if shared > 1:
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, T, S)
    if look is not None:
        never = torch.finfo(q.dtype).min  # not -inf, whose row of softmax has a NaN gradient
        bias = torch.zeros(look.shape, dtype=q.dtype, device=q.device).masked_fill_(~look, never)
        scores = scores + bias
    weights = torch.softmax(scores, dim=-1)
    if look is not None and mask is not None:  # who may look nowhere gets 0, as from sdpa
        weights = weights.masked_fill(~look.any(dim=-1, keepdim=True), 0.0)
    return (F.dropout(weights, dropout) if dropout else weights) @ v


def rotate(q: Tensor, k: Tensor, past: int = 0) -> tuple[Tensor, Tensor]:
    """Turn q `(B, H, T, E)` and k `(B, G, T, E)` by their positions past, past + 1, ...

    Su et al. 2021 (RoFormer, arXiv:2104.09864), equation 34, with base 10000: at position t the
    plane of channels i and i + E/2 turns by t 10000^(-2i/E). That is the half-split pairing of
    GPT-NeoX and of LLaMA in transformers; the paper pairs channels 2i and 2i + 1. A product of a
    query and a key then depends on the distance of their positions alone.
    """
    T, E = q.shape[2], q.shape[3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    plane = torch.arange(0, E, 2, device=q.device, dtype=dtype)  # 2i
    t = torch.arange(past, past + T, device=q.device, dtype=dtype)
    angle = torch.outer(t, ROTARY_BASE ** (-plane / E))  # (T, E / 2)
    cos, sin = angle.cos(), angle.sin()

    def turn(x: Tensor) -> Tensor:
        one, other = wide(x).chunk(2, dim=-1)
        return torch.cat((one * cos - other * sin, one * sin + other * cos), dim=-1).to(x.dtype)

    return turn(q), turn(k)


def with_past(k: Tensor, v: Tensor, module: nn.Module, context: Context) -> tuple[Tensor, Tensor]:
    """Return k and v `(B, G, S, E)` after those that `module` has in the cache, and keep them."""
    if context.cache is None:
        return k, v
    if module in context.cache:
        past_k, past_v = context.cache[module]
        k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
    context.cache[module] = (k, v)
    return k, v


# -- branches ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionConfig:
    """What stands inside an attention. The extras, which are False, are off by default."""

    kv_heads: int = 0
    """heads of keys and values; must divide heads; 0: as many as heads"""
    attention_biases: Biases = "all"
    """biases of the matrices: all, qkv, out or none"""
    attention_projection: bool = True
    """whether the output matrix follows the joined heads"""
    attention_dropout: float = 0.0
    """dropout on the attention weights"""
    qk_norm: bool = False
    """RMSNorm on the queries and keys of each head"""
    qkv_norm: bool = False
    """RMSNorm on the queries, keys and values of each head"""
    value_residual: bool = False
    """mix each layer's values with those of the first layer"""
    head_scale: bool = False
    """one learned factor for each head"""
    joined_norm: bool = False
    """norm on the joined heads, before the output matrix (Sub-LN)"""
    output_norm: bool = False
    """norm on the output of the attention (NormFormer)"""
    canon_a: bool = False
    """causal convolution over 4 tokens on the input of the attention"""
    canon_b: bool = False
    """the same on queries, keys and values"""

    def __post_init__(self) -> None:
        if self.kv_heads < 0:
            raise ValueError(f"kv_heads {self.kv_heads} must be at least 0")
        check_choice("attention_biases", self.attention_biases, Biases)
        check_rate("attention_dropout", self.attention_dropout)


def check_attention(dim: int, heads: int, config: AttentionConfig, rotary: bool) -> None:
    """Raise `ValueError` for heads, heads of keys, or a width of heads that do not fit."""
    check_heads(heads, dim)
    if config.kv_heads and heads % config.kv_heads:
        fits = ", ".join(str(h) for h in range(1, heads + 1) if heads % h == 0)
        raise ValueError(
            f"kv_heads {config.kv_heads} does not divide heads {heads} (allowed: {fits})"
        )
    if rotary and dim // heads % 2:
        raise ValueError(
            f"rotary positions turn pairs of channels, but heads have width {dim // heads} "
            f"(dim {dim} / heads {heads}); it must be even"
        )


class Attention(Branch):
    """Multi-head self-attention with fused query, key and value: `(B, T, D) -> (B, T, D)`.

    softmax(Q K^T / sqrt(E)) V, then the output projection (Vaswani et al. 2017, section 3.2), and
    dropout on the output. `causal`: no query looks ahead of itself. `rotary`: positions turn Q and
    K (`rotate`). `path` says how it is computed: `sdpa` calls `scaled_dot_product_attention`,
    `matmul` writes the products out, which is faster for short contexts on a CPU
    (`benchmarks/attention.py`). Raises `ValueError` for heads that do not fit (`check_attention`).

    `config` says what stands inside, in this order:

    | option | what it does |
    |---|---|
    | `canon_a` | x <- `Canon`(x) (Allen-Zhu 2025, site A) |
    | `kv_heads` | G heads of K and V, each read by H / G of Q (arXiv:2305.13245) |
    | `canon_b` | Q, K, V <- `Canon`(Q, K, V) (site B) |
    | `qk_norm` | RMSNorm of each head of Q and of K, a gain `(E,)` each (arXiv:2010.04245) |
    | `qkv_norm` | `qk_norm`, and the same of V (HybridNorm, arXiv:2503.04598) |
    | `value_residual` | V <- `ValueResidual`(V), which is then what a cache keeps |
    | `attention_dropout` | dropout on the weights, after the softmax |
    | `head_scale` | `HeadScale` of each head's output |
    | `joined_norm` | norm before the output matrix (Sub-LN, arXiv:2210.06423) |
    | `attention_projection` | W_out; without it the joined heads are the output |
    | `output_norm` | norm after the output matrix (NormFormer, arXiv:2110.09456) |

    `norm` makes the norms of width D. A cache keeps K, turned already, and V, `(B, G, S, E)` each.
    Without the output matrix there is none of role `out`: the starts that rest on it (`zero` and
    `fixup` make it 0, `gpt2` shrinks it) start the other three as ever, and the attention not at 0.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        config: AttentionConfig | None = None,
        causal: bool = True,
        rotary: bool = False,
        dropout: float = 0.0,
        path: AttentionPath = "sdpa",
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        config = config or AttentionConfig()
        check_attention(dim, heads, config, rotary)
        self.heads, self.kv_heads = heads, config.kv_heads or heads
        self.causal, self.rotary = causal, rotary
        self.path: AttentionPath = path
        E, biases = dim // heads, config.attention_biases
        fused = (heads + 2 * self.kv_heads) * E
        self.qkv = nn.Linear(dim, fused, bias=biases in ("all", "qkv"))
        self.out: nn.Linear | None = None
        if config.attention_projection:
            self.out = nn.Linear(dim, dim, bias=biases in ("all", "out"))
        self.weight_dropout = config.attention_dropout
        self.dropout = nn.Dropout(dropout)

        def one(width: int, on: bool, make: Callable[[int], nn.Module] = norm) -> nn.Module:
            return make(width) if on else nn.Identity()

        rmsnorm, both = NORMS["rmsnorm"], config.qk_norm or config.qkv_norm
        self.q_norm = one(E, both, rmsnorm)
        self.k_norm = one(E, both, rmsnorm)
        self.v_norm = one(E, config.qkv_norm, rmsnorm)
        self.head_scale = one(heads, config.head_scale, HeadScale)
        self.joined_norm = one(dim, config.joined_norm)
        self.output_norm = one(dim, config.output_norm)
        self.canon_a = Canon(dim) if config.canon_a else None
        self.canon_b = Canon(fused) if config.canon_b else None
        self.value_residual = ValueResidual() if config.value_residual else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the attention's update `(B, T, D)` for `x (B, T, D)`."""
        B, T, D = x.shape
        H, G = self.heads, self.kv_heads
        x = self.canon_a(x, context) if self.canon_a else x
        qkv = self.qkv(x)  # (B, T, (H + 2 G) E)
        qkv = self.canon_b(qkv, context) if self.canon_b else qkv
        heads = qkv.view(B, T, H + 2 * G, D // H).transpose(1, 2)
        q, k, v = heads.split((H, G, G), dim=1)  # (B, H, T, E), (B, G, T, E) twice
        q, k, v = self.q_norm(q), self.k_norm(k), self.v_norm(v)
        q, k = rotate(q, k, context.past) if self.rotary else (q, k)
        v = self.value_residual(v, context) if self.value_residual else v
        k, v = with_past(k, v, self, context)  # (B, G, S, E), S = past + T
        dropout = self.weight_dropout if self.training else 0.0
        y = attend(q, k, v, context.mask, self.path, causal=self.causal, dropout=dropout)
        y = self.joined_norm(self.head_scale(y).transpose(1, 2).reshape(B, T, D))
        y = self.out(y) if self.out else y
        out: Tensor = self.dropout(self.output_norm(y))
        return out

    def matrices(self) -> Sequence[Matrix]:
        """Return query `(D, D)`, key and value `(G E, D)`, rows of the fused weight, and out."""
        D, fused = self.qkv.in_features, self.qkv.weight
        kv = D // self.heads * self.kv_heads
        edges = (0, D, D + kv, D + 2 * kv)
        roles = ("query", "key", "value")
        rows = [slice(a, b) for a, b in itertools.pairwise(edges)]
        parts = [Matrix(role, fused, part) for role, part in zip(roles, rows, strict=True)]
        return [*parts, *([Matrix("out", self.out.weight)] if self.out else [])]

    def reset_parameters(self) -> None:
        """Start the options: gains 1, kernels and the mix of values as they say."""
        reset(self.canon_a, self.canon_b, self.q_norm, self.k_norm, self.v_norm)
        reset(self.value_residual, self.head_scale, self.joined_norm, self.output_norm)

    def extra_repr(self) -> str:
        """Show what no module below shows."""
        ahead, turned = "" if self.causal else ", causal=False", ", rotary" if self.rotary else ""
        return f"heads={self.heads}, kv_heads={self.kv_heads}{ahead}{turned}"


@dataclass(frozen=True)
class FeedForwardConfig:
    """What stands inside a feed-forward. The extras, which are False, are off by default."""

    activation: Activation = "gelu"
    """gelu (exact), gelu-tanh, relu, relu2 (squared), silu, tanh, sigmoid or swiglu (gated)"""
    hidden: int = 0
    """hidden width; 0: 4 dim, for swiglu 8/3 dim rounded up to a multiple of 8"""
    feedforward_bias: bool = True
    """whether its matrices have biases"""
    feedforward_projection: bool = True
    """whether the output matrix follows; without it the hidden width is dim"""
    feedforward_dropout: float = 0.0
    """dropout on the hidden width, after the activation"""
    hidden_norm: bool = False
    """norm after the activation (Sub-LN, NormFormer)"""
    canon_c: bool = False
    """causal convolution over 4 tokens on the input of the feed-forward"""
    canon_d: bool = False
    """the same on its hidden width, before the activation"""

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, Activation)
        check_rate("feedforward_dropout", self.feedforward_dropout)
        if self.hidden < 0:
            raise ValueError(f"hidden {self.hidden} must be at least 0")


class FeedForward(Branch):
    """W_out act(W_in x): `(..., D) -> (..., D)` through a hidden width, dropout on the output.

    Vaswani et al. 2017, section 3.3, with GELU by default. With `swiglu` it is
    W_out (silu(W_gate x) * W_in x) (Shazeer 2020, arXiv:2002.05202, equation 6). `hidden`, where
    given, replaces that of the config. Without the output matrix it is one layer, act(W_in x) of
    width D, and W_in has the role `out`. Raises `ValueError` for another hidden width then.

    `config` says what stands inside, in this order:

    | option | what it does |
    |---|---|
    | `canon_c` | x <- `Canon`(x), for tokens `(B, T, D)` only (Allen-Zhu 2025, site C) |
    | `canon_d` | W_in x <- `Canon`(W_in x), for tokens `(B, T, D)` only (site D) |
    | `hidden_norm` | norm of width `hidden` after the activation (Sub-LN, NormFormer) |
    | `feedforward_dropout` | dropout on the hidden width, before the output matrix |

    NormFormer's residual weight, x <- w * x + F(x), is the wiring's business and not here.
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 0,
        *,
        config: FeedForwardConfig | None = None,
        dropout: float = 0.0,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        config = config or FeedForwardConfig()
        hidden, bias = hidden_width(dim, config, hidden), config.feedforward_bias
        self.lift = nn.Linear(dim, hidden, bias=bias)
        self.out = nn.Linear(hidden, dim, bias=bias) if config.feedforward_projection else None
        gated = config.activation in GATES
        self.gate = nn.Linear(dim, hidden, bias=bias) if gated else None
        self.activation = (GATES if gated else ACTIVATIONS)[config.activation]()
        self.dropout = nn.Dropout(dropout)
        self.hidden_dropout = nn.Dropout(config.feedforward_dropout)
        self.hidden_norm = norm(hidden) if config.hidden_norm else nn.Identity()
        self.canon_c = Canon(dim) if config.canon_c else None
        self.canon_d = Canon(hidden) if config.canon_d else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the feed-forward's update `(..., D)` for `x (..., D)`."""
        x = self.canon_c(x, context) if self.canon_c else x
        h = self.lift(x)
        h = self.canon_d(h, context) if self.canon_d else h
        h = self.activation(self.gate(x)) * h if self.gate else self.activation(h)
        h = self.hidden_dropout(self.hidden_norm(h))
        out: Tensor = self.dropout(self.out(h) if self.out else h)
        return out

    def matrices(self) -> Sequence[Matrix]:
        """Return the gate and in, `(hidden, D)`, and out `(D, hidden)`, as far as there are."""
        gate = [Matrix("in", self.gate.weight)] if self.gate else []
        if self.out is None:
            return [*gate, Matrix("out", self.lift.weight)]
        return [*gate, Matrix("in", self.lift.weight), Matrix("out", self.out.weight)]

    def reset_parameters(self) -> None:
        """Start the options: gains 1, kernels as they say."""
        reset(self.canon_c, self.canon_d, self.hidden_norm)


def hidden_width(dim: int, config: FeedForwardConfig, hidden: int = 0) -> int:
    """Return the hidden width of a feed-forward, that of `config` unless `hidden` is given.

    Raises `ValueError` where there is no output matrix to lead back from it.
    """
    hidden = hidden or config.hidden
    if not config.feedforward_projection:
        if hidden not in (0, dim):
            raise ValueError(
                f"hidden {hidden} must be dim {dim} (or 0) without feedforward_projection"
            )
        return dim
    if config.activation in GATES:  # 3 matrices of about the parameters of 2 of 4 D
        return hidden or -(-8 * dim // (3 * GATED_MULTIPLE)) * GATED_MULTIPLE
    return hidden or 4 * dim


class Parallel(Branch):
    """F_1(x) + F_2(x) + ...: branches that read the same input, as one branch.

    With pre-norm it is the parallel block of GPT-J and PaLM (arXiv:2204.02311, section 2),
    x <- x + Attn(N(x)) + FFN(N(x)) with one norm. One connection then adds two branches, and a
    start that counts connections, such as `gpt2`, counts it once. Raises `ValueError` without
    branches.
    """

    def __init__(self, *branches: Branch) -> None:
        super().__init__()
        if not branches:
            raise ValueError("Parallel needs at least one branch")
        self.branches = nn.ModuleList(branches)

    def __iter__(self) -> Iterator[Branch]:
        return (typing.cast(Branch, branch) for branch in self.branches)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the sum of the branches' updates `(..., D)`."""
        first, *others = self
        out = first(x, context)
        for branch in others:
            out = out + branch(x, context)
        return out

    def matrices(self) -> Sequence[Matrix]:
        """Return the matrices of all branches, one branch after the other."""
        return [matrix for branch in self for matrix in branch.matrices()]

    def reset_parameters(self) -> None:
        """Start every branch."""
        reset(*self)


# -- what a model of these branches shares -----------------------------------------------------


@dataclass(frozen=True)
class EmbeddingConfig:
    """What stands in front of the stack, and how both ends of the model start."""

    positions: Positions = "learned"
    """learned (an embedding), rotary (inside the attention) or none"""
    embedding_dropout: float = 0.0
    """dropout on the sum of the embeddings, as in GPT-2"""
    embedding_start: EmbeddingStart = "normal"
    """how embeddings and head start: normal, gpt2 (N(0, 0.02) both) or torch (its defaults)"""

    def __post_init__(self) -> None:
        check_choice("positions", self.positions, Positions)
        check_choice("embedding_start", self.embedding_start, EmbeddingStart)
        check_rate("embedding_dropout", self.embedding_dropout)


class TransformerConfig(Protocol):
    """What the configuration of a model of these branches says."""

    @property
    def depth(self) -> int:
        """Layers."""

    @property
    def dim(self) -> int:
        """Width of the stream."""

    @property
    def heads(self) -> int:
        """Heads of queries."""

    @property
    def context(self) -> int:
        """Positions."""

    @property
    def wiring(self) -> str:
        """The wiring."""

    @property
    def norm(self) -> NormName:
        """The norm."""

    @property
    def dropout(self) -> float:
        """Rate on the output of every branch."""

    @property
    def drop_path(self) -> float:
        """Rate of stochastic depth in the last layer."""

    @property
    def start(self) -> str:
        """A named start, or none."""

    @property
    def embedding(self) -> EmbeddingConfig:
        """In front of the stack."""

    @property
    def attention(self) -> AttentionConfig:
        """Inside the attention."""

    @property
    def feedforward(self) -> FeedForwardConfig:
        """Inside the feed-forward."""


NESTED = {
    "embedding": EmbeddingConfig,
    "attention": AttentionConfig,
    "feedforward": FeedForwardConfig,
}


def check_transformer(config: TransformerConfig) -> None:
    """Make configs of the nested mappings that a config.json keeps, and check the whole.

    Raises `ValueError` for what does not fit. Belongs into `__post_init__`.
    """
    for name, kind in NESTED.items():
        given: Any = getattr(config, name)
        if isinstance(given, Mapping):
            known = [f.name for f in fields(kind)]
            for key in given:
                if key not in known:
                    raise ValueError(unknown(f"option of {name}", key, known))
            object.__setattr__(config, name, kind(**given))
    for name in ("depth", "dim", "heads", "context"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} {getattr(config, name)} must be at least 1")
    rotary = config.embedding.positions == "rotary"
    check_attention(config.dim, config.heads, config.attention, rotary)
    hidden_width(config.dim, config.feedforward)
    check_rate("dropout", config.dropout)
    check_rate("drop_path", config.drop_path)
    if config.norm not in NORMS:
        raise ValueError(unknown("norm", config.norm, NORMS))


def asked(config: TransformerConfig) -> tuple[AttentionConfig, FeedForwardConfig]:
    """Return the branches' options with those switched on that the wiring asks for.

    Raises `ValueError` when it asks for one that no branch has.
    """
    spec = parse_spec(config.wiring)
    asks, attention, feedforward = spec.wiring.asks, config.attention, config.feedforward
    ours, theirs = ({f.name for f in fields(c)} for c in (attention, feedforward))
    for name in asks:
        if name not in ours | theirs:
            what = f"option that {spec.name} asks of its branches"
            raise ValueError(unknown(what, name, sorted(ours | theirs)))
    attention = replace(attention, **{k: v for k, v in asks.items() if k in ours})
    feedforward = replace(feedforward, **{k: v for k, v in asks.items() if k in theirs})
    return attention, feedforward


def build_stack(config: TransformerConfig, *, causal: bool, parallel: bool = False) -> Stack:
    """Return the stack of a Transformer: attention and feed-forward in turn, `depth` times.

    `parallel`: both in one connection. An option that the wiring asks of its branches is on.
    """
    D, norm, dropout = config.dim, NORMS[config.norm], config.dropout
    inside, hidden = asked(config)
    rotary = config.embedding.positions == "rotary"
    branches: list[Branch] = []
    for _ in range(config.depth):
        attention = Attention(
            D, config.heads, config=inside, causal=causal, rotary=rotary, dropout=dropout, norm=norm
        )
        feedforward = FeedForward(D, config=hidden, dropout=dropout, norm=norm)
        both = (attention, feedforward)
        branches += [Parallel(*both)] if parallel else both
    parts = 1 if parallel else 2
    return Stack(
        branches, config.wiring, dim=D, parts=parts, norm=norm, start=config.start,
        drop_path=config.drop_path,
    )  # fmt: skip


def start_ends(
    start: EmbeddingStart,
    token: nn.Embedding | None,
    position: nn.Embedding | None,
    head: nn.Linear | None,
) -> None:
    """Start the embeddings and the head of a model, as far as it has them.

    | `embedding_start` | embeddings | head |
    |---|---|---|
    | `normal` | N(0, 0.1); N(0, 0.02) where the head is tied | N(0, 0.02), bias 0 |
    | `gpt2` | N(0, 0.02) | N(0, 0.02), bias 0 |
    | `torch` | N(0, 1), as `nn.Embedding` | U(-1, 1) / sqrt(D), bias too, as `nn.Linear` |

    A tied weight starts as that of a head.
    """
    tied = token is not None and head is not None and head.weight is token.weight
    # 0.02 starves the wirings without a norm.
    std = {"gpt2": 0.02, "torch": 1.0}.get(start, 0.02 if tied else 0.1)
    for embedding in (token, position):
        if embedding is not None:
            nn.init.normal_(embedding.weight, std=std)
    if head is not None and start == "torch":
        head.reset_parameters()
    elif head is not None:
        nn.init.normal_(head.weight, std=0.02)
        if head.bias is not None:
            nn.init.zeros_(head.bias)


def choose_attention(model: nn.Module, path: str) -> None:
    """Compute every attention of `model` by way of `path` from now on."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.path = "sdpa" if path == "sdpa" else "matmul"
