"""ST-26 The logit lens: does the answer get better from layer to layer, and where is that so?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from addnorm.probe.lens import lens
from addnorm.studies import bench
from addnorm.studies.frame import (
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
WIRINGS = {"pre-norm": "prenorm", "post-norm": "postnorm"}


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one GPT and read its stream behind every layer with its own head: lists over depth."""
    run = bench.deep_gpt(
        cell["seed"], WIRINGS[cell["wiring"]], cell["steps"], depth=DEPTH, context=CONTEXT
    )
    if run.status != "finished":
        return {"loss": math.nan}
    read = lens(run.model, *bench.windows(CONTEXT), budget=math.inf)
    losses = read.loss[::2]  # behind layers, not behind their attention
    steps = [later - sooner for sooner, later in itertools.pairwise(losses)]
    return {
        "loss": run.validation,
        "lens": losses,
        "agreement": read.agreement[::2],
        "divergence": read.divergence[::2],
        "rise": max(0.0, *steps),
        "rising": sum(step > 0 for step in steps),
        "half": read.agreement[DEPTH],
        "layer": list(range(DEPTH + 1)),
    }


def _excess(rows: Rows) -> float:
    """Return the loss of the lens at half depth above the model's own, post-norm minus pre-norm."""
    post, pre = (rows.maybe("lens", wiring=wiring) for wiring in ("post-norm", "pre-norm"))
    if not (isinstance(post, list) and isinstance(pre, list)):
        return math.nan
    return float((post[DEPTH // 2] - post[-1]) - (pre[DEPTH // 2] - pre[-1]))


NATS = Words("nats", "nat")

STUDY = Study(
    id="ST-26",
    name="lens",
    title=Words("The logit lens", "Logit lens"),
    question=Words(
        "Does the answer of a Transformer get better from layer to layer, as the logit lens shows it?",
        "用 logit lens 看，Transformer 的答案是否逐层变好？",
    ),
    design=Words(
        "Character GPTs of 12 layers are trained for 500 steps in pre-norm and in post-norm. The stream "
        "behind every layer is read by the model's own final norm and head, as if the later layers added "
        "nothing: its loss, how often its first choice is the model's own, and the divergence from the "
        "model's answer.",
        "以前置和 post-norm 训练 12 层字符 GPT，各 500 步。用模型自己的最终归一化和输出头读取每一层之后的残差流，"
        "如同后面的层都不再加入任何东西：记录其损失、首选与模型一致的比例，以及与模型答案的散度。",
    ),
    controls=Words(
        "The same batches and rate for both, a fifth of the steps warm-up; 128 validation windows. The lens "
        "is biased: the head was trained on the last stream only, so a bad reading need not mean that the "
        "layer knows nothing. In post-norm a switched-off layer still has its norms, of which only gain and "
        "bias act on a stream that is normalised already.",
        "两者批次和学习率相同，前五分之一步为预热；使用 128 个验证窗口。logit lens 是有偏的：输出头只在最后的残差流上"
        "训练过，读数差并不说明该层一无所知。post-norm 中，被关闭的层仍保留其归一化；对已归一化的残差流，只有增益和"
        "偏置起作用。",
    ),
    lesson=Words(
        "In pre-norm the lens falls from layer to layer without any rise: all layers write in the language of the "
        "head, each improves on the answer, and at half depth three quarters of the first choices are the final "
        "ones. In post-norm the lens reads the middle badly, 1.0 nats above pre-norm there; whether its loss also "
        "rises on the way by 0.05 nats more than in pre-norm these seeds do not decide (median 0.08, p 0.055). "
        "Where the lens fails, first doubt the lens: a stream that is normalised behind every layer may hold the "
        "answer in another form, which a trained translation would find.",
        "pre-norm 的读数逐层下降，没有一次上升：各层都用输出头的“语言”书写，逐层改进答案，到一半深度时，四分之三的首选已与最终一致。"
        "post-norm 的中间层则读不好，比 pre-norm 高 1.0 nat；至于途中的上升是否也比 pre-norm 多 0.05 nat 以上，这些种子不能断定（中位数 0.08，"
        "p 为 0.055）。读不出时先怀疑 logit lens 本身：每层之后都被归一化的残差流，可能以另一种形式保存答案，需要训练出的变换才能读出。",
    ),
    claims=(),
    factors={"wiring": tuple(WIRINGS)},
    measure=measure,
    metrics={
        "lens": Metric(Words("loss of the lens", "logit lens 的损失"), NATS),
        "agreement": Metric(Words("first choice as the model's", "首选与模型一致的比例")),
        "divergence": Metric(Words("divergence from the model", "与模型答案的散度"), NATS),
        "rise": Metric(Words("largest rise from a layer to the next", "相邻两层间损失的最大上升"), NATS),
        "rising": Metric(Words("layers behind which the loss is higher", "使损失上升的层数")),
        "half": Metric(Words("first choice as the model's at half depth", "半深处首选与模型一致的比例")),
        "loss": Metric(Words("validation loss", "验证损失"), NATS, failed=bench.UNIGRAM),
        "layer": Metric(Words("layers so far", "已经过的层数")),
    },
    primary=Contrast(
        Words(
            "The largest rise of the lens's loss from one layer to the next is larger in post-norm than in "
            "pre-norm, by more than 0.05 nats.",
            "相邻两层间 logit lens 损失的最大上升，post-norm 比 pre-norm 大 0.05 nat 以上。",
        ),
        lambda rows: float(
            rows.maybe("rise", wiring="post-norm") - rows.maybe("rise", wiring="pre-norm")
        ),
        limit=0.05,
        unit=NATS,
    ),
    secondary=(
        Contrast(
            Words(
                "In pre-norm the loss falls all the way: it nowhere rises by more than 0.02 nats.",
                "pre-norm 的损失一路下降：任何一层的上升都不超过 0.02 nat。",
            ),
            lambda rows: float(rows.maybe("rise", wiring="pre-norm")), limit=0.02, rule="below",
            name="pre-falls", unit=NATS,
        ),
        Contrast(
            Words(
                "At half depth pre-norm's first choice is the final one for more than half of the characters.",
                "在半深处，pre-norm 对半数以上字符的首选已与最终一致。",
            ),
            lambda rows: float(rows.maybe("half", wiring="pre-norm")), limit=0.5, name="half-decided",
            unit=Words("share", "比例"),
        ),
        Contrast(
            Words(
                "At half depth the lens reads post-norm worse: its loss above the final one is larger than "
                "in pre-norm by more than 0.3 nats.",
                "在半深处，post-norm 更难读：其损失超出最终损失的量比 pre-norm 大 0.3 nat 以上。",
            ),
            _excess, limit=0.3, name="post-unreadable", unit=NATS,
        ),
    ),
    modes={
        "quick": Mode(8, 2, settings={"steps": 200}),
        "default": Mode(8, 3.5, settings={"steps": 500}),
    },
    plots=(
        Plot(
            "profile", Words("Loss of the lens by depth", "logit lens 的损失与深度"),
            x="layer", y="lens", color="wiring",
        ),
        Plot(
            "profile", Words("First choice as the model's", "首选与模型一致的比例"),
            x="layer", y="agreement", color="wiring",
        ),
        Plot(
            "profile", Words("Divergence from the model's answer", "与模型答案的散度"),
            x="layer", y="divergence", color="wiring",
        ),
    ),
    published=(
        Published(
            Words(
                "In pre-norm language models the loss of intermediate readings falls with depth; early layers "
                "know more than the lens shows",
                "pre-norm 的语言模型中，中间读数的损失随深度下降；前面的层所知比 logit lens 显示的更多",
            ),
            Words("figures", "见图"),
            "Belrose et al. 2023 (arXiv:2303.08112)",
        ),
    ),
    heavy=True,
)  # fmt: skip
