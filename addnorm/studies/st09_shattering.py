"""ST-09 Shattered gradients: is the gradient of a deep network at two near inputs still alike?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from addnorm.models.mlp import MLP, MLPConfig
from addnorm.probe.vitals import xray
from addnorm.probe.whiteness import autocorrelation, whiteness
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

DEPTHS = (1, 4, 10, 24, 50)  # layers W relu(BN(x)); a last BN, ReLU and output follow
WIDTH, POINTS, LAGS = 200, 256, 15  # units, points on [-2, 2], lags: those of the paper
# The same branch W relu(BN(x)) in three wirings, and without its norm; then noise to compare with.
NETS = {
    "plain": "plain(norm=true)",
    "residual": "prenorm",
    "residual-0.1": "layerscale(init=0.1)",
    "unnormalised": "plain",
}
NOISES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "white noise": lambda steps: steps,
    "brown noise": lambda steps: steps.cumsum(0),
}
WHITE = 0.15  # |autocorrelation| at lag 1; white noise of 256 points stays below 0.12 in 95 of 100


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Take the gradient of one network f: R -> R at 256 points, or one noise; nothing is trained."""
    if cell["net"] in NOISES:
        return _noise(cell)
    model = _model(cell)
    line = torch.tensor([[-2.0], [2.0]], dtype=torch.float64)
    found = whiteness(
        model, line, lags=LAGS, points=POINTS, batch_statistics=True, seed=cell["seed"]
    )
    trace = xray(model, torch.linspace(-2, 2, POINTS, dtype=torch.float64)[:, None])
    return {
        "acf": found.autocorrelation,
        "lag1": found.autocorrelation[1],
        "reversals": found.reversals,
        "ratio": trace.connections[0].gradient_before / trace.connections[-1].gradient_after,
    }


def _model(cell: Mapping[str, Any]) -> MLP:
    torch.manual_seed(cell["seed"])
    config = MLPConfig(
        in_dim=1,
        dim=WIDTH,
        out_dim=1,
        depth=cell["depth"],
        wiring=NETS[cell["net"]],
        activation="relu",
        norm="batchnorm",
        start="he",
        preactivation=True,
    )
    return MLP(config).double()


