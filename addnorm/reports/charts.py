"""The charts of a comparison as Altair specifications, in English or Chinese; no torch.

Every wiring has one colour and one marker shape, the same in all charts of a summary. Rows hold no
words of either language, so both versions of a chart share their data.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import altair as alt

from addnorm.probe.trace import UNDERFLOW
from addnorm.reports.chart_style import (
    GREY,
    MARKERS,
    WIDTH,
    Lang,
    Look,
    Row,
    data,
    depth_header,
    finish,
    is_finite,
    log_axis,
    margin_text,
    panels,
    references,
    tooltips,
    word,
)  # fmt: skip
from addnorm.reports.summary import Group, Summary

# -- loss against depth ------------------------------------------------------------------------


def _loss_rows(s: Summary) -> list[Row]:
    """Return a mean per wiring, depth and warm-up at the best rate, and its seeds."""
    rows: list[Row] = []
    for wiring in s.wirings:
        for depth in s.depths:
            for warmup in s.warmups:
                group = s.best(wiring, depth, warmup)
                if group is None:
                    continue
                same = {"wiring": wiring, "depth": depth, "warmup": warmup, "rate": group.lr}
                rows.append(same | {"kind": "mean", "loss": group.loss, "status": group.status})
                for cell, loss in zip(group.cells, group.losses, strict=True):
                    kind = "seed" if math.isfinite(loss) else "diverged"
                    rows.append(same | {"kind": kind, "loss": loss, "seed": cell["seed"]})
    return rows


def _place_diverged(rows: list[Row], s: Summary, low: float, high: float) -> float:
    """Give the diverged seeds places in a band above `high`; return where the band ends."""
    place: dict[int, int] = defaultdict(int)
    nudge, line, top = max(1.06, s.depths[-1] / s.depths[0]) ** 0.016, 0.04 * (high - low), high
    for row in rows:
        if row["kind"] == "diverged":
            k = place[row["depth"]]
            place[row["depth"]] += 1
            row["loss"] = high + line * (1.5 + k // 7)
            row["x"] = row["depth"] * nudge ** ((k % 7 + 1) // 2 * (-1 if k % 2 else 1))
            top = max(top, row["loss"])
        else:
            row["x"] = float(row["depth"])
    return top + line


def loss_by_depth(s: Summary, lang: Lang = "en") -> alt.VConcatChart:
    """Validation loss against depth at the best rate: means as lines, seeds as points.

    Below it the same from closer by, where the wirings that trained lie close to each other.
    """
    look, rows = Look(s.wirings, s.warmups, lang), _loss_rows(s)
    finite = [r["loss"] for r in rows if is_finite(r["loss"])]
    low, high = min([*finite, s.unigram]), max([*finite, s.uniform])
    top, pad = _place_diverged(rows, s, low, high), 0.05 * (high - low)
    layers = _loss_layers(s, rows, look, (low - pad, top), word("loss", lang), lang)
    # The selection belongs to a layer with colours: a legend does not serve one of the rules.
    layers = [
        *references(s.unigram, s.uniform, lang, s.unit),
        layers[0].add_params(look.pick),
        *layers[1:],
    ]
    if top > high + pad:
        layers.append(margin_text(top - 0.8 * pad, word("diverged", lang)))
    charts = [alt.layer(*layers).properties(width=WIDTH, height=400)]
    good = [r["loss"] for r in rows if r.get("status") == "trained"]
    if len(good) > 1 and max(good) - min(good) < 0.4 * (top - low):
        edge = max(0.01, 0.1 * (max(good) - min(good)))
        closer = (min(good) - edge, max(good) + edge)
        layers = _loss_layers(s, rows, look, closer, word("close", lang), lang)
        charts.append(alt.layer(*layers).properties(width=WIDTH, height=300))
    return finish(  # type: ignore[no-any-return]
        alt.vconcat(*charts, spacing=18),
        ("Loss against depth", "损失与深度"),
        (
            "At each wiring's best rate. Large marks: mean of the seeds; small points: each seed.",
            "各接法取其最佳学习率。大标记为各随机种子的均值，小圆点为单个随机种子。",
        ),
        lang,
    )


def _loss_layers(
    s: Summary, rows: list[Row], look: Look, span: tuple[float, float], title: str, lang: Lang
) -> list[Any]:
    """Return lines, seeds, means and diverged marks of the losses between the ends of `span`."""
    side = max(1.1, (s.depths[-1] / s.depths[0]) ** 0.08)
    x = alt.X(
        "x:Q",
        title=word("depth", lang),
        scale=alt.Scale(type="log", domain=[s.depths[0] / side, s.depths[-1] * side], nice=False),
        axis=alt.Axis(values=s.depths, format="d", grid=False, labelOverlap=True),
    )
    y = alt.Y(
        "loss:Q",
        title=title,
        scale=alt.Scale(domain=list(span), zero=False, nice=False),
        axis=alt.Axis(tickCount=8, grid=True),
    )
    tips = tooltips(lang, "wiring:N", "depth:Q", "rate:Q", "warmup:Q")
    loss = alt.Tooltip("loss:Q", title=word("loss", lang), format=".4f")
    seed = tooltips(lang, "seed:N")
    base = alt.Chart(data(rows)).encode(x, y, look.colour)
    mean, point, lost = (
        base.transform_filter(f"datum.kind == '{kind}'") for kind in ("mean", "seed", "diverged")
    )
    return [
        mean.mark_line(strokeWidth=2, clip=True).encode(look.dash, opacity=look.opacity(1)),
        point.mark_circle(size=24, clip=True).encode(
            opacity=look.opacity(0.7), tooltip=[*tips, *seed, loss]
        ),
        mean.mark_point(filled=True, size=80, clip=True).encode(
            look.shape, opacity=look.opacity(1), tooltip=[*tips, loss]
        ),
        lost.mark_text(text="×", fontSize=20, fontWeight="bold", clip=True).encode(
            opacity=look.opacity(1), tooltip=[*tips, *seed]
        ),
    ]


# -- X-rays through depth ----------------------------------------------------------------------


def _profile(cells: Sequence[Row], when: str, value: str) -> list[tuple[str, float | None]]:
    """Return name and median over seeds of a vital of each connection; None where not measured."""
    traces = [c[when]["connections"] for c in cells if c.get(when)]
    found: list[tuple[str, float | None]] = []
    for row in zip(*traces, strict=False):
        values = [c[value] for c in row if is_finite(c[value])]
        found.append((row[0]["name"], statistics.median(values) if values else None))
    return found


def _through_depth(group: Group, when: str, value: str, index: int) -> list[Row]:
    """Return the rows of one line, with a marker at a few of its points."""
    profile = _profile(group.cells, when, value)
    count = len(profile)
    every = max(1, count // MARKERS)
    return [
        {
            "wiring": group.wiring,
            "depth": group.depth,
            "when": when,
            "place": i / max(1, count - 1),
            "number": i,
            "name": name,
            "y": y,
            "mark": (i + index) % every == 0 or count == 1,
        }
        for i, (name, y) in enumerate(profile)
    ]


def _depth_lines(look: Look, rows: list[Row], y: alt.Y, y_title: str, lang: Lang) -> Any:
    """Return lines over the relative depth, to be repeated in panels."""
    x = alt.X(
        "place:Q",
        title=word("place", lang),
        scale=alt.Scale(domain=[0, 1], nice=False, padding=6),
        axis=alt.Axis(format="%", values=[0, 0.25, 0.5, 0.75, 1], grid=False, labelFlush=True),
    )
    tips = tooltips(lang, "wiring:N", "depth:Q", "number:Q", "name:N")
    tips.append(alt.Tooltip("y:Q", title=y_title, format=".3g"))
    base = alt.Chart().encode(x, y, look.colour, opacity=look.opacity(1))
    points = base.transform_filter("datum.mark").mark_point(filled=True, size=60, clip=True)
    return alt.layer(
        base.mark_line(strokeWidth=1.8, clip=True),
        points.encode(look.shape, tooltip=tips),
        data=data(rows),
    )


def gradient_by_depth(s: Summary, lang: Lang = "en") -> alt.FacetChart:
    """Gradient RMS through depth at the start over that at the last connection; a panel a depth."""
    rows: list[Row] = []
    for index, wiring in enumerate(s.wirings):
        for depth in s.depths:
            group = s.best(wiring, depth)
            line = _through_depth(group, "start", "gradient_after", index) if group else []
            last = line[-1]["y"] if line else None
            for row in line:
                known = row["y"] is not None and last
                row["y"] = max(row["y"], UNDERFLOW) / last if known else None
            rows += line
    look = Look(s.wirings, [0], lang)
    title = word("gradient", lang)
    y = log_axis((r["y"] for r in rows), title)
    columns, width = panels(s.depths)
    inner = _depth_lines(look, rows, y, title, lang).properties(width=width, height=300)
    facet = alt.Facet("depth:O", header=depth_header(lang), sort="ascending")
    chart = inner.facet(facet, columns=columns, spacing=34).add_params(look.pick)
    return finish(  # type: ignore[no-any-return]
        chart,
        ("Gradient through depth at the start", "训练开始时梯度沿深度的分布"),
        (
            "0 % is nearest to the input. Level: all layers hear the same. Falling to the left: "
            "the gradient vanishes on its way back.",
            "0% 最靠近输入。水平：各层收到同样大小的梯度。向左下降：梯度在回传途中消失。",
        ),
        lang,
    )


def stream_by_depth(s: Summary, lang: Lang = "en") -> alt.FacetChart:
    """Stream RMS through depth at the start and at the end of training; a row of panels a depth."""
    rows: list[Row] = []
    for index, wiring in enumerate(s.wirings):
        for depth in s.depths:
            group = s.best(wiring, depth)
            for when in ("start", "end") if group else ():
                assert group is not None
                rows += _through_depth(group, when, "stream_after", index)
    look = Look(s.wirings, [0], lang)
    title = word("stream", lang)
    y = log_axis((r["y"] for r in rows), title)
    inner = _depth_lines(look, rows, y, title, lang).properties(width=405, height=220)
    words = ("训练开始时", "训练结束时") if lang == "zh" else ("at the start", "at the end")
    header = alt.Header(
        title=None, labelExpr=f"datum.value == 'start' ? '{words[0]}' : '{words[1]}'"
    )
    chart = inner.facet(
        row=alt.Row("depth:O", header=depth_header(lang), sort="ascending"),
        column=alt.Column("when:N", header=header, sort=["start", "end"]),
    ).add_params(look.pick)
    return finish(  # type: ignore[no-any-return]
        chart,
        ("Stream through depth", "残差流沿深度的变化"),
        (
            "RMS of the stream after each connection, before the first and after the last step.",
            "每个连接之后残差流的 RMS，分别取自第一步之前和最后一步之后。",
        ),
        lang,
    )


# -- losses over steps -------------------------------------------------------------------------


def curves(s: Summary, lang: Lang = "en") -> alt.FacetChart:
    """Validation loss over steps at the best rate: the mean, and a faint line per seed."""
    rows: list[Row] = []
    for depth in s.depths:
        rows.append({"kind": "line", "depth": depth, "step": 0})
        for wiring in s.wirings:
            for warmup in s.warmups:
                group = s.best(wiring, depth, warmup)
                rows += _curve_rows(group) if group else []
    finite = [r["loss"] for r in rows if is_finite(r.get("loss"))]
    low = min([*finite, s.unigram])
    high = max(s.uniform, *(v for v in [s.uniform, *finite] if v < 1.15 * s.uniform))
    pad = 0.04 * (high - low)
    look = Look(s.wirings, s.warmups, lang)
    y = alt.Y(
        "loss:Q",
        title=word("loss", lang),
        scale=alt.Scale(domain=[low - pad, high + pad], zero=False, nice=False),
        axis=alt.Axis(tickCount=6, grid=True),
    )
    x = alt.X(
        "step:Q",
        title=word("step", lang),
        scale=alt.Scale(domain=[0, max(1, *(r["step"] for r in rows))], nice=False, padding=6),
        axis=alt.Axis(tickCount=5, grid=False),
    )
    base = alt.Chart().encode(x, y)
    line = alt.Chart().transform_filter("datum.kind == 'line'")
    lines = [
        line.mark_rule(color=GREY, strokeDash=[3, 3]).encode(y=alt.datum(v, type="quantitative"))
        for v in (s.unigram, s.uniform)
    ]
    tips = tooltips(lang, "wiring:N", "warmup:Q", "step:Q")
    tips.append(alt.Tooltip("loss:Q", title=word("loss", lang), format=".4f"))
    mean = base.transform_filter("datum.kind == 'mean'").encode(look.colour, tooltip=tips)
    seed = base.transform_filter("datum.kind == 'seed'").encode(look.colour, look.dash)
    columns, width = panels(s.depths)
    chart = alt.layer(
        *lines,
        mean.mark_line(strokeWidth=2.2, clip=True)
        .encode(look.dash, opacity=look.opacity(1))
        .add_params(look.pick),
        seed.mark_line(strokeWidth=1, clip=True).encode(detail="seed:N", opacity=look.opacity(0.3)),
        mean.transform_filter("datum.mark")
        .mark_point(filled=True, size=55, clip=True)
        .encode(look.shape, opacity=look.opacity(1)),
        data=data(rows),
    ).properties(width=width, height=300)
    facet = alt.Facet("depth:O", header=depth_header(lang), sort="ascending")
    short = s.words["short"][lang == "zh"]
    under = {
        "uniform": f"{word('uniform', lang)} {s.uniform:.3f}",
        "unigram": f"{short} {s.unigram:.3f}",
    }
    return finish(  # type: ignore[no-any-return]
        chart.facet(facet, columns=columns, spacing=34),
        ("Validation loss over steps", "验证损失随步数的变化"),
        (
            f"At each wiring's best rate; faint: each seed. Dotted lines: {under['uniform']} "
            f"(top) and {under['unigram']}.",
            f"各接法取其最佳学习率；浅色线为单个随机种子。点线：{under['uniform']}（上）与"
            f"{under['unigram']}（下）。",
        ),
        lang,
    )


def _curve_rows(group: Group) -> list[Row]:
    same = {"wiring": group.wiring, "depth": group.depth, "warmup": group.warmup}
    by_step: dict[int, list[float]] = defaultdict(list)
    rows: list[Row] = []
    for cell in group.cells:
        for step, loss, *_ in cell["curve"]:
            if len(group.cells) > 1:
                rows.append(
                    same | {"kind": "seed", "seed": cell["seed"], "step": step, "loss": loss}
                )
            by_step[step].append(loss if is_finite(loss) else math.nan)
    means = [(k, statistics.fmean(v)) for k, v in by_step.items() if len(v) == len(group.cells)]
    for i, (step, loss) in enumerate(sorted(means)):
        mark = i % max(1, len(means) // 5) == 0
        rows.append(same | {"kind": "mean", "step": step, "loss": loss, "mark": mark})
    return rows
