"""The vitals of a network while it trains, at next to no cost.

Hooks reduce what passes every connection to a sum of squares, on the device and in float32, and add
it to a small tensor. Nothing waits for the device until the numbers of several steps are fetched
in one transfer. The hooks are plain tensor code, so a model that is compiled after `watch` stays
one graph.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from addnorm.contract import Stack, Wiring
from addnorm.probe.discover import repeated_blocks
from addnorm.probe.loggers import sink_of
from addnorm.probe.purity import unwrap
from addnorm.probe.trace import UNDERFLOW, Finding

CALLS = 32  # calls of one module in a pass that are told apart; later ones count as the last
BEFORE, UPDATE, AFTER, PASSES = range(4)  # columns of what a connection writes on the way forward

# A gradient that differs by more decades between the first and the last connection has nothing left
# of the smaller end in float32, and one optimizer cannot serve both.
DECADES = 6.0
# The stream at the end of the network beside that of the first sample. Training makes it grow: by
# 10 to 100 is seen in healthy pre-norm networks, so only far beyond that is a verdict.
GROWTH = {"warning": 300.0, "sick": 3000.0}
RANK = {"note": 0, "warning": 1, "sick": 2}


class _Pass:
    """Whether the connections are called by a forward pass that counts."""

    def __init__(self) -> None:
        self.on = True  # this step is a sample
        # None: the module that holds the connections is never called itself. False: behind the
        # end of the pass, where only an activation checkpoint calls again.
        self.open: bool | None = None


class _Tap:
    """What one connection writes, and how often it was called in this pass."""

    def __init__(self, connection: _Place, device: torch.device) -> None:
        self.path = connection.path
        self.label = connection.label
        self.wiring = connection.wiring
        self.following = connection.following
        self.calls = 0
        # Not buffers of the module: they are in no state_dict and in no optimizer.
        self.sums = torch.zeros(CALLS, 4, device=device)
        self.gradients = torch.zeros(CALLS, 2, 2, device=device)  # before, after; sum, times heard
        self.one = torch.ones((), device=device)
        self.sizes = (0, 0, 0)  # elements before, of the update, after
        self.entered: Tensor | None = None
        self.before: Tensor | None = None
        self.update: Tensor | None = None


@dataclass(frozen=True)
class _Place:
    """A connection at module level: one of our wirings, or a block of anyone's model."""

    path: str
    label: str  # layer_3, or with several connections in a layer layer_3 and a suffix
    module: nn.Module
    wiring: Wiring | None
    following: int | None  # the connection whose stream in is this one's stream out


def _places(model: nn.Module, blocks: str | None) -> list[_Place]:
    """Return the connections in order. Raises `ValueError` where there are none."""
    named = dict(model.named_modules())
    if blocks is not None:
        chosen = {n: m for n, m in named.items() if fnmatch.fnmatchcase(n, blocks)}
        depth = min((n.count(".") for n in chosen), default=0)
        chosen = {n: m for n, m in chosen.items() if n.count(".") == depth}
    else:
        chosen = {n: m for n, m in named.items() if isinstance(m, Wiring)}
        chosen = chosen or repeated_blocks(model) or {}
    if not chosen:
        what = f"named {blocks!r}" if blocks is not None else "that is a wiring or repeats"
        raise ValueError(
            f"{type(model).__name__} has no module {what}; name its blocks by a glob over module "
            "names, for instance watch(model, blocks='layers.*')"
        )
    order = {module: i for i, module in enumerate(chosen.values())}
    places = []
    after: dict[int, int] = {}
    for stack in (m for m in model.modules() if isinstance(m, Stack)):
        row = [order[c] for c in stack if c in order]
        if len(row) == len(stack):  # then one's stream out is the next one's stream in
            after |= dict(itertools.pairwise(row))
    for i, (path, module) in enumerate(chosen.items()):
        wiring = module if isinstance(module, Wiring) else None
        label = f"layer_{i}"
        if wiring is not None and wiring.site.parts > 1:
            label = f"layer_{wiring.site.layer}.{wiring.site.part}"
        places.append(_Place(path, label, module, wiring, after.get(i)))
    if len({p.label for p in places}) < len(places):  # several networks beside each other
        places = [
            _Place(p.path, f"layer_{i}", p.module, p.wiring, p.following)
            for i, p in enumerate(places)
        ]
    return places


