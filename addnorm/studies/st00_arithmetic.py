"""ST-00 Arithmetic: the sums, labels and counts that the documents print, computed again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from addnorm.branches import Branch, Context
from addnorm.contract import Stack
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

LAYERS = 56
# What a layer multiplies the gradient by, and how it comes about: the slope of F and the wiring.
CHAINS = {"0.9": (0.9, "plain"), "0.1": (0.1, "plain"), "0.1 + 1": (0.1, "residual")}
# Printed powers: base, exponent, what is printed, in units of what. 001:52, 53, 156 and 157.
POWERS = (
    (0.9, 20, 0.12, 0.01),
    (0.9, 56, 0.003, 0.001),
    (0.1, 10, 1e-10, 1e-10),
    (1.1, 10, 2.59, 0.01),
)
# Printed labels of the diagram at 001:58-61: percent, and layers back from the output of 56. "The
# first few layers" are taken as the first five.
LABELS = ((100, 0), (12, 28), (3, 51), (0, 56))
# The table at 001:186-189: printed error in percent, length of the bar.
ERRORS = ((16.4, 16), (7.3, 7), (6.7, 6), (3.57, 4))
SHORTEST = 7  # the path of 001:264 that is called the shallowest, counted from 1
BLOCKS = 54  # of the ResNet-110 of Veit et al. 2016


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Compute everything; the powers along the chain by autograd through a stack one unit wide."""
    paths = [sum(taken) for taken in itertools.product((1, 0), repeat=3)]  # in the printed order
    lengths = [math.comb(BLOCKS, k) / 2**BLOCKS for k in range(BLOCKS + 1)]
    slope, wiring = CHAINS[cell["chain"]]
    return {
        "left": _gradients(slope, wiring),
        "power": max(_half_units(base**n, shown, unit) for base, n, shown, unit in POWERS),
        "label": max(_half_units(100 * 0.9**back, shown, 1) for shown, back in LABELS),
        "at12": math.log(0.12) / math.log(0.9),
        "at3": math.log(0.03) / math.log(0.9),
        "paths": len(paths),
        "shorter": sum(length <= paths[SHORTEST - 1] for length in paths) - 1,
        "bars": min(
            max(abs(bar - rule(shown)) for shown, bar in ERRORS)
            for rule in (round, math.floor, math.ceil)
        ),
        "lengths": lengths,
        "middle": sum(lengths[19:36]),
        "short": sum(lengths[5:18]),
        "hundred": 1.1**100,
        "scaled": (1 + 0.1 / 1000) ** 1000,
    }


class Slope(Branch):
    """F(x) = slope x."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the update of `x (..., 1)`."""
        return self.slope * x


def _gradients(slope: float, wiring: str) -> list[float]:
    """Return dy/dx from the output of a stack one unit wide back through 0, 1 ... `LAYERS` layers."""
    streams = [torch.ones(1, dtype=torch.float64, requires_grad=True)]
    for connection in Stack([Slope(slope) for _ in range(LAYERS)], wiring, dim=1):
        streams.append(connection(streams[-1], Context()))
    return [float(g) for g in reversed(torch.autograd.grad(streams[-1], streams))]


def _half_units(value: float, shown: float, unit: float) -> float:
    """Return by how many half units of its last place a printed number is off: 1 still rounds."""
    return abs(value - shown) / (unit / 2)


def _chain(rows: Rows) -> float:
    """Return the largest relative error of base^n against the gradient through n layers."""
    worst = 0.0
    for name, base in (("0.9", 0.9), ("0.1", 0.1), ("0.1 + 1", 1.1)):
        left = rows.value("left", chain=name)
        worst = max(worst, *(abs(g / base**n - 1) for n, g in enumerate(left)))
    return worst


def _one(metric: str, target: float = 0.0) -> Callable[[Rows], float]:
    return lambda rows: float(rows.value(metric, chain="0.9")) - target


HALF_UNITS = Words("half units of the last place", "个末位半单位")

