"""The contract of a wiring, on one page: Site, Wiring, Stack and the spec strings that name them.

A *wiring* owns one branch and maps stream to stream: how the branch reads from the stream and how
its output joins it. A *stack* is branches in a row along one stream under one wiring.

Shapes: x `(..., D)`; a stream is a tensor `(..., D)`, n of them in one tensor `(..., n, D)`, or a
tuple of tensors `(..., D)`. A stream is never changed in place: a connection returns a new one.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import re
import typing
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from addnorm import branches
from addnorm.branches import STARTS, Branch, Context, DropPath, Map, Site, Wrapped, sharded
from addnorm.plugins import own_code

Stream = Any  # a tensor (..., D) or (..., n, D), or a tuple: one stream, several, or history


@dataclass(frozen=True)
class Group:
    """How the optimiser treats a parameter that a scheme owns."""

    lr: float = 1.0  # factor on the learning rate
    weight_decay: float | None = None  # factor on the weight decay; None: the rule for all
    eps: float = 1.0  # factor on Adam's epsilon


class Drawing(NamedTuple):
    """What stands where in the diagram of a connection, each a few signs; empty is a plain line.

    stream -> read -> F -> write -> (join) -> after -> stream, from the stream along skip to join.
    """

    read: str = ""
    write: str = ""
    skip: str = ""
    after: str = ""
    stream: str = "x"
    join: str = "+"


Law = Literal["constant", "sqrt", "linear", "geometric", "vanishing"]


class Wiring(nn.Module):
    """One residual connection: stream -> stream, around the one branch that it owns.

    A subclass states its facts as class attributes, builds its own parameters, gives them their
    start in `reset_parameters`, and writes the paper's equation as `forward`; `@register` enters it
    in the catalogue. A `Stack` makes it and calls `reset_parameters`. A norm in front of the branch
    is called `norm_in`, one behind it `norm_out`, one after the addition `norm`. Under FSDP2,
    sharded by connection, register `open` and `close` with `register_fsdp_forward_method`: they are
    called beside `forward` and may read parameters.
    """

    name: ClassVar[str]  # the string that names it everywhere
    equation: ClassVar[str]  # x <- ...
    paper: ClassVar[str]  # authors, year, arXiv number
    year: ClassVar[int]
    at_start: ClassVar[str]  # the equation with the start values put in
    final_norm: bool = False  # whether the model must normalise what `close` returns
    start: ClassVar[str] = "gpt2"  # the start that its branch asks for, a name in STARTS
    asks: ClassVar[Mapping[str, Any]] = {}  # options of the branches that a model must set
    # How the RMS goes over depth at the start: level, as sqrt(l), or by a factor up or down each.
    stream_law: ClassVar[Law]
    gradient_law: ClassVar[Law]  # on the way back
    expected: ClassVar[frozenset[str]] = frozenset()  # findings at the start at depth 24
    verified: ClassVar[bool] = True  # False where the source leaves a constant open
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {}  # the least and most of an option
    drawing: ClassVar[Drawing] = Drawing()
    ships: ClassVar[str] = ""  # known models and libraries that use it

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__()
        self.branch = branch
        self.site = site
        self.options: Mapping[str, Any] = {}  # filled in by the spec that builds it

    def new_norm(self) -> Map:
        """Return a new norm over the width of the stream, of the kind the site asks for."""
        norm = self.site.norm(self.site.dim).to(device=self.site.device, dtype=self.site.dtype)
        return typing.cast(Map, norm)

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """Return an unfilled parameter; `reset_parameters` gives it its start."""
        return self.site.new_parameter(*shape)

    def new_linear(self, inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
        """Return a linear layer of the wiring's own, started as torch does unless replaced."""
        return self.site.new_linear(inputs, outputs, bias=bias)

    def open(self, x: Tensor) -> Stream:
        """Turn the model's `x (..., D)` into the stream, once, at the first connection."""
        return x

    @abstractmethod
    def forward(self, stream: Stream, context: Context) -> Stream:
        """Return the stream after this connection. Calls `self.branch` exactly once."""

    def close(self, stream: Stream) -> Tensor:
        """Turn the stream into `x (..., D)`, once, at the last connection."""
        if not isinstance(stream, Tensor):
            raise ValueError(f"{self.name} has several streams and must define close(stream)")
        return stream

    def present(self, stream: Stream) -> Tensor:
        """Return what the stream is now, `(..., D)`, for the X-ray: of a tuple the first tensor."""
        now: Tensor = stream if isinstance(stream, Tensor) else stream[0]
        return now

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Raise `ValueError` for a number that is not finite or out of its limits."""
        for option, value in options.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            low, high = cls.limits.get(option, (-math.inf, math.inf))
            if not (low <= value <= high and math.isfinite(value)):
                allowed = _range(low, high) if math.isfinite(value) else "a finite number"
                raise ValueError(f"{option}={literal(value)} of {cls.name} must be {allowed}")

    def gains(self) -> Mapping[str, float]:
        """Return the factors by role that the scheme puts on its branch's start."""
        return {}

    def groups(self) -> Mapping[str, Group]:
        """Return how the optimiser treats parameters below this wiring, by dotted name.

        What is not named follows the rule for all: two axes or more decay, vectors do not.
        """
        return {}

    def reset_parameters(self) -> None:
        """Start the branch's matrices and the norms; a subclass adds its own parameters."""
        branches.start(self.branch, self.site.start or self.start, self.site, self.gains())
        for child in self.children():
            if child is not self.branch:
                branches.reset(child)

    @classmethod
    def run(cls, connections: Iterable[Wiring], stream: Stream, context: Context) -> Stream:
        """Run the connections in order. Only a scheme that must own the loop replaces this."""
        for connection in connections:
            stream = connection(stream, context)
        return stream

    def extra_repr(self) -> str:
        """Show the options."""
        return ", ".join(f"{k}={literal(v)}" for k, v in self.options.items())


