"""What all plots of a study share: which rows they show, series, panels, axes, marks; no torch."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import altair as alt

from addnorm.reports.chart_style import (
    GREY,
    SHORT_LABEL,
    Lang,
    Row,
    is_finite,
    legend_columns,
    log_ticks,
    looks,
    word,
)  # fmt: skip
from addnorm.reports.study_words import factor_in, level_text, text_in

LABEL = (  # of a linear axis: 600, 0.05, 1.2M
    "abs(datum.value) < 100000 ? format(datum.value, '~g') : format(datum.value, '~s')"
)
CROSS = "M-1,-1L1,1M1,-1L-1,1"  # the mark of a failed training
PANELS = 12  # beyond these, factors that a plot does not name are not told apart


def shown_rows(result: Mapping[str, Any], plot: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a plot: those of complete seeds, where there is one, and its levels."""
    seeds, only = result["seeds"], plot["only"]
    rows = [row for row in result["rows"] if not seeds or row["seed"] in seeds]
    return [row for row in rows if all(row.get(k) == v for k, v in only.items())]


@dataclass
class Picture:
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
        self.series = self.levels(plot["color"]) if plot["color"] else [""]
        apart = [plot["facet"]] if plot["facet"] else []
        self.split = apart + self._left_over(apart)
        self.panels = list(dict.fromkeys(map(self.panel_of, self.rows)))
        values = [v for row in self.rows for v in values_of(row[plot["y"]])]
        if plot["reference"] is not None:
            values.append(plot["reference"])
        self._scale(values)

    def levels(self, name: str) -> list[str]:
        """Return the levels of a factor that the rows have, in the factor's order, as text."""
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
        return ", ".join(named(name, row[name]) for name in self.split)

    def series_of(self, row: Row) -> str:
        """Return the name of the series that a row belongs to."""
        return level_text(row[self.plot["color"]]) if self.plot["color"] else ""

    def _scale(self, values: list[float]) -> None:
        """Set the ends of the y axis and its ticks, with room for failures that have no value."""
        nothing = any(not values_of(row[self.plot["y"]]) for row in self.rows)
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
        if not found:
            return None
        value = float(statistics.median(found))
        return max(value, self.ends[0]) if self.plot["log_y"] else value


def values_of(value: Any) -> list[float]:
    """Return the finite numbers of a metric, which is a number or a list."""
    return [v for v in (value if isinstance(value, list) else [value]) if is_finite(v)]


def named(name: str, level: Any) -> str:
    """Write a level; a number with the name of its factor."""
    is_word = isinstance(level, str)
    return level_text(level) if is_word else f"{name} = {level_text(level)}"


def axis_title(result: Mapping[str, Any], name: str, lang: Lang) -> str:
    """Return the title of an axis: that of the metric with its unit, or the factor's name."""
    metric = result["metrics"].get(name)
    if metric is None:
        return factor_in(name, lang)
    unit = text_in(metric["unit"], lang)
    brackets = "（{}）" if lang == "zh" else " ({})"
    return text_in(metric["title"], lang) + (brackets.format(unit) if unit else "")


def wrapped(title: str, room: float) -> list[str]:
    """Return the lines of an axis title that has so many pixels."""
    wide = sum(14 if c > "\u2e80" else 7 for c in title)
    count = math.ceil(wide / room)
    if count < 2:
        return [title]
    if " " in title:
        return textwrap.wrap(title, math.ceil(len(title) / count) + 3)
    size = math.ceil(len(title) / count)
    return [title[i : i + size] for i in range(0, len(title), size)]


def scaled(ends: Sequence[float], ticks: Sequence[float], log: bool) -> dict[str, Any]:
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


class PlotLook:
    """Colour and shape by series, with a legend where there is more than one."""

    def __init__(self, picture: Picture, lang: Lang) -> None:
        names = picture.series
        colours, shapes = looks(len(names))
        numbers = all(not isinstance(row.get(picture.plot["color"]), str) for row in picture.rows)
        legend = alt.Legend(
            title=factor_in(picture.plot["color"], lang) if numbers else None,
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


def plot_tips(picture: Picture, lang: Lang, *more: alt.Tooltip) -> list[alt.Tooltip]:
    """Return what the marks say under the pointer; the value comes last."""
    color = picture.plot["color"]
    tips = [alt.Tooltip("s:N", title=factor_in(color, lang))] if color else []
    y = alt.Tooltip(
        "value:Q", title=axis_title(picture.result, picture.plot["y"], lang), format=".4~g"
    )
    return [*tips, *more, alt.Tooltip("seed:N", title=word("seed", lang)), y]


def reference_line(picture: Picture, channel: Literal["x", "y"] = "y") -> list[alt.Chart]:
    """Return the line of reference of each panel."""
    value = picture.plot["reference"]
    if value is None:
        return []
    line = alt.Chart().transform_filter("datum.kind == 'line'")
    rule = line.mark_rule(color=GREY, strokeDash=[3, 3])
    return [rule.encode(**{channel: alt.datum(value, type="quantitative")})]


def kinds_of(base: alt.Chart) -> Callable[[str], alt.Chart]:
    """Return what gives the chart with the rows of one kind alone."""
    return lambda kind: base.transform_filter(f"datum.kind == '{kind}'")


def seed_marks(
    kind: Callable[[str], alt.Chart], look: PlotLook, tips: list[alt.Tooltip]
) -> list[Any]:
    """Return the layers of seeds: their values, failed ones, and zeros on a log axis."""
    return [
        kind("seed").mark_circle(size=28).encode(opacity=look.opacity(0.55), tooltip=tips),
        kind("low")
        .mark_point(shape="triangle-down", size=40)
        .encode(opacity=look.opacity(0.8), tooltip=tips),
        kind("failed")
        .mark_point(shape=CROSS, size=60, strokeWidth=2.2)
        .encode(opacity=look.opacity(0.9), tooltip=tips),
    ]


def line_rows(picture: Picture) -> list[Row]:
    """Return a row per panel for its line of reference."""
    return [{"kind": "line", "p": panel} for panel in picture.panels]


def centre_of(picture: Picture, series: str) -> float:
    """Return where the points of a series stand beside those of the others, from -1 to 1."""
    count = len(picture.series)
    return (2 * picture.series.index(series) + 1) / count - 1