def _noise(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a noise of as many points gives."""
    steps = torch.randn(POINTS, dtype=torch.float64, generator=_generator(cell["seed"]))
    signal = NOISES[cell["net"]](steps)
    centred = signal - signal.mean()
    found = autocorrelation(centred[:, None] * centred, LAGS)
    turned = (signal[1:] * signal[:-1] < 0).double().mean()
    return {"acf": found, "lag1": found[1], "reversals": turned, "ratio": 1.0}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _lag1(rows: Rows, net: str, depth: int = 24) -> float:
    return float(rows.value("lag1", net=net, depth=depth))


def _least_step(rows: Rows) -> float:
    """Return the least difference from plain to residual to scaled residual, beyond 4 layers."""
    ordered = ("plain", "residual", "residual-0.1")
    return min(
        _lag1(rows, above, depth) - _lag1(rows, below, depth)
        for depth in set(rows.column("depth"))
        if depth > 4
        for below, above in itertools.pairwise(ordered)
    )


CORRELATION = Words("autocorrelation at lag 1", "间隔 1 的自相关")

STUDY = Study(
    id="ST-09",
    name="shattering",
    title=Words("Shattered gradients", "破碎的梯度"),
    question=Words(
        "Do near inputs of a deep network still get similar gradients, or does the gradient look like noise?",
        "深层网络中，相近的输入得到的梯度仍然相近，还是已经像噪声？",
    ),
    design=Words(
        "The one-dimensional experiment of Balduzzi et al. 2017: networks f: R → R, 200 wide, before any "
        "training, and df/dx at 256 points from -2 to 2. The layer is W relu(BN(x)) with He's start, its "
        "statistics those of the 256 points: plain, with a shortcut, with a shortcut and the branch times "
        "0.1, and plain without BatchNorm. Autocorrelation of df/dx along the line, beside white noise and "
        "brown noise (a random walk) of as many points.",
        "Balduzzi 等 2017 的一维实验：网络 f: R → R，宽 200，未经训练，在 -2 到 2 的 256 个点上求 df/dx。每层为 "
        "W relu(BN(x))，He 初始化，统计量取自这 256 个点；分四种：普通、加捷径、加捷径且分支乘 0.1、普通且无 BatchNorm。"
        "沿线计算 df/dx 的自相关，并与同样点数的白噪声、布朗噪声（随机游走）比较。",
    ),
    controls=Words(
        "All networks of a depth and seed have the same matrices at the start. Computed in float64. The size "
        "of the gradient is measured beside its autocorrelation, by X-ray, so that the two are not mixed up.",
        "同一深度与种子的各网络初始矩阵相同，以 float64 计算。梯度的大小另用 X 光测量，以免与自相关混为一谈。",
    ),
    lesson=Words(
        "In a plain network with BatchNorm the gradients of neighbouring inputs have nothing in common any "
        "more after 10 to 24 layers, although they are not small: they grow towards the input. With a "
        "shortcut about half of the correlation is left at 24 layers, with a scaled one 0.8. This is "
        "a matter of BatchNorm without shortcuts: without the norm the plain network keeps 0.65. Where plain "
        "networks degrade without a norm too (ST-04), shattering cannot be the whole reason.",
        "加 BatchNorm 的普通网络，10 至 24 层之后，相邻输入的梯度已毫无共同之处，尽管梯度并不小，反而向输入端增大。"
        "加捷径，24 层时相关系数约剩一半；捷径加缩放则剩 0.8。这是有 BatchNorm 而无捷径时的现象：去掉归一化，普通网络还剩 0.65。"
        "若普通网络没有归一化也会退化（见 ST-04），梯度破碎就不会是退化的全部原因。",
    ),
    claims=(
        Claim("1.21b", "001", 64, Words(
            "In a deep plain network hardly any gradient reaches the layers near the input (here: of 24 layers "
            "with BatchNorm).",
            "深层普通网络中，靠近输入的层几乎收不到梯度（此处指加 BatchNorm 的 24 层网络）。",
        ), by="not-size", stands=False),
    ),
    factors={"net": (*NETS, *NOISES), "depth": DEPTHS},
    measure=measure,
    metrics={
        "acf": Metric(Words("autocorrelation of df/dx", "df/dx 的自相关")),
        "lag1": Metric(CORRELATION),
        "reversals": Metric(Words("neighbours with gradients of other sign", "相邻点梯度异号的比例")),
        "ratio": Metric(Words("gradient at the input over that at the output", "输入端与输出端梯度之比")),
    },
    primary=Contrast(
        Words(
            "After 24 layers the gradients of neighbouring inputs correlate by at least 0.5 more with a scaled "
            "shortcut than in the plain network.",
            "24 层之后，带缩放捷径的网络，相邻输入梯度的相关系数比普通网络高 0.5 以上。",
        ),
        lambda rows: _lag1(rows, "residual-0.1") - _lag1(rows, "plain"),
        limit=0.5,
        unit=CORRELATION,
    ),
    secondary=(
        Contrast(
            Words(
                "After 24 layers the gradient of the plain network with BatchNorm is white noise.",
                "24 层之后，加 BatchNorm 的普通网络的梯度是白噪声。",
            ),
            lambda rows: _lag1(rows, "plain"),
            limit=WHITE, rule="within", unit=CORRELATION, name="white",
        ),
        Contrast(
            Words(
                "Beyond 4 layers the order is always plain, shortcut, scaled shortcut.",
                "超过 4 层后，次序总是：普通、捷径、带缩放的捷径，依次升高。",
            ),
            _least_step,
            limit=0.0, unit=CORRELATION, name="order",
        ),
        Contrast(
            Words(
                "With a shortcut, more than 1/√5 = 0.447 of the correlation at 10 layers is left at 50: it falls no "
                "faster than the law 1/√L.",
                "有捷径时，10 层处的相关系数到 50 层仍剩 1/√5 = 0.447 以上：下降不快于 1/√L 规律。",
            ),
            lambda rows: _lag1(rows, "residual", 50) / _lag1(rows, "residual", 10),
            limit=5**-0.5, unit=Words("share that is left", "剩余比例"), name="root-law",
        ),
        Contrast(
            Words(
                "The gradient of the plain network of 24 layers is no smaller at the input than at the output.",
                "24 层普通网络输入端的梯度并不小于输出端。",
            ),
            lambda rows: math.log10(rows.value("ratio", net="plain", depth=24)),
            limit=0.0, unit=Words("powers of ten", "个数量级"), name="not-size",
        ),
        Contrast(
            Words(
                "Without BatchNorm the plain network of 24 layers keeps at least 0.3 more of the correlation.",
                "去掉 BatchNorm，24 层普通网络的相关系数高出 0.3 以上。",
            ),
            lambda rows: _lag1(rows, "unnormalised") - _lag1(rows, "plain"),
            limit=0.3, unit=CORRELATION, name="norm-shatters",
        ),
    ),
    modes={
        "quick": Mode(8, 0.3, {"depth": (1, 10, 24, 50)}),
        "default": Mode(16, 0.6),
        "long": Mode(16, 1.6, {"depth": (1, 2, 4, 10, 24, 50, 100)}),
    },
    plots=(
        Plot(
            "lines", Words("Correlation of the gradients of neighbours, by depth", "相邻点梯度的相关系数与深度"),
            x="depth", y="lag1", color="net", x_title=Words("layers", "层数"),
            reference=0.0, reference_title=Words("nothing in common", "毫无关联"),
        ),
        Plot(
            "profile", Words("Autocorrelation of df/dx, 24 layers", "df/dx 的自相关，24 层"),
            x="", y="acf", color="net", x_title=Words("lag, in points", "间隔（点数）"), only={"depth": 24},
        ),
        Plot(
            "lines", Words("Gradient at the input over that at the output", "输入端与输出端梯度之比"),
            x="depth", y="ratio", color="net", log_y=True, x_title=Words("layers", "层数"),
            reference=1.0, reference_title=Words("equal", "相等"),
        ),
    ),
    published=(
        Published(
            Words("Correlation of gradients over depth L: feed-forward; residual with BatchNorm and scaled branch",
                  "梯度相关性随深度 L 的变化：前馈网络；带 BatchNorm 与分支缩放的残差网络"),
            "1/2^L; 1/√L",
            "Balduzzi et al. 2017 (arXiv:1702.08591)",
        ),
    ),
)  # fmt: skip
