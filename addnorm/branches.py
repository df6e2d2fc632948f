"""The branch: what a residual connection adds to the stream, where it sits, how it starts.

Shapes: `(..., D)` in, `(..., D)` out. Tokens are `(B, T, D)`, channel-last images `(B, H, W, D)`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

# What a matrix of a branch does. A scheme's start finds matrices by role, never by name.
ROLES = ("query", "key", "value", "in", "out")


@dataclass(frozen=True)
class Site:
    """All that a wiring may know besides its branch."""

    dim: int  # D, width of the stream
    index: int = 0  # position of this connection in the stack, 0-based
    count: int = 1  # K, connections in the stack
    parts: int = 1  # connections per layer: 2 in a Transformer, 1 in a ResNet or MLP
    norm: Callable[[int], nn.Module] = nn.LayerNorm  # width -> norm over the last axis
    start: str = ""  # a named start that replaces the one the wiring asks for
    device: torch.device | str | None = None  # where the wiring's own parameters are made
    dtype: torch.dtype | None = None

    @property
    def layer(self) -> int:
        """The layer that this connection lies in, 0-based."""
        return self.index // self.parts

    @property
    def layers(self) -> int:
        """The number of layers, L = K / parts."""
        return self.count // self.parts

    @property
    def part(self) -> int:
        """The place of this connection within its layer, 0-based."""
        return self.index % self.parts

    @property
    def first(self) -> bool:
        """Whether this is the first connection of the stack."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether this is the last connection of the stack."""
        return self.index == self.count - 1


@dataclass(frozen=True)
class Context:
    """What a forward pass hands, unchanged, to every branch. A feed-forward ignores it.

    `mask` is a boolean tensor broadcastable to `(B, heads, T, S)`, True where a query may look.
    `cache` maps an attention module to its past `(key, value)`, each `(B, heads, S, head_dim)`;
    the attention module replaces its own entry. `past` positions are in the cache already.
    """

    mask: Tensor | None = None
    cache: dict[nn.Module, tuple[Tensor, Tensor]] | None = None
    past: int = 0


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a branch, or some rows of a fused one, and its role."""

    role: str  # one of ROLES; several matrices may share a role
    parameter: Tensor  # the whole parameter, (out, in, ...)
    rows: slice | None = None  # None: all of them

    @property
    def weight(self) -> Tensor:
        """The rows as a view `(out, in, ...)`."""
        return self.parameter if self.rows is None else self.parameter[self.rows]


class Map(nn.Module):
    """A module `(..., D) -> (..., D)`, such as a norm. Says its type, nothing more."""

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor:
            """Map `x`."""


class Branch(nn.Module):
    """A sublayer `(..., D) -> (..., D)`, without the norm in front of it and without the skip."""

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, context: Context) -> Tensor:
            """Call as a module, so that hooks run."""

    @abstractmethod
    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Map `x (..., D)` to the update `(..., D)`."""

    def matrices(self) -> Sequence[Matrix]:
        """Return the weight matrices with their roles, so that a scheme's start finds them."""
        return ()

    def reset_parameters(self) -> None:
        """Start what has no role (biases, inner norms). The matrices get the scheme's start."""


class Wrapped(Branch):
    """Any module `(..., D) -> (..., D)` as a branch: it gets no context and keeps its own start."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return `module(x)`."""
        out: Tensor = self.module(x)
        return out

    def reset_parameters(self) -> None:
        """Call `reset_parameters` wherever there is one (needed after the meta device)."""
        for module in self.module.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()


