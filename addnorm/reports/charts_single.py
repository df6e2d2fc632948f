"""The chart of one training run, in English or Chinese; no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import altair as alt

from addnorm.reports.chart_style import (
    PALETTE,
    WIDTH,
    Lang,
    Row,
    data,
    finish,
    is_finite,
    references,
    word,
)  # fmt: skip


def run_chart(
    metrics: Sequence[Row],
    unigram: float,
    uniform: float,
    lang: Lang = "en",
    unit: str = "tokens",
    points: int = 400,
) -> alt.LayerChart:
    """Training and validation loss of one run; a long run's training loss as means of stretches."""
    train = [(r["step"], r["loss"]) for r in metrics if is_finite(r.get("loss"))]
    size = max(1, math.ceil(len(train) / points))
    parts = [train[i : i + size] for i in range(0, len(train), size)]
    rows: list[Row] = [
        {"kind": "training", "step": p[-1][0], "loss": statistics.fmean(v for _, v in p)}
        for p in parts
    ]
    for row in metrics:
        if is_finite(row.get("validation")):
            rows.append({"kind": "validation", "step": row["step"], "loss": row["validation"]})
    losses, last = [r["loss"] for r in rows], max([1, *(r["step"] for r in rows)])
    low, high = min([*losses, unigram]), max([uniform, *(v for v in losses if v < 1.3 * uniform)])
    pad = 0.04 * (high - low)
    label = f"datum.label == 'training' ? '{word('training', lang)}' : '{word('validation', lang)}'"
    colour = alt.Color(
        "kind:N",
        scale=alt.Scale(domain=["training", "validation"], range=[PALETTE[4], PALETTE[1]]),
        legend=alt.Legend(title=None, orient="bottom", labelExpr=label, symbolStrokeWidth=3),
    )
    tips = [
        alt.Tooltip("step:Q", title=word("step", lang)),
        alt.Tooltip("loss:Q", title=word("any loss", lang), format=".4f"),
    ]
    base = alt.Chart(data(rows)).encode(
        alt.X(
            "step:Q",
            title=word("step", lang),
            scale=alt.Scale(domain=[0, last], nice=False, padding=8),
            axis=alt.Axis(grid=False, tickCount=10),
        ),
        alt.Y(
            "loss:Q",
            title=word("any loss", lang),
            scale=alt.Scale(domain=[low - pad, high + pad], zero=False, nice=False),
            axis=alt.Axis(tickCount=8, grid=True),
        ),
        colour,
        tooltip=tips,
    )
    validation = base.transform_filter("datum.kind == 'validation'")
    chart = alt.layer(
        *references(unigram, uniform, lang, unit),
        base.transform_filter("datum.kind == 'training'").mark_line(strokeWidth=1.3, clip=True),
        validation.mark_line(strokeWidth=2.5, clip=True),
        validation.mark_circle(size=60, opacity=1, clip=True),
    ).properties(width=WIDTH, height=400)
    mean = f", means of {size} steps" if size > 1 else ""
    mean_zh = f"，每 {size} 步取均值" if size > 1 else ""
    return finish(  # type: ignore[no-any-return]
        chart,
        ("Loss over steps", "损失随步数的变化"),
        (f"Training loss (one batch a step{mean}) and validation loss.",
         f"训练损失（每步一个批次{mean_zh}）与验证损失。"),
        lang,
    )  # fmt: skip
