"""One X-ray: a forward and a backward pass, and what went through every connection.

Shapes: B batch, T positions, D width. All sums are taken in float32.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addnorm.contract import Wiring
from addnorm.probe.discover import Additions, Found, find_connections
from addnorm.probe.trace import Connection, Finding, Trace

Loss = Callable[[Any, Any], Tensor]


@dataclass
class _Reading:
    """What the hooks noted at one call of one connection."""

    name: str
    before: tuple[float, int] = (0.0, 0)  # sum of squares, elements of the entering stream
    after: tuple[float, int] = (0.0, 0)
    share: float = math.nan
    similarity: float = math.nan
    non_finite: int = 0
    gradient_before: list[float] = field(default_factory=list)  # sums of squares
    gradient_after: list[float] = field(default_factory=list)
    gradient_non_finite: int = 0


def xray(
    model: nn.Module,
    inputs: Any,
    targets: Any = None,
    *,
    loss: Loss | None = None,
    blocks: str | None = None,
) -> Trace:
    """X-ray any module: one forward and one backward pass; nothing in the model changes.

    `inputs`: a tensor, a tuple of arguments, or a dict of keyword arguments. `loss(output,
    targets)`: by default the output's `.loss`, else cross-entropy in nats when targets are given,
    else the inner product of the output with a fixed random direction; the trace says which.
    `blocks`: a glob over module names in place of the search. Gradients, mode, random state,
    buffers and hooks are as before afterwards, also after an error.

    Raises `ValueError` when no connection is found or none of them is called.
    """
    model = getattr(model, "_orig_mod", model)  # a compiled module would not fire the hooks
    found = find_connections(model, blocks)
    readings: list[_Reading] = []
    leaves: list[Tensor] = []
    with _untouched(model), torch.enable_grad(), _hooked(found, readings, leaves) as close_ears:
        output = _call(model, inputs)
        close_ears()  # activation checkpointing calls the blocks again on the way back
        value, kind = _loss(output, targets, loss)
        _backward(value, model, leaves)
    if not readings:
        raise ValueError(f"none of the {found.how} was called in the forward pass")
    connections = tuple(_connection(r) for r in readings)
    return Trace(
        model=type(model).__name__,
        wiring=found.wiring,
        blocks=found.how,
        loss=float(value.detach()),
        loss_kind=kind,
        connections=connections,
        findings=_non_finite(readings, float(value.detach())),
    )


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _loss(output: Any, targets: Any, loss: Loss | None) -> tuple[Tensor, str]:
    """Return the scalar that is differentiated, and what it is."""
    if loss is not None:
        return loss(output, targets), "the loss that was given"
    fields = output if isinstance(output, Mapping) else vars(output) if _is_record(output) else {}
    own = fields.get("loss")
    if isinstance(own, Tensor):
        return own, "the model's own loss"
    tensor = next(iter(_tensors(fields.get("logits", output))), None)
    if tensor is None:
        raise ValueError("the model returned no floating-point tensor; give loss=")
    if targets is not None:
        logits = tensor.reshape(-1, tensor.shape[-1]).float()
        return F.cross_entropy(logits, targets.reshape(-1)), "cross-entropy"
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(tensor.shape, generator=generator).to(tensor.device)
    return (tensor.float() * direction).sum() / math.sqrt(tensor.numel()), "random direction"


def _is_record(output: Any) -> bool:
    """Whether the output is an object with named fields, such as a dataclass."""
    return hasattr(output, "__dict__") and not isinstance(output, Tensor)


def _backward(value: Tensor, model: nn.Module, leaves: list[Tensor]) -> None:
    """Run the backward pass without touching any `.grad`; the hooks on the streams note it."""
    ends = leaves + [p for p in model.parameters() if p.requires_grad]
    if value.requires_grad and ends:
        torch.autograd.grad(value, ends, allow_unused=True)


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put buffers and random state back, also after an error."""
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    devices = {p.device for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


@contextlib.contextmanager
def _hooked(
    found: Found, readings: list[_Reading], leaves: list[Tensor]
) -> Iterator[Callable[[], None]]:
    """Watch the connections for one forward pass and the gradients for one backward pass.

    Yields the function that ends the forward watch. The hooks themselves stay until the end: a
    checkpointed block that is called again must save the same tensors.
    """
    additions = Additions()
    open_calls: list[_Reading] = []
    handles = []
    listening = True
    watching = contextlib.ExitStack()

    def close_ears() -> None:
        nonlocal listening
        listening = False
        watching.close()

    def entering(name: str) -> Callable[..., Any]:
        def hook(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            args, kwargs = _alias(args, leaves), _alias(kwargs, leaves)
            if not listening:
                return args, kwargs
            calls = sum(r.name.split("#")[0] == name for r in readings)
            reading = _Reading(f"{name}#{calls + 1}" if calls else name)
            readings.append(reading)
            open_calls.append(reading)
            stream = _stream(args, kwargs)
            reading.before = _squares(stream)
            _watch(stream, reading.gradient_before, reading)
            return args, kwargs

        return hook

    def leaving(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        out = _alias(out, leaves)
        if not listening:
            return out
        reading = open_calls.pop()
        stream, entered = _tensors(out), _stream(args, kwargs)
        reading.after = _squares(stream)
        reading.non_finite = sum(int((~torch.isfinite(t.detach())).sum()) for t in stream)
        reading.similarity = _similarity(stream[0]) if stream else math.nan
        joined = additions.take()
        if joined is not None:
            reading.share = _ratio(joined[1], joined[0])
        elif not isinstance(_module, Wiring) and _alike(stream, entered):
            reading.share = _ratio(stream[0].detach() - entered[0].detach(), entered[0].detach())
        _watch(stream, reading.gradient_after, reading)
        return out

    def branch_returned(_module: nn.Module, _args: Any, out: Any) -> None:
        if listening:
            additions.branch_returned(out)

    try:
        for name, module in found.modules.items():
            handles.append(module.register_forward_pre_hook(entering(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leaving, with_kwargs=True))
            if isinstance(module, Wiring):
                handles.append(module.branch.register_forward_hook(branch_returned))
        watching.enter_context(additions)
        yield close_ears
    finally:
        watching.close()
        for handle in handles:
            handle.remove()


def _watch(stream: list[Tensor], into: list[float], reading: _Reading) -> None:
    """Note the gradient of every tensor of the stream when the backward pass reaches it."""

    def note(gradient: Tensor) -> None:
        into.append(_squares([gradient])[0])
        reading.gradient_non_finite += int((~torch.isfinite(gradient)).sum())

    for tensor in stream:
        if tensor.requires_grad:
            tensor.register_hook(note)  # type: ignore[no-untyped-call]


def _alias(value: Any, leaves: list[Tensor]) -> Any:
    """Return the same values through an identity node of their own in the graph.

    The gradient of an alias is that of the stream at this very point; that of the tensor itself
    would add what every other reader of it sends back. What requires no gradient, such as the
    input of the model, becomes a leaf that does, and is entered in `leaves`.
    """
    if isinstance(value, Tensor):
        if not value.is_floating_point() or not torch.is_grad_enabled():
            return value
        if value.requires_grad:
            return value.view_as(value)
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]
    if type(value) in (tuple, list):
        return type(value)(_alias(item, leaves) for item in value)
    if type(value) is dict:
        return {key: _alias(item, leaves) for key, item in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    """Return the floating-point tensors in a tensor, tuple, list, mapping or dataclass output."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, tuple | list):
        return [t for v in value for t in _tensors(v)]
    return []


def _stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the stream among a call's arguments: the first argument that holds one."""
    for value in (*args, *kwargs.values()):
        tensors = _tensors(value)
        if tensors:
            return tensors
    return []


def _alike(stream: list[Tensor], entered: list[Tensor]) -> bool:
    return bool(stream and entered) and stream[0].shape == entered[0].shape


@torch.no_grad()
def _squares(tensors: list[Tensor]) -> tuple[float, int]:
    norms = [torch.linalg.vector_norm(t.detach(), dtype=torch.float32).item() for t in tensors]
    return sum(n * n for n in norms), sum(t.numel() for t in tensors)


def _rms(squares: float, count: int) -> float:
    return math.sqrt(squares / count) if count else math.nan


def _gradient(squares: list[float], count: int) -> float:
    """Return the RMS over the whole stream: a part that got no gradient counts as 0."""
    return _rms(sum(squares), count) if squares else math.nan


@torch.no_grad()
def _ratio(part: Tensor, whole: Tensor) -> float:
    above = torch.linalg.vector_norm(part, dtype=torch.float32).item()
    below = torch.linalg.vector_norm(whole, dtype=torch.float32).item()
    return above / below if below else math.nan


@torch.no_grad()
def _similarity(x: Tensor) -> float:
    """Return the mean cosine between different positions: T of `(B, T, D)`, rows of `(B, D)`."""
    x = x.detach().float()
    if x.dim() < 2:
        return math.nan
    x = x.unsqueeze(0) if x.dim() == 2 else x.flatten(1, -2)  # (B, T, D)
    T = x.shape[1]
    if T < 2:
        return math.nan
    unit = F.normalize(x, dim=-1)
    together = unit.sum(dim=1).square().sum(dim=-1)  # sum of all cosines, T ones among them
    alone = unit.square().sum(dim=(1, 2))
    return ((together - alone) / (T * (T - 1))).mean().item()


def _connection(r: _Reading) -> Connection:
    return Connection(
        name=r.name,
        stream_before=_rms(*r.before),
        stream_after=_rms(*r.after),
        branch_share=r.share,
        gradient_before=_gradient(r.gradient_before, r.before[1]),
        gradient_after=_gradient(r.gradient_after, r.after[1]),
        token_similarity=r.similarity,
        non_finite=r.non_finite + r.gradient_non_finite,
    )


def _non_finite(readings: list[_Reading], loss: float) -> tuple[Finding, ...]:
    """Name the block with the first NaN or infinity: forward first, then on the way back."""
    if not math.isfinite(readings[0].before[0]):
        where, way = f"the input of {readings[0].name}", "already in the input or the embedding"
    elif bad := next((r for r in readings if r.non_finite), None):
        where, way = bad.name, "in the forward pass; every block after it inherits it"
    elif bad := next((r for r in reversed(readings) if r.gradient_non_finite), None):
        where, way = bad.name, "in the backward pass; every block before it inherits it"
    elif not math.isfinite(loss):
        where, way = "the head or the loss", "after the last connection"
    else:
        return ()
    return (
        Finding(
            code="non-finite",
            severity="sick",
            where=where,
            value="NaN or infinity",
            expected="finite values",
            why=f"The first value that is not finite appears {way}.",
            remedy="Lower the learning rate, clip the gradient, or take a wiring with a norm.",
            source="IEEE 754: a value that is not finite spreads through every sum",
        ),
    )
