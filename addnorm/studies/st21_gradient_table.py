"""ST-21 The gradient table: what the printed gradients of five layers show, and what they do not."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addnorm import twins
from addnorm.models.mlp import MLP, MLPConfig
from addnorm.studies.checks.doc003 import PRINTED
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

SEED, INPUT = 123, (1.0, 0.0, -1.0)  # of document 003; the target is 0
WIRINGS = {"none": "plain", "shortcuts": "residual"}
FORMULAS = {"exact": "gelu", "tanh": "gelu-tanh"}  # of GELU
LISTINGS = {"exact": 0, "tanh": 1}  # the pair of listings that each formula should give
CLOSE = 1e-5  # relative: printed digits against those of another build of torch


def network(cell: Mapping[str, Any]) -> MLP:
    """Return document 003's network, four layers of width 3 and one to a single number."""
    config = MLPConfig(
        3, 3, 1, depth=4, wiring=WIRINGS[cell["net"]], activation=FORMULAS[cell["formula"]],
        head_activation=True, start="torch",
    )  # fmt: skip
    return MLP(config)


def started(model: MLP, seed: int) -> Tensor:
    """Start the network anew and return its output, one number."""
    torch.manual_seed(seed)
    model.reset_parameters()
    y: Tensor = model(torch.tensor([INPUT]))
    return y


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return the printed gradients, and what they are over many starts. Lists over the layers."""
    model = network(cell)
    y = started(model, SEED)
    printed = list(twins.gradients(model, lambda: F.mse_loss(y, torch.zeros_like(y))).values())
    listed = [PRINTED[i][list(WIRINGS).index(cell["net"])] for i in (0, 1)]
    own = LISTINGS[cell["formula"]]
    starts = [_slopes(model, cell["seed"] * cell["starts"] + i) for i in range(cell["starts"])]
    profile = [statistics.median(slopes[i] for slopes, _ in starts) for i in range(len(printed))]
    return {
        "printed": printed,
        "error": _apart(printed, listed[own]),
        "other": _apart(printed, listed[1 - own]),
        "output": abs(float(y.detach())),
        "first": printed[0],
        "last": printed[-1],
        "rises": sum(a > b for a, b in itertools.pairwise(printed)),
        "slopes": [g / (2 * abs(float(y.detach()))) for g in printed],
        "monotone": statistics.fmean(slopes == sorted(slopes) for slopes, _ in starts),
        "ratio": statistics.median(slopes[0] / slopes[-1] for slopes, _ in starts),
        "profile": profile,
        "whole_last": statistics.median(2 * abs(out) * slopes[-1] for slopes, out in starts),
        "twice": _twice(cell),
        "layers": sum(isinstance(m, nn.Linear) for m in model.modules()),
        "activations": sum(isinstance(m, nn.GELU) for m in model.modules()),
        "shortest": 1 + _needed(model),
        "layer": list(range(len(printed))),
    }  # fmt: skip


def _weights(model: MLP) -> list[Tensor]:
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear)]


def _slopes(model: MLP, seed: int) -> tuple[list[float], float]:
    """Return mean |dy/dW| of every layer at a start, which no loss scales, and y itself."""
    y = started(model, seed)
    found = torch.autograd.grad(y.sum(), _weights(model))
    return [g.abs().mean().item() for g in found], y.item()


def _apart(numbers: Sequence[float], listed: Sequence[float]) -> float:
    """Return the largest relative difference."""
    return max(abs(a / b - 1) for a, b in zip(numbers, listed, strict=True))


def _twice(cell: Mapping[str, Any]) -> float:
    """Return by what factor the printed function's second listing differs from its first."""
    model = network(cell)
    started(model, SEED)
    x = torch.tensor([INPUT])

    def loss() -> Tensor:
        y = model(x)
        return F.mse_loss(y, torch.zeros_like(y))

    first, second = (twins.accumulated_gradients(model, loss) for _ in range(2))
    return second["head.weight"] / first["head.weight"]


def _needed(model: MLP) -> int:
    """Return how many of the four inner layers cut the input off when they are silent alone."""
    needed = 0
    for connection in model.stack:
        started(model, SEED)
        for parameter in connection.branch.parameters():
            nn.init.zeros_(parameter)
        x = torch.tensor([INPUT], requires_grad=True)
        (gradient,) = torch.autograd.grad(model(x).sum(), x)
        needed += not gradient.any()
    return needed


# -- what is made of the rows --------------------------------------------------------------------


def _one(metric: str, net: str, formula: str = "exact") -> Callable[[Rows], Any]:
    return lambda rows: rows.value(metric, net=net, formula=formula)


