"""The charts of the deeper looks of a trace, in English or Chinese; no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import altair as alt

from addnorm.reports.chart_style import GREY, PALETTE, WIDTH, Lang, data, finish, word
from addnorm.reports.trace_charts import EXTENT, block_scale
from addnorm.reports.trace_deep import Look, number, numbers

Draw = Callable[[Look, Lang], Any]
SHADES: Literal["viridis"] = "viridis"  # one hue order for what has no middle
BALANCE: Literal["blueorange"] = "blueorange"  # two for what has: 0


def _word(lang: Lang, en: str, zh: str) -> str:
    return zh if lang == "zh" else en


def lesion_chart(look: Look, lang: Lang) -> Any:
    """Change of the loss without each branch as bars; the first-order estimate as ticks."""
    singles, estimates = numbers(look["singles"]), numbers(look["first_order"])
    measured = _word(lang, "measured", "实测")
    estimated = _word(lang, "first-order estimate", "一阶估计")
    rows = [
        {"number": i, "name": str(look["names"][i]), "kind": kind, "delta": values[i]}
        for kind, values in ((measured, singles), (estimated, estimates))
        for i in range(len(values))
    ]
    count = len(look["names"])
    step = WIDTH / max(count, 1)
    x = alt.X(
        "number:Q",
        title=word("number", lang),
        scale=block_scale(count),
        axis=alt.Axis(format="d", tickMinStep=1, grid=False),
    )
    title = _word(lang, "change of the loss", "损失变化")
    colour = alt.Color(
        "kind:N",
        scale=alt.Scale(domain=[measured, estimated], range=[PALETTE[0], PALETTE[1]]),
        legend=alt.Legend(title=None, orient="top", symbolType="square", symbolOpacity=1),
    )
    tips = [
        alt.Tooltip("number:Q", title=word("number", lang)),
        alt.Tooltip("name:N", title=word("name", lang)),
        alt.Tooltip("delta:Q", title=title, format="+.4g"),
    ]
    base = alt.Chart(data(rows)).encode(
        x,
        alt.Y("delta:Q", title=title, axis=alt.Axis(tickCount=6, minExtent=EXTENT)),
        colour,
        tooltip=tips,
    )
    of_kind = base.transform_filter
    bars = of_kind(alt.datum.kind == measured).mark_bar(size=max(1, min(28, 0.7 * step)))
    ticks = of_kind(alt.datum.kind == estimated).mark_tick(
        orient="horizontal", size=max(2, min(34, 0.85 * step)), thickness=3
    )
    return finish(
        (bars + ticks).properties(width=WIDTH, height=260),
        ("Lesions", "去除分支"),
        ("Loss without the branch of a connection, minus the loss of the whole network.",
         "去除某个连接的分支后的损失减去完整网络的损失。"),
        lang,
    )  # fmt: skip


def pairs_chart(look: Look, lang: Lang) -> Any:
    """Interaction of two lesions: beyond the sum of the two alone; the singles on the diagonal."""
    singles = numbers(look["singles"])
    rows: list[dict[str, Any]] = []
    for i, row in enumerate(look["pairs"]):
        for j, both in enumerate(numbers(row)):
            if not math.isnan(both):
                value = both if i == j else both - singles[i] - singles[j]
                names = {"first": str(look["names"][i]), "second": str(look["names"][j])}
                rows.append({"a": i, "b": j, "value": value, "both": both} | names)
    count = len(look["pairs"])
    top = max((abs(r["value"]) for r in rows if math.isfinite(r["value"])), default=0.0) or 1.0
    side = max(200, min(520, 26 * count))
    ticks = list(range(0, count, max(1, math.ceil(count / 24))))
    axis = alt.Axis(values=ticks, labelAngle=0)
    removed = _word(lang, "removed connection", "去除的连接")
    chart = (
        alt.Chart(data(rows))
        .mark_rect()
        .encode(
            alt.X("a:O", title=removed, axis=axis),
            alt.Y("b:O", title=removed, axis=axis),
            alt.Color(
                "value:Q",
                title=_word(lang, "interaction", "交互"),
                scale=alt.Scale(scheme=BALANCE, domain=[-top, top]),
                legend=alt.Legend(format=".2~g", gradientLength=min(side, 240)),
            ),
            tooltip=[
                alt.Tooltip("first:N", title=word("name", lang)),
                alt.Tooltip("second:N", title=word("name", lang)),
                alt.Tooltip("both:Q", title=_word(lang, "change of the loss", "损失变化"),
                            format="+.4g"),
                alt.Tooltip("value:Q", title=_word(lang, "interaction", "交互"), format="+.4g"),
            ],
        )
        .properties(width=side, height=side)
    )  # fmt: skip
    return finish(
        chart,
        ("Pairs of lesions", "成对去除"),
        ("Beyond the sum of both alone: 0 where they add up. On the diagonal one alone.",
         "超出两者单独变化之和的部分：可加时为 0。对角线为单独去除。"),
        lang,
    )  # fmt: skip


def paths_chart(look: Look, lang: Lang) -> Any:
    """Share of the gradient's energy by path length, in both readings, and the signed share."""
    coherent = [x * x for x in numbers(look["norm"])]
    incoherent = numbers(look["incoherent"])
    errors = numbers(look["incoherent_error"])
    names = [
        _word(lang, "coherent: of the summed gradient", "相干：先求和再取能量"),
        _word(lang, "incoherent: of the single paths", "非相干：逐条路径的能量之和"),
    ]
    rows = []
    for name, energy, spread in ((names[0], coherent, []), (names[1], incoherent, errors)):
        total = sum(energy)
        for k, value in enumerate(energy):
            error = spread[k] / total if spread and total > 0 else 0.0
            share = value / total if total > 0 else math.nan
            ends = {"low": max(0.0, share - 2 * error), "high": share + 2 * error}
            rows.append({"length": k, "kind": name, "share": share, "error": error} | ends)
    last = max(1, len(coherent) - 1)
    length = _word(lang, "path length (branches gone through)", "路径长度（经过的分支数）")
    x = alt.X(
        "length:Q",
        title=length,
        scale=alt.Scale(domain=[-0.6, last + 0.6], nice=False),
        axis=alt.Axis(format="d", tickMinStep=1, grid=False),
    )
    title = _word(lang, "share of the energy", "能量占比")
    colour = alt.Color(
        "kind:N",
        scale=alt.Scale(domain=names[: 1 + bool(incoherent)], range=[PALETTE[0], PALETTE[1]]),
        legend=alt.Legend(title=None, orient="top", labelLimit=0, symbolOpacity=1),
    )
    tips = [
        alt.Tooltip("length:Q", title=length),
        alt.Tooltip("share:Q", title=title, format=".3%"),
        alt.Tooltip("error:Q", title=_word(lang, "standard error", "标准误"), format=".3%"),
    ]
    base = alt.Chart(data(rows)).encode(x, colour)
    y = alt.Y("share:Q", title=title, axis=alt.Axis(format="~p", tickCount=6))
    layers = [
        base.mark_rule(strokeWidth=2, opacity=0.5).encode(alt.Y("low:Q", title=title), y2="high:Q"),
        base.mark_line(strokeWidth=2.5).encode(y, alt.StrokeDash("kind:N", legend=None)),
        base.mark_circle(size=50, opacity=1).encode(y, tooltip=tips),
    ]
    signed = [{"length": k, "signed": v} for k, v in enumerate(numbers(look["share"]))]
    sign = _word(lang, "signed share", "带符号占比")
    bars = (
        alt.Chart(data(signed))
        .mark_bar(size=max(1, min(24, 0.6 * WIDTH / (last + 1))), color=PALETTE[2])
        .encode(
            x,
            alt.Y("signed:Q", title=sign, axis=alt.Axis(format="~p", tickCount=5)),
            tooltip=[tips[0], alt.Tooltip("signed:Q", title=sign, format=".3%")],
        )
    )
    panels = [
        alt.layer(*layers).properties(width=WIDTH, height=230),
        bars.properties(width=WIDTH, height=140),
    ]
    return finish(
        alt.vconcat(*panels, spacing=16),
        ("Path spectrum of the gradient", "梯度的路径谱"),
        ("Signed share: what a length adds to the gradient; all together 100 %. "
         "Bars on points: two standard errors.",
         "带符号占比：该长度对梯度的贡献，总和为 100%。点上的竖线：两倍标准误。"),
        lang,
    )  # fmt: skip


