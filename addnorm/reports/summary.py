"""What a comparison says: its cells grouped, and statements computed from the numbers.

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
STUCK_MARGIN = 0.1  # nats below the unigram line that a net must get to count as trained
STEEP = 1.0  # decades of gradient per 10 connections that count as a steep slope
ALIKE = 0.9  # mean cosine between positions that counts as collapsed


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
    def status(self) -> str:
        """`trained`, `stuck`, `diverged`, or `mixed` where the seeds disagree."""
        seen = {c["status"] for c in self.cells}
        return seen.pop() if len(seen) == 1 else "mixed"

    @property
    def trained(self) -> int:
        """The number of seeds that trained."""
        return sum(c["status"] == "trained" for c in self.cells)

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
        """Return the mean validation loss when `column` of the curve (0 step, 2 s) reaches `budget`.

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
    """Return `diverged` (not finite, or worse than knowing nothing), `stuck` or `trained`."""
    if not finite or not math.isfinite(validation) or validation > uniform:
        return "diverged"
    return "stuck" if validation > unigram - STUCK_MARGIN else "trained"


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


# -- statements --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statement:
    """One thing that the numbers say, in English and Chinese."""

    code: str
    en: str
    zh: str


def statements(summary: Summary) -> list[Statement]:
    """Return what was found and which wiring to take, every sentence computed from the cells."""
    found = [_advice(summary)]
    for wiring in summary.wirings:
        for rule in (_trains, _warmup, _why, _deeper):
            found += rule(summary, wiring)
    found += _start(summary)
    return found


def _advice(s: Summary) -> Statement:
    depth = s.depths[-1]
    ranked = [g for g in s.best_at(depth) if g.status == "trained"]
    if not ranked:
        partly = [g for g in s.best_at(depth) if g.trained]
        shallower = [d for d in s.depths if any(g.status == "trained" for g in s.best_at(d))]
        if partly:
            g = partly[0]
            return Statement(
                "take-none",
                f"Take none of these at depth {depth} yet: the best, {g.wiring}, trained with only "
                f"{g.trained} of {len(g.cells)} seeds.",
                f"深度 {depth} 时暂不建议采用其中任何一种：最好的 {g.wiring} 在 {len(g.cells)} 个随机种子中"
                f"只有 {g.trained} 个训练成功。",
            )
        en = (
            f" At depth {shallower[-1]}, take {_names(s, shallower[-1], 'and')}."
            if shallower
            else ""
        )
        zh = f"深度 {shallower[-1]} 时可用 {_names(s, shallower[-1], '和')}。" if shallower else ""
        return Statement(
            "take-none",
            f"Take none of these at depth {depth}: no wiring trained there. Try other rates, a "
            f"longer warm-up or more steps.{en}",
            f"深度 {depth} 时没有一种接法训练成功，都不建议采用。可以换学习率、延长预热或增加步数再试。{zh}",
        )
    best = ranked[0]
    ties = [g for g in ranked[1:] if not _apart(best, g)]
    seeds = len(best.cells)
    if ties and seeds == 1:
        return Statement(
            "take-one-seed",
            f"At depth {depth} {best.wiring} has the lowest validation loss, {best.loss:.3f}, but "
            "one seed cannot tell it from the others that trained; use --seeds 3.",
            f"深度 {depth} 时 {best.wiring} 的验证损失最低（{best.loss:.3f}），但只有一个随机种子，"
            "无法与其他训练成功的接法分出高下；请用 --seeds 3。",
        )
    warm = f" with {best.warmup} warm-up steps" if best.warmup else ""
    warm_zh = f"（预热 {best.warmup} 步）" if best.warmup else ""
    if ties:
        names = ", ".join(g.wiring for g in ties)
        return Statement(
            "take-tie",
            f"At depth {depth} take {best.wiring}{warm} (validation loss {best.loss:.3f}) or {names}: "
            f"with {len(best.cells)} seeds the difference cannot be told from chance.",
            f"深度 {depth} 时可选 {best.wiring}{warm_zh}（验证损失 {best.loss:.3f}），也可选 {names}："
            f"仅凭 {len(best.cells)} 个随机种子分不出高下。",
        )
    rest = s.best_at(depth)[1:]
    if not rest:
        en, zh = "; no other wiring was tried.", "；没有比较其他接法。"
    else:
        second = rest[0]
        en = f"; the next, {second.wiring}, is at {_number(second.loss)} ({_status(second, 'en')})."
        zh = f"；其次是 {second.wiring}，{_number(second.loss)}（{_status(second, 'zh')}）。"
    return Statement(
        "take",
        f"At depth {depth} take {best.wiring}{warm}: validation loss {best.loss:.3f}{en}",
        f"深度 {depth} 时建议采用 {best.wiring}{warm_zh}：验证损失 {best.loss:.3f}{zh}",
    )


