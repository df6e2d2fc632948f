"""ST-04 Is degradation caused by vanishing gradients? Plain networks with gradients of every size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

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
CHANGES = {
    "he": ("none", "equalised", "adam"),
    "batchnorm": ("none", "shortcut"),
    "default": ("none", "shortcut", "equalised"),
    "looks-linear": ("none", "faded", "adam", "adam-faded"),
}
RATES = {"sgd": (0.03, 0.01, 0.1), "adam": (0.003, 0.001, 0.01)}
FADE = 0.9  # what a layer multiplies the gradient by, 001:50
TRAINABLE = FADE**20  # 0.12 of the gradient left: what 001:52 still calls trainable
SCALE = 1e10  # of the loss in the X-ray: squares of gradients near 1e-22 underflow in float32
FLOOR = 1e-30  # what counts as no gradient at all, so that it has a logarithm


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one network at each of the rates and keep the best; X-ray it before and after."""
    data = bench.digits()
    found = []
    for rate in RATES[_optimizer(cell)][: cell["rates"]]:
        model = _model(cell)
        start = _profile(model, cell["seed"])
        settings = bench.ADAM if _optimizer(cell) == "adam" else bench.SGD
        run = bench.trained(
            model,
            data,
            cell["seed"],
            **settings | {"lr": rate, "steps": cell["steps"], "schedule": "linear"},
        )
        loss, _ = bench.loss_on(model, *bench.training_set(data))
        found.append(
            {
                "train": loss if run.status == "finished" else math.nan,
                "test": run.validation,
                "rate": rate,
                "profile": start,
                "ratio": start[0],
                "late": _profile(model.train(), cell["seed"])[0],
            }
        )
    return min(found, key=lambda f: math.inf if math.isnan(f["train"]) else f["train"])


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
    """Return the training loss of one network, no less than 1e-6."""
    return max(rows.best("train", net=net, change=change, depth=depth), 1e-6)


def _decades(rows: Rows, net: str, change: str = "none") -> float:
    """Return how many powers of ten the training loss rises from 8 to 56 layers."""
    return math.log10(_train(rows, net, change) / _train(rows, net, change, 8))


def _without_vanishing(rows: Rows, net: str, decades: float) -> float:
    """Return the effect, or 0 where the gradient of the plain network of 56 layers vanishes."""
    levels = {"net": net, "change": "none", "depth": 56}
    least = min(rows.value(when, **levels) for when in ("ratio", "late"))
    return decades if least >= TRAINABLE else 0.0


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


TENFOLD = Words("powers of ten", "数量级")

