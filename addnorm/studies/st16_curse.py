"""ST-16 The curse of depth: what each layer is worth, by where the norm sits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy.stats import spearmanr

from addnorm.probe.lesion import lesions
from addnorm.probe.vitals import xray
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
WIRINGS = {
    "pre-norm": "prenorm",
    "post-norm": "postnorm",
    "LNS": "lns",
    "peri-norm": "peri",
    "ReZero": "rezero",
}


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one GPT; take out each layer, and the last six; X-ray its stream. Lists over depth."""
    run = bench.deep_gpt(
        cell["seed"], WIRINGS[cell["wiring"]], cell["steps"], depth=DEPTH, context=CONTEXT
    )
    if run.status != "finished":
        return {"loss": math.nan}
    x, y = bench.windows(CONTEXT)
    removed = lesions(
        run.model, x, y, singles=False, runs=(2, DEPTH), estimate=False, budget=math.inf
    )
    worth = removed.runs[2][::2]  # attention and feed-forward of one layer
    vitals = xray(run.model, x, y).connections
    return {
        "loss": run.validation,
        "worth": worth,
        "late": late_share(worth),
        "together": removed.runs[DEPTH][DEPTH],  # the second half of all connections
        "angle": [math.acos(min(c.stream_cosine, 1)) / math.pi for c in vitals],
        "update": [c.branch_share for c in vitals],
        "variance": [c.stream_after**2 for c in vitals],
        "growth": vitals[-1].stream_after ** 2,
        "layer": list(range(1, DEPTH + 1)),
        "connection": list(range(1, 2 * DEPTH + 1)),
    }


