"""Code of the user's own: a module that adds wirings, and `pkg.module:function`."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


def load_plugins(names: Iterable[str]) -> None:
    """Import modules (`my.wirings`) or files (`wirings.py`), so that their wirings are known.

    Raises `ValueError` when one is not there.
    """
    for name in names:
        if name.endswith(".py"):
            _import_file(Path(name))
        else:
            _import(name)


@contextlib.contextmanager
def own_code(what: str) -> Iterator[None]:
    """Turn an error in the user's code into one line that says what failed and where.

    The place is the last line that is neither ours nor of an installed library.
    """
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        said = _ours(frames[-1].filename) and str(frames[-1].line).startswith("raise ")
        if isinstance(error, ValueError) and said:
            raise  # it says in one line already what is wrong
        if isinstance(error, SyntaxError):
            place = f"{error.filename} line {error.lineno}"
        else:
            last = next((f for f in reversed(frames) if _theirs(f.filename)), frames[-1])
            place = f"{last.filename} line {last.lineno}"
        message = f"{what} failed: {type(error).__name__}: {error} ({place})"
        raise ValueError(message) from error


def _ours(file: str) -> bool:
    return Path(file).is_relative_to(Path(__file__).parent)


def _theirs(file: str) -> bool:
    libraries = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")
    return not (file.startswith("<") or _ours(file) or file.startswith(libraries))


def absolute(names: Iterable[str]) -> tuple[str, ...]:
    """Return the same plug-ins, files by absolute path, for another process or a later day."""
    return tuple(os.path.abspath(n) if n.endswith(".py") else n for n in names)


def resolve(target: str) -> Callable[..., Any]:
    """Return the function that `pkg.module:function` or `file.py:function` names.

    Raises `ValueError` when the module or the function is not there.
    """
    module_name, colon, function = target.rpartition(":")
    if not colon or not function:
        raise ValueError(
            f"{target!r} names no function; write pkg.module:function or file.py:function"
        )
    is_file = module_name.endswith(".py")
    module = _import_file(Path(module_name)) if is_file else _import(module_name)
    found = getattr(module, function, None)
    if not callable(found):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        near = difflib.get_close_matches(function, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{module_name} has no function {function!r}{hint}")
    result: Callable[..., Any] = found
    return result


def _import(name: str) -> Any:
    """Import a module, also from the working directory, as `python -m` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with own_code(name):
            return importlib.import_module(name)
    except ValueError as error:
        absent = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
        if absent and name.split(".")[0] == absent.split(".")[0]:
            raise ValueError(
                f"no module {name!r}, neither installed nor in {os.getcwd()}"
            ) from None
        raise


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"no file {str(path)!r}")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"addnorm_plugin_{path.stem}_{digest}"  # two files may share a name
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with own_code(str(path)):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # a half-made module must not be found again
        raise
    return module
