"""A wiring of a user's own, held to the contract: its facts, its start, its forward pass.

Each mistake is a `ValueError` of one line. Ours are held to it by the tests and cost nothing here.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn

from addnorm.branches import STARTS, Context
from addnorm.contract import (
    NAME,
    TYPES,
    Drawing,
    Law,
    Stream,
    Wiring,
    catalogue,
    is_own,
    kinds_of,
    options_of,
    unknown,
)
from addnorm.plugins import own_code

FACTS: dict[str, Any] = {
    "name": str,
    "equation": str,
    "paper": str,
    "year": int,
    "at_start": str,
    "stream_law": Law,
    "gradient_law": Law,
}


# -- facts ---------------------------------------------------------------------------------------


def check_facts(wiring: type[Wiring]) -> None:
    """Raise `ValueError` for a fact that is missing or wrong, and for options no spec can set."""
    who = getattr(wiring, "__name__", repr(wiring))
    if not (isinstance(wiring, type) and issubclass(wiring, Wiring)):
        raise ValueError(f"{who} is no subclass of Wiring")
    missing = [fact for fact in FACTS if not hasattr(wiring, fact)]
    if missing:
        raise ValueError(f"the wiring {who} does not state {', '.join(missing)}")
    for fact, kind in FACTS.items():
        value = getattr(wiring, fact)
        if typing.get_origin(kind) is Literal:
            if value not in typing.get_args(kind):
                raise ValueError(
                    unknown(fact, str(value), typing.get_args(kind), where=f" of the wiring {who}")
                )
        elif type(value) is not kind:
            raise ValueError(f"{fact}={value!r} of the wiring {who} must be {TYPES[kind]}")
    if not re.fullmatch(NAME, wiring.name):
        raise ValueError(
            f"the name {wiring.name!r} of the wiring {who} must be letters, digits, - and _ alone"
        )
    known = catalogue().get(wiring.name)
    if known is not None and not is_own(known):
        raise ValueError(f"the wiring {wiring.name!r} exists already; choose another name")
    if wiring.start not in STARTS:
        raise ValueError(unknown("start", wiring.start, STARTS, where=f" of the wiring {who}"))
    if not isinstance(wiring.drawing, Drawing):
        raise ValueError(f"drawing={wiring.drawing!r} of the wiring {who} must be a Drawing")
    _check_expected(wiring)
    if wiring.forward is Wiring.forward:
        raise ValueError(f"the wiring {who} does not define forward(self, stream, context)")
    for name, takes in (("open", "x"), ("forward", "stream, context"), ("close", "stream")):
        try:
            inspect.signature(getattr(wiring, name)).bind(None, *takes.split(","))
        except TypeError:
            raise ValueError(f"{who}.{name} must be {name}(self, {takes})") from None
    _check_options(wiring)


def _check_expected(wiring: type[Wiring]) -> None:
    """Hold the findings that a wiring expects against those that the X-ray makes."""
    where = f" in expected of the wiring {wiring.__name__}"
    if not isinstance(wiring.expected, frozenset | set):
        raise ValueError(f"{wiring.expected!r}{where} must be a set of findings")
    if wiring.expected:
        from addnorm.probe.findings import FINDINGS

        for code in wiring.expected:
            if code not in FINDINGS:
                raise ValueError(unknown("finding", str(code), FINDINGS, where=where))


def _check_options(wiring: type[Wiring]) -> None:
    """Hold the signature against what a spec string can set."""
    who = wiring.__name__
    declared = options_of(wiring)
    rest = [n for n in inspect.signature(wiring.__init__).parameters if n not in declared]
    if len(rest) != 3:
        named = f", its options behind the star; it takes {', '.join(rest)} before it"
        raise ValueError(f"{who}.__init__ must be (self, branch, site, *, option=default){named}")
    try:
        kinds = kinds_of(wiring)
    except NameError as error:
        raise ValueError(f"the annotations of {who}.__init__ cannot be read: {error}") from None
    for name, option in declared.items():
        if option.default is inspect.Parameter.empty:
            raise ValueError(f"the option {name} of {who} has no default; write {name}=default")
        fits = kinds[name] in TYPES or typing.get_origin(kinds[name]) is Literal
        if not fits or type(option.default) not in TYPES:
            raise ValueError(
                f"the option {name}={option.default!r} of {who} must be a number, true, false or a "
                "word: a spec string writes no other"
            )
    for name in wiring.limits:
        if name not in declared:
            raise ValueError(unknown("option", name, declared, where=f" in limits of {who}"))


# -- the start -----------------------------------------------------------------------------------


@torch.no_grad()
def start(wiring: Wiring) -> None:
    """Call `reset_parameters` and raise `ValueError` where it leaves a parameter without a start.

    Everything that it has to fill is NaN before. What stays so has a start by chance alone: it is
    unfilled memory after the meta device, and keeps its trained value when a model starts again.
    """
    inside = {id(parameter) for parameter in wiring.branch.parameters()}
    own = {n: p for n, p in wiring.named_parameters() if id(p) not in inside}
    matrices = [matrix.parameter for matrix in wiring.branch.matrices()]
    for parameter in [*own.values(), *matrices]:
        parameter.fill_(torch.nan)
    wiring.reset_parameters()
    if any(not _finite(matrix) for matrix in matrices):
        raise ValueError(
            f"reset_parameters of the wiring {wiring.name} does not start its branch; call "
            "super().reset_parameters() in it"
        )
    for name, parameter in own.items():
        if not _finite(parameter):
            raise ValueError(
                f"the parameter {name} of the wiring {wiring.name} has no finite start; "
                "reset_parameters must call super().reset_parameters(), then fill what is its own"
            )


def _finite(tensor: Tensor) -> bool:
    return tensor.is_meta or bool(tensor.isfinite().all())


# -- a forward pass ------------------------------------------------------------------------------


@contextlib.contextmanager
def checked(model: nn.Module) -> Iterator[None]:
    """Hold every wiring of a user's own in `model` to the contract while it is called.

    A connection calls its branch once, changes no tensor in place, and returns the stream in the
    structure and the shapes that it took it in; `close` returns one tensor `(..., D)`. Raises
    `ValueError` that names the wiring, the connection, what it gave and what was wanted; an error
    in the user's code becomes one too.
    """
    entered: list[tuple[int, ...]] = []
    with contextlib.ExitStack() as exits:
        for module in model.modules():
            if isinstance(module, Wiring) and is_own(type(module)):
                watched = _Watched(module, entered)
                for method in ("open", "forward", "close"):
                    new = getattr(watched, method)
                    exits.enter_context(mock.patch.object(module, method, new))
                exits.enter_context(mock.patch.object(module.branch, "forward", watched.branch))
        yield


class _Watched:
    """What stands in for the methods of one connection and of its branch.

    `entered` holds the shapes of what was opened, those of all connections together.
    """

    def __init__(self, wiring: Wiring, entered: list[tuple[int, ...]]) -> None:
        self.who = (
            f"the wiring {wiring.name} at connection {wiring.site.before + wiring.site.index}"
        )
        self.wiring = wiring
        self.dim = wiring.site.dim
        self.entered = entered
        self.calls = 0
        self._open, self._close = wiring.open, wiring.close
        self._forward, self._branch = wiring.forward, wiring.branch.forward

    def open(self, x: Tensor) -> Stream:
        """Open the stream; it must be a tensor or a tuple of tensors, each of width D."""
        self.entered.append(tuple(x.shape))
        with self._unchanged("open", x), own_code(f"open of {self.who}"):
            stream = self._open(x)
        self._check_stream("open", stream)
        return stream

    def forward(self, stream: Stream, context: Context) -> Stream:
        """Run the connection; its branch must be called once and the stream keep its shapes."""
        self.calls = 0
        taken = f"forward of {self.who} on {_described(stream)}"
        with self._unchanged("forward", stream), own_code(taken):
            out = self._forward(stream, context)
        if self.calls != 1:
            raise ValueError(
                f"forward of {self.who} must call self.branch once; it did so {self.calls} times"
            )
        self._check_stream("forward", out)
        if isinstance(out, Tensor) != isinstance(stream, Tensor) or not (
            _shapes(out) <= _shapes(stream)
        ):
            raise ValueError(
                f"forward of {self.who} must return the stream as it took it, "
                f"{_described(stream)}; it returned {_described(out)}"
            )
        return out

    def close(self, stream: Stream) -> Tensor:
        """Close the stream; that must give one tensor of the shape of what was opened."""
        with self._unchanged("close", stream), own_code(f"close of {self.who}"):
            out = self._close(stream)
        wanted = self.entered.pop()
        if not isinstance(out, Tensor) or tuple(out.shape) != wanted:
            raise ValueError(
                f"close of {self.who} must turn the stream, {_described(stream)}, into a tensor "
                f"{wanted}; it returned {_described(out)}"
            )
        return out

    def branch(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Call the branch; it must be given (..., D) with the context, and return the same."""
        self.calls += 1
        call = f"{self.who} must call self.branch(x, context)"
        whole = self.entered[-1]
        if not isinstance(x, Tensor) or x.dim() != len(whole) or x.shape[-1] != self.dim:
            raise ValueError(f"{call} with a tensor like {whole}; x was {_described(x)}")
        if not isinstance(context, Context):
            raise ValueError(f"{call} with the context; it was {type(context).__name__}")
        with self._unchanged("the branch", x):
            out: Any = self._branch(x, context)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            raise ValueError(
                f"the branch of {self.who} must return {_described(x)}, the shape of its input; "
                f"it returned {_described(out)}"
            )
        return out

    def _check_stream(self, method: str, stream: Any) -> None:
        parts = stream if isinstance(stream, tuple) and stream else (stream,)
        if any(not isinstance(p, Tensor) or not p.dim() or p.shape[-1] != self.dim for p in parts):
            raise ValueError(
                f"{method} of {self.who} must return a tensor (..., {self.dim}) or a tuple of "
                f"them; it returned {_described(stream)}"
            )

    @contextlib.contextmanager
    def _unchanged(self, method: str, stream: Stream) -> Iterator[None]:
        """Raise where a tensor has been written to: another may hold it, the caller's own too."""
        parts = stream if isinstance(stream, tuple) else (stream,)
        before = [(part, part._version) for part in parts if isinstance(part, Tensor)]
        yield
        if any(part._version != version for part, version in before):
            of = "" if method == "the branch" else f" of {self.who}"
            whose = f"input of {self.who}" if not of else "stream"
            raise ValueError(
                f"{method}{of} changes the {whose} in place; make a new tensor, x = x + f instead "
                "of x += f"
            )


def _shapes(stream: Stream) -> set[tuple[int, ...]]:
    return {tuple(p.shape) for p in (stream if isinstance(stream, tuple) else (stream,))}


def _described(value: Any) -> str:
    """Say what a value is: a tensor by its shape, a tuple by its parts."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, tuple):
        parts = [str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in value]
        return f"a tuple of {' and '.join(parts) or 'nothing'}"
    return type(value).__name__
