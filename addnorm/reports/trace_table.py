"""A trace in the terminal: sparklines over depth, the table of connections, what was found."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from addnorm.reports.trace_deep import deep_lines
from addnorm.reports.trace_view import (
    BY_KEY,
    OVERALL,
    PANELS,
    SEVERITIES,
    VITALS,
    Row,
    Vital,
    coverage_lines,
    folded,
    grouped,
    measured,
    named_rows,
    value_of,
    verdict,
)
from addnorm.reports.trace_words import chinese, said

BLOCKS = "▁▂▃▄▅▆▇█"
LOST = "×"  # not finite
GAP = "·"  # not measured
WIDTH = 60  # of a sparkline, in characters
PLAIN = 400  # columns of `plain`: wide enough that nothing of a usual trace is folded
COLOURS = {"sick": "bold red", "warning": "bold yellow", "note": "cyan"}
# The table leaves out what the page has room for.
COLUMNS = tuple(
    BY_KEY[key]
    for key in ("stream_after", "branch_share", "gradient_after", "identity_gain", "gain_backward",
                "token_similarity", "effective_rank", "dead_units")
)  # fmt: skip
FACTS = ("measured", "expected", "why", "remedy", "source")
FACTS_ZH = ("测得", "应为", "原因", "对策", "出处")


def safe(text: object) -> str:
    """Return text for a terminal: a name from elsewhere cannot steer it."""
    return "".join(c if c.isprintable() else "�" for c in str(text))


def short(value: float, form: str = ".3g") -> str:
    """Return a number for a table: - where it was not measured."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    text = format(value, form)
    return text.replace("-", "") if not text.strip("-+0.%") else text  # no minus zero