def _trains(s: Summary, wiring: str) -> list[Statement]:
    """Say at which depths a wiring trained, was stuck or diverged, at its best rate and warm-up."""
    by_status: dict[str, list[int]] = defaultdict(list)
    for depth in s.depths:
        group = s.best(wiring, depth)
        if group is not None:
            by_status[group.status].append(depth)
    en, zh = [], []
    line = f"{s.unigram:.3f}"
    for status, depths in by_status.items():
        losses = [g.loss for d in depths if (g := s.best(wiring, d)) is not None]
        values = " / ".join(map(_number, losses))
        d = ", ".join(map(str, depths))
        match status:
            case "trained":
                en.append(f"trained at depth {d} (validation loss {values})")
                zh.append(f"深度 {d} 训练成功（验证损失 {values}）")
            case "stuck":
                en.append(f"stuck at depth {d} ({values}; the unigram line is {line})")
                zh.append(f"深度 {d} 停滞（{values}；一元熵线为 {line}）")
            case "diverged":
                en.append(f"diverged at depth {d}")
                zh.append(f"深度 {d} 发散")
            case _:
                en.append(f"trained with some seeds only at depth {d} (mean {values})")
                zh.append(f"深度 {d} 只有部分随机种子训练成功（均值 {values}）")
    return [Statement("trains", f"{wiring}: {'; '.join(en)}.", f"{wiring}：{'；'.join(zh)}。")]


def _warmup(s: Summary, wiring: str) -> list[Statement]:
    """Say at which depths warm-up decides whether a wiring trains."""
    if len(s.warmups) < 2:
        return []
    needs, harms = [], []
    for depth in s.depths:
        least = s.best(wiring, depth, s.warmups[0])
        longest = s.best(wiring, depth, s.warmups[-1])
        if least is None or longest is None:
            continue
        if longest.status == "trained" and not least.trained:
            needs.append((depth, least, longest))
        if least.status == "trained" and not longest.trained:
            harms.append((depth, least, longest))
    found = []
    for code, rows in (("needs-warmup", needs), ("warmup-harms", harms)):
        for depth, least, longest in rows:
            steps = f"{longest.warmup} warm-up steps"
            few = f"{least.warmup} steps" if least.warmup else "none"
            few_zh = f"预热 {least.warmup} 步" if least.warmup else "不预热"
            verb = "needs warm-up" if code == "needs-warmup" else "is worse off with warm-up"
            verb_zh = "需要预热" if code == "needs-warmup" else "预热反而有害"
            found.append(
                Statement(
                    code,
                    f"{wiring} {verb} at depth {depth}: with {steps} the validation loss is "
                    f"{_number(longest.loss)} ({_status(longest, 'en')}), with {few} it is "
                    f"{_number(least.loss)} ({_status(least, 'en')}).",
                    f"{wiring} 在深度 {depth} 时{verb_zh}：预热 {longest.warmup} 步的验证损失为 "
                    f"{_number(longest.loss)}（{_status(longest, 'zh')}），{few_zh}时为 "
                    f"{_number(least.loss)}（{_status(least, 'zh')}）。",
                )
            )
    return found


