"""ST-13 The babygpt ladder: what each step is worth, and what the skip does with depth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from addnorm.models.babygpt import LADDER
from addnorm.models.gpt import GPT, GPTConfig
from addnorm.studies import bench
from addnorm.studies.frame import (
    Claim,
    Contrast,
    Metric,
    Mode,
    Plot,
    Row,
    Rows,
    Study,
    Words,
)
from addnorm.training.config import BABYGPT

CONTEXT = 8
RATES = (1e-3, 1e-2)  # the ladder's own is 1e-2
PRESETS = {name: f"babygpt-{name}" for name in ("v6", "v7", "v8", "v9")}
NATS = Words("nats", "nat")


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one network of the ladder on the built-in text, as its authors do but shorter."""
    data, steps = bench.text(CONTEXT), cell["steps"]
    torch.manual_seed(cell["seed"])
    settings = {**LADDER[PRESETS[cell["net"]]], "depth": cell["depth"]}
    model = GPT(GPTConfig(**settings, vocab_size=data.vocab_size))
    recipe = BABYGPT | {"eval_every": steps, "eval_batches": 100}
    run = bench.trained(model, data, cell["seed"], **recipe | {"lr": cell["rate"], "steps": steps})
    shown = range(0, len(run.losses) - len(run.losses) % 50, 50)
    finished = run.status == "finished"
    return {
        "loss": min(run.validation, bench.UNIFORM) if finished else math.nan,
        "train": min(run.training_loss, bench.UNIFORM) if finished else math.nan,
        "curve": [float(np.mean(run.losses[i : i + 50])) for i in shown],
        "step": [i + 25 for i in shown],
        "seen": list(range(1, CONTEXT + 1)),
        "position": [
            loss if loss < bench.UNIFORM else bench.UNIFORM for loss in position_losses(model)
        ],
        "parameters": sum(p.numel() for p in model.parameters()),
    }


@torch.no_grad()
def position_losses(model: nn.Module) -> list[float]:
    """Return the validation loss in nats by position `(T,)`; position t has seen t characters."""
    model.eval()
    x, y = bench.windows(CONTEXT, 4096)
    losses = F.cross_entropy(model(x).movedim(-1, 1), y, reduction="none")  # (B, T)
    return [float(loss) for loss in losses.mean(0)]


def _chosen(rows: Rows, net: str, depth: int = 3) -> Row:
    """Return the training with the lowest training loss over the rates."""
    chosen: Row = min(rows.only(net=net, depth=depth), key=lambda row: row["train"])
    return chosen


def _best(rows: Rows, net: str, depth: int = 3) -> float:
    """Return the validation loss of that training; NaN where the mode leaves the rate out."""
    known = len(rows.only(net=net, depth=depth))
    return float(_chosen(rows, net, depth)["loss"]) if known else math.nan


def _gain(rows: Rows, depth: int, rate: float | None = None) -> float:
    """Return by how many nats the skip lowers the loss, v6 to v7, at one or the better rate."""
    chosen = rows if rate is None else rows.only(rate=rate)
    return _best(chosen, "v6", depth) - _best(chosen, "v7", depth)


def _gains(rows: Rows) -> list[float]:
    """Return by how many nats the skip lowers the loss of each position, both at their best."""
    v6, v7 = (_chosen(rows, net)["position"] for net in ("v6", "v7"))
    return [a - b for a, b in zip(v6, v7, strict=True)]


def _far(rows: Rows) -> float:
    """Return what the skip gains at the last two positions beyond the third and fourth, in nats."""
    gains = _gains(rows)
    return sum(gains[6:8]) / 2 - sum(gains[2:4]) / 2


