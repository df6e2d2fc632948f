"""ST-22 Degradation with convolutions: the ResNets of the CIFAR experiments, narrow, on digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from addnorm.models.resnet import ResNet, ResNetConfig
from addnorm.studies import bench
from addnorm.studies.frame import (
    POINTS,
    Claim,
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

WIDTH = 8  # channels of the first stage; 16 in the paper
FITTED = 0.01  # nats: below it every training image is right, and a smaller loss says nothing
DEPTHS = (20, 56)  # 6n + 2, n = 3 and 9
WIRINGS = {"plain": "plain(act='relu')", "residual": "postact"}


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one ResNet v1 with option A shortcuts, or the same network without, on digits."""
    data = bench.digits()
    torch.manual_seed(cell["seed"])
    wiring = WIRINGS[cell["net"]]
    model = ResNet(ResNetConfig(depth=cell["depth"], width=WIDTH, wiring=wiring, channels=1))
    settings = bench.SGD | {"lr": cell["rate"], "steps": cell["steps"]}
    run = bench.trained(model, data, cell["seed"], **settings)
    parameters = sum(p.numel() for p in model.parameters())
    if run.status != "finished":
        return {"parameters": parameters}
    x, y = bench.training_set(data)
    bench.refit(model, x)
    train, right = bench.loss_on(model, x, y)
    test, right_of_test = bench.loss_on(model, *bench.test_set(data))
    return {
        "train": train,
        "train_error": 1 - right,
        "test": test,
        "error": 1 - right_of_test,
        "parameters": parameters,
    }


def _rises(net: str) -> Callable[[Rows], float]:
    """Return how many powers of ten the training loss rises with depth, each at its best rate."""

    def effect(rows: Rows) -> float:
        low, high = (rows.best("train", net=net, depth=d) for d in DEPTHS)
        return math.log10(max(high, FITTED) / max(low, FITTED))

    return effect


def _errors(rows: Rows) -> float:
    """Return the test error of the deep plain network less that of the deep residual one.

    Each at the rate with its lowest training loss.
    """
    found = {
        net: min(rows.only(net=net, depth=DEPTHS[-1]), key=lambda row: row["train"])["error"]
        for net in WIRINGS
    }
    return float(found["plain"] - found["residual"])


def _counts(rows: Rows) -> float:
    """Return how many other parameter counts there are than one for each depth."""
    return max(len(set(rows.only(depth=d).column("parameters"))) - 1 for d in DEPTHS)


DECADES = Words("powers of ten", "个数量级")

