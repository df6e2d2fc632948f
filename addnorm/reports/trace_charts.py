"""The charts of one X-ray and of two, in English or Chinese; no torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from addnorm.probe.trace import UNDERFLOW
from addnorm.reports.chart_style import GREY, PALETTE, WIDTH, Lang, data, finish, log_axis, word
from addnorm.reports.trace_view import PANELS, Row, Vital, measured, value_of

HEIGHT = 110  # of a panel, in pixels
EXTENT = 46  # pixels for the labels of an axis, so that the titles stand in one line
STRIPS = 480  # places along the axis that tell their values on hover
POINTS = 120  # connections that are marked one by one


def trace_chart(trace: Row, lang: Lang = "en") -> alt.VConcatChart:
    """Return the vitals by connection, a panel each over one axis; a hover marks it in all panels.

    A value of 0 lies on the lower edge of a logarithmic panel, an infinite one is left out.
    """
    connections, zh = trace["connections"], lang == "zh"
    vitals = measured(connections, PANELS) or [PANELS[0]]
    rows = [
        {"number": i, "name": str(c["name"])} | {v.key: value_of(c, v.key) for v in vitals}
        for i, c in enumerate(connections)
    ]
    tips = [
        alt.Tooltip("number:Q", title=word("number", lang)),
        alt.Tooltip("name:N", title=word("name", lang)),
        *(alt.Tooltip(f"{v.key}:Q", title=v.name(zh), format=".4g") for v in vitals),
    ]
    chart = _panels(rows, rows, vitals, "number", tips, lang)
    return finish(  # type: ignore[no-any-return]
        chart,
        ("Vitals by connection", "各连接的体征"),
        (
            "Connection 0 is nearest to the input. Dashed: an intact identity path.",
            "连接 0 最靠近输入。虚线：完好的恒等通路。",
        ),
        lang,
    )


def traces_chart(difference: Row, lang: Lang = "en") -> alt.VConcatChart:
    """Return the vitals of two traces by place in depth, given as `TraceComparison.to_dict()`."""
    pairs, zh = difference["rows"], lang == "zh"
    both = [pair[side] for pair in pairs for side in "ab"]
    vitals = measured(both, PANELS) or [PANELS[0]]
    rows = [
        {"place": float(pair["place"]), "side": _label(difference, side)}
        | {v.key: value_of(pair[side], v.key) for v in vitals}
        for side in "ab"
        for pair in pairs
    ]
    hover = [
        {
            "place": float(p["place"]),
            "name": " | ".join(dict.fromkeys(str(p[side]["name"]) for side in "ab")),
        }
        | {v.key: " | ".join(f"{value_of(p[side], v.key):.4g}" for side in "ab") for v in vitals}
        for p in pairs
    ]
    tips = [
        alt.Tooltip("place:Q", title=word("place", lang), format=".2f"),
        alt.Tooltip("name:N", title=word("name", lang)),
        *(alt.Tooltip(f"{v.key}:N", title=v.name(zh)) for v in vitals),
    ]
    colour = alt.Color(
        "side:N",
        scale=alt.Scale(
            domain=[_label(difference, side) for side in "ab"], range=[PALETTE[0], PALETTE[1]]
        ),
        legend=alt.Legend(title=None, orient="top", symbolStrokeWidth=3, labelLimit=WIDTH // 2),
    )
    return finish(  # type: ignore[no-any-return]
        _panels(rows, hover, vitals, "place", tips, lang, colour),
        ("Both by place in depth", "两者沿深度的对比"),
        ("0 is the first connection, 1 the last.", "0 为第一个连接，1 为最后一个连接。"),
        lang,
    )


def block_scale(count: int, shift: float = 0.0) -> alt.Scale:
    """Return the axis that all panels over depth share, so that they stand in line.

    `shift` is 0.5 where places lie between connections: after none of them, after the first, ...
    """
    return alt.Scale(domain=[shift - 0.6, shift + count - 0.4], nice=False)


def _label(difference: Row, side: str) -> str:
    return f"{side}: {difference[side]['label']}"


def _panels(
    rows: list[dict[str, Any]],
    hover: list[dict[str, Any]],
    vitals: Sequence[Vital],
    x: str,
    tips: list[alt.Tooltip],
    lang: Lang,
    colour: alt.Color | None = None,
) -> alt.VConcatChart:
    """Return one panel per vital over a shared axis, with a rule through all at the hovered place.

    `hover` has a row for each place, with what the tips tell of it.
    """
    count, title = len(hover), word(x, lang)
    strips = data(hover[:: math.ceil(count / STRIPS)])
    width = max(1.5, min(24.0, WIDTH / min(count, STRIPS)))
    here = alt.selection_point(
        name="here", fields=[x], on="pointerover", clear="pointerout", empty=False
    )
    heights = {v.key: _axis([row[v.key] for row in rows], v, lang == "zh") for v in vitals}
    source = data([row | _placed(row, heights) for row in rows])  # once for all panels
    scale = block_scale(count)
    if x != "number":
        scale = alt.Scale(domain=[0, 1], nice=False, padding=8)
    charts = []
    for index, vital in enumerate(vitals):
        lowest = index + 1 == len(vitals)
        shown: dict[str, Any] = {"title": title if lowest else None, "labels": lowest}
        if x == "number":
            shown |= {"tickMinStep": 1, "format": "d"}
        along = alt.X(f"{x}:Q", scale=scale, axis=alt.Axis(ticks=lowest, grid=False, **shown))
        ink: dict[str, Any] = {} if colour else {"color": PALETTE[index % len(PALETTE)]}
        curve = alt.Chart(source).encode(along, heights[vital.key])
        if colour is not None:
            curve = curve.encode(colour)
        layers: list[Any] = []
        if vital.mark is not None:
            rule = alt.Chart(data([{}])).mark_rule(color=GREY, strokeDash=[4, 4], clip=True)
            layers.append(rule.encode(y=alt.datum(vital.mark, type="quantitative")))
        layers.append(curve.mark_line(strokeWidth=1.8, clip=True, **ink))
        if count <= POINTS:
            layers.append(
                curve.mark_circle(size=36 if count <= 40 else 12, opacity=1, clip=True, **ink)
            )
        strip = alt.Chart(strips).mark_rule(color=GREY, strokeWidth=width)
        seen = alt.when(here).then(alt.value(0.22)).otherwise(alt.value(0))
        layers.append(strip.encode(along, opacity=seen, tooltip=tips).add_params(here))
        charts.append(alt.layer(*layers).properties(width=WIDTH, height=HEIGHT))
    with warnings.catch_warnings():  # one selection for all panels is what is meant
        warnings.filterwarnings("ignore", "Automatically deduplicated selection parameter")
        chart: alt.VConcatChart = alt.vconcat(*charts, spacing=10).resolve_scale(x="shared")
    return chart


def _placed(row: Row, heights: Mapping[str, alt.Y]) -> dict[str, float]:
    """Return where the values of a row are drawn: on the edge where an axis does not reach."""
    placed = {}
    for key, y in heights.items():
        low, high = y["scale"]["domain"]
        value = row[key]
        placed[f"y_{key}"] = min(max(value, low), high) if math.isfinite(value) else math.nan
    return placed


def _axis(values: Sequence[float], vital: Vital, zh: bool) -> alt.Y:
    """Return the axis of a panel: logarithmic where factors matter and any value is positive."""
    known = [max(v, UNDERFLOW) if v > 0 else v for v in values if math.isfinite(v)]
    if vital.log and any(v > 0 for v in known):
        marks = [v for v in known if v > 0] + ([] if vital.mark is None else [vital.mark])
        if min(known) <= 0:
            marks.append(max(min(marks) / 3, UNDERFLOW))
        y = log_axis(marks, vital.name(zh))
        y["axis"]["labelOverlap"] = True
        y["axis"]["minExtent"] = EXTENT
    else:
        low, high = vital.span or (0.0, 1.0)
        low, high = min([low, *known]), max([high, *known])
        pad = 0.06 * (high - low)
        shown = "'~p'" if vital.form.endswith("%") else "'~r'"
        y = alt.Y(
            title=vital.name(zh),
            scale=alt.Scale(domain=[low - pad, high + pad], zero=False, nice=False),
            axis=alt.Axis(
                tickCount=4,
                grid=True,
                labelExpr=f"format(datum.value, {shown})",
                minExtent=EXTENT,
            ),
        )
    y["shorthand"] = f"y_{vital.key}:Q"
    return y
