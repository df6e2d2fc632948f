"""ST-31 Several streams: do they beat pre-norm at equal parameters, and at equal wall time?"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np

from addnorm.models.gpt import GPT
from addnorm.models.layers import FeedForwardConfig
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

DIM, DEPTH, CONTEXT = 64, 6, 64
STREAMS = (
    "hyper(n=4)",
    "frac(m=4)",
    "mhc(n=4)",
    "mhc-v4(n=4)",
    "ihc(n=4)",
    "mhc-lite(n=4)",
    "krom(n=4)",
    "gated-residual(n=4)",
)
LENGTHS = (1.0, 2.0, 4.0)  # trainings of pre-norm, in those of the others
NATS = Words("nats", "nat")


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one character GPT; all wirings have the parameters of pre-norm, to less than 1 %."""
    model = _fitted(cell["seed"], cell["wiring"])
    steps = round(cell["steps"] * cell["length"])
    began = time.process_time()
    run = bench.trained(
        model,
        bench.text(CONTEXT),
        cell["seed"],
        **bench.ADAM | {"batch": 16, "clip": 1.0, "schedule": "cosine", "weight_decay": 0.1},
        lr=cell["rate"],
        steps=steps,
        eval_batches=100,
    )
    return {
        "loss": run.validation,
        "minutes": (time.process_time() - began) / 60,  # the same beside a busy neighbour
        "parameters": _size(model),
        "hidden": model.config.feedforward.hidden,
    }


def _fitted(seed: int, wiring: str) -> GPT:
    """Return the GPT whose hidden width leaves it the size of pre-norm with 4 D."""
    hidden = 4 * DIM
    whole, less = (_size(_gpt(seed, w, h)) for w, h in ((wiring, hidden), (wiring, hidden - 1)))
    over = whole - _size(_gpt(seed, "prenorm", hidden))
    return _gpt(seed, wiring, hidden - round(over / (whole - less)))


def _gpt(seed: int, wiring: str, hidden: int) -> GPT:
    inside = FeedForwardConfig(hidden=hidden)
    return bench.gpt(seed, DEPTH, wiring, CONTEXT, dim=DIM, feedforward=inside)


def _size(model: GPT) -> int:
    return sum(p.numel() for p in model.parameters())


def _gain(rows: Rows, wiring: str) -> float:
    """Return by how much pre-norm's loss is higher after as many steps, in nats."""
    reference = rows.best("loss", wiring="prenorm", length=1.0)
    return reference - rows.best("loss", wiring=wiring)


def _gain_in_time(rows: Rows, wiring: str) -> float:
    """Return by how much pre-norm's loss is higher after as much time, in nats.

    Pre-norm's loss at a time is interpolated between its trainings of several lengths, over the
    logarithm of their time; beyond the longest it is that one's.
    """
    (best,) = sorted(rows.only(wiring=wiring), key=lambda row: row["loss"])[:1]
    plain = rows.only(wiring="prenorm")
    rates = sorted(set(plain.column("rate")), key=lambda r: plain.best("loss", rate=r))
    curve = sorted(plain.only(rate=rates[0]), key=lambda row: row["minutes"])
    times = [math.log(row["minutes"]) for row in curve]
    reference = np.interp(math.log(best["minutes"]), times, [row["loss"] for row in curve])
    return float(reference) - float(best["loss"])


