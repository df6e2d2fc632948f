"""The charts of a study as Altair specifications, in English or Chinese; no torch.

Rows hold no words of either language, so both versions of a chart share their data. Every seed is
shown; a training that failed is a ×, at the value that stands for it, or above the others where
nothing does.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import altair as alt

from addnorm.reports.chart_style import (
    GREY,
    PALETTE,
    SHORT_LABEL,
    WIDTH,
    Lang,
    Row,
    data,
    finish,
    is_finite,
    legend_columns,
    log_ticks,
    looks,
    panels,
    word,
)  # fmt: skip
from addnorm.reports.study_words import amount, demand, level_text, text_in

LABEL = (  # of a linear axis: 600, 0.05, 1.2M
    "abs(datum.value) < 100000 ? format(datum.value, '~g') : format(datum.value, '~s')"
)
CROSS = "M-1,-1L1,1M1,-1L-1,1"  # the mark of a failed training
POINTS = 240  # of a profile, at most
PANELS = 12  # beyond these, factors that a plot does not name are not told apart


# -- what a plot shows -------------------------------------------------------------------------


def shown_rows(result: Mapping[str, Any], plot: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a plot: those of complete seeds, where there is one, and its levels."""
    seeds, only = result["seeds"], plot["only"]
    rows = [row for row in result["rows"] if not seeds or row["seed"] in seeds]
    return [row for row in rows if all(row.get(k) == v for k, v in only.items())]


@dataclass
class _Picture:
    """What all kinds of plots share: the rows as series and panels, and the y axis."""

    result: Mapping[str, Any]
    plot: Mapping[str, Any]
    rows: list[Row] = field(init=False)
    series: list[str] = field(init=False)
    panels: list[str] = field(init=False)
    ends: list[float] = field(init=False)
    ticks: list[float] = field(init=False)
    band: float = field(init=False)
    """where a failed training stands that has no value"""

    def __post_init__(self) -> None:
        plot = self.plot
        self.rows = shown_rows(self.result, plot)
        self.series = self._levels(plot["color"]) if plot["color"] else [""]
        apart = [plot["facet"]] if plot["facet"] else []
        self.split = apart + self._left_over(apart)
        self.panels = list(dict.fromkeys(map(self.panel_of, self.rows)))
        values = [v for row in self.rows for v in _values(row[plot["y"]])]
        if plot["reference"] is not None:
            values.append(plot["reference"])
        self._scale(values)

    def _levels(self, name: str) -> list[str]:
        order = self.result["factors"].get(name, [])
        found = list(dict.fromkeys(row[name] for row in self.rows))
        found.sort(key=lambda level: order.index(level) if level in order else len(order))
        return list(map(level_text, found))

    def _left_over(self, apart: list[str]) -> list[str]:
        """Return the factors that vary without an axis, a colour or a panel of their own."""
        plot = self.plot
        if plot["kind"] != "profile" and plot["x"] in self.result["metrics"]:
            return []
        named = {plot["x"], plot["color"], *apart}
        names = [name for name in self.result["factors"] if name not in named]
        names = [name for name in names if len({str(row[name]) for row in self.rows}) > 1]
        count = len({tuple(str(row[name]) for name in apart + names) for row in self.rows})
        return names if count <= PANELS else []

    def panel_of(self, row: Row) -> str:
        """Return the title of the panel that a row belongs to."""
        return ", ".join(_named(name, row[name]) for name in self.split)

    def series_of(self, row: Row) -> str:
        """Return the name of the series that a row belongs to."""
        return level_text(row[self.plot["color"]]) if self.plot["color"] else ""

    def _scale(self, values: list[float]) -> None:
        """Set the ends of the y axis and its ticks, with room for failures that have no value."""
        nothing = any(not _values(row[self.plot["y"]]) for row in self.rows)
        values = [v for v in values if is_finite(v) and (v > 0 or not self.plot["log_y"])]
        values = values or [1.0]
        if self.plot["log_y"]:
            ends, self.ticks = log_ticks(values)
            room = (ends[1] / ends[0]) ** 0.06
            self.band = ends[1] * room
            self.ends = [ends[0], self.band * room if nothing else ends[1]]
        else:
            low, high = min(values), max(values)
            pad = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
            self.ticks, self.band = [], high + 2 * pad
            self.ends = [low - pad, self.band + pad if nothing else high + pad]

    def mark(self, row: Row, value: Any) -> Row:
        """Return kind and place of one value: a seed's, a failed one's, or 0 on a log axis."""
        if row["failed"] or not is_finite(value):
            return {"kind": "failed", "y": value if is_finite(value) else self.band}
        if self.plot["log_y"] and value <= 0:
            return {"kind": "low", "y": self.ends[0]}
        return {"kind": "seed", "y": value}

    def median(self, values: Iterable[Any]) -> float | None:
        """Return the median of what is known and can be drawn."""
        found = [v for v in values if is_finite(v)]
        value = statistics.median(found) if found else None
        low = value is not None and self.plot["log_y"] and value <= 0
        return self.ends[0] if low else value