STUDY = Study(
    id="ST-00",
    name="arithmetic",
    title=Words("The documents' arithmetic", "文档中的算术"),
    question=Words(
        "Are the powers, labels, bars and counts right that the documents print?",
        "文档里写出的幂、标签、条形与路径数算得对吗？",
    ),
    design=Words(
        "Every number of document 001 that can be computed is computed: 0.9^20, 0.9^56, 0.1^10 and 1.1^10, "
        "also as gradients through a stack of layers one unit wide; the labels of its diagram of the "
        "gradient; the eight paths through three blocks and their lengths; the bars of its table of ImageNet "
        "errors. A printed number is right when the computed one rounds to it.",
        "文档 001 中凡能计算的数都重算一遍：0.9^20、0.9^56、0.1^10、1.1^10（并用宽为 1 的层堆叠求出梯度核对）；"
        "梯度示意图的标签；三个残差块的八条路径及其长度；ImageNet 错误率表的条长。算得的数四舍五入后等于所写的数，就算正确。",
    ),
    controls=Words(
        "Nothing is trained and nothing is random: one seed is enough, and a statement holds or does not. "
        "The first few layers, where the diagram puts 3 %, are taken as the first five. Whether the errors of "
        "the table (16.4, 7.3, 6.7 and 3.57 %) are those of the competition is a matter of sources, which no "
        "computation decides: the published ones are given below, without a verdict.",
        "没有训练，也没有随机性：一个种子即可，命题要么成立要么不成立。示意图中标 3% 的“前几层”取为前五层。"
        "表中的错误率（16.4%、7.3%、6.7%、3.57%）是否就是比赛结果，要查文献，无法计算：下面列出文献数值，不作判定。",
    ),
    lesson=Words(
        "The powers and the number of paths are right. Two of the diagram's labels are not: with 0.9 a layer 12 % "
        "is left after 20 layers and 3 % after 33, so it is 5 % in the middle of 56 and less than 1 % in the "
        "first few; the 0 % at the input (0.27 %) is right. Three other paths are as short as the one called "
        "shallowest, or shorter. And the power of 1.1 that looks harmless after 10 layers is 13,781 after 100.",
        "幂与路径数没有错。示意图有两个标签不对：每层 0.9 时，20 层之后剩 12%，33 层之后剩 3%，因此 56 层的中间是 5%，前几层不到 1%；"
        "输入端的 0%（0.27%）没错。所谓“最浅”的路径，另有三条与它一样短或更短。而 1.1 的幂在 10 层时看似无害，100 层时已是 13781。",
    ),
    claims=(
        Claim("1.11", "001", 44, Words(
            "The gradient is the product of the layers' derivatives; where they are below 1 it decays "
            "exponentially.",
            "梯度是各层导数之积；导数都小于 1 时指数衰减。",
        ), by="chain"),
        Claim("1.12", "001", 52, Words(
            "0.9^20 is about 0.12, and 0.9^56 about 0.003.", "0.9^20 约为 0.12，0.9^56 约为 0.003。",
        )),
        Claim("1.14", "001", 58, Words(
            "Of the gradient 12 % is left in the middle layers, 3 % in the first few and 0 % at the input (here: "
            "with the 0.9 a layer and the 56 layers of lines 50 to 53).",
            "梯度在中间层剩 12%，前几层剩 3%，靠近输入处为 0%（此处按第 50 至 53 行的每层 0.9、56 层）。",
        ), by="labels"),
        Claim("1.24", "001", 156, Words(
            "0.1^10 is 0.0000000001, and 1.1^10 about 2.59.", "0.1^10 为 0.0000000001，1.1^10 约为 2.59。",
        )),
        Claim("1.31", "001", 186, Words(
            "Bars of 16, 7, 6 and 4 signs show these errors.", "16、7、6、4 格的条形表示这些错误率。",
        ), by="bars"),
        Claim("1.37", "001", 253, Words(
            "n blocks make 2^n paths, three of them 8.", "n 个块有 2^n 条路径，三个块 8 条。",
        ), by="paths"),
        Claim("1.38", "001", 264, Words(
            "The seventh path, through the third block alone, is the shallowest.",
            "第七条路径（只经过第三个块）是最浅的路径。",
        ), by="shallowest"),
    ),
    factors={"chain": tuple(CHAINS)},
    measure=measure,
    metrics={
        "left": Metric(Words("gradient left", "剩余梯度")),
        "power": Metric(Words("error of the printed powers", "所写幂的误差"), HALF_UNITS),
        "label": Metric(Words("error of the diagram's labels", "示意图标签的误差"), HALF_UNITS),
        "at12": Metric(Words("layers after which 12 % is left", "剩 12% 时的层数"), Words("layers", "层")),
        "at3": Metric(Words("layers after which 3 % is left", "剩 3% 时的层数"), Words("layers", "层")),
        "paths": Metric(Words("paths through three blocks", "三个块的路径数")),
        "shorter": Metric(Words("other paths as short as the seventh", "不长于第七条的其他路径数")),
        "bars": Metric(Words("error of the bars under the best rule of rounding", "最合适取整规则下条长的误差"),
                       Words("signs", "格")),
        "lengths": Metric(Words("share of the paths through 54 blocks", "54 个块的路径占比")),
        "middle": Metric(Words("share of paths of 19 to 35 blocks", "长度 19 至 35 的路径占比")),
        "short": Metric(Words("share of paths of 5 to 17 blocks", "长度 5 至 17 的路径占比")),
        "hundred": Metric(Words("1.1^100", "1.1^100")),
        "scaled": Metric(Words("(1 + 0.1 / 1000)^1000", "(1 + 0.1 / 1000)^1000")),
    },
    primary=Contrast(
        Words(
            "The printed powers of 0.9, 0.1 and 1.1 are right to their last place.",
            "所写的 0.9、0.1、1.1 的幂，末位都正确。",
        ),
        _one("power"), limit=1, rule="exact", unit=HALF_UNITS,
    ),
    secondary=(
        Contrast(
            Words("Autograd through n layers gives these powers: 0.9^n, 0.1^n, and 1.1^n with a shortcut.",
                  "对 n 层自动求导恰得这些幂：0.9^n、0.1^n，有捷径时为 1.1^n。"),
            _chain, limit=1e-12, rule="exact", unit=Words("relative error", "相对误差"), name="chain",
        ),
        Contrast(
            Words("The labels of the diagram stand where a factor of 0.9 puts them in 56 layers.",
                  "示意图的标签与 56 层、每层 0.9 的位置相符。"),
            _one("label"), limit=1, rule="exact", unit=HALF_UNITS, name="labels",
        ),
        Contrast(
            Words("Three blocks have 8 paths.", "三个块有 8 条路径。"),
            _one("paths", 8), limit=0, rule="exact", unit=Words("paths", "条"), name="paths",
        ),
        Contrast(
            Words("No other path is as short as the seventh, or shorter.", "没有其他路径与第七条一样短或更短。"),
            _one("shorter"), limit=0, rule="exact", unit=Words("paths", "条"), name="shallowest",
        ),
        Contrast(
            Words("The bars follow one rule of rounding.", "条长遵循同一种取整规则。"),
            _one("bars"), limit=0, rule="exact", unit=Words("signs", "格"), name="bars",
        ),
        Contrast(
            Words("Of the 2^54 paths through 54 blocks 0.45 % have 5 to 17 blocks.",
                  "54 个块的 2^54 条路径中，长度 5 至 17 的占 0.45%。"),
            lambda rows: _half_units(100 * rows.value("short", chain="0.9"), 0.45, 0.01),
            limit=1, rule="exact", unit=HALF_UNITS, name="binomial",
        ),
        Contrast(
            Words("1.1 a layer gives 13,781 after 100 layers.", "每层 1.1，100 层之后为 13781。"),
            lambda rows: _half_units(rows.value("hundred", chain="0.9"), 13781, 1),
            limit=1, rule="exact", unit=HALF_UNITS, name="hundred",
        ),
        Contrast(
            Words("With the branch divided by the number of layers it is 1.105, after 1,000 layers too.",
                  "把分支除以层数，则 1000 层之后也只有 1.105。"),
            lambda rows: _half_units(rows.value("scaled", chain="0.9"), 1.105, 0.001),
            limit=1, rule="exact", unit=HALF_UNITS, name="scaled",
        ),
    ),
    modes={"quick": Mode(1, 0.1), "default": Mode(1, 0.1)},
    plots=(
        Plot(
            "profile", Words("Gradient left with 0.9 a layer", "每层 0.9 时剩余的梯度"),
            x="", y="left", log_y=True, x_title=Words("layers back from the output", "自输出端往回的层数"),
            reference=0.03, reference_title=Words("3 %", "3%"), only={"chain": "0.9"},
        ),
        Plot(
            "profile", Words("Gradient left with 0.9, 0.1, and 0.1 + 1 a layer", "每层 0.9、0.1、0.1 + 1 时剩余的梯度"),
            x="", y="left", color="chain", log_y=True, x_title=Words("layers back from the output", "自输出端往回的层数"),
        ),
        Plot(
            "profile", Words("Paths through 54 blocks by their length", "54 个块的路径按长度的分布"),
            x="", y="lengths", x_title=Words("blocks that the path passes", "路径经过的块数"),
            only={"chain": "0.9"},
        ),
    ),
    published=(
        Published(
            Words("Share of paths of 5 to 17 blocks in ResNet-110, from which most gradient comes",
                  "ResNet-110 中长度 5 至 17 的路径占比，梯度大多来自它们"),
            "0.45 %", "Veit et al. 2016 (arXiv:1605.06431)",
        ),
        Published(
            Words("Top-5 error of the entry that won ILSVRC-2012", "ILSVRC-2012 夺冠方案的 Top-5 错误率"),
            "15.3 %", "Krizhevsky et al. 2012, abstract",
        ),
        Published(
            Words("Top-5 test errors of VGG, GoogLeNet and ResNet, ensembles all",
                  "VGG、GoogLeNet、ResNet 的 Top-5 测试错误率，均为集成"),
            "7.32, 6.66, 3.57 %", "He et al. 2015 (arXiv:1512.03385), Table 5",
        ),
    ),
)  # fmt: skip