STUDY = Study(
    id="ST-22",
    name="resnet",
    title=Words("Degradation with convolutions", "卷积网络的退化"),
    question=Words(
        "Does the degradation of plain networks, and its cure by shortcuts, appear in the convolutional "
        "networks of the ResNet paper, at a size that a CPU trains?",
        "在 ResNet 论文的卷积网络中，缩小到 CPU 可训练的规模，普通网络的退化以及捷径的疗效还会出现吗？",
    ),
    design=Words(
        "The CIFAR networks of He et al. 2015 with 20 and 56 layers (n = 3 and 9 units in each of three "
        "stages), 8, 16 and 32 channels wide, on the 8x8 digits of scikit-learn: with option A shortcuts, "
        "which have no parameters, and without. SGD with momentum, about 20 epochs, three rates, of which "
        "each network keeps the one with the lowest training loss.",
        "He 等 2015 的 CIFAR 网络，20 和 56 层（三个阶段各 n = 3 或 9 个单元），通道数 8、16、32，在 scikit-learn 的 "
        "8x8 手写数字上训练：带不含参数的 A 型捷径，或不带捷径。SGD 加动量，约 20 个周期，三个学习率，各取训练损失最低者。",
    ),
    controls=Words(
        "Both networks of a depth have the same parameters, start and batches, and batch norm after every "
        "convolution. The loss is that of all training images in evaluation mode, with the statistics of "
        "batch norm taken anew from them: overfitting cannot explain a rise. A loss below 0.01 counts as "
        "0.01, for by then all training images are right. "
        "Images are small: the last stage sees 2x2 pixels.",
        "同一深度的两种网络参数量、初始值与批次次序都相同，每个卷积之后都有批归一化。所报损失取自全部训练图像（评估"
        "模式，批归一化的统计量先在其上重新计算），过拟合无法解释损失上升。低于 0.01 的损失按 0.01 计，此时训练图像已全部分对。图像很小：最后一个阶段只有 2x2 像素。",
    ),
    lesson=Words(
        "Convolutional networks on tiny images, the nearest to the documents' experiment that a CPU trains, "
        "degrade as well: from 20 to 56 layers the plain one's training loss rises from 0.012 to about 1.0 nats, "
        "each at its best rate, and its test error from 2 to over 40 %; with the same parameters and shortcuts "
        "both depths fit every image (below 0.001) and err on 1 to 2 %. Losses below 0.01 count as 0.01: a ratio "
        "of two tiny losses says nothing. The linear networks of ST-03 are the cheaper form of the same "
        "comparison.",
        "小图像上的卷积网络，是 CPU 能训练的规模内最接近各文档所讲实验的，同样会退化：从 20 层到 56 层，普通网络的训练损失由 0.012 升至约 1.0 nat（各取最佳学习率）"
        "，测试错误率由 2% 升至 40% 以上；参数相同而有捷径的网络，两种深度都拟合了每一张图像（损失低于 0.001），错误率 1% 至 2%。"
        "低于 0.01 的损失一律按 0.01 计：两个极小损失之比没有意义。ST-03 的全连接网络是同一比较的廉价形式。",
    ),
    claims=(
        Claim("1.3", "001", 9, Words(
            "Residual connections remove the degradation of deep networks.",
            "残差连接消除了深层网络的退化。",
        )),
        Claim("1.6", "001", 15, Words(
            "A plain network of 56 layers has a higher training error than one of 20.",
            "56 层的普通网络，训练误差高于 20 层。",
        ), by="plain-rises"),
        Claim("1.7", "001", 27, Words(
            "This is not overfitting, since the training error rises too.",
            "这不是过拟合，因为训练误差也升高。",
        ), by="plain-rises"),
    ),
    factors={"net": tuple(WIRINGS), "depth": DEPTHS, "rate": (0.03, 0.1, 0.3)},
    measure=measure,
    metrics={
        "train": Metric(Words("training loss", "训练损失"), Words("nats", "nat"), bench.CHANCE),
        "train_error": Metric(Words("training error", "训练错误率"), failed=0.9),
        "test": Metric(Words("test loss", "测试损失"), Words("nats", "nat"), bench.CHANCE),
        "error": Metric(Words("test error", "测试错误率"), failed=0.9),
        "parameters": Metric(Words("parameters", "参数量")),
    },
    primary=Contrast(
        Words(
            "From 20 to 56 layers the training loss of the plain network rises by at least ten times more "
            "than that of the residual one.",
            "从 20 层到 56 层，普通网络训练损失的上升倍数至少是残差网络的十倍。",
        ),
        lambda rows: _rises("plain")(rows) - _rises("residual")(rows),
        limit=1.0,
        unit=DECADES,
    ),
    secondary=(
        Contrast(
            Words("The plain network of 56 layers has at least twice the training loss of the one of 20.",
                  "56 层普通网络的训练损失至少是 20 层的两倍。"),
            _rises("plain"), limit=math.log10(2), unit=DECADES, name="plain-rises",
        ),
        Contrast(
            Words("The residual network of 56 layers has at most twice the training loss of the one of 20.",
                  "56 层残差网络的训练损失至多是 20 层的两倍。"),
            _rises("residual"), limit=math.log10(2), rule="below", unit=DECADES, name="residual-stays",
        ),
        Contrast(
            Words("At 56 layers the plain network has at least 5 points more test error.",
                  "56 层时，普通网络的测试错误率至少高 5 个百分点。"),
            in_points(_errors), limit=5, unit=POINTS, name="test-error",
        ),
        Contrast(
            Words("With and without shortcuts the networks have the same number of parameters.",
                  "有无捷径，网络的参数量相同。"),
            _counts, limit=0, rule="exact", unit=Words("other counts", "不同的参数量"), name="same-size",
        ),
    ),
    modes={
        "quick": Mode(7, 0.8, {"rate": (0.03,)}, {"steps": 120}),
        "default": Mode(8, 5, settings={"steps": 225}),
    },
    plots=(
        Plot("lines", Words("Training loss after training, by depth", "训练结束时的训练损失与深度"), x="depth",
             y="train", color="net", facet="rate", log_y=True, x_title=Words("layers", "层数"),
             reference=bench.CHANCE, reference_title=Words("guessing", "随机猜测")),
        Plot("lines", Words("Test error, by depth", "测试错误率与深度"), x="depth", y="error", color="net",
             facet="rate", x_title=Words("layers", "层数")),
    ),
    published=(
        Published(
            Words("CIFAR-10: plain networks of 20 to 56 layers have the higher training error the deeper they "
                  "are; curves only",
                  "CIFAR-10：20 至 56 层的普通网络越深训练误差越高；原文只有曲线"),
            Words("Figure 6, left", "图 6 左"),
            "He et al. 2015 (arXiv:1512.03385)",
        ),
        Published(
            Words("CIFAR-10 test error of ResNet-20 and ResNet-56", "CIFAR-10 测试错误率，ResNet-20 与 ResNet-56"),
            "8.75, 6.97 %",
            "He et al. 2015 (arXiv:1512.03385), Table 6",
        ),
    ),
    heavy=True,
)  # fmt: skip
