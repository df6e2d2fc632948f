"""ST-25 Layers as painters: skip, swap, reverse, shuffle, parallelise or repeat middle layers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from addnorm.branches import Context
from addnorm.models.gpt import GPT
from addnorm.probe.lesion import lesions
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
CHANGED = (2, 4, 6, 8, 10)  # layers in the middle that are changed
DRAWS = 8  # random orders
WIRINGS = {"pre-norm": "prenorm", "post-norm": "postnorm"}
Layer = Sequence[nn.Module]  # its two connections


class SideBySide(nn.Module):
    """The mean of what several layers make of one stream."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(layer) for layer in layers)

    def forward(self, stream: Tensor, context: Context) -> Tensor:
        """Return the mean of the streams `(B, T, D)` that leave the layers."""
        left = []
        for layer in self.layers:
            one = stream
            for connection in layer.children():
                one = connection(one, context)
            left.append(one)
        return torch.stack(left).mean(0)


def arrangements(layers: Sequence[Layer], changed: int, seed: int) -> dict[str, list[list[Layer]]]:
    """Return by name the ways to run the middle `changed` layers otherwise (Sun et al. 2024).

    Each is the whole list of layers; there are several for a random order.
    """
    edge = (len(layers) - changed) // 2
    first, middle, last = layers[:edge], layers[edge:-edge], layers[-edge:]
    draw = random.Random(seed)
    shuffled = [draw.sample(middle, changed) for _ in range(DRAWS)]
    centre = middle[changed // 2]
    made: dict[str, list[Sequence[Layer]]] = {
        "skip": [[]],
        "random": list(shuffled),
        "reverse": [middle[::-1]],
        "parallel": [[[SideBySide(middle)]]],
        "repeat": [[centre] * changed],
    }
    return {name: [[*first, *way, *last] for way in ways] for name, ways in made.items()}


@torch.no_grad()
def loss_as(model: GPT, layers: Sequence[Layer], x: Tensor, y: Tensor) -> float:
    """Return the loss in nats of the model with these layers in place of its own."""
    own = model.stack.connections
    try:
        model.stack.connections = nn.ModuleList(c for layer in layers for c in layer)
        return bench.loss_on(model, x, y)[0]
    finally:
        model.stack.connections = own


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one GPT and run its layers otherwise: rises of the loss in nats."""
    run = bench.deep_gpt(
        cell["seed"], WIRINGS[cell["wiring"]], cell["steps"], depth=DEPTH, context=CONTEXT
    )
    if run.status != "finished":
        return {"loss": math.nan}
    model = run.model
    assert isinstance(model, GPT)
    x, y = bench.windows(CONTEXT)
    own = list(model.stack)
    layers = [own[i : i + 2] for i in range(0, len(own), 2)]
    clean = loss_as(model, layers, x, y)
    found: dict[str, list[float]] = {}
    for changed in CHANGED:
        for name, ways in arrangements(layers, changed, cell["seed"]).items():
            rises = [loss_as(model, way, x, y) - clean for way in ways]
            found.setdefault(name, []).append(sum(rises) / len(rises))
    single = lesions(
        model, x, y, singles=False, runs=(2,), order="swap", estimate=False, budget=math.inf
    )
    return {
        "loss": run.validation,
        **found,
        "one": single.runs[2][::2],
        "swap": [moved.delta for moved in reversed(single.order)],  # came from the last one on
        "changed": list(CHANGED),
        "layer": list(range(1, DEPTH + 1)),
        "pair": list(range(1, DEPTH)),
    }


def _at(rows: Rows, way: str, wiring: str = "pre-norm", changed: int = 6) -> float:
    """Return the rise of the loss where `changed` layers in the middle run in that way."""
    rises, sizes = (rows.maybe(metric, wiring=wiring) for metric in (way, "changed"))
    known = isinstance(rises, list) and changed in sizes
    return float(rises[sizes.index(changed)]) if known else math.nan


def _more(worse: str, better: str) -> Callable[[Rows], float]:
    return lambda rows: _at(rows, worse) - _at(rows, better)


def _middle(rows: Rows) -> float:
    """Return the most that one missing layer of the middle six costs in pre-norm."""
    rises = rows.maybe("one", wiring="pre-norm")
    return max(rises[3:9]) if isinstance(rises, list) else math.nan


NATS = Words("nats", "nat")

STUDY = Study(
    id="ST-25",
    name="painters",
    title=Words("Layers as painters", "层如画师"),
    question=Words(
        "Do the middle layers of a Transformer need to be there, and do they need their order?",
        "Transformer 的中间层是否缺一不可？次序能否改变？",
    ),
    design=Words(
        "In trained character GPTs of 12 layers, the middle 2, 4, 6, 8 or 10 layers are left out, run in "
        "random order (the mean of eight), in reverse, side by side on the same input with their outputs "
        "averaged, or all replaced by the one at the centre. Each single layer is left out and each pair of "
        "neighbours swapped as well. What counts is the rise of the validation loss, without any retraining.",
        "在训练好的 12 层字符 GPT 中，对中间的 2、4、6、8 或 10 层做如下改动：去除；随机排序（取八次的平均）；"
        "反序；在同一输入上并行运行并对输出取平均；全部换成正中的那一层。此外还逐层去除，并交换每对相邻层。"
        "以验证损失的上升量衡量，不做任何再训练。",
    ),
    controls=Words(
        "All ways of a seed change the same network and are measured on the same 128 windows. Pre-norm and "
        "post-norm networks see the same batches at the same rate (1e-3, a fifth of 500 steps warm-up). The "
        "networks are small and early in their training; the published ones are language models of 32 to 80 "
        "layers.",
        "同一种子的所有改动都作用于同一个网络，并在相同的 128 个窗口上测量。前置与 post-norm 网络的批次与学习率相同"
        "（1e-3，500 步中前五分之一为预热）。这些网络小，且处于训练早期；文献中的是 32 至 80 层的语言模型。",
    ),
    lesson=Words(
        "Two questions: must a layer be there, and must it stand where it stands. In pre-norm the six middle "
        "layers of twelve cost 0.13 nats when they are left out, 0.08 side by side, 0.026 in reverse and 0.010 in "
        "random order: they read and write much the same stream. But they are no independent voters: ten layers "
        "in random order cost 0.11. Repeating the centre layer six times costs as much as leaving the six out. In "
        "post-norm random order costs 0.17 in the median, one seed that hardly trained less, so that the "
        "difference is not decided: how a layer lives with another order is not a matter of the shortcut alone.",
        "两个问题：一层是否必须存在，以及是否必须在原来的位置。pre-norm 十二层中的六个中间层，去掉的代价是 0.13 nat，并列是 0.08，"
        "逆序 0.026，随机次序 0.010：各层读写的残差流大致相同。但它们并不是独立的投票者：十层随机排序的代价是 0.11。把中心层重复六次，"
        "代价与去掉六层相当。post-norm 中随机次序的代价中位数为 0.17，有一个几乎没学会的种子较小，因此差别不能断定：改变次序的影响并不只取决于捷径。",
    ),
    claims=(
        Claim("1.41", "001", 270, Words(
            "Its structure makes it robust as ensembles are (here: any one of the middle layers of a pre-norm GPT "
            "can be left out).",
            "残差网络像集成一样，在结构上天然鲁棒（此处指：pre-norm GPT 的中间层少任何一层都无妨）。",
        ), by="one-missing"),
    ),
    factors={"wiring": tuple(WIRINGS)},
    measure=measure,
    metrics={
        "skip": Metric(Words("rise without the middle layers", "去除中间层后损失的上升"), NATS),
        "random": Metric(Words("rise in random order", "随机次序下损失的上升"), NATS),
        "reverse": Metric(Words("rise in reverse order", "反序时损失的上升"), NATS),
        "parallel": Metric(Words("rise side by side", "并行时损失的上升"), NATS),
        "repeat": Metric(Words("rise with the centre repeated", "重复正中层时损失的上升"), NATS),
        "one": Metric(Words("rise without one layer", "去除一层后损失的上升"), NATS),
        "swap": Metric(Words("rise with neighbours swapped", "交换相邻层后损失的上升"), NATS),
        "loss": Metric(Words("validation loss", "验证损失"), NATS, failed=bench.UNIGRAM),
        "changed": Metric(Words("middle layers changed", "改动的中间层数")),
        "layer": Metric(Words("layer", "层")),
        "pair": Metric(Words("first layer of the pair", "相邻两层中的前一层")),
    },
    primary=Contrast(
        Words(
            "In pre-norm the six middle layers in random order cost less than leaving them out.",
            "pre-norm 中，中间六层随机排序的代价小于去除它们。",
        ),
        _more("skip", "random"),
        limit=0.0,
        unit=NATS,
    ),
    secondary=(
        Contrast(
            Words(
                "Order matters all the same: the ten middle layers in random order cost more than 0.05 nats.",
                "次序仍然重要：中间十层随机排序的代价超过 0.05 nat。",
            ),
            lambda rows: _at(rows, "random", changed=10), limit=0.05, name="order-matters", unit=NATS,
        ),
        Contrast(
            Words(
                "Any one of the six middle layers can be left out for less than 0.05 nats.",
                "中间六层去除任意一层，代价都不到 0.05 nat。",
            ),
            _middle, limit=0.05, rule="below", name="one-missing", unit=NATS,
        ),
        Contrast(
            Words(
                "Side by side the six middle layers cost less than leaving them out.",
                "中间六层并行运行的代价小于去除它们。",
            ),
            _more("skip", "parallel"), limit=0.0, name="parallel", unit=NATS,
        ),
        Contrast(
            Words(
                "Reverse order costs more than random order.",
                "反序的代价大于随机次序。",
            ),
            _more("reverse", "random"), limit=0.0, name="reverse", unit=NATS,
        ),
        Contrast(
            Words(
                "Repeating the centre layer six times costs more than leaving the six out.",
                "把正中层重复六次，代价大于去除这六层。",
            ),
            _more("repeat", "skip"), limit=0.0, name="repeat-worst", unit=NATS,
        ),
        Contrast(
            Words(
                "Random order of the six costs more in post-norm than in pre-norm.",
                "随机排序中间六层的代价，post-norm 大于 pre-norm。",
            ),
            lambda rows: _at(rows, "random", "post-norm") - _at(rows, "random"), limit=0.0,
            name="post-norm", unit=NATS,
        ),
    ),
    modes={
        "quick": Mode(8, 2.3, settings={"steps": 200}),
        "default": Mode(8, 3.7, settings={"steps": 500}),
    },
    plots=(
        Plot(
            "profile", Words("Middle layers in random order", "中间层随机排序"),
            x="changed", y="random", color="wiring",
        ),
        Plot(
            "profile", Words("Middle layers left out", "去除中间层"),
            x="changed", y="skip", color="wiring",
        ),
        Plot(
            "profile", Words("The centre layer repeated", "重复正中层"),
            x="changed", y="repeat", color="wiring",
        ),
        Plot(
            "profile", Words("Neighbours swapped", "交换相邻层"),
            x="pair", y="swap", color="wiring",
        ),
    ),
    published=(
        Published(
            Words(
                "Llama 2 and BERT-large, from the least harm to the most: random order, reverse order, "
                "leaving out; the centre layer repeated is the worst; layers side by side work but for "
                "arithmetic",
                "Llama 2 与 BERT-large，危害由小到大：随机次序、反序、去除；重复正中层最差；除算术题外，并行可行",
            ),
            Words("figures", "见图"),
            "Sun et al. 2024 (arXiv:2407.09298)",
        ),
        Published(
            Words(
                "Top-1 accuracy kept where middle layers are deleted or swapped",
                "删除或交换中间层时保留的 top-1 准确率",
            ),
            Words("72 to 95 %", "72% 至 95%"),
            "Lad et al. 2024 (arXiv:2406.19384)",
        ),
    ),
    heavy=True,
)  # fmt: skip