STUDY = Study(
    id="ST-04",
    name="vanishing",
    title=Words("Is it vanishing gradients?", "是梯度消失吗？"),
    question=Words(
        "Is the degradation of deep plain networks caused by vanishing gradients?",
        "深层普通网络的退化，是梯度消失造成的吗？",
    ),
    design=Words(
        "Plain ReLU networks of 8, 20 and 56 layers, 64 wide, learn the digits of scikit-learn. The "
        "gradient at the input end over that at the output end is measured by X-ray before and after "
        "training. Four nets: He's start without a norm (gradients of about equal size), He's start "
        "with BatchNorm (gradients grow towards the input), PyTorch's default start (gradients really "
        "vanish), and the looks-linear start, which makes the same ReLU network an isometry. Changes of "
        "them: a shortcut around each pair of layers; every parameter's gradient rescaled to norm 1 "
        "(equalised); Adam, which rescales each parameter's step; and a factor of 0.9 on the gradient "
        "at every layer, in the backward pass only (faded), which is the arithmetic of document 001.",
        "普通 ReLU 网络，8、20、56 层，宽 64，学习 scikit-learn 手写数字；训练前后用 X 光测量输入端与输出端"
        "梯度之比。四种网络：He 初始化、无归一化（各层梯度大小相近）；He 初始化加 BatchNorm（梯度向输入端增大）；"
        "PyTorch 默认初始化（梯度真的消失）；looks-linear 初始化（同样的 ReLU 网络，起点是等距映射）。"
        "所作改动：每两层加捷径；把每个参数的梯度都缩放到范数 1（equalised）；改用 Adam，它会缩放每个参数的步长；"
        "只在反向传播时让每层梯度乘 0.9（faded），即文档 001 的算式。",
    ),
    controls=Words(
        "All networks of a depth have the same number of weights, and with one seed the same batches. "
        "Each is trained at two rates, and the better training loss counts. A gradient counts as "
        "vanished below 0.9^20 = 0.12 of that at the output, the value that document 001 still calls "
        "trainable, at the start or at the end of training.",
        "同一深度的网络权重数相同；同一种子下批次次序相同。每个网络用两种学习率训练，取训练损失较低者。"
        "训练开始或结束时，输入端梯度不足输出端的 0.9^20 = 0.12（文档 001 认为尚可训练的数值），就算消失。",
    ),
    lesson=Words(
        "Degradation needs no vanishing gradient. With He's start and with BatchNorm no gradient vanishes, "
        "before or after training, and from 8 to 56 layers the training loss rises from 0.002 to 1 and from "
        "0.01 to guessing. Rescaling all gradients to one size does not cure it (0.9 at 56 layers); Adam "
        "helps and does not cure it either (0.4). Nor is a small gradient harmful by itself: where the network "
        "starts as an isometry, 0.9 at each of 56 layers, which leaves 0.2 % at the input, changes the loss "
        "from 0.0004 to 0.0009 under SGD and not at all under Adam; and that plain network trains at 56 layers "
        "as well as a residual one. Where gradients do "
        "vanish, with the default start, the network fails, but the signal dies on its way forward as well: "
        "equal gradients help at 8 layers and little at 20. What shortcuts cure is thus more than the size of "
        "gradients.",
        "退化不需要梯度消失。He 初始化与 BatchNorm 的网络，训练前后梯度都没有消失，但从 8 层到 56 层，训练损失分别从 0.002 "
        "升到 1、从 0.01 升到随机猜测的水平。把所有梯度拉到同样大小治不好退化（56 层时为 0.9）；Adam 有所改善，但也治不好（0.4）。"
        "梯度小本身也未必有害：起点若是等距映射，56 层每层乘 0.9（输入端只剩 0.2%），SGD 下损失只从 0.0004 变为 0.0009，Adam 下毫无影响；而且这个普通网络 56 层时"
        "训练得与残差网络一样好。默认初始化时梯度确实消失，网络也学不动，但前向信号同样消失了：拉平梯度在 8 层时有用，20 层时作用很小。"
        "可见捷径治好的不只是梯度的大小。",
    ),
    claims=(
        Claim("1.10", "001", 33, Words(
            "The main cause of degradation is vanishing gradients.",
            "退化主要由梯度消失造成。",
        ), stands=False),
        Claim("1.13", "001", 53, Words(
            "With a factor of 0.9 a layer a network of 20 layers can hardly be trained, and at 56 the "
            "gradient is as good as gone.",
            "每层因子为 0.9 时，20 层已难训练，56 层梯度几乎消失。",
        ), by="faded", stands=False),
        Claim("1.21", "001", 139, Words(
            "That gradients come back undiminished is the deeper reason why shortcuts work.",
            "梯度不衰减地传回，是残差连接有效的更根本原因。",
        ), by="equalised", stands=False),
        Claim("1.29", "001", 181, Words(
            "Plain networks degrade beyond 20 layers.",
            "普通网络超过 20 层就会退化。",
        ), by="plain-can", stands=False),
        Claim("3.9", "003", 4, Words(
            "Shortcuts were proposed as a remedy for vanishing gradients.",
            "快捷连接是为缓解梯度消失而提出的。",
        ), by="cures-without", stands=False),
    ),
    factors={"net": tuple(NETS), "change": tuple(dict.fromkeys(sum(CHANGES.values(), ()))),
             "depth": DEPTHS},
    measure=measure,
    metrics={
        "train": Metric(Words("training loss", "训练损失"), Words("nats", "nat"), bench.CHANCE),
        "test": Metric(Words("test loss", "测试损失"), Words("nats", "nat"), bench.CHANCE),
        "ratio": Metric(Words("gradient at the input over that at the output, at the start",
                              "训练开始时输入端与输出端梯度之比")),
        "late": Metric(Words("the same after training", "训练结束时的同一比值"), failed=FLOOR),
        "profile": Metric(Words("gradient over that at the output, at the start",
                                "训练开始时各处梯度与输出端之比")),
        "rate": Metric(Words("learning rate", "学习率")),
    },
    primary=Contrast(
        Words(
            "Where no gradient vanishes, with He's start and with BatchNorm, the training loss of plain "
            "networks still rises at least tenfold from 8 to 56 layers.",
            "在梯度没有消失的网络里（He 初始化，以及加 BatchNorm），普通网络从 8 层到 56 层，训练损失仍上升十倍以上。",
        ),
        lambda rows: min(
            _without_vanishing(rows, net, _decades(rows, net)) for net in ("he", "batchnorm")
        ),
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
            lambda rows: _without_vanishing(
                rows, "batchnorm", _ratio_of("batchnorm", "none", "shortcut", 56)(rows)
            ),
            limit=1.0, unit=TENFOLD, name="cures-without",
        ),
        Contrast(
            Words(
                "With the gradient of every parameter rescaled to one norm, the training loss still rises "
                "at least tenfold from 8 to 56 layers.",
                "把每个参数的梯度缩放到相同范数后，从 8 层到 56 层训练损失仍上升十倍以上。",
            ),
            lambda rows: _decades(rows, "he", "equalised"),
            limit=1.0, unit=TENFOLD, name="equalised",
        ),
        Contrast(
            Words(
                "Under Adam, which rescales the step of every parameter, it still rises at least tenfold.",
                "用 Adam（缩放每个参数的步长）训练，训练损失仍上升十倍以上。",
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
                "A factor of 0.9 at each of 56 layers on the gradient alone raises the training loss of "
                "that network less than tenfold, under SGD and under Adam.",
                "只让梯度在 56 层中逐层乘 0.9，该网络的训练损失上升不到十倍，SGD 与 Adam 都是如此。",
            ),
            _faded_costs,
            limit=1.0, rule="below", unit=TENFOLD, name="faded",
        ),
    ),
    modes={
        "quick": Mode(6, 1, settings={"steps": 100, "rates": 1}),
        "default": Mode(8, 5, settings={"steps": 225, "rates": 2}),
        "long": Mode(8, 12, {"depth": (8, 14, 20, 32, 56)}, {"steps": 225, "rates": 3}),
    },
    plots=(
        Plot(
            "lines", Words("Training loss after training, by depth", "训练结束时的训练损失与深度"),
            x="depth", y="train", color="change", facet="net", log_y=True,
            x_title=Words("layers", "层数"),
            reference=bench.CHANCE, reference_title=Words("guessing", "随机猜测"),
        ),
        Plot(
            "lines",
            Words("Gradient at the input over that at the output, at the start",
                  "训练开始时输入端与输出端梯度之比"),
            x="depth", y="ratio", color="net", log_y=True, x_title=Words("layers", "层数"),
            reference=TRAINABLE, reference_title=Words("0.9^20", "0.9^20"), only={"change": "none"},
        ),
        Plot(
            "profile",
            Words("Gradient over depth, 56 layers, at the start", "56 层网络训练开始时各处的梯度"),
            x="", y="profile", color="net", log_y=True,
            x_title=Words("pairs of layers from the input", "自输入端起的层对"),
            only={"change": "none", "depth": 56},
        ),
        Plot(
            "lines",
            Words("Gradient at the input over that at the output, after training",
                  "训练结束时输入端与输出端梯度之比"),
            x="depth", y="late", color="net", log_y=True, x_title=Words("layers", "层数"),
            reference=TRAINABLE, reference_title=Words("0.9^20", "0.9^20"), only={"change": "none"},
        ),
    ),
    published=(
        Published(
            Words(
                "Plain networks with BatchNorm: the authors argue that vanishing gradients are unlikely to "
                "be the cause, since neither forward nor backward signals vanish",
                "加 BatchNorm 的普通网络：作者认为不大可能是梯度消失所致，因为前向与反向信号都没有消失",
            ),
            "section 4.1",
            "He et al. 2015 (arXiv:1512.03385)",
        ),
        Published(
            Words(
                "Plain convolutional networks trained without shortcuts or norms, by their start alone",
                "不用捷径与归一化，仅凭初始化就能训练的普通卷积网络",
            ),
            "10,000 layers",
            "Xiao et al. 2018 (arXiv:1806.05393), abstract",
        ),
        Published(
            Words("Plain networks trained with the looks-linear start",
                  "采用 looks-linear 初始化训练的普通网络"),
            "about 200 layers",
            "Balduzzi et al. 2017 (arXiv:1702.08591)",
        ),
    ),
    skip=lambda cell: cell["change"] not in CHANGES[cell["net"]],
    relied=True,
)  # fmt: skip
