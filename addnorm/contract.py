"""The contract of a wiring, on one page: Site, Wiring, Stack and the spec strings that name them.

A *wiring* owns one branch and maps stream to stream: how the branch reads from the stream and how
its output joins it. A *stack* is branches in a row along one stream under one wiring.

Shapes: x `(..., D)`; a stream is a tensor `(..., D)`, or a tuple of such tensors. A stream is never
changed in place: a connection returns a new one. `close` accepts the stream after any connection.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import typing
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from addnorm import branches
from addnorm.branches import STARTS, Branch, Context, DropPath, Map, Site, Wrapped

Stream = Any  # a tensor (..., D), or a tuple of them: one stream, several, or history


@dataclass(frozen=True)
class Group:
    """How the optimiser treats a parameter that a scheme owns."""

    lr: float = 1.0  # factor on the learning rate
    weight_decay: float = 0.0  # factor on the weight decay


class Wiring(nn.Module):
    """One residual connection: stream -> stream, around the one branch that it owns.

    A subclass that sets `name` is entered in the catalogue. It states its facts as class
    attributes, builds its own parameters, and writes the paper's equation as `forward`.
    """

    name: ClassVar[str]  # the string that names it everywhere
    equation: ClassVar[str]  # x <- ...
    paper: ClassVar[str]  # authors, year, arXiv number
    year: ClassVar[int]
    at_start: ClassVar[str]  # the equation with the start values put in
    final_norm: ClassVar[bool] = False  # whether the model must normalise what `close` returns
    start: ClassVar[str] = "gpt2"  # the start that its branch asks for, a name in STARTS
    # How the RMS goes over depth at the start: level, as sqrt(l), or by a factor up or down each.
    stream_law: ClassVar[Literal["constant", "sqrt", "geometric", "vanishing"]]
    gradient_law: ClassVar[Literal["constant", "sqrt", "geometric", "vanishing"]]  # on the way back
    expected: ClassVar[frozenset[str]] = frozenset()  # findings at the start at depth 24
    verified: ClassVar[bool] = True  # False where the source leaves a constant open

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in cls.__dict__:
            known = _CATALOGUE.get(cls.name)
            # A user may define a wiring of theirs again (a notebook, a plug-in), never one of ours.
            if known is not None and known.__module__.startswith("addnorm."):
                raise ValueError(f"the wiring {cls.name!r} exists already; choose another name")
            facts = ("equation", "paper", "year", "at_start", "stream_law", "gradient_law")
            missing = [fact for fact in facts if not hasattr(cls, fact)]
            if missing:
                raise ValueError(f"the wiring {cls.name!r} does not state {', '.join(missing)}")
            _CATALOGUE[cls.name] = cls

    def __init__(self, branch: Branch, site: Site) -> None:
        super().__init__()
        self.branch = branch
        self.site = site

    def new_norm(self) -> Map:
        """Return a new norm over the width of the stream, of the kind the site asks for."""
        norm = self.site.norm(self.site.dim).to(device=self.site.device, dtype=self.site.dtype)
        return typing.cast(Map, norm)

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """Return an unfilled parameter; `reset_parameters` gives it its start.

        A scalar is `(1,)`: a parameter without an axis cannot be sharded.
        """
        assert shape, "a scalar parameter has the shape (1,)"
        return nn.Parameter(torch.empty(shape, device=self.site.device, dtype=self.site.dtype))

    def open(self, x: Tensor) -> Stream:
        """Turn the model's `x (..., D)` into the stream, once, at the first connection."""
        return x

    @abstractmethod
    def forward(self, stream: Stream, context: Context) -> Stream:
        """Return the stream after this connection. Calls `self.branch` exactly once."""

    def close(self, stream: Stream) -> Tensor:
        """Turn the stream into `x (..., D)`, once, at the last connection."""
        assert isinstance(stream, Tensor)
        return stream

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        """Raise `ValueError` for an option out of range; `options` are those that were set."""

    def gains(self) -> Mapping[str, float]:
        """Return the factors by role that the scheme puts on its branch's start."""
        return {}

    def groups(self) -> Mapping[str, Group]:
        """Return how the optimiser treats parameters below this wiring, by dotted name."""
        return {}

    def reset_parameters(self) -> None:
        """Start the branch's matrices and the norms; a subclass adds its own parameters."""
        branches.start(self.branch, self.site.start or self.start, self.site, self.gains())
        for child in self.children():
            if child is not self.branch:
                typing.cast(Any, child).reset_parameters()

    @classmethod
    def run(cls, connections: Iterable[Wiring], stream: Stream, context: Context) -> Stream:
        """Run the connections in order. Only a scheme that must own the loop replaces this."""
        for connection in connections:
            stream = connection(stream, context)
        return stream

    def extra_repr(self) -> str:
        """Show the options."""
        return ", ".join(f"{k}={_literal(getattr(self, k))}" for k in options_of(type(self)))