def landscape_chart(look: Look, lang: Lang) -> Any:
    """The loss along one direction as a curve, or over two as a map."""
    x, y = numbers(look["x"]), numbers(look["y"])
    losses = [numbers(row) for row in look["losses"]]
    error = number(look["error"])
    says = (
        f"Error at held-out points: {error:.2%} of the range. + is the network as it is."
        if math.isfinite(error)
        else "The error was not measured. + is the network as it is."
    )
    says_zh = (
        f"留出点误差：范围的 {error:.2%}。+ 为网络当前位置。"
        if math.isfinite(error)
        else "未测误差。+ 为网络当前位置。"
    )
    title, under = ("Loss landscape", "损失曲面"), (says, says_zh)
    if len(y) == 1:
        return finish(_curve(look, x, losses[0], lang), title, under, lang)
    return finish(_map(look, x, y, losses, lang), title, under, lang)


def _curve(look: Look, x: list[float], losses: list[float], lang: Lang) -> Any:
    rows = [{"x": a, "loss": b} for a, b in zip(x, losses, strict=True)]
    loss = _word(lang, "loss", "损失")
    tips = [alt.Tooltip("x:Q", format=".3g"), alt.Tooltip("loss:Q", title=loss, format=".4g")]
    along = alt.X(
        "x:Q",
        title=_word(lang, "along the direction", "沿方向的位移"),
        scale=alt.Scale(domain=[x[0], x[-1]], nice=False),
        axis=alt.Axis(grid=False),
    )
    high = alt.Y("loss:Q", title=loss, scale=alt.Scale(zero=False))
    base = alt.Chart(data(rows)).encode(along, high, tooltip=tips)
    layers = [base.mark_line(color=PALETTE[0]), base.mark_circle(color=PALETTE[0], size=30)]
    if x[0] <= 0 <= x[-1]:
        here = [{"x": 0.0, "loss": number(look["center"])}]
        cross = alt.Chart(data(here)).mark_text(text="+", fontSize=26, color=PALETTE[1])
        layers.append(cross.encode(along, high))
    return alt.layer(*layers).properties(width=WIDTH, height=300)


