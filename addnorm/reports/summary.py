"""A comparison's cells, grouped over seeds: losses with intervals, outcomes, the table.

A *cell* is one training (wiring, depth, rate, warm-up, seed), as `comparison.py` stores it. A
*group* is the seeds of one (wiring, depth, rate, warm-up). No torch here.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Cell = dict[str, Any]
# What the reports call things, in English and Chinese, by what the data are made of.
UNITS: dict[str, dict[str, tuple[str, str]]] = {
    "tokens": {
        "line": ("unigram line", "一元熵线"),
        "short": ("unigram", "一元熵"),
        "frequencies": ("how often each token occurs", "各词元的出现频率"),
        "more": ("the net uses the context", "网络用上了上下文"),
        "choices": ("ln(vocabulary)", "词表大小的自然对数"),
        "speed": ("tokens/s", "词元/秒"),
    },
    "images": {
        "line": ("class-frequency line", "类别频率线"),
        "short": ("class frequencies", "类别频率"),
        "frequencies": ("how often each class occurs", "各类别的出现频率"),
        "more": ("the net uses the image", "网络用上了图像内容"),
        "choices": ("ln(classes)", "类别数的自然对数"),
        "speed": ("images/s", "图像/秒"),
    },
}
MARGIN = 0.1  # nats below the line of frequencies that count as trained, above uniform as diverged


@dataclass(frozen=True)
class Group:
    """The seeds of one wiring, depth, rate and warm-up."""

    wiring: str
    depth: int
    lr: float
    warmup: int
    cells: tuple[Cell, ...]

    @property
    def losses(self) -> list[float]:
        """Final validation losses in nats; infinite for a seed that diverged."""
        return [math.inf if c["status"] == "diverged" else c["validation"] for c in self.cells]

    @property
    def loss(self) -> float:
        """Mean final validation loss in nats."""
        return statistics.fmean(self.losses)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % t interval of the mean with three seeds or more, else the range."""
        return interval(self.losses)

    @property
    def training(self) -> float:
        """Mean training loss over the last tenth of the steps; infinite where a seed diverged."""
        return statistics.fmean(math.inf if v is None else v for v in self.training_losses)

    @property
    def training_losses(self) -> list[float | None]:
        """Training losses by seed; None for a seed that diverged."""
        return [c["training"] for c in self.cells]

    @property
    def status(self) -> str:
        """`trained`, `stuck`, `diverged`, or `mixed` where the seeds disagree."""
        seen = {c["status"] for c in self.cells}
        return seen.pop() if len(seen) == 1 else "mixed"

    @property
    def trained(self) -> int:
        """The number of seeds that trained."""
        return sum(c["status"] == "trained" for c in self.cells)

    @property
    def falling(self) -> bool:
        """Whether the validation loss still fell by more than 1 % over the last third of the steps.

        Not over the last evaluation: the cosine schedule ends at a tenth of the rate.
        """
        drops = []
        for cell in self.whole:
            curve = cell["curve"]
            before = _at(curve, 0, curve[-1][0] * 2 / 3, cell["status"])
            drops.append(1 - curve[-1][1] / before)
        return bool(drops) and statistics.median(drops) > 0.01

    @property
    def label(self) -> str:
        """Wiring, with the warm-up where there is one."""
        return f"{self.wiring} + {self.warmup}" if self.warmup else self.wiring

    def median(self, *path: str) -> float:
        """Return the median over seeds of a value in the cells, NaN where none is finite."""
        values = []
        for cell in self.cells:
            value: Any = cell
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, int | float) and math.isfinite(value):
                values.append(float(value))
        return statistics.median(values) if values else math.nan

    @property
    def whole(self) -> list[Cell]:
        """The seeds that took all their steps; a loss that is not finite ends a training early."""
        return [c for c in self.cells if c["validation"] is not None]

    def loss_at(self, column: int, budget: float) -> float:
        """Return the mean validation loss when `column` of the curve (0 step, 2 s) is at `budget`.

        Linear between evaluations; infinite where a seed ended before, NaN without a budget.
        """
        if not math.isfinite(budget):
            return math.nan
        return statistics.fmean(_at(c["curve"], column, budget, c["status"]) for c in self.cells)


