"""Lesions: how much the loss changes when connections lose their branches, or blocks their order.

A lesion replaces the update of a connection by zeros and leaves the skip, projected or not (Veit et
al. 2016, arXiv:1605.06431, section 4). Everything in front of the lesion is as in the intact
network. So the calls that ended there are not made again: they return what they returned before,
and n single lesions cost about n/2 forward passes, all pairs about a third of theirs. The rest runs
as it is, on the same batch: no difference to a plain loop, not even of rounding.

Letters: n connections, k how many in a row.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.overrides
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from addnorm.branches import Context
from addnorm.contract import unknown
from addnorm.probe.discover import discover
from addnorm.probe.losses import Loss, Progress, call_model, loss_of
from addnorm.probe.purity import eager, untouched, unwrap
from addnorm.probe.structure import Structure
from addnorm.probe.tap import Point, Tap, Visitor, in_place, tapped

Order = Literal["none", "swap", "shuffle"]
ORDERS = ("none", "swap", "shuffle")
SHUFFLES = 16  # orders that are drawn
LIMIT = 2**32  # bytes of outputs that are kept; later calls are made again
MAX_PERIOD = 4  # connections that may make a layer in a flat list of them

# What a model raises where what it reads was not left by a call, or was left by another one.
FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)

Key = tuple[str, int]  # a module and which call of it


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
    singles = singles or pairs
    estimates: list[float] = []
    if estimate:
        estimates = first_order(model, inputs, targets, loss=loss, structure=structure)
    groups = interchangeable(model, structure) if order != "none" else []
    plans = _orders(groups, order, seed)
    replay = _Replay(model, structure, inputs, targets, loss)
    total = n * singles + n * (n - 1) // 2 * pairs + sum(n - k + 1 for k in set(runs)) + len(plans)
    done = 0

    def more() -> bool:
        """Count an evaluation that is due; False when the budget has run out."""
        nonlocal done
        if done and time.monotonic() - began > budget:
            return False
        done += 1
        return True

    def told() -> None:
        if progress is not None:
            progress(done, total)

    nan = math.nan
    single, matrix = [nan] * n * singles, [[nan] * n for _ in range(n * pairs)]
    table = {k: [nan] * (n - k + 1) for k in dict.fromkeys(runs)}
    reordered: list[Reordering] = []
    with untouched(model), torch.no_grad():
        model.eval()
        with replay.opened():
            whole = replay.clean()
            clean = whole.loss
            # From the last to the first: what a skipped call left behind elsewhere is then still
            # that of the intact network, because no lesion so far ran it again.
            for i in reversed(range(n * singles)):
                if not more():
                    break
                one = replay.run({i}, whole, i, keep=pairs and i < n - 1)
                single[i] = one.loss - clean
                told()
                for j in reversed(range(i + 1, n * pairs)):
                    if not more():
                        break
                    two = replay.run({i, j}, one, j)
                    matrix[i][j] = matrix[j][i] = two.loss - clean
                    told()
                if pairs:
                    matrix[i][i] = single[i]
            for k, row in table.items():
                for i in reversed(range(len(row))):
                    if not more():
                        break
                    row[i] = replay.run(set(range(i, i + k)), whole, i).loss - clean
                    told()
            for group, permutation, swaps in plans:
                if not more():
                    break
                reordered.append(_reordered(replay, whole, group, permutation, swaps))
                told()
    notes = list(replay.notes)
    if done < total:
        notes.append(f"the budget of {budget:g} s ended after {done} of {total} evaluations")
    if order != "none" and not plans:
        notes.append("no two neighbouring blocks are interchangeable")
    failed = sum(math.isnan(o.delta) for o in reordered)
    if failed and not math.isnan(clean):
        notes.append(f"the model did not run in {failed} of {len(reordered)} orders")
    return Lesions(
        names=list(structure.names),
        clean=clean,
        loss_kind=replay.kind,
        singles=single,
        pairs=matrix,
        runs=table,
        order=reordered,
        first_order=estimates,
        correlation=_correlation(estimates, single),
        way=replay.way,
        note="; ".join(notes),
        complete=done == total,
        evaluations=replay.evaluations,
        forwards=replay.work / n,
        memory=replay.most,
        seed=seed,
        seconds=time.monotonic() - began,
    )


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


# -- a forward pass that begins in the middle ------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """What one call of a module did, so that it need not be made again."""

    key: Key
    out: Any
    inside: dict[str, int]  # calls of the modules below it, counted up to its end
    left: dict[str, Tensor]  # what it left in the context for later branches
    begun: int  # calls that had ended when it began


@dataclass
class _Pass:
    """One forward pass: its loss, and the calls that ended in it, in this order."""

    calls: list[_Call] = field(default_factory=list)
    met: dict[int, int] = field(default_factory=dict)  # connection -> calls ended at its sum
    loss: float = math.nan

    def start_of(self, path: str) -> int:
        """Return how many calls had ended when the module was first called; -1 if not known."""
        return next((c.begun for c in self.calls if c.key == (path, 0)), -1)


class _Lesion(Visitor):
    """Removes the branches in `gone`, and notes which connections were come by."""

    def __init__(self, met: Callable[[int], None]) -> None:
        self.gone: set[int] = set()
        self.met = met

    def __call__(self, k: int, point: Point) -> Tensor | None:
        """Return zeros for a branch that is gone."""
        self.met(k)
        return torch.zeros_like(point.update) if k in self.gone else None


class _Replay:
    """Runs a model with branches removed, from the first lesion on where that is possible."""

    def __init__(
        self, model: nn.Module, structure: Structure, inputs: Any, targets: Any, loss: Loss | None
    ) -> None:
        self.model, self.structure = model, structure
        self.inputs, self.targets, self.loss = inputs, targets, loss
        self.kind = ""
        self.way = "resumed"
        self.notes: list[str] = []
        self.evaluations = 0
        self.work = 0  # connections that were computed
        self.most = 0
        self._bytes = 0
        self._now = _Pass()
        self._from = 0  # connections in front are not computed
        self._skip: dict[Key, _Call] = {}
        self._keep = False
        self._pause = True  # follow no functions in calls that hold no connection
        self._changed: set[Key] = set()  # calls whose output is changed in place afterwards
        self._careful = any(getattr(m, "inplace", False) for m in model.modules()) or any(
            j.place and (j.place.mutated or in_place(j.place.function)) for j in structure.joins
        )
        self._versions: list[tuple[Key, Tensor, int]] = []
        self._visitor = _Lesion(self._met)
        self._tap: Tap | None = None
        # Only calls directly inside what holds connections are kept; what is deeper is not needed.
        self._holders = {
            ".".join(parts[:i])
            for join in structure.joins
            for parts in [join.module.split(".") if join.module else []]
            for i in range(len(parts) + (join.kind != "block"))
        }

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Have the taps, and every call that could be left out go through here, within."""
        with contextlib.ExitStack() as exits:
            for path, module in self.model.named_modules():
                if path and path.rpartition(".")[0] in self._holders:
                    exits.enter_context(_forward(module, self._wrapped(path, module.forward)))
            if any(join.kind == "add" for join in self.structure.joins):
                self._tap = exits.enter_context(tapped(self.model, self.structure, self._visitor))
            else:  # hooks do; following every function would only cost time
                self._tap = Tap(self.model, self.structure, self._visitor)
                exits.enter_context(eager(self.model))
                exits.enter_context(self._tap.hooked())
            yield

    def clean(self) -> _Pass:
        """Run the intact network, keep its calls, and see whether they can be left out."""
        whole = self._run(set(), None, 0, keep=True)
        if len(whole.met) < len(self.structure):  # a sum in a module that is elsewhere by its name
            self._pause = False
            whole = self._run(set(), None, 0, keep=True)
        if self._mutated() and not self._careful:
            self._careful = True  # what was kept has changed since: once more, with copies
            whole = self._run(set(), None, 0, keep=True)
            self._mutated()
        last = max(whole.met, default=-1)
        missed = set(range(len(self.structure))) - set(whole.met)
        if missed:
            names = ", ".join(self.structure.joins[k].name for k in sorted(missed)[:3])
            raise ValueError(f"{names} was not met again: the model does not repeat its way")
        # Left out as far as possible: if any other state is read behind a call, it shows here.
        self.run(set(), whole, last, expected=whole.loss)
        if self.way == "loop":
            whole.calls.clear()
        return whole

    def run(
        self,
        gone: set[int],
        since: _Pass,
        at: int,
        *,
        keep: bool = False,
        expected: float | None = None,
    ) -> _Pass:
        """Run without the branches `gone`, from connection `at` on as `since` went up to it.

        `expected` is the loss where it is known.
        """
        if self.way == "resumed":
            try:
                one = self._run(gone, since, at, keep=keep)
            except FAILURES as error:
                self._give_up(f"{type(error).__name__}: {error}".splitlines()[0])
            else:
                if expected is None or _same(one.loss, expected):
                    return one
                self._give_up(f"the loss is then {one.loss:.6g} and not {expected:.6g}")
            if expected is not None:
                return since
        return self._run(gone, None, 0, keep=False)

    def resumed(self, since: _Pass | None, at: int, limit: int) -> _Pass:
        """Run with all branches, without the first `limit` calls, all before connection `at`."""
        return self._run(set(), since, at, keep=False, limit=limit)

    def _give_up(self, why: str) -> None:
        self.way = "loop"
        self.notes.append(f"each lesion runs the whole network: calls cannot be left out ({why})")

    def _run(
        self, gone: set[int], since: _Pass | None, at: int, *, keep: bool, limit: int | None = None
    ) -> _Pass:
        prefix: list[_Call] = []
        if since is not None:
            prefix = since.calls[: since.met[at] if limit is None else limit]
        self._from, self._skip = at if since else 0, {call.key: call for call in prefix}
        self._keep = keep and self.way == "resumed"
        if self._keep and since is None:
            self._bytes, self._versions = 0, []
        kept = self._bytes
        self._now = _Pass(list(prefix))
        self._visitor.gone = gone
        self.evaluations += 1
        value, self.kind = loss_of(call_model(self.model, self.inputs), self.targets, self.loss)
        self._now.loss = float(value)
        if since is not None:
            self._bytes = kept  # the calls behind a lesion go with it
        return self._now

    def _met(self, k: int) -> None:
        self._now.met[k] = len(self._now.calls)
        self.work += k >= self._from

    def _wrapped(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward of a module that is called only where it must be."""

        def call(*args: Any, **kwargs: Any) -> Any:
            assert self._tap is not None
            frames = self._tap.frames
            here, above = (None, *frames.stack)[-1], (None, None, *frames.stack)[-2]
            if here is None or above is None or here.path != path:  # called past `__call__`
                return forward(*args, **kwargs)
            if above.path not in self._holders:
                return forward(*args, **kwargs)
            key = path, here.call
            context = next((a for a in (*args, *kwargs.values()) if isinstance(a, Context)), None)
            known = self._skip.get(key)
            if known is not None:
                frames.calls.update(known.inside)
                if context is not None:
                    context.values.update(known.left)
                return _copied(known.out) if key in self._changed else known.out
            inner = path not in self._holders and self._pause
            if not self._keep or self._bytes > LIMIT:
                with self._unfollowed(inner):
                    return forward(*args, **kwargs)
            before, values = dict(frames.calls), dict(context.values) if context else {}
            begun = len(self._now.calls)
            with self._unfollowed(inner):
                out = forward(*args, **kwargs)
            kept = _copied(out) if self._careful or key in self._changed else out
            for leaf in pytree.tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._versions.append((key, leaf, leaf._version))
                    self._bytes += leaf.numel() * leaf.element_size()
            self.most = max(self.most, self._bytes)
            inside = {m: c for m, c in frames.calls.items() if before.get(m) != c}
            now = context.values if context else {}
            left = {name: v for name, v in now.items() if values.get(name) is not v}
            self._now.calls.append(_Call(key, kept, inside, left, begun))
            return out

        return call

    def _unfollowed(self, inner: bool) -> contextlib.AbstractContextManager[Any]:
        """Let functions run past the taps, if those are what follows them now."""
        current = torch.overrides._get_current_function_mode  # nothing public tells it
        if inner and current() is self._tap:  # type: ignore[no-untyped-call]
            return torch.overrides._pop_mode_temporarily()
        return contextlib.nullcontext()

    def _mutated(self) -> set[Key]:
        """Note the calls whose outputs have changed in place since they returned."""
        self._changed = {key for key, leaf, version in self._versions if leaf._version != version}
        self._versions = []
        return self._changed


def _same(one: float, two: float) -> bool:
    """Whether it is the same loss, up to kernels that sum in no fixed order."""
    return math.isclose(one, two, rel_tol=1e-6) or (math.isnan(one) and math.isnan(two))


def _copied(value: Any) -> Any:
    return pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, value)


@contextlib.contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Have another forward in a module."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


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
    replay: _Replay, whole: _Pass, group: _Group, permutation: tuple[int, ...], swaps: int
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
