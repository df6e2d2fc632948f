"""ST-18 LayerNorm: over which axis, with which variance, what it keeps and what it loses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from addnorm.norms import BatchNorm
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
from addnorm.twins import UnbiasedLayerNorm

SAMPLES, TOKENS = 16, 8
BATCHES = (2, 4, 8, 16, 32, 64, 128)
DRAWS = 200  # batches around one example, whose output changes from one to the next
SETS = (512, 8192)  # sizes of the data set that the batches are drawn from
WIDTH = 64  # of the statements that do not go by width
NORMS: dict[str, type[nn.Module]] = {
    "layer": nn.LayerNorm,
    "batch": BatchNorm,
    "printed": UnbiasedLayerNorm,
}


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Hold the norms of one width against what they should do to skewed tokens, in float64."""
    torch.manual_seed(cell["seed"])
    d = cell["width"]
    x = skewed(SAMPLES, TOKENS, d)
    layer, batch = (NORMS[name](d).double() for name in ("layer", "batch"))
    data = skewed(max(SETS), d)
    noise = {size: batch_noise(data[:size]) for size in SETS}
    with torch.no_grad():
        return {
            "ratio": _ratio(x),
            "lone": NORMS["printed"](1)(torch.randn(64, 1)).isnan().double().mean(),
            "parameters": sum(p.numel() for p in layer.parameters()) - 2 * d,
            "axes": max(
                _deviation(layer(x), standardised(x, (2,))),
                _deviation(batch(x), standardised(x, (0, 1))),
            ),
            "others": _change(layer, x, (0, 0)),
            "others_batch": _change(batch, x, (0, 0)),
            "neurons": _change(layer, x, (..., 0)),
            "skew": skewness(layer(x)).mean(),
            "skew_change": (skewness(layer(x)) - skewness(x)).abs().max(),
            "invariance": _deviation(layer(_moved(x)), layer(x)),
            "lost": _lost(d),
            "noise": noise[SETS[-1]],
            "batch": list(BATCHES),
            "slope": np.polyfit(np.log(BATCHES[2:]), np.log(noise[SETS[-1]][2:]), 1)[0],
            "size_effect": math.log2(noise[SETS[-1]][4] / noise[SETS[0]][4]),
        }


def skewed(*shape: int) -> Tensor:
    """Return numbers from the exponential distribution, whose skewness is 2."""
    return torch.empty(shape, dtype=torch.float64).exponential_()


