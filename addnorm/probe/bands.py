"""What the vitals of a network should be: its own law at its depth, from its wiring or its build.

For stacks of ours the law is a fact of the wiring's class; for other models it follows from what
discovery saw: a norm after every addition, a norm in front of the branches, neither, or no skip.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from addnorm.contract import Law, Wiring
from addnorm.probe.structure import Structure
from addnorm.probe.trace import UNDERFLOW, Connection

# A residual network's gradient changes by a power of depth from end to end, that of one without an
# identity path exponentially; K^2 lies between. Few connections cannot tell: 100 at least.
POWER, LEAST = 2, 100.0
# Each branch that reads a normalised stream and has unit gain adds 1 to the mean square. Trained
# networks, with gains and sums that are not independent, reach some times that, not 10.
SLACK = 10.0
# In bfloat16 half a unit in the last place is 2^-9 of a value: less is lost in the addition.
ROUNDED = 2.0**-9
# An update 10 times the stream leaves 1 % of the variance to all that came before.
DROWNED = 10.0
# Positions that share all but 1 part in 1000 of their squared length.
ALIKE = 1e-3
NEIGHBOURS = 3  # connections on each side that one is held against
MOST = 0.9  # of the connections: a stem or a head may be joined otherwise


class Ends(NamedTuple):
    """The gradient's RMS after the first and after the last connection of a stream."""

    first: int
    last: int
    low: float  # after the first
    high: float  # after the last
    depth: int  # connections of the stream


@dataclass(frozen=True)
class Evidence:
    """All that a finding is judged by. Index k is the k-th connection from the input."""

    connections: tuple[Connection, ...]
    structure: Structure
    wirings: tuple[Wiring | None, ...]  # of each connection, where it is ours
    loss: float
    entered_non_finite: bool  # whether what enters the first connection is not finite
    dead: Mapping[int, str]  # connections whose branch does nothing and learns nothing -> how

    def __len__(self) -> int:
        return len(self.connections)

    @property
    def law(self) -> Law:
        """How the RMS of the stream goes over depth."""
        own = [w.stream_law for w in self.wirings if w is not None]
        if own:
            return Counter(own).most_common(1)[0][0]
        joins = self.structure.joins
        if all(j.kind == "block" for j in joins):
            return "vanishing"
        if self.mostly("norm_after"):
            return "constant"
        return "sqrt" if self.mostly("norm_before") else "geometric"

    def mostly(self, fact: str) -> bool:
        """Whether nearly all connections have a fact of `Join`."""
        joins = self.structure.joins
        return sum(bool(getattr(j, fact)) for j in joins) >= MOST * len(joins)

    @property
    def post_norm(self) -> bool:
        """Whether each sum is normalised, with nothing on the skip and no stream beside it."""
        own = [w for w in self.wirings if w is not None]
        if own:
            return all(
                w.drawing.after == "N" and not w.drawing.skip and w.drawing.stream == "x"
                for w in own
            )
        return self.mostly("norm_after") and not self.mostly("norm_before")

    @property
    def layers(self) -> int:
        """How many blocks the connections lie in."""
        own = [w for w in self.wirings if w is not None]
        if len(own) == len(self):
            return max(w.site.layers for w in own)
        return len({j.block for j in self.structure.joins})

    def plain_skip(self, k: int) -> bool:
        """Whether the stream should pass a connection as it is."""
        wiring, join = self.wirings[k], self.structure.joins[k]
        if wiring is None:
            return join.kind == "add" and not join.projected and not join.norm_after
        drawing = wiring.drawing
        return not drawing.skip and not drawing.after and drawing.join == "+"

    def update(self, k: int) -> float:
        """Return the RMS of what connection k adds; NaN without a skip."""
        c = self.connections[k]
        return c.branch_share * c.stream_before

    def stream_band(self, k: int) -> float:
        """Return the most that the stream's RMS should be after connection k; infinite: no law.

        A norm in front of the branches, or on the stream, sets the unit 1 whatever the embedding;
        without one the stream's own start does. A branch that is a finding of its own, because it
        drowns the stream, may write what it writes.
        """
        law = self.law
        if law not in ("sqrt", "constant"):
            return math.inf
        start = max(c.stream_before for j, c in enumerate(self.connections) if self._first(j))
        unit = 1.0 if law == "sqrt" else max(1.0, start)
        drowning = sum(self.update(j) ** 2 for j in self.drowning() if j <= k)
        return SLACK * math.sqrt(start**2 + (k + 1) * unit**2 + drowning)

    def _first(self, k: int) -> bool:
        """Whether a stream begins at connection k: from no other, or in another shape.

        A projected skip carries the same stream on in another shape.
        """
        join, wiring = self.structure.joins[k], self.wirings[k]
        if k == 0 or wiring is not None:
            return wiring is None or wiring.site.first
        turns = join.shape != self.structure.joins[k - 1].shape and not join.projected
        return join.kind == "add" and (join.root or turns)

    def drowning(self) -> dict[int, float]:
        """Return the connections whose branch drowns the stream -> how far it is out of line.

        A branch behind a norm is held against what its neighbours add; one that scales with the
        stream against their shares. A small embedding before usual branches is not out of line.
        """
        shares = [c.branch_share for c in self.connections]
        scales = self.law in ("geometric", "vanishing")
        sizes = shares if scales else [self.update(k) for k in range(len(self))]
        found = {}
        for k, share in enumerate(shares):
            near = sizes[max(0, k - NEIGHBOURS) : k] + sizes[k + 1 : k + 1 + NEIGHBOURS]
            usual = middle(near)
            if share > DROWNED and sizes[k] > DROWNED * usual:
                found[k] = sizes[k] / usual if usual > 0 else math.inf
        return found

    def gradients(self) -> Iterator[Ends]:
        """Yield the gradient at the two ends of every stream: an encoder's, then a decoder's.

        Where it overflows on its way back, the upper end is the last connection that has a number.
        A stream of one connection is left out.
        """
        starts = [k for k in range(len(self)) if self._first(k)]
        for start, end in zip(starts, [*starts[1:], len(self)], strict=True):
            heard = [c.gradient_after for c in self.connections[start:end]]
            lost = [k for k, g in enumerate(heard) if math.isnan(g)]
            first = max(lost, default=-1) + 1
            if first < len(heard) - 1 and math.isfinite(heard[-1]):
                low, high = (max(g, UNDERFLOW) for g in (heard[first], heard[-1]))
                yield Ends(start + first, end - 1, low, high, end - start)

    def gradient_band(self, ends: Ends, *, growing: bool) -> float:
        """Return by what factor the gradient at the two ends may differ.

        A norm in front of a branch divides its gradient by the stream's RMS: where the stream
        grows towards the output, so may the gradient towards the input.
        """
        band = max(LEAST, float(ends.depth) ** POWER)
        if growing and self.law == "sqrt":
            first = self.connections[ends.first].stream_after
            last = self.connections[ends.last].stream_after
            if 0 < first < last:
                band *= last / first
        return band

    def tokens(self, k: int) -> bool:
        """Whether the stream is a sequence of positions `(B, T, D)`: no bare rows, no images."""
        join, wiring = self.structure.joins[k], self.wirings[k]
        several = wiring is not None and wiring.drawing.stream == "X"  # (B, T, n, D)
        return join.features == -1 and len(join.shape) == 3 + several


def middle(values: list[float]) -> float:
    """Return the median of what is a number; NaN of none."""
    known = sorted(v for v in values if not math.isnan(v))
    return known[len(known) // 2] if known else math.nan
