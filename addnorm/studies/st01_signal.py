"""ST-01 Signals and gradients over depth at the start: what vanishes, what explodes, what stays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from addnorm.models.mlp import MLP
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

DEPTHS = (20, 56, 100)  # layers, each act(N(W x + b)) with or without a skip of its own
SIGMOID = {"activation": "sigmoid", "start": "xavier"}
HE = {"start": "he"}
# What stands inside a layer, by kind of network and name; what is not said is a ReLU, no norm.
NETS: dict[str, dict[str, dict[str, str]]] = {
    "plain": {
        "sigmoid": {"wiring": "plain", **SIGMOID},
        "tanh": {"wiring": "plain", "activation": "tanh", "start": "xavier"},
        "default": {"wiring": "plain", "start": "torch"},
        "he": {"wiring": "plain", **HE},
        "layernorm": {"wiring": "plain", "inner_norm": "layernorm", **HE},
        "batchnorm": {"wiring": "plain", "inner_norm": "batchnorm", **HE},
    },
    "residual": {
        "sigmoid": {"wiring": "residual", **SIGMOID},
        "default": {"wiring": "residual", "start": "torch"},
        "he": {"wiring": "residual", **HE},
        "batchnorm": {"wiring": "residual", "inner_norm": "batchnorm", **HE},
        "prenorm": {"wiring": "prenorm", **HE},  # x + F(N(x))
        "stable": {"wiring": "stable", **HE},  # x + F(N(x)) / sqrt(L)
        "completep": {"wiring": "completep(base_depth=1)", **HE},  # x + F(N(x)) / L
        "rezero": {"wiring": "rezero", **HE},  # x + 0 F(x)
    },
}
UNSCALED = ("default", "he")
TAMED = ("prenorm", "stable", "completep", "rezero")
BATCHNORM = math.pi / (math.pi - 1)  # growth of the squared gradient a layer, Yang et al. 2019


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Send one batch of digits through a network at its start and its gradient back, in float64.

    In float32 the gradient of 56 sigmoid layers is 0.
    """
    x, y = (torch.from_numpy(a) for a in bench.digits().training_batch(cell["seed"], 0, 128))
    trace = xray(_model(cell).double(), x.double(), y, loss=F.cross_entropy)
    last = trace.connections[-1]
    stream = [c.stream_before for c in trace.connections] + [last.stream_after]
    gradient = [c.gradient_before for c in trace.connections] + [last.gradient_after]
    return {
        "ratio": gradient[0] / gradient[-1],
        "signal": stream[-1] / stream[0],
        "gradients": [g / gradient[-1] for g in gradient],
        "signals": [s / stream[0] for s in stream],
    }


def _model(cell: Mapping[str, Any]) -> MLP:
    settings = dict(NETS[cell["wiring"]][cell["layer"]])
    return bench.mlp(cell["seed"], cell["depth"], settings.pop("wiring"), **settings)


def _per_layer(wiring: str, layer: str, depth: int = 56) -> Callable[[Rows], float]:
    """Return log10 of what a layer multiplies the gradient by on its way back, on average."""
    return lambda rows: (
        math.log10(rows.value("ratio", wiring=wiring, layer=layer, depth=depth)) / depth
    )


def _all(wiring: str, layers: tuple[str, ...], depth: int) -> Callable[[Rows], list[float]]:
    """Return log10 of the gradient at the input over that at the output of some networks."""
    return lambda rows: [
        math.log10(rows.value("ratio", wiring=wiring, layer=layer, depth=depth)) for layer in layers
    ]


def _often(rows: Rows) -> float:
    """Return the share of plain nets whose gradient changes more than tenfold over 100 layers."""
    decades = _all("plain", tuple(NETS["plain"]), 100)(rows)
    return sum(abs(d) > 1 for d in decades) / len(decades)


PER_LAYER = Words("powers of ten a layer", "个数量级（每层）")
DECADES = Words("powers of ten", "个数量级")

