"""The path spectrum: the gradient split by how many branches it came through, exactly.

A network of n connections is a sum over 2^n paths: each goes around every branch or through it
(Veit et al. 2016, arXiv:1605.06431, section 3). With every branch linearised at the operating point
the gradient at the start is the sum of `g_k`, what all paths through exactly k branches carry. One
recursion on the way back gives them all at once: `v_k <- S^T v_k + A^T v_(k-1)`, S the Jacobian of
the skip and of all that lies between connections, A that of the branch: n(n+1)/2 products.

Two questions, two readings. Coherent, `|g_k|^2`: the length of the sum. Incoherent: the sum over
the paths of `|g_p|^2`, as if each path were alone; what cancels between paths still counts.

Letters: n connections, K vectors at once, one for each length or path.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from addnorm.contract import unknown
from addnorm.probe.discover import discover
from addnorm.probe.losses import Loss, Progress, call_model, loss_of
from addnorm.probe.purity import untouched, unwrap
from addnorm.probe.structure import Structure
from addnorm.probe.tap import Point, Visitor, is_float, tapped

Incoherent = Literal["auto", "exact", "sample", "off"]
WAYS = ("auto", "exact", "sample", "off")
EXACT = 12  # connections up to which paths are enumerated
PASSED_BY = 1e-3  # share of the gradient, far above rounding, that the lengths may not explain
AT_ONCE = 2**18  # elements of the vectors in one batched product; larger ones go one by one
LEAST = 8  # samples, however long they take


@dataclass(frozen=True)
class Spectrum:
    """The gradient at the first point of the stream by path length k = 0 ... n, in plain numbers.

    `norm[k]` is `|g_k|`; `share[k]` is `<g_k, g> / |g|^2`, with a sign, and sums to 1.
    `incoherent[k]` is the sum over the paths of length k of `|g_p|^2`; `incoherent_error` its
    standard error, 0 where all paths were enumerated; both are empty when that was left out.
    """

    names: list[str]  # of the connections, in order
    gradient: float  # |g|
    loss: float
    loss_kind: str
    norm: list[float]
    share: list[float]
    check: float  # |sum_k g_k - g| / |g|, g by an ordinary backward pass
    incoherent: list[float]
    incoherent_error: list[float]
    incoherent_kind: str  # exact, sampled or off
    samples: int
    products: int  # vector-Jacobian products with a branch for the coherent reading, n(n+1)/2
    memory: int  # bytes of the vectors that were held at once, at most
    note: str
    seed: int
    seconds: float

    @property
    def mean_length(self) -> float:
        """The mean path length by coherent energy, `sum k |g_k|^2 / sum |g_k|^2`."""
        return _mean([x * x for x in self.norm])

    @property
    def mean_length_incoherent(self) -> float:
        """The mean path length by incoherent energy; NaN when that was left out."""
        return _mean(self.incoherent)

    def range(self, part: float = 0.9, *, incoherent: bool = False) -> tuple[int, int]:
        """Return the fewest lengths in a row that hold this part of the energy: first and last.

        `part` between 0 and 1, 1 included. Raises `ValueError` for another, or when the incoherent
        reading was left out.
        """
        if not 0 < part <= 1:
            raise ValueError(f"part {part} must be above 0 and at most 1")
        energy = self.incoherent if incoherent else [x * x for x in self.norm]
        if not energy:
            raise ValueError("the incoherent reading was left out; ask for incoherent='sample'")
        return _range(energy, part)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the derived ones included."""
        derived: dict[str, Any] = {
            "mean_length": self.mean_length,
            "mean_length_incoherent": self.mean_length_incoherent,
            "range_90": list(self.range(0.9)),
            "range_95": list(self.range(0.95)),
        }
        if self.incoherent:
            derived["incoherent_range_90"] = list(self.range(0.9, incoherent=True))
            derived["incoherent_range_95"] = list(self.range(0.95, incoherent=True))
        return asdict(self) | derived


def _mean(energy: list[float]) -> float:
    total = sum(energy)
    return sum(k * e for k, e in enumerate(energy)) / total if total > 0 else math.nan