def standardised(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return (x - mean) / sqrt(variance + 1e-5) over the axes, the variance divided by n."""
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt()


def skewness(x: Tensor) -> Tensor:
    """Return E (x - mean)^3 / (E (x - mean)^2)^(3/2) over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    return centred.pow(3).mean(-1) / centred.square().mean(-1).pow(1.5)


@torch.no_grad()
def _ratio(x: Tensor) -> float:
    """Return size of the printed norm's output / that of LayerNorm's, both without eps."""
    sizes = []
    for name in ("printed", "layer"):
        norm = NORMS[name](x.shape[-1]).double()
        norm.eps = 1e-14  # type: ignore[assignment]  # two close features have a small variance
        sizes.append(norm(x).square().mean().sqrt())
    return float(sizes[0] / sizes[1])


def _deviation(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def _change(norm: nn.Module, x: Tensor, kept: Any) -> float:
    """Return the change (RMS) of the output where `kept` is while all the rest is drawn anew."""
    other = skewed(*x.shape)
    other[kept] = x[kept]
    return float((norm(x) - norm(other))[kept].square().mean().sqrt())


def _moved(x: Tensor) -> Tensor:
    """Return a x + b, with an a from 1/2 to 4 and a b of each token's own."""
    shape = (*x.shape[:-1], 1)
    return x * torch.empty(shape).uniform_(0.5, 4) + 3 * torch.randn(shape)


@torch.enable_grad()
def _lost(d: int) -> float:
    """Return by how much the rank of LayerNorm's Jacobian falls short of the width."""
    norm = NORMS["layer"](d).double()
    norm.eps = 1e-14  # type: ignore[assignment]  # with eps the scale is all but lost
    x, others = skewed(1, d), skewed(TOKENS - 1, d)
    x.requires_grad_()
    out = norm(torch.cat((x, others)))[0]
    rows = [torch.autograd.grad(o, x, retain_graph=True)[0][0] for o in out]
    jacobian = torch.stack(rows)
    size = jacobian.norm() * (x - x.mean()).norm()  # 0 for two features
    rank = int(torch.linalg.matrix_rank(jacobian, rtol=1e-6)) if size.item() > 1e-6 else 0
    return float(d - rank)


def batch_noise(data: Tensor) -> list[float]:
    """Return how much BatchNorm's output of the first example varies with the rest of its batch.

    The root of the mean over features of the variance over draws from `data (N, D)`, for each of
    `BATCHES`.
    """
    norm, found = NORMS["batch"](data.shape[1]).double(), []
    with torch.no_grad():
        for count in BATCHES:
            outputs = []
            for _ in range(DRAWS):
                chosen = torch.randint(1, len(data), (count,))
                chosen[0] = 0
                outputs.append(norm(data[chosen])[0])
            found.append(float(torch.stack(outputs).var(0).mean().sqrt()))
    return found


def _at(metric: str) -> Callable[[Rows], float]:
    return lambda rows: float(rows.value(metric, width=WIDTH))


def _largest(metric: str, rows: Rows) -> float:
    return max(abs(float(v)) for v in rows.column(metric))


def _off_ratio(rows: Rows) -> float:
    """Return the largest distance of the ratio from sqrt((d - 1) / d)."""
    return max(abs(float(row["ratio"]) - math.sqrt(1 - 1 / row["width"])) for row in rows)


STUDY = Study(
    id="ST-18",
    name="layernorm",
    title=Words("What layer normalisation does", "层归一化究竟做了什么"),
    question=Words(
        "Over which numbers does LayerNorm take mean and variance, and what is left of its input?",
        "LayerNorm 对哪些数求均值和方差，输入里又留下了什么？",
    ),
    design=Words(
        "Tokens with skewed features (exponential), 16 samples of 8 tokens, 2 to 512 wide, go through "
        "torch's LayerNorm, BatchNorm and the module printed in document 004. Everything but one token, "
        "or but one feature, is drawn anew to see what the output depends on. BatchNorm's output of one "
        "example is computed in 200 random batches of 2 to 128, from 512 and from 8,192 examples.",
        "特征呈偏态（指数分布）的词元，16 个样本、各 8 个词元，宽 2 到 512，经过 torch 的 LayerNorm、BatchNorm "
        "与文档 004 所印的模块。除一个 token（或一个特征）之外全部重新抽取，看输出依赖什么。同一样本的 BatchNorm 输出在 "
        "200 个随机批次里各算一次，批大小 2 到 128，数据集大小 512 与 8192。",
    ),
    controls=Words(
        "float64; gains 1 and offsets 0, as at the start. The axes are held against the formula written "
        "out. Nothing is trained, so nothing is said about accuracy.",
        "使用 float64；增益为 1、偏移为 0，即初始状态。归一化的轴与写开的公式逐一核对。不涉及训练，因此不对准确率下结论。",
    ),
    lesson=Words(
        "LayerNorm standardises each token over its own features, whatever stands beside it, and keeps "
        "the shape of its distribution: skewed stays skewed. It is blind to the token's mean and scale, "
        "which is its robustness and its loss. The printed module divides by d - 1: too small by "
        "√((d-1)/d), and NaN for one feature. BatchNorm's noise goes by the batch, nearly as "
        "1/√B, and not by the size of the data set.",
        "LayerNorm 用每个词元自己的特征做标准化，与旁边的词元、样本无关；分布的形状不变，偏态仍是偏态。它看不见 token "
        "的均值和尺度，这既是稳健性的来源，也是信息损失。所印的模块除以 d - 1，输出小了 √((d-1)/d) 倍，只有一个特征时得到 NaN。"
        "BatchNorm 的噪声取决于批大小（接近 1/√B），与数据集大小无关。",
    ),
    claims=(
        Claim("2.5", "002", 45, Words(
            "Layer normalisation takes mean and variance over the positions of the sequence.",
            "层归一化对序列的各个位置求均值和方差。",
        ), stands=False),
        Claim("2.16", "002", 149, Words(
            "LayerNorm works on the features of one sample, BatchNorm over the samples of the batch.",
            "LayerNorm 作用于单个样本的各特征，BatchNorm 作用于一批样本。",
        ), by="axes"),
        Claim("2.17", "002", 149, Words(
            "BatchNorm can be unstable where the batch is small.", "批次小时 BatchNorm 可能不稳定。",
        ), by="small-batch"),
        Claim("4.9", "004", 62, Words(
            "LayerNorm takes mean and variance for each neuron's input.",
            "LayerNorm 对每个神经元的输入求均值和方差。",
        ), by="mixes-neurons", stands=False),
        Claim("4.10", "004", 63, Words(
            "What comes out has a standard normal distribution.", "输出服从标准正态分布。",
        ), by="skewed", stands=False),
        Claim("4.11", "004", 63, Words(
            "LayerNorm has one learned number as gain and one as offset.",
            "LayerNorm 的增益和偏移各是一个可学习的标量。",
        ), by="vectors", stands=False),
        Claim("4.12", "004", 82, Words(
            "The printed module computes layer normalisation.", "所印的模块实现了层归一化。",
        ), by="printed", stands=False),
        Claim("4.14", "004", 58, Words(
            "LayerNorm makes a network robust to changes of its input (here: of scale and mean).",
            "LayerNorm 使网络对输入变化（这里指尺度与均值）更稳健。",
        ), by="invariant"),
        Claim("4.15", "004", 157, Words(
            "LayerNorm may lose information.", "LayerNorm 可能丢失信息。",
        ), by="loses"),
    ),
    factors={"width": (2, 8, 64, 512)},
    measure=measure,
    metrics={
        "ratio": Metric(Words("size of the printed norm's output, over LayerNorm's",
                              "所印模块与 LayerNorm 的输出之比")),
        "lone": Metric(Words("share of NaN at one feature, printed norm", "仅一个特征时 NaN 的比例，所印的模块")),
        "parameters": Metric(Words("parameters beyond two for each feature", "每个特征两个之外的参数")),
        "axes": Metric(Words("deviation from the formula", "与公式之差")),
        "others": Metric(Words("change of a token's output by all others, LayerNorm",
                               "其余词元引起的输出变化，LayerNorm")),
        "others_batch": Metric(Words("change of a token's output by all others, BatchNorm",
                                     "其余词元引起的输出变化，BatchNorm")),
        "neurons": Metric(Words("change of a feature by the token's others, LayerNorm",
                                "同一词元其余特征引起的变化，LayerNorm")),
        "skew": Metric(Words("skewness of the output", "输出的偏度")),
        "skew_change": Metric(Words("change of the skewness", "偏度的变化")),
        "invariance": Metric(Words("LayerNorm(a x + b) against LayerNorm(x)", "LayerNorm(a x + b) 与 LayerNorm(x) 之差")),
        "lost": Metric(Words("directions that are lost", "丢失的方向数")),
        "noise": Metric(Words("noise of BatchNorm", "BatchNorm 的噪声")),
        "batch": Metric(Words("batch", "批大小")),
        "slope": Metric(Words("power of the batch that the noise goes by", "噪声随批大小的幂次")),
        "size_effect": Metric(Words("noise with 16 times the data set", "数据集增至 16 倍时的噪声"),
                              Words("doublings", "翻倍")),
    },
    primary=Contrast(
        Words(
            "What LayerNorm makes of a token depends on no other token and no other sample.",
            "LayerNorm 对一个词元的输出与其他词元、其他样本都无关。",
        ),
        functools.partial(_largest, "others"), limit=0.0, rule="exact",
    ),
    secondary=(
        Contrast(
            Words("Both norms are the formula: over the features of a token, and over all tokens of a "
                  "channel.",
                  "两种归一化都与公式相符：一个对单个词元的各特征，一个对同一通道的全部词元。"),
            functools.partial(_largest, "axes"), limit=1e-9, rule="exact", name="axes",
        ),
        Contrast(
            Words("One feature of LayerNorm's output changes by more than 0.1 with the token's others.",
                  "同一词元的其余特征改变时，LayerNorm 某一特征的输出变化超过 0.1。"),
            _at("neurons"), limit=0.1, name="mixes-neurons",
        ),
        Contrast(
            Words("Skewed tokens come out with a skewness above 1, where a normal distribution has 0.",
                  "偏态词元的输出偏度仍大于 1，而正态分布为 0。"),
            _at("skew"), limit=1.0, name="skewed",
        ),
        Contrast(
            Words("LayerNorm keeps the skewness of every token.", "LayerNorm 保持每个词元的偏度。"),
            functools.partial(_largest, "skew_change"), limit=1e-6, rule="exact", name="shape-kept",
        ),
        Contrast(
            Words("Gain and offset are one number for each feature.", "增益与偏移是每个特征各一个数。"),
            functools.partial(_largest, "parameters"), limit=0, rule="exact", name="vectors",
        ),
        Contrast(
            Words("The printed module's output is LayerNorm's times √((d-1)/d).",
                  "所印模块的输出是 LayerNorm 的 √((d-1)/d) 倍。"),
            _off_ratio, limit=1e-6, rule="exact", name="printed",
        ),
        Contrast(
            Words("At one feature the printed module returns NaN.", "只有一个特征时，所印的模块输出 NaN。"),
            lambda rows: 1 - min(rows.column("lone")), limit=0, rule="exact", name="printed-one",
        ),
        Contrast(
            Words("LayerNorm(a x + b) is LayerNorm(x), for each token's own a > 0 and b.",
                  "每个词元各取 a > 0 与 b，LayerNorm(a x + b) 都等于 LayerNorm(x)。"),
            _at("invariance"), limit=1e-3, rule="exact", name="invariant",
        ),
        Contrast(
            Words("Of every token two numbers are lost: the rank of the Jacobian is d - 2.",
                  "每个词元丢失两个数：雅可比矩阵的秩为 d - 2。"),
            lambda rows: max(abs(v - 2) for v in rows.column("lost")),
            limit=0, rule="exact", name="loses",
        ),
        Contrast(
            Words("BatchNorm's output of one example is more than three times noisier in batches of 4 than "
                  "of 128.",
                  "批大小为 4 时，同一样本的 BatchNorm 输出噪声是批大小 128 时的三倍以上。"),
            lambda rows: rows.value("noise", width=WIDTH)[1] / rows.value("noise", width=WIDTH)[-1],
            limit=3.0, unit=Words("times", "倍"), name="small-batch",
        ),
        Contrast(
            Words("A data set 16 times as large changes that noise by less than a tenth.",
                  "数据集扩大 16 倍，噪声的变化不到十分之一。"),
            _at("size_effect"), limit=math.log2(1.1), rule="within",
            unit=Words("doublings", "翻倍"), name="data-size",
        ),
    ),
    modes={"quick": Mode(8, 0.2), "default": Mode(12, 0.3)},
    plots=(
        Plot(
            "profile", Words("BatchNorm: noise of one example's output", "BatchNorm：同一样本输出的噪声"),
            x="batch", y="noise", log_x=True, log_y=True, only={"width": WIDTH},
            x_title=Words("batch", "批大小"),
        ),
        Plot(
            "lines", Words("The printed norm beside LayerNorm", "所印的模块与 LayerNorm"),
            x="width", y="ratio", log_x=True, x_title=Words("features", "特征数"),
            reference=1.0, reference_title=Words("LayerNorm", "LayerNorm"),
        ),
        Plot(
            "dots", Words("Skewness of what comes out", "输出的偏度"),
            x="width", y="skew", x_title=Words("features", "特征数"),
            reference=0.0, reference_title=Words("normal distribution", "正态分布"),
        ),
    ),
    published=(
        Published(
            Words(
                "mean and variance over the hidden units of a layer, for one training case at a time; gain "
                "and bias for each neuron",
                "对同一层的隐藏单元、逐个样本求均值和方差；每个神经元各有增益与偏置",
            ),
            Words("equations 3 and 4", "式 3 与式 4"),
            "Ba et al. 2016 (arXiv:1607.06450)",
        ),
    ),
)  # fmt: skip