def _gain(metric: str) -> Callable[[Rows], float]:
    """Return log10 of the metric with shortcuts over that without."""

    def effect(rows: Rows) -> float:
        plain, wired = (_one(metric, net)(rows) for net in WIRINGS)
        return math.log10(max(wired, 1e-12) / max(plain, 1e-12))

    return effect


def _product(rows: Rows) -> float:
    """Return how far the gain of layer 0 is from that of 2y times that of dy/dW, relative."""
    gains = [10 ** _gain(name)(rows) for name in ("first", "output")]
    slopes = [_one("slopes", net)(rows)[0] for net in WIRINGS]
    return float(gains[0] / (gains[1] * slopes[1] / slopes[0]) - 1)


def _level(rows: Rows) -> float:
    """Return log10 of the largest over the smallest dy/dW of the four layers with shortcuts."""
    inner = _one("profile", "shortcuts")(rows)[:-1]
    return math.log10(max(inner) / min(inner))


def _smaller(rows: Rows) -> float:
    """Return how many layers with shortcuts have no smaller gradient than the last."""
    *inner, last = _one("printed", "shortcuts")(rows)
    return float(sum(g >= last for g in inner))


def _count(metric: str, net: str, expected: int) -> Callable[[Rows], float]:
    return lambda rows: float(_one(metric, net)(rows) - expected)


def _listing(name: str, net: str, formula: str, en: str, zh: str) -> Contrast:
    return Contrast(
        Words(en, zh), lambda rows: float(_one("error", net, formula)(rows)), limit=CLOSE,
        rule="exact", unit=Words("relative difference", "相对差异"), name=name,
    )  # fmt: skip