def _values(value: Any) -> list[float]:
    return [v for v in (value if isinstance(value, list) else [value]) if is_finite(v)]


def _named(name: str, level: Any) -> str:
    """Write a level; a number with the name of its factor."""
    is_word = isinstance(level, str)
    return level_text(level) if is_word else f"{name} = {level_text(level)}"


def _title(result: Mapping[str, Any], name: str, lang: Lang) -> str:
    """Return the title of an axis: that of the metric with its unit, or the factor's name."""
    metric = result["metrics"].get(name)
    if metric is None:
        return name
    unit = text_in(metric["unit"], lang)
    brackets = "（{}）" if lang == "zh" else " ({})"
    return text_in(metric["title"], lang) + (brackets.format(unit) if unit else "")


def _scaled(ends: Sequence[float], ticks: Sequence[float], log: bool) -> dict[str, Any]:
    """Return scale and axis of a channel."""
    if log:
        return {
            "scale": alt.Scale(type="log", domain=list(ends), nice=False),
            "axis": alt.Axis(values=list(ticks), labelExpr=SHORT_LABEL, grid=True),
        }
    return {
        "scale": alt.Scale(domain=list(ends), zero=False, nice=False),
        "axis": alt.Axis(tickCount=8, grid=True),
    }


# -- the kinds ---------------------------------------------------------------------------------


def plot_chart(result: Mapping[str, Any], plot: Mapping[str, Any], lang: Lang = "en") -> Any:
    """Draw one of the plots that a study declares; it must have rows (`shown_rows`)."""
    picture = _Picture(result, plot)
    assert picture.rows, "a plot without rows"
    kind = plot["kind"]
    numeric = all(is_finite(row[plot["x"]]) for row in picture.rows) if plot["x"] else False
    if kind == "profile":
        draw: Callable[[_Picture, Lang], Any] = _profile
    else:
        draw = _lines if kind == "lines" and numeric else _dots
    chart = draw(picture, lang)
    columns, _ = panels(range(len(picture.panels)))
    if len(picture.panels) > 1 or picture.panels[0]:
        header = alt.Header(title=None, labelLimit=400)
        facet = alt.Facet("p:N", header=header, sort=picture.panels)
        chart = chart.facet(facet, columns=columns, spacing=30)
    return finish(chart, (plot["title"]["en"], plot["title"]["zh"]), _under(picture), lang)


def _under(picture: _Picture) -> tuple[str, str]:
    """Say below the title what the marks are."""
    plot, rows = picture.plot, picture.rows
    count = len({row["seed"] for row in rows})
    seeds, seeds_zh = f"{count} seed{'s' if count > 1 else ''}", f"{count} 个种子"
    if plot["kind"] == "profile":
        en = [f"Thin lines: each of {seeds}; thick: their median."]
        zh = [f"细线为单个种子（共 {seeds_zh}），粗线为中位数。"]
    else:
        middle = ("line", "连线") if plot["kind"] == "lines" else ("bar", "短线")
        en = [f"Small points: each of {seeds}; {middle[0]}: their median."]
        zh = [f"小圆点为单个种子（共 {seeds_zh}），{middle[1]}为中位数。"]
    if plot["reference"] is not None:
        title, at = plot["reference_title"] or {"en": "reference", "zh": "参考值"}, "dotted"
        value = amount(plot["reference"])
        en.append(f"{at.capitalize()}: {title['en']}, {value}.")
        zh.append(f"点线：{title['zh']}，{value}。")
    lost = sum(row["failed"] for row in rows)
    if lost and plot["kind"] == "profile":
        en.append(f"{lost} failed, not drawn.")
        zh.append(f"{lost} 次失败，未画出。")
    elif lost:
        en.append(f"×: failed ({lost}).")
        zh.append(f"×：失败（{lost} 次）。")
    if plot["log_y"] and any(v <= 0 for row in rows for v in _values(row[plot["y"]])):
        en.append("▽ at the lower edge: 0.")
        zh.append("下缘的 ▽：0。")
    return " ".join(en), "".join(zh)