class Stack(nn.Module):
    """Branches in a row along one stream, joined to it by one wiring: `(..., D) -> (..., D)`.

    `branches`: `Branch` modules, or any modules `(..., D) -> (..., D)`. `parts`: connections per
    layer. `norm`: width -> norm. `start`: a named start in place of the wiring's own.
    `drop_path`: stochastic depth at the last connection, rising linearly from 0 at the first.
    The same module twice is refused unless `shared=True`. The stack does not add the final norm:
    `final_norm` says whether what it returns still needs one.

    Raises `ValueError` for an unknown wiring or option, no branches, a count that `parts` does not
    divide, a module that occurs twice, or a width below 1.
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = parse_spec(wiring) if isinstance(wiring, str) else wiring
        count = len(branches)
        if count == 0 or parts < 1 or count % parts:
            raise ValueError(f"a stack of {count} branches does not make layers of {parts}")
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
            if drop_path:
                branch = DropPath(branch, drop_path * index / max(count - 1, 1))
            site = Site(dim, index, count, parts, norm, start, device, dtype)
            made.append(self.spec.build(branch, site))
        self.connections = nn.ModuleList(made)

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
        context = context or Context()
        stream = connections[0].open(x)
        stream = type(connections[0]).run(connections, stream, context)
        return connections[-1].close(stream)

    def reset_parameters(self) -> None:
        """Start every branch and every connection again; works after the meta device."""
        for connection in self:
            connection.branch.reset_parameters()
            connection.reset_parameters()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters of any module into optimiser groups `{params, weight_decay, lr_scale}`.

    Matrices (two axes or more) decay, vectors and scalars do not; a wiring's own parameters follow
    its `groups`. Shared parameters are listed once, frozen ones are left out.
    """
    own: dict[int, Group] = {}
    for module in model.modules():
        if isinstance(module, Wiring):
            parameters = dict(module.named_parameters())
            for name, group in module.groups().items():
                if name not in parameters:
                    raise ValueError(
                        unknown(f"parameter in groups() of {module.name}", name, parameters)
                    )
                own[id(parameters[name])] = group
    split: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            group = own.get(id(parameter), Group(weight_decay=float(parameter.dim() >= 2)))
            split.setdefault((group.lr, group.weight_decay), []).append(parameter)
    return [
        {"params": params, "lr_scale": lr, "weight_decay": weight_decay * decay}
        for (lr, decay), params in split.items()
    ]


# -- one string names a wiring everywhere ------------------------------------------------------

_CATALOGUE: dict[str, type[Wiring]] = {}


def catalogue() -> dict[str, type[Wiring]]:
    """Return every wiring by name, in the order of the family files, a user's own ones last."""
    import addnorm.wirings  # noqa: F401  # fills the catalogue; at the top it would be a cycle

    return dict(_CATALOGUE)