STUDY = Study(
    id="ST-21",
    name="gradient-table",
    title=Words("The gradient table", "梯度表"),
    question=Words(
        "What do the printed gradients of a five-layer network with and without shortcuts show?",
        "五层网络有无捷径时打印的梯度说明了什么？",
    ),
    design=Words(
        "The example network of document 003: five layers of Linear and GELU, width 3, at seed 123, "
        "input (1, 0, -1), target 0; with the exact GELU and with its tanh formula. Beside it 1,000 other "
        "starts, 125 for each seed of this study. The printed numbers are gradients of a loss, so they "
        "are also taken apart: dL/dW = 2y · dy/dW, and the first layer is compared with the last.",
        "文档 003 的示例网络：五层 Linear 加 GELU，宽 3，种子 123，输入 (1, 0, -1)，目标 0；分别用精确的 GELU 和 "
        "tanh 近似。另取 1000 个初始化，本实验每个种子 125 个。打印的是损失的梯度，因此还把它拆开：dL/dW = 2y · "
        "dy/dW，并在网络内部比较首层与末层。",
    ),
    controls=Words(
        "With and without shortcuts the weights are the same. dy/dW does not depend on how far the "
        "output is from the target, and first over last layer does not depend on any factor that all "
        "layers share. Nothing is trained: a gradient at the start says nothing of the trained network.",
        "有无捷径时权重相同。dy/dW 与输出离目标多远无关；首层与末层之比不受各层共有的因子影响。不涉及训练：初始化时的"
        "梯度不能说明训练之后的网络。",
    ),
    lesson=Words(
        "The numbers can be reproduced, and the two listings come from two formulas of GELU. The factor of "
        "1,100 between them is not what shortcuts do against vanishing: 12.6 of it is a larger output, and "
        "the last layer gains as well. What is left when the first layer is compared with the last, about a "
        "factor of ten over 1,000 starts, is their effect; and falling step by step is not even the rule "
        "without them. One start of a tiny network shows little: compare ratios, over many.",
        "这些数字可以复现，两组输出来自 GELU 的两种公式。二者相差的 1100 倍并不是捷径防止梯度消失的效果：其中 12.6 倍"
        "是因为输出更大，末层的梯度也同样增大。在网络内部比较首层与末层，1000 个初始化下剩下的约十倍才是捷径的作用；"
        "没有捷径时，逐层变小甚至不是常态。一个小网络的一次初始化说明不了多少：应当比较比值，并且多取样。",
    ),
    claims=(
        Claim("3.1", "003", 101, Words(
            "Without shortcuts the gradients are 0.000202, 0.000120, 0.000715, 0.00140, 0.00505.",
            "没有捷径时梯度为 0.000202、0.000120、0.000715、0.00140、0.00505。",
        ), by="first-none"),
        Claim("3.2", "003", 110, Words(
            "A second listing of the same call has slightly other digits.",
            "同一调用的第二组输出，数字略有不同。",
        ), by="second-none"),
        Claim("3.3", "003", 127, Words(
            "With shortcuts they are 0.222, 0.207, 0.329, 0.267, 1.327.",
            "有捷径时为 0.222、0.207、0.329、0.267、1.327。",
        ), by="first-shortcuts"),
        Claim("3.4", "003", 136, Words(
            "So has the second listing with shortcuts.", "有捷径时的第二组输出也是如此。",
        ), by="second-shortcuts"),
        Claim("3.5", "003", 116, Words(
            "Without shortcuts the gradient becomes smaller at every step from the last layer to the first.",
            "没有捷径时，梯度从末层到首层逐层变小。",
        ), by="falls"),
        Claim("3.6", "003", 143, Words(
            "The rise of the first layer's gradient from 0.0002 to 0.22 is all what shortcuts do against "
            "vanishing.",
            "首层梯度从 0.0002 升到 0.22，全是捷径防止梯度消失的效果。",
        ), by="last-too", stands=False),
        Claim("3.6b", "003", 143, Words(
            "Shortcuts keep the first layer's gradient from vanishing beside the last one's.",
            "捷径使首层梯度相对末层不致消失。",
        )),
        Claim("3.7", "003", 143, Words(
            "With shortcuts the gradient is steady from layer to layer.", "有捷径时各层梯度平稳。",
        ), by="level"),
        Claim("3.8", "003", 142, Words(
            "With shortcuts the last layer still has the largest gradient.",
            "有捷径时，末层的梯度仍然最大。",
        ), by="last-largest"),
        Claim("3.12", "003", 51, Words(
            "The network has five layers, each a linear map and a GELU.",
            "网络有五层，每层由线性变换和 GELU 组成。",
        ), by="five-layers"),
        Claim("3.13", "003", 69, Words(
            "The printed function lists the gradient of the loss whenever it is called.",
            "印出的函数每次调用都列出损失的梯度。",
        ), by="adds-up", stands=False),
        Claim("3.14", "003", 14, Words(
            "Shortcuts make a shorter path through the network.", "捷径形成一条更短的通路。",
        ), by="shorter"),
    ),
    factors={"net": tuple(WIRINGS), "formula": tuple(FORMULAS)},
    measure=measure,
    metrics={
        "printed": Metric(Words("mean |dL/dW| at seed 123", "种子 123 的平均 |dL/dW|")),
        "profile": Metric(Words("mean |dy/dW|, median of starts", "平均 |dy/dW|，各初始化的中位数")),
        "ratio": Metric(Words("first over last layer, median of starts", "首层与末层之比，中位数")),
        "monotone": Metric(Words("starts whose gradient falls at every step", "梯度逐层变小的初始化占比")),
        "error": Metric(Words("distance from the listing of its formula", "与对应输出的相对差异")),
        "other": Metric(Words("distance from the listing of the other formula", "与另一组输出的相对差异")),
        "output": Metric(Words("|y| at seed 123", "种子 123 的 |y|")),
        "first": Metric(Words("mean |dL/dW| of layer 0, seed 123", "第 0 层的平均 |dL/dW|，种子 123")),
        "last": Metric(Words("mean |dL/dW| of layer 4, seed 123", "第 4 层的平均 |dL/dW|，种子 123")),
        "slopes": Metric(Words("mean |dy/dW| at seed 123", "种子 123 的平均 |dy/dW|")),
        "whole_last": Metric(Words("mean |dL/dW| of layer 4, median of starts", "第 4 层的平均 |dL/dW|，中位数")),
        "rises": Metric(Words("steps where the gradient does not fall, seed 123", "种子 123 中未变小的步数")),
        "twice": Metric(Words("second listing over the first", "第二次输出与第一次之比")),
        "layers": Metric(Words("linear layers", "线性层数")),
        "activations": Metric(Words("activations", "激活函数个数")),
        "shortest": Metric(Words("layers on the shortest path", "最短通路上的层数")),
        "layer": Metric(Words("layer", "层")),
    },
    primary=Contrast(
        Words(
            "With shortcuts the first layer's gradient, as a share of the last one's, is at least three "
            "times larger (median of starts).",
            "有捷径时，首层梯度与末层梯度之比至少是没有捷径时的三倍（各初始化的中位数）。",
        ),
        _gain("ratio"),
        limit=math.log10(3),
        unit=Words("powers of ten", "个数量级"),
    ),
    secondary=(
        _listing("first-none", "none", "exact",
                 "The first listing without shortcuts comes from the exact GELU.",
                 "没有捷径的第一组输出来自精确的 GELU。"),
        _listing("second-none", "none", "tanh",
                 "The second listing without shortcuts comes from the tanh formula.",
                 "没有捷径的第二组输出来自 tanh 近似。"),
        _listing("first-shortcuts", "shortcuts", "exact",
                 "The first listing with shortcuts comes from the exact GELU.",
                 "有捷径的第一组输出来自精确的 GELU。"),
        _listing("second-shortcuts", "shortcuts", "tanh",
                 "The second listing with shortcuts comes from the tanh formula.",
                 "有捷径的第二组输出来自 tanh 近似。"),
        Contrast(
            Words("The printed code, which has the exact GELU, does not give the second listing.",
                  "印出的代码用精确的 GELU，得不到第二组输出。"),
            lambda rows: float(sum(_one("other", net)(rows) < CLOSE for net in WIRINGS)),
            limit=0, rule="exact", unit=Words("listings reproduced", "复现的输出组数"), name="two-formulas",
        ),
        Contrast(
            Words("At seed 123 the gradient falls at each of the four steps from layer 4 to layer 0.",
                  "种子 123 时，梯度从第 4 层到第 0 层的四步都变小。"),
            lambda rows: float(_one("rises", "none")(rows)),
            limit=0, rule="exact", unit=Words("steps that rise", "上升的步数"), name="falls",
        ),
        Contrast(
            Words("Without shortcuts it falls at every step in fewer than three quarters of all starts.",
                  "没有捷径时，逐层变小的初始化不到四分之三。"),
            _one("monotone", "none"), limit=0.75, rule="below", unit=Words("share of starts", "初始化占比"),
            name="seldom",
        ),
        Contrast(
            Words(
                "Shortcuts more than double the gradient of the last layer too, behind which nothing can "
                "vanish.",
                "捷径也使末层的梯度增大一倍以上，而末层之后没有可以消失的东西。",
            ),
            _gain("whole_last"), limit=math.log10(2), unit=Words("powers of ten", "个数量级"), name="last-too",
        ),
        Contrast(
            Words("The gain of layer 0 is that of 2y times that of dy/dW.",
                  "第 0 层的增幅等于 2y 的增幅乘以 dy/dW 的增幅。"),
            _product, limit=CLOSE, rule="exact", unit=Words("relative difference", "相对差异"), name="product",
        ),
        Contrast(
            Words("With shortcuts dy/dW of the first four layers differs by less than a factor of two.",
                  "有捷径时，前四层的 dy/dW 相差不到一倍。"),
            _level, limit=math.log10(2), rule="below", unit=Words("powers of ten", "个数量级"), name="level",
        ),
        Contrast(
            Words("With shortcuts, at seed 123, the last layer has the largest gradient.",
                  "种子 123 时，有捷径的网络末层梯度最大。"),
            _smaller, limit=0, rule="exact", unit=Words("layers above it", "超过它的层数"), name="last-largest",
        ),
        Contrast(
            Words("There are five linear layers and five activations.", "有五个线性层和五个激活函数。"),
            lambda rows: max(abs(_count(m, n, 5)(rows)) for m in ("layers", "activations") for n in WIRINGS),
            limit=0, rule="exact", unit=Words("too many", "多出的个数"), name="five-layers",
        ),
        Contrast(
            Words("A second call of the printed function lists twice the gradient.",
                  "第二次调用印出的函数，列出的是梯度的两倍。"),
            lambda rows: float(_one("twice", "none")(rows)) - 2,
            limit=CLOSE, rule="exact", name="adds-up",
        ),
        Contrast(
            Words("The shortest path passes one layer with shortcuts and five without.",
                  "最短通路有捷径时经过一层，没有捷径时经过五层。"),
            lambda rows: abs(_count("shortest", "none", 5)(rows)) + abs(_count("shortest", "shortcuts", 1)(rows)),
            limit=0, rule="exact", unit=Words("layers apart", "相差的层数"), name="shorter",
        ),
    ),
    modes={
        "quick": Mode(8, 0.1, settings={"starts": 60}),
        "default": Mode(8, 0.2, settings={"starts": 125}),
    },
    plots=(
        Plot("profile", Words("The printed gradients, layer 0 to 4", "打印的梯度，第 0 至 4 层"), x="layer",
             y="printed", color="net", facet="formula", log_y=True),
        Plot("profile", Words("The same without the loss, over many starts", "除去损失因子，多个初始化"),
             x="layer", y="profile", color="net", facet="formula", log_y=True),
        Plot("dots", Words("First over last layer", "首层与末层之比"), x="net", y="ratio", color="formula",
             log_y=True),
        Plot("dots", Words("Starts whose gradient falls at every step", "梯度逐层变小的初始化占比"), x="net",
             y="monotone", color="formula"),
    ),
    published=(
        Published(
            Words("mean |gradient| of layers 0 to 4 without shortcuts, and with them",
                  "第 0 至 4 层的平均梯度，无捷径与有捷径"),
            "0.00020, 0.00012, 0.0007, 0.0013, 0.0050; 0.22, 0.20, 0.32, 0.26, 1.32",
            "Raschka 2024, Build a Large Language Model (From Scratch), section 4.4",
        ),
    ),
)  # fmt: skip
