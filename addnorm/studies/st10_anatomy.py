"""ST-10 Anatomy of the residual stream: what is left of the input, what is added, how it grows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from addnorm.probe.discover import discover
from addnorm.probe.lens import lens
from addnorm.probe.measures import cosine, rms
from addnorm.probe.tap import Point, Visitor, tapped
from addnorm.studies import bench
from addnorm.studies.frame import (
    Claim,
    Contrast,
    Metric,
    Mode,
    Plot,
    Published,
    Rows,
    Study,
    Words,
)

DEPTH, CONTEXT = 12, 32  # layers of two connections; characters
WIRINGS = {"pre-norm": "prenorm", "post-norm": "postnorm", "ReZero": "rezero"}


class Streams(Visitor):
    """Keeps the stream `(B, T, D)` that enters the first connection and those behind each layer."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __call__(self, k: int, point: Point) -> None:
        """Keep the stream in front of the first connection."""
        if k == 0:
            assert point.skip is not None
            self.kept = [point.skip]

    def after(self, k: int, out: Any) -> None:
        """Keep the stream behind the second connection of a layer."""
        if k % 2:
            self.kept.append(out)


@torch.no_grad()
def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one GPT and look at its stream in front of and behind every layer: lists over depth."""
    with torch.enable_grad():
        run = bench.deep_gpt(
            cell["seed"], WIRINGS[cell["wiring"]], cell["steps"], depth=DEPTH, context=CONTEXT
        )
    if run.status != "finished":
        return {"loss": math.nan}
    x, y = bench.windows(CONTEXT)
    structure, streams = discover(run.model, x), Streams()
    with tapped(run.model, structure, streams):
        run.model(x)
    first, kept = streams.kept[0], streams.kept
    variance = [float(rms([s])) ** 2 for s in kept]
    answers = lens(run.model, x, y, structure=structure, budget=math.inf).loss[::2]
    return {
        "loss": run.validation,
        "cosine": [float(cosine(first, s)) for s in kept],
        "copy": [float((first * s).sum() / first.square().sum()) for s in kept],
        "update": [float(rms([b - a]) / rms([a])) for a, b in itertools.pairwise(kept)],
        "variance": variance,
        "late": (variance[-1] - variance[DEPTH // 2]) / (variance[-1] - variance[0]),
        "lens": answers,
        "layer": list(range(DEPTH + 1)),
        "step": list(range(1, DEPTH + 1)),
    }


def _last(rows: Rows, metric: str, wiring: str) -> float:
    """Return the metric behind the last layer."""
    values = rows.maybe(metric, wiring=wiring)
    return float(values[-1]) if isinstance(values, list) else math.nan


def _middle(rows: Rows, wiring: str) -> float:
    """Return the median update beyond the first layer, beside the stream it is added to."""
    values = rows.maybe("update", wiring=wiring)
    return float(median(values[1:])) if isinstance(values, list) else math.nan


def rise(losses: Any) -> float:
    """Return the largest rise of the lens from one layer to the next; 0 where it only falls."""
    if not isinstance(losses, list):
        return math.nan
    steps = (later - sooner for sooner, later in itertools.pairwise(losses))
    return float(max(0.0, *steps))


STUDY = Study(
    id="ST-10",
    name="anatomy",
    title=Words("Anatomy of the residual stream", "残差流解剖"),
    question=Words(
        "What does the residual stream of a trained network consist of: a copy of the input, with fine "
        "corrections?",
        "训练后的网络里，残差流由什么组成？是输入的副本加上细微的修正吗？",
    ),
    design=Words(
        "Character GPTs of 12 layers, 64 wide, are trained for 300 steps under pre-norm, post-norm and "
        "ReZero (no norm, gates that start at 0). The stream in front of the first layer, x₀, is held "
        "against the stream x_l behind every layer: the cosine, and how much of x₀ stands in x_l (the "
        "coefficient ⟨x_l, x₀⟩/⟨x₀, x₀⟩; 1 says that the layers left that direction alone). Beside it: the "
        "size of each layer's update, the mean square of the stream, and the logit lens (the output layer applied to the stream "
        "behind each layer).",
        "以 pre-norm、post-norm 和 ReZero（无归一化，门控从 0 开始）训练 12 层、宽 64 的字符 GPT，各 300 步。"
        "把进入第一层的残差流 x₀ 与每层之后的 x_l 对照：余弦，以及 x_l 中含有多少 x₀（系数 ⟨x_l, x₀⟩/⟨x₀, x₀⟩，"
        "等于 1 表示各层没有改动这个方向）。此外还测每层更新的相对大小、残差流的均方，以及 logit lens（把输出层直接用在每层之后的残差流上）。",
    ),
    controls=Words(
        "One rate for all, 1e-3 with a fifth of the steps warm-up; the same batches. Everything is measured "
        "on 128 validation windows in evaluation mode. Linear and exponential growth are told apart by the "
        "share of the growth that falls into the second half: a straight line has 0.5, a curve that grows by "
        "a factor of 20 over 12 layers 0.82. The lens reads early layers with a head that was trained on the "
        "last one: they may know more than it shows.",
        "学习率相同（1e-3，前五分之一步预热），批次相同；所有量都在 128 个验证窗口上以评估模式测得。区分线性与"
        "指数增长的依据是后一半层占总增长的份额：直线为 0.5；若 12 层共增长 20 倍，指数曲线为 0.82。logit lens "
        "用在最后一层上训练的输出头去读前面的层，因此只给出它们所知的下限。",
    ),
    lesson=Words(
        "In pre-norm the input is kept, and it is soon a small part of the whole: behind the last layer the "
        "cosine is about 0.27, so the input makes up about 7 % of the energy, while its coefficient has even "
        "grown, to 1.4. The first two layers rewrite the stream (updates of 0.77 and 0.68 of it), the last "
        "ones correct it (0.07). The mean square grows in a straight line in pre-norm and exponentially in "
        "ReZero, which has no norm. The answer, read by the lens, improves with every layer. Post-norm has "
        "next to nothing of the input left (cosine about 0), but has hardly learned by then: its loss is "
        "3.16, that of letter frequencies 3.27.",
        "pre-norm 保留了输入，但输入很快只占一小部分：最后一层之后余弦约 0.27，即约占能量的 7 %，而其系数反而增至 "
        "1.4。前两层改写残差流（更新为残差流的 0.77 与 0.68），最后几层只作修正（0.07）。均方在 pre-norm 中按直线"
        "增长，在没有归一化的 ReZero 中按指数增长。logit lens 读出的答案逐层变好。post-norm 中输入几乎不剩（余弦约 "
        "0），但它此时也还没学到多少：损失为 3.16，而只按字符频率猜测为 3.27。",
    ),
    claims=(
        Claim("0.3", "000", 35, Words(
            "However complex the sublayers are, the input still reaches later layers by the identity (here: in "
            "a trained pre-norm network).",
            "无论子层多复杂，输入仍能以恒等映射传到后面的层（此处指训练后的 pre-norm 网络）。",
        ), by="stays"),
        Claim("0.11", "000", 80, Words(
            "Each layer keeps a copy of the original input (read strictly: the stream differs from it by fine "
            "differences only; here behind the last layer of pre-norm).",
            "每一层都保留原始输入的副本（从严理解：残差流与输入只差细微之处；此处指 pre-norm 最后一层之后）。",
        ), stands=False),
        Claim("0.11b", "000", 80, Words(
            "Each layer keeps a copy of the original input (read mildly: a part of the stream).",
            "每一层都保留原始输入的副本（从宽理解：作为残差流的一部分）。",
        ), by="stays"),
        Claim("0.12", "000", 80, Words(
            "Layers learn a difference that is small beside the stream (here: less than half of it, in most "
            "layers of pre-norm beyond the first).",
            "各层学到的差异比残差流小（此处指 pre-norm 第一层之后的多数层，不到残差流的一半）。",
        ), by="small-updates"),
    ),
    factors={"wiring": tuple(WIRINGS)},
    measure=measure,
    metrics={
        "cosine": Metric(Words("cosine of the stream and the input", "残差流与输入的余弦")),
        "copy": Metric(Words("coefficient of the input in the stream", "残差流中输入的系数")),
        "update": Metric(Words("update / stream (RMS)", "更新与残差流之比（RMS）")),
        "variance": Metric(Words("mean square of the stream", "残差流的均方")),
        "late": Metric(Words("share of the growth in the second half", "后一半层占总增长的份额")),
        "lens": Metric(Words("loss of the logit lens", "logit lens 的损失"), Words("nats", "nat")),
        "loss": Metric(Words("validation loss", "验证损失"), Words("nats", "nat"), failed=bench.UNIGRAM),
        "layer": Metric(Words("layers so far", "已经过的层数")),
        "step": Metric(Words("layer", "层")),
    },
    primary=Contrast(
        Words(
            "Behind the last layer of pre-norm the stream is mostly not the input: their cosine is below "
            "0.5, so the input makes up less than a quarter of its energy.",
            "pre-norm 最后一层之后，残差流大部分已不是输入：二者余弦低于 0.5，即输入所占能量不足四分之一。",
        ),
        lambda rows: _last(rows, "cosine", "pre-norm"),
        limit=0.5,
        rule="below",
        unit=Words("cosine", "余弦"),
    ),
    secondary=(
        Contrast(
            Words(
                "In pre-norm the input is not taken out of the stream: its coefficient behind the last "
                "layer is above 0.5.",
                "pre-norm 并未把输入从残差流中去掉：最后一层之后，其系数仍高于 0.5。",
            ),
            lambda rows: _last(rows, "copy", "pre-norm"), limit=0.5, name="stays",
            unit=Words("coefficient", "系数"),
        ),
        Contrast(
            Words(
                "Post-norm keeps less: its last cosine is below that of pre-norm by more than 0.1.",
                "post-norm 保留得更少：最后的余弦比 pre-norm 低 0.1 以上。",
            ),
            lambda rows: _last(rows, "cosine", "pre-norm") - _last(rows, "cosine", "post-norm"),
            limit=0.1, name="post-keeps-less", unit=Words("cosine", "余弦"),
        ),
        Contrast(
            Words(
                "Beyond the first layer of pre-norm the update is less than half of the stream (median of "
                "layers).",
                "pre-norm 第一层之后，更新不到残差流的一半（各层的中位数）。",
            ),
            lambda rows: _middle(rows, "pre-norm"), limit=0.5, rule="below", name="small-updates",
            unit=Words("update / stream, median", "更新与残差流之比，中位数"),
        ),
        Contrast(
            Words(
                "The mean square of pre-norm's stream grows in a straight line: the second half has 0.5 of "
                "the growth, within 0.15.",
                "pre-norm 残差流的均方按直线增长：后一半层占总增长的 0.5，误差不超过 0.15。",
            ),
            lambda rows: float(rows.maybe("late", wiring="pre-norm")) - 0.5, limit=0.15, rule="within",
            name="linear", unit=Words("share - 0.5", "份额 - 0.5"),
        ),
        Contrast(
            Words(
                "Without a norm (ReZero) it grows exponentially: the second half has more than 0.75.",
                "没有归一化时（ReZero）按指数增长：后一半层占 0.75 以上。",
            ),
            lambda rows: float(rows.maybe("late", wiring="ReZero")), limit=0.75, name="exponential",
            unit=Words("share", "份额"),
        ),
        Contrast(
            Words(
                "In pre-norm the loss of the logit lens falls from layer to layer: it nowhere rises by more "
                "than 0.02 nats.",
                "pre-norm 中，logit lens 的损失逐层下降：任何一层的上升都不超过 0.02 nat。",
            ),
            lambda rows: rise(rows.maybe("lens", wiring="pre-norm")), limit=0.02, rule="below",
            name="refines", unit=Words("nats", "nat"),
        ),
    ),
    modes={
        "quick": Mode(8, 1.3, settings={"steps": 100}),
        "default": Mode(8, 3.3, settings={"steps": 300}),
    },
    plots=(
        Plot(
            "profile", Words("Cosine of the stream and the input", "残差流与输入的余弦"),
            x="layer", y="cosine", color="wiring",
        ),
        Plot(
            "profile", Words("Mean square of the stream", "残差流的均方"),
            x="layer", y="variance", color="wiring", log_y=True,
        ),
        Plot(
            "profile", Words("Update of each layer, beside the stream", "每层更新相对残差流的大小"),
            x="step", y="update", color="wiring", log_y=True, reference=0.5,
            reference_title=Words("half of the stream", "残差流的一半"),
        ),
        Plot(
            "profile", Words("What the model would answer after each layer", "每层之后直接输出的损失"),
            x="layer", y="lens", color="wiring",
        ),
    ),
    published=(
        Published(
            Words(
                "Mean square of pre-norm's stream at the start, in units of that of the input: between two "
                "straight lines",
                "初始时 pre-norm 残差流的均方（以输入为单位）：介于两条直线之间",
            ),
            Words("1 + l/2 to 1 + 3l/2", "1 + l/2 至 1 + 3l/2"),
            "Xiong et al. 2020 (arXiv:2002.04745), Lemma 2",
        ),
        Published(
            Words(
                "Pre-norm's variance in trained language models: called exponential; the lemma gives bounds "
                "from linear to exponential",
                "训练后的语言模型中 pre-norm 的方差：文中称为指数增长；其引理只给出从线性到指数的界",
            ),
            Words("Θ(L) to Θ(exp L)", "Θ(L) 至 Θ(exp L)"),
            "Sun et al. 2025 (arXiv:2502.05795)",
        ),
    ),
)  # fmt: skip
