"""The rule by which an addition is a residual connection.

An addition is a connection when one operand, the skip, leads back through views, casts, dropout,
scaling, norms and earlier additions, but through no parameterised map, to a place that the other
operand, the update, comes from as well, and the update passes a parameterised map on the way that
the skip does not. Where both sides pass maps of their own, the one without an activation, or with
fewer maps, is a projected shortcut, unless the sum lies inside the branch of another connection. A
sum inside the branch of a connection of the same block is part of that branch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from addnorm.probe.record import Recorder, Sum, bits, together
from addnorm.probe.tap import Chain


@dataclass(frozen=True)
class Found:
    """An addition that is a connection, by its nodes."""

    node: int
    stream: int  # what both come from
    skip: int
    update: int
    which: int  # operand of the addition that is the skip
    projected: bool
    shape: tuple[int, ...]  # of the sum


class Graph:
    """Applies the rule to what was recorded."""

    def __init__(self, record: Recorder) -> None:
        self.record = record
        self.ancestors = record.ancestors

    def private(self, node: int, other: int) -> int:
        """Return what `node` is made of and `other` is not."""
        return self.ancestors[node] & ~self.ancestors[other]

    def maps_of(self, node: int, other: int) -> int:
        """Return the parameterised maps that `node` passes and `other` does not."""
        return self.private(node, other) & self.record.maps

    def within(self, node: int, outer: Found) -> bool:
        """Whether a node is made inside the branch of a connection."""
        made = self.private(outer.update, outer.skip) >> node & 1
        return bool(made and self.ancestors[node] >> outer.stream & 1)  # no other input's work

    def candidate(self, total: Sum) -> Found | None:
        """Read one addition by the rule, without a look at the others."""
        identity = [
            found
            for which in total.skips
            if total.shapes[which] == together(*total.shapes)
            and (found := self._identity(total, which)) is not None
        ]
        if identity:  # both sides may be streams: the one that parted later, with fewer maps
            return max(
                identity,
                key=lambda f: (f.stream, -self.maps_of(f.skip, f.update).bit_count(), -f.which),
            )
        return self._projected(total)

    def _projected(self, total: Sum) -> Found | None:
        """Read an addition of two sides that both pass maps: the plainer one is the shortcut."""
        pair = total.pair
        maps = [self.maps_of(pair[i], pair[1 - i]) for i in (0, 1)]
        common = self._above(maps[0]) & self._above(maps[1])
        if not common or total.shapes[0] != total.shapes[1]:
            return None
        # A low-rank adapter, or experts of one size, are two sides that nothing tells apart.
        bent = [bool(self.private(pair[i], pair[1 - i]) & self.record.bends) for i in (0, 1)]
        counts = [m.bit_count() for m in maps]
        if not any(bent) or (all(bent) and counts[0] == counts[1]):
            return None
        which = min((0, 1), key=lambda i: (bent[i], counts[i]))
        if which not in total.skips:
            return None
        stream = common.bit_length() - 1
        shape = tuple(total.shapes[0])
        return Found(total.node, stream, pair[which], pair[1 - which], which, True, shape)

    def _above(self, nodes: int) -> int:
        """Return all that the nodes are made of."""
        above = 0
        for node in bits(nodes):
            above |= self.ancestors[node]
        return above

    def _identity(self, total: Sum, which: int) -> Found | None:
        skip, update = total.pair[which], total.pair[1 - which]
        above = self._above(self.maps_of(update, skip))
        shared = self.record.reach[skip] & above & self.ancestors[update]
        if not shared:
            return None
        shape = tuple(together(*total.shapes))
        return Found(total.node, shared.bit_length() - 1, skip, update, which, False, shape)

    def connections(self, sums: list[Sum], ignored: Counter[str]) -> list[Found]:
        """Return the connections among the additions in order; count why others are none."""
        accepted: list[Found] = []
        for total in reversed(sums):  # outer ones end later
            first, second = total.pair
            if first == second or not self.ancestors[first] & self.ancestors[second]:
                ignored["of one tensor with itself or of strangers"] += 1
                continue
            found = self.candidate(total)
            if found is None:
                ignored["without a parameterised map on one side"] += 1
            elif any(self._part_of(found, outer, accepted) for outer in accepted):
                ignored["inside a branch"] += 1
            else:
                accepted.append(found)
        return accepted[::-1]

    def _part_of(self, found: Found, outer: Found, accepted: list[Found]) -> bool:
        """Whether an addition is part of the branch of an outer connection."""
        if not self.within(found.node, outer):
            return False
        if not self.ancestors[found.stream] >> outer.stream & 1:
            return True  # it adds what comes from outside the branch: a mask, earlier values
        chains = self.record.chains
        if block_call(chains[outer.node]) == block_call(chains[found.node]) is not None:
            return (
                True  # of one block: no stream of its own, such as a scan's D x or pooled queries
            )
        inner = (j for j in accepted if self.within(j.node, outer))
        return found.projected and not any(
            self.record.reach[j.skip] >> found.node & 1 for j in inner
        )


def block_call(chain: Chain) -> tuple[str, int] | None:
    """Return the innermost module call that is one of a list."""
    calls = (call for call in reversed(chain) if call[0].rpartition(".")[2].isdigit())
    return next(calls, None)


def block_of(chain: Chain) -> str:
    """Return the name of the block that a chain of calls ends in, else the innermost module."""
    call = block_call(chain) or (chain[-1] if chain else ("", 0))
    return call[0]