class _Look:
    """Colour and shape by series, with a legend where there is more than one."""

    def __init__(self, picture: _Picture, lang: Lang) -> None:
        names = picture.series
        colours, shapes = looks(len(names))
        numbers = all(not isinstance(row.get(picture.plot["color"]), str) for row in picture.rows)
        legend = alt.Legend(
            title=picture.plot["color"] if numbers else None,
            orient="bottom",
            titleOrient="left",
            columns=legend_columns(names),
            symbolLimit=0,
            symbolOpacity=1,
        )
        told = picture.plot["kind"] == "dots" and picture.plot["x"] == picture.plot["color"]
        shown = legend if len(names) > 1 and not told else None
        self.colour = alt.Color(
            "s:N", scale=alt.Scale(domain=names, range=colours), legend=shown, sort=names
        )
        self.shape = alt.Shape(
            "s:N", scale=alt.Scale(domain=names, range=shapes), legend=shown, sort=names
        )
        self.pick = alt.selection_point(name="pick", fields=["s"], bind="legend", toggle="true")

    def opacity(self, value: float) -> Any:
        """Return the opacity of what is picked; the rest fades."""
        return alt.when(self.pick).then(alt.value(value)).otherwise(alt.value(0.06))


def _tips(picture: _Picture, lang: Lang, *more: alt.Tooltip) -> list[alt.Tooltip]:
    tips = [alt.Tooltip("s:N", title=picture.plot["color"])] if picture.plot["color"] else []
    y = alt.Tooltip("value:Q", title=_title(picture.result, picture.plot["y"], lang), format=".4~g")
    return [*tips, *more, alt.Tooltip("seed:N", title=word("seed", lang)), y]


def _reference(picture: _Picture, channel: Literal["x", "y"] = "y") -> list[alt.Chart]:
    """Return the line of reference of each panel."""
    value = picture.plot["reference"]
    if value is None:
        return []
    line = alt.Chart().transform_filter("datum.kind == 'line'")
    rule = line.mark_rule(color=GREY, strokeDash=[3, 3])
    return [rule.encode(**{channel: alt.datum(value, type="quantitative")})]


def _kinds(base: alt.Chart) -> Callable[[str], alt.Chart]:
    return lambda kind: base.transform_filter(f"datum.kind == '{kind}'")


def _marks(kind: Callable[[str], alt.Chart], look: _Look, tips: list[alt.Tooltip]) -> list[Any]:
    """Return the layers of seeds: their values, failed ones, and zeros on a log axis."""
    return [
        kind("seed").mark_circle(size=28).encode(opacity=look.opacity(0.55), tooltip=tips),
        kind("low")
        .mark_point(shape="triangle-down", size=40)
        .encode(opacity=look.opacity(0.8), tooltip=tips),
        kind("failed")
        .mark_point(shape=CROSS, size=34, strokeWidth=1.8)
        .encode(opacity=look.opacity(0.9), tooltip=tips),
    ]


def _base_rows(picture: _Picture) -> list[Row]:
    return [{"kind": "line", "p": panel} for panel in picture.panels]


