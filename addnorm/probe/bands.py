"""What the vitals of a network should be: its own law at its depth, from its wiring or its build.

For stacks of ours the law is a fact of the wiring's class; for other models it follows from what
discovery saw: a norm after every addition, a norm in front of the branches, neither, or no skip.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

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
        """Whether a stream begins at connection k."""
        wiring = self.wirings[k]
        return k == 0 or (self.structure.joins[k].root if wiring is None else wiring.site.first)

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

    def gradient_band(self, *, growing: bool) -> float:
        """Return by what factor the gradient at the two ends may differ.

        A norm in front of a branch divides its gradient by the stream's RMS: where the stream
        grows towards the output, so may the gradient towards the input.
        """
        band = max(LEAST, float(len(self)) ** POWER)
        if growing and self.law == "sqrt":
            first, last = self.connections[0].stream_after, self.connections[-1].stream_after
            if first > 0 and last > first:
                band *= last / first
        return band

    def gradient_ends(self) -> tuple[int, float, float] | None:
        """Return k, and the gradient's RMS after connection k and after the last one.

        k is 0, or where a gradient that overflows on its way back is last a number. None where
        nothing is to be compared.
        """
        heard = [c.gradient_after for c in self.connections]
        last = heard[-1]
        first = len(heard) - 1
        while first > 0 and not math.isnan(heard[first - 1]):
            first -= 1
        if first == len(heard) - 1 or not math.isfinite(last) or max(heard[first:]) == 0:
            return None
        return first, max(heard[first], UNDERFLOW), max(last, UNDERFLOW)

    def tokens(self, k: int) -> bool:
        """Whether the stream is a sequence of positions `(B, T, D)`: no bare rows, no images."""
        join, wiring = self.structure.joins[k], self.wirings[k]
        several = wiring is not None and wiring.drawing.stream == "X"  # (B, T, n, D)
        return join.features == -1 and len(join.shape) == 3 + several


def middle(values: list[float]) -> float:
    """Return the median of what is a number; NaN of none."""
    known = sorted(v for v in values if not math.isnan(v))
    return known[len(known) // 2] if known else math.nan
