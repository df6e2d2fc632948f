"""The hooks of `watch`: they add the RMS of what passes a connection to a small tensor.

They are plain tensor code without a transfer from the device, and between the calls of one forward
pass they keep nothing but whole numbers, so a compiler takes them into the graph of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from addnorm.probe.watch_places import Place, modules_around

CALLS = 32  # calls of one module in a pass that are told apart; later ones count as the last
BEFORE, UPDATE, AFTER, PASSES = range(4)  # columns of what a connection adds on the way forward
NOTHING = 1000  # a level that no module has
HEARD = 1  # column beside the RMS of a gradient: how often it was heard


class Passes:
    """Whether a call of a connection counts: in a step that is a sample, on the way forward."""

    def __init__(self) -> None:
        self.on = True  # this step is a sample
        self.level = NOTHING  # how far in the outermost module lies that a pass goes through
        self.live = True  # the pass that goes on builds a graph, except in reentrant checkpoints
        self.taps: list[Tap] = []

    def attach(self, model: nn.Module, places: list[Place]) -> list[Any]:
        """Register all hooks and return their handles."""
        self.taps = [Tap(place, self, _device(place.module, model)) for place in places]
        handles: list[Any] = [
            module.register_forward_pre_hook(self.opener(level))
            for level, module in enumerate(modules_around(model, places))
        ]
        for tap, place in zip(self.taps, places, strict=True):
            handles += tap.attach(place)
        return handles

    def begin(self, on: bool) -> None:
        """Prepare the next step."""
        self.on, self.level, self.live = on, NOTHING, True
        for tap in self.taps:
            tap.calls, tap.inside, tap.entered = 0, False, None
        if on:
            with torch.no_grad():
                torch._foreach_zero_([t for tap in self.taps for t in (tap.forward, tap.backward)])

    def opener(self, level: int) -> Callable[[nn.Module, Any], None]:
        """Return the hook in front of a module around the connections: a pass begins there.

        There is none behind it: a hook that gets the model's output makes the compiler warn.
        """

        def opened(_module: nn.Module, _args: Any) -> None:
            if (level and level > self.level) or _backward():
                return  # inside of one where the pass began
            self.level = level
            self.live = self.sampled()
            for tap in self.taps:
                tap.calls = 0

        return opened

    def sampled(self) -> bool:
        """Whether to measure. A compiled graph always does, so that it is compiled only once."""
        return (torch.compiler.is_compiling() or self.on) and torch.is_grad_enabled()

    def counts(self) -> bool:
        """Whether a call counts. Where no pass was seen to begin, it must build a graph itself."""
        return self.live if self.level != NOTHING else self.sampled()

    def again(self) -> bool:
        """Whether an activation checkpoint calls a second time, on the way back."""
        return _backward() and self.sampled()


class Tap:
    """What one connection adds up in a step, and the hooks that do it."""

    def __init__(self, place: Place, passes: Passes, device: torch.device) -> None:
        self.place = place
        self.passes = passes
        self.wiring = place.wiring
        self.last = place.following is None  # nobody else measures the stream that leaves
        self.calls = 0  # in this pass
        self.inside = False  # a branch may be shared by several connections
        self.entered: tuple[Tensor, int] | None = None
        self.comparable = True  # False: a block that writes into its input, or returns other shapes
        # Not buffers of the module: they are in no state_dict and in no optimizer. Two, because a
        # compiled backward pass cannot change what the forward pass has changed.
        self.forward = torch.zeros(CALLS, 4, device=device)
        self.backward = torch.zeros(CALLS, 2, 2, device=device)  # before and after

    def attach(self, place: Place) -> list[Any]:
        """Register the hooks and return their handles."""
        handles: list[Any] = [
            place.module.register_forward_pre_hook(self.enter, with_kwargs=True),
            place.module.register_forward_hook(self.leave),
        ]
        if place.wiring is not None:
            handles.append(place.wiring.branch.register_forward_hook(self.branch))
        return handles

    def enter(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        """Measure the stream that comes in."""
        again = _backward()
        if not (self.passes.again() if again else self.passes.counts()):
            return
        x = self.entering(args, kwargs)
        if again:
            self.calls = max(self.calls - 1, 0)  # on the way back the last call comes first
            if x is not None:
                self.listen(x, self.calls, 0)
            return
        self.calls = min(self.calls + 1, CALLS)
        if x is None:
            return
        if not torch.compiler.is_compiling() and self.forward.device != x.device:
            self.forward, self.backward = self.forward.to(x.device), self.backward.to(x.device)
        self.inside = True
        call = self.calls - 1
        self.forward[call, PASSES].add_(1)
        _add(self.forward[call, BEFORE], x)
        if self.wiring is None:
            self.entered = x.detach(), _version(x)
        if torch.compiler.is_compiling() or not x.is_leaf:  # a leaf may be the user's own
            self.listen(x, call, 0)

    def branch(self, _module: nn.Module, _args: Any, out: Any) -> None:
        """Measure what a wiring's branch returns."""
        if self.inside and isinstance(out, Tensor):
            _add(self.forward[self.calls - 1, UPDATE], out)

    def leave(self, _module: nn.Module, _args: Any, out: Any) -> None:
        """Measure the stream that goes out, where it does not enter a connection that does it."""
        inside, entered = self.inside, self.entered
        self.inside, self.entered = False, None
        if not self.last or not (inside or self.passes.again()):
            return
        x = self.stream(out)
        if x is None:
            return
        call = self.calls - 1 if inside else self.calls
        if inside:
            _add(self.forward[call, AFTER], x)
            if entered is not None:
                before, version = entered
                if before.shape == x.shape and version == _version(before):
                    _add(self.forward[call, UPDATE], x.detach() - before)
                else:
                    self.comparable = False
        self.listen(x, call, 1)

    def entering(self, args: Any, kwargs: Any) -> Tensor | None:
        """Return the stream that comes in."""
        if self.wiring is None:
            return first_floating((args, kwargs))
        return self.stream(args[0] if args else kwargs["stream"])

    def stream(self, value: Any) -> Tensor | None:
        """Return what the stream is now: of several tensors what the wiring calls present."""
        if self.wiring is None or isinstance(value, Tensor):
            return first_floating(value)
        with torch.no_grad():  # it may be a sum of several, which has no gradient of its own
            return self.wiring.present(value)

    def listen(self, x: Tensor, call: int, column: int) -> None:
        """Measure the gradient of the stream when the backward pass gets there."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return
        state = self.backward

        def note(gradient: Tensor) -> None:
            _add(state[call, column, 0], gradient)
            state[call, column, HEARD].add_(1)

        x.register_hook(note)  # type: ignore[no-untyped-call]


def _add(slot: Tensor, x: Tensor) -> None:
    """Add the RMS of all elements of `x`, summed in float32, to `slot` of one element."""
    norm = torch.linalg.vector_norm(x.detach(), dtype=torch.float32)
    slot.add_(norm, alpha=max(x.numel(), 1) ** -0.5)


def _backward() -> bool:
    """Whether a backward pass is going on, in which only an activation checkpoint calls modules."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _version(x: Tensor) -> int:
    """Return how often `x` was written into. A compiler copies what is written into."""
    return 0 if torch.compiler.is_compiling() else x._version


def first_floating(value: Any) -> Tensor | None:
    """Return the first floating-point tensor, by plain code that a compiler can follow."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    inner: Iterable[Any] = ()
    if isinstance(value, tuple | list):
        inner = value
    elif isinstance(value, Mapping):
        inner = value.values()
    for part in inner:
        found = first_floating(part)
        if found is not None:
            return found
    return None


def _device(module: nn.Module, model: nn.Module) -> torch.device:
    """Return where a module computes: where its parameters are."""
    found = next(module.parameters(), None)
    found = next(model.parameters(), None) if found is None else found
    return torch.device("cpu") if found is None else found.device
