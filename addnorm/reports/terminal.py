"""What the terminal shows: the live table of a comparison, its result, a trace."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from addnorm.reports.statements import statements
from addnorm.reports.summary import MARGIN, STATUS, Summary, summarise

COLOURS = {"trained": "green", "stuck": "red", "diverged": "magenta", "mixed": "yellow"}
WORDS = {
    "wiring": {"en": "wiring", "zh": "接法"},
    "depth": {"en": "depth", "zh": "深度"},
    "rate": {"en": "rate", "zh": "学习率"},
    "warm-up": {"en": "warm-up", "zh": "预热"},
    "loss": {"en": "validation loss", "zh": "验证损失"},
    "outcome": {"en": "outcome", "zh": "结果"},
    "slope": {"en": "gradient slope", "zh": "梯度斜率"},
    "growth": {"en": "stream growth", "zh": "流增长"},
    "training": {"en": "training loss", "zh": "训练损失"},
    "accuracy": {"en": "accuracy", "zh": "准确率"},
    "parameters": {"en": "parameters", "zh": "参数量"},
    "equal_time": {"en": "at equal time", "zh": "等时损失"},
    "equal_flops": {"en": "at equal FLOPs", "zh": "等算力损失"},
    "lines": {
        "en": "Not trained means above {:.3f}: the {} {:.3f} minus 0.1. Uniform guessing: {:.3f}.",
        "zh": "高于 {:.3f}（{} {:.3f} 减 0.1）视为未训练成功；均匀猜测为 {:.3f}。",
    },
}


def number(value: float | None, digits: int = 3) -> str:
    """Write a number; a dash for NaN or None, ∞ for infinity."""
    if value is None or math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


class LiveComparison:
    """A table of wiring x depth that fills while the cells finish, with the time that is left.

    Where the console is no terminal it prints one line for each finished cell instead.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.cells: list[dict[str, Any]] = []
        self.total: dict[tuple[str, int, int], int] = {}
        self.all = 0
        self.work_done = self.work_all = 0.0
        self.began = time.perf_counter()
        self.live = Live(console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def begin(
        self, finished: Sequence[dict[str, Any]], grid: Sequence[tuple[str, int, int]]
    ) -> None:
        """Take the cells that are finished already and (wiring, depth, warm-up) of all cells."""
        self.cells, self.all = list(finished), len(grid)
        counted: dict[tuple[str, int, int], int] = defaultdict(int)
        for key in grid:
            counted[key] += 1
        self.total = dict(counted)
        self.work_all = float(
            sum(depth for _, depth, _ in grid) - sum(c["depth"] for c in finished)
        )
        self.began = time.perf_counter()
        if finished:
            self.console.print(f"{len(finished)} of {self.all} cells are finished already")
        self._show()

    def finished(self, cell: dict[str, Any]) -> None:
        """Take one finished cell."""
        self.cells.append(cell)
        self.work_done += cell["depth"]
        if self.live is None:
            self.console.print(
                f"[{len(self.cells)}/{self.all}] {cell['wiring']} depth {cell['depth']} rate "
                f"{cell['lr']:g} warm-up {cell['warmup']} seed {cell['seed']}: {cell['status']}, "
                f"validation loss {number(cell['validation'])}, {cell['seconds']:.1f} s",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        self._show()

    def _show(self) -> None:
        if self.live is not None:
            self.live.update(self._render())

    def _render(self) -> RenderableType:
        table = Table(box=None, pad_edge=False)
        depths = sorted({depth for _, depth, _ in self.total})
        table.add_column("wiring")
        table.add_column("warm-up", justify="right")
        for depth in depths:
            table.add_column(f"depth {depth}", justify="right")
        for wiring, warmup in dict.fromkeys((w, u) for w, _, u in self.total):
            row = [self._cell(wiring, depth, warmup) for depth in depths]
            table.add_row(wiring, str(warmup), *row)
        progress = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f} cells"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn(self._left()),
            console=self.console,
        )
        progress.add_task("", total=self.all, completed=len(self.cells))
        return Group(table, progress)

    def _left(self) -> str:
        if not self.work_done:
            return ""
        seconds = (time.perf_counter() - self.began) * (self.work_all / self.work_done - 1)
        return (
            f"about {seconds / 60:.1f} min left" if seconds > 60 else f"about {seconds:.0f} s left"
        )

    def _cell(self, wiring: str, depth: int, warmup: int) -> Text:
        here = [
            c
            for c in self.cells
            if (c["wiring"], c["depth"], c["warmup"]) == (wiring, depth, warmup)
        ]
        wanted = self.total.get((wiring, depth, warmup), 0)
        if not here:
            return Text("·" * min(wanted, 6), style="dim")
        losses = [c["validation"] for c in here if c["validation"] is not None]
        statuses = {c["status"] for c in here}
        status = statuses.pop() if len(statuses) == 1 else "mixed"
        value = number(sum(losses) / len(losses)) if losses else "∞"
        count = "" if len(here) == wanted else f" {len(here)}/{wanted}"
        return Text(f"{value} {status}{count}", style=COLOURS[status])


def print_comparison(console: Console, result: dict[str, Any], lang: str) -> None:
    """Print the table and what was found."""
    summary = summarise(result)
    console.print(_table(summary, lang))
    name = summary.words["line"][lang == "zh"]
    unigram, uniform = summary.unigram, summary.uniform
    line = WORDS["lines"][lang].format(unigram - MARGIN, name, unigram, uniform)
    console.print(line, highlight=False)
    console.print()
    for statement in statements(summary):
        text = statement.zh if lang == "zh" else statement.en
        bold = "bold" if statement.code.startswith("take") else ""
        console.print(Text(f"• {text}", style=bold))


def _table(summary: Summary, lang: str) -> Table:
    images = summary.unit == "images"
    names = ["wiring", "depth", "rate", "warm-up", "loss", "training"]
    names += ["accuracy"] * images + ["outcome", "slope", "growth", "equal_time", "equal_flops"]
    table = Table(box=None, pad_edge=False)
    for name in names:
        left = name in ("wiring", "outcome")
        table.add_column(WORDS[name][lang], justify="left" if left else "right", overflow="fold")
    table.add_column(summary.words["speed"][lang == "zh"], justify="right")
    table.add_column(WORDS["parameters"][lang], justify="right")
    for row in summary.rows():
        spread = f" [{number(row['low'], 2)}, {number(row['high'], 2)}]" if row["seeds"] > 1 else ""
        table.add_row(
            row["wiring"],
            str(row["depth"]),
            f"{row['lr']:g}",
            str(row["warmup"]),
            f"{number(row['loss'])}{spread}",
            number(row["training"]),
            *([f"{100 * row['accuracy']:.1f} %"] if images else []),
            Text(STATUS[row["status"]][lang], style=COLOURS[row["status"]]),
            number(row["slope"], 2),
            f"{number(row['growth'], 1)}x",
            number(row["equal_time"]),
            number(row["equal_flops"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['parameters']:,}",
        )
    return table