def _lines(picture: _Picture, lang: Lang) -> alt.LayerChart:
    """Draw y over a number: points, and a line through the medians where x is a factor."""
    plot, result, look = picture.plot, picture.result, _Look(picture, lang)
    levels = sorted({row[plot["x"]] for row in picture.rows})
    is_factor = plot["x"] not in result["metrics"]
    log = plot["log_x"] and levels[0] > 0
    place, back = (math.log, math.exp) if log else (float, float)
    low, high = place(levels[0]), place(levels[-1])
    span = (high - low) or 1.0
    ends = [back(low - 0.06 * span), back(high + 0.06 * span)]
    axis = _scaled(ends, log_ticks(levels)[1] if log else [], log)
    if is_factor and len(levels) <= 12:
        axis["axis"] = alt.Axis(
            values=levels, labelExpr=SHORT_LABEL if log else LABEL, grid=False, labelOverlap=True
        )
    rows, groups = _base_rows(picture), defaultdict(list)
    seeds = sorted({row["seed"] for row in picture.rows})
    for row in picture.rows:
        panel, series, value = picture.panel_of(row), picture.series_of(row), row[plot["y"]]
        aside = (picture.series.index(series) - (len(picture.series) - 1) / 2) * 0.012
        aside += (seeds.index(row["seed"]) / max(1, len(seeds) - 1) - 0.5) * 0.008
        x = back(place(row[plot["x"]]) + (aside * span if is_factor else 0))
        same = {"p": panel, "s": series, "at": row[plot["x"]], "seed": row["seed"]}
        rows.append({**same, "x": x, "value": value, **picture.mark(row, value)})
        groups[panel, series, row[plot["x"]]].append(value)
    if is_factor:
        for (panel, series, x), values in sorted(groups.items(), key=lambda item: item[0][2]):
            y = picture.median(values)
            same = {"kind": "median", "p": panel, "s": series, "at": x, "x": float(x)}
            rows.append({**same, "y": y, "value": y})
    title = text_in(plot["x_title"], lang) if plot["x_title"] else _title(result, plot["x"], lang)
    y = _scaled(picture.ends, picture.ticks, plot["log_y"])
    kind = _kinds(
        alt.Chart().encode(
            alt.X("x:Q", title=title, **axis),
            alt.Y("y:Q", title=_title(result, plot["y"], lang), **y),
            look.colour,
        )
    )
    tips = _tips(picture, lang, alt.Tooltip("at:Q", title=title, format="~g"))
    columns, width = panels(range(len(picture.panels)))
    return alt.layer(
        *_reference(picture),
        kind("median")
        .mark_line(strokeWidth=2.2)
        .encode(opacity=look.opacity(1))
        .add_params(look.pick),
        *_marks(kind, look, tips),
        kind("median")
        .mark_point(filled=True, size=80)
        .encode(look.shape, opacity=look.opacity(1), tooltip=[tips[-1]]),
        data=data(rows),
    ).properties(width=width, height=380 if columns == 1 else 280)


def _dots(picture: _Picture, lang: Lang) -> alt.LayerChart:
    """Draw y over levels: points side by side and a bar at their median; long names downwards."""
    plot, result, look = picture.plot, picture.result, _Look(picture, lang)
    names = picture._levels(plot["x"]) if plot["x"] else [""]
    columns, width = panels(range(len(picture.panels)))
    flat = sum(max(30.0, 8.0 * len(name) + 14) for name in names) > width
    side_by_side = plot["color"] != plot["x"]
    parts = len(picture.series) if side_by_side else 1
    seeds = sorted({row["seed"] for row in picture.rows})
    rows, groups = _base_rows(picture), defaultdict(list)
    for row in picture.rows:
        panel, series, value = picture.panel_of(row), picture.series_of(row), row[plot["y"]]
        at = level_text(row[plot["x"]]) if plot["x"] else ""
        centre = _centre(picture, series) if side_by_side else 0.0
        aside = (seeds.index(row["seed"]) / max(1, len(seeds) - 1) - 0.5) * 0.9 / parts
        same = {"p": panel, "s": series, "at": at, "seed": row["seed"], "o": centre + aside}
        rows.append({**same, "value": value, **picture.mark(row, value)})
        groups[panel, series, at, centre].append(value)
    for (panel, series, at, centre), values in groups.items():
        y = picture.median(values)
        same = {"kind": "median", "p": panel, "s": series, "at": at, "o": centre}
        rows.append({**same, "y": y, "value": y})
    title = text_in(plot["x_title"], lang) if plot["x_title"] else _title(result, plot["x"], lang)
    longest = min(320.0, 7.6 * max(map(len, names)))
    labels = alt.Axis(labelAngle=0, labelLimit=320, grid=False, title=None if flat else title)
    levels = {"sort": names, "scale": alt.Scale(domain=names, padding=0.12), "axis": labels}
    numbers = _scaled(picture.ends, picture.ticks, plot["log_y"])
    numbers["title"] = _title(result, plot["y"], lang)
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
    kind = _kinds(alt.Chart().encode(*places, look.colour))
    tips = _tips(picture, lang, alt.Tooltip("at:N", title=title))
    return alt.layer(
        *_reference(picture, "x" if flat else "y"),
        *_marks(kind, look, tips),
        kind("median")
        .mark_tick(
            thickness=3.5, size=min(46.0, thick), orient="vertical" if flat else "horizontal"
        )
        .encode(opacity=look.opacity(1), tooltip=[tips[-1]])
        .add_params(look.pick),
        data=data(rows),
    ).properties(width=width, height=height)


