"""The branch: what a residual connection adds to the stream, where it sits, how it starts.

Shapes: `(..., D)` in, `(..., D)` out. Tokens are `(B, T, D)`, channel-last images `(B, H, W, D)`.
"""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

# What a matrix of a branch does. A scheme's start finds matrices by role, never by name.
ROLES = ("query", "key", "value", "in", "out")


@dataclass(frozen=True)
class Site:
    """All that a wiring may know besides its branch.

    A network may hold several stacks in a row, as a ResNet does. What a wiring builds at the ends
    or keeps of earlier connections follows its stack (`index`, `count`, `part`, `first`, `last`);
    a constant that a paper gives by depth follows the network (`layer`, `layers`, `connections`).
    """

    dim: int  # D, width of the stream
    index: int = 0  # position of this connection in its stack, 0-based
    count: int = 1  # connections in the stack; parallel branches in one connection count once
    parts: int = 1  # connections per layer: 2 in a Transformer, 1 in a ResNet or MLP
    norm: Callable[[int], nn.Module] = nn.LayerNorm  # width -> norm over the last axis
    start: str = ""  # a named start that replaces the one the wiring asks for
    device: torch.device | str | None = None  # where the wiring's own parameters are made
    dtype: torch.dtype | None = None
    before: int = 0  # connections of the network in front of this stack
    total: int = 0  # connections of the network; 0: the stack is all of it

    @property
    def connections(self) -> int:
        """The number of connections of the network, K."""
        return self.total or self.count

    @property
    def layer(self) -> int:
        """The layer of the network that this connection lies in, 0-based."""
        return (self.before + self.index) // self.parts

    @property
    def layers(self) -> int:
        """The number of layers of the network, L = K / parts."""
        return self.connections // self.parts

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

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """Return an unfilled parameter; `reset_parameters` of its owner gives it its start.

        A scalar is `(1,)`: a parameter without an axis cannot be sharded.
        """
        assert shape, "a scalar parameter has the shape (1,)"
        return nn.Parameter(torch.empty(shape, device=self.device, dtype=self.dtype))

    def new_linear(self, inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
        """Return a linear layer; `reset_parameters` of its owner may replace its start."""
        return nn.Linear(inputs, outputs, bias=bias, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Context:
    """What a forward pass hands, unchanged, to every branch. A feed-forward ignores it.

    `mask` is a boolean tensor broadcastable to `(B, heads, T, S)`, True where a query may look.
    `cache` maps a module to what it keeps of past positions, an attention its `(key, value)`, each
    `(B, heads, S, head_dim)`; a module replaces its own entry. `past` positions are in the cache
    already.
    `values` is where one branch leaves what later ones read, new in every pass of a stack.
    """

    mask: Tensor | None = None
    cache: dict[nn.Module, tuple[Tensor, ...]] | None = None
    past: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)


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


def reset(module: nn.Module) -> None:
    """Call `reset_parameters` of a module, or, where it has none, of all that it holds."""
    own = getattr(module, "reset_parameters", None)
    if callable(own):
        own()
        return
    for child in module.children():
        reset(child)


class Wrapped(Branch):
    """Any module `(..., D) -> (..., D)` as a branch: it gets no context and keeps its own start.

    It must not change its input in place (a leading `ReLU(inplace=True)`): that is the stream.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return `module(x)`. Raises `ValueError` where it has another shape than x."""
        out: Tensor = self.module(x)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"{type(self.module).__name__} returns {got} for {tuple(x.shape)}; a branch of a "
                "stack must return one tensor of the shape of its input"
            )
        return out

    def reset_parameters(self) -> None:
        """Call `reset_parameters` wherever there is one (needed after the meta device)."""
        reset(self.module)


