"""Forward passes without some branches that begin where they differ from one that was made before.

What is in front of the first lesion returns what it returned before and is not called again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.overrides
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from addnorm.branches import Context
from addnorm.probe.losses import Loss, call_model, loss_of
from addnorm.probe.purity import eager
from addnorm.probe.spelling import in_place
from addnorm.probe.structure import Structure
from addnorm.probe.tap import Point, Tap, Visitor, tapped

LIMIT = 2**32  # bytes of outputs that are kept; later calls are made again

# What a model raises where what it reads was not left by a call, or was left by another one.
FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)

Key = tuple[str, int]  # a module and which call of it


@dataclass(frozen=True)
class Call:
    """What one call of a module did, so that it need not be made again."""

    key: Key
    out: Any
    inside: dict[str, int]  # calls of the modules below it, counted up to its end
    left: dict[str, Tensor]  # what it left in the context for later branches
    begun: int  # calls that had ended when it began


@dataclass
class Pass:
    """One forward pass: its loss, and the calls that ended in it, in this order."""

    calls: list[Call] = field(default_factory=list)
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


class Replay:
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
        self._now = Pass()
        self._from = 0  # connections in front are not computed
        self._skip: dict[Key, Call] = {}
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

    def clean(self) -> Pass:
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
        since: Pass,
        at: int,
        *,
        keep: bool = False,
        expected: float | None = None,
    ) -> Pass:
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

    def resumed(self, since: Pass | None, at: int, limit: int) -> Pass:
        """Run with all branches, without the first `limit` calls, all before connection `at`."""
        return self._run(set(), since, at, keep=False, limit=limit)

    def _give_up(self, why: str) -> None:
        self.way = "loop"
        self.notes.append(f"each lesion runs the whole network: calls cannot be left out ({why})")

    def _run(
        self, gone: set[int], since: Pass | None, at: int, *, keep: bool, limit: int | None = None
    ) -> Pass:
        prefix: list[Call] = []
        if since is not None:
            prefix = since.calls[: since.met[at] if limit is None else limit]
        self._from, self._skip = at if since else 0, {call.key: call for call in prefix}
        self._keep = keep and self.way == "resumed"
        if self._keep and since is None:
            self._bytes, self._versions = 0, []
        kept = self._bytes
        self._now = Pass(list(prefix))
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
            self._now.calls.append(Call(key, kept, inside, left, begun))
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
