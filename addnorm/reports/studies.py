"""The studies in the terminal: the live table, the list of verdicts, the claims; no torch."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from addnorm.reports.study_words import (
    amount,
    counted,
    duration,
    effect_in,
    known,
    level_text,
    mode_in,
    probability,
    text_in,
    verdict_in,
)

COLOURS = {"SUPPORTED": "green", "REFUTED": "red", "INCONCLUSIVE": "yellow", "": "dim"}
TIERS = (  # columns of the terminal, and what the list shows from there on
    (130, ("study", "title", "verdict", "effect", "p", "seeds", "minutes", "date", "mode")),
    (110, ("study", "verdict", "effect", "p", "seeds", "minutes", "date", "mode")),
    (80, ("study", "verdict", "effect", "date", "mode")),
    (0, ("study", "verdict", "effect", "mode")),
)
WORDS = {
    "study": ("study", "实验"),
    "title": ("about", "内容"),
    "verdict": ("verdict", "结论"),
    "effect": ("effect [95 % interval]", "效应 [95% 区间]"),
    "p": ("p", "p"),
    "seeds": ("seeds", "种子"),
    "minutes": ("core min", "核·分钟"),
    "date": ("date", "日期"),
    "mode": ("mode", "模式"),
    "cells": ("cells", "单元"),
    "failed": ("failed", "失败"),
    "left": ("left", "剩余"),
    "document": ("document", "文档"),
    "claim": ("claim", "论断"),
    "heavy": (
        "* heavy: --all leaves it out unless --long is given",
        "* 耗时较长：--all 只有加 --long 才会运行它",
    ),
    "shipped": (
        "° came with addnorm; not run in this folder",
        "° 随 addnorm 附带，未在此文件夹运行",
    ),
    "run": (
        "addnorm study NAME runs one, addnorm study --all all but the heavy ones.",
        "addnorm study 名称 运行其中一项，addnorm study --all 运行除耗时者外的全部。",
    ),
}


def _word(key: str, lang: str) -> str:
    return WORDS[key][lang == "zh"]


def _verdict(verdict: str, lang: str) -> Text:
    return Text(verdict_in(verdict, lang), style=COLOURS[verdict])


class LiveStudies:
    """A table on the console, a row per study, that fills while the cells are computed.

    It hears what `addnorm.studies.running.StudyObserver` does. A single study also shows the
    medians of its first metric that is a number. Where the console is no terminal, one line is
    printed when the cells begin and one per concluded study.
    """

    def __init__(self, console: Console, lang: str) -> None:
        self.console, self.lang = console, lang
        self.studies: list[Any] = []
        self.mode = ""
        self.counts: dict[str, tuple[int, int]] = {}
        self.rows: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        self.results: dict[str, Mapping[str, Any]] = {}
        self.began = time.perf_counter()
        self.live = (
            Live(console=console, refresh_per_second=4, get_renderable=self._render)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, message: str) -> None:
        """Print a sentence."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def begin(self, studies: Sequence[Any], mode: str, cells: Sequence[tuple[int, int]]) -> None:
        """Take the studies, and of each how many cells it has and how many are known already."""
        self.studies, self.mode = list(studies), mode
        self.counts = {study.id: count for study, count in zip(studies, cells, strict=True)}
        self.began = time.perf_counter()
        whole, done = (sum(count) for count in zip(*cells, strict=True)) if cells else (0, 0)
        minutes = sum(
            self._minutes(study, known) for study, (_, known) in zip(studies, cells, strict=True)
        )
        if self.lang == "zh":
            self.say(f"共 {whole} 个单元，已有 {done} 个；约需 {duration(60 * minutes, 'zh')}")
        else:
            self.say(
                f"{whole} cells, {done} of them known; about {duration(60 * minutes, 'en')} to go"
            )

    def cell(self, study: Any, row: Mapping[str, Any]) -> None:
        """Take one row, known or new."""
        self.rows[study.id].append(row)

    def concluded(self, study: Any, result: Mapping[str, Any]) -> None:
        """Take the result of a study."""
        self.results[study.id] = result
        if self.live is None:
            self.say(one_line(result, self.lang))

    def _minutes(self, study: Any, done: int) -> float:
        """Return the declared minutes of what is left of a study."""
        whole = self.counts[study.id][0]
        return float(study.mode(self.mode).minutes) * (1 - done / whole) if whole else 0.0

    def _pace(self) -> float:
        """Return the time that the new cells took over the time declared for them."""
        spent = sum(
            self._minutes(s, self.counts[s.id][1]) - self._minutes(s, len(self.rows[s.id]))
            for s in self.studies
        )
        return (time.perf_counter() - self.began) / 60 / spent if spent > 0 else 1.0

    def _render(self) -> RenderableType:
        if not self.studies:
            return Text("")
        pace, table = self._pace(), Table(box=None, pad_edge=False)
        for key in ("study", "cells", "failed", "left", "verdict"):
            table.add_column(
                _word(key, self.lang), justify="left" if key in ("study", "verdict") else "right"
            )
        room = max(8, self.console.height - 6)
        running = [s for s in self.studies if s.id not in self.results]
        shown = self.studies if len(self.studies) <= room else running[:room]
        for study in shown:
            rows, result = self.rows[study.id], self.results.get(study.id)
            lost = sum(self._lost(study, row) for row in rows)
            left = 60 * pace * self._minutes(study, len(rows))
            table.add_row(
                f"{study.id} {study.name}",
                f"{len(rows)}/{self.counts[study.id][0]}",
                Text(str(lost), style="magenta") if lost else "0",
                "" if result else duration(left, self.lang),
                _verdict(result["verdict"], self.lang) if result else "",
            )
        left = 60 * pace * sum(self._minutes(s, len(self.rows[s.id])) for s in running)
        done = len(self.results)
        last = (
            f"已完成 {done}/{len(self.studies)} 项，剩余约 {duration(left, 'zh')}"
            if self.lang == "zh"
            else f"{done} of {len(self.studies)} studies done, about {duration(left, 'en')} left"
        )
        parts: list[RenderableType] = [table, Text(last, style="dim")]
        if len(self.studies) == 1 and (medians := self._medians(self.studies[0])):
            parts = [medians, Text(""), *parts]
        return Group(*parts)

    def _lost(self, study: Any, row: Mapping[str, Any]) -> bool:
        return any(row.get(name) is None for name in study.metrics)

    def _medians(self, study: Any) -> Table | None:
        """Return the medians over the seeds so far; the last factor's levels are the columns."""
        rows = self.rows[study.id]
        numbers = [n for n in study.metrics if not any(isinstance(r.get(n), list) for r in rows)]
        factors = {**study.factors, **study.mode(self.mode).factors}
        varied = [name for name, levels in factors.items() if len(levels) > 1]
        if not numbers or not rows or not varied:
            return None
        metric, (*down, across) = numbers[0], varied
        title = text_in(study.metrics[metric].title._asdict(), self.lang)
        table = Table(box=None, pad_edge=False, title=title, title_justify="left")
        for name in down:
            table.add_column(name)
        columns = list(factors[across])[:8]
        for level in columns:
            table.add_column(f"{across} {level_text(level)}", justify="right", overflow="fold")
        room = max(4, self.console.height - 10)
        groups = list(dict.fromkeys(tuple(row[name] for name in down) for row in rows))
        for group in groups[:room]:
            here = [r for r in rows if tuple(r[name] for name in down) == group]
            cells = []
            for level in columns:
                values = [r[metric] for r in here if r[across] == level and known(r[metric])]
                lost = sum(self._lost(study, r) for r in here if r[across] == level)
                text = Text(amount(statistics.median(values)) if values else "·")
                text.append(f" ×{lost}" if lost else "", style="magenta")
                cells.append(text)
            table.add_row(*map(level_text, group), *cells)
        return table