def sparkline(
    values: Sequence[float], *, log: bool = False, least: float = 0.0, width: int = WIDTH
) -> str:
    """Return a character for each value; for more than `width` of them, one for each stretch.

    The height goes from the smallest to the largest value, in decades with `log` where all are
    positive; a curve that changes by less than 1 %, or than `least`, is level. A stretch shows the
    value that is farthest from the middle, so that no single outlier is lost; `×` stands for
    infinite values, `·` for unknown ones.
    """
    finite = [v for v in values if math.isfinite(v)]
    scale: Callable[[float], float] = float
    if log and finite and max(finite) > 0:
        floor = min(v for v in finite if v > 0)
        scale = lambda v: math.log10(max(v, floor))  # noqa: E731
    heights = [scale(v) if math.isfinite(v) else v for v in values]
    known = [h for h in heights if math.isfinite(h)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    slack = math.log10(1.01) if log else max(least, 0.01 * max(abs(low), abs(high)))
    level = high - low <= slack
    middle = sorted(known)[len(known) // 2] if known else 0.0
    count = min(width, len(heights))
    drawn = []
    for k in range(count):
        part = heights[k * len(heights) // count : (k + 1) * len(heights) // count]
        here = [h for h in part if math.isfinite(h)]
        if any(math.isinf(h) for h in part):
            drawn.append(LOST)
        elif not here:
            drawn.append(GAP)
        elif level:
            drawn.append(BLOCKS[3])
        else:
            height = max(here, key=lambda h: abs(h - middle))
            drawn.append(BLOCKS[min(7, int(8 * (height - low) / (high - low)))])
    return "".join(drawn)


def rendered(trace: Row, lang: str = "en", everything: bool = False) -> RenderableType:
    """Return what a terminal shows of `Trace.to_dict()`, with colours where it has them.

    `everything` shows all connections and findings of a long trace.
    """
    zh = _is_chinese(lang)
    parts: list[RenderableType] = [
        _head(trace, zh),
        _sparklines(trace, zh),
        Text(),
        _table(trace, zh, everything),
        Text(),
        _overall(trace, zh),
    ]
    lines = [*coverage_lines(trace.get("coverage"), zh), *deep_lines(trace.get("deep", {}), zh)]
    parts += [Text(safe(line)) for line in lines]
    return Group(*parts, Text(), *_findings(trace, zh, everything))


def plain(trace: Row, lang: str = "en", everything: bool = False) -> str:
    """Return the same as text without colours, as wide as it needs to be."""
    return as_text(rendered(trace, lang, everything))


def as_text(what: RenderableType) -> str:
    """Return what rich would print, without colours and without spaces at the ends of lines."""
    console = Console(file=io.StringIO(), width=PLAIN, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(what, highlight=False)
    return "\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n"))


def _is_chinese(lang: str) -> bool:
    if lang not in ("en", "zh"):
        raise ValueError(f"no language {lang!r}; take en or zh")
    return lang == "zh"


def _head(trace: Row, zh: bool) -> Text:
    count, model = len(trace["connections"]), safe(trace["model"])
    wiring = safe(trace["wiring"])
    if zh:
        text = f"{model}，{f'接法 {wiring}' if wiring else '非 addnorm 的接法'}，{count} 个连接："
    else:
        plural = "connection" if count == 1 else "connections"
        text = f"{model}, {wiring or 'no wiring of addnorm'}, {count} {plural}: "
    found = chinese(trace["blocks"]) if zh else trace["blocks"]
    line = Text(text, style="bold").append(safe(found), style="not bold")
    if fed := trace.get("fed"):
        line.append(safe(f"；输入：{chinese(fed)}" if zh else f"; given {fed}"), style="not bold")
    return line


def _sparklines(trace: Row, zh: bool) -> Table:
    """Return a line per vital: its curve from the input to the output, and its ends and range."""
    connections = trace["connections"]
    table = Table(box=None, pad_edge=False)
    ends = ("first", "last", "least", "most")
    table.add_column("体征" if zh else "vital", no_wrap=True)
    table.add_column("输入 → 输出" if zh else "input → output", no_wrap=True)
    for name in ("首个", "末个", "最小", "最大") if zh else ends:
        table.add_column(name, justify="right", no_wrap=True)
    for vital in measured(connections, PANELS):
        values = [value_of(c, vital.key) for c in connections]
        known = [v for v in values if not math.isnan(v)]
        row = (known[0], known[-1], min(known), max(known))
        least = 0.01 * (vital.span[1] - vital.span[0]) if vital.span else 0.0
        line = sparkline(values, log=vital.log, least=least)
        table.add_row(vital.name(zh), line, *(short(v, vital.form) for v in row))
    return table


def _table(trace: Row, zh: bool, everything: bool) -> Table:
    connections = trace["connections"]
    vitals = measured(connections, COLUMNS)
    lost = any(c["non_finite"] for c in connections)
    table = Table(box=None, pad_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("连接" if zh else "connection", overflow="fold")
    for vital in vitals:
        table.add_column(vital.short_zh if zh else vital.short, justify="right", no_wrap=True)
    if lost:
        table.add_column("非有限值" if zh else "not finite", justify="right", no_wrap=True)
    count, named = len(connections), named_rows(trace)
    for i in range(count) if everything else folded(count, named):
        if isinstance(i, tuple):
            table.add_row("", _left_out(*i, zh))
            continue
        c = connections[i]
        cells = [short(value_of(c, v.key), v.form) for v in vitals]
        cells += [f"{c['non_finite']:,}" if c["non_finite"] else "-"] if lost else []
        name = Text(safe(c["name"]), style="red" if i in named and not trace["ok"] else "")
        table.add_row(str(i), name, *cells)
    return table


def _left_out(first: int, last: int, zh: bool) -> Text:
    """Return the row that stands for those from `first` to `last`."""
    left = last - first + 1
    words = f"… 另有 {left} 个，--all 显示全部 …" if zh else f"… {left:,} more, --all shows them …"
    return Text(words, style="dim")


def _overall(trace: Row, zh: bool) -> Text:
    slope, growth = value_of(trace, "gradient_slope"), value_of(trace, "stream_growth")
    loss, kind = value_of(trace, "loss"), trace["loss_kind"]
    kind = safe(chinese(kind) if zh else kind)
    if zh:
        text = (
            f"梯度斜率 {short(slope, '+.2f')}（每 10 个连接的数量级），残差流增长 "
            f"{short(growth)} 倍，损失 {short(loss, '.4g')}（{kind}）"
        )
    else:
        text = (
            f"gradient slope {short(slope, '+.2f')} decades per 10 connections, stream growth "
            f"{short(growth)}x, loss {short(loss, '.4g')} ({kind})"
        )
    return Text(text)


def _findings(trace: Row, zh: bool, everything: bool) -> list[Text]:
    """Return the findings, worst first, under a line that counts them."""
    findings = trace["findings"]
    counted = verdict(findings)[zh]
    bad = not trace["ok"]
    title = f"发现：{counted}" if zh else f"Findings: {counted}"
    lines = [Text(safe(title), style="bold red" if bad else "bold")]
    names = FACTS_ZH if zh else FACTS
    width = 10 if not zh else 4
    for group in grouped(findings, everything):
        for f in group.findings:
            severity = str(f["severity"])
            shown = SEVERITIES.get(severity, severity) if zh else severity
            line = Text(safe(shown), style=COLOURS.get(severity, ""))
            place = _place(f, zh)
            lines.append(line.append(f"{'：' if zh else ': '}{place}", style="bold default"))
            values = [said(f, key, zh) for key in ("value", "expected", "why", "remedy", "source")]
            lines += [
                Text(f"  {name:{width}}{safe(value)}")
                for name, value in zip(names, values, strict=True)
                if value
            ]
        lines += _more(group.more, zh)
    return lines


def _place(finding: Row, zh: bool) -> str:
    return safe(f"{finding['code']}{'，' if zh else ', '}{said(finding, 'where', zh)}")


# -- two traces --------------------------------------------------------------------------------


def compared(difference: dict[str, Any], lang: str = "en", everything: bool = False) -> Group:
    """Return what a terminal shows of `TraceComparison.to_dict()`."""
    zh = _is_chinese(lang)
    a, b = difference["a"], difference["b"]
    names = [safe(side["label"]) for side in (a, b)]
    overall = Table(box=None, pad_edge=False)
    overall.add_column("")
    for letter, name in zip("ab", names, strict=True):
        overall.add_column(f"{letter}: {name}", justify="right", overflow="fold")
    for key, en, zh_name, form in OVERALL:
        cells = [short(value_of(side, key), form) for side in (a, b)]
        overall.add_row(zh_name if zh else en, *cells)
    overall.add_row(
        "发现" if zh else "findings", *(safe(verdict(side["findings"])[zh]) for side in (a, b))
    )
    parts: list[RenderableType] = [overall, Text(), _side_by_side(difference, zh, everything)]
    parts += [Text(), *_changes(difference, zh, everything)]
    return Group(*parts)


def _side_by_side(difference: dict[str, Any], zh: bool, everything: bool) -> Table:
    rows = difference["rows"]
    both = [row["a"] for row in rows] + [row["b"] for row in rows]
    vitals: list[Vital] = measured(both, (v for v in VITALS if v in COLUMNS))[:6]
    table = Table(box=None, pad_edge=False)
    table.add_column("深度" if zh else "depth", justify="right", no_wrap=True)
    table.add_column("连接" if zh else "connection", overflow="fold")
    for vital in vitals:
        table.add_column(
            f"{vital.short_zh if zh else vital.short} a → b", justify="right", no_wrap=True
        )
    for i in range(len(rows)) if everything else folded(len(rows), ()):
        if isinstance(i, tuple):
            table.add_row("", _left_out(*i, zh))
            continue
        row = rows[i]
        first, second = safe(row["a"]["name"]), safe(row["b"]["name"])
        cells = [
            f"{short(value_of(row['a'], v.key), v.form)} → "
            f"{short(value_of(row['b'], v.key), v.form)}"
            for v in vitals
        ]
        name = first if first == second else f"{first} → {second}"
        table.add_row(f"{row['place']:.2f}", Text(name), *cells)
    return table


def _changes(difference: dict[str, Any], zh: bool, everything: bool) -> list[Text]:
    """Return which findings are gone, new, and in both."""
    words = (
        ("gone", "gone", "已消失", "green"),
        ("new", "new", "新出现", "bold red"),
        ("stayed", "in both", "两者皆有", ""),
    )
    lines = []
    for key, en, zh_name, style in words:
        for group in grouped(difference[key], everything):
            for f in group.findings:
                shown = str(f["severity"])
                line = Text(zh_name if zh else en, style=style)
                text = f" {shown}: {_place(f, False)}: {said(f, 'why', False)}"
                if zh:
                    shown = SEVERITIES.get(shown, shown)
                    text = f" {shown}：{_place(f, True)}：{said(f, 'why', True)}"
                lines.append(line.append(safe(text), style="not bold default"))
            lines += _more(group.more, zh)
    return lines or [Text("两者都没有发现" if zh else "no findings in either")]


def _more(places: Sequence[str], zh: bool) -> list[Text]:
    """Return the line on the findings of one code that are not shown in full."""
    if not places:
        return []
    first = ("，" if zh else ", ").join(map(safe, places[:3])) + " …" * (len(places) > 3)
    count = len(places)
    return [Text(f"  另有 {count} 处：{first}" if zh else f"  and at {count} more: {first}")]
