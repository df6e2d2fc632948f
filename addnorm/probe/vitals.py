"""One X-ray: what a forward and a backward pass carry through every connection.

Shapes: B batch, T positions, D width; `(..., D)` is a stream. All sums are taken in float32.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from addnorm.checking import checked
from addnorm.contract import Wiring, unknown
from addnorm.probe.bands import Evidence
from addnorm.probe.discover import discover
from addnorm.probe.findings import judge, worst_first
from addnorm.probe.linted import Called, lint_called
from addnorm.probe.losses import Loss, Progress, call_model, loss_of
from addnorm.probe.measures import (
    between_streams,
    by_feature,
    cosine,
    effective_rank,
    non_finite_in,
    non_finites,
    norm,
    rms,
    similarity,
)
from addnorm.probe.pulse import Pulse
from addnorm.probe.purity import sharded, untouched, unwrap
from addnorm.probe.structure import Join, Structure
from addnorm.probe.tap import Point, Visitor, is_float, tapped
from addnorm.probe.trace import Connection, Trace

PART = 100  # steps of the progress for each part: discovery, vitals, every deeper look

# The deeper looks by name: the module of this package and its function.
DEEP = {
    "lesion": ("lesion", "lesions"),
    "paths": ("paths", "spectrum"),
    "landscape": ("landscape", "landscape"),
    "lens": ("lens", "lens"),
    "whiteness": ("whiteness", "whiteness"),
}


def xray(
    model: nn.Module,
    inputs: Any,
    targets: Any = None,
    *,
    loss: Loss | None = None,
    blocks: str | None = None,
    deep: Sequence[str] = (),
    budget: float = 60.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Trace:
    """X-ray any module: find its connections, then measure them; nothing in the model changes.

    `inputs`: a tensor, a tuple of arguments, or a mapping of keyword arguments. `loss(output,
    targets)`: by default the output's `.loss`, else cross-entropy in nats when targets are given,
    else the inner product of the output with a fixed random direction; the trace says which.
    `blocks`: a glob over module names in place of the search. `deep`: names of deeper looks, see
    `DEEP`, each with `budget` seconds. `seed` draws the probe vectors. `progress(done, total)` is
    called after each part, `PART` steps long, and within the deeper looks. The model runs twice
    forward, without compilation or activation checkpoints, and once back, with one vector-Jacobian
    product at each connection; gradients, modes, random states, buffers and hooks are as before
    afterwards, also after an error.

    The findings (`findings.FINDINGS`) hold the vitals against the law of the wiring at this depth.
    A branch that seems dead in training is looked at again in evaluation, which is one more forward
    pass. Of a model that is not ours the first block of those that repeat is linted as well, see
    `linted.lint_called`.

    Under FSDP2 the gains of the Jacobians are not measured, no branch is found dead, no block is
    linted, and every process must call.

    Raises `ValueError` when no connection is found, none of them is called, a deeper look is
    unknown, or a wiring of the user's own breaks the contract.
    """
    for name in deep:
        if name not in DEEP:
            raise ValueError(unknown("deeper look", name, DEEP))
    model = unwrap(model)
    total = PART * (2 + len(deep))
    told = progress or (lambda _done, _total: None)
    with checked(model):
        structure = discover(model, inputs, blocks)
    told(PART, total)
    reader = Reader(model, structure, seed)
    called = Called(model, structure)
    value, kind = _measure(model, structure, reader, called, inputs, targets, loss)
    evidence = Evidence(
        connections=tuple(reading.connection() for reading in reader.readings),
        structure=structure,
        wirings=reader.wirings,
        loss=value,
        entered_non_finite=bool(reader.readings[0].values["entered_non_finite"]),
        dead=_still_dead(model, structure, inputs, reader.pulse.dead),
    )
    linted, note = lint_called(called, seed)
    told(2 * PART, total)
    looks = _looks(
        deep,
        told,
        total,
        model=model,
        inputs=inputs,
        targets=targets,
        loss=loss,
        structure=structure,
        budget=budget,
        seed=seed,
    )
    return Trace(
        model=type(model).__name__,
        wiring=structure.wiring,
        blocks=structure.how,
        loss=value,
        loss_kind=kind,
        connections=evidence.connections,
        findings=tuple(worst_first(judge(evidence) + linted)),
        coverage=replace(structure.coverage, notes=(*structure.coverage.notes, *note)),
        deep=looks,
    )


def _looks(deep: Sequence[str], told: Progress, total: int, **given: Any) -> dict[str, Any]:
    """Take the deeper looks in turn, each of them a part of the progress."""
    looks: dict[str, Any] = {}
    for number, name in enumerate(deep, 2):

        def part(done: int, whole: int, before: int = number * PART) -> None:
            told(before + PART * done // max(whole, 1), total)

        looks[name] = _look(name, **given, progress=part)
        told((number + 1) * PART, total)
    return looks


def _look(name: str, **given: Any) -> dict[str, Any]:
    """Take one deeper look; its function gets those of the arguments that it has."""
    module, function = DEEP[name]
    look = getattr(importlib.import_module(f"addnorm.probe.{module}"), function)
    wanted = inspect.signature(look).parameters
    result: dict[str, Any] = look(**{k: v for k, v in given.items() if k in wanted}).to_dict()
    return result


def _measure(
    model: nn.Module,
    structure: Structure,
    reader: Reader,
    called: Called,
    inputs: Any,
    targets: Any,
    loss: Loss | None,
) -> tuple[float, str]:
    """Run forward and back once; return the loss and which it is."""
    with untouched(model), torch.enable_grad():
        with tapped(model, structure, reader) as tap, called.noted():
            output = call_model(model, inputs)
            missed = set(range(len(structure))) - set(tap.reached)
        if missed:
            names = ", ".join(structure.joins[k].name for k in sorted(missed)[:3])
            raise ValueError(
                f"{names} was not met again in a second pass: the model does not take the same "
                "way for the same input"
            )
        value, kind = loss_of(output, targets, loss)
        ends = list(dict.fromkeys(reader.ends))
        if value.requires_grad and ends:
            torch.autograd.grad(value, ends, allow_unused=True)
        measured = float(value.detach())
    reader.finish()
    return measured, kind


def _still_dead(
    model: nn.Module, structure: Structure, inputs: Any, dead: Mapping[int, str]
) -> Mapping[int, str]:
    """Look again in evaluation: stochastic depth may have dropped a branch for the whole batch."""
    if not dead or not any(module.training for module in model.modules()):
        return dead
    pulse = Pulse(model, structure)
    with untouched(model), torch.enable_grad():
        model.eval()
        with tapped(model, structure, pulse):
            call_model(model, inputs)
    return {k: how for k, how in dead.items() if k in pulse.dead}


class Reading:
    """The vitals of one connection as they come in: 0-dimensional tensors, numbers at the end."""

    def __init__(self, join: Join) -> None:
        self.join = join
        self.values: dict[str, Any] = {}
        self.squares: dict[str, list[Tensor]] = {"before": [], "after": []}  # of gradients
        self.counts = {"before": 0, "after": 0}  # elements that could get a gradient
        self.lost: list[Tensor] = []  # non-finite values in gradients

    def finish(self) -> None:
        """Turn tensors into numbers; one wait for the device, not one for each."""
        self.values = {k: float(v) for k, v in self.values.items()}
        for when, parts in self.squares.items():
            count = self.counts[when]
            total = sum(float(p) for p in parts)
            self.values[f"gradient_{when}"] = (
                math.sqrt(total / count) if parts and count else math.nan
            )
        self.values["non_finite_gradient"] = int(sum(float(n) for n in self.lost))

    def connection(self) -> Connection:
        """Return the vitals; what was not measured is NaN."""
        v = self.values

        def get(name: str) -> float:
            return float(v.get(name, math.nan))

        return Connection(
            name=self.join.name,
            stream_before=get("stream_before"),
            stream_after=get("stream_after"),
            branch_share=get("branch_share"),
            gradient_before=get("gradient_before"),
            gradient_after=get("gradient_after"),
            token_similarity=get("token_similarity"),
            non_finite=int(v.get("left_non_finite", 0)) + int(v["non_finite_gradient"]),
            non_finite_gradient=int(v["non_finite_gradient"]),
            block=self.join.block,
            kind=self.join.kind,
            projected=self.join.projected,
            branch_cosine=get("branch_cosine"),
            stream_cosine=get("stream_cosine"),
            identity_gain=get("identity_gain"),
            gain_forward=get("gain_forward"),
            gain_backward=get("gain_backward"),
            effective_rank=get("effective_rank"),
            dead_units=get("dead_units"),
            streams_cosine=get("streams_cosine"),
        )


class Reader(Visitor):
    """Measures every connection while the forward pass goes by, and its gradient on the way back.

    Only sums stay: nothing of the size of a stream is kept beyond its connection.
    """

    def __init__(self, model: nn.Module, structure: Structure, seed: int) -> None:
        self.wirings = tuple(_wiring(model, join) for join in structure.joins)
        self.pulse = Pulse(model, structure)
        self.readings = [Reading(join) for join in structure.joins]
        self.ends: list[Tensor] = []  # where the backward pass may stop
        self.seed = seed
        self._probing = False
        # A product inside the forward pass would make FSDP2 give its parameters back too early.
        self._sharded = sharded(model)
        self._streams: dict[int, Any] = {}

    def __call__(self, k: int, point: Point) -> None:
        """Note the stream that enters and what the branch returns."""
        reading = self.readings[k]
        join, values = reading.join, reading.values
        self._streams[k] = point.stream
        if not self._sharded:
            self.pulse(k, point)
        with torch.no_grad():
            values["stream_before"] = rms(self._level(k, point.stream))
            values["entered_non_finite"] = non_finites(_tensors(point.stream))
            sizes = by_feature(point.update.detach(), join.features)
            values["dead_units"] = (sizes == 0).float().mean()
            if join.kind == "block" and point.skip is not None:
                self.joined(k, point.skip.detach(), point.update.detach())

    @torch.no_grad()
    def joined(self, k: int, skip: Tensor, update: Tensor) -> None:
        """Note how large the update is beside the skip, and how it lies to it."""
        values = self.readings[k].values
        below, above = norm(skip), norm(update)
        values["branch_share"] = torch.where(below > 0, above / below, torch.nan)
        update = update.expand_as(skip) if update.shape != skip.shape else update
        inner = torch.dot(skip.flatten().float(), update.flatten().float())
        values["branch_cosine"] = inner / (below * norm(update))

    def after(self, k: int, out: Any) -> None:
        """Note the stream that leaves, probe the Jacobian, and wait for the gradients."""
        reading, stream = self.readings[k], self._streams.pop(k)
        join, values = reading.join, reading.values
        entered, left = _tensors(stream), _tensors(out)
        before, now = self._present(k, stream), self._present(k, out)
        with torch.no_grad():
            values["stream_after"] = rms(self._level(k, out))
            values["left_non_finite"] = non_finites(left)
            if now is not None:
                axis = join.features if join.kind == "add" else -1
                rows = now.detach().movedim(axis, -1) if now.dim() > 1 else now.detach()
                values["token_similarity"] = similarity(rows)
                values["effective_rank"] = effective_rank(rows)
                if before is not None and before.shape == now.shape:
                    was = before.detach().movedim(axis, -1) if now.dim() > 1 else before.detach()
                    values["stream_cosine"] = cosine(was, rows)
                values["streams_cosine"] = between_streams(out, now)
        self._probe(k, stream, out, entered, left)
        self._listen(reading, "before", entered)
        self._listen(reading, "after", left)
        wiring = self.wirings[k]
        first = wiring is None or wiring.site.first
        if join.root and first:
            self.ends += [t for t in entered if t.requires_grad]

    def finish(self) -> None:
        """Turn what was noted into numbers."""
        for reading in self.readings:
            reading.finish()

    def _present(self, k: int, stream: Any) -> Tensor | None:
        """Return what the stream is now."""
        wiring = self.wirings[k]
        if wiring is not None:
            with torch.no_grad():
                return wiring.present(stream)
        return stream if isinstance(stream, Tensor) else None

    def _level(self, k: int, stream: Any) -> list[Tensor]:
        """Return what the RMS of the stream goes over: all streams, of a history the newest."""
        if isinstance(stream, Tensor):
            return [stream]
        now = self._present(k, stream)
        return [] if now is None else [now]

    def _probe(
        self, k: int, stream: Any, out: Any, entered: list[Tensor], left: list[Tensor]
    ) -> None:
        """Estimate the gains of the connection's Jacobian by one vector-Jacobian product."""
        values = self.readings[k].values
        pairs, wiring = _matched(entered, left), self.wirings[k]
        if pairs is None and wiring is not None:  # a history: its newest part
            pairs = _newest(wiring, stream, out)
        if (
            self._sharded
            or pairs is None
            or not all(t.requires_grad for pair in pairs for t in pair)
        ):
            return
        ins, outs = [a for a, _ in pairs], [b for _, b in pairs]
        generator = torch.Generator(outs[0].device).manual_seed(self.seed * 1_000_003 + k)
        vectors = [
            torch.randn(t.shape, generator=generator, device=t.device, dtype=torch.float32)
            for t in outs
        ]
        with self._alone():
            pulled = torch.autograd.grad(
                outs,
                ins,
                [v.to(t.dtype) for v, t in zip(vectors, outs, strict=True)],
                retain_graph=True,
                allow_unused=True,
            )
        with torch.no_grad():
            back = sum(
                (norm(g).square() for g in pulled if g is not None), torch.zeros((), device="cpu")
            )
            size = sum((norm(v).square() for v in vectors), torch.zeros((), device="cpu"))
            values["gain_backward"] = (back / size).sqrt()
            ratio = sum(t.numel() for t in outs) / sum(t.numel() for t in ins)
            values["gain_forward"] = (back / size * ratio).sqrt()
            if all(a.shape == b.shape for a, b in pairs):
                inner = [
                    torch.dot(g.flatten().float(), v.flatten())
                    for g, v in zip(pulled, vectors, strict=True)
                    if g is not None
                ]
                values["identity_gain"] = sum(inner, torch.zeros((), device="cpu")) / size

    @contextmanager
    def _alone(self) -> Any:
        """Keep the hooks on the streams from taking a probe for the gradient of the loss."""
        self._probing = True
        try:
            yield
        finally:
            self._probing = False

    def _listen(self, reading: Reading, when: str, tensors: Iterable[Tensor]) -> None:
        """Note the gradient of every tensor of a stream when the backward pass reaches it."""

        def note(gradient: Tensor) -> None:
            if not self._probing:
                length = norm(gradient.detach())
                reading.squares[when].append(length.square())
                reading.lost.append(non_finite_in(gradient, length))

        for tensor in tensors:
            reading.counts[when] += tensor.numel()
            if tensor.requires_grad:
                tensor.register_hook(note)  # type: ignore[no-untyped-call]


def _wiring(model: nn.Module, join: Join) -> Wiring | None:
    """Return the wiring that a connection is, where it is ours."""
    module = model.get_submodule(join.module) if join.kind == "wiring" else None
    assert module is None or isinstance(module, Wiring)
    return module


def _tensors(value: Any) -> list[Tensor]:
    """Return the floating-point tensors in a stream."""
    return [leaf for leaf in pytree.tree_leaves(value) if is_float(leaf)]


def _matched(entered: list[Tensor], left: list[Tensor]) -> list[tuple[Tensor, Tensor]] | None:
    """Pair what enters with what leaves, where it is the same number of tensors."""
    return list(zip(entered, left, strict=True)) if len(entered) == len(left) else None


def _newest(wiring: Wiring, stream: Any, out: Any) -> list[tuple[Tensor, Tensor]] | None:
    """Pair what a stream of growing length is now, where that is one of its tensors."""
    before, after = wiring.present(stream), wiring.present(out)
    own = any(t is before for t in _tensors(stream)) and any(t is after for t in _tensors(out))
    return [(before, after)] if own else None