def one_line(result: Mapping[str, Any], lang: str) -> str:
    """Write the result of a study in one line."""
    zh = lang == "zh"
    (main,) = [c for c in result["contrasts"] if c["name"] == "primary"]
    seeds, lost = len(result["seeds"]), result["failed"]
    parts = [effect_in(main, lang)]
    parts += [f"p {probability(main['p'])}"] if known(main["p"]) else []
    planned = result["planned"]
    of, of_zh = ("", "") if seeds == planned else (f" of {planned}", f"（计划 {planned} 个）")
    parts += [f"{seeds} 个种子{of_zh}" if zh else f"{seeds}{of} seeds"]
    parts += [f"{lost} 次训练失败" if zh else f"{lost} trainings failed"] if lost else []
    parts += [duration(result["seconds"], lang)]
    verdict, joint = verdict_in(result["verdict"], lang), "，" if zh else ", "
    colon = "：" if zh else ": "
    return f"{result['id']} {result['name']}{colon}{verdict}{colon}{joint.join(parts)}"


def print_studies(console: Console, rows: Sequence[Mapping[str, Any]], lang: str) -> None:
    """Print a row per study: its last verdict with effect, interval, p, seeds, minutes, date.

    `rows` as `addnorm.studies.running.summary` makes them; the verdict is "" where it was never
    run. Minutes are those of one core. A narrow terminal leaves columns out, the mode never.
    """
    keys = next(keys for width, keys in TIERS if console.width >= width)
    wide = console.width >= TIERS[1][0]
    table = Table(box=None, pad_edge=False)
    numbers = [effect_in({**row, "unit": {"en": "", "zh": ""}}, lang) for row in rows]
    longest = max(map(len, numbers), default=0)  # the unit may go to the next line, no more
    lines: list[dict[str, str | Text]] = []
    for row in rows:
        ran = bool(row["verdict"])
        name = Text.assemble((row["id"], "dim"), " ", (row["name"], "cyan"))
        name.append(" *" if row["heavy"] else "", style="dim")
        name.append(" °" if row.get("shipped") else "", style="dim")
        lines.append(
            {
                "study": name,
                "title": text_in(row["title"], lang),
                "verdict": _verdict(row["verdict"], lang),
                "effect": effect_in(row, lang),
                "p": probability(row["p"]),
                "seeds": str(len(row["seeds"])) if ran else "–",
                "minutes": f"{row['seconds'] / 60:.1f}" if ran else "–",
                "date": row["date"] or "–",
                "mode": mode_in(row, lang),
            }
        )
    least = {
        key: max((Text(str(line[key])).cell_len for line in lines), default=0)
        for key in keys
        if key not in ("title", "effect")
    }
    if wide:
        least["effect"] = longest
    most = {"title": 20, "effect": max(longest, 28)}
    for key in keys:
        right = key in ("p", "seeds", "minutes")
        table.add_column(
            _word(key, lang),
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=key not in ("title", "effect"),
            min_width=least.get(key),
            max_width=most.get(key) if wide else None,
        )
    for line in lines:
        table.add_row(*(line[key] for key in keys))
    console.print(table, highlight=False)
    for note in ("heavy", "shipped"):
        if any(row.get(note) for row in rows):
            console.print(Text(_word(note, lang), style="dim"))
    if len(rows) > 1:
        console.print(counted((row["verdict"] for row in rows), lang), highlight=False)


def print_claims(console: Console, results: Sequence[Mapping[str, Any]], lang: str) -> None:
    """Print the claims of the documents that the studies answer, each with its verdict."""
    claims = [claim for result in results for claim in result["claims"]]
    if not claims:
        return
    table = Table(box=None, pad_edge=False)
    for key in ("document", "claim", "verdict"):
        table.add_column(_word(key, lang), overflow="fold", no_wrap=key != "claim")
    for claim in claims:
        table.add_row(
            f"{claim['document']}:{claim['line']}",
            text_in(claim["says"], lang),
            _verdict(claim["verdict"], lang),
        )
    console.print()
    console.print(table, highlight=False)
