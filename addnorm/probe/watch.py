"""The vitals of a network while it trains, at next to no cost.

Hooks add the RMS of what passes every connection to a small tensor, on the device and in float32.
Nothing waits for the device until the numbers of several steps are fetched in one transfer. The
hooks are plain tensor code, so a model that is compiled after `watch` stays one graph.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from addnorm.probe.loggers import sink_of
from addnorm.probe.purity import unwrap
from addnorm.probe.trace import Finding
from addnorm.probe.watch_hooks import AFTER, BEFORE, HEARD, PASSES, UPDATE, Passes
from addnorm.probe.watch_parameters import Parameters
from addnorm.probe.watch_places import find_places
from addnorm.probe.watch_sample import RANK, Sample, Vital, judge_sample

Numbers = NDArray[np.float64]


class Watch:
    """What `watch` returns: it measures until `close`, or to the end of its `with` block.

    `count`: steps done. `history`: the rows, where there is no log, else the last one only.
    `first`: the row that later ones are judged beside; set it where a run resumes. `findings`: what
    was found sick or suspicious so far. All that it keeps lies outside the model: no parameter, no
    buffer, nothing in a `state_dict`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int,
        log: Any,
        blocks: str | None,
        optimizer: torch.optim.Optimizer | None,
        on_finding: Callable[[Finding, int], None] | None,
        scaler: Any,
        flush: int | None,
    ) -> None:
        for name, number in (("every", every), ("flush", flush)):
            if number is not None and number < 1:
                raise ValueError(f"{name}={number} must be at least 1")
        model = unwrap(model)
        self.every = every
        self.flush_after = max(1, 10 // every) if flush is None else flush
        self.count = 0
        self.first: Mapping[str, float] = {}
        self.findings: list[Finding] = []
        self._log = sink_of(log)
        self.history: deque[dict[str, float]] = deque(maxlen=None if log is None else 1)
        self._on_finding = on_finding
        self._scaler = scaler
        self._optimizer = optimizer
        self._places = find_places(model, blocks)
        self._parameters = Parameters(model, self._places)
        self._rows: list[tuple[int, Tensor, Tensor]] = []
        self._loss: Tensor | float | None = None
        self._told: dict[str, int] = {}
        self._silent = False
        self._passes = Passes()
        self._handles = self._passes.attach(model, self._places)
        if optimizer is not None:
            self._handles += [
                optimizer.register_step_pre_hook(lambda opt, *_: self.before_update(opt)),
                optimizer.register_step_post_hook(lambda *_: self.after_update()),
            ]
        self.begin()

    # -- the steps -----------------------------------------------------------------------------

    def begin(self, step: int = 0) -> None:
        """Begin after `step` steps, where a run resumes or was tried out; what was seen is gone."""
        self.count = step
        self._rows.clear()
        self._next()

    def _next(self) -> None:
        self._loss = None
        self._passes.begin(bool(self._handles) and self.count % self.every == 0)

    def note_loss(self, loss: Tensor | float) -> None:
        """Note the loss of this step, before the optimizer's step; nothing is fetched for it."""
        self._loss = loss.detach() if isinstance(loss, Tensor) else loss

    def before_update(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Read the gradients of the parameters, and keep the weights to measure their change.

        Called in front of the optimizer's step, with gradients as it gets them: after clipping
        where that comes first. Both happen in one of `flush` samples only.
        """
        self._read_gradients(optimizer, keep=True)

    def after_update(self, loss: Tensor | float | None = None) -> None:
        """End the step, after the optimizer's."""
        if loss is not None:
            self.note_loss(loss)
        if self._passes.on:
            self._parameters.compare()
            self._rows.append((self.count + 1, *self._measured()))
        self.count += 1
        self._next()
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

    def _read_gradients(self, optimizer: torch.optim.Optimizer | None, keep: bool) -> None:
        if self._passes.on and self.count // self.every % self.flush_after == 0:
            scale = getattr(optimizer, "grad_scale", None)  # of one that unscales by itself
            self._parameters.read(scale if isinstance(scale, Tensor) else None, keep)

    # -- the numbers ---------------------------------------------------------------------------

    @torch.no_grad()
    def _measured(self) -> tuple[Tensor, Tensor]:
        """Return what the connections added up `(taps, CALLS, 8)` and the rest, flat."""
        taps = self._passes.taps
        device = taps[0].forward.device
        states = torch.stack(
            [torch.cat((t.forward, t.backward.flatten(1)), 1).to(device) for t in taps]
        )
        given = self._loss is not None
        loss = torch.zeros((), device=device)
        if isinstance(self._loss, Tensor):
            loss = self._loss.to(device, torch.float32).reshape(())
        elif self._loss is not None:
            loss = torch.full((), self._loss, device=device)
        scale = torch.ones((), device=device)
        if self._scaler is not None:
            scale = self._scaler.scale(scale).float()  # a tensor, so nothing waits
        ends = torch.stack((loss, torch.full_like(scale, float(given)), scale))
        return states, torch.cat((self._parameters.take(device).flatten(), ends))

    def flush(self) -> None:
        """Fetch what was measured, in one transfer, log it and judge it.

        In a distributed run every process must get here at the same steps, as it does where all
        take the same number of steps: the numbers are pooled over the processes.
        """
        rows, self._rows = self._rows, []
        if not rows:
            return
        states = torch.stack([states for _, states, _ in rows])
        rest = torch.stack([rest for *_, rest in rows])
        world, rank = 1, 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        # The processes have equal shares of the batch, so the mean of the squares is that of all.
        packed = torch.cat((states.double().square().flatten(), rest.double().flatten()))
        if world > 1:
            torch.distributed.all_reduce(packed)
        numbers: Numbers = packed.cpu().numpy()
        split = states.numel()
        pooled = np.sqrt(numbers[:split] / world).reshape(states.shape)
        others = numbers[split:].reshape(rest.shape)
        for (step, *_), state, more in zip(rows, pooled, others, strict=True):
            sample = self._sample(state, more, world)
            if sample is None:
                self._warn_silent()
                continue
            row = sample.row()
            if not self.first and math.isfinite(sample.growth or math.nan):
                self.first = row
            findings = judge_sample(sample, self.first)
            row |= {f"finding/{found.code}": float(RANK[found.severity]) for found in findings}
            self.history.append({"step": float(step), **row})
            if self._log is not None and rank == 0:
                self._log(row, step)
            for found in findings:
                self._tell(found, step, rank)

    def _sample(self, states: Numbers, rest: Numbers, world: int) -> Sample | None:
        """Give names to what was measured; None where no connection was called."""
        loss, given, scale = rest[-3:] / world

        def mean(k: int, call: int, column: int) -> float | None:
            total, passes = states[k, call, column], states[k, call, PASSES]
            return float(total / passes) if passes else None

        def gradient(k: int, call: int, column: int) -> float | None:
            total, heard = states[k, call, 4 + 2 * column], states[k, call, 4 + 2 * column + HEARD]
            # Each process has the gradient of its own mean; that of the mean over all is smaller.
            return float(total / heard / scale / world) if heard else None

        vitals = []
        for call, k in np.argwhere(states[:, :, PASSES].T):
            place = self._places[k]
            follows = place.following
            vitals.append(
                Vital(
                    label=place.label if call == 0 else f"{place.label}#{call + 1}",
                    path=place.path,
                    stream_before=mean(k, call, BEFORE),
                    stream_after=(
                        mean(k, call, AFTER) if follows is None else mean(follows, call, BEFORE)
                    ),
                    update=mean(k, call, UPDATE) if self._passes.taps[k].comparable else None,
                    gradient_before=gradient(k, call, 0),
                    gradient_after=(
                        gradient(k, call, 1) if follows is None else gradient(follows, call, 0)
                    ),
                )
            )
        if not vitals:
            return None
        weights = self._parameters.row(rest[:-3].reshape(-1, 4).tolist())
        known = float(loss) if given else None
        return Sample(tuple(vitals), weights, known, self._scaler is not None)

    # -- verdicts ------------------------------------------------------------------------------

    def _tell(self, finding: Finding, step: int, rank: int) -> None:
        """Tell of a finding once, and again when it gets worse."""
        if RANK[finding.severity] <= self._told.get(finding.code, -1):
            return
        self._told[finding.code] = RANK[finding.severity]
        self.findings.append(finding)
        if self._on_finding is not None:
            self._on_finding(finding, step)
        elif rank == 0:
            warnings.warn(describe_finding(finding, step), stacklevel=2)

    def _warn_silent(self) -> None:
        if self._silent:
            return
        self._silent = True
        warnings.warn(
            f"watch saw no call of {self._places[0].path} and {len(self._places) - 1} others. If "
            "the model was compiled and called before watch(), call watch() first or "
            "torch.compiler.reset() now; a stack that runs its connections itself (reversible) "
            "shows them with stack.observed = True.",
            stacklevel=2,
        )

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """Fetch what is left and take all hooks off: the model is as before `watch`."""
        self.abandon()
        self.flush()

    def abandon(self) -> None:
        """Take all hooks off and fetch nothing: after an error others may not come to a flush."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._passes.on = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.abandon()
        if kind is None:
            self.flush()

    def row(self) -> dict[str, float]:
        """Return the numbers of the last sample that was fetched; empty before the first."""
        return dict(self.history[-1]) if self.history else {}


def describe_finding(finding: Finding, step: int) -> str:
    """Return one line: the step, how bad, what, where, the value, why, and the remedy."""
    return (
        f"step {step:,}: {finding.severity}: {finding.code} at {finding.where}: {finding.value}, "
        f"expected {finding.expected}. {finding.why} {finding.remedy}"
    )


def watch(
    model: nn.Module,
    every: int = 100,
    log: Any = None,
    blocks: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    on_finding: Callable[[Finding, int], None] | None = None,
    scaler: Any = None,
    flush: int | None = None,
) -> Watch:
    """Measure what passes the connections of a network while it trains, at every `every`-th step.

    Measured are the first step and every `every`-th after it. `log` takes the numbers as
    `log(dict, step)` or `add_scalar(name, value, step)`, or is a function `(dict, step)`; without
    one they stay in `history`. With `optimizer` its steps are counted, else call `Watch.step` (or
    `before_update` and `after_update`). `blocks`: a glob over module names; by default the
    connections are the wirings of our stacks, in any other model its repeated blocks. `flush`:
    samples to a transfer from the device, by default one in 10 steps; a logger that refuses the
    numbers of earlier steps (W&B beside other numbers) wants 1. `on_finding` hears of every finding
    and its step in place of a warning. `scaler`: the `GradScaler`, by whose scale the gradients of
    the stream are divided; those of the parameters are read where the optimizer gets them,
    unscaled. A sample in which a scaled gradient overflows is no finding: the scaler skips such a
    step.

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
    the first sample and every `flush`-th after it, and their update only where an optimizer is
    seen, which takes a copy of the weights for the length of its step. Of several forward passes
    before a step the mean of their RMS counts; an activation checkpoint's second call does not. In
    a distributed run the numbers are those of the whole batch over all processes, and nothing is
    communicated before a transfer. A compiled graph measures in every step, so that there is only
    one.

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
