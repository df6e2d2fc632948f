"""Lesions: how much the loss changes when connections lose their branches, or blocks their order.

A lesion replaces the update of a connection by zeros and leaves the skip, projected or not (Veit et
al. 2016, arXiv:1605.06431, section 4). Everything in front of the lesion is as in the intact
network. So the calls that ended there are not made again: they return what they returned before,
and n single lesions cost about n/2 forward passes, all pairs about a third of theirs. The rest runs
as it is, on the same batch: no difference to a plain loop, not even of rounding.

Letters: n connections, k how many in a row.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from addnorm.contract import unknown
from addnorm.probe.discover import discover
from addnorm.probe.losses import Loss, Progress, call_model, loss_of
from addnorm.probe.purity import untouched, unwrap
from addnorm.probe.replay import FAILURES, Pass, Replay
from addnorm.probe.structure import Structure
from addnorm.probe.tap import Point, tapped

Order = Literal["none", "swap", "shuffle"]
ORDERS = ("none", "swap", "shuffle")
SHUFFLES = 16  # orders that are drawn
T = TypeVar("T")
MAX_PERIOD = 4  # connections that may make a layer in a flat list of them


@dataclass(frozen=True)
class Reordering:
    """One other order of blocks and what it does to the loss."""

    blocks: list[str]  # those that stand elsewhere, in their new order, from the first to the last
    swaps: int  # of neighbours that lead there: the Kendall tau distance
    delta: float  # loss in this order - clean loss; NaN where the model does not run in it


@dataclass(frozen=True)
class Lesions:
    """Changes of the loss, in its own units, in plain numbers; NaN is what the budget left out.

    `singles[i]` is the loss without branch i minus `clean`; `pairs[i][j]` without both, the single
    on the diagonal; `runs[k][i]` without the k branches from i on. `first_order[i]` estimates
    `singles[i]` from the gradient: `-<dL/du_i, u_i>`, u_i the update. `forwards` is the work in
    forward passes over the connections, the clean one included, the estimate not; a plain loop
    takes `evaluations` of them.
    """

    names: list[str]
    clean: float
    loss_kind: str
    singles: list[float]
    pairs: list[list[float]]
    runs: dict[int, list[float]]
    order: list[Reordering]
    first_order: list[float]
    correlation: float  # of first_order and singles; NaN below 3 values
    way: str  # "resumed": behind the lesion only; "loop": the whole network each time
    note: str  # why not, and what was left out; empty if there is nothing to say
    complete: bool
    evaluations: int  # losses computed, the clean one and checks included
    forwards: float
    memory: int  # bytes of outputs kept at most
    seed: int
    seconds: float

    def interaction(self) -> list[list[float]]:
        """Return `pairs[i][j] - singles[i] - singles[j]`, 0 where lesions add up and for i = j."""
        s = self.singles
        return [
            [0.0 if i == j else value - s[i] - s[j] for j, value in enumerate(row)]
            for i, row in enumerate(self.pairs)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"runs": {str(k): v for k, v in self.runs.items()}}


def lesions(
    model: nn.Module,
    inputs: Any,
    targets: Any = None,
    *,
    loss: Loss | None = None,
    singles: bool = True,
    pairs: bool = False,
    runs: Sequence[int] = (),
    order: Order = "none",
    estimate: bool = True,
    budget: float = 60.0,
    seed: int = 0,
    progress: Progress | None = None,
    structure: Structure | None = None,
) -> Lesions:
    """Return how the loss changes when branches are removed, and when blocks change places.

    `inputs`, `targets` and `loss` as in `xray`. `singles`: each connection; `pairs`: all two of
    them, and the singles with them; `runs`: for each k the k connections from i on, for all i.
    `order`: "swap" exchanges neighbouring blocks that are interchangeable (the same class and
    parameter shapes, beside each other in a `ModuleList`, a `Sequential` or a `Stack`, there by
    layers); "shuffle" draws 16 orders of them with `seed`, of ever more swaps. `estimate`: the
    first-order map as well, by one forward and backward pass. `structure`: what `discover` found,
    when it is known.

    Runs in evaluation mode without gradients; nothing in the model changes. Evaluations go from
    the last connection to the first and end after `budget` seconds, never before the first one.
    Where calls cannot be left out (they change what others read in ways that do not show in what
    they return) each lesion runs the whole network, and `note` says why.

    Raises `ValueError` for a run or an order that is not possible, and for a network without
    connections.
    """
    began = time.monotonic()
    model = unwrap(model)
    if order not in ORDERS:
        raise ValueError(unknown("order", order, ORDERS))
    structure = structure or discover(model, inputs)
    n = len(structure)
    if not n:
        raise ValueError("no connection was found: there is nothing to remove")
    for length in runs:
        if not 1 <= length <= n:
            raise ValueError(f"runs holds {length}; it must be from 1 to {n}, the connections")
    slopes = first_order(model, inputs, targets, loss=loss, structure=structure) if estimate else []
    plans = _orders(interchangeable(model, structure) if order != "none" else [], order, seed)
    replay = Replay(model, structure, inputs, targets, loss)
    lengths, singles = dict.fromkeys(runs), singles or pairs
    total = n * singles + n * (n - 1) // 2 * pairs + sum(n - k + 1 for k in lengths) + len(plans)
    due = _Due(total, began + budget, progress)
    with untouched(model), torch.no_grad(), replay.opened():
        model.eval()
        whole = replay.clean()
        single, matrix = _removed(replay, whole, due, singles, pairs)
        table = {k: _runs(replay, whole, due, k) for k in lengths}
        reordered = [_reordered(replay, whole, *plan) for plan in due.of(plans)]
        due.tell()
    return Lesions(
        names=list(structure.names),
        clean=whole.loss,
        loss_kind=replay.kind,
        singles=single,
        pairs=matrix,
        runs=table,
        order=reordered,
        first_order=slopes,
        correlation=_correlation(slopes, single),
        way=replay.way,
        note="; ".join(
            _notes(replay, due, budget, order != "none" and not plans, reordered, whole)
        ),
        complete=due.done == due.total,
        evaluations=replay.evaluations,
        forwards=replay.work / n,
        memory=replay.most,
        seed=seed,
        seconds=time.monotonic() - began,
    )


def _notes(
    replay: Replay,
    due: _Due,
    budget: float,
    nothing: bool,
    reordered: Sequence[Reordering],
    whole: Pass,
) -> list[str]:
    """Return what there is to say about how it was done and what was left out."""
    notes = list(replay.notes)
    if due.done < due.total:
        notes.append(
            f"the budget of {budget:g} s ended after {due.done} of {due.total} evaluations"
        )
    if nothing:
        notes.append("no two neighbouring blocks are interchangeable")
    failed = sum(math.isnan(o.delta) for o in reordered)
    if failed and not math.isnan(whole.loss):
        notes.append(f"the model did not run in {failed} of {len(reordered)} orders")
    return notes


class _Due:
    """The evaluations that are asked for: how many are done, and whether there is time for more."""

    def __init__(self, total: int, deadline: float, progress: Progress | None) -> None:
        self.total, self.deadline, self.progress = total, deadline, progress
        self.done = self.told = 0

    def of(self, those: Iterable[T]) -> Iterator[T]:
        """Give one after the other until the budget has run out, the very first always."""
        for one in those:
            self.tell()
            if self.done and time.monotonic() > self.deadline:
                return
            self.done += 1
            yield one

    def tell(self) -> None:
        """Report what is done, once."""
        if self.progress is not None and self.told < self.done:
            self.told = self.done
            self.progress(self.done, self.total)


def _removed(
    replay: Replay, whole: Pass, due: _Due, singles: bool, pairs: bool
) -> tuple[list[float], list[list[float]]]:
    """Return the changes without each connection, and without all two of them.

    From the last to the first: what a skipped call left behind elsewhere is then still that of the
    intact network, because no lesion so far ran it again.
    """
    n = len(replay.structure)
    single, matrix = [math.nan] * n * singles, [[math.nan] * n for _ in range(n * pairs)]
    for i in due.of(reversed(range(n * singles))):
        one = replay.run({i}, whole, i, keep=pairs and i < n - 1)
        single[i] = one.loss - whole.loss
        if pairs:
            matrix[i][i] = single[i]
        for j in due.of(reversed(range(i + 1, n * pairs))):
            matrix[i][j] = matrix[j][i] = replay.run({i, j}, one, j).loss - whole.loss
    return single, matrix


def _runs(replay: Replay, whole: Pass, due: _Due, length: int) -> list[float]:
    """Return the changes without `length` connections in a row, by the first of them."""
    row = [math.nan] * (len(replay.structure) - length + 1)
    for i in due.of(reversed(range(len(row)))):
        row[i] = replay.run(set(range(i, i + length)), whole, i).loss - whole.loss
    return row


def first_order(
    model: nn.Module,
    inputs: Any,
    targets: Any = None,
    *,
    loss: Loss | None = None,
    structure: Structure | None = None,
) -> list[float]:
    """Return `-<dL/du_i, u_i>` for every connection: the first-order change without its branch.

    u_i is the update. It is the derivative of the loss by a gate on the update, from 1 towards 0;
    all n come from one forward and one backward pass in evaluation mode. Nothing in the model
    changes. Zero where the loss does not depend on the update.
    """
    model = unwrap(model)
    structure = structure or discover(model, inputs)
    gates: dict[int, Tensor] = {}

    def gate(k: int, point: Point) -> Tensor:
        update = point.update
        gates[k] = torch.ones((), dtype=update.dtype, device=update.device, requires_grad=True)
        return gates[k] * update.clone()  # the model may change its own in place

    with untouched(model), torch.enable_grad():
        model.eval()
        with tapped(model, structure, gate):
            value, _ = loss_of(call_model(model, inputs), targets, loss)
        if not value.requires_grad or not gates:
            return [0.0] * len(structure)
        found = torch.autograd.grad(value, list(gates.values()), allow_unused=True)
    by = dict(zip(gates, found, strict=True))
    slopes = (by.get(k) for k in range(len(structure)))
    return [0.0 if slope is None else -float(slope) for slope in slopes]


def _correlation(one: list[float], two: list[float]) -> float:
    """Return Pearson's r over the pairs that are finite."""
    pairs = [p for p in zip(one, two, strict=False) if all(map(math.isfinite, p))]
    if len(pairs) < 3:
        return math.nan
    r: Tensor = torch.corrcoef(torch.tensor(pairs, dtype=torch.float64).T)
    return float(r[0, 1])


