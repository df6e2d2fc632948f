"""What a wiring costs, measured on stacks of empty branches: polynomials in the width D.

Shapes: x `(1, TOKENS, D)`. Everything is per token and connection, the mean over a stack.
"""

from __future__ import annotations

import contextlib
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from addnorm.branches import Branch, Context, Matrix
from addnorm.checking import checked
from addnorm.contract import Spec, Stack, options_of

PARTS, COUNT = 2, 24  # connections of a layer, and of the stack
# A prime above every width of a small map, so that a count which it does not divide is work on
# parameters alone: it is done once for all tokens and costs none of them anything.
TOKENS = 67

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm}
REDUCTIONS = {
    aten.sum, aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.prod, aten.var, aten.std,
    aten.logsumexp, aten.cumsum,
}  # fmt: skip
# Moving numbers is no arithmetic; the traffic counts it.
MOVES = {
    aten.clone, aten.copy_, aten.copy, aten._to_copy, aten.cat, aten.stack, aten.flip, aten.empty,
    aten.empty_like, aten.zeros, aten.zeros_like, aten.new_zeros, aten.new_empty, aten.full,
    aten.full_like, aten.ones, aten.ones_like, aten.fill_, aten.arange, aten.lift_fresh,
    aten.lift_fresh_copy, aten._unsafe_view, aten.scalar_tensor, aten._local_scalar_dense,
    aten.index, aten.gather, aten.scatter, aten.roll, aten.repeat,
}  # fmt: skip
# Passes over the elements in what torch runs as one operation: softmax is max, difference, exp,
# sum, quotient; a layer norm mean, difference, square, mean, product with 1/std; an RMS norm
# square, mean, product. A gain and a bias are one pass more each.
SOFTMAX, LAYER_NORM, RMS_NORM = 5, 5, 3


@dataclass(frozen=True)
class Polynomial:
    """a D^2 + b D + c with exact coefficients."""

    a: Fraction
    b: Fraction
    c: Fraction

    @classmethod
    def through(cls, values: Mapping[int, Fraction]) -> Polynomial:
        """Return the polynomial that has the three `values` by width."""
        (x, u), (y, v), (z, w) = values.items()
        slope = (v - u) / (y - x)
        a = ((w - u) / (z - x) - slope) / (z - y)
        b = slope - a * (x + y)
        return cls(a, b, u - a * x * x - b * x)

    def at(self, dim: int) -> float:
        """Return the value at the width `dim`."""
        return float(self.a * dim * dim + self.b * dim + self.c)

    def __str__(self) -> str:
        """Return `24 D^2 + 8 D + 3`; a coefficient that is not whole has two or three digits."""
        text = ""
        for factor, power in ((self.a, " D^2"), (self.b, " D"), (self.c, "")):
            if factor:
                sign = (" - " if factor < 0 else " + ") if text else "-" if factor < 0 else ""
                number = "" if power and abs(factor) == 1 else _digits(abs(factor))
                text += sign + f"{number}{power}".strip()
        return text or "0"


def _digits(value: Fraction) -> str:
    """Write a positive number: whole ones in full, others with two digits after the point."""
    if value.denominator == 1:
        return str(value)
    return f"{float(value):.2f}".rstrip("0").rstrip(".") if value > 1 else f"{float(value):.3g}"


@dataclass(frozen=True)
class Cost:
    """Per connection: learned numbers; per token and connection: FLOPs forward, elements moved."""

    parameters: Polynomial
    flops: Polynomial
    traffic: Polynomial


def cost(spec: Spec) -> Cost:
    """Return what the wiring costs beside its branches, fitted exactly through three widths.

    Raises `ValueError` for options that do not fit together.
    """
    measured = {dim: measure(spec, dim) for dim in _widths(spec)}
    return Cost(*(Polynomial.through({d: m[i] for d, m in measured.items()}) for i in range(3)))


def parameters(spec: Spec) -> Polynomial:
    """Return the first part of `cost` alone, which takes a third of the time."""
    counted = {dim: Fraction(_learned(_stack(spec, dim)), COUNT) for dim in _widths(spec)}
    return Polynomial.through(counted)