STUDY = Study(
    id="ST-13",
    name="ladder",
    title=Words("The babygpt ladder", "babygpt 的阶梯"),
    question=Words(
        "What is each step of the babygpt ladder worth, and does the skip help because the network is "
        "deep, or because it must remember far back?",
        "babygpt 的每一步各值多少？捷径有用，是因为网络深，还是因为要记住很远的内容？",
    ),
    design=Words(
        "The networks v6 (no skip), v7 (skip), v8 (output matrix of the attention, wider feed-forward) and "
        "v9 (pre-norm) as their authors wrote them, 32 wide over 8 characters and three blocks deep, v6 and "
        "v7 also one and six, at the original rate of 1e-2 and at 1e-3, for 1,000 "
        "steps on the built-in English text. The loss is also taken by position in the window: the first "
        "has seen one character, the last eight.",
        "按原作者的写法构建 v6（无捷径）、v7（捷径）、v8（注意力输出矩阵、更宽的前馈层）、v9（pre-norm），宽 32，"
        "上下文 8 个字符，深 3 块（同原版），v6 与 v7 另取 1 块与 6 块；学习率取原版的 1e-2 与 1e-3，在内置英文文本上各训练 "
        "1000 步。损失还按窗口中的位置分别统计：第一个位置只看到一个字符，最后一个看到八个。",
    ),
    controls=Words(
        "v6 and v7 have the same parameters and start; all see the same batches. Contrasts take for each "
        "network the rate with the lower training loss unless they say otherwise. A loss above that of "
        "uniform guessing counts as that, and so does a training that diverges. The original corpus is Chinese song "
        "lyrics, the original training five times as long.",
        "v6 与 v7 的参数量和初始值相同，所有网络看到的批次相同。除非另有说明，每个网络取两档学习率中训练损失较低的一档。"
        "损失高于均匀猜测的，以及发散的训练，一律按均匀猜测计。"
        "原版语料是宋词，训练步数是这里的五倍。",
    ),
    lesson=Words(
        "With three blocks the skip is worth 0.6 nats at each network's best rate (2.75 to 2.13), with one block "
        "0.05, with six 0.9: v6 gets worse with depth, v7 hardly changes. It has nothing to do with distance in "
        "the text: the gain at the eighth position is that at the third to within 0.01 nats, and there are 0.2 "
        "nats even at the first, where nothing is to be looked back at. Pre-norm (v8 to v9) gives another 0.1. "
        "With 8 characters of context the ladder can say nothing about dependencies that are really far.",
        "三个块时，捷径在各自的最佳学习率下值 0.6 nat（2.75 降到 2.13），一个块时值 0.05，六个块时值 0.9：v6 越深越差，v7 几乎不变。"
        "这与文本中的距离无关：第七、八个位置的收益与第三、四个位置只差 0.01 nat，连无可回顾的第一个位置也有 0.2 nat。pre-norm（v8 到 v9）"
        "再降 0.1。上下文只有 8 个字符，这架阶梯对真正的远距离依赖说明不了什么。",
    ),
    claims=(
        Claim("0.22", "000", 122, Words(
            "With its three blocks the model learns patterns of language thanks to the skip.",
            "三个块的模型靠残差连接学到语言的规律。",
        )),
        Claim("0.2c", "000", 30, Words(
            "A block with x + sa(x) and x + ffwd(x) passes x on (and so learns better than one without x).",
            "块用 x + sa(x) 与 x + ffwd(x) 把 x 传下去（因而比不加 x 的块学得好）。",
        )),
        Claim("0.10", "000", 78, Words(
            "Without the skip information may be lost from block to block, which makes far dependencies "
            "hard to learn (so that the skip is worth most far back).",
            "没有残差连接，信息可能逐块丢失，远距离依赖因而难以学到（也就是说，距离越远，捷径越有用）。",
        ), by="range"),
        Claim("0.17", "000", 97, Words(
            "The norm in front of the sublayers makes the training more stable still (here: its loss lower).",
            "归一化放在子层之前，训练更稳定（此处指损失更低）。",
        ), by="norm"),
        Claim("2.14", "002", 141, Words(
            "A shallow network may train stably without the skip.",
            "较浅的网络没有残差连接也可能训练稳定。",
        ), by="shallow"),
    ),
    factors={"net": tuple(PRESETS), "depth": (1, 3, 6), "rate": RATES},
    skip=lambda cell: cell["net"] in ("v8", "v9") and cell["depth"] != 3,
    measure=measure,
    metrics={
        "loss": Metric(Words("validation loss", "验证损失"), NATS, bench.UNIFORM),
        "train": Metric(Words("training loss, last tenth of the steps", "最后十分之一步数的训练损失"),
                        NATS, bench.UNIFORM),
        "curve": Metric(Words("training loss", "训练损失"), NATS),
        "step": Metric(Words("step", "步数")),
        "seen": Metric(Words("characters seen", "已看到的字符数")),
        "position": Metric(Words("validation loss by position", "各位置的验证损失"), NATS),
        "parameters": Metric(Words("parameters", "参数量")),
    },
    primary=Contrast(
        Words(
            "With the original three blocks the skip (v6 to v7) lowers the loss by at least 0.3 nats.",
            "原版三个块时，捷径（v6 到 v7）使损失至少降低 0.3 nat。",
        ),
        lambda rows: _gain(rows, 3),
        limit=0.3,
        unit=NATS,
    ),
    secondary=(
        Contrast(
            Words(
                "At both rates: the smaller gain of the two exceeds 0.3 nats as well.",
                "两档学习率下都如此：较小的那个降幅也超过 0.3 nat。",
            ),
            lambda rows: min(_gain(rows, 3, rate) for rate in RATES),
            limit=0.3, unit=NATS, name="both-rates",
        ),
        Contrast(
            Words(
                "With one block the skip is worth less than 0.15 nats.",
                "只有一个块时，捷径带来的降幅小于 0.15 nat。",
            ),
            lambda rows: _gain(rows, 1),
            limit=0.15, rule="below", unit=NATS, name="shallow",
        ),
        Contrast(
            Words(
                "With six blocks it is worth at least 0.3 nats more than with one.",
                "六个块时的降幅比一个块时至少多 0.3 nat。",
            ),
            lambda rows: _gain(rows, 6) - _gain(rows, 1),
            limit=0.3, unit=NATS, name="depth",
        ),
        Contrast(
            Words(
                "With three blocks it is worth over 0.1 nats more at the seventh and eighth position than at "
                "the third and fourth.",
                "三个块时，在第七、八个位置上的降幅比第三、四个位置多 0.1 nat 以上。",
            ),
            _far,
            limit=0.1, unit=NATS, name="range",
        ),
        Contrast(
            Words(
                "It is worth more than 0.1 nats at the first position too, where there is no distance at all.",
                "在没有任何距离可言的第一个位置上，捷径也带来超过 0.1 nat 的降幅。",
            ),
            lambda rows: _gains(rows)[0],
            limit=0.1, unit=NATS, name="first-position",
        ),
        Contrast(
            Words(
                "Pre-norm (v8 to v9) lowers the loss by at least 0.05 nats.",
                "pre-norm（v8 到 v9）使损失至少降低 0.05 nat。",
            ),
            lambda rows: _best(rows, "v8") - _best(rows, "v9"),
            limit=0.05, unit=NATS, name="norm",
        ),
    ),
    modes={
        "quick": Mode(8, 1.7, settings={"steps": 300}),
        "default": Mode(8, 4.5, settings={"steps": 1000}),
    },
    plots=(
        Plot(
            "lines", Words("Validation loss by depth", "验证损失与深度"),
            x="depth", y="loss", color="net", facet="rate",
            x_title=Words("blocks", "块数"),
            reference=bench.UNIGRAM,
            reference_title=Words("guessing by frequency", "按字符频率猜测"),
        ),
        Plot(
            "profile", Words("Loss by position, 3 blocks, rate 1e-2", "各位置的损失，3 块，学习率 1e-2"),
            x="seen", y="position", color="net", only={"depth": 3, "rate": 1e-2},
            x_title=Words("characters seen", "已看到的字符数"),
        ),
        Plot(
            "profile", Words("Training, 3 blocks", "训练，3 块"),
            x="step", y="curve", color="net", facet="rate", only={"depth": 3},
            x_title=Words("step", "步"),
        ),
    ),
)  # fmt: skip
