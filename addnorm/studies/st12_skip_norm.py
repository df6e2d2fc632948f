"""ST-12 Skip and norm: twelve layers with both, with one of them, with neither, and ReZero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from addnorm.models.layers import EmbeddingConfig, EmbeddingStart
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

CONTEXT, LAYERS = 32, 12
WIRINGS = {
    "both": "prenorm",
    "skip": "residual",
    "norm": "plain(norm=true)",
    "neither": "plain",
    "rezero": "rezero",
}
STARTS: dict[float, EmbeddingStart] = {
    0.1: "normal",
    1.0: "torch",
}  # standard deviation of the embeddings
FAINTEST = math.sqrt(torch.finfo(torch.float32).tiny)  # an RMS below has squares that underflow
NATS = Words("nats", "nat")


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """X-ray one character GPT at the start, then train it without warm-up."""
    model = bench.gpt(
        cell["seed"],
        LAYERS,
        WIRINGS[cell["net"]],
        CONTEXT,
        start="fairseq",
        embedding=EmbeddingConfig(embedding_start=STARTS[cell["embedding"]]),
    )
    trace = xray(model, *bench.windows(CONTEXT, 16))
    layers = [*trace.connections[::2], trace.connections[-1]]
    gradients = [c.gradient_before for c in layers[:-1]] + [layers[-1].gradient_after]
    steps = cell["steps"]
    run = bench.trained(
        model,
        bench.text(CONTEXT),
        cell["seed"],
        **bench.ADAM | {"batch": 12, "betas": (0.9, 0.98), "clip": 1.0},
        lr=cell["rate"],
        steps=steps,
    )
    shown = range(0, len(run.losses) - len(run.losses) % 10, 10)
    finished = run.status == "finished"
    return {
        "loss": min(run.validation, bench.UNIFORM) if finished else math.nan,
        "train": min(run.training_loss, bench.UNIFORM) if finished else math.nan,
        "curve": [float(np.mean(run.losses[i : i + 10])) for i in shown],
        "step": [i + 5 for i in shown],
        "layer": list(range(LAYERS + 1)),
        "gradient": gradients,
        "stream": [c.stream_before for c in layers[:-1]] + [layers[-1].stream_after],
        "fades": fading(gradients),
        "alike": trace.token_similarity,
    }


def fading(gradients: Sequence[float]) -> float:
    """Return by how many powers of ten an RMS shrinks on its way from the last layer to the first.

    What underflows in float32 counts as the smallest RMS that does not: then it shrinks by more.
    """
    first, last = (max(g, FAINTEST) for g in (gradients[0], gradients[-1]))
    return math.log10(last / first)


def _best(rows: Rows, net: str) -> float:
    """Return the validation loss in the setting with the lowest training loss."""
    return float(min(rows.only(net=net), key=lambda row: row["train"])["loss"])


def _worst(rows: Rows, net: str) -> float:
    """Return the largest loss over the starts of the embedding and the rates."""
    return float(max(rows.only(net=net).column("loss")))


def _start(rows: Rows, net: str, metric: str) -> list[float]:
    """Return a metric of the start, of every training of one network."""
    return rows.only(net=net).column(metric)


STUDY = Study(
    id="ST-12",
    name="skip-norm",
    title=Words("Skip, norm, or both", "捷径、归一化，还是两者都要"),
    question=Words(
        "What do the residual connection and the norm each contribute to a deep Transformer, and is "
        "either of them enough alone?",
        "残差连接与归一化各对深层 Transformer 贡献了什么？单独一个够不够？",
    ),
    design=Words(
        f"Character GPTs of {LAYERS} layers, 64 wide: with both (pre-norm), with the skip alone, with the "
        "norm alone in front of each branch, with neither, and ReZero, which has no norm but a learned "
        "factor per branch that starts at 0. Each is X-rayed at the start and trained with Adam, without warm-up, "
        "from embeddings of standard deviation 0.1 and of 1 (PyTorch's default) and at two rates ten times "
        "apart: four settings. The one with neither starts from embeddings of 1 only.",
        f"{LAYERS} 层、宽 64 的字符级 GPT：两者都有（pre-norm）、仅捷径、仅归一化（在每个分支之前）、两者皆无，以及 "
        "ReZero（无归一化，每个分支乘一个从 0 开始的可学习系数）。先对初始模型做 X 光测量，再用 Adam 训练（不预热）；词嵌入的标准差取 0.1 "
        "或 1（PyTorch 默认值），学习率取相差十倍的两档，共四种设置；两者皆无的模型只取标准差 1。",
    ),
    controls=Words(
        "All have the same branches with Xavier's start, the same batches and steps; gradients are clipped "
        "in all. A small start of the branches, as GPT-2 has it, would stand in for a norm and is not used. "
        "A loss above that of uniform guessing counts as that, and so does a training that overflows. The best "
        "setting of a network is the one with the lowest training loss.",
        "各组的分支（Xavier 初始化）、批次与步数都相同，梯度一律裁剪。GPT-2 那样的小初始值会起到归一化的作用，故不采用。"
        "损失高于均匀猜测的，以及溢出的训练，一律按均匀猜测计。所谓最佳设置，指训练损失最低者。",
    ),
    lesson=Words(
        "The skip is indispensable: the norm without it stays at 3.3 nats, the loss of guessing by frequency, in "
        "every setting, although the gradient arrives; behind the last layer all positions are alike. The norm "
        "can be left out, but at a price: the skip alone trains only from small embeddings at the lower rate. "
        "There it is a little better than the network with both (2.62 against 2.70), whose own best, in another "
        "setting, is 2.54; in the three other settings it breaks down, in two of them with numbers that are not "
        "finite. Both together train in all four (2.5 to 2.9). What the norm gives here is the freedom to choose "
        "start and rate. ReZero, a factor per branch that starts at 0, gives the same without any norm (2.5 to "
        "2.8).",
        "捷径不可缺少：没有它，只有归一化的网络在所有设置下都停在 3.3 nat，即按字符频率猜测的损失，尽管梯度能够传到；最后一层之后各位置彼此相同。"
        "归一化可以省去，但有代价：只有捷径时，仅在小的词嵌入加较低的学习率下能够训练；在这一设置下略好于两者都有（2.62 对 2.70）"
        "，但后者在另一设置下的最佳值是 2.54；其余三种设置都失败，其中两种出现非有限数值。两者都有则四种设置都能训练（2.5 至 2.9）"
        "。归一化在这里给的，是选择初始值与学习率的自由。ReZero 每个分支乘一个从 0 开始的系数，不用归一化也做到了这一点（2.5 至 2.8）"
        "。",
    ),
    claims=(
        Claim("0.19a", "000", 99, Words(
            "The skip belongs to the standard pair (here: without it the norm is not enough).",
            "残差连接是标准组合的一部分（此处指：没有它，只靠归一化不够）。",
        ), by="skip-needed"),
        Claim("0.19d", "000", 99, Words(
            "What the skip takes care of are the gradients (here: beside a norm and without it they do not get "
            "through).",
            "残差连接解决的是梯度传播（此处指：有归一化而没有它时，梯度传不过去）。",
        ), by="norm-passes", stands=False),
        Claim("0.19b", "000", 99, Words(
            "Of the standard pair the norm keeps the distributions stable (here: with it and the skip every "
            "rate and size of embeddings trains, with the skip alone not).",
            "标准组合中，归一化负责分布稳定（此处指：加上它，各档学习率与词嵌入大小都能训练，只有捷径则不行）。",
        )),
        Claim("0.19c", "000", 99, Words(
            "The norm is a part of the pair that cannot be left out (a stronger reading than the document's; "
            "here: without it the skip falls short even at its best rate and size of embeddings).",
            "归一化是其中不可省去的一半（比文档的说法更强；此处指：没有它，捷径即使在最佳学习率与词嵌入大小下也不够）。",
        ), by="norm-needed"),
        Claim("3.15", "003", 146, Words(
            "The shortcut is a core building block of language models (here: without it a GPT of 12 layers "
            "with norms does not train).",
            "捷径是语言模型的核心构建块（此处指：没有它，带归一化的 12 层 GPT 训练不起来）。",
        ), by="skip-needed"),
    ),
    factors={"net": tuple(WIRINGS), "embedding": (0.1, 1.0), "rate": (1e-3, 1e-2)},
    skip=lambda cell: cell["net"] == "neither" and cell["embedding"] < 1,
    measure=measure,
    metrics={
        "loss": Metric(Words("validation loss", "验证损失"), NATS, bench.UNIFORM),
        "train": Metric(Words("training loss, last tenth of the steps", "最后十分之一步数的训练损失"),
                        NATS, bench.UNIFORM),
        "curve": Metric(Words("training loss", "训练损失"), NATS),
        "step": Metric(Words("step", "步数")),
        "layer": Metric(Words("layers passed", "已经过的层数")),
        "gradient": Metric(Words("RMS of the gradient", "梯度的均方根")),
        "stream": Metric(Words("RMS of the stream", "残差流的均方根")),
        "fades": Metric(Words("gradient at the output over that at the input",
                              "输出端与输入端梯度之比"), Words("powers of ten", "个数量级")),
        "alike": Metric(Words("cosine between positions behind the last layer",
                              "最后一层之后各位置间的余弦")),
    },
    primary=Contrast(
        Words(
            "Both together train in every setting: in its worst one the loss is at least 0.3 nats below "
            "that of the skip alone and of the norm alone, each in its own worst.",
            "两者都有时，每种设置下都能训练：最差设置下的损失，比仅捷径、仅归一化各自的最差损失至少低 0.3 nat。",
        ),
        lambda rows: min(_worst(rows, "skip"), _worst(rows, "norm")) - _worst(rows, "both"),
        limit=0.3,
        unit=NATS,
    ),
    secondary=(
        Contrast(
            Words(
                "Each in its best setting, the norm without the skip ends at least 0.3 nats above the network with both.",
                "各取最佳设置时，没有捷径、只有归一化的损失比两者都有时至少高 0.3 nat。",
            ),
            lambda rows: _best(rows, "norm") - _best(rows, "both"),
            limit=0.3, unit=NATS, name="skip-needed",
        ),
        Contrast(
            Words(
                "Each in its best setting, the skip without the norm ends at least 0.3 nats above the network with both.",
                "各取最佳设置时，没有归一化、只有捷径的损失比两者都有时至少高 0.3 nat。",
            ),
            lambda rows: _best(rows, "skip") - _best(rows, "both"),
            limit=0.3, unit=NATS, name="norm-needed",
        ),
        Contrast(
            Words(
                "ReZero, without any norm, is in its worst setting at most 0.1 nats above both together.",
                "完全没有归一化的 ReZero，在其最差设置下的损失最多比两者都有时高 0.1 nat。",
            ),
            lambda rows: _worst(rows, "rezero") - _worst(rows, "both"),
            limit=0.1, rule="below", unit=NATS, name="gate-instead",
        ),
        Contrast(
            Words(
                "With neither, the gradient at the start shrinks by more than ten thousand times on its way back.",
                "两者皆无时，初始梯度在回传中缩小一万倍以上。",
            ),
            lambda rows: min(_start(rows, "neither", "fades")),
            limit=4.0, unit=Words("powers of ten", "个数量级"), name="vanishes",
        ),
        Contrast(
            Words(
                "With the norm alone the gradient at the start shrinks no more than ten times on its way back.",
                "只有归一化时，初始梯度在回传中缩小不超过十倍。",
            ),
            lambda rows: max(_start(rows, "norm", "fades")),
            limit=1.0, rule="below", unit=Words("powers of ten", "个数量级"), name="norm-passes",
        ),
        Contrast(
            Words(
                "With the norm alone all positions are alike at the start: behind the last layer their cosine is "
                "above 0.95.",
                "只有归一化时，各位置在初始时就彼此相同：最后一层之后的余弦高于 0.95。",
            ),
            lambda rows: min(_start(rows, "norm", "alike")),
            limit=0.95, unit=Words("cosine", "余弦"), name="alike",
        ),
    ),
    modes={
        "quick": Mode(8, 1.8, {"embedding": (1.0,)}, {"steps": 80}),
        "default": Mode(8, 7.3, settings={"steps": 200}),
    },
    plots=(
        Plot(
            "dots", Words("Validation loss, by size of the embeddings", "验证损失，按词嵌入的大小"),
            x="net", y="loss", color="rate", facet="embedding",
            reference=bench.UNIGRAM,
            reference_title=Words("guessing by frequency", "按字符频率猜测"),
        ),
        Plot(
            "profile", Words("Training, embeddings N(0, 1)", "训练，词嵌入服从 N(0, 1)"),
            x="step", y="curve", color="net", facet="rate", log_y=True, only={"embedding": 1.0},
            x_title=Words("step", "步"),
            reference=bench.UNIGRAM,
            reference_title=Words("guessing by frequency", "按字符频率猜测"),
        ),
        Plot(
            "profile", Words("Stream at the start", "初始时的残差流"),
            x="layer", y="stream", color="net", log_y=True, only={"embedding": 1.0, "rate": 1e-3},
            x_title=Words("layers passed", "已经过的层数"),
        ),
        Plot(
            "profile", Words("Gradient at the start", "初始时的梯度"),
            x="layer", y="gradient", color="net", log_y=True, only={"embedding": 1.0, "rate": 1e-3},
            x_title=Words("layers passed", "已经过的层数"),
        ),
    ),
    published=(
        Published(
            Words(
                "Attention without skips and feed-forwards makes all positions alike, doubly exponentially "
                "with the depth",
                "去掉捷径与前馈层后，纯注意力使各位置趋同，速度随深度呈双重指数",
            ),
            Words("theorem", "定理"),
            "Dong et al. 2021 (arXiv:2103.03404)",
        ),
        Published(
            Words(
                "Transformers of 120 layers and more trained without norm and without warm-up, by a factor "
                "that starts at 0",
                "借助从 0 开始的系数，120 层以上的 Transformer 无需归一化、无需预热即可训练",
            ),
            Words("abstract", "摘要"),
            "Bachlechner et al. 2020 (arXiv:2003.04887)",
        ),
    ),
    relied=True,
)  # fmt: skip
