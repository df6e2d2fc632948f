"""The names of the cells' files: a hash of all that decides the numbers of a cell."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import platform
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from addnorm.studies.frame import Study


def keys_of(study: Study, cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the name of each cell's file: a hash of all that decides its numbers."""
    facts = {
        "study": study.id,
        "code": code_of(study.measure),
        "package": package_code(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),  # whose pydoc is the corpus
    }
    texts = (json.dumps({**facts, "cell": dict(cell)}, sort_keys=True) for cell in cells)
    return [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]


@functools.cache
def package_code() -> str:
    """Return a digest of the package's code that a measure can use: all but what presents results.

    The studies are left out: each one's own code is in its keys.
    """
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] not in ("cli", "reports", "studies"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def code_of(function: Callable[..., Any]) -> str:
    """Return the source of a function and of what it uses of `addnorm.studies`, constants too."""
    found: dict[str, str] = {}
    _collect(function, found)
    return "\n".join(f"{name}: {found[name]}" for name in sorted(found))


def _collect(value: Any, found: dict[str, str]) -> None:
    source = inspect.getsource(value)
    name = f"{value.__module__}.{value.__qualname__}"
    if "<lambda>" in name:  # several of one name
        name += f" {source}"
    if name in found:
        return
    found[name] = source
    codes = [f.__code__ for f in _functions(value)]
    while codes:
        code = codes.pop()
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        for place, used in _globals(code.co_names, vars(inspect.getmodule(value))):
            other = inspect.unwrap(used) if callable(used) else used
            home = getattr(other, "__module__", "") or ""
            if isinstance(other, type | types.FunctionType) and home.startswith("addnorm.studies."):
                _collect(other, found)
            elif isinstance(other, int | float | str | tuple | list | dict):
                found[place] = _constant(other, found)


def _constant(value: Any, found: dict[str, str]) -> str:
    """Return a constant as text, the same in every process: functions in it by name and source."""
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
        if isinstance(value, types.FunctionType) and value.__module__.startswith("addnorm.studies"):
            _collect(value, found)
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {_constant(v, found)}' for k, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(_constant(item, found) for item in value)}]"
    if type(value) is tuple:
        inside = ", ".join(_constant(item, found) for item in value)
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return repr(value)


def _globals(names: Sequence[str], space: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what the names stand for in a module, and in those of `addnorm.studies` it imports."""
    for name in names:
        value = space.get(name)
        if isinstance(value, types.ModuleType):
            if value.__name__.startswith("addnorm.studies."):
                yield from ((f"{name}.{n}", vars(value)[n]) for n in names if n in vars(value))
        elif value is not None:
            yield f"{space['__name__']}.{name}", value


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """Yield a function, or the methods of a class."""
    if isinstance(value, types.FunctionType):
        yield value
    else:
        yield from (m for m in vars(value).values() if isinstance(m, types.FunctionType))