STUDY = Study(
    id="ST-31",
    name="streams",
    title=Words("Several streams against one", "多流与单流"),
    question=Words(
        "Does the multi-stream family (hyper-connections and its followers) reach a lower loss than "
        "pre-norm, at equal parameters and at equal time on this machine?",
        "多流家族（hyper-connections 及其后继）在参数量相同、以及在本机用时相同的条件下，损失是否低于 pre-norm？",
    ),
    design=Words(
        f"Character GPTs of {DEPTH} layers, {DIM} wide, on the built-in English text, under pre-norm and "
        "eight multi-stream wirings. The hidden width of the feed-forward is chosen so that every model "
        "has pre-norm's number of parameters. Pre-norm is trained for one to four times as many steps as "
        "well, each with its own decay, which gives its loss at any time in between.",
        f"在内置英文文本上训练 {DEPTH} 层、宽 {DIM} 的字符级 GPT，采用 pre-norm 与八种多流接法；调整前馈层的隐藏宽度，"
        "使各模型参数量与 pre-norm 相同。pre-norm 另训练 1 至 4 倍的步数（各有完整的学习率衰减），由此得到它在任意时刻的损失。",
    ),
    controls=Words(
        "Same start of the branches where shapes agree, same batches in the same order, same rate. Time is "
        "that of the one core, evaluation included; no compiler, float32: fused kernels would make several streams cheaper, so the verdict "
        "at equal time holds for this setting only. Parameters are equal to less than 1 %. "
        "One rate for all, none was tuned per wiring.",
        "形状相同处分支初始值相同，批次及次序相同，学习率相同。时间指单核的处理器时间（含评估）；不编译、float32：融合内核会降低多流的开销，"
        "因此“同等时间”的结论只适用于此设置。参数量相差不到 1%。各接法用同一个学习率，没有逐一调整。",
    ),
    lesson=Words(
        "At equal parameters and steps pre-norm ends at 2.61 nats, hyper-connections at 2.58, their followers "
        "between 2.59 and 2.69: the first of the family gains 0.03 nats, its median nothing. At equal processor "
        "time none gains: without a compiler a step costs 1.6 to 4.1 times that of pre-norm, which gets to 2.46 "
        "with twice the steps and to 2.19 with four times. What several streams give must also be weighed against "
        "the parameters they take, at this width up to 44 % of the feed-forward's; that share falls as the "
        "network widens. 150 steps of a network 64 wide say nothing of the sizes for which these wirings were "
        "made.",
        "参数量与步数相同时，pre-norm 的损失为 2.61 nat，hyper-connections 为 2.58，其后继在 2.59 至 2.69 之间：家族中的第一个降了 0.03 nat，"
        "中位数则没有好处。处理器时间相同时，没有一个占优：不编译时一步的开销是 pre-norm 的 1.6 至 4.1 倍，而 pre-norm 走两倍步数可到 2.46，"
        "四倍可到 2.19。多流占去的参数也要计入，在这一宽度上最多占前馈层的 44%，网络越宽占比越小。宽 64 的网络训练 150 步，不能说明这些接法所针对的规模。",
    ),
    claims=(),
    factors={"wiring": ("prenorm", *STREAMS), "length": LENGTHS},
    skip=lambda cell: cell["length"] != 1.0 and cell["wiring"] != "prenorm",
    measure=measure,
    metrics={
        "loss": Metric(Words("validation loss", "验证损失"), NATS, 4.6),
        "minutes": Metric(Words("processor time", "处理器时间"), Words("minutes", "分钟")),
        "parameters": Metric(Words("parameters", "参数量")),
        "hidden": Metric(Words("hidden width of the feed-forward", "前馈层隐藏宽度")),
    },
    primary=Contrast(
        Words(
            "At equal parameters and steps the median of the multi-stream family has a loss more than 0.02 "
            "nats below pre-norm's.",
            "参数量与步数相同时，多流家族的损失（中位数）比 pre-norm 低 0.02 nat 以上。",
        ),
        lambda rows: median(_gain(rows, wiring) for wiring in STREAMS),
        limit=0.02,
        unit=NATS,
    ),
    secondary=(
        Contrast(
            Words(
                "At equal time on this machine the median of the family has a loss below pre-norm's.",
                "本机用时相同时，该家族的损失（中位数）低于 pre-norm。",
            ),
            lambda rows: median(_gain_in_time(rows, wiring) for wiring in STREAMS),
            limit=0.0,
            unit=NATS,
            name="equal-time",
        ),
        Contrast(
            Words(
                "At equal parameters and steps hyper-connections have a loss below pre-norm's.",
                "参数量与步数相同时，hyper-connections 的损失低于 pre-norm。",
            ),
            lambda rows: _gain(rows, "hyper(n=4)"),
            limit=0.0,
            unit=NATS,
            name="hyper",
        ),
    ),
    modes={
        "quick": Mode(7, 3.5, {"wiring": ("prenorm", *STREAMS)}, {"steps": 60, "rate": 2e-3}),
        "default": Mode(8, 12, settings={"steps": 150, "rate": 2e-3}),
    },
    plots=(
        Plot(
            "dots",
            Words("Validation loss at equal parameters and steps", "参数量与步数相同时的验证损失"),
            x="wiring", y="loss", only={"length": 1.0},
        ),
        Plot(
            "lines",
            Words("Pre-norm's loss by length of training", "pre-norm 的损失与训练长度"),
            x="length", y="loss", log_x=True, only={"wiring": "prenorm"},
            x_title=Words("steps, in those of the others", "步数（以其余各组为 1）"),
        ),
        Plot("dots", Words("Training time", "训练用时"), x="wiring", y="minutes", only={"length": 1.0}),
    ),
    published=(
        Published(
            Words(
                "OLMo-1B, 500B tokens: training loss lower than pre-norm's with dynamic hyper-connections",
                "OLMo-1B、5000 亿词元：动态 hyper-connections 的训练损失低于 pre-norm",
            ),
            Words("text and Table 1", "正文与表 1"),
            "Zhu et al. 2024 (arXiv:2409.19606)",
        ),
    ),
    heavy=True,
)  # fmt: skip
