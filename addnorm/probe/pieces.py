"""A network cut into its connections, and vectors pulled back through the pieces.

Letters: n connections, K vectors at once, one for each path length or path.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from addnorm.probe.tap import Point, Visitor, is_float

AT_ONCE = 2**18  # elements of the vectors in one batched product; larger ones go one by one

Vectors = list[Tensor]  # one for each tensor of a stream, (K, *shape)


@dataclass
class Piece:
    """One connection: what enters as leaves, what leaves attached to them."""

    update: Tensor  # attached to the streams in front
    branch: Tensor  # the leaf that stands for it in what leaves
    out: list[Tensor] = field(default_factory=list)  # attached to the leaves of skip and branch
    leaves: list[Tensor] = field(default_factory=list)  # what stands for it behind


class Cut(Visitor):
    """Cuts the graph behind every branch and behind every connection.

    Each piece then depends on leaves only, so that a product with its Jacobian stays inside it, and
    no path is counted twice whatever leads from where to where.
    """

    def __init__(self, outer: Iterable[int]) -> None:
        self.outer = {k: i for i, k in enumerate(outer)}
        self.pieces: dict[int, Piece] = {}
        self.entered: list[Tensor] = []  # the tensors of the first stream

    def __call__(self, k: int, point: Point) -> Tensor | None:
        """Return a leaf in place of the update."""
        if k not in self.outer:
            return None
        stream = floats(point.stream)
        if not self.pieces:
            self.entered = once(stream)
        leaf = point.update.detach().requires_grad_()
        self.pieces[k] = Piece(point.update, leaf)
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


def floats(value: Any) -> list[Tensor]:
    """Return the floating-point tensors of a stream, in order."""
    return [t for t in pytree.tree_leaves(value) if is_float(t)]


def once(tensors: list[Tensor]) -> list[Tensor]:
    """Return each tensor once, in order."""
    return list({id(t): t for t in tensors}.values())


def merged(gradients: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Add up the gradients of tensors that are one and the same under several names.

    A stack may open its stream as (x, x); the gradient is that at x.
    """
    by_place: dict[tuple[object, ...], Tensor] = {}
    for gradient, tensor in zip(gradients, tensors, strict=True):
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        by_place[place] = by_place[place] + gradient if place in by_place else gradient
    return list(by_place.values())


class Network:
    """The pieces in a row, and what goes back through them."""

    def __init__(self, cut: Cut, loss: Tensor) -> None:
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
        return [_longer(t, n + 1) for t in merged(first, self.points[0])]

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
                    whole = merged(first, self.points[0])
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