def facts_of(name: str) -> dict[str, Any]:
    """Return the facts of a wiring, from its class: what the catalogue, docs and reports show."""
    wiring = catalogue()[name]
    names = ["equation", "at_start", "paper", "year", "final_norm", "start", "stream_law"]
    names += ["gradient_law", "verified"]
    facts = {key: getattr(wiring, key) for key in names}
    return {
        "name": name,
        **facts,
        "expected": sorted(wiring.expected),
        "options": {k: _literal(p.default) for k, p in options_of(wiring).items()},
        "about": inspect.getdoc(wiring),
    }


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown name, with what was probably meant and what is known."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{hint} (known: {', '.join(known) or 'none'})"


@dataclass(frozen=True)
class Spec:
    """A wiring and its options that differ from the defaults; `str(spec)` is the canonical form."""

    name: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def wiring(self) -> type[Wiring]:
        """The class that the name stands for."""
        return catalogue()[self.name]

    def build(self, branch: Branch, site: Site) -> Wiring:
        """Return the wiring around `branch` at `site`."""
        self.wiring.check(self.options)
        return self.wiring(branch, site, **self.options)

    def __str__(self) -> str:
        order = options_of(self.wiring)
        shown = [f"{k}={_literal(self.options[k])}" for k in order if k in self.options]
        return f"{self.name}({', '.join(shown)})" if shown else self.name


def options_of(wiring: type[Wiring]) -> dict[str, inspect.Parameter]:
    """Return the keyword-only options of a wiring class with their defaults."""
    parameters = inspect.signature(wiring.__init__).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def split_specs(text: str) -> list[str]:
    """Split a list of specs at the commas outside parentheses: `plain,mhc(n=4, iterations=20)`."""
    return [part.strip() for part in re.split(r",(?![^()]*\))", text) if part.strip()]


def parse_spec(text: str) -> Spec:
    """Read `name`, `name(option=value, ...)` or the shell-friendly `name:option=value:...`.

    Values are Python literals, `true`, `false`, or a bare word for a string. Raises `ValueError`
    for what cannot be read, an unknown name or option, and a value of the wrong type.
    """
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\)|:(.*))?\s*", text)
    if match is None:
        raise ValueError(
            f"cannot read the wiring {text!r}; write name, name(option=value) or name:option=value"
        )
    name, inner, shell = match.groups()
    known = catalogue()
    if name not in known:
        raise ValueError(unknown("wiring", name, known))
    settings = inner.split(",") if inner else shell.split(":") if shell else []
    declared = options_of(known[name])
    hints = typing.get_type_hints(known[name].__init__)
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or not value:
            raise ValueError(
                f"cannot read {setting.strip()!r} in the wiring {text!r}; write option=value"
            )
        if key not in declared:
            raise ValueError(unknown(f"option of {name}", key, declared))
        if key in options:
            raise ValueError(f"the wiring {text!r} sets {key} twice")
        options[key] = _value(text, key, value, hints.get(key, type(declared[key].default)))
    spec = Spec(name, {k: v for k, v in options.items() if v != declared[k].default})
    known[name].check(spec.options)
    return spec


_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def _value(text: str, key: str, value: str, kind: Any) -> Any:
    """Read one option's value and hold it against the type that the wiring declares."""
    words: dict[str, Any] = {"true": True, "false": False}
    try:
        read = words[value] if value in words else ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        read = value
    if typing.get_origin(kind) is Literal:
        if read not in typing.get_args(kind):
            raise ValueError(
                unknown(f"value of {key} in {text!r}", str(read), typing.get_args(kind))
            )
        return read
    if kind is float and type(read) is int and abs(read) < 2**53:
        return float(read)
    if type(read) is not kind:
        raise ValueError(f"{key}={value} in the wiring {text!r} must be {_TYPES.get(kind, kind)}")
    return read


def _literal(value: Any) -> str:
    """Write a value as a spec reads it: `true`, `1e-5`, `relu`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return re.sub(r"e([+-])0+(\d)", r"e\1\2", repr(value)).replace("e+", "e")
    return str(value)
