"""nGPT: a Transformer whose stream and matrices live on the unit sphere.

Loshchilov et al. 2024 (arXiv:2410.01131). It fixes what a wiring, a norm and a start would choose,
so it is a model of its own and takes no wiring.

Shapes: B batch, T positions, V vocabulary, D width, H heads, E = D / H width of a head. |x| is the
Euclidean norm over the last axis, norm(x) = x / |x|.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addnorm.branches import Branch, Context, Matrix
from addnorm.groups import parameter_groups
from addnorm.models.layers import ATTENTION_PATHS, AttentionPath, attend, check_heads, with_past


class Gain(nn.Module):
    """A learned vector `(width,)` that starts at `init` and is stored at `scale`.

    Its value is `stored init / scale`: a step of Adam's, about the learning rate whatever the
    gradient's size, moves it by `init / scale` times as much (section 2.5).
    """

    if typing.TYPE_CHECKING:

        def __call__(self) -> Tensor:
            """Return the vector."""

    def __init__(self, width: int, init: float, scale: float) -> None:
        super().__init__()
        self.init, self.scale = init, scale
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def forward(self) -> Tensor:
        """Return the vector."""
        return self.weight * (self.init / self.scale)

    def reset_parameters(self) -> None:
        """Store `scale`, which stands for `init`."""
        nn.init.constant_(self.weight, self.scale)

    def extra_repr(self) -> str:
        """Show the start and the scale."""
        return f"init={self.init:g}, scale={self.scale:g}"


class SphereAttention(Branch):
    """softmax(sqrt(E) q k^T) V, q = s norm(W_q x), k = s norm(W_k x): `(B, T, D) -> (B, T, D)`.

    s `(H, E)` is learned and starts at 1 (section 2.3). Causal, without biases. Raises
    `ValueError` when heads do not divide dim.
    """

    def __init__(self, dim: int, heads: int, *, path: AttentionPath = "sdpa") -> None:
        super().__init__()
        check_heads(heads, dim)
        self.heads = heads
        self.path: AttentionPath = path
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.scale = Gain(dim, init=1.0, scale=dim**-0.5)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the attention's output, which the connection normalises."""
        B, T, D = x.shape
        H, E = self.heads, D // self.heads
        q, k, v = self.qkv(x).view(B, T, 3, H, E).permute(2, 0, 3, 1, 4)  # (B, H, T, E)
        s = self.scale().view(H, 1, E)
        q, k = s * F.normalize(q, dim=-1), s * F.normalize(k, dim=-1)
        k, v = with_past(k, v, self, context)
        y = attend(E * q, k, v, context.mask, self.path)  # which divides by sqrt(E)
        out: Tensor = self.out(y.transpose(1, 2).reshape(B, T, D))
        return out

    def matrices(self) -> Sequence[Matrix]:
        """Return query, key, value (rows of the fused weight) and out, each `(D, D)`."""
        D, fused = self.out.in_features, self.qkv.weight
        roles = ("query", "key", "value")
        parts = [Matrix(role, fused, slice(i * D, (i + 1) * D)) for i, role in enumerate(roles)]
        return [*parts, Matrix("out", self.out.weight)]

    def reset_parameters(self) -> None:
        """Start s at 1."""
        self.scale.reset_parameters()


class SphereFeedForward(Branch):
    """W_out (u * silu(v)), u = s_u W_u x, v = s_v W_v x: `(..., D) -> (..., D)`.

    s_u and s_v `(hidden,)` are learned and start at sqrt(D), because an element of W x is about
    1/sqrt(D) (section 2.4; the paper puts sqrt(D) on v alone, the authors' code on both,
    and what follows is normalised). The hidden width is 4 D. Without biases.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 4 * dim
        self.lift = nn.Linear(dim, 2 * hidden, bias=False)  # u and v
        self.scale = Gain(2 * hidden, init=dim**0.5, scale=1.0)
        self.out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the feed-forward's output, which the connection normalises."""
        u, v = (self.scale() * self.lift(x)).chunk(2, dim=-1)  # (..., hidden)
        out: Tensor = self.out(u * F.silu(v))
        return out

    def matrices(self) -> Sequence[Matrix]:
        """Return in `(2 hidden, D)` and out `(D, hidden)`."""
        return [Matrix("in", self.lift.weight), Matrix("out", self.out.weight)]

    def reset_parameters(self) -> None:
        """Start s_u and s_v at sqrt(D)."""
        self.scale.reset_parameters()


class SphereUpdate(nn.Module):
    """h <- norm(h + |a| * (norm(F(h)) - h)): a step on the sphere from h towards norm(F(h)).

    a `(D,)` is learned, starts at `alpha` and is stored at 1/sqrt(D) (section 2.2). h and
    the result `(..., D)` have norm 1.
    """

    if typing.TYPE_CHECKING:

        def __call__(self, h: Tensor, context: Context) -> Tensor:
            """Call as a module, so that hooks run."""

    def __init__(self, branch: Branch, dim: int, alpha: float) -> None:
        super().__init__()
        self.branch = branch
        self.alpha = Gain(dim, init=alpha, scale=dim**-0.5)

    def forward(self, h: Tensor, context: Context) -> Tensor:
        """Return h after the step."""
        towards = F.normalize(self.branch(h, context), dim=-1)
        return F.normalize(h + self.alpha().abs() * (towards - h), dim=-1)

    def reset_parameters(self) -> None:
        """Start the branch's vectors and a; the model starts the matrices."""
        self.branch.reset_parameters()
        self.alpha.reset_parameters()