def _centre(picture: _Picture, series: str) -> float:
    """Return where the points of a series stand beside those of the others, from -1 to 1."""
    count = len(picture.series)
    return (2 * picture.series.index(series) + 1) / count - 1


def _profile(picture: _Picture, lang: Lang) -> alt.LayerChart:
    """Draw lists over their index or over the list `x`: a thin line a row, and the median."""
    plot, result, look = picture.plot, picture.result, _Look(picture, lang)
    rows, groups = _base_rows(picture), defaultdict(list)
    for number, row in enumerate(picture.rows):
        ys = row[plot["y"]]
        if not isinstance(ys, list):
            continue
        xs = row[plot["x"]] if plot["x"] else list(range(len(ys)))
        panel, series = picture.panel_of(row), picture.series_of(row)
        same = {"kind": "seed", "p": panel, "s": series, "seed": row["seed"], "id": number}
        line = _thinned(list(zip(xs, ys, strict=False)))
        rows += [{**same, "x": x, "y": _positive(y, plot["log_y"])} for x, y in line]
        groups[panel, series, len(ys)].append((xs, ys))
    for number, ((panel, series, _), lines) in enumerate(groups.items()):
        xs = [_middle(at) for at in zip(*(x for x, _ in lines), strict=False)]
        ys = [picture.median(at) for at in zip(*(y for _, y in lines), strict=False)]
        line = _thinned(list(zip(xs, ys, strict=False)))
        every = max(1, len(line) // 7)
        same = {"kind": "median", "p": panel, "s": series, "id": -1 - number}
        first = every // 2 + number % every if every > 1 else 0
        for i, (x, y) in enumerate(line):
            rows.append({**same, "x": x, "y": y, "value": y, "mark": i % every == first % every})
    known = sorted(r["x"] for r in rows if is_finite(r.get("x")))
    log = plot["log_x"]
    known = [x for x in known if x > 0 or not log] or [1.0]
    ends, ticks = log_ticks(known) if log else ([known[0], known[-1]], [])
    if log:
        ends = [known[0], known[-1]]
    axis = _scaled(ends if ends[0] < ends[1] else [ends[0] - 1, ends[0] + 1], ticks, log)
    axis["scale"]["padding"] = 8
    whole = all(float(x).is_integer() for x in known)
    if not log:
        axis["axis"] = alt.Axis(tickCount=10, grid=False, labelExpr=LABEL)
        if whole and ends[1] - ends[0] < 14:
            axis["axis"]["values"] = list(range(int(ends[0]), int(ends[1]) + 1))
    title = text_in(plot["x_title"], lang) if plot["x_title"] else _title(result, plot["x"], lang)
    y = _scaled(picture.ends, picture.ticks, plot["log_y"])
    kind = _kinds(
        alt.Chart().encode(
            alt.X("x:Q", title=title or None, **axis),
            alt.Y("y:Q", title=_title(result, plot["y"], lang), **y),
            look.colour,
            detail="id:N",
        )
    )
    tips = _tips(picture, lang, alt.Tooltip("x:Q", title=title, format="~g"))
    columns, width = panels(range(len(picture.panels)))
    return alt.layer(
        *_reference(picture),
        kind("seed").mark_line(strokeWidth=0.9, clip=True).encode(opacity=look.opacity(0.3)),
        kind("median")
        .mark_line(strokeWidth=2.6, clip=True)
        .encode(opacity=look.opacity(1))
        .add_params(look.pick),
        kind("median")
        .transform_filter("datum.mark")
        .mark_point(filled=True, size=60, clip=True)
        .encode(look.shape, opacity=look.opacity(1), tooltip=[tips[-1]]),
        data=data(rows),
    ).properties(width=width, height=380 if columns == 1 else 280)


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


# -- the effects -------------------------------------------------------------------------------


def effects_chart(result: Mapping[str, Any], lang: Lang = "en") -> alt.LayerChart:
    """Draw the effect of every seed of the primary contrast against its limit, with the interval.

    The ground is coloured on the side of the limit on which the statement holds.
    """
    (main,) = [c for c in result["contrasts"] if c["name"] == "primary"]
    limit, rule = main["limit"], main["rule"]
    found = [v for v in main["effects"] if is_finite(v)]
    low, high = min([*found, limit]), max([*found, limit])
    if rule in ("within", "exact"):
        low, high = min(low, -limit), max(high, limit)
    pad = 0.08 * (high - low) or 0.5 * abs(high) or 1.0
    ends = [low - pad, high + pad]
    holds = {
        "above": (limit, ends[1]),
        "below": (ends[0], limit),
    }.get(rule, (-limit, limit))
    rows: list[Row] = [
        {"kind": "seed", "x": effect, "at": i, "seed": seed}
        for i, (seed, effect) in enumerate(zip(result["seeds"], main["effects"], strict=True))
        if is_finite(effect)
    ]
    count = len(result["seeds"])
    rows.append({"kind": "holds", "x": holds[0], "to": holds[1]})
    limits = [-limit, limit] if rule in ("within", "exact") and limit else [limit]
    rows += [{"kind": "limit", "x": at} for at in limits]
    if is_finite(main["effect"]):
        start, stop = main["interval"]
        rows.append({"kind": "interval", "x": start, "to": stop, "at": count + 0.4})
        rows.append({"kind": "median", "x": main["effect"], "at": count + 0.4})
    unit = text_in(main["unit"], lang)
    name = (
        ("效应（{}）" if unit else "效应") if lang == "zh" else "effect ({})" if unit else "effect"
    )
    places = [f"datum.value == {i} ? '{seed}' : " for i, seed in enumerate(result["seeds"])]
    x = alt.X(
        "x:Q",
        title=name.format(unit),
        scale=alt.Scale(domain=ends, nice=False, zero=False),
        axis=alt.Axis(tickCount=8, grid=False),
    )
    y = alt.Y(
        "at:Q",
        title=word("seed", lang),
        scale=alt.Scale(domain=[count + 1.1, -0.8], nice=False, zero=False),
        axis=alt.Axis(
            values=list(range(count)),
            labelExpr="".join(places) + "''",
            grid=False,
            ticks=False,
            domain=False,
            labelOverlap=True,
        ),
    )
    base = alt.Chart(data(rows)).encode(x)
    kind = _kinds(base)
    tips = [
        alt.Tooltip("seed:N", title=word("seed", lang)),
        alt.Tooltip("x:Q", title=name.format(unit), format=".4~g"),
    ]
    colour = PALETTE[0]
    limit_text = demand(main, lang)
    side = ("shaded: where the statement holds", "底色：命题成立的一侧")
    wanted = ("The statement asks for", "命题要求")
    chart = alt.layer(
        kind("holds").mark_rect(color="#e3f0f9").encode(alt.X2("to:Q")),
        kind("limit").mark_rule(color=GREY, strokeWidth=1.6, strokeDash=[5, 3]),
        kind("interval")
        .mark_rule(color=colour, strokeWidth=5, opacity=0.45)
        .encode(y, alt.X2("to:Q")),
        kind("median")
        .mark_point(shape="diamond", filled=True, size=150, color=colour, opacity=1)
        .encode(y, tooltip=tips[1:]),
        kind("seed").mark_circle(size=60, color=colour, opacity=0.85).encode(y, tooltip=tips),
    ).properties(width=WIDTH, height=min(420, 60 + 17 * count))
    return finish(  # type: ignore[no-any-return]
        chart,
        ("The effect of each seed", "每个种子的效应"),
        (
            f"{wanted[0]} {limit_text} ({side[0]}). Diamond: median; bar: its 95 % interval.",
            f"{wanted[1]} {limit_text}（{side[1]}）。菱形为中位数，横条为其 95% 区间。",
        ),
        lang,
    )
