"""The plots of a study as Altair specifications, in English or Chinese; no torch.

Rows hold no words of either language, so both versions of a chart share their data. Every seed is
shown; a training that failed is a ×, at the value that stands for it, or above the others where
nothing does.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import altair as alt

from addnorm.reports.chart_style import (
    SHORT_LABEL,
    Lang,
    Row,
    data,
    finish,
    is_finite,
    log_ticks,
    panels,
)  # fmt: skip
from addnorm.reports.study_picture import (
    LABEL,
    Picture,
    PlotLook,
    axis_title,
    centre_of,
    kinds_of,
    line_rows,
    plot_tips,
    reference_line,
    scaled,
    seed_marks,
    values_of,
    wrapped,
)
from addnorm.reports.study_words import amount, factor_in, level_text, text_in

POINTS = 240  # of a profile, at most


def plot_chart(result: Mapping[str, Any], plot: Mapping[str, Any], lang: Lang = "en") -> Any:
    """Draw one of the plots that a study declares; it must have rows (`shown_rows`)."""
    picture = Picture(result, plot)
    assert picture.rows, "a plot without rows"
    kind = plot["kind"]
    numeric = bool(plot["x"]) and any(is_finite(row[plot["x"]]) for row in picture.rows)
    if kind == "profile":
        draw: Callable[[Picture, Lang], Any] = _profile
    else:
        draw = _lines if kind == "lines" and numeric else _dots
    chart = draw(picture, lang)
    columns, _ = panels(range(len(picture.panels)))
    if len(picture.panels) > 1 or picture.panels[0]:
        name = plot["facet"]
        old, new = (json.dumps(f"{word} = ") for word in (name, factor_in(name, lang)))
        label = f"replace(datum.label, {old}, {new})"
        header = alt.Header(title=None, labelLimit=400, labelExpr=label)
        facet = alt.Facet("p:N", header=header, sort=picture.panels)
        chart = chart.facet(facet, columns=columns, spacing=30)
    return finish(chart, (plot["title"]["en"], plot["title"]["zh"]), _under(picture), lang)


def _under(picture: Picture) -> tuple[str, str]:
    """Say below the title what the marks are."""
    plot, rows = picture.plot, picture.rows
    count = len({row["seed"] for row in rows})
    if plot["kind"] == "profile":
        en = [f"Thin lines: each of {count} seeds; thick: their median."]
        zh = [f"细线为单个种子（共 {count} 个），粗线为中位数。"]
    else:
        middle = ("line", "连线") if plot["kind"] == "lines" else ("bar", "短线")
        en = [f"Small points: each of {count} seeds; {middle[0]}: their median."]
        zh = [f"小圆点为单个种子（共 {count} 个），{middle[1]}为中位数。"]
    if count == 1:
        en, zh = ["One seed."], ["只有一个种子。"]
    if plot["reference"] is not None:
        title = plot["reference_title"] or {"en": "reference", "zh": "参考值"}
        value = amount(plot["reference"])
        en.append(f"Dotted line: {title['en']} ({value}).")
        zh.append(f"点线：{title['zh']}（{value}）。")
    lost = sum(row["failed"] for row in rows)
    if lost and plot["kind"] == "profile":
        whole = sum(row["failed"] and isinstance(row[plot["y"]], list) for row in rows)
        if whole:
            en.append(f"Dashed: failed ({whole}).")
            zh.append(f"虚线：失败（{whole} 次）。")
        if whole < lost:
            en.append(f"{lost - whole} failed, not drawn.")
            zh.append(f"另有 {lost - whole} 次失败，未画出。")
    elif lost:
        en.append(f"×: failed ({lost}).")
        zh.append(f"×：失败（{lost} 次）。")
    if plot["log_y"] and any(v <= 0 for row in rows for v in values_of(row[plot["y"]])):
        en.append("▽ at the lower edge: 0.")
        zh.append("下缘的 ▽：0。")
    return " ".join(en), "".join(zh)


def _lines(picture: Picture, lang: Lang) -> Any:
    """Draw y over a number: points, and a line through the medians where x is a factor."""
    plot, result, look = picture.plot, picture.result, PlotLook(picture, lang)
    placed = [row for row in picture.rows if is_finite(row[plot["x"]])]
    levels = sorted({row[plot["x"]] for row in placed})
    is_factor = plot["x"] not in result["metrics"]
    log = plot["log_x"] and levels[0] > 0
    place, back = (math.log, math.exp) if log else (float, float)
    low, high = place(levels[0]), place(levels[-1])
    span = (high - low) or 1.0
    ends = [back(low - 0.06 * span), back(high + 0.06 * span)]
    axis = scaled(ends, log_ticks(levels)[1] if log else [], log)
    if is_factor and len(levels) <= 12:
        axis["axis"] = alt.Axis(
            values=levels, labelExpr=SHORT_LABEL if log else LABEL, grid=False, labelOverlap=True
        )
    gaps = [place(b) - place(a) for a, b in itertools.pairwise(levels)]
    step = min(
        0.012,
        0.08 / len(picture.series),
        0.6 * min(gaps, default=span) / span / len(picture.series),
    )
    rows, groups = line_rows(picture), defaultdict(list)
    seeds = sorted({row["seed"] for row in picture.rows})
    for row in placed:
        panel, series, value = picture.panel_of(row), picture.series_of(row), row[plot["y"]]
        aside = (picture.series.index(series) - (len(picture.series) - 1) / 2) * step
        aside += (seeds.index(row["seed"]) / max(1, len(seeds) - 1) - 0.5) * 0.6 * step
        x = back(place(row[plot["x"]]) + (aside * span if is_factor else 0))
        same = {"p": panel, "s": series, "at": row[plot["x"]], "seed": row["seed"]}
        rows.append({**same, "x": x, "value": value, **picture.mark(row, value)})
        groups[panel, series, row[plot["x"]]].append(value)
    if is_factor:
        for (panel, series, x), values in sorted(groups.items(), key=lambda item: item[0][2]):
            middle = picture.median(values)
            same = {"kind": "median", "p": panel, "s": series, "at": x, "x": float(x)}
            rows.append({**same, "y": middle, "value": middle})
    title = (
        text_in(plot["x_title"], lang) if plot["x_title"] else axis_title(result, plot["x"], lang)
    )
    y = scaled(picture.ends, picture.ticks, plot["log_y"])
    columns, width = panels(range(len(picture.panels)))
    height = 380 if columns == 1 else 280
    kind = kinds_of(
        alt.Chart().encode(
            alt.X("x:Q", title=title, **axis),
            alt.Y("y:Q", title=wrapped(axis_title(result, plot["y"], lang), height), **y),
            look.colour,
        )
    )
    tips = plot_tips(picture, lang, alt.Tooltip("at:Q", title=title, format="~g"))
    return alt.layer(
        *reference_line(picture),
        kind("median")
        .mark_line(strokeWidth=2.2)
        .encode(opacity=look.opacity(1))
        .add_params(look.pick),
        *seed_marks(kind, look, tips),
        kind("median")
        .mark_point(filled=True, size=80)
        .encode(look.shape, opacity=look.opacity(1), tooltip=[tips[-1]]),
        data=data(rows),
    ).properties(width=width, height=height)


def _dots(picture: Picture, lang: Lang) -> Any:
    """Draw y over levels: points side by side and a bar at their median; long names downwards."""
    plot, result, look = picture.plot, picture.result, PlotLook(picture, lang)
    names = picture.levels(plot["x"]) if plot["x"] else [""]
    columns, width = panels(range(len(picture.panels)))
    flat = sum(max(30.0, 8.0 * len(name) + 14) for name in names) > width
    side_by_side = plot["color"] != plot["x"]
    parts = len(picture.series) if side_by_side else 1
    seeds = sorted({row["seed"] for row in picture.rows})
    rows, groups = line_rows(picture), defaultdict(list)
    for row in picture.rows:
        panel, series, value = picture.panel_of(row), picture.series_of(row), row[plot["y"]]
        at = level_text(row[plot["x"]]) if plot["x"] else ""
        centre = centre_of(picture, series) if side_by_side else 0.0
        aside = (seeds.index(row["seed"]) / max(1, len(seeds) - 1) - 0.5) * 0.9 / parts
        same = {"p": panel, "s": series, "at": at, "seed": row["seed"], "o": centre + aside}
        rows.append({**same, "value": value, **picture.mark(row, value)})
        groups[panel, series, at, centre].append(value)
    for (panel, series, at, centre), values in groups.items():
        middle = picture.median(values)
        same = {"kind": "median", "p": panel, "s": series, "at": at, "o": centre}
        rows.append({**same, "y": middle, "value": middle})
    title = (
        text_in(plot["x_title"], lang) if plot["x_title"] else axis_title(result, plot["x"], lang)
    )
    longest = min(320.0, 7.6 * max(map(len, names)))
    labels = alt.Axis(labelAngle=0, labelLimit=320, grid=False, title=None if flat else title)
    levels: dict[str, Any] = {
        "sort": names,
        "scale": alt.Scale(domain=names, padding=0.12),
        "axis": labels,
    }
    numbers = scaled(picture.ends, picture.ticks, plot["log_y"])
    room = width if flat else 360 if columns == 1 else 280
    numbers["title"] = wrapped(axis_title(result, plot["y"], lang), room)
    inside = alt.Scale(domain=[-1, 1])
    if flat:
        step = 20 + 16 * parts
        places: list[Any] = [
            alt.Y("at:N", **levels),
            alt.X("y:Q", **numbers),
            alt.YOffset("o:Q", scale=inside),
        ]
        width = max(200, width - int(longest) // (1 if columns == 1 else 2))
        height, thick = step * len(names), 0.62 * step / parts
    else:
        places = [
            alt.X("at:N", **levels),
            alt.Y("y:Q", **numbers),
            alt.XOffset("o:Q", scale=inside),
        ]
        height, thick = 360 if columns == 1 else 280, 0.5 * width / len(names) / parts
    kind = kinds_of(alt.Chart().encode(*places, look.colour))
    tips = plot_tips(picture, lang, alt.Tooltip("at:N", title=title))
    return alt.layer(
        *reference_line(picture, "x" if flat else "y"),
        *seed_marks(kind, look, tips),
        kind("median")
        .mark_tick(
            thickness=3.5, size=min(46.0, thick), orient="vertical" if flat else "horizontal"
        )
        .encode(opacity=look.opacity(1), tooltip=[tips[-1]])
        .add_params(look.pick),
        data=data(rows),
    ).properties(width=width, height=height)


def _profile(picture: Picture, lang: Lang) -> Any:
    """Draw lists over their index or over the list `x`: a thin line a row, and the median."""
    plot, result, look = picture.plot, picture.result, PlotLook(picture, lang)
    rows, groups = line_rows(picture), defaultdict(list)
    for number, row in enumerate(picture.rows):
        ys = row[plot["y"]]
        if not isinstance(ys, list):
            continue
        xs = row[plot["x"]] if plot["x"] else list(range(len(ys)))
        panel, series = picture.panel_of(row), picture.series_of(row)
        same: Row = {"kind": "failed" if row["failed"] else "seed", "p": panel, "s": series}
        same |= {"seed": row["seed"], "id": number}
        line = _thinned(list(zip(xs, ys, strict=False)))
        rows += [{**same, "x": x, "y": _positive(y, plot["log_y"])} for x, y in line]
        if not row["failed"]:
            groups[panel, series, len(ys)].append((xs, ys))
    for number, ((panel, series, _), lines) in enumerate(groups.items()):
        xs = [_middle(at) for at in zip(*(x for x, _ in lines), strict=False)]
        ys = [picture.median(at) for at in zip(*(y for _, y in lines), strict=False)]
        line = _thinned(list(zip(xs, ys, strict=False)))
        every = max(1, len(line) // 7)
        same = {"kind": "median", "p": panel, "s": series} | {"id": -1 - number}
        first = every // 2 + number % every if every > 1 else 0
        for i, (x, y) in enumerate(line):
            rows.append({**same, "x": x, "y": y, "value": y, "mark": i % every == first % every})
    known = sorted(r["x"] for r in rows if is_finite(r.get("x")))
    log = plot["log_x"]
    known = [x for x in known if x > 0 or not log] or [1.0]
    ends, ticks = log_ticks(known) if log else ([known[0], known[-1]], [])
    if log:
        ends = [known[0], known[-1]]
    axis = scaled(ends if ends[0] < ends[1] else [ends[0] - 1, ends[0] + 1], ticks, log)
    axis["scale"]["padding"] = 8
    whole = all(float(x).is_integer() for x in known)
    if not log:
        axis["axis"] = alt.Axis(tickCount=10, grid=False, labelExpr=LABEL)
        if whole and ends[1] - ends[0] < 14:
            axis["axis"]["values"] = list(range(int(ends[0]), int(ends[1]) + 1))
    title = (
        text_in(plot["x_title"], lang) if plot["x_title"] else axis_title(result, plot["x"], lang)
    )
    y = scaled(picture.ends, picture.ticks, plot["log_y"])
    columns, width = panels(range(len(picture.panels)))
    height = 380 if columns == 1 else 280
    kind = kinds_of(
        alt.Chart().encode(
            alt.X("x:Q", title=title or None, **axis),
            alt.Y("y:Q", title=wrapped(axis_title(result, plot["y"], lang), height), **y),
            look.colour,
            detail="id:N",
        )
    )
    tips = plot_tips(picture, lang, alt.Tooltip("x:Q", title=title, format="~g"))
    return alt.layer(
        *reference_line(picture),
        kind("seed").mark_line(strokeWidth=0.9, clip=True).encode(opacity=look.opacity(0.3)),
        kind("failed")
        .mark_line(strokeWidth=1.1, strokeDash=[3, 3], clip=True)
        .encode(opacity=look.opacity(0.6)),
        kind("median")
        .mark_line(strokeWidth=2.6, clip=True)
        .encode(opacity=look.opacity(1))
        .add_params(look.pick),
        kind("median")
        .transform_filter("datum.mark")
        .mark_point(filled=True, size=60, clip=True)
        .encode(look.shape, opacity=look.opacity(1), tooltip=[tips[-1]]),
        data=data(rows),
    ).properties(width=width, height=height)


def _positive(value: Any, log: bool) -> Any:
    return value if not log or not is_finite(value) or value > 0 else None


def _middle(values: Iterable[Any]) -> float | None:
    found = [v for v in values if is_finite(v)]
    return statistics.median(found) if found else None


def _thinned(line: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Return at most some hundred points of a line, with both its ends."""
    if len(line) <= POINTS:
        return line
    step = (len(line) - 1) / (POINTS - 1)
    return [line[round(i * step)] for i in range(POINTS)]