@dataclass(frozen=True)
class NGPTConfig:
    """The shape of an nGPT."""

    depth: int = 4
    """layers, each an attention and a feed-forward connection"""
    dim: int = 128
    """width of the stream, D"""
    heads: int = 4
    """attention heads; must divide dim"""
    context: int = 64
    """positions that the model sees at once, T"""
    alpha: float = 0.05
    """how far a connection steps at the start, about 1 / layers"""
    vocab_size: int = 0
    """tokens in the vocabulary; the trainer fills it in from the data"""

    def __post_init__(self) -> None:
        for name in ("depth", "dim", "heads", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        check_heads(self.heads, self.dim)
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha {self.alpha} must be above 0 and at most 1")


class NGPT(nn.Module):
    """Tokens `(B, T)` to logits `(B, T, V)`: 2 depth updates of h on the unit sphere.

    h = norm(token + position embedding), then `SphereUpdate` around attention and feed-forward in
    turn, then logits s_z * (W h) with s_z `(V,)` learned from 1. There is no other norm. The rows
    of embeddings and head and the matrices have norm 1 along the axis of width D; `after_step`
    restores that and must run after every step of the optimiser, as the trainer does. Nothing
    decays, and the authors train without warm-up. They use rotary positions; this model adds a
    learned embedding of the position.
    """

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError(f"vocab_size {config.vocab_size} must be at least 1")
        self.config = config
        D = config.dim
        branches: list[Branch] = []
        for _ in range(config.depth):
            branches += [SphereAttention(D, config.heads), SphereFeedForward(D)]
        self.token = nn.Embedding(config.vocab_size, D)
        self.position = nn.Embedding(config.context, D)
        self.connections = nn.ModuleList(SphereUpdate(b, D, config.alpha) for b in branches)
        self.head = nn.Linear(D, config.vocab_size, bias=False)
        self.scale = Gain(config.vocab_size, init=1.0, scale=D**-0.5)
        self.reset_parameters()

    def __iter__(self) -> Iterator[SphereUpdate]:
        return (typing.cast(SphereUpdate, connection) for connection in self.connections)

    def forward(self, tokens: Tensor, context: Context | None = None) -> Tensor:
        """Return logits `(B, T, V)` for `tokens (B, T)`, after `context.past` cached positions.

        Raises `ValueError` for more positions than the model was built with.
        """
        context = context or Context()
        T, past = tokens.shape[1], context.past
        if past + T > self.config.context:
            raise ValueError(
                f"{past + T} positions, but the model was built for {self.config.context}"
            )
        positions = torch.arange(past, past + T, device=tokens.device)
        h = F.normalize(self.token(tokens) + self.position(positions), dim=-1)  # (B, T, D)
        for connection in self:
            h = connection(h, context)
        logits: Tensor = self.scale() * self.head(h)
        return logits

    def reset_parameters(self) -> None:
        """Start every matrix in random directions and every vector at its start.

        | part | start |
        |---|---|
        | embeddings, head, matrices | N(0, 1), then norm 1 along the axis of width D |
        | a, s, s_u and s_v, s_z | `alpha`, 1, sqrt(D), 1 |
        """
        for matrix in self.matrices():
            nn.init.normal_(matrix.parameter)
        self.after_step()
        for part in (*self, self.scale):
            part.reset_parameters()

    def matrices(self) -> list[Matrix]:
        """Return every matrix once; the axis of width D is the last one, of `out` the first."""
        inside = {
            id(matrix.parameter): Matrix(matrix.role, matrix.parameter)
            for connection in self
            for matrix in connection.branch.matrices()
        }
        ends = [Matrix("in", part.weight) for part in (self.token, self.position, self.head)]
        return [*ends, *inside.values()]

    @torch.no_grad()
    def after_step(self) -> None:
        """Give the rows of every matrix, the columns of an `out`, norm 1."""
        for matrix in self.matrices():
            axis = 0 if matrix.role == "out" else 1
            matrix.parameter.copy_(F.normalize(matrix.parameter, dim=axis))

    def parameter_groups(self, weight_decay: float, every: bool = False) -> list[dict[str, object]]:
        """Return the optimiser's groups: nothing decays, because `after_step` undoes it."""
        return parameter_groups(self, 0.0)

    def choices(self) -> dict[str, tuple[str, ...]]:
        """Return what may be computed in several ways, for the trainer to measure."""
        return {"attention": ATTENTION_PATHS}

    def choose(self, name: str, value: str) -> None:
        """Compute `name` by way of `value` from now on. Results agree to rounding."""
        assert name == "attention", name
        path: AttentionPath = "sdpa" if value == "sdpa" else "matmul"
        for module in self.modules():
            if isinstance(module, SphereAttention):
                module.path = path