def wide(x: Tensor) -> Tensor:
    """Return a 16-bit tensor as float32, any other as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def sharded(x: Tensor) -> bool:
    """Whether a tensor is spread over several processes (FSDP2)."""
    home = sys.modules.get("torch.distributed.tensor")
    return home is not None and isinstance(x, home.DTensor)


def keep_mask(x: Tensor, keep: float, *, per_sample: bool = True) -> Tensor:
    """Return 1 with probability `keep` and else 0: one for each sample of `x (B, ..., D)`, or one.

    A tensor of one axis is one sample.
    """
    samples = x.shape[0] if per_sample and x.dim() > 1 else 1
    shape = (samples,) + (1,) * (x.dim() - 1)
    return (torch.rand(shape, device=x.device) < keep).to(x.dtype)


class DropPath(nn.Module):
    """Stochastic depth: an update with probability `1 - rate` per sample, rescaled, else 0.

    Huang et al. 2016 (arXiv:1603.09382) drop per mini-batch; this is the per-sample form of timm,
    `f mask / (1 - rate)`, off in evaluation, whose expectation in training is `f`.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path {rate!r} must be at least 0 and less than 1")
        self.rate = rate

    def forward(self, update: Tensor) -> Tensor:
        """Return the update `(B, ..., D)`, dropped per sample while training."""
        if not self.training or self.rate == 0:
            return update
        return update * keep_mask(update, 1 - self.rate) / (1 - self.rate)

    def drop(self, connection: nn.Module) -> None:
        """Drop what a connection adds: what `norm_out` returns where it has one, else its branch.

        A norm behind the addition, a gate or the |f| of deep-delta act on what is left of it. The
        names of all tensors stay as they are.
        """
        connection.drop_path = self
        added = "norm_out" if hasattr(connection, "norm_out") else "branch"
        connection.get_submodule(added).register_forward_hook(self._returned)

    def _returned(self, _module: nn.Module, _args: object, out: Tensor) -> Tensor:
        dropped: Tensor = self(out)
        return dropped

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"rate={self.rate:g}"


# -- named starts: how the matrices of a branch begin ------------------------------------------
# Each takes the role, the weight (out, in, ...), the site and m, the number of matrices that the
# branch applies up to its next `out`, and fills the weight. L layers, K connections.


def _normal(_role: str, weight: Tensor, _site: Site, _m: int) -> None:
    """N(0, 0.02) for every matrix."""
    nn.init.normal_(weight, std=0.02)


def _gpt2(role: str, weight: Tensor, site: Site, _m: int) -> None:
    """N(0, 0.02), and 0.02 / sqrt(K) for `out` (GPT-2 report, section 2.3: K = 2 layers)."""
    nn.init.normal_(weight, std=0.02 / math.sqrt(site.connections) if role == "out" else 0.02)


def _zero(role: str, weight: Tensor, _site: Site, _m: int) -> None:
    """N(0, 0.02), and 0 for `out`, so that every branch starts at 0 (muP, nanochat)."""
    nn.init.normal_(weight, std=0.0 if role == "out" else 0.02)


def _depth_scaled(role: str, weight: Tensor, site: Site, _m: int) -> None:
    """N(0, 0.02), and 0.02 / sqrt(2 l) for `out` of the l-th layer (OLMo-core, `llama_depth`)."""
    std = 0.02 / math.sqrt(2 * (site.layer + 1)) if role == "out" else 0.02
    nn.init.normal_(weight, std=std)


def _xavier(_role: str, weight: Tensor, _site: Site, _m: int) -> None:
    """Xavier normal, gain 1 (Glorot and Bengio 2010)."""
    nn.init.xavier_normal_(weight)


def _fairseq(role: str, weight: Tensor, _site: Site, _m: int) -> None:
    """Xavier normal, gain 1/sqrt(2) for query, key and value (fairseq; `nn.MultiheadAttention`)."""
    nn.init.xavier_normal_(weight, 0.5**0.5 if role in ("query", "key", "value") else 1.0)