class DropPath(Branch):
    """Stochastic depth: `F(x)` with probability `1 - rate` per sample, rescaled, else 0.

    Huang et al. 2016 (arXiv:1603.09382) drop per mini-batch; this is the per-sample form of timm,
    `F(x) mask / (1 - rate)`, which equals the plain branch in evaluation.
    """

    def __init__(self, branch: Branch, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path {rate!r} must be at least 0 and less than 1")
        self.branch = branch
        self.rate = rate

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the branch's output, dropped per sample while training."""
        out = self.branch(x, context)
        if not self.training or self.rate == 0:
            return out
        keep = 1 - self.rate
        samples = out.shape[0] if out.dim() > 1 else 1
        shape = (samples,) + (1,) * (out.dim() - 1)
        return out * (torch.rand(shape, device=out.device) < keep).to(out.dtype) / keep

    def matrices(self) -> Sequence[Matrix]:
        """Return the matrices of the branch inside."""
        return self.branch.matrices()

    def reset_parameters(self) -> None:
        """Start the branch inside."""
        self.branch.reset_parameters()

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"rate={self.rate:g}"


# -- named starts: how the matrices of a branch begin ------------------------------------------
# Each takes the role, the weight (out, in, ...) and the site, and fills the weight.


def _normal(_role: str, weight: Tensor, _site: Site) -> None:
    """N(0, 0.02) for every matrix."""
    nn.init.normal_(weight, std=0.02)


def _gpt2(role: str, weight: Tensor, site: Site) -> None:
    """N(0, 0.02), and 0.02 / sqrt(K) for `out` (GPT-2 report, section 2.3: K = 2 layers)."""
    nn.init.normal_(weight, std=0.02 / math.sqrt(site.count) if role == "out" else 0.02)


def _xavier(_role: str, weight: Tensor, _site: Site) -> None:
    """Xavier normal, gain 1 (Glorot and Bengio 2010)."""
    nn.init.xavier_normal_(weight)


def _fairseq(role: str, weight: Tensor, _site: Site) -> None:
    """Xavier normal, gain 1/sqrt(2) for query, key and value (fairseq; `nn.MultiheadAttention`)."""
    nn.init.xavier_normal_(weight, 0.5**0.5 if role in ("query", "key", "value") else 1.0)


def _he(_role: str, weight: Tensor, _site: Site) -> None:
    """N(0, 2 / fan_in) (He et al. 2015, arXiv:1502.01852)."""
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


def _torch(_role: str, weight: Tensor, _site: Site) -> None:
    """U(-1, 1) / sqrt(fan_in), as `nn.Linear` starts, which also starts its biases so."""
    bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
    nn.init.uniform_(weight, -bound, bound)


STARTS: Mapping[str, Callable[[str, Tensor, Site], None]] = {
    "normal": _normal,
    "gpt2": _gpt2,
    "xavier": _xavier,
    "fairseq": _fairseq,
    "he": _he,
    "torch": _torch,
}


@torch.no_grad()
def start(branch: Branch, name: str, site: Site, gains: Mapping[str, float]) -> None:
    """Fill the matrices of `branch` by the named start and multiply by their gain; biases get 0.

    A bias is that of a linear layer whose weight the branch names. A branch that names no matrices
    keeps its own start. Raises `ValueError` when a gain is asked of such a branch, because the
    scheme would silently not be applied, and for an unknown role.
    """
    matrices = branch.matrices()
    if gains and not matrices:
        module = branch.module if isinstance(branch, Wrapped) else branch
        raise ValueError(
            f"{type(module).__name__} names no matrices, but the wiring scales {', '.join(gains)}; "
            "make it a Branch whose matrices() returns them with their roles"
        )
    named = {id(matrix.parameter) for matrix in matrices}
    linears = [m for m in branch.modules() if isinstance(m, nn.Linear) and id(m.weight) in named]
    for linear in linears:
        if name == "torch":
            linear.reset_parameters()  # weight, then bias, as the random stream of nn.Linear goes
        elif linear.bias is not None:
            nn.init.zeros_(linear.bias)
    done = {id(linear.weight) for linear in linears} if name == "torch" else set()
    for matrix in matrices:
        if matrix.role not in ROLES:
            raise ValueError(f"unknown role {matrix.role!r} (known: {', '.join(ROLES)})")
        if id(matrix.parameter) not in done:
            STARTS[name](matrix.role, matrix.weight, site)
        matrix.weight.mul_(gains.get(matrix.role, 1.0))