class Stack(nn.Module):
    """Branches in a row along one stream, joined to it by one wiring: `(..., D) -> (..., D)`.

    `branches`: `Branch` modules, or any modules `(..., D) -> (..., D)`. `parts`: connections per
    layer. `norm`: width -> norm. `start`: a named start in place of the wiring's own.
    `drop_path`: stochastic depth at the last connection, rising linearly from 0 at the first.
    In a network of several stacks `before` connections stand in front of this one and there are
    `total` in all, which is what constants by depth and `drop_path` go by.
    The same module twice is refused unless `shared=True`. The stack does not add the final norm:
    `final_norm` says whether what it returns still needs one.

    Raises `ValueError` for an unknown wiring or option, no branches, a count that `parts` does not
    divide, a module that occurs twice, a width below 1, or a place outside the network.
    """

    def __init__(
        self,
        branches: Sequence[nn.Module],
        wiring: str | Spec = "prenorm",
        *,
        dim: int,
        parts: int = 1,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        start: str = "",
        drop_path: float = 0.0,
        shared: bool = False,
        before: int = 0,
        total: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = parse_spec(wiring) if isinstance(wiring, str) else wiring
        count = len(branches)
        if count == 0 or parts < 1 or count % parts:
            raise ValueError(f"a stack of {count} branches does not make layers of {parts}")
        if before < 0 or before % parts or total % parts or before + count > (total or count):
            raise ValueError(
                f"a stack of {count} connections after {before} does not fit in a network of "
                f"{total} with layers of {parts}"
            )
        if dim < 1:
            raise ValueError(f"dim {dim} must be at least 1")
        if start and start not in STARTS:
            raise ValueError(unknown("start", start, STARTS))
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path {drop_path} must be at least 0 and less than 1")
        if not shared and len({id(branch) for branch in branches}) < count:
            raise ValueError("the same branch occurs twice in a stack; say shared=True if meant")
        made = []
        for index, module in enumerate(branches):
            branch = module if isinstance(module, Branch) else Wrapped(module)
            branch = branch.to(device=device, dtype=dtype)
            site = Site(dim, index, count, parts, norm, start, device, dtype, before, total)
            connection = self.spec.build(branch, site)
            if drop_path:
                DropPath(drop_path * site.layer / max(site.layers - 1, 1)).drop(connection)
            made.append(connection)
        self.connections = nn.ModuleList(made)
        self.observed = False  # True: the plain loop, so that hooks see every connection

    @property
    def final_norm(self) -> bool:
        """Whether what the stack returns must still be normalised before a head reads it."""
        return list(self)[-1].final_norm

    def __iter__(self) -> Iterator[Wiring]:
        return (typing.cast(Wiring, connection) for connection in self.connections)

    def __len__(self) -> int:
        return len(self.connections)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Return `x (..., D)` after all connections."""
        connections = list(self)
        context = Context() if context is None else replace(context, values={})
        stream = connections[0].open(x)
        run = Wiring.run if self.observed else self.spec.wiring.run
        stream = run(connections, stream, context)
        return connections[-1].close(stream)

    def reset_parameters(self) -> None:
        """Start every branch and every connection again; works after the meta device.

        Raises `ValueError` for sharded parameters: a start fills views of whole tensors.
        """
        if any(sharded(parameter) for parameter in self.parameters()):
            raise ValueError(
                "the parameters are sharded already; call reset_parameters() before fully_shard(), "
                "or load a state dict"
            )
        for connection in self:
            connection.branch.reset_parameters()
            connection.reset_parameters()


# -- one string names a wiring everywhere ------------------------------------------------------

_CATALOGUE: dict[str, type[Wiring]] = {}
_WiringClass = TypeVar("_WiringClass", bound=type[Wiring])


def register(wiring: _WiringClass) -> _WiringClass:
    """Enter a wiring in the catalogue, as a class decorator.

    Raises `ValueError` when a fact of a user's wiring is missing or wrong, its options cannot be
    written in a spec, or one of our own has its name; it may be defined again (a notebook).
    """
    if is_own(wiring):
        from addnorm.checking import check_facts

        check_facts(wiring)
    _CATALOGUE[wiring.name] = wiring
    return wiring


def is_own(wiring: type[Wiring]) -> bool:
    """Whether a wiring is a user's own and none of ours."""
    return not wiring.__module__.startswith("addnorm.")


def catalogue() -> dict[str, type[Wiring]]:
    """Return every wiring by name, in the order of the family files, a user's own ones last."""
    import addnorm.wirings  # noqa: F401  # fills the catalogue; at the top it would be a cycle

    return dict(_CATALOGUE)


def unknown(kind: str, name: str, known: Iterable[str], listed: str = "", where: str = "") -> str:
    """Return the message for an unknown name, with what was probably meant and what is known.

    `listed` says what lists them where they are too many for a line; `where` it stands.
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    them = f"{listed} lists the {len(known)}" if listed else f"known: {', '.join(known) or 'none'}"
    return f"unknown {kind} {name!r}{where}{hint} ({them})"


@dataclass(frozen=True)
class Spec:
    """A wiring and its options that differ from the defaults; `str(spec)` is the canonical form.

    Raises `ValueError` for an unknown name or option, and a value of the wrong type or out of its
    limits.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        known = catalogue()
        if self.name not in known:
            raise ValueError(unknown("wiring", self.name, known, "addnorm wirings"))
        declared = options_of(self.wiring)
        kinds = kinds_of(self.wiring) if self.options else {}
        options = {}
        for key, value in self.options.items():
            if key not in declared:
                raise ValueError(unknown(f"option of {self.name}", key, declared))
            value = _typed(self.name, key, value, kinds[key])
            if value != declared[key].default:
                options[key] = value
        object.__setattr__(self, "options", options)
        self.wiring.check(options)

    @property
    def wiring(self) -> type[Wiring]:
        """The class that the name stands for."""
        return catalogue()[self.name]

    def build(self, branch: Branch, site: Site) -> Wiring:
        """Return the wiring around `branch` at `site`, started.

        Raises `ValueError` for one of a user's that fails or leaves a parameter without a start.
        """
        with own_code(f"the wiring {self.name}"):
            made = self.wiring(branch, site, **self.options)
            defaults = {k: option.default for k, option in options_of(self.wiring).items()}
            made.options = defaults | self.options
            if is_own(self.wiring):
                from addnorm.checking import start

                start(made)
            else:
                made.reset_parameters()
        return made

    def __str__(self) -> str:
        order = options_of(self.wiring)
        shown = [f"{k}={literal(self.options[k])}" for k in order if k in self.options]
        return f"{self.name}({', '.join(shown)})" if shown else self.name


def options_of(wiring: type[Wiring]) -> dict[str, inspect.Parameter]:
    """Return the keyword-only options of a wiring class with their defaults."""
    parameters = inspect.signature(wiring.__init__).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def kinds_of(wiring: type[Wiring]) -> dict[str, Any]:
    """Return by option its type: `int`, `float`, `bool`, `str` or a `Literal`."""
    hints = typing.get_type_hints(wiring.__init__)
    return {k: hints.get(k, type(option.default)) for k, option in options_of(wiring).items()}


def split_specs(text: str) -> list[str]:
    """Split a list of specs at the commas outside parentheses: `plain,mhc(n=4, iterations=20)`."""
    return [part.strip() for part in re.split(r",(?![^()]*\))", text) if part.strip()]


def parse_spec(text: str) -> Spec:
    """Read `name`, `name(option=value, ...)` or the shell-friendly `name:option=value:...`.

    Values are Python literals, `true`, `false`, or a bare word for a string. Raises `ValueError`
    for what cannot be read, an unknown name or option, and a value of the wrong type.
    """
    match = re.fullmatch(rf"\s*({NAME})\s*(?:\((.*)\)|:(.*))?\s*", text)
    if match is None:
        raise ValueError(
            f"cannot read the wiring {text!r}; write name, name(option=value) or name:option=value"
            + ("; separate options by ':'" if re.fullmatch(r"\s*\w+\s*=[^()]*", text) else "")
        )
    name, inner, shell = match.groups()
    settings = inner.split(",") if inner else shell.split(":") if shell else []
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = (part.strip() for part in setting.partition("="))
        joined = shell and re.search(r",\s*\w+\s*=", value)
        if joined or not equals or not value:
            how = "separate options by ':'" if joined else "write option=value"
            raise ValueError(f"cannot read {setting.strip()!r} in the wiring {text!r}; {how}")
        if key in options:
            raise ValueError(f"the wiring {text!r} sets {key} twice")
        options[key] = _read(value)
    return Spec(name, options)


NAME = r"[\w-]+"  # what a spec string can name
TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
_WORDS = {"true": True, "false": False, "nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _read(value: str) -> Any:
    """Read a value as a Python literal; what is none is a word."""
    try:
        return _WORDS[value] if value in _WORDS else ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def _typed(name: str, key: str, value: Any, kind: Any) -> Any:
    """Hold one option's value against the type that the wiring declares."""
    if typing.get_origin(kind) is Literal:
        known = typing.get_args(kind)
        if value not in known:
            where = f" of {key} in '{name}:{key}={value}'"
            raise ValueError(unknown("value", str(value), known, where=where))
        return value
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind:
        quoted = isinstance(value, str) and _read(value) != value  # would read as something else
        shown = repr(value) if quoted else literal(value)
        raise ValueError(f"{key}={shown} of {name} must be {TYPES[kind]}")
    return value


def _range(low: float, high: float) -> str:
    """Say what numbers are allowed."""
    if math.isinf(high):
        return f"at least {low:g}"
    return f"at most {high:g}" if math.isinf(low) else f"from {low:g} to {high:g}"


def literal(value: Any) -> str:
    """Write a value as a spec reads it: `true`, `1e-5`, `relu`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return re.sub(r"e([+-])0+(\d)", r"e\1\2", repr(value)).replace("e+", "e")
    return str(value)
