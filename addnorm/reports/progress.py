"""The progress of one training in the terminal. No torch here."""

from __future__ import annotations

import math
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from addnorm.reports.summary import UNITS


class TrainProgress:
    """A bar with loss, tokens per second and time left; every evaluation on a line of its own."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.reference = ""
        self.speed = "tokens/s"
        self.began = time.perf_counter()
        self.bar = Progress(
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=1)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def lines(self, unit: str, unigram: float, uniform: float) -> None:
        """Take what the data are made of, and the two losses that an evaluation is shown beside."""
        words = UNITS[unit]
        self.speed = words["speed"][0]
        self.reference = f" ({words['short'][0]} {unigram:.3f}, uniform {uniform:.3f})"

    def say(self, message: str) -> None:
        """Print a sentence."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, steps: int, loss: float, rate: float, left: float) -> None:
        """Move the bar."""
        minutes, seconds = divmod(int(left), 60)
        text = f"loss {loss:.3f}  {rate:,.0f} {self.speed}  {minutes}:{seconds:02d} left"
        self.bar.update(self.task, total=steps, completed=step, description=text)

    def evaluation(self, step: int, loss: float, accuracy: float) -> None:
        """Print a validation loss beside the lines, and the accuracy where there is one."""
        right = f"  accuracy {accuracy:.2%}" if math.isfinite(accuracy) else ""
        self.say(f"step {step:6,}  validation loss {loss:.4f}{self.reference}{right}")