def _at(curve: Sequence[Sequence[float]], column: int, budget: float, status: str) -> float:
    if any(row[1] is None for row in curve):
        return math.inf
    for before, after in itertools.pairwise(curve):
        if after[column] >= budget:
            span = after[column] - before[column]
            part = (budget - before[column]) / span if span else 1.0
            return before[1] + part * (after[1] - before[1])
    return math.inf if status == "diverged" else curve[-1][1]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % t interval of the mean with three values or more, else their range."""
    if len(values) < 3 or not all(map(math.isfinite, values)):
        return min(values), max(values)
    from scipy import stats

    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values)
    mean = statistics.fmean(values)
    return mean - half / math.sqrt(len(values)), mean + half / math.sqrt(len(values))


@dataclass(frozen=True)
class Summary:
    """A comparison grouped over seeds."""

    result: dict[str, Any]
    groups: tuple[Group, ...]

    @property
    def unigram(self) -> float:
        """Validation loss of knowing only how often each character occurs, in nats."""
        return float(self.result["data"]["unigram"])

    @property
    def uniform(self) -> float:
        """ln(vocabulary): the loss of knowing nothing, in nats."""
        return float(self.result["data"]["uniform"])

    @property
    def unit(self) -> str:
        """What the data are made of: `tokens` or `images`."""
        return str(self.result["data"]["unit"])

    @property
    def words(self) -> dict[str, tuple[str, str]]:
        """What the reports call things, in English and Chinese."""
        return UNITS[self.unit]

    @property
    def wirings(self) -> list[str]:
        """Wirings in the order they were asked for."""
        return list(dict.fromkeys(g.wiring for g in self.groups))

    @property
    def depths(self) -> list[int]:
        """Depths, rising."""
        return sorted({g.depth for g in self.groups})

    @property
    def warmups(self) -> list[int]:
        """Warm-ups in steps, rising."""
        return sorted({g.warmup for g in self.groups})

    def best(self, wiring: str, depth: int, warmup: int | None = None) -> Group | None:
        """Return the group with the lowest mean loss, over rates and (unless given) warm-ups."""
        groups = [
            g
            for g in self.groups
            if g.wiring == wiring and g.depth == depth and warmup in (None, g.warmup)
        ]
        return min(groups, key=lambda g: (-g.trained, g.loss), default=None)

    def best_at(self, depth: int) -> list[Group]:
        """Return the best group of every wiring at `depth`, lowest loss first."""
        groups = [g for w in self.wirings if (g := self.best(w, depth)) is not None]
        return sorted(groups, key=lambda g: (-g.trained / len(g.cells), g.loss))

    def time_budget(self, depth: int) -> float:
        """Seconds that the fastest wiring took at `depth`: the budget of the equal-time column.

        Only trainings that took all their steps count; NaN where there is none.
        """
        whole = [[c["seconds"] for c in g.whole] for g in self.best_at(depth)]
        return min((statistics.median(seconds) for seconds in whole if seconds), default=math.nan)

    def flops_budget(self) -> float:
        """Training FLOPs of the cheapest whole training: the budget of the equal-FLOPs column."""
        whole = [float(c["flops"]) for g in self.groups for c in g.whole]
        return min(whole, default=math.nan)

    def rows(self) -> list[dict[str, Any]]:
        """Return the table: one row per wiring and depth at its best rate and warm-up."""
        budget = self.flops_budget()
        rows = []
        for depth in self.depths:
            seconds = self.time_budget(depth)
            for wiring in self.wirings:
                group = self.best(wiring, depth)
                if group is None:
                    continue
                per_step = [c["flops"] / c["steps"] for c in group.whole]
                steps = budget / per_step[0] if per_step else math.nan
                low, high = group.interval
                rows.append(
                    {
                        "wiring": wiring,
                        "depth": depth,
                        "lr": group.lr,
                        "warmup": group.warmup,
                        "loss": group.loss,
                        "training": group.training,
                        "accuracy": group.median("accuracy"),
                        "low": low,
                        "high": high,
                        "seeds": len(group.cells),
                        "status": group.status,
                        "trained": group.trained,
                        "slope": group.median("start", "gradient_slope"),
                        "slope_end": group.median("end", "gradient_slope"),
                        "growth": group.median("start", "stream_growth"),
                        "growth_end": group.median("end", "stream_growth"),
                        "similarity": group.median("start", "token_similarity"),
                        "tokens_per_second": group.median("tokens_per_second"),
                        "parameters": group.cells[0]["parameters"],
                        "equal_time": group.loss_at(2, seconds),
                        "equal_flops": group.loss_at(0, steps),
                    }
                )
        return rows


def status_of(validation: float, finite: bool, unigram: float, uniform: float) -> str:
    """Return `diverged` (not finite, or clearly worse than nothing), `stuck` or `trained`."""
    if not finite or not math.isfinite(validation) or validation > uniform + MARGIN:
        return "diverged"
    return "stuck" if validation > unigram - MARGIN else "trained"


def summarise(result: dict[str, Any]) -> Summary:
    """Group the cells of a comparison over seeds. Raises `ValueError` when there is none."""
    if not result.get("cells"):
        raise ValueError("the comparison has no finished cell yet")
    grouped: dict[tuple[str, int, float, int], list[Cell]] = defaultdict(list)
    for cell in result["cells"]:
        cell = cell | {"flops": cell["flops_per_token"] * cell["tokens"]}
        grouped[cell["wiring"], cell["depth"], cell["lr"], cell["warmup"]].append(cell)
    asked = {name: i for i, name in enumerate(result["settings"]["wirings"])}
    order = sorted(grouped, key=lambda k: (asked.get(k[0], len(asked)), *k[1:]))
    return Summary(result, tuple(Group(*key, tuple(grouped[key])) for key in order))


STATUS = {
    "trained": {"en": "trained", "zh": "训练成功"},
    "stuck": {"en": "stuck", "zh": "停滞"},
    "diverged": {"en": "diverged", "zh": "发散"},
    "mixed": {"en": "mixed", "zh": "不一致"},
}


def merge(
    results: Iterable[dict[str, Any]], same: Callable[[dict[str, Any]], Any]
) -> dict[str, Any]:
    """Join several comparisons into one. Raises `ValueError` when `same` differs between them."""
    results = list(results)
    first = results[0]
    cells: dict[str, Cell] = {}
    wirings: list[str] = []
    for result in results:
        if same(result) != same(first):
            raise ValueError(
                f"these comparisons cannot be joined: one has {same(first)}, another {same(result)}"
            )
        cells |= {cell["key"]: cell for cell in result["cells"]}
        wirings += [w for w in result["settings"]["wirings"] if w not in wirings]
    settings = first["settings"] | {"wirings": wirings}
    return first | {"settings": settings, "cells": list(cells.values())}