def _why(s: Summary, wiring: str) -> list[Statement]:
    """Say what the X-ray saw at the start of the deepest net that did not train."""
    failed = [g for d in s.depths if (g := s.best(wiring, d)) is not None and not g.trained]
    if not failed:
        return []
    group = failed[-1]
    slope = group.median("start", "gradient_slope")
    similarity = group.median("start", "token_similarity")
    count = len(group.cells[0]["start"]["connections"])
    decades = slope * (count - 1) / 10
    if not math.isfinite(slope) or not math.isfinite(similarity):
        return []  # not measured: say nothing rather than guess
    where, where_zh = f"{wiring} at depth {group.depth}", f"{wiring}，深度 {group.depth}"
    if slope >= STEEP:
        return [
            Statement(
                "why-vanishing",
                f"Why, {where}: at the start the gradient shrinks by {slope:.1f} decades per 10 "
                f"connections on its way back, about {decades:.0f} decades over all {count}; the "
                "first layers hear nothing.",
                f"原因（{where_zh}）：训练开始时，梯度在回传途中每经过 10 个连接缩小 {slope:.1f} 个数量级，"
                f"{count} 个连接合计约 {decades:.0f} 个数量级；靠近输入的层几乎收不到信号。",
            )
        ]
    if slope <= -STEEP:
        return [
            Statement(
                "why-exploding",
                f"Why, {where}: at the start the gradient grows by {-slope:.1f} decades per 10 "
                f"connections on its way back, about {-decades:.0f} decades over all {count}.",
                f"原因（{where_zh}）：训练开始时，梯度在回传途中每经过 10 个连接放大 {-slope:.1f} 个数量级，"
                f"{count} 个连接合计约 {-decades:.0f} 个数量级。",
            )
        ]
    if similarity >= ALIKE:
        return [
            Statement(
                "why-collapse",
                f"Why, {where}: the gradient is not the reason (slope {slope:+.2f} decades per 10 "
                f"connections), but after the last connection all positions look alike at the start "
                f"(mean cosine {similarity:.3f}): rank collapse.",
                f"原因（{where_zh}）：问题不在梯度（每 10 个连接 {slope:+.2f} 个数量级），而是训练开始时各位置在"
                f"最后一个连接之后已几乎相同（平均余弦 {similarity:.3f}）：秩坍缩。",
            )
        ]
    return [
        Statement(
            "why-unseen",
            f"Why, {where}: the X-ray at the start shows neither a steep gradient (slope "
            f"{slope:+.2f} decades per 10 connections) nor alike positions (mean cosine "
            f"{similarity:.3f}); the trouble comes during the first steps.",
            f"原因（{where_zh}）：训练开始时的透视既没有发现陡峭的梯度（每 10 个连接 {slope:+.2f} 个数量级），"
            f"也没有发现位置趋同（平均余弦 {similarity:.3f}）；问题出现在最初若干步更新中。",
        )
    ]


def _deeper(s: Summary, wiring: str) -> list[Statement]:
    """Say whether more depth helped a wiring that trains."""
    trained = [
        g for d in s.depths if (g := s.best(wiring, d)) is not None and g.status == "trained"
    ]
    if len(trained) < 2:
        return []
    shallow, deep = trained[0], trained[-1]
    gain = shallow.loss - deep.loss
    if not _apart(shallow, deep):
        en, zh = "makes no difference beyond the seeds' spread", "没有超出随机种子波动的差别"
        code = "depth-equal"
    elif gain > 0:
        en, zh, code = f"lowers the loss by {gain:.3f}", f"使损失降低 {gain:.3f}", "depth-helps"
    else:
        en, zh, code = f"raises the loss by {-gain:.3f}", f"使损失升高 {-gain:.3f}", "depth-hurts"
    steps = int(shallow.median("steps"))
    return [
        Statement(
            code,
            f"{wiring}: going from depth {shallow.depth} to {deep.depth} {en}, at {steps:,} steps each.",
            f"{wiring}：深度从 {shallow.depth} 增至 {deep.depth}，同为 {steps:,} 步，{zh}。",
        )
    ]


def _start(s: Summary) -> list[Statement]:
    """Say that each wiring was started as its own scheme asks, unless the user set one start."""
    starts = {c["wiring"]: c["start_rule"] for g in s.groups for c in g.cells}
    if len(set(starts.values())) < 2:
        return []
    listed = ", ".join(f"{w}: {r}" for w, r in starts.items())
    return [
        Statement(
            "own-start",
            f"Each wiring started as its own scheme asks ({listed}); part of a difference can come "
            "from the start. --start NAME gives all the same.",
            f"每种接法都按各自方案要求初始化（{listed}），差别可能部分来自初始化。用 --start 名称 可统一初始化。",
        )
    ]


def _apart(a: Group, b: Group) -> bool:
    """Whether the intervals of two groups do not overlap; one seed never tells."""
    if len(a.cells) < 2 or len(b.cells) < 2:
        return False
    return a.interval[1] < b.interval[0] or b.interval[1] < a.interval[0]


def _names(s: Summary, depth: int, joiner: str) -> str:
    names = [g.wiring for g in s.best_at(depth) if g.status == "trained"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {joiner} {names[-1]}"


STATUS = {
    "trained": {"en": "trained", "zh": "训练成功"},
    "stuck": {"en": "stuck", "zh": "停滞"},
    "diverged": {"en": "diverged", "zh": "发散"},
    "mixed": {"en": "mixed", "zh": "不一致"},
}


def _status(group: Group, lang: str) -> str:
    return STATUS[group.status][lang]


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "∞"


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
