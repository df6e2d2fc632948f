"""The chart of a study's effects against their limit, in English or Chinese; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from addnorm.reports.chart_style import (
    GREY,
    PALETTE,
    WIDTH,
    Lang,
    Row,
    data,
    finish,
    is_finite,
    word,
)
from addnorm.reports.study_picture import kinds_of
from addnorm.reports.study_words import demand, text_in

_BRACKETS = {"en": " ({})", "zh": "（{}）"}


def effects_chart(result: Mapping[str, Any], lang: Lang = "en") -> Any:
    """Draw the effect of every seed of the primary contrast against its limit, with the interval.

    The ground is coloured on the side of the limit on which the statement holds.
    """
    (main,) = [c for c in result["contrasts"] if c["name"] == "primary"]
    seeds, ends = result["seeds"], _ends(main)
    unit = text_in(main["unit"], lang)
    name = word("effect", lang) + (_BRACKETS[lang].format(unit) if unit else "")
    base = alt.Chart(data(_rows(main, seeds, ends))).encode(_across(name, ends))
    kind, y, colour = kinds_of(base), _down(seeds, lang), PALETTE[0]
    tips = [
        alt.Tooltip("seed:N", title=word("seed", lang)),
        alt.Tooltip("x:Q", title=name, format=".4~g"),
    ]
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
    ).properties(width=WIDTH, height=min(420, 60 + 17 * len(seeds)))
    wanted = demand(main, lang)
    return finish(
        chart,
        ("The effect of each seed", "每个种子的效应"),
        (
            f"The statement asks for {wanted} (shaded: where the statement holds). "
            "Diamond: median; bar: its 95 % interval.",
            f"命题要求 {wanted}（底色：命题成立的一侧）。菱形为中位数，横条为其 95% 区间。",
        ),
        lang,
    )


def _ends(main: Mapping[str, Any]) -> list[float]:
    """Return where the axis begins and ends: with every effect and limit inside."""
    limit, found = main["limit"], [v for v in main["effects"] if is_finite(v)]
    low, high = min([*found, limit]), max([*found, limit])
    if main["rule"] in ("within", "exact"):
        low, high = min(low, -limit), max(high, limit)
    pad = 0.08 * (high - low) or 0.5 * abs(high) or 1.0
    return [low - pad, high + pad]


def _rows(main: Mapping[str, Any], seeds: Sequence[int], ends: Sequence[float]) -> list[Row]:
    """Return what is drawn: every seed, the ground, the limits, the median and its interval."""
    limit, rule, count = main["limit"], main["rule"], len(seeds)
    holds = {"above": (limit, ends[1]), "below": (ends[0], limit)}.get(rule, (-limit, limit))
    rows: list[Row] = [
        {"kind": "seed", "x": effect, "at": i, "seed": seed}
        for i, (seed, effect) in enumerate(zip(seeds, main["effects"], strict=True))
        if is_finite(effect)
    ]
    rows.append({"kind": "holds", "x": holds[0], "to": holds[1]})
    limits = [-limit, limit] if rule in ("within", "exact") and limit else [limit]
    rows += [{"kind": "limit", "x": at} for at in limits]
    if is_finite(main["effect"]):
        start, stop = main["interval"]
        rows.append({"kind": "interval", "x": start, "to": stop, "at": count + 0.4})
        rows.append({"kind": "median", "x": main["effect"], "at": count + 0.4})
    return rows


def _across(name: str, ends: Sequence[float]) -> alt.X:
    scale = alt.Scale(domain=list(ends), nice=False, zero=False)
    return alt.X("x:Q", title=name, scale=scale, axis=alt.Axis(tickCount=8, grid=False))


def _down(seeds: Sequence[int], lang: Lang) -> alt.Y:
    """Return the axis of the seeds, with room below for their median."""
    places = "".join(f"datum.value == {i} ? '{seed}' : " for i, seed in enumerate(seeds))
    return alt.Y(
        "at:Q",
        title=word("seed", lang),
        scale=alt.Scale(domain=[len(seeds) + 1.1, -0.8], nice=False, zero=False),
        axis=alt.Axis(
            values=list(range(len(seeds))),
            labelExpr=places + "''",
            grid=False,
            ticks=False,
            domain=False,
            labelOverlap=True,
        ),
    )
