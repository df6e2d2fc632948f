"""ST-04 Is degradation caused by vanishing gradients? Plain networks with gradients of every size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
    Row,
    Rows,
    Study,
    Words,
)
from addnorm.training.objective import cross_entropy

DEPTHS = (8, 20, 56)  # linear layers in pairs; an output layer follows
PLAIN = "plain(act='relu')"
SHORTCUT = "postact"
# Each net with its start and the norm at every layer, and what is changed of it.
NETS: Mapping[str, Mapping[str, str]] = {
    "he": {"start": "he", "inner_norm": "none"},
    "batchnorm": {"start": "he", "inner_norm": "batchnorm"},
    "default": {"start": "torch", "inner_norm": "none"},
    "looks-linear": {"start": "he", "inner_norm": "none"},  # which `looks_linear` replaces
}
# What is changed of each net, and the depths that a contrast needs.
CHANGES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "he": {"none": (8, 56), "equalised": (56,), "adam": (8, 56)},
    "batchnorm": {"none": (8, 56), "shortcut": (56,)},
    "default": {"none": (20,), "shortcut": (20,)},
    "looks-linear": {"none": (8, 56), "faded": (56,), "adam": (56,), "adam-faded": (56,)},
}
RATES = {"sgd": (0.03, 0.01, 0.1, 0.003, 0.3), "adam": (0.003, 0.001, 0.01, 0.0003, 0.03)}
FITTED = 0.01  # nats: below it every training image is right, and a smaller loss says nothing
FADE = 0.9  # what a layer multiplies the gradient by, 001:50
TRAINABLE = FADE**20  # 0.12 of the gradient left: what 001:52 still calls trainable
SCALE = 1e10  # of the loss in the X-ray: squares of gradients near 1e-22 underflow in float32
FLOOR = 1e-30  # what counts as no gradient at all, so that it has a logarithm


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """X-ray one network at its start, train it at each of the rates and keep the best."""
    rates = RATES[_optimizer(cell)][: cell["rates"]]
    found = [_trained(cell, rate) for rate in rates]
    best = min(found, key=lambda f: math.inf if math.isnan(f["train"]) else f["train"])
    profile = _profile(_model(cell), cell["seed"])
    return {
        **best,
        "edge": float(best["rate"] in (min(rates), max(rates))),
        "profile": profile,
        "least": profile[0] if math.isnan(best["late"]) else min(profile[0], best["late"]),
    }


def _trained(cell: Row, rate: float) -> dict[str, float]:
    """Train the network at one rate; NaN where that failed."""
    data, model = bench.digits(), _model(cell)
    usual = bench.ADAM if _optimizer(cell) == "adam" else bench.SGD
    settings = usual | {"lr": rate, "steps": cell["steps"], "schedule": "linear"}
    if cell["change"] == "equalised":
        settings["clip"] = 0.0  # which would scale deep networks' gradients down again
    run = bench.trained(model, data, cell["seed"], **settings)
    if run.status != "finished":
        return {"train": math.nan, "test": math.nan, "rate": rate, "late": math.nan}
    x, y = bench.training_set(data)
    bench.refit(model, x)
    return {
        "train": bench.loss_on(model, x, y)[0],
        "test": bench.loss_on(model, *bench.test_set(data))[0],
        "rate": rate,
        "late": _profile(model.train(), cell["seed"])[0],
    }


def _optimizer(cell: Row) -> str:
    return "adam" if "adam" in cell["change"] else "sgd"


def _model(cell: Row) -> MLP:
    """Return the network with its start and its change."""
    net, change = cell["net"], cell["change"]
    wiring = SHORTCUT if change == "shortcut" else PLAIN
    model = bench.mlp(cell["seed"], cell["depth"] // 2, wiring, branch_layers=2, **NETS[net])
    if net == "looks-linear":
        looks_linear(model)
    if change == "equalised":
        for parameter in model.parameters():
            parameter.register_hook(unit)  # type: ignore[no-untyped-call]
    if "faded" in change:
        for layer in _layers(model):
            layer.register_forward_hook(_faded)
    return model


def _layers(model: MLP) -> list[nn.Linear]:
    """Return the linear layers of the branches, from the input on."""
    return [m for c in model.stack for m in c.branch.modules() if isinstance(m, nn.Linear)]


@torch.no_grad()
def looks_linear(model: MLP) -> None:
    """Start a plain ReLU network as an isometry: Balduzzi et al. 2017 (arXiv:1702.08591).

    Every stream is (relu(a), relu(-a)), a of D / 2 numbers, and every matrix ((W, -W), (-W, W))
    with W orthogonal, so that a <- W a. The first matrix is (A, -A), A with orthonormal rows.
    """
    for index, layer in enumerate(_layers(model)):
        half = layer.out_features // 2
        W = torch.empty(half, half if index else layer.in_features)
        nn.init.orthogonal_(W)
        rows = torch.cat([W, -W], dim=1) if index else W
        layer.weight.copy_(torch.cat([rows, -rows]))


def unit(gradient: Tensor) -> Tensor:
    """Return the gradient at norm 1, also where its square underflows; 0 stays 0."""
    gradient = gradient / gradient.abs().amax().clamp_min(1e-38)
    length: Tensor = torch.linalg.vector_norm(gradient)
    return gradient / length.clamp_min(1e-38)


def _faded(_module: nn.Module, _args: object, out: Tensor) -> None:
    """Multiply the gradient that comes back to a layer's output by `FADE`; forward stays as is."""
    if out.requires_grad:
        out.register_hook(lambda gradient: FADE * gradient)  # type: ignore[no-untyped-call]