def measure(spec: Spec, dim: int) -> tuple[Fraction, Fraction, Fraction]:
    """Return parameters, FLOPs and traffic at one width, the mean over 24 connections.

    *Parameters* and *FLOPs* are those of the whole stack, what opens and closes the stream
    included, without the branches; N is `nn.LayerNorm`. FLOPs are of a forward pass in training: a
    product of matrices counts 2 m n k, a reduction its input elements, any other operation its
    output elements, a view or a copy nothing, and softmax and norms what they are made of: 5
    passes, for a layer norm 5 (an RMS norm 3) and one each for gain and bias.

    *Traffic* is what a fused connection must move: the tensors of the stream that it reads, the
    branch's output unless that is passed on untouched, the branch's input unless the stream itself
    is handed in, and the new tensors of the stream. What is passed on unchanged costs nothing.
    """
    stack = _stack(spec, dim)
    connections, context, moved = list(stack), Context(), 0
    with _alone(), torch.no_grad(), checked(stack), _Meter() as meter:
        stream = connections[0].open(torch.zeros(1, TOKENS, dim, device="cpu"))
        # Tensors of its own each, as later connections find them: what opens the stream may hand
        # out one tensor several times.
        stream = _each(stream, torch.zeros_like)
        for connection in connections:
            branch = typing.cast(_Empty, connection.branch)
            before = {_home(t): t.numel() for t in _tensors(stream)}
            branch.meter, meter.watched, meter.read = meter, set(before), set()
            stream = connection(stream, context)
            went_in, came_out = branch.seen
            after = {_home(t): t.numel() for t in _tensors(stream)}
            moved += sum(n for home, n in before.items() if home in meter.read)
            moved += came_out.numel() if _home(came_out) in meter.read else 0
            moved += went_in.numel() if _home(went_in) not in before else 0
            known = {*before, _home(came_out)}
            moved += sum(n for home, n in after.items() if home not in known)
        connections[-1].close(stream)
    flops, traffic = Fraction(meter.flops, COUNT), Fraction(moved, COUNT * TOKENS)
    return Fraction(_learned(stack), COUNT), flops, traffic


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Leave the random state as it was, and wake no second thread for such small tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


def _widths(spec: Spec) -> tuple[int, int, int]:
    """Return three widths that hold m of frac pieces and what else an option asks to divide."""
    unit = 48
    for name, option in options_of(spec.wiring).items():
        value = spec.options.get(name, option.default)
        if type(value) is int and 0 < value <= 64:
            unit = math.lcm(unit, value)
    return unit, 2 * unit, 3 * unit


def _stack(spec: Spec, dim: int) -> Stack:
    """Return 12 layers of two empty branches."""
    with _alone():
        empty = [_Empty() for _ in range(COUNT)]
        return Stack(empty, spec, dim=dim, parts=PARTS, device="cpu")


def _learned(stack: Stack) -> int:
    """Return the number of parameters of the wirings alone."""
    return sum(p.numel() for p in stack.parameters()) - COUNT


class _Empty(Branch):
    """A branch that computes nothing and remembers the tensors that went in and came out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, 1))  # for the schemes that scale a start
        self.seen: tuple[Tensor, Tensor] = (self.weight, self.weight)
        self.meter: _Meter | None = None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return zeros, made without reading x."""
        out = torch.zeros(x.shape, device=x.device)
        self.seen = (x, out)
        if self.meter is not None:
            self.meter.watched.add(_home(out))
        return out

    def matrices(self) -> Sequence[Matrix]:
        """Return one matrix, as out."""
        return [Matrix("out", self.weight)]


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts FLOPs per token, and notes which of the watched storages are read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.watched: set[int] = set()  # storages that are alive, or another got their address
        self.read: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Say no, or torch imports its compiler, 2 s, to keep it away from this class."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count it."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for arg in args:
                for t in (arg,) if isinstance(arg, Tensor) else _tensors(arg):
                    home = _home(t)
                    if home in self.watched:
                        self.read.add(home)
            whole = _flops(func, args, out)
            self.flops += 0 if whole % TOKENS else whole // TOKENS
        return out


def _flops(func: Any, args: Any, out: Any) -> int:
    """Return the FLOPs of one operation on all tokens."""
    packet = func.overloadpacket
    if packet in MOVES:
        return 0
    if packet in PRODUCTS:
        biased = packet in (aten.addmm, aten.baddbmm)
        inner = args[1 if biased else 0].shape[-1]
        return int(out.numel() * (2 * inner + biased))
    if packet in REDUCTIONS:
        return int(args[0].numel())
    if packet is aten.linalg_vector_norm:  # squares and their sum
        return int(2 * args[0].numel())
    if packet in (aten._softmax, aten._log_softmax):
        return int(SOFTMAX * args[0].numel())
    if packet is aten.native_layer_norm:
        affine = sum(a is not None for a in args[2:4])
        return int((LAYER_NORM + affine) * args[0].numel())
    if packet is aten._fused_rms_norm:
        return int((RMS_NORM + (args[2] is not None)) * args[0].numel())
    return out.numel() if isinstance(out, Tensor) else sum(t.numel() for t in _tensors(out))


def _home(tensor: Tensor) -> int:
    """Return where the storage lies: the same for a tensor and its views while it is alive."""
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a stream or of an operation's arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _each(stream: Any, make: Any) -> Any:
    """Return the stream with `make` of every tensor."""
    return make(stream) if isinstance(stream, Tensor) else tuple(_each(s, make) for s in stream)