# -- the order of blocks ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Blocks beside each other that can stand in any order: their keys in one container."""

    container: str
    blocks: tuple[tuple[str, ...], ...]  # each of one module, or of the connections of a layer

    def name(self, block: int) -> str:
        """Name a block by the first of its modules."""
        return f"{self.container}.{self.blocks[block][0]}".lstrip(".")


def interchangeable(model: nn.Module, structure: Structure) -> list[_Group]:
    """Return the longest runs of neighbouring blocks of one class and the same parameter shapes.

    Blocks are the children of a `ModuleList` or a `Sequential` that hold connections. Where
    neighbours differ in turn, as attention and feed-forward do, layers of them are the blocks.
    """
    modules = dict(model.named_modules())
    groups = []
    for path, container in modules.items():
        if not isinstance(container, nn.ModuleList | nn.Sequential):
            continue
        start = f"{path}." if path else ""
        held = {
            join.module[len(start) :].split(".")[0]
            for join in structure.joins
            if join.module.startswith(start) and join.module != path
        }
        children = dict(container.named_children())
        names = list(children)
        kinds = [_kind(children[name]) if name in held else None for name in names]
        for size in range(1, MAX_PERIOD + 1):
            blocks = [tuple(names[i : i + size]) for i in range(0, len(names) - size + 1, size)]
            kind = [tuple(kinds[i : i + size]) for i in range(0, len(names) - size + 1, size)]
            found, first = [], 0
            for i in range(1, len(blocks) + 1):
                if i == len(blocks) or kind[i] != kind[first]:
                    if i - first > 1 and None not in kind[first]:
                        found.append(_Group(path, tuple(blocks[first:i])))
                    first = i
            if found:
                groups += found
                break
    return groups


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Return what two interchangeable modules have in common."""
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return tuple(type(m) for m in module.modules()), shapes


def _orders(
    groups: Iterable[_Group], order: Order, seed: int
) -> list[tuple[_Group, tuple[int, ...], int]]:
    """Return the orders to try: group, permutation, swaps of neighbours; the last blocks first."""
    plans = []
    groups = list(groups)
    if order == "swap":
        for group in groups:
            for i in range(len(group.blocks) - 1):
                places = list(range(len(group.blocks)))
                places[i], places[i + 1] = places[i + 1], places[i]
                plans.append((group, tuple(places), 1))
        return plans[::-1]
    draw = random.Random(seed)
    for number in range(SHUFFLES if groups else 0):
        group = groups[draw.randrange(len(groups))]
        n = len(group.blocks)
        most = n * (n - 1) // 2
        swaps = max(1, round(most * (number + 1) / SHUFFLES))
        places = list(range(n))
        while (made := _distance(places)) < swaps:  # each exchange adds one
            i = draw.choice([i for i in range(n - 1) if places[i] < places[i + 1]])
            places[i], places[i + 1] = places[i + 1], places[i]
        plans.append((group, tuple(places), made))
    return plans


def _distance(places: Sequence[int]) -> int:
    """Return the Kendall tau distance to the sorted order."""
    return sum(a > b for i, a in enumerate(places) for b in places[i + 1 :])


def _reordered(
    replay: Replay, whole: Pass, group: _Group, permutation: tuple[int, ...], swaps: int
) -> Reordering:
    """Put the blocks in another order, run, and put them back."""
    container = replay.model.get_submodule(group.container)
    moved = [i for i, place in enumerate(permutation) if i != place]
    first, last = moved[0], moved[-1]
    path = f"{group.container}.{group.blocks[first][0]}".lstrip(".")
    start = whole.start_of(path) if replay.way == "resumed" else -1
    before = dict(container._modules)
    try:
        for i in range(first, last + 1):
            for at, name in zip(group.blocks[i], group.blocks[permutation[i]], strict=True):
                container._modules[at] = before[name]
        if start >= 0:
            reached = next((k for k, ended in whole.met.items() if ended >= start), 0)
            value = replay.resumed(whole, reached, start).loss
        else:
            value = replay.resumed(None, 0, 0).loss
    except FAILURES:
        value = math.nan
    finally:
        container._modules.clear()
        container._modules.update(before)
    return Reordering(
        [group.name(permutation[i]) for i in range(first, last + 1)], swaps, value - whole.loss
    )
