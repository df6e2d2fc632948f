"""What all charts share: words in two languages, colours, shapes, dashes, axes; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import altair as alt

from addnorm.reports.summary import UNITS

Lang = Literal["en", "zh"]
Row = dict[str, Any]

FONT = "Noto Sans CJK SC, Noto Sans, Helvetica, Arial, sans-serif"
# Okabe and Ito's colours, without the yellow that is too pale for a line on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
DASHES = ([1, 0], [6, 3], [2, 2], [10, 3, 2, 3], [4, 6], [12, 4])
WIDTH = 830  # of the plot, in pixels
MARKERS = 7  # on a line with many points
GREY = "#5f6368"
# The label of a tick: 0.01, 20, 1e-6.
SHORT_LABEL = (
    "datum.value >= 0.001 && datum.value < 100000 ? format(datum.value, '~g') : "
    "format(datum.value, '.0e')"
)

_TEXT = {
    "depth": ("depth (layers)", "深度（层数）"),
    "loss": ("validation loss (nats)", "验证损失（nat）"),
    "close": ("the same, close up (nats)", "局部放大（nat）"),
    "any loss": ("loss (nats)", "损失（nat）"),
    "step": ("step", "步数"),
    "wiring": ("wiring", "接法"),
    "warmup": ("warm-up steps", "预热步数"),
    "rate": ("learning rate", "学习率"),
    "seed": ("seed", "随机种子"),
    "effect": ("effect", "效应"),
    "seeds": ("seeds", "随机种子数"),
    "name": ("connection", "连接"),
    "number": ("number of the connection", "连接序号"),
    "uniform": ("uniform", "均匀"),
    "diverged": ("× diverged", "× 发散"),
    "place": ("place of the connection", "连接所在位置"),
    "gradient": ("gradient RMS / that at the last", "梯度 RMS ÷ 最后一个连接的梯度 RMS"),
    "stream": ("stream RMS", "残差流 RMS"),
    "share": ("branch RMS / stream RMS", "分支 RMS ÷ 残差流 RMS"),
    "plain gradient": ("gradient RMS", "梯度 RMS"),
    "training": ("training", "训练"),
    "validation": ("validation", "验证"),
}


def word(key: str, lang: Lang) -> str:
    """Return an axis or legend title."""
    return _TEXT[key][lang == "zh"]


def tooltips(lang: Lang, *fields: str) -> list[alt.Tooltip]:
    """Return tooltips of fields such as `depth:Q` that are named as their titles."""
    return [alt.Tooltip(field, title=word(field.split(":")[0], lang)) for field in fields]


def data(rows: Iterable[Row]) -> alt.InlineData:
    """Return rows as the data of a chart, with null for what is not finite."""
    return alt.InlineData(values=[{k: _short(v) for k, v in row.items()} for row in rows])


def _short(value: Any) -> Any:
    """Return a float with 5 digits, None where it is not finite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def is_finite(value: Any) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def finish(chart: Any, title: tuple[str, str], under: tuple[str, str], lang: Lang) -> Any:
    """Give a chart its title, subtitle and type; `title` and `under` are (English, Chinese)."""
    zh = lang == "zh"
    head = alt.TitleParams(
        text=title[zh], subtitle=under[zh], anchor="start", fontSize=17, subtitleFontSize=13,
        subtitleColor=GREY, subtitlePadding=6, offset=14,
    )  # fmt: skip
    return (
        chart.properties(title=head, description=f"{title[zh]}. {under[zh]}", background="white")
        .configure(font=FONT)
        .configure_axis(labelFontSize=13, titleFontSize=14, titleFontWeight="normal",
                        gridColor="#e8eaed", labelColor="#202124", titleColor="#202124")
        .configure_legend(labelFontSize=13, titleFontSize=13, symbolSize=90, labelLimit=320,
                          titlePadding=12, columnPadding=16)
        .configure_header(labelFontSize=14, titleFontSize=14, labelFontWeight="bold")
        .configure_view(stroke="#dadce0")
    )  # fmt: skip


def _pick() -> alt.Parameter:
    """Return the selection that a click in the legend makes."""
    return alt.selection_point(name="pick", fields=["wiring"], bind="legend", toggle="true")


def legend_columns(names: Sequence[str]) -> int:
    """Return into how many columns the names of a legend go."""
    longest = min(42, max(map(len, names)))
    return max(1, min(len(names), int(WIDTH / (longest * 7.6 + 38))))


