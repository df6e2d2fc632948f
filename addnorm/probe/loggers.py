"""Where the numbers of a training go: anything that takes `log(dict, step)` or `add_scalar`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from addnorm.files import json_line

Row = Mapping[str, float]
Sink = Callable[[Row, int], None]


@runtime_checkable
class Logs(Protocol):
    """A logger such as a run of W&B."""

    def log(self, row: Any, step: int) -> object:
        """Take the numbers of a step by name."""


@runtime_checkable
class Scalars(Protocol):
    """A logger such as the `SummaryWriter` of TensorBoard."""

    def add_scalar(self, name: str, value: float, step: int) -> object:
        """Take one number of a step."""


class JsonLines:
    """Append a line `{"step": ..., name: number, ...}` to a file for every step that is logged.

    What JSON lacks (NaN, infinity) becomes null. A line is written in one piece, so another
    program may read along.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def log(self, row: Row, step: int) -> None:
        """Append the line."""
        with open(self.path, "ab", buffering=0) as file:
            file.write(json_line({"step": step, **row}).encode())


def sink_of(log: Any) -> Sink | None:
    """Return what takes the numbers of a step as `(row, step)`; None for None.

    `log`: an object with `log(dict, step)` or with `add_scalar(name, value, step)`, or a function
    `(dict, step)`. Raises `ValueError` for anything else.
    """
    if log is None:
        return None
    if isinstance(log, Logs):
        taker = log.log
        return lambda row, step: void(taker(dict(row), step))
    if isinstance(log, Scalars):
        add = log.add_scalar

        def scalars(row: Row, step: int) -> None:
            for name, value in row.items():
                add(name, value, step)

        return scalars
    if callable(log):
        return lambda row, step: void(log(dict(row), step))
    hint = "; did you mean JsonLines(path)?" if isinstance(log, str | os.PathLike) else ""
    raise ValueError(
        f"log={log!r} must have log(dict, step) or add_scalar(name, value, step), or be a function "
        f"(dict, step){hint}"
    )


def void(_value: object) -> None:
    """Drop what a logger returns."""