def _map(look: Look, x: list[float], y: list[float], losses: list[list[float]], lang: Lang) -> Any:
    """Return coloured cells, darker for lower; the scale is compressed where a few cells tower."""
    side = 460
    half_x, half_y = ((v[-1] - v[0]) / (len(v) - 1) / 2 for v in (x, y))
    # Cells overlap by a pixel on each side, or fine lines show between them.
    over_x, over_y = (half * (1 + 2 * len(v) / side) for half, v in ((half_x, x), (half_y, y)))
    rows = [
        {
            "x": a,
            "y": b,
            "x0": a - over_x,
            "x1": a + over_x,
            "y0": b - over_y,
            "y1": b + over_y,
            "loss": losses[i][j],
        }
        for i, b in enumerate(y)
        for j, a in enumerate(x)
    ]
    known = sorted(r["loss"] for r in rows if math.isfinite(r["loss"])) or [0.0]
    skewed = known[-1] - known[0] > 20 * (known[len(known) // 2] - known[0]) > 0
    loss = _word(lang, "loss", "损失")

    def axis(values: list[float], half: float, which: int) -> dict[str, Any]:
        shown = _word(lang, f"direction {which}", f"方向 {which}")
        explained = numbers(look.get("explained") or [])
        if len(explained) >= which:
            shown += f" ({explained[which - 1]:.0%})"
        scale = alt.Scale(domain=[values[0] - half, values[-1] + half], nice=False, zero=False)
        return {"title": shown, "scale": scale, "axis": alt.Axis(grid=False, tickCount=7)}

    along, up = axis(x, half_x, 1), axis(y, half_y, 2)
    cells = (
        alt.Chart(data(rows))
        .mark_rect(opacity=1, clip=True)
        .encode(
            alt.X("x0:Q", **along),
            alt.Y("y0:Q", **up),
            x2="x1:Q",
            y2="y1:Q",
            color=alt.Color(
                "loss:Q",
                title=loss,
                scale=alt.Scale(
                    scheme=SHADES,
                    type="symlog" if skewed else "linear",
                    domain=[known[0], known[-1]],
                    nice=False,
                ),
                legend=alt.Legend(gradientLength=260, format=".3~g"),
            ),
            tooltip=[
                alt.Tooltip("x:Q", format=".3g"),
                alt.Tooltip("y:Q", format=".3g"),
                alt.Tooltip("loss:Q", title=loss, format=".4g"),
            ],
        )
    )  # fmt: skip
    layers: list[Any] = [cells]
    path = [numbers(point) for point in look.get("path") or []]
    if path:
        told = numbers(look["path_losses"])
        walked = [
            {"x": p[0], "y": p[1], "order": i, "loss": told[i] if i < len(told) else math.nan}
            for i, p in enumerate(path)
        ]
        base = alt.Chart(data(walked)).encode(alt.X("x:Q", **along), alt.Y("y:Q", **up))
        layers.append(base.mark_line(color="white", strokeWidth=2).encode(order="order:Q"))
        tips = [alt.Tooltip("order:Q"), alt.Tooltip("loss:Q", title=loss, format=".4g")]
        layers.append(base.mark_circle(color=PALETTE[1], size=60, opacity=1).encode(tooltip=tips))
    else:
        cross = alt.Chart(data([{"x": 0.0, "y": 0.0}]))
        layers.append(
            cross.mark_text(text="+", fontSize=26, color="white").encode(
                alt.X("x:Q", **along), alt.Y("y:Q", **up)
            )
        )
    return alt.layer(*layers).properties(width=side, height=side)


def lens_chart(look: Look, lang: Lang) -> Any:
    """What the model answers by depth: the loss, agreement with the whole model, divergence."""
    columns = {
        "loss": _word(lang, "loss", "损失"),
        "agreement": _word(lang, "same answer", "相同回答"),
        "divergence": _word(lang, "divergence (nats)", "KL 散度（nat）"),
    }
    values = {key: numbers(look[key]) for key in columns}
    shown = [key for key in columns if any(map(math.isfinite, values[key]))]
    depths, names = look["depths"], [str(name) or "–" for name in look["names"]]
    rows = [
        {"depth": depth, "name": names[i]} | {key: values[key][i] for key in shown}
        for i, depth in enumerate(depths)
    ]
    title = _word(lang, "connections that still add", "仍起作用的连接数")
    after = _word(lang, "last of them", "其中最后一个")
    tips = [alt.Tooltip("depth:Q", title=title), alt.Tooltip("name:N", title=after)]
    tips += [alt.Tooltip(f"{key}:Q", title=columns[key], format=".3g") for key in shown]
    panels = []
    for index, key in enumerate(shown):
        lowest = index + 1 == len(shown)
        x = alt.X(
            "depth:Q",
            title=title if lowest else None,
            scale=block_scale(depths[-1], 0.5),
            axis=alt.Axis(format="d", tickMinStep=1, grid=False, ticks=lowest, labels=lowest),
        )
        share = key == "agreement"
        y = alt.Y(
            f"{key}:Q",
            title=columns[key],
            scale=alt.Scale(domain=[0, 1]) if share else alt.Scale(zero=False),
            axis=alt.Axis(format="~p" if share else "~g", tickCount=5, minExtent=EXTENT),
        )
        base = alt.Chart(data(rows)).encode(x, y, tooltip=tips)
        ink = PALETTE[index]
        marks = base.mark_line(color=ink, strokeWidth=2) + base.mark_circle(color=ink, size=40)
        panels.append(marks.properties(width=WIDTH, height=150))
    return finish(
        alt.vconcat(*panels, spacing=12),
        ("Logit lens", "logit 透镜"),
        ("The model's own norm and head after that many connections. A biased estimate.",
         "经过相应数目的连接后，用模型自己的归一化和输出头读出。有偏估计。"),
        lang,
    )  # fmt: skip


def whiteness_chart(look: Look, lang: Lang) -> Any:
    """Autocorrelation of the input gradient by lag, between white and brown noise."""
    names = {
        "here": _word(lang, "input gradient", "输入梯度"),
        "brown": _word(lang, "brown noise (random walk)", "棕噪声（随机游走）"),
    }
    curve, error = numbers(look["autocorrelation"]), numbers(look["error"])
    low, high = numbers(look["white_low"]), numbers(look["white_high"])
    rows = [
        {"lag": k, "kind": names["here"], "value": v,
         "low": v - 2 * error[k] if math.isfinite(error[k]) else v,
         "high": v + 2 * error[k] if math.isfinite(error[k]) else v}
        for k, v in enumerate(curve)
    ]  # fmt: skip
    rows += [{"lag": k, "kind": names["brown"], "value": v, "low": v, "high": v}
             for k, v in enumerate(numbers(look["brown"]))]  # fmt: skip
    band = [{"lag": k, "low": a, "high": b} for k, (a, b) in enumerate(zip(low, high, strict=True))]
    lag = _word(lang, "lag (points along the line)", "滞后（沿直线的点数）")
    title = _word(lang, "autocorrelation", "自相关")
    x = alt.X(
        "lag:Q",
        title=lag,
        scale=alt.Scale(domain=[0, max(1, len(curve) - 1)], nice=False, padding=8),
        axis=alt.Axis(format="d", tickMinStep=1, grid=False),
    )
    y = alt.Y("value:Q", title=title, axis=alt.Axis(tickCount=6))
    colour = alt.Color(
        "kind:N",
        scale=alt.Scale(domain=list(names.values()), range=[PALETTE[0], PALETTE[1]]),
        legend=alt.Legend(title=None, orient="top", labelLimit=0, symbolOpacity=1),
    )
    base = alt.Chart(data(rows)).encode(x, colour)
    tips = [alt.Tooltip("lag:Q", title=lag), alt.Tooltip("value:Q", title=title, format=".3f")]
    shade = alt.Chart(data(band)).mark_area(color=GREY, opacity=0.25)
    layers = [
        shade.encode(x, alt.Y("low:Q", title=title), y2="high:Q"),
        base.mark_rule(strokeWidth=2, opacity=0.5).encode(alt.Y("low:Q", title=title), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y),
        base.mark_circle(size=45, opacity=1).encode(y, tooltip=tips),
    ]
    return finish(
        alt.layer(*layers).properties(width=WIDTH, height=270),
        ("Whiteness of the input gradient", "输入梯度的白度"),
        ("Grey: where white noise lies in 95 of 100 cases. Bars on points: two standard errors.",
         "灰色：白噪声有 95% 落入的范围。点上的竖线：两倍标准误。"),
        lang,
    )  # fmt: skip


def deep_charts(deep: Mapping[str, Any]) -> dict[str, Callable[[Lang], Any]]:
    """Return what draws each chart that the deeper looks of a trace have data for, by name."""
    drawn: dict[str, Callable[[Lang], Any]] = {}

    def add(name: str, draw: Draw, look: Look) -> None:
        drawn[name] = lambda lang: draw(look, lang)

    if (look := deep.get("lesion")) and (look["singles"] or look["first_order"]):
        add("lesion", lesion_chart, look)
    if (look := deep.get("lesion")) and look["pairs"]:
        add("pairs", pairs_chart, look)
    if look := deep.get("paths"):
        add("paths", paths_chart, look)
    if look := deep.get("landscape"):
        add("landscape", landscape_chart, look)
    if look := deep.get("lens"):
        add("lens", lens_chart, look)
    if look := deep.get("whiteness"):
        add("whiteness", whiteness_chart, look)
    return drawn