def _profile(model: nn.Module, seed: int) -> list[float]:
    """Return RMS of dLoss/dstream before each pair of layers and after the last, over that there.

    (L / 2 + 1) numbers from the input on, the last one 1; of the first batch of the training.
    """
    x, y = (torch.from_numpy(a) for a in bench.digits().training_batch(seed, 0, 128))
    trace = xray(model, x, y, loss=lambda out, y: SCALE * cross_entropy(out, y))
    sizes = [c.gradient_before for c in trace.connections]
    last = trace.connections[-1].gradient_after
    return [max(size / last, FLOOR) if last > 0 else FLOOR for size in (*sizes, last)]


def _train(rows: Rows, net: str, change: str, depth: int = 56) -> float:
    """Return the training loss of one network, no less than `FITTED`."""
    loss: float = rows.value("train", net=net, change=change, depth=depth)
    return max(loss, FITTED)


def _decades(rows: Rows, net: str, change: str = "none") -> float:
    """Return how many powers of ten the training loss rises from 8 to 56 layers."""
    return math.log10(_train(rows, net, change) / _train(rows, net, change, 8))


def _if_none_vanishes(rows: Rows, net: str, effect: float) -> float:
    """Return the effect, or NaN where the gradient of the plain network of 56 layers vanishes.

    Then nothing can be said of degradation without vanishing. A training that diverged at every
    rate is judged by its gradient at the start.
    """
    least: float = rows.value("least", net=net, change="none", depth=56)
    return effect if least >= TRAINABLE else math.nan


def _least_rise(rows: Rows) -> float:
    """Return the smaller rise without vanishing, He's start or BatchNorm; NaN where one has none."""
    rises = [_if_none_vanishes(rows, net, _decades(rows, net)) for net in ("he", "batchnorm")]
    return float(np.min(rises))  # min() would lose a NaN that comes second


def _gain(rows: Rows) -> float:
    """Return what equal gradients gain of the powers of ten from plain to residual at 56 layers.

    NaN where these are less than one, so that there is nothing to gain.
    """
    plain, residual = _train(rows, "he", "none"), _train(rows, "batchnorm", "shortcut")
    whole = math.log10(plain / residual)
    if whole < 1:
        return math.nan
    return math.log10(plain / _train(rows, "he", "equalised")) / whole


def _faded_costs(rows: Rows) -> float:
    """Return by how many powers of ten fading raises the loss at 56 layers, SGD or Adam."""
    pairs = (("faded", "none"), ("adam-faded", "adam"))
    with_it, without = ([_train(rows, "looks-linear", p[i]) for p in pairs] for i in (0, 1))
    return max(math.log10(a / b) for a, b in zip(with_it, without, strict=True))


def _ratio_of(net: str, change: str, other: str, depth: int) -> Callable[[Rows], float]:
    """Return log10 of the loss of a network over that of another change of it."""
    return lambda rows: math.log10(
        _train(rows, net, change, depth) / _train(rows, net, other, depth)
    )


TENFOLD = Words("powers of ten", "个数量级")

