"""The residual structure of a network as plain data: its connections and how they were found."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["wiring", "add", "block"]


@dataclass(frozen=True)
class Place:
    """Where a tensor is made: the n-th call of a function inside one call of a module.

    A place is found again in another forward pass even where another module does more or less
    work there (experts, loops). `function` is "input" for an argument of the model, and `index` is
    then its position among the leaves of the arguments.
    """

    module: str  # dotted path; "" is the model
    call: int  # which call of this module in the pass, 0-based
    function: str  # the torch function, without underscores in front
    index: int  # which call of it directly in this module call, 0-based
    output: int = 0  # which of the tensors that it returns
    mutated: bool = False  # changed in place later on

    @property
    def key(self) -> tuple[str, int, str, int]:
        """What names the call."""
        return self.module, self.call, self.function, self.index


@dataclass(frozen=True)
class Join:
    """One residual connection: where the branch leaves the stream and where it joins it again."""

    name: str  # the module that made the update, `#2` for its second call; unique
    block: str  # the block that it lies in
    kind: Kind  # one of our wirings, an addition, or a block taken whole
    module: str  # a wiring or block: the module; an addition: the module that adds
    call: int  # which call of that module, 0-based
    place: Place | None = None  # the addition, where there is one
    stream: Place | None = None  # what both operands come from
    skip: int = 0  # which operand of the addition is the skip, 0 or 1
    projected: bool = False  # whether the skip goes through a projection of its own
    shape: tuple[int, ...] = ()  # of what leaves it
    norm_before: bool = False  # whether the branch begins with a norm
    norm_after: bool = False  # whether what leaves is normalised before anything else reads it
    inside: int | None = None  # the connection whose branch holds this one
    features: int = -1  # axis of the features of a tensor: 1 where the branch is convolutions
    root: bool = True  # whether its stream comes from no earlier connection
    read_out: bool = False  # of the last one: whether a parameterised map reads what leaves


@dataclass(frozen=True)
class Coverage:
    """What discovery saw and what it did not: what a report says about its own reach."""

    connections: int
    additions: int  # sums of two tensors of one shape that both come from the input
    ignored: dict[str, int]  # reason -> additions that are no connection
    fallbacks: dict[str, str]  # block taken whole -> why
    opaque: dict[str, int]  # what ran out of sight -> how often
    notes: tuple[str, ...] = ()
    doubled: tuple[str, ...] = ()  # blocks that add what a map has made to itself

    def __str__(self) -> str:
        parts = [f"{self.connections} connections among {self.additions} additions"]
        parts += [f"{count} ignored ({reason})" for reason, count in self.ignored.items()]
        reasons = Counter(self.fallbacks.values())
        parts += [f"{count} blocks taken whole ({reason})" for reason, count in reasons.items()]
        parts += [f"{count} calls of {name} out of sight" for name, count in self.opaque.items()]
        return "; ".join([*parts, *self.notes])


@dataclass(frozen=True)
class Structure:
    """The connections of a network in the order in which their sums are made."""

    joins: tuple[Join, ...]
    coverage: Coverage
    how: str  # one line: what was found and where
    wiring: str = ""  # spec, where they are the connections of our stacks

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the connections."""
        return tuple(join.name for join in self.joins)

    def __len__(self) -> int:
        return len(self.joins)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)