STUDY = Study(
    id="ST-01",
    name="signal",
    title=Words("Signals and gradients at the start", "初始时的信号与梯度"),
    question=Words(
        "Which deep networks lose their gradient at the start, in which does it explode, and what does the "
        "shortcut change of that?",
        "初始时，哪些深层网络的梯度会消失，哪些会爆炸？捷径改变了什么？",
    ),
    design=Words(
        "Networks of 20, 56 and 100 layers, 64 wide, before any training. A batch of 128 digits goes "
        "forward and the gradient of its loss back. Plain: sigmoid and tanh with Xavier's start, ReLU with "
        "PyTorch's default start, with He's, and with He's and LayerNorm or BatchNorm in every layer. "
        "Residual, a skip over every layer: the same branches, but for tanh and LayerNorm; then a norm "
        "in front of the branch (prenorm), the same with the branch times 1/√L (stable) or 1/L (completep), and, "
        "without a norm, a gate at 0 (rezero). The gradient "
        "ratio is the RMS of the gradient at the input end over that at the output end.",
        "20、56、100 层网络，宽 64，未经训练。128 张数字图像前向通过，损失的梯度反向传回。普通网络：sigmoid 与 tanh"
        "（Xavier 初始化）、ReLU（PyTorch 默认初始化、He 初始化，以及 He 加每层 LayerNorm 或 BatchNorm）。"
        "残差网络（每层一条捷径）：同样的分支（tanh 与 LayerNorm 除外）；分支前加归一化（prenorm），再乘 1/√L（stable）或 1/L（completep），"
        "以及门控初值为 0（rezero）。梯度比指输入端与输出端梯度均方根之比。",
    ),
    controls=Words(
        "Everything is computed in float64: in float32 the gradient of 56 sigmoid layers is exactly 0. With "
        "one seed all networks see the same images, and those of one start the same numbers.",
        "全部以 float64 计算：float32 下 56 层 sigmoid 的梯度恰为 0。同一种子下图像相同，同一种初始化的随机数也相同。",
    ),
    lesson=Words(
        "Plain networks often lose their gradient, or let it explode, as they get deeper: at 100 layers at "
        "least four of these six. But depth alone does not decide it: start, activation and norm together make "
        "the factor of each layer. On its way back through a plain layer the gradient is multiplied by 0.23 "
        "(sigmoid), 0.41 (ReLU, default start), 0.99 (ReLU, He's start) or 1.21 (with BatchNorm: it explodes): with "
        "ReLU 0.68 is left after 56 layers, or 10^-22, by the start alone. "
        "A shortcut keeps gradients from vanishing and does not keep them from exploding: 1.2 a layer with the "
        "default start, 1.6 with He's, which is 10^12 over 56 layers. A norm in front of the branch (about 20 "
        "over 100 layers), better with a scale added (1.5 or 1), or a gate at 0 prevents that. Gradients flow well from the start "
        "of training in such networks, not in every residual one.",
        "普通网络加深后，梯度常常消失或爆炸：100 层时，这六种中至少有四种如此。但起决定作用的不只是深度：初始化、激活函数与归一化"
        "共同决定每层的因子。梯度往回经过一层普通网络，被乘以 0.23（sigmoid）、"
        "0.41（ReLU，默认初始化）、0.99（ReLU，He 初始化）或 1.21（加 BatchNorm，会爆炸）。捷径能防止梯度消失，却防不住"
        "爆炸：默认初始化每层 1.2，He 初始化每层 1.6，56 层就是 10^12。分支前加归一化（100 层约 20 倍）、再加缩放"
        "（1.5 倍或 1 倍）或门控从 0 开始才能避免。训练初期梯度流动良好的是这些网络，而不是一切残差网络。",
    ),
    claims=(
        Claim("0.1", "000", 22, Words(
            "As networks get deeper, their gradients often vanish or explode.",
            "网络层数增加时，常会出现梯度消失或梯度爆炸。",
        ), by="often"),
        Claim("0.4", "000", 42, Words(
            "With ReLU, whose derivative is below 1 in some regions, gradients decay exponentially with depth "
            "(here: whatever the start).",
            "ReLU 的导数在部分区域小于 1，梯度因此随层数指数衰减（此处指：无论怎样初始化）。",
        ), by="relu-holds", stands=False),
        Claim("0.4b", "000", 42, Words(
            "With sigmoid, whose derivative is below 1, gradients decay exponentially with depth.",
            "Sigmoid 的导数小于 1，梯度因此随层数指数衰减。",
        ), by="sigmoid-vanishes"),
        Claim("0.8", "000", 71, Words(
            "With shortcuts the gradient flows well from the start of training.",
            "有了捷径，训练初期梯度流动就良好。",
        ), stands=False),
        Claim("1.42", "001", 280, Words(
            "Shortcuts relieve vanishing gradients at the root (here: at the start of training).",
            "捷径从根本上缓解梯度消失（此处看训练开始时）。",
        ), by="no-vanishing"),
        Claim("2.2", "002", 19, Words("Shortcuts avoid exploding gradients.", "捷径避免梯度爆炸。"),
              stands=False),
        Claim("2.2b", "002", 19, Words("Shortcuts avoid vanishing gradients.", "捷径避免梯度消失。"),
              by="no-vanishing"),
        Claim("4.1", "004", 9, Words(
            "Residual connections solve exploding gradients.", "残差连接解决梯度爆炸。",
        ), stands=False),
        Claim("4.1b", "004", 9, Words(
            "Residual connections solve vanishing gradients.", "残差连接解决梯度消失。",
        ), by="no-vanishing"),
    ),
    factors={
        "wiring": tuple(NETS),
        "layer": tuple(dict.fromkeys(layer for nets in NETS.values() for layer in nets)),
        "depth": DEPTHS,
    },
    measure=measure,
    metrics={
        "ratio": Metric(Words("gradient at the input over that at the output", "输入端与输出端梯度之比")),
        "signal": Metric(Words("RMS of the stream at the end over that at the input", "末端与输入处信号均方根之比")),
        "gradients": Metric(Words("gradient over that at the output", "各处梯度与输出端之比")),
        "signals": Metric(Words("RMS of the stream over that of the input", "各处信号均方根与输入之比")),
    },
    primary=Contrast(
        Words(
            "Without a norm or a scale the gradient of a residual ReLU network grows by more than a tenth a "
            "layer, over 56 layers, with He's start and with PyTorch's.",
            "没有归一化或缩放时，56 层残差 ReLU 网络的梯度每层增长超过十分之一，He 初始化与 PyTorch 默认初始化都是如此。",
        ),
        lambda rows: min(_all("residual", UNSCALED, 56)(rows)) / 56,
        limit=math.log10(1.1),
        unit=PER_LAYER,
    ),
    secondary=(
        Contrast(
            Words(
                "With a norm in front of the branch, a scale on it, or a gate at 0 the gradient changes less "
                "than a hundredfold over 100 layers.",
                "分支前有归一化、分支带缩放、或门控初值为 0 时，100 层的梯度变化不到一百倍。",
            ),
            lambda rows: max(abs(d) for d in _all("residual", TAMED, 100)(rows)),
            limit=2.0, rule="below", unit=DECADES, name="tamed",
        ),
        Contrast(
            Words(
                "With a shortcut over every layer the gradient does not vanish, be it sigmoid, ReLU with either "
                "start, or BatchNorm: over 56 layers that at the input is no smaller than that at the output.",
                "每层有捷径时，无论 sigmoid、两种初始化的 ReLU 还是加 BatchNorm，梯度都不消失：56 层网络输入端的梯度不小于输出端。",
            ),
            lambda rows: min(_all("residual", ("sigmoid", *UNSCALED, "batchnorm"), 56)(rows)),
            limit=0.0, unit=DECADES, name="no-vanishing",
        ),
        Contrast(
            Words(
                "Over 100 layers the gradient of more than half of the six plain networks shrinks or grows "
                "more than tenfold.",
                "六种普通网络中，半数以上的梯度在 100 层间缩小到十分之一以下或增大十倍以上。",
            ),
            _often,
            limit=0.5, unit=Words("share of the networks", "网络占比"), name="often",
        ),
        Contrast(
            Words(
                "The gradient of a plain sigmoid network shrinks at each layer to less than a quarter, the "
                "largest derivative of the sigmoid.",
                "普通 sigmoid 网络的梯度每层缩小到四分之一（sigmoid 导数的最大值）以下。",
            ),
            _per_layer("plain", "sigmoid"),
            limit=math.log10(0.25), rule="below", unit=PER_LAYER, name="sigmoid-vanishes",
        ),
        Contrast(
            Words(
                "The gradient of a plain ReLU network with He's start loses less than 5 % a layer, though the "
                "derivative of ReLU is never above 1.",
                "ReLU 的导数从不超过 1，但 He 初始化的普通 ReLU 网络每层梯度损失不到 5%。",
            ),
            _per_layer("plain", "he"),
            limit=math.log10(0.95), unit=PER_LAYER, name="relu-holds",
        ),
        Contrast(
            Words(
                "Of the same plain ReLU network the start decides: with He's a layer lets more than twice as "
                "much of the gradient through as with PyTorch's default.",
                "同样的普通 ReLU 网络，结果取决于初始化：He 初始化每层传回的梯度是 PyTorch 默认初始化的两倍以上。",
            ),
            lambda rows: _per_layer("plain", "he")(rows) - _per_layer("plain", "default")(rows),
            limit=math.log10(2), unit=PER_LAYER, name="start-decides",
        ),
        Contrast(
            Words(
                "With BatchNorm and no shortcut the squared gradient grows by π/(π − 1) = 1.467 a layer, to 2 %.",
                "有 BatchNorm 而无捷径时，梯度平方每层增长 π/(π − 1) = 1.467 倍，误差不超过 2%。",
            ),
            lambda rows: 10 ** (2 * _per_layer("plain", "batchnorm", 100)(rows)) / BATCHNORM - 1,
            limit=0.02, rule="within", unit=Words("relative deviation", "相对偏差"), name="batchnorm-law",
        ),
    ),
    modes={
        "quick": Mode(9, 0.5, {"depth": (56, 100)}),
        "default": Mode(10, 0.5),
        "long": Mode(10, 1.7, {"depth": (10, 20, 56, 100, 200)}),
    },
    plots=(
        Plot(
            "lines", Words("Gradient at the input over that at the output", "输入端与输出端梯度之比"),
            x="depth", y="ratio", color="layer", facet="wiring", log_y=True,
            x_title=Words("layers", "层数"), reference=1.0, reference_title=Words("equal", "相等"),
        ),
        Plot(
            "profile", Words("Gradient over depth, 56 layers with shortcuts", "56 层有捷径的网络各处的梯度"),
            x="", y="gradients", color="layer", log_y=True,
            x_title=Words("layers from the input", "自输入端起的层数"),
            only={"depth": 56, "wiring": "residual"},
        ),
        Plot(
            "profile", Words("Gradient over depth, 56 plain layers", "56 层普通网络各处的梯度"),
            x="", y="gradients", color="layer", log_y=True,
            x_title=Words("layers from the input", "自输入端起的层数"),
            only={"depth": 56, "wiring": "plain"},
        ),
        Plot(
            "profile",
            Words("RMS of the stream over depth, 56 layers with shortcuts", "56 层有捷径的网络各处信号的均方根"),
            x="", y="signals", color="layer", log_y=True,
            x_title=Words("layers from the input", "自输入端起的层数"),
            only={"depth": 56, "wiring": "residual"},
        ),
    ),
    published=(
        Published(
            Words("Growth of the squared gradient a layer, plain ReLU networks with BatchNorm, in theory",
                  "加 BatchNorm 的普通 ReLU 网络，梯度平方每层的增长倍数（理论）"),
            "π/(π − 1) = 1.467",
            "Yang et al. 2019 (arXiv:1902.08129)",
        ),
    ),
    skip=lambda cell: cell["layer"] not in NETS[cell["wiring"]],
    relied=True,
)  # fmt: skip