STUDY = Study(
    id="ST-04",
    name="vanishing",
    title=Words("Is it vanishing gradients?", "是梯度消失吗？"),
    question=Words(
        "Is the degradation of deep plain networks caused by vanishing gradients?",
        "深层普通网络的退化，是梯度消失造成的吗？",
    ),
    design=Words(
        "Plain ReLU networks of 8 and 56 layers, 64 wide, learn the digits of scikit-learn. The "
        "gradient at the input end over that at the output end is measured by X-ray before and after "
        "training. Four nets: He's start without a norm (gradients of about equal size), He's start "
        "with BatchNorm (gradients grow towards the input), PyTorch's default start (gradients really "
        "vanish; at 20 layers), and the looks-linear start, which makes the same ReLU network an "
        "isometry. Changes of them: a shortcut around each pair of layers; every parameter's gradient "
        "rescaled to norm 1, without clipping (equalised); Adam, which rescales each parameter's step; and "
        "a factor of 0.9 on the gradient at every layer, in the backward pass only (faded), which is the "
        "arithmetic of document 001.",
        "普通 ReLU 网络，8 层与 56 层，宽 64，学习 scikit-learn 手写数字；训练前后用 X 光测量输入端与输出端"
        "梯度之比。四种网络：He 初始化、无归一化（各层梯度大小相近）；He 初始化加 BatchNorm（梯度向输入端增大）；"
        "PyTorch 默认初始化（梯度真的消失；20 层）；looks-linear 初始化（同样的 ReLU 网络，起点是等距映射）。"
        "所作改动：每两层加捷径；把每个参数的梯度都缩放到范数 1，且不做梯度裁剪（equalised）；改用 Adam，它会缩放每个参数的步长；"
        "只在反向传播时让每层梯度乘 0.9（faded），即文档 001 的算式。",
    ),
    controls=Words(
        "All networks of a depth have the same number of weights, and with one seed the same batches. "
        "Each is trained at four rates, 0.003 to 0.1 under SGD and 0.0003 to 0.01 under Adam, and the lowest "
        "training loss counts; how often that is at the edge of the grid is shown. The statistics of "
        "BatchNorm are taken anew from all training images before the loss is measured. A loss below 0.01 "
        "counts as 0.01, for by then all training images are right. A gradient counts as vanished below "
        "0.9^20 = 0.12 of that at the output, the value that document 001 still calls trainable, at the start "
        "or at the end of training; what it does in between is not measured. Where it vanishes in a net that "
        "should show degradation without that, the study does not decide.",
        "同一深度的网络权重数相同；同一种子下批次次序相同。每个网络用四种学习率训练（SGD 为 0.003 至 0.1，Adam 为 0.0003 至 "
        "0.01），取训练损失最低者；最优值落在网格边缘的频率另行列出。测损失之前，BatchNorm 的统计量先用全部训练图像重新计算。"
        "低于 0.01 的损失按 0.01 计，此时训练图像已全部分对。训练开始或结束时，输入端梯度不足输出端的 0.9^20 = 0.12"
        "（文档 001 认为尚可训练的数值），就算消失；训练中途的情形没有测量。若本应展示“梯度不消失也退化”的网络梯度消失了，"
        "则不下结论。",
    ),
    lesson=Words(
        "To ask whether vanishing gradients cause degradation, look for one without the other. Networks with He's "
        "start and with BatchNorm show degradation without vanishing: there the gradient at the input is about as "
        "large as at the output, or far larger. At 56 layers He's start ends at a loss of 1.06, with rescaled "
        "gradients at 0.9, under Adam at 0.44, and a residual network (with BatchNorm) below 0.001: the size of "
        "gradients is not what held it back. The plain network with BatchNorm did best at the highest rate that "
        "was tried, so its loss is an upper bound. The looks-linear start, which makes a network of ReLUs begin "
        "as a linear map that keeps lengths, shows the reverse: multiplied by 0.9 at each layer, to 0.3 % in all, "
        "the gradient still trains it (under SGD at a higher rate; how far the first layers move was not "
        "measured). Where gradients really vanish, with the default start, the signal dies on its way forward "
        "too, so even there the gradient is not the only suspect.",
        "要问梯度消失是不是退化的原因，就去找两者只出现其一的情形。He 初始化和 BatchNorm 的网络退化而梯度不消失：输入端的梯度与输出端相当，"
        "甚至大得多。56 层时，He 初始化的损失为 1.06，拉平梯度后为 0.9，改用 Adam 为 0.44，而（带 BatchNorm 的）残差网络低于 0.001："
        "妨碍训练的不是梯度大小。带 BatchNorm 的普通网络在所试的最高学习率下最好，因此其损失只是上界。looks-linear 初始化让 ReLU 网络在起点等于保持长度的线性映射，"
        "情形正相反：梯度每层乘 0.9、总共只剩 0.3%，网络仍能训练好（SGD 要用较高的学习率；最初几层移动多少没有测量）。至于梯度真正消失的默认初始化，"
        "信号在前向途中就已消亡，所以即使在那里，梯度也不是唯一的嫌疑。",
    ),
    claims=(
        Claim("1.10", "001", 33, Words(
            "The main cause of degradation is vanishing gradients.",
            "退化主要由梯度消失造成。",
        ), stands=False),
        Claim("1.13", "001", 53, Words(
            "Where every layer leaves 0.9 of the gradient, 56 layers cannot be trained (here: from a start "
            "that trains without that factor).",
            "每层只留下 0.9 的梯度时，56 层无法训练（此处指：没有这一系数时能够训练的初始化）。",
        ), by="faded", stands=False),
        Claim("1.21", "001", 139, Words(
            "That gradients come back undiminished is the deeper reason why shortcuts work.",
            "梯度不衰减地传回，是残差连接有效的更根本原因。",
        ), by="cures-without", stands=False),
        Claim("1.29", "001", 181, Words(
            "Plain networks degrade beyond 20 layers (here: read as a law for every start; for one start see "
            "ST-03).",
            "普通网络超过 20 层就会退化（此处理解为对任何初始化都成立；单就一种初始化，见 ST-03）。",
        ), by="plain-can", stands=False),
    ),
    factors={
        "net": tuple(NETS),
        "change": tuple(dict.fromkeys(change for net in CHANGES.values() for change in net)),
        "depth": DEPTHS,
    },
    measure=measure,
    metrics={
        "train": Metric(Words("training loss", "训练损失"), Words("nats", "nat"), bench.CHANCE),
        "test": Metric(Words("test loss", "测试损失"), Words("nats", "nat"), bench.CHANCE),
        "late": Metric(Words("gradient at the input over that at the output, after training",
                             "训练结束时输入端与输出端梯度之比")),
        "least": Metric(Words("smaller gradient ratio, input over output, of start and end of training",
                              "训练开始与结束时输入端与输出端梯度之比的较小者")),
        "profile": Metric(Words("gradient over that at the output, at the start",
                                "训练开始时各处梯度与输出端之比")),
        "rate": Metric(Words("best learning rate", "最优学习率")),
        "edge": Metric(Words("best rate at the edge of the grid", "最优学习率位于网格边缘")),
    },
    primary=Contrast(
        Words(
            "Where no gradient vanishes, with He's start and with BatchNorm, the training loss of plain "
            "networks still rises at least tenfold from 8 to 56 layers.",
            "在梯度没有消失的网络里（He 初始化，以及加 BatchNorm），普通网络从 8 层到 56 层，训练损失仍上升十倍以上。",
        ),
        _least_rise,
        limit=1.0,
        unit=TENFOLD,
    ),
    secondary=(
        Contrast(
            Words(
                "Where gradients do vanish (default start, 20 layers) the network fails to learn, and a "
                "shortcut lowers its loss at least tenfold.",
                "梯度真的消失时（默认初始化，20 层）网络学不动，加捷径后损失降到十分之一以下。",
            ),
            _ratio_of("default", "none", "shortcut", 20),
            limit=1.0, unit=TENFOLD, name="sufficient",
        ),
        Contrast(
            Words(
                "The shortcut also lowers the loss at least tenfold where no gradient vanishes: 56 layers "
                "with BatchNorm.",
                "没有梯度消失时（56 层，BatchNorm），捷径同样使损失降到十分之一以下。",
            ),
            lambda rows: _if_none_vanishes(
                rows, "batchnorm", _ratio_of("batchnorm", "none", "shortcut", 56)(rows)
            ),
            limit=1.0, unit=TENFOLD, name="cures-without",
        ),
        Contrast(
            Words(
                "In the plain network of 56 layers without a norm (He's start), rescaling the gradient of every "
                "parameter to one norm gains less than half, in powers of ten, of what separates it from the "
                "residual one, which has BatchNorm too.",
                "56 层普通网络与加 BatchNorm 的残差网络训练损失相差若干数量级，把每个参数的梯度缩放到相同范数，只能补上其中不到一半。",
            ),
            _gain,
            limit=0.5, rule="below", unit=Words("share of the powers of ten", "占数量级差距的比例"),
            name="equalised",
        ),
        Contrast(
            Words(
                "Under Adam, which rescales the step of every parameter, the training loss still rises at least "
                "tenfold from 8 to 56 layers (He's start).",
                "用 Adam（缩放每个参数的步长）训练，从 8 层到 56 层训练损失仍上升十倍以上（He 初始化）。",
            ),
            lambda rows: _decades(rows, "he", "adam"),
            limit=1.0, unit=TENFOLD, name="adam",
        ),
        Contrast(
            Words(
                "With the looks-linear start the training loss of a plain network rises less than tenfold "
                "from 8 to 56 layers.",
                "采用 looks-linear 初始化，普通网络从 8 层到 56 层，训练损失上升不到十倍。",
            ),
            lambda rows: _decades(rows, "looks-linear"),
            limit=1.0, rule="below", unit=TENFOLD, name="plain-can",
        ),
        Contrast(
            Words(
                "In that network of 56 layers (looks-linear start), a factor of 0.9 at each layer on the gradient "
                "alone raises the training loss less than tenfold, under SGD and under Adam.",
                "在 looks-linear 初始化的 56 层网络中，只让梯度逐层乘 0.9，训练损失上升不到十倍，SGD 与 Adam 都是如此。",
            ),
            _faded_costs,
            limit=1.0, rule="below", unit=TENFOLD, name="faded",
        ),
    ),
    modes={
        "quick": Mode(8, 1.5, settings={"steps": 100, "rates": 2}),
        "default": Mode(8, 5, settings={"steps": 225, "rates": 4}),
    },
    plots=(
        Plot(
            "lines", Words("Training loss after training, by depth", "训练结束时的训练损失与深度"),
            x="depth", y="train", color="change", facet="net", log_y=True,
            x_title=Words("layers", "层数"),
            reference=bench.CHANCE, reference_title=Words("guessing", "随机猜测"),
        ),
        Plot(
            "dots",
            Words("Gradient at the input over that at the output, the smaller of start and end of training",
                  "输入端与输出端梯度之比，取训练开始与结束时的较小者"),
            x="net", y="least", facet="depth", log_y=True,
            reference=TRAINABLE, reference_title=Words("0.9^20", "0.9^20"), only={"change": "none"},
        ),
        Plot(
            "profile", Words("Gradient over depth at the start", "训练开始时各处的梯度"),
            x="", y="profile", color="net", facet="depth", log_y=True,
            x_title=Words("pairs of layers from the input", "自输入端起的层对"),
            only={"change": "none"},
        ),
        Plot(
            "dots", Words("The rate with the lowest training loss, 56 layers", "训练损失最低的学习率，56 层"),
            x="change", y="rate", facet="net", log_y=True, only={"depth": 56},
        ),
    ),
    published=(
        Published(
            Words(
                "Plain networks with BatchNorm: the authors argue that vanishing gradients are unlikely to "
                "be the cause, since neither forward nor backward signals vanish",
                "加 BatchNorm 的普通网络：作者认为不大可能是梯度消失所致，因为前向与反向信号都没有消失",
            ),
            Words("section 4.1", "4.1 节"),
            "He et al. 2015 (arXiv:1512.03385)",
        ),
        Published(
            Words(
                "Plain convolutional networks trained without shortcuts or norms, by their start alone",
                "不用捷径与归一化，仅凭初始化就能训练的普通卷积网络",
            ),
            Words("10,000 layers", "10,000 层"),
            "Xiao et al. 2018 (arXiv:1806.05393), abstract",
        ),
        Published(
            Words("Plain networks trained with the looks-linear start",
                  "采用 looks-linear 初始化训练的普通网络"),
            Words("about 200 layers", "约 200 层"),
            "Balduzzi et al. 2017 (arXiv:1702.08591)",
        ),
    ),
    skip=lambda cell: cell["depth"] not in CHANGES[cell["net"]].get(cell["change"], ()),
    relied=True,
)  # fmt: skip
