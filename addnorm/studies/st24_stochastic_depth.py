"""ST-24 Stochastic depth: at equal epochs, and at equal compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from addnorm.contract import Wiring
from addnorm.data.images import ImageData
from addnorm.models.resnet import Change, ResNet, ResNetConfig
from addnorm.studies import bench
from addnorm.studies.frame import (
    POINTS,
    Contrast,
    Metric,
    Mode,
    Plot,
    Published,
    Rows,
    Study,
    Words,
    in_points,
)

DEPTH, WIDTH, IMAGES = 38, 8, 400  # 18 units; channels of the first stage; training images
# The paper's form: one draw for a whole batch, so that a unit that is dropped costs nothing.
WIRINGS = {
    "full": "droppath(rate=0.0, per='batch')",
    "stochastic": "droppath(rate=0.5, per='batch')",
}


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one ResNet on a few digits and return what it makes of the others."""
    data = few_digits(cell["seed"], IMAGES)
    torch.manual_seed(cell["seed"])
    model = network(cell["net"])
    kept = share(network("stochastic"))
    steps = round(cell["steps"] / kept) if cell["length"] == "long" else cell["steps"]
    settings = bench.SGD | {"lr": cell["rate"], "steps": steps, "batch": 64, "schedule": "step"}
    run = bench.trained(model, data, cell["seed"], **settings)
    facts = {"steps": steps, "compute": steps * share(model) / cell["steps"]}
    if run.status != "finished":
        return facts
    train, _ = bench.loss_on(model, *bench.training_set(data))
    last = run.evaluations[-1]
    return facts | {"train": train, "test": last.loss, "error": 1 - last.accuracy}


def few_digits(seed: int, count: int) -> ImageData:
    """Return the digits with `count` random ones to train on and all others to test on."""
    images = bench.digits().images
    chosen = np.random.default_rng(seed).permutation(len(images.labels))[:count]
    test = np.ones(len(images.labels), dtype=bool)
    test[chosen] = False
    return ImageData(replace(images, test=test), augment="off")


def network(net: str) -> ResNet:
    """Return a ResNet of pre-activation units, whose batch norms are the wiring's."""
    return ResNet(ResNetConfig(depth=DEPTH, width=WIDTH, wiring=WIRINGS[net], channels=1))


def share(model: ResNet) -> float:
    """Return the expected share of units that are computed in a training step."""
    kept: list[Any] = [m.keep for m in model.modules() if isinstance(m, Wiring)]
    always = sum(isinstance(m, Change) for m in model.modules())  # they change the width
    return float((sum(kept) + always) / (len(kept) + always))


# -- what is made of the rows --------------------------------------------------------------------


def _gain(rows: Rows, metric: str, stochastic: str, full: str) -> float:
    """Return the metric with stochastic depth less that without, for a length each."""
    one = rows.value(metric, net="stochastic", length=stochastic)
    return float(one - rows.value(metric, net="full", length=full))


def _equal_epochs(rows: Rows) -> float:
    """Return the difference of the test errors, the mean of both lengths."""
    return (_gain(rows, "error", "short", "short") + _gain(rows, "error", "long", "long")) / 2


def _underfits(rows: Rows) -> float:
    """Return log10 of the training loss with stochastic depth over that without, equal epochs."""
    pairs = [
        (rows.value("train", net=net, length=length) for net in ("stochastic", "full"))
        for length in ("short", "long")
    ]
    return sum(math.log10(max(one, 1e-6) / max(other, 1e-6)) for one, other in pairs) / 2


