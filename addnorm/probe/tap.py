"""Tap the connections of a network: read or replace what its branches add, in any forward pass."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from addnorm.contract import Wiring
from addnorm.probe.purity import eager, unwrap
from addnorm.probe.spelling import function_name, in_place, sides
from addnorm.probe.structure import Join, Place, Structure

Key = tuple[str, int, str, int]
Chain = tuple[tuple[str, int], ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """What meets at a connection, attached to the autograd graph.

    An addition: `skip + update`, both from `stream`; a projected shortcut is in `skip` only. A
    wiring of ours: `stream` as it entered (a tensor or a tuple), `skip` what it is now, `update`
    what the branch returned. A block taken whole: `skip` is its input and `update` the difference
    that it makes; where the shapes differ, `skip` is None and `update` all that it returns.
    """

    stream: Any
    skip: Tensor | None
    update: Tensor


class Visitor:
    """What happens at the connections; a subclass overrides what it needs.

    Numbers `k` are positions in `structure.joins`. The calls of one connection come in the order
    of the methods here.
    """

    def __call__(self, k: int, point: Point) -> Tensor | None:
        """Return what the connection adds in place of `point.update`; None leaves it."""
        return None

    def joined(self, k: int, skip: Tensor, update: Tensor) -> None:
        """Note the two sides of the sum as they are added, gates and scales included."""

    def after(self, k: int, out: Any) -> Any:
        """Note what leaves the connection: a tensor, or the stream of a wiring.

        What is returned takes its place; None leaves it.
        """
        return None


class _Plain(Visitor):
    """A function `(k, point) -> replacement or None` as a visitor."""

    def __init__(self, function: Callable[[int, Point], Tensor | None]) -> None:
        self.function = function

    def __call__(self, k: int, point: Point) -> Tensor | None:
        """Ask the function."""
        return self.function(k, point)


class Frame:
    """One call of a module that is under way."""

    __slots__ = ("call", "chain", "counts", "path")

    def __init__(self, path: str, call: int, above: Chain) -> None:
        self.path = path
        self.call = call
        self.chain: Chain = (*above, (path, call))  # from the model down to this call
        self.counts: dict[str, int] = {}


class Frames:
    """Which module calls a forward pass is in. Hooks for all modules at once follow it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.stack: list[Frame] = []
        self.calls: dict[str, int] = {}
        self.left: Callable[[nn.Module, Frame, Any], None] | None = None  # told of each return
        self._thread = threading.get_ident()

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Follow the calls of the model within."""
        handles = (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        )
        try:
            with warnings.catch_warnings():  # compiled parts run eagerly here, hooks and all
                warnings.filterwarnings("ignore", message="Using `torch.compile")
                yield
        finally:
            for handle in handles:
                handle.remove()
            self.stack.clear()

    def place(self, function: str) -> Key:
        """Count a call of the function and say where it is."""
        frame = self.stack[-1]
        index = frame.counts.get(function, 0)
        frame.counts[function] = index + 1
        return frame.path, frame.call, function, index

    def _enter(self, module: nn.Module, _args: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        if module is self.model:
            self.stack.clear()
            self.calls.clear()
        elif not self.stack:
            return
        path = self.names.get(module)
        if path is None:  # made during the pass, or beside the tree
            path = f"{self.stack[-1].path}.{type(module).__name__}".lstrip(".")
        call = self.calls.get(path, 0)
        self.calls[path] = call + 1
        self.stack.append(Frame(path, call, self.stack[-1].chain if self.stack else ()))

    def _leave(self, module: nn.Module, _args: Any, out: Any) -> None:
        if threading.get_ident() == self._thread and self.stack:
            frame = self.stack.pop()
            if self.left is not None:
                self.left(module, frame, out)


class Tap(TorchFunctionMode):
    """Watches the forward passes of a model and calls the visitor at its connections.

    `reached` are the numbers of the connections that the latest pass came by, in order.
    """

    def __init__(self, model: nn.Module, structure: Structure, visitor: Visitor) -> None:
        super().__init__()
        self.model = model
        self.visitor = visitor
        self.joins = structure.joins
        self.frames = Frames(model)
        self.reached: list[int] = []
        self._sums = {j.place.key: (k, j) for k, j in enumerate(self.joins) if j.place}
        streams = [j.stream for j in self.joins if j.stream and j.kind == "add"]
        self._wanted: dict[Key, dict[int, Place]] = {}
        for place in streams:
            self._wanted.setdefault(place.key, {})[place.output] = place
        self._inputs = {p.index: p for p in streams if p.function == "input"}
        self._streams: dict[tuple[Key, int], Tensor] = {}
        self._whole = {(j.module, j.call): k for k, j in enumerate(self.joins) if j.kind != "add"}
        self._visiting = False  # in a hook of ours
        self._open: list[tuple[int, Any]] = []  # connections that are under way, and their stream

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Have the hooks on the model and on the connections that are modules."""
        modules = dict(self.model.named_modules())
        with contextlib.ExitStack() as exits:
            exits.enter_context(self.frames.followed())
            begin = self.model.register_forward_pre_hook(self._aside(self._begin), with_kwargs=True)
            exits.callback(begin.remove)
            for path in dict.fromkeys(module for module, _ in self._whole):
                module = modules[path]
                hooks: list[Any] = [
                    module.register_forward_pre_hook(self._aside(self._entering), with_kwargs=True),
                    module.register_forward_hook(self._aside(self._leaving)),
                ]
                if isinstance(module, Wiring):
                    hooks.append(
                        module.branch.register_forward_hook(self._aside(self._branch_returned))
                    )
                for hook in hooks:
                    exits.callback(hook.remove)
            yield

    def _aside(self, hook: Callable[..., T]) -> Callable[..., T]:
        """Return the hook so that what it and the visitor call is not counted as the model's."""

        def call(*args: Any) -> T:
            self._visiting = True
            try:
                return hook(*args)
            finally:
                self._visiting = False

        return call

    def _begin(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.reached = []
        self._streams.clear()
        self._open.clear()
        if not self._inputs:
            return args, kwargs
        leaves, tree = pytree.tree_flatten((args, kwargs))
        for index, place in self._inputs.items():
            if index < len(leaves) and isinstance(leaves[index], Tensor):
                kept = attach(leaves[index])
                self._streams[place.key, 0] = kept
                leaves[index] = kept.clone() if place.mutated else kept
        args, kwargs = pytree.tree_unflatten(leaves, tree)
        return args, kwargs

    # -- connections that are modules ----------------------------------------------------------

    def _entering(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        frame = self.frames.stack[-1] if self.frames.stack else None
        k = self._whole.get((frame.path, frame.call)) if frame else None
        if k is None:
            self._open.append((-1, None))
            return None
        args, kwargs = _aliases((args, kwargs))
        stream: Any = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(module, Wiring):
            stream = first_tensor((args, kwargs))
        self._open.append((k, stream))
        return args, kwargs

    def _branch_returned(self, _module: nn.Module, _args: Any, out: Any) -> Tensor | None:
        k, stream = self._open[-1] if self._open else (-1, None)
        if k < 0:
            return None
        wiring = self.model.get_submodule(self.joins[k].module)
        assert isinstance(wiring, Wiring)
        return self.visitor(k, Point(stream, wiring.present(stream), out))

    def _leaving(self, module: nn.Module, _args: Any, out: Any) -> Any:
        k, stream = self._open.pop() if self._open else (-1, None)
        if k < 0:
            return None
        if isinstance(module, Wiring):
            return self._after(k, _aliases(out))
        leaves, tree = pytree.tree_flatten(out)
        at = next((i for i, leaf in enumerate(leaves) if is_float(leaf)), None)
        if at is None:
            return None
        left: Tensor = leaves[at]
        if stream is not None and stream.shape == left.shape:
            new = self.visitor(k, Point(stream, stream, left - stream))
            left = left if new is None else stream + new
        else:
            new = self.visitor(k, Point(stream, None, left))
            left = left if new is None else new
        leaves[at] = self._after(k, _alias(left))
        return pytree.tree_unflatten(leaves, tree)

    def _after(self, k: int, out: Any) -> Any:
        self.reached.append(k)
        new = self.visitor.after(k, out)
        return out if new is None else new

    # -- connections that are additions --------------------------------------------------------

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function; at an addition that is a connection, let the visitor in."""
        kwargs = kwargs or {}
        name = function_name(func) if self.frames.stack and not self._visiting else None
        if name is None:
            return func(*args, **kwargs)
        key = self.frames.place(name)
        here, wanted = self._sums.get(key), self._wanted.get(key)
        if here is not None:
            return self._sum(name, func, args, kwargs, *here, wanted)
        out = func(*args, **kwargs)
        return out if wanted is None else self._keep(name, out, wanted)

    def _sum(
        self,
        name: str,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        k: int,
        join: Join,
        wanted: dict[int, Place] | None,
    ) -> Any:
        changes, target = in_place(name), args[0] if args else None
        if changes:  # what is kept of the old value must not change with it
            assert isinstance(target, Tensor)
            args = (target.clone(), *args[1:])
        pair = sides(name, args, kwargs)
        skip, update = pair[join.skip], pair[1 - join.skip]
        if join.kind != "add":
            self.visitor.joined(k, skip.detach(), update.detach())
            if changes and isinstance(target, Tensor):
                return target.copy_(skip + update)
            return func(*args, **kwargs)
        stream = self._streams.get((join.stream.key, join.stream.output)) if join.stream else None
        new = self.visitor(k, Point(skip if stream is None else stream, skip, update))
        self.visitor.joined(k, skip.detach(), (update if new is None else new).detach())
        plain = new is None and not changes
        out = func(*args, **kwargs) if plain else skip + (update if new is None else new)
        assert join.place is not None
        if is_float(out) and not out.requires_grad and torch.is_grad_enabled():
            out = attach(out)
        out = self._after(k, out)
        if wanted:
            self._streams[join.place.key, 0] = out
        if changes and isinstance(target, Tensor):
            return target.copy_(out)
        return out.clone() if join.place.mutated else out

    def _keep(self, name: str, out: Any, wanted: dict[int, Place]) -> Any:
        """Keep what later connections branch off from."""
        leaves, tree = pytree.tree_flatten(out)
        for index, place in wanted.items():
            value = leaves[index] if index < len(leaves) else None
            if not isinstance(value, Tensor):
                continue
            if in_place(name):
                kept = value
                if place.mutated or not value.requires_grad:
                    kept = attach(value.clone())
                    value.copy_(kept)
            else:
                kept = attach(value)
                leaves[index] = kept.clone() if place.mutated else kept
            self._streams[place.key, index] = kept
        return pytree.tree_unflatten(leaves, tree)


def is_float(value: Any) -> bool:
    """Whether it is a tensor that can carry a gradient."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def attach(value: Tensor) -> Tensor:
    """Return the tensor if it is in the autograd graph, else a leaf with its values."""
    if not is_float(value) or not torch.is_grad_enabled():
        return value
    if not value.requires_grad:
        return value.detach().requires_grad_()
    return value.view_as(value) if value.is_leaf else value  # a leaf may be the user's own


def _alias(value: Any) -> Any:
    """Return the same values through an identity node of their own in the graph.

    The gradient of an alias is that of the stream at this very point; that of the tensor itself
    would add what every other reader of it sends back. What requires no gradient, such as the
    input of the model, becomes a leaf that does.
    """
    if not is_float(value) or not torch.is_grad_enabled():
        return value
    return value.view_as(value) if value.requires_grad else value.detach().requires_grad_()


def _aliases(value: Any) -> Any:
    """Return the same with an alias for every tensor; without gradients there is no need."""
    return pytree.tree_map(_alias, value) if torch.is_grad_enabled() else value


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor of floating point in a tensor, tuple, list or mapping."""
    return next((leaf for leaf in pytree.tree_leaves(value) if is_float(leaf)), None)


@contextlib.contextmanager
def tapped(
    model: nn.Module,
    structure: Structure,
    visitor: Visitor | Callable[[int, Point], Tensor | None],
) -> Iterator[Tap]:
    """Call the visitor at every connection in the forward passes of `model` within.

    `structure` is what `discover` found for this model; `visitor` is a `Visitor` or a function
    `(k, point) -> replacement or None`. A lesion returns `torch.zeros_like(point.update)`, a gate
    `gate * point.update`. With gradients on, `point.stream` is in the autograd graph even where
    the parameters in front of it are frozen. Compiled parts run eagerly and activation checkpoints
    keep everything meanwhile; the model may be wrapped by `torch.compile` or DDP. Running
    statistics, random states and gradients are the caller's: see `purity.untouched`.
    """
    model = unwrap(model)
    tap = Tap(model, structure, visitor if isinstance(visitor, Visitor) else _Plain(visitor))
    with eager(model), tap.hooked(), tap:
        yield tap