def _range(energy: list[float], part: float) -> tuple[int, int]:
    """Return the shortest interval with this part of the energy; of equal ones the fullest."""
    total = sum(energy)
    for width in range(1, len(energy) + 1):
        starts = range(len(energy) - width + 1)
        best = max(starts, key=lambda i: sum(energy[i : i + width]))
        if sum(energy[best : best + width]) >= part * total * (1 - 1e-12):
            return best, best + width - 1
    return 0, len(energy) - 1


def spectrum(
    model: nn.Module,
    inputs: Any,
    targets: Any = None,
    *,
    loss: Loss | None = None,
    incoherent: Incoherent = "auto",
    samples: int = 64,
    budget: float = 60.0,
    seed: int = 0,
    progress: Progress | None = None,
    structure: Structure | None = None,
) -> Spectrum:
    """Return how much of the gradient each path length carries, coherently and incoherently.

    `inputs`, `targets` and `loss` as in `xray`. The branches are those of `structure`, or of what
    `discover` finds; a connection inside another's branch belongs to that branch. What lies between
    connections (a norm behind the addition, a ReLU, a projected shortcut) belongs to the skip. A
    stream of several tensors, or a history of them, counts as one vector.

    `incoherent`: "exact" enumerates the paths, up to 12 connections; "sample" puts a random sign
    on every branch, `samples` times: over the signs the paths are uncorrelated, so `|g_k|^2` is
    then the sum over the paths in expectation; "auto" enumerates where that is possible and fits
    in `budget` seconds. Samples end with the budget, 8 are always taken.

    Runs in evaluation mode, two forward passes; memory is that of the activations and of `memory`.
    Nothing in the model changes.

    Raises `ValueError` where the sum over the lengths is not the gradient, where the gradient is 0
    or not finite, and for settings out of their range.
    """
    began = time.monotonic()
    if incoherent not in WAYS:
        raise ValueError(unknown("incoherent", incoherent, WAYS))
    if samples < 2:
        raise ValueError(f"samples {samples} must be at least 2, or there is no error estimate")
    model = unwrap(model)
    structure = structure or discover(model, inputs)
    outer = [k for k, join in enumerate(structure.joins) if join.inside is None]
    n = len(outer)
    if not n:
        raise ValueError("no connection was found: there is only one path")
    if incoherent == "exact" and n > EXACT:
        raise ValueError(
            f"incoherent='exact' enumerates 2^{n} paths; above {EXACT} connections say 'sample'"
        )
    with untouched(model), torch.enable_grad():
        model.eval()
        cut = _Cut(outer)
        with tapped(model, structure, cut):
            output = call_model(model, inputs)
        value, kind = loss_of(output, targets, loss)
        net = _Network(cut, value)
        measured = float(value.detach())
        whole = _ordinary(model, structure, inputs, targets, loss, outer[0])
        size = float(_norm(whole))
        if not 0 < size < math.inf:
            raise ValueError(
                f"the gradient at {structure.names[outer[0]]} is {size:g}: no spectrum"
            )
        rows = net.lengths()
        products = net.products
        one = time.monotonic() - began
        by_length = [_flat(rows, k) for k in range(n + 1)]
        check = float(_norm(sum(by_length) - whole)) / size
        eps = max(torch.finfo(t.dtype).eps for t in net.points[0])
        if not check <= min(0.1, PASSED_BY * max(1.0, eps / torch.finfo(torch.float32).eps)):
            raise ValueError(
                f"the path lengths sum to the gradient only up to {check:.1e}: the gradient passes "
                "the connections by; give structure=discover(model, inputs, blocks=...)"
            )
        norms = [float(_norm(g)) for g in by_length]
        shares = [float(torch.dot(g, whole)) / size**2 for g in by_length]
        del by_length, rows
        way, note = incoherent, ""
        paths = one * (2**n - 1) / max(1, n * (n + 1) // 2)
        if way == "auto":
            way = "exact" if n <= EXACT and paths < max(budget - one, 1.0) else "sample"
        energy: list[float] = []
        error: list[float] = []
        taken = 0
        if progress is not None:
            progress(1, 1 + samples * (way == "sample") + (way == "exact"))
        if way == "exact":
            energy, error = net.enumerate(), [0.0] * (n + 1)
            if progress is not None:
                progress(2, 2)
        elif way == "sample":
            drawn = []
            draw = torch.Generator().manual_seed(seed)
            for taken in range(1, samples + 1):
                signs = (torch.randint(0, 2, (n,), generator=draw) * 2 - 1).tolist()
                rows = net.lengths(signs)
                drawn.append([float(_norm(_flat(rows, k))) ** 2 for k in range(n + 1)])
                if progress is not None:
                    progress(1 + taken, 1 + samples)
                if taken >= min(LEAST, samples) and time.monotonic() - began > budget:
                    break
            if taken < samples:
                note = f"the budget of {budget:g} s ended after {taken} of {samples} samples"
            table = torch.tensor(drawn, dtype=torch.float64)
            energy = table.mean(0).tolist()
            error = (table.std(0) / math.sqrt(taken)).tolist()
    kinds = {"exact": "exact", "sample": "sampled", "off": "off"}
    return Spectrum(
        names=[structure.names[k] for k in outer],
        gradient=size,
        loss=measured,
        loss_kind=kind,
        norm=norms,
        share=shares,
        check=check,
        incoherent=energy,
        incoherent_error=error,
        incoherent_kind=kinds[way],
        samples=taken,
        products=products,
        memory=net.most,
        note=note,
        seed=seed,
        seconds=time.monotonic() - began,
    )


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm


def _flat(rows: list[Tensor], k: int) -> Tensor:
    """Return the k-th vector of a stream of several tensors, in float64."""
    return torch.cat([t[k].flatten().double() for t in rows])


# -- the network cut into its connections ----------------------------------------------------------

Vectors = list[Tensor]  # one for each tensor of a stream, (K, *shape)


@dataclass
class _Piece:
    """One connection: what enters as leaves, what leaves attached to them."""

    update: Tensor  # attached to the streams in front
    branch: Tensor  # the leaf that stands for it in what leaves
    out: list[Tensor] = field(default_factory=list)  # attached to the leaves of skip and branch
    leaves: list[Tensor] = field(default_factory=list)  # what stands for it behind


class _Cut(Visitor):
    """Cuts the graph behind every branch and behind every connection.

    Each piece then depends on leaves only, so that a product with its Jacobian stays inside it, and
    no path is counted twice whatever leads from where to where.
    """

    def __init__(self, outer: Iterable[int]) -> None:
        self.outer = {k: i for i, k in enumerate(outer)}
        self.pieces: dict[int, _Piece] = {}
        self.entered: list[Tensor] = []  # the tensors of the first stream

    def __call__(self, k: int, point: Point) -> Tensor | None:
        """Return a leaf in place of the update."""
        if k not in self.outer:
            return None
        stream = _floats(point.stream)
        if not self.pieces:
            self.entered = _once(stream)
        leaf = point.update.detach().requires_grad_()
        self.pieces[k] = _Piece(point.update, leaf)
        return leaf.clone()  # what comes next may change it in place

    def after(self, k: int, out: Any) -> Any:
        """Return leaves in place of what leaves the connection."""
        if k not in self.outer:
            return None
        piece = self.pieces[k]
        tensors, tree = pytree.tree_flatten(out)
        for i, tensor in enumerate(tensors):
            if is_float(tensor):
                leaf = tensor.detach().requires_grad_()
                piece.out.append(tensor)
                piece.leaves.append(leaf)
                tensors[i] = leaf.clone()
        return pytree.tree_unflatten(tensors, tree)


def _floats(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if is_float(t)]


def _once(tensors: list[Tensor]) -> list[Tensor]:
    """Return each tensor once, in order."""
    return list({id(t): t for t in tensors}.values())


def _ordinary(
    model: nn.Module, structure: Structure, inputs: Any, targets: Any, loss: Loss | None, first: int
) -> Tensor:
    """Return the gradient at the first point of the stream by one ordinary backward pass."""
    entered: list[Tensor] = []

    def note(k: int, point: Point) -> None:
        if k == first:
            entered.extend(_once(_floats(point.stream)))

    with tapped(model, structure, note):
        value, _ = loss_of(call_model(model, inputs), targets, loss)
    if not value.requires_grad:
        return torch.zeros(1, dtype=torch.float64)
    found = torch.autograd.grad(value, entered, allow_unused=True)
    parts = [torch.zeros_like(t) if g is None else g for g, t in zip(found, entered, strict=True)]
    return torch.cat([p.flatten().double() for p in _merged(parts, entered)])


def _merged(gradients: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Add up the gradients of tensors that are one and the same under several names.

    A stack may open its stream as (x, x); the gradient is that at x.
    """
    by_place: dict[tuple[object, ...], Tensor] = {}
    for gradient, tensor in zip(gradients, tensors, strict=True):
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        by_place[place] = by_place[place] + gradient if place in by_place else gradient
    return list(by_place.values())


class _Network:
    """The pieces in a row, and what goes back through them."""

    def __init__(self, cut: _Cut, loss: Tensor) -> None:
        self.pieces = [cut.pieces[k] for k in sorted(cut.pieces)]
        missed = len(cut.outer) - len(self.pieces)
        if missed:
            raise ValueError(f"{missed} connections were not met again in a second pass")
        self.points = [cut.entered, *(piece.leaves for piece in self.pieces)]
        self.start = self._pull([loss], self.points, [torch.ones_like(loss)[None]])
        self.products = 0
        self.most = 0

    def lengths(self, signs: list[int] | None = None) -> Vectors:
        """Return g_0 ... g_n at the first stream, with a sign on every branch if given."""
        n = len(self.pieces)
        self.products = 0
        held: list[Vectors | None] = [None] * (n + 1)
        self._add(held, self.start, 0)
        for i in reversed(range(n)):
            vectors = held[i + 1]
            held[i + 1] = None
            if vectors is None:  # nothing reads what leaves it
                continue
            skipped, through = self._step(i, vectors)
            if through is not None and signs is not None and signs[i] < 0:
                through = [None if g is None else [-t for t in g] for g in through]
            self._add(held, skipped, 0)
            if through is not None:
                self.products += len(vectors[0])
                self._add(held, through, 1)
            self._note(held)
        first = held[0]
        assert first is not None
        return [_longer(t, n + 1) for t in _merged(first, self.points[0])]

    def enumerate(self) -> list[float]:
        """Return the sums over the paths of each length of `|g_p|^2`, depth first.

        What waits at the points in front travels with each path, because a skip may lead past
        connections.
        """
        n = len(self.pieces)
        energy = [0.0] * (n + 1)
        held: list[Vectors | None]
        todo = [(n - 1, list(self.start), torch.zeros(1, dtype=torch.long))]
        elements = sum(t.numel() for t in self.points[0])
        limit = max(1, AT_ONCE // max(1, elements))
        while todo:
            i, held, lengths = todo.pop()
            if i < 0:
                first = held[0]
                if first is not None:
                    whole = _merged(first, self.points[0])
                    squares = sum(t.flatten(1).double().square().sum(1) for t in whole)
                    assert isinstance(squares, Tensor)
                    for k, square in zip(lengths.tolist(), squares.tolist(), strict=True):
                        energy[k] += square
                continue
            vectors = held[i + 1]
            rest = [*held[: i + 1], None]
            if vectors is None:
                todo.append((i - 1, rest, lengths))
                continue
            skipped, through = self._step(i, vectors)
            self._add(rest, skipped, 0)
            ways = [(rest, lengths)]  # around the branch, and through it
            if through is not None:
                ways.append(([*through, *[None] * (len(rest) - len(through))], lengths + 1))
            ways = [way for way in ways if any(g is not None for g in way[0])]
            if len(ways) == 2 and 2 * len(lengths) <= limit:
                (one, _), (two, longer) = ways
                both = [_beside(a, b, len(lengths)) for a, b in zip(one, two, strict=True)]
                ways = [(both, torch.cat([lengths, longer]))]
            todo += [(i - 1, *way) for way in ways]
            self._note([g for _, waiting, _ in todo for g in waiting])
        return energy

    def _step(
        self, i: int, vectors: Vectors
    ) -> tuple[list[Vectors | None], list[Vectors | None] | None]:
        """Pull vectors at what leaves connection i back to the points in front of it.

        Returns those that went by the skip and those that went through the branch; None where
        nothing goes through it.
        """
        piece = self.pieces[i]
        points = self.points[: i + 1]
        found = self._pull(piece.out, [*points, [piece.branch]], vectors)
        *skipped, branch = found
        if branch is None or not piece.update.requires_grad:
            return skipped, None
        return skipped, self._pull([piece.update], points, branch)

    def _pull(
        self, outputs: list[Tensor], points: list[list[Tensor]], vectors: Vectors
    ) -> list[Vectors | None]:
        """Return the vector-Jacobian products at every point; None where there is no way."""
        pairs = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
        inputs = [t for point in points for t in point if t.requires_grad]
        if not pairs or not inputs:
            return [None] * len(points)
        outs, at = [o for o, _ in pairs], [v for _, v in pairs]
        K = len(at[0])
        chunk = max(1, AT_ONCE // max(1, sum(o.numel() for o in outs)))
        parts = []
        for first in range(0, K, chunk):
            some = [v[first : first + chunk] for v in at]
            parts.append(_products(outs, inputs, some))
        columns = iter(zip(*parts, strict=True))
        result: list[Vectors | None] = []
        for point in points:
            got: list[Tensor | None] = []
            for tensor in point:
                column = next(columns) if tensor.requires_grad else ()
                found = [c for c in column if c is not None]
                got.append(torch.cat(found) if found else None)
            if all(g is None for g in got):
                result.append(None)
            else:
                result.append(
                    [
                        t.new_zeros(K, *t.shape) if g is None else g
                        for g, t in zip(got, point, strict=True)
                    ]
                )
        return result

    def _add(self, held: list[Vectors | None], more: list[Vectors | None], longer: int) -> None:
        """Add vectors to those that wait at the points, `longer` branches further on."""
        for at, vectors in enumerate(more):
            if vectors is None:
                continue
            if longer:
                vectors = [torch.cat([t.new_zeros(1, *t.shape[1:]), t]) for t in vectors]
            old = held[at]
            if old is None:
                held[at] = list(vectors)
                continue
            rows = max(len(old[0]), len(vectors[0]))
            held[at] = [
                _longer(a, rows) + _longer(b, rows) for a, b in zip(old, vectors, strict=True)
            ]

    def _note(self, held: Iterable[Vectors | None]) -> None:
        used = sum(t.numel() * t.element_size() for g in held if g is not None for t in g)
        self.most = max(self.most, used)


def _longer(vectors: Tensor, rows: int) -> Tensor:
    """Return the vectors with zeros behind them up to so many rows."""
    if len(vectors) == rows:
        return vectors
    return torch.cat([vectors, vectors.new_zeros(rows - len(vectors), *vectors.shape[1:])])


def _beside(one: Vectors | None, two: Vectors | None, rows: int) -> Vectors | None:
    """Return the rows of both, zeros where there are none."""
    if one is None and two is None:
        return None
    one = one or [t.new_zeros(rows, *t.shape[1:]) for t in two or []]
    two = two or [t.new_zeros(rows, *t.shape[1:]) for t in one]
    return [torch.cat(pair) for pair in zip(one, two, strict=True)]


def _products(
    outs: list[Tensor], inputs: list[Tensor], vectors: Vectors
) -> tuple[Tensor | None, ...]:
    """Return the products of K vectors with one graph, at once where its operations allow it."""
    if len(vectors[0]) > 1:
        try:
            return torch.autograd.grad(
                outs, inputs, vectors, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except RuntimeError:  # an operation that cannot be vectorised, such as a custom function
            pass
    rows = [
        torch.autograd.grad(
            outs, inputs, [v[k] for v in vectors], retain_graph=True, allow_unused=True
        )
        for k in range(len(vectors[0]))
    ]
    columns = [[c for c in column if c is not None] for column in zip(*rows, strict=True)]
    return tuple(torch.stack(column) if column else None for column in columns)