STUDY = Study(
    id="ST-24",
    name="stochastic-depth",
    title=Words("Stochastic depth", "随机深度"),
    question=Words(
        "Does dropping whole residual units at random while training lower the test error, and is that "
        "more than what the saved computing would buy?",
        "训练时随机丢弃整个残差单元，能降低测试错误率吗？这是否超过省下的计算量所能换来的？",
    ),
    design=Words(
        "ResNets of 38 layers (18 pre-activation units, 8 to 32 channels) are trained on 400 of the "
        "8x8 digits and tested on the other 1,397. Stochastic depth as in Huang et al. 2016: one draw "
        "for each batch and unit, the chance to be dropped rising linearly to a half in the last unit, "
        "the expected update in evaluation. On average three quarters of the units are computed, so the "
        "long training has a third more steps: with stochastic depth it costs what the short one costs "
        "without.",
        "38 层 ResNet（18 个预激活单元，8 至 32 通道）在 400 张 8x8 手写数字上训练，在其余 1397 张上测试。随机深度按 "
        "Huang 等 2016：每个批次对每个单元抽一次，丢弃概率线性增至末个单元的一半，评估时用更新的期望。平均只计算四分"
        "之三的单元，因此“长”训练多三分之一的步数：带随机深度的长训练与不带的短训练计算量相同。",
    ),
    controls=Words(
        "All four trainings of a seed have the same start and the same 400 images; batches of equal number "
        "are the same. The rate falls to a tenth at a half and at three quarters of each training. So few "
        "images make overfitting likely, which is where a regulariser should help. One rate for all.",
        "同一种子的四次训练初始值相同，400 张图像相同，同一步的批次也相同。学习率在训练的一半和四分之三处各降为十分"
        "之一。图像这样少，容易过拟合，正是正则化应当有用的情形。各组使用同一个学习率。",
    ),
    lesson=Words(
        "Not reproduced at this size: with 400 images and 300 steps stochastic depth lowers the test error by "
        "0.25 points [-0.68, 0.25 the other way], which these seeds cannot tell from nothing; they only say that "
        "the difference is below a point. At equal compute, with a third more steps, it is 0.86 points, as "
        "undecided. Nor is the training loss clearly higher with it, so there was little to regularise. Huang et "
        "al. gain 1.2 points on CIFAR-10 at 110 layers and 500 epochs. Equal epochs and equal compute are two "
        "questions: a training that skips a quarter of its units may take a third more steps for the same price, "
        "and those alone may lower the error.",
        "在这一规模上没有重现：用 400 张图像、300 步，随机深度使测试错误率降低 0.25 个百分点（区间从降 0.68 到升 0.25），这些种子分不出它与零的差别，"
        "只能说差别不到 1 个百分点。计算量相同时（多三分之一的步数）为 0.86 个百分点，同样不能断定。训练损失也没有明显更高，可见没有多少可供正则化的余地。"
        "Huang 等人在 CIFAR-10 上用 110 层、500 个周期，降低 1.2 个百分点。周期相同与计算量相同是两个问题：跳过四分之一单元的训练，"
        "以同样的代价可以多走三分之一的步数，而步数增加本身就可能降低错误率。",
    ),
    claims=(),
    factors={"net": tuple(WIRINGS), "length": ("short", "long")},
    measure=measure,
    metrics={
        "error": Metric(Words("test error", "测试错误率"), failed=0.9),
        "test": Metric(Words("test loss", "测试损失"), Words("nats", "nat"), bench.CHANCE),
        "train": Metric(Words("training loss", "训练损失"), Words("nats", "nat"), bench.CHANCE),
        "compute": Metric(Words("units computed, over those of the short full training",
                                "所计算的单元数与完整短训练之比")),
        "steps": Metric(Words("steps", "步数")),
    },
    primary=Contrast(
        Words(
            "At equal epochs stochastic depth lowers the test error.",
            "训练周期相同时，随机深度降低测试错误率。",
        ),
        in_points(_equal_epochs),
        limit=0.0,
        rule="below",
        unit=POINTS,
    ),
    secondary=(
        Contrast(
            Words("At equal compute stochastic depth lowers the test error.",
                  "计算量相同时，随机深度降低测试错误率。"),
            in_points(lambda rows: _gain(rows, "error", "long", "short")),
            limit=0.0, rule="below", unit=POINTS, name="equal-compute",
        ),
        Contrast(
            Words("At equal epochs the training loss is at least twice as high with it: it regularises.",
                  "训练周期相同时，带随机深度的训练损失至少高一倍：它起正则化作用。"),
            _underfits, limit=math.log10(2), unit=Words("powers of ten", "个数量级"), name="regularises",
        ),
        Contrast(
            Words("At equal epochs the test errors differ by less than one point.",
                  "训练周期相同时，测试错误率相差不到 1 个百分点。"),
            in_points(_equal_epochs), limit=1, rule="within", unit=POINTS, name="within-a-point",
        ),
    ),
    modes={
        "quick": Mode(7, 0.8, settings={"steps": 100, "rate": 0.05}),
        "default": Mode(8, 2.5, settings={"steps": 300, "rate": 0.05}),
    },
    plots=(
        Plot("dots", Words("Test error", "测试错误率"), x="length", y="error", color="net"),
        Plot("dots", Words("Test loss", "测试损失"), x="length", y="test", color="net"),
        Plot("dots", Words("Training loss", "训练损失"), x="length", y="train", color="net", log_y=True),
    ),
    published=(
        Published(
            Words("CIFAR-10 test error of a ResNet of 1,202 layers with stochastic depth",
                  "CIFAR-10 测试错误率，1202 层 ResNet 加随机深度"),
            "4.91 %",
            "Huang et al. 2016 (arXiv:1603.09382), abstract",
        ),
    ),
    heavy=True,
)  # fmt: skip