def late_share(worth: Sequence[float]) -> float:
    """Return the share of the second half in the summed worth; harm counts as no worth."""
    gains = [max(w, 0.0) for w in worth]
    return sum(gains[len(gains) // 2 :]) / sum(gains) if sum(gains) else math.nan


def _difference(metric: str, one: str, other: str) -> Callable[[Rows], float]:
    return lambda rows: float(rows.maybe(metric, wiring=one) - rows.maybe(metric, wiring=other))


def _trend(wiring: str) -> Callable[[Rows], float]:
    """Return the rank correlation of layer and worth."""

    def effect(rows: Rows) -> float:
        worth = rows.maybe("worth", wiring=wiring)
        return (
            float(spearmanr(range(len(worth)), worth)[0]) if isinstance(worth, list) else math.nan
        )

    return effect


def _stirred(rows: Rows) -> float:
    """Return log10 of the mean update in the second half, post-norm over pre-norm."""
    both = [rows.maybe("update", wiring=wiring) for wiring in ("post-norm", "pre-norm")]
    if not all(isinstance(update, list) for update in both):
        return math.nan
    post, pre = (sum(update[DEPTH:]) / len(update[DEPTH:]) for update in both)
    return math.log10(post / pre)


STUDY = Study(
    id="ST-16",
    name="curse",
    title=Words("The curse of depth", "深度的诅咒"),
    question=Words(
        "Is a layer worth less the deeper it stands, and does that depend on where the norm sits?",
        "层的位置越深，作用就越小吗？这与归一化的位置有关吗？",
    ),
    design=Words(
        "Character GPTs of 12 layers, 64 wide, are trained for 500 steps under five wirings. Then each "
        "layer is taken out of the trained network in turn (its two updates become zero, the shortcut "
        "stays): the rise of the validation loss is what the layer is worth. The last six are taken out "
        "together as well. The X-ray gives the angle by which each connection turns the stream, the size "
        "of its update beside the stream, and the variance of the stream.",
        "在五种接法下各训练一个 12 层、宽 64 的字符 GPT（500 步），然后逐层从训练好的网络中去除：该层的两个"
        "更新置零，捷径保留，验证损失的上升量就是该层的作用。最后六层还会一并去除。X 光给出每个连接使残差流"
        "转过的角度、更新相对残差流的大小，以及残差流的方差。",
    ),
    controls=Words(
        "All networks of a seed see the same batches at the same rate, 1e-3 with a fifth of the steps "
        "warm-up, without which post-norm does not train. They differ only in the wirings' own "
        "parameters and in the start that each asks for. One rate for all is a limit: ReZero likes a higher "
        "one. 500 steps are early in a training, and 12 layers are few beside language models.",
        "同一种子的所有网络使用相同的批次和学习率（1e-3，前五分之一步为预热，否则 post-norm 训练不起来），差别只在"
        "接法自身的参数与各自要求的初始化。局限：所有接法共用一个学习率，而 ReZero 适合更高的；500 步只是训练早期；与语言"
        "模型相比，12 层也不算深。",
    ),
    lesson=Words(
        "The shortcut is the same in all five networks; what a late layer is worth is decided by the norm. In "
        "pre-norm the last six of twelve layers hold 12 % of what all layers are worth one by one, in post-norm "
        "64 %. Worth little by itself is not doing nothing: without all six the loss of pre-norm rises by 0.11 "
        "nats, four times the sum of the six. LNS, a remedy made for large language models, does no good here "
        "after 500 steps: the share falls to 3 % and the loss is 0.02 nats higher, which says nothing of 10,000 "
        "steps at 130M. Nor is a higher worth of late layers an aim: post-norm, with the highest, has the higher "
        "loss (2.53 against 2.41, one seed hardly trained). That its worth rises with depth holds in the mean "
        "over the seeds, not in each.",
        "五种网络的捷径相同，后面的层有多大作用取决于归一化。逐层计算时，十二层中的最后六层，在 pre-norm 中占总作用的 12%，在 post-norm 中占 64%。"
        "单层作用小不等于什么都没做：六层一并去掉，pre-norm 的损失上升 0.11 nat，是六层单独之和的四倍。LNS 是针对大语言模型的对策，"
        "在这里训练 500 步后没有好处：份额降到 3%，损失还高 0.02 nat；这并不能说明它在 130M 模型、1 万步时也无效。后面的层作用更大本身也不是目的："
        "作用最大的 post-norm 损失更高（2.53 对 2.41，有一个种子几乎没有学会）。“作用随深度上升”就各种子的平均而言成立，并非每个种子都如此。",
    ),
    claims=(
        Claim("1.20", "001", 135, Words(
            "Surplus layers turn into the identity by themselves (here: the last six of pre-norm, each of which "
            "alone could be left out).",
            "多余的层会自然变成恒等变换（此处指 pre-norm 的最后六层，其中任何一层单独去掉都无妨）。",
        ), by="not-identity", stands=False),
    ),
    factors={"wiring": tuple(WIRINGS)},
    measure=measure,
    metrics={
        "worth": Metric(Words("rise of the loss without the layer", "去除该层后损失的上升"), Words("nats", "nat")),
        "late": Metric(Words("share of the last six layers", "最后六层所占份额")),
        "together": Metric(
            Words("rise of the loss without the last six layers", "去除最后六层后损失的上升"),
            Words("nats", "nat"),
        ),
        "angle": Metric(Words("angle that the stream turns by", "残差流转过的角度"), Words("π", "π")),
        "update": Metric(Words("update / stream (RMS)", "更新与残差流之比（RMS）")),
        "variance": Metric(Words("mean square of the stream", "残差流的均方")),
        "growth": Metric(Words("mean square of the last stream", "最后残差流的均方")),
        "loss": Metric(Words("validation loss", "验证损失"), Words("nats", "nat"), failed=bench.UNIGRAM),
        "layer": Metric(Words("layer", "层")),
        "connection": Metric(Words("connection", "连接")),
    },
    primary=Contrast(
        Words(
            "Of what all layers are worth, the last six hold a smaller share in pre-norm than in "
            "post-norm, by more than 0.1.",
            "在各层作用的总和中，最后六层所占的份额，pre-norm 比 post-norm 低 0.1 以上。",
        ),
        _difference("late", "post-norm", "pre-norm"),
        limit=0.1,
        unit=Words("share", "份额"),
    ),
    secondary=(
        Contrast(
            Words(
                "In pre-norm the worth falls with depth: rank correlation below -0.5.",
                "pre-norm 中，层的作用随深度下降：秩相关低于 -0.5。",
            ),
            _trend("pre-norm"), limit=-0.5, rule="below", name="pre-falls",
            unit=Words("Spearman ρ", "Spearman ρ"),
        ),
        Contrast(
            Words(
                "In post-norm it is the reverse: the worth rises with depth.",
                "post-norm 则相反：层的作用随深度上升。",
            ),
            _trend("post-norm"), limit=0.0, name="post-rises",
            unit=Words("Spearman ρ", "Spearman ρ"),
        ),
        Contrast(
            Words(
                "Scaling the norm by 1/√l (LNS) makes the last six layers worth a larger share than in "
                "plain pre-norm.",
                "把归一化输出乘以 1/√l（LNS），会使最后六层的份额高于普通 pre-norm。",
            ),
            _difference("late", "LNS", "pre-norm"), limit=0.0, name="lns-cures",
            unit=Words("share", "份额"),
        ),
        Contrast(
            Words(
                "LNS has the lower validation loss than pre-norm.",
                "LNS 的验证损失低于 pre-norm。",
            ),
            _difference("loss", "LNS", "pre-norm"), limit=0.0, rule="below", name="lns-better",
            unit=Words("nats", "nat"),
        ),
        Contrast(
            Words(
                "In pre-norm the last six layers are not the identity: without them the loss rises by "
                "more than 0.05 nats.",
                "pre-norm 的最后六层并不是恒等变换：一并去除后，损失上升超过 0.05 nat。",
            ),
            lambda rows: float(rows.maybe("together", wiring="pre-norm")), limit=0.05, name="not-identity",
            unit=Words("nats", "nat"),
        ),
        Contrast(
            Words(
                "With the same shortcut, the updates in the second half are more than twice as large "
                "beside the stream in post-norm as in pre-norm.",
                "捷径相同，但在后一半层中，post-norm 的更新相对残差流的大小是 pre-norm 的两倍以上。",
            ),
            _stirred, limit=math.log10(2), name="stirred",
            unit=Words("powers of ten", "个数量级"),
        ),
    ),
    modes={
        "quick": Mode(8, 2.3, {"wiring": ("pre-norm", "post-norm", "LNS")}, {"steps": 250}),
        "default": Mode(8, 9, settings={"steps": 500}),
    },
    plots=(
        Plot(
            "profile", Words("What each layer is worth", "各层的作用"),
            x="layer", y="worth", color="wiring", log_y=True,
        ),
        Plot(
            "profile", Words("How far each connection turns the stream", "每个连接使残差流转过的角度"),
            x="connection", y="angle", color="wiring",
        ),
        Plot(
            "profile", Words("Mean square of the stream after each connection", "每个连接之后残差流的均方"),
            x="connection", y="variance", color="wiring", log_y=True,
        ),
        Plot(
            "dots", Words("Share of the last six layers", "最后六层所占份额"),
            x="wiring", y="late", reference=0.5,
            reference_title=Words("all layers alike", "各层作用相同"),
        ),
    ),
    published=(
        Published(
            Words(
                "Perplexity of LLaMA 130M, 250M, 350M, 1B: pre-norm, then LNS",
                "LLaMA 130M、250M、350M、1B 的困惑度：pre-norm，随后 LNS",
            ),
            "26.73, 21.92, 19.58, 17.02; 25.76, 20.35, 18.20, 15.71",
            "Sun et al. 2025 (arXiv:2502.05795)",
        ),
        Published(
            Words(
                "Variance of the last layer's output at 130M after 10,000 steps: pre-norm, LNS",
                "130M 模型训练 1 万步后最后一层输出的方差：pre-norm、LNS",
            ),
            Words("about 175, about 25", "约 175、约 25"),
            "Sun et al. 2025 (arXiv:2502.05795)",
        ),
        Published(
            Words(
                "Without a deep layer pre-norm language models lose almost nothing; in post-norm (BERT-large) "
                "it is the reverse",
                "pre-norm 的语言模型去除深层几乎没有损失；post-norm（BERT-large）则相反",
            ),
            Words("shown as curves", "以曲线给出"),
            "Sun et al. 2025 (arXiv:2502.05795)",
        ),
        Published(
            Words(
                "Up to about half of the layers can be left out on question answering, after healing",
                "经过修复训练后，问答任务上最多可去除约一半的层",
            ),
            Words("about 1/2", "约 1/2"),
            "Gromov et al. 2024 (arXiv:2403.17887)",
        ),
    ),
)  # fmt: skip