def looks(count: int) -> tuple[list[str], list[str]]:
    """Return so many colours and shapes, each pair of them once."""
    turn = len(PALETTE)
    colours = [PALETTE[i % turn] for i in range(count)]
    return colours, [SHAPES[(i + i // turn) % len(SHAPES)] for i in range(count)]


class Look:
    """Colour and shape by wiring, dash by warm-up, with their legends."""

    def __init__(self, wirings: Sequence[str], warmups: Sequence[int], lang: Lang) -> None:
        names = list(wirings)
        columns = legend_columns(names)
        side: Literal["left", "top"] = "left" if columns == len(names) else "top"
        legend = alt.Legend(
            title=word("wiring", lang),
            orient="bottom",
            titleOrient=side,
            columns=columns,
            symbolLimit=0,
        )
        colours, shapes = looks(len(names))
        self.colour = alt.Color(
            "wiring:N", scale=alt.Scale(domain=names, range=colours), legend=legend
        )
        self.shape = alt.Shape(
            "wiring:N", scale=alt.Scale(domain=names, range=shapes), legend=legend
        )
        dashes = [DASHES[i % len(DASHES)] for i in range(len(warmups))]
        self.dash = alt.StrokeDash(
            "warmup:O",
            scale=alt.Scale(domain=list(warmups), range=dashes),
            legend=alt.Legend(
                title=word("warmup", lang), orient="top", titleOrient="left", symbolSize=700,
                symbolStrokeWidth=2, direction="horizontal",
            ) if len(warmups) > 1 else None,
        )  # fmt: skip
        self.pick = _pick()

    def opacity(self, value: float) -> Any:
        """Return the opacity of what is picked; the rest fades."""
        return alt.when(self.pick).then(alt.value(value)).otherwise(alt.value(0.06))


def log_ticks(values: Iterable[Any]) -> tuple[list[float], list[float]]:
    """Return the ends of a log axis over positive values, and its round ticks."""
    found = [v for v in values if is_finite(v) and v > 0] or [1.0]
    low, high = math.log10(min(found)), math.log10(max(found))
    pad = max(0.05 * (high - low), 0.15 - (high - low) / 2, 0.04)
    low, high = low - pad, high + pad
    if high - low > 2:
        step = math.ceil((high - low) / 9)
        ticks = [10.0 ** (k * step) for k in range(math.ceil(low / step), int(high // step) + 1)]
    else:
        marks = (1, 2, 5) if high - low > 0.9 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
        ticks = [m * 10.0**k for k in range(math.floor(low), math.ceil(high) + 1) for m in marks]
        ticks = [t for t in ticks if low <= math.log10(t) <= high]
    return [10**low, 10**high], ticks


def log_axis(values: Iterable[Any], title: str) -> alt.Y:
    """Return a log y axis named `y` over positive values, with round labels."""
    ends, ticks = log_ticks(values)
    return alt.Y(
        "y:Q",
        title=title,
        scale=alt.Scale(type="log", domain=ends, nice=False),
        axis=alt.Axis(values=ticks, labelExpr=SHORT_LABEL),
    )


def margin_text(y: float, text: str) -> alt.Chart:
    """Return text right of the plot at the height `y` of the loss axis."""
    base = alt.Chart(data([{}])).mark_text(align="left", dx=6, fontSize=13, color=GREY, text=text)
    placed: alt.Chart = base.encode(x=alt.value(WIDTH), y=alt.datum(y, type="quantitative"))
    return placed


def references(unigram: float, uniform: float, lang: Lang, unit: str) -> list[alt.Chart]:
    """Return the lines of frequencies alone and of knowing nothing, labelled right of the plot."""
    layers = []
    short = UNITS[unit]["short"][lang == "zh"]
    for name, value in ((short, unigram), (word("uniform", lang), uniform)):
        rule = alt.Chart(data([{}])).mark_rule(color=GREY, strokeDash=[3, 3])
        layers.append(rule.encode(y=alt.datum(value, type="quantitative")))
        layers.append(margin_text(value, f"{name} {value:.3f}"))
    return layers


def panels(depths: Sequence[int]) -> tuple[int, int]:
    """Return the columns and the plot width of a chart with one panel per depth."""
    columns = 1 if len(depths) == 1 else 2 if len(depths) in (2, 4) else 3
    return columns, (WIDTH, 410, 265)[columns - 1]


def depth_header(lang: Lang) -> alt.Header:
    """Return the header of a panel: `depth 24`."""
    before = "深度 " if lang == "zh" else "depth "
    return alt.Header(title=None, labelExpr=f"'{before}' + datum.value")