def _subln(role: str, weight: Tensor, site: Site, m: int) -> None:
    """`fairseq`, times sqrt(ln 2 L) on value, in and out.

    Wang et al. 2022 (arXiv:2210.06423), the form of an encoder or decoder alone; it belongs to the
    inner norms `joined_norm` and `hidden_norm`.
    """
    _fairseq(role, weight, site, m)
    if role in ("value", "in", "out"):
        weight.mul_(math.sqrt(math.log(2 * site.layers)))


def _tfixup(role: str, weight: Tensor, site: Site, _m: int) -> None:
    """Xavier normal: gain 1/sqrt(2) for query and key, 0.67 L^(-1/4) for value, in and out.

    Huang et al. 2020, "Improving Transformer Optimization Through Better Initialization", the form
    of an encoder. A GPT has its two connections in a layer, and no cross-attention, so this is the
    form for it; `tfixup-decoder` is the other. The embedding, which the paper scales as well, is
    no branch and keeps its start.
    """
    scale = 0.67 * site.layers**-0.25
    nn.init.xavier_normal_(weight, 0.5**0.5 if role in ("query", "key") else scale)


def _tfixup_decoder(role: str, weight: Tensor, site: Site, _m: int) -> None:
    """`tfixup` with (9 L)^(-1/4): the form of a decoder with three connections in a layer."""
    scale = (9 * site.layers) ** -0.25
    nn.init.xavier_normal_(weight, 0.5**0.5 if role in ("query", "key") else scale)


def _he(_role: str, weight: Tensor, _site: Site, _m: int) -> None:
    """N(0, 2 / fan_in) (He et al. 2015, arXiv:1502.01852)."""
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


def _he_out(_role: str, weight: Tensor, _site: Site, _m: int) -> None:
    """N(0, 2 / fan_out): `he` by the outputs, as the authors' ResNets and torchvision's start."""
    nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


def _fixup(role: str, weight: Tensor, site: Site, m: int) -> None:
    """N(0, 2 / fan_out) K^(-1/(2m-2)) for all matrices of a branch but `out`, which is 0.

    Zhang et al. 2019 (arXiv:1901.09321), for branches that apply m matrices one after the other;
    attention counts its four. Fixup's scalar biases and multiplier are modules of a ResNet's
    branch and not part of this start; nor is its head of zeros.
    """
    if role == "out":
        nn.init.zeros_(weight)
        return
    _he_out(role, weight, site, m)
    m = max(m, 2)  # 1 only where there is no `out`
    weight.mul_(site.connections ** (-1 / (2 * m - 2)))


def _torch(_role: str, weight: Tensor, _site: Site, _m: int) -> None:
    """U(-1, 1) / sqrt(fan_in), as `nn.Linear` starts, which also starts its biases so."""
    bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
    nn.init.uniform_(weight, -bound, bound)


STARTS: Mapping[str, Callable[[str, Tensor, Site, int], None]] = {
    "normal": _normal,
    "gpt2": _gpt2,
    "zero": _zero,
    "depth-scaled": _depth_scaled,
    "xavier": _xavier,
    "fairseq": _fairseq,
    "subln": _subln,
    "tfixup": _tfixup,
    "tfixup-decoder": _tfixup_decoder,
    "he": _he,
    "he-out": _he_out,
    "fixup": _fixup,
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
    for matrix, m in zip(matrices, _run_lengths(matrices), strict=True):
        if matrix.role not in ROLES:
            raise ValueError(f"unknown role {matrix.role!r} (known: {', '.join(ROLES)})")
        if id(matrix.parameter) not in done:
            STARTS[name](matrix.role, matrix.weight, site, m)
        matrix.weight.mul_(gains.get(matrix.role, 1.0))


def _run_lengths(matrices: Sequence[Matrix]) -> list[int]:
    """Return for each matrix how many there are in its run, which ends with `out`."""
    lengths: list[int] = []
    for i, matrix in enumerate(matrices, 1):
        if matrix.role == "out" or i == len(matrices):
            run = i - len(lengths)
            lengths += [run] * run
    return lengths