def _around(model: nn.Module, places: list[_Place]) -> list[nn.Module]:
    """Return the modules that hold all connections, the outermost first."""
    parts = [place.path.split(".")[:-1] for place in places if place.path]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    paths = [".".join(common[:i]) for i in range(len(common) + 1)]
    lists = (nn.ModuleList, nn.ModuleDict)  # never called
    modules = [model.get_submodule(path) for path in paths]
    return [m for m in modules if not isinstance(m, lists)]


def _norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm of all elements, summed in float32."""
    norm: Tensor = torch.linalg.vector_norm(x.detach(), dtype=torch.float32)
    return norm


def _first(value: Any) -> Tensor | None:
    """Return the first floating-point tensor, by plain code that a compiler can follow."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    inner: Iterable[Any] = ()
    if isinstance(value, tuple | list):
        inner = value
    elif isinstance(value, Mapping):
        inner = value.values()
    for part in inner:
        found = _first(part)
        if found is not None:
            return found
    return None


class _Hooks:
    """The hooks of one connection."""

    def __init__(self, tap: _Tap, now: _Pass, leaves: list[Any]) -> None:
        self.tap = tap
        self.now = now
        self.leaves = leaves

    def attach(self, place: _Place) -> list[Any]:
        """Register them and return their handles."""
        module = place.module
        handles: list[Any] = [
            module.register_forward_pre_hook(self.enter, with_kwargs=True),
            module.register_forward_hook(self.leave),
        ]
        if place.wiring is not None:
            handles.append(place.wiring.branch.register_forward_hook(self.branch))
        return handles

    def entering(self, args: Any, kwargs: Any) -> Tensor | None:
        """Return the stream that comes in."""
        if self.tap.wiring is None:
            return _first((args, kwargs))
        return self.stream(args[0] if args else kwargs["stream"])

    def stream(self, value: Any) -> Tensor | None:
        """Return what the stream is now: of several tensors the newest."""
        wiring = self.tap.wiring
        if wiring is None or isinstance(value, Tensor):
            return _first(value)
        with torch.no_grad():  # it may be a sum of several, which has no gradient of its own
            return wiring.present(value)

    def active(self) -> bool:
        """Whether the call belongs to a pass that counts."""
        if self.now.open is None:
            return _sampled(self.now) and torch.is_grad_enabled()
        return self.now.open

    def enter(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note the stream that comes in."""
        tap = self.tap
        if self.now.open is False:
            if _sampled(self.now) and torch.is_grad_enabled():
                self.again(args, kwargs)
            return
        if not self.active():
            return
        call = min(tap.calls, CALLS - 1)
        tap.calls = tap.calls + 1
        x = self.entering(args, kwargs)
        if x is None:
            return
        if not torch.compiler.is_compiling() and tap.sums.device != x.device:
            tap.sums, tap.gradients = tap.sums.to(x.device), tap.gradients.to(x.device)
            tap.one = tap.one.to(x.device)
        tap.before = _norm(x)
        tap.sizes = (x.numel(), 0, 0)
        if tap.wiring is None:
            tap.entered = x.detach()
        self.listen(x, call, 0)

    def again(self, args: Any, kwargs: Any) -> None:
        """Hear the gradients when a checkpoint that kept no graph calls a second time."""
        tap = self.tap
        tap.calls = max(tap.calls - 1, 0)  # they are called in reverse order
        x = self.entering(args, kwargs)
        if x is not None:
            self.listen(x, min(tap.calls, CALLS - 1), 0)

    def branch(self, _module: nn.Module, _args: Any, out: Any) -> None:
        """Note what a wiring's branch returns."""
        if self.active() and isinstance(out, Tensor):
            tap = self.tap
            tap.update = _norm(out)
            tap.sizes = (tap.sizes[0], out.numel(), 0)

    def leave(self, _module: nn.Module, _args: Any, out: Any) -> None:
        """Note the stream that goes out, and write it all down."""
        tap = self.tap
        if self.now.open is False:
            if _sampled(self.now) and torch.is_grad_enabled() and tap.following is None:
                x = self.stream(out)
                if x is not None:
                    self.listen(x, min(tap.calls, CALLS - 1), 1)
            return
        if not self.active() or tap.before is None:
            return
        call = min(max(tap.calls - 1, 0), CALLS - 1)
        after = tap.one
        size = 0
        if tap.following is None:
            x = self.stream(out)
            if x is not None:
                after = _norm(x)
                size = x.numel()
                entered = tap.entered
                if entered is not None and entered.shape == x.shape:
                    tap.update = _norm(x.detach() - entered)
                    tap.sizes = (tap.sizes[0], x.numel(), 0)
                self.listen(x, call, 1)
        update = tap.one if tap.update is None else tap.update
        tap.sizes = (tap.sizes[0], tap.sizes[1], size)
        row = torch.stack((tap.before, update, after, tap.one))
        tap.sums[call].addcmul_(row, row)
        tap.before = tap.update = tap.entered = None

    def listen(self, x: Tensor, call: int, column: int) -> None:
        """Note the gradient of the stream when the backward pass gets there."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return
        tap = self.tap

        def note(gradient: Tensor) -> None:
            row = torch.stack((_norm(gradient), tap.one))
            tap.gradients[call, column].addcmul_(row, row)

        handle = x.register_hook(note)  # type: ignore[no-untyped-call]
        if not torch.compiler.is_compiling() and x.is_leaf:
            self.leaves.append(handle)  # the tensor may be the user's own and live on


def _sampled(now: _Pass) -> bool:
    """Whether to measure. A compiled graph always does, so that it is compiled only once."""
    return torch.compiler.is_compiling() or now.on


class Watch:
    """What `watch` returns: it measures until `close`, or to the end of its `with` block.

    `count`: steps done; set it where a run resumes. `history`: the rows, where there is no log,
    else the last one only. `findings`: what was found sick or suspicious so far. All that it keeps
    lies outside the model: no parameter, no buffer, nothing in a `state_dict`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int,
        log: Any,
        blocks: str | None,
        optimizer: torch.optim.Optimizer | None,
        on_finding: Callable[[Finding], None] | None,
        scaler: Any,
        flush: int | None,
    ) -> None:
        for name, number in (("every", every), ("flush", flush)):
            if number is not None and number < 1:
                raise ValueError(f"{name}={number} must be at least 1")
        self.model = unwrap(model)
        self.every = every
        self.flush_after = max(1, 10 // every) if flush is None else flush
        self.count = 0
        self.findings: list[Finding] = []
        self._log = sink_of(log)
        self.history: deque[dict[str, float]] = deque(maxlen=None if log is None else 1)
        self._on_finding = on_finding
        self._scaler = scaler
        self._optimizer = optimizer
        places = _places(self.model, blocks)
        self._taps = [_Tap(place, _device(place.module, self.model)) for place in places]
        self._now = _Pass()
        self._leaves: list[Any] = []
        self._handles: list[Any] = []
        self._weights = _Weights(self.model, places)
        self._rows: list[tuple[int, Tensor]] = []
        self._loss: Tensor | float | None = None
        self._used = 0  # calls of a module that are fetched; 0: not known yet
        self._first: Sample | None = None
        self._told: dict[str, int] = {}
        self._silent = False
        for module in _around(self.model, places):
            self._handles += [
                module.register_forward_pre_hook(self._open),
                module.register_forward_hook(self._close),
            ]
        for tap, place in zip(self._taps, places, strict=True):
            self._handles += _Hooks(tap, self._now, self._leaves).attach(place)
        if optimizer is not None:
            self._handles += [
                optimizer.register_step_pre_hook(self._stepping),
                optimizer.register_step_post_hook(self._stepped),
            ]
        self._begin()

    # -- the passes and the steps --------------------------------------------------------------

    def _open(self, _module: nn.Module, _args: Any) -> None:
        self._now.open = _sampled(self._now) and torch.is_grad_enabled()
        for tap in self._taps:
            tap.calls = 0
        if not torch.compiler.is_compiling():
            self._forget_leaves()

    def _close(self, _module: nn.Module, _args: Any, _out: Any) -> None:
        self._now.open = False

    def _forget_leaves(self) -> None:
        for handle in self._leaves:
            handle.remove()
        self._leaves.clear()

    def _stepping(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.before_update(optimizer)

    def _stepped(self, *_: Any) -> None:
        self.after_update()

    def _begin(self) -> None:
        """Prepare the next step."""
        self._now.on = self.count % self.every == 0
        self._loss = None
        if self._now.on:
            for tap in self._taps:
                tap.calls = 0
                tap.before = tap.update = tap.entered = None
            with torch.no_grad():
                torch._foreach_zero_([t for tap in self._taps for t in (tap.sums, tap.gradients)])

    def note_loss(self, loss: Tensor | float) -> None:
        """Note the loss of this step, before the optimizer's step; nothing is fetched for it."""
        self._loss = loss.detach() if isinstance(loss, Tensor) else loss

    def before_update(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Read the gradients of the parameters, and keep the weights to measure their change.

        Called in front of the optimizer's step, with gradients as it gets them: after clipping
        where that comes first. Both happen in the last sample before a transfer only.
        """
        self._read_gradients(optimizer, keep=True)

    def after_update(self, loss: Tensor | float | None = None) -> None:
        """End the step, after the optimizer's."""
        if loss is not None:
            self.note_loss(loss)
        if self._now.on:
            self._weights.compare()
            self._rows.append((self.count + 1, self._row()))
        self.count += 1
        self._begin()
        if len(self._rows) >= self.flush_after:
            self.flush()

    def step(self, loss: Tensor | float | None = None) -> None:
        """End a step of a plain loop: after `backward` and before `zero_grad`.

        Raises `ValueError` where an optimizer was given, because its steps are counted then.
        """
        if self._optimizer is not None:
            raise ValueError(
                "watch(..., optimizer=) counts the optimizer's steps by itself; leave step() out "
                "and give the loss to note_loss() before optimizer.step()"
            )
        self._read_gradients(None, keep=False)
        self.after_update(loss)

    def _read_gradients(self, optimizer: Any, keep: bool) -> None:
        if self._now.on and len(self._rows) + 1 >= self.flush_after:
            scale = getattr(optimizer, "grad_scale", None)  # of one that unscales by itself
            self._weights.read(scale if isinstance(scale, Tensor) else None, keep)

    # -- the numbers ---------------------------------------------------------------------------

    @torch.no_grad()
    def _row(self) -> Tensor:
        """Return all numbers of the step in one tensor, without waiting for the device."""
        device = self._taps[0].sums.device
        calls = max(self._used, *(tap.calls for tap in self._taps)) if self._used else CALLS
        calls = min(calls, CALLS)
        given = self._loss is not None
        loss = torch.as_tensor(self._loss if given else 0.0, dtype=torch.float32, device=device)
        scale = torch.ones((), device=device)
        if self._scaler is not None:
            scale = self._scaler.scale(scale).float()  # a tensor, so nothing waits
        ends = torch.stack((loss.reshape(()), torch.full_like(scale, float(given)), scale))
        sums = torch.stack([tap.sums[:calls].to(device) for tap in self._taps])
        gradients = torch.stack([tap.gradients[:calls].to(device) for tap in self._taps])
        weights = self._weights.take(device)
        return torch.cat((sums.flatten(), gradients.flatten(), weights.flatten(), ends))

    def flush(self) -> None:
        """Fetch what was measured, in one transfer, log it and judge it.

        In a distributed run every process must get here at the same steps, as it does where all
        take the same number of steps: the sums are added up over the processes.
        """
        rows, self._rows = self._rows, []
        if not rows:
            return
        packed = torch.cat([row for _, row in rows])
        world, rank = 1, 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
            torch.distributed.all_reduce(packed)
        numbers: list[float] = packed.tolist()
        start = 0
        for step, tensor in rows:
            sample = self._sample(numbers[start : start + tensor.numel()], world)
            start += tensor.numel()
            if sample is None:
                self._warn_silent()
                continue
            row = sample.row()
            for finding in self._judged(sample):
                row[f"finding/{finding.code}"] = float(RANK[finding.severity])
                self._tell(finding, step)
            self.history.append({"step": float(step), **row})
            if self._log is not None and rank == 0:
                self._log(row, step)

    def _sample(self, numbers: list[float], world: int) -> Sample | None:
        """Turn sums into numbers with names; None where no connection was called."""
        count, groups = len(self._taps), self._weights.size
        calls = (len(numbers) - groups - 3) // (count * 8)
        middle = count * calls * 4
        sums, gradients = numbers[:middle], numbers[middle : 2 * middle]
        loss, given, scale = (v / world for v in numbers[-3:])

        def rms(k: int, call: int, column: int) -> float | None:
            at = (k * calls + call) * 4
            elements = sums[at + PASSES] * self._taps[k].sizes[column]
            return _root(sums[at + column], elements)

        def gradient(k: int, call: int, column: int) -> float | None:
            at = ((k * calls + call) * 2 + column) * 2
            size = self._taps[k].sizes[AFTER if column else BEFORE]
            root = _root(gradients[at], gradients[at + 1] * size)
            # Each process has the gradient of its own mean; that of the mean over all is smaller.
            return None if root is None else root / scale / world

        vitals = []
        for call in range(calls):
            for k, tap in enumerate(self._taps):
                if sums[(k * calls + call) * 4 + PASSES] == 0:
                    continue
                self._used = max(self._used, call + 1)
                beyond = k if tap.following is None else tap.following
                last = tap.following is None
                vitals.append(
                    Vital(
                        label=tap.label if call == 0 else f"{tap.label}#{call + 1}",
                        path=tap.path,
                        stream_before=rms(k, call, BEFORE),
                        stream_after=rms(beyond, call, AFTER if last else BEFORE),
                        update=rms(k, call, UPDATE),
                        gradient_before=gradient(k, call, 0),
                        gradient_after=gradient(beyond, call, int(last)),
                    )
                )
        if not vitals:
            return None
        weights = self._weights.name(numbers[2 * middle : -3])
        return Sample(tuple(vitals), weights, loss if given else None, self._scaler is not None)

    # -- verdicts ------------------------------------------------------------------------------

    def _judged(self, sample: Sample) -> list[Finding]:
        if self._first is None and math.isfinite(sample.growth or math.nan):
            self._first = sample
        return judge_sample(sample, self._first)

    def _tell(self, finding: Finding, step: int) -> None:
        """Tell of a finding once, and again when it gets worse."""
        if RANK[finding.severity] <= self._told.get(finding.code, -1):
            return
        self._told[finding.code] = RANK[finding.severity]
        self.findings.append(finding)
        if self._on_finding is not None:
            self._on_finding(finding)
        else:
            warnings.warn(
                f"step {step}: {finding.severity}: {finding.code} at {finding.where}: "
                f"{finding.value}, expected {finding.expected}. {finding.why} {finding.remedy}",
                stacklevel=2,
            )

    def _warn_silent(self) -> None:
        if self._silent:
            return
        self._silent = True
        warnings.warn(
            f"watch saw no call of {self._taps[0].path} and {len(self._taps) - 1} others. If the "
            "model was compiled and called before watch(), call watch() first or "
            "torch.compiler.reset() now; a stack that runs its connections itself (reversible) "
            "shows them with stack.observed = True.",
            stacklevel=2,
        )

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """Fetch what is left and take all hooks off: the model is as before `watch`."""
        self._detach()
        self.flush()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget_leaves()
        self._now.on = False

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._detach()
        if kind is None:  # after an error the other processes may never come to their transfer
            self.flush()

    def row(self) -> dict[str, float]:
        """Return the numbers of the last sample that was fetched; empty before the first."""
        return dict(self.history[-1]) if self.history else {}


def watch(
    model: nn.Module,
    every: int = 100,
    log: Any = None,
    blocks: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    on_finding: Callable[[Finding], None] | None = None,
    scaler: Any = None,
    flush: int | None = None,
) -> Watch:
    """Measure what passes the connections of a network while it trains, at every `every`-th step.

    Measured are the first step and every `every`-th after it. `log` takes the numbers as
    `log(dict, step)` or `add_scalar(name, value, step)`, or is a function `(dict, step)`; without
    one they stay in `history`. With `optimizer` its steps are counted, else call `Watch.step` (or
    `before_update` and `after_update`). `blocks`: a glob over module names; by default the
    connections are the wirings of our stacks, in any other model its repeated blocks. `flush`:
    samples to a transfer from the device, by default one in 10 steps. `on_finding` hears of every
    finding in place of a warning. `scaler`: the `GradScaler`, by whose scale the gradients of the
    stream are divided; those of the parameters are read where the optimizer gets them, unscaled.
    A sample in which a scaled gradient overflows is no finding: the scaler skips such a step.

    Call it after the model was moved to its device and before a compiled model is called for the
    first time. The numbers of a sample, with NaN or infinity only where that was measured:

    | name | what |
    |---|---|
    | `stream/layer_3/rms_before`, `rms_after` | RMS of the stream that enters and leaves |
    | `branch/layer_3/share` | RMS of what the branch returns (a block: adds) / of what enters |
    | `gradient/layer_3/rms_before`, `rms_after` | RMS of dLoss/dstream there |
    | `parameters/layer_3/gradient_norm` | of the connection's own parameters; `rest`: of others |
    | `parameters/layer_3/update_ratio` | norm of the last update / norm of the weights |
    | `gradient/slope` | decades by 10 connections; positive: smaller towards the input |
    | `stream/growth` | RMS after the last connection / before the first |
    | `non_finite` | connections that carry NaN or infinity in either direction |
    | `finding/CODE` | 0 note, 1 warning, 2 sick, where there is one |

    With several connections in a layer their names end in the number of the connection in its
    layer, `layer_3.1`; the second call of a module is `layer_3#2`. The parameters are measured in
    the last sample before a transfer only, and their update only where an optimizer is seen.
    Several backward passes before a step count as one batch. Under activation checkpoints the
    first call counts. In a distributed run the sums of all processes are added up, as if the whole
    batch were on one device; nothing is communicated before a transfer.

    Raises `ValueError` where the model has no connections, or `every` or `log` make no sense.
    """
    return Watch(
        model,
        every=every,
        log=log,
        blocks=blocks,
        optimizer=optimizer,
        on_finding=on_finding,
        scaler=scaler,
        flush=flush,
    )


@dataclass(frozen=True)
class Vital:
    """What one call of a connection carried; None where it was not measured."""

    label: str
    path: str
    stream_before: float | None
    stream_after: float | None
    update: float | None
    gradient_before: float | None
    gradient_after: float | None

    @property
    def lost_forward(self) -> bool:
        """Whether something is not finite on the way forward."""
        return any(_lost(v) for v in (self.stream_before, self.update, self.stream_after))

    @property
    def lost_backward(self) -> bool:
        """Whether something is not finite on the way back."""
        return _lost(self.gradient_before) or _lost(self.gradient_after)


@dataclass(frozen=True)
class Sample:
    """One measured step."""

    vitals: tuple[Vital, ...]
    weights: dict[str, float]
    loss: float | None
    scaled: bool  # by a loss scale that is allowed to overflow

    @property
    def growth(self) -> float | None:
        """RMS of the stream after the last connection / before the first."""
        first, last = self.vitals[0].stream_before, self.vitals[-1].stream_after
        return None if not first or last is None else last / first

    @property
    def gradients(self) -> list[float]:
        """RMS of the gradient behind every connection where it was heard."""
        return [v.gradient_after for v in self.vitals if v.gradient_after is not None]

    @property
    def slope(self) -> float | None:
        """Decades of gradient RMS by 10 connections, least squares."""
        rows = [math.log10(max(g, UNDERFLOW)) for g in self.gradients if math.isfinite(g)]
        if len(rows) < 2 or len(rows) < len(self.gradients):
            return None
        middle, mean = (len(rows) - 1) / 2, sum(rows) / len(rows)
        spread = sum((i - middle) ** 2 for i in range(len(rows)))
        return 10 * sum((i - middle) * (y - mean) for i, y in enumerate(rows)) / spread

    def row(self) -> dict[str, float]:
        """Return the numbers by name."""
        row: dict[str, float | None] = {}
        for v in self.vitals:
            share = None
            if v.update is not None and v.stream_before:
                share = v.update / v.stream_before
            row[f"stream/{v.label}/rms_before"] = v.stream_before
            row[f"stream/{v.label}/rms_after"] = v.stream_after
            row[f"branch/{v.label}/share"] = share
            row[f"gradient/{v.label}/rms_before"] = v.gradient_before
            row[f"gradient/{v.label}/rms_after"] = v.gradient_after
        row |= self.weights
        row["gradient/slope"] = self.slope
        row["stream/growth"] = self.growth
        row["non_finite"] = float(sum(v.lost_forward or v.lost_backward for v in self.vitals))
        row["loss"] = self.loss
        return {name: value for name, value in row.items() if value is not None}


def _lost(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)


def _root(squares: float, elements: float) -> float | None:
    return math.sqrt(squares / elements) if elements else None


def judge_sample(sample: Sample, first: Sample | None) -> list[Finding]:
    """Return what is wrong in a sample, beside the first one of the run."""
    lost = _lost_finding(sample)
    if lost is not None:
        return [lost]
    return [f for f in (_gradient_finding(sample), _stream_finding(sample, first)) if f]


def _lost_finding(sample: Sample) -> Finding | None:
    forward = next((v.path for v in sample.vitals if v.lost_forward), None)
    backward = next((v.path for v in reversed(sample.vitals) if v.lost_backward), None)
    if forward is not None:
        where, why = forward, "The first value that is not finite is on the way forward there."
    elif _lost(sample.loss):
        where, why = "the head or the loss", "Every connection before it is finite."
    elif backward is not None and not sample.scaled:
        where, why = backward, "The first value that is not finite is on the way back there."
    else:
        return None
    return Finding(
        code="non-finite",
        severity="sick",
        where=where,
        value="NaN or infinity",
        expected="finite values",
        why=why,
        remedy="Lower the learning rate, clip the gradient, or take a wiring with a norm.",
        source="IEEE 754: a value that is not finite spreads through every sum",
    )


def _gradient_finding(sample: Sample) -> Finding | None:
    """Compare the gradient at the first and at the last connection."""
    heard = [(v.path, g) for v in sample.vitals if (g := v.gradient_after) is not None]
    if len(heard) < 2 or not all(math.isfinite(g) for _, g in heard):
        return None
    (first, low), (last, high) = heard[0], heard[-1]
    if low == high == 0:
        return None  # nothing to learn from this batch, at any depth
    decades = math.log10(max(high, UNDERFLOW)) - math.log10(max(low, UNDERFLOW))
    if abs(decades) < DECADES:
        return None
    vanishes = decades > 0
    return Finding(
        code="vanishing-gradient" if vanishes else "exploding-gradient",
        severity="sick",
        where=first,
        value=f"gradient RMS {low:.2g}, against {high:.2g} at {last}",
        expected=f"less than {DECADES:.0f} decades between the first and the last connection",
        why=(
            "On its way back the gradient shrinks from connection to connection, so the first "
            "ones do not learn."
            if vanishes
            else "On its way back the gradient grows from connection to connection, so no learning "
            "rate suits both ends."
        ),
        remedy="Keep an identity path: wiring prenorm, or layerscale(init=1e-5) around each block.",
        source="He et al. 2016 (arXiv:1603.05027), section 2",
    )


def _stream_finding(sample: Sample, first: Sample | None) -> Finding | None:
    """Compare the stream that leaves the last connection with that of the first sample."""
    if first is None:
        return None
    was, now = first.vitals[-1].stream_after, sample.vitals[-1].stream_after
    if not was or now is None or len(first.vitals) != len(sample.vitals):
        return None
    severity = next((s for s in ("sick", "warning") if now / was > GROWTH[s]), None)
    if severity is None:
        return None
    return Finding(
        code="stream-blow-up",
        severity=severity,
        where=sample.vitals[-1].path,
        value=f"stream RMS {now:.3g}, {now / was:.3g} times that of the first sample",
        expected=f"at most {GROWTH['warning']:.0f} times",
        why="The branches write ever more into a stream that nothing brings back.",
        remedy="Lower the learning rate or lengthen the warm-up; wiring sandwich bounds a branch.",
        source="Ding et al. 2021 (arXiv:2105.13290), section 2.4",
    )


class _Weights:
    """Gradients and updates of the parameters, by connection and for the rest."""

    def __init__(self, model: nn.Module, places: list[_Place]) -> None:
        self._model = model
        self._labels = [place.label for place in places] + ["rest"]
        self._paths = [f"{place.path}." for place in places]
        self.size = 4 * len(self._labels)  # sums of squares: gradient, weight, update; elements
        self._true = [0] * len(self._labels)  # elements over all processes
        self._squares: Tensor | None = None
        self._before: list[Tensor] = []
        self._parameters: list[nn.Parameter] = []
        self._cached: tuple[tuple[str, ...], Tensor] | None = None
        self._owner = torch.zeros(0)

    def _measured(self, device: torch.device) -> None:
        """Look up the parameters that have a gradient: FSDP2 replaces them, others freeze."""
        named = [(n, p) for n, p in self._model.named_parameters() if p.grad is not None]
        self._parameters = [p for _, p in named]
        names = tuple(n for n, _ in named)
        if self._cached is None or self._cached[0] != names:
            owners = [self._group(name) for name in names]
            self._cached = names, torch.tensor(owners, device=device, dtype=torch.long)
            self._true = [0] * len(self._labels)
            for owner, parameter in zip(owners, self._parameters, strict=True):
                self._true[owner] += parameter.numel()
        self._owner = self._cached[1]

    def _group(self, name: str) -> int:
        paths = enumerate(self._paths)
        return next((i for i, p in paths if name.startswith(p)), len(self._paths))

    @torch.no_grad()
    def read(self, scale: Tensor | None, keep: bool) -> None:
        """Take the gradients, divided by `scale`; with `keep` also the weights before a step."""
        device = next(self._model.parameters()).device
        self._measured(device)
        if not self._parameters:
            return
        gradients = [_local(p.grad) for p in self._parameters if p.grad is not None]
        self._squares = torch.zeros(len(self._labels), 4, device=device)
        self._add(0, gradients, scale)
        sizes = [float(g.numel()) for g in gradients]
        elements = torch.tensor(sizes, device=device)
        self._squares[:, 3].index_add_(0, self._owner, elements)
        if keep:
            self._before = [_local(p).detach().clone() for p in self._parameters]
            self._add(1, self._before)

    @torch.no_grad()
    def compare(self) -> None:
        """Take the difference to the weights before the step."""
        if self._before:
            now = [_local(p).detach() for p in self._parameters]
            torch._foreach_sub_(self._before, now)
            self._add(2, self._before)
            self._before = []

    def _add(self, column: int, tensors: list[Tensor], scale: Tensor | None = None) -> None:
        assert self._squares is not None
        norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)
        stacked = torch.stack([norm.to(self._squares.device) for norm in norms])
        if scale is not None:
            stacked = stacked / scale.to(stacked.device)
        self._squares[:, column].index_add_(0, self._owner, stacked.square())

    def take(self, device: torch.device) -> Tensor:
        """Return `(groups, 4)`, zeros where nothing was read, and forget it."""
        squares, self._squares = self._squares, None
        self._parameters = []
        return torch.zeros(len(self._labels), 4, device=device) if squares is None else squares

    def name(self, numbers: list[float]) -> dict[str, float]:
        """Return the norms by name. A whole copy in every process counts once."""
        row: dict[str, float] = {}
        total = 0.0
        for i, label in enumerate(self._labels):
            gradient, weight, update, elements = numbers[4 * i : 4 * i + 4]
            if not elements:
                continue
            squares = gradient * self._true[i] / elements
            total += squares
            row[f"parameters/{label}/gradient_norm"] = math.sqrt(squares)
            if weight:
                row[f"parameters/{label}/update_ratio"] = math.sqrt(update / weight)
        if row:
            row["parameters/gradient_norm"] = math.sqrt(total)
        return row


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that is spread over several."""
    inner = getattr(tensor, "_local_tensor", None)
    return inner if isinstance(inner, Tensor) else tensor


def _device(module: nn.Module, model: nn.Module) -> torch.device:
    """Return where a module computes: where its parameters are."""
    found = next(module.parameters(), None)
    found = next(model.parameters(), None) if found is None else found
    return torch.device("cpu") if found is None else found.device
