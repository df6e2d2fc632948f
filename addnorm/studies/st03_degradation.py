"""ST-03 Degradation: deeper plain networks have a higher training loss, residual ones do not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

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

DEPTHS = (8, 20, 32, 56)  # linear layers in pairs; an output layer follows
FITTED = 0.01  # nats; below it one loss is not worse than another
NETS = ("plain", "residual")
WIRINGS = {"plain": "plain(act='relu')", "residual": "postact"}


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one network of two-layer branches with BatchNorm on digits (v1 units of He 2015)."""
    data = bench.digits()
    model = bench.mlp(
        cell["seed"],
        cell["depth"] // 2,
        WIRINGS[cell["net"]],
        branch_layers=2,
        inner_norm="batchnorm",
        start="he",
    )
    parameters = sum(p.numel() for p in model.parameters())
    steps = cell["steps"] * cell["length"]
    run = bench.trained(
        model, data, cell["seed"], **bench.SGD | {"lr": cell["rate"], "steps": steps}
    )
    x, y = bench.training_set(data)
    bench.refit(model, x)
    train, _ = bench.loss_on(model, x, y)
    test, right = bench.loss_on(model, *bench.test_set(data))
    failed = run.status != "finished"
    return {
        "train": math.nan if failed else train,
        "test": math.nan if failed else test,
        "error": math.nan if failed else 1 - right,
        "parameters": parameters,
    }


def _loss(rows: Rows, net: str, depth: int, length: int = 1) -> float:
    """Return the training loss at the best of the rates, no less than what counts as fitted."""
    return max(rows.best("train", net=net, depth=depth, length=length), FITTED)


def _decades(rows: Rows, net: str, deep: int = 56, shallow: int = 8) -> float:
    """Return how many powers of ten the training loss rises from one depth to another."""
    return math.log10(_loss(rows, net, deep) / _loss(rows, net, shallow))


STUDY = Study(
    id="ST-03",
    name="degradation",
    title=Words("Degradation", "退化现象"),
    question=Words(
        "Does a deeper plain network fit its training data worse, and does the shortcut cure it?",
        "没有捷径的网络更深时，训练误差反而更高吗？加上捷径能否消除？",
    ),
    design=Words(
        "Networks of 8, 20, 32 and 56 linear layers, 64 wide, with BatchNorm after every layer, and an "
        "output layer, with and without the shortcut around each pair of layers (the first unit of He et al. 2015), are "
        "trained on the digits of scikit-learn for about 20 epochs of SGD with momentum.",
        "宽 64 的全连接网络，8、20、32、56 层（另有输出层），每层之后有 BatchNorm；每两层之上加或不加捷径"
        "（He 等 2015 的第一种单元），在 scikit-learn 手写数字上用带动量的 SGD 训练约 20 个周期。",
    ),
    controls=Words(
        "Both networks of a depth have the same parameters, start and batches. The loss is that of all "
        "training images in evaluation mode, so overfitting cannot explain a rise; the "
        "statistics of BatchNorm are taken anew from them first. Three rates are tried for every network "
        "and the lowest training loss counts; below 0.01 nats a network counts as fitted.",
        "同一深度的两种网络参数量、初始值与批次次序都相同。所报损失取自全部训练图像（评估模式，BatchNorm 统计量"
        "先在训练集上重新计算），因此过拟合无法解释损失上升。每种网络试三种学习率，取训练损失最低者；低于 0.01 nat 即视为已拟合。",
    ),
    lesson=Words(
        "Degradation is a failure to fit the training data. Plain networks of 8, 20, 32 and 56 layers end at a "
        "training loss of about 0.002, 0.03, 0.6 and 2.1 nats (guessing is 2.3), those with shortcuts at about "
        "0.001 or less, with the same parameters. Losses below 0.01 count as 0.01, so that fitted networks are "
        "not compared. Five times as many steps bring the plain one of 32 layers from about 0.6 to about 0.06 in "
        "the median; whether that is tenfold these seeds do not decide.",
        "退化是训练数据本身拟合不好，而不是过拟合。8、20、32、56 层的普通网络，训练损失最终约为 0.002、0.03、0.6、2.1 nat（随机猜测为 2.3）"
        "；参数相同而有捷径的网络都在 0.001 左右或更低。低于 0.01 的损失一律按 0.01 计，因为已经拟合好的网络之间不作比较。步数增加到五倍，"
        "32 层普通网络的损失中位数从约 0.6 降到约 0.06；是否达到十倍，这些种子不能断定。",
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
        Claim("0.13", "000", 80, Words(
            "The shortcut makes the model more expressive (here: by adding parameters; what a network can "
            "represent with the same ones is not tested).",
            "捷径提升了模型的表达能力（此处指：因为增加了参数；参数不变时能表示什么，未作检验）。",
        ), by="same-size", stands=False),
        Claim("1.29b", "001", 181, Words(
            "Beyond 20 layers plain networks degrade (here: with this start and optimiser).",
            "普通网络超过 20 层就会退化（此处限于这种初始化与优化器）。",
        ), by="plain-rises"),
    ),
    factors={"net": NETS, "depth": DEPTHS, "rate": (0.01, 0.03, 0.1), "length": (1, 5)},
    skip=lambda cell: cell["length"] > 1 and (cell["net"], cell["depth"]) != ("plain", 32),
    measure=measure,
    metrics={
        "train": Metric(Words("training loss", "训练损失"), Words("nats", "nat"), bench.CHANCE),
        "test": Metric(Words("test loss", "测试损失"), Words("nats", "nat"), bench.CHANCE),
        "error": Metric(Words("test error", "测试错误率"), failed=0.9),
    },
    primary=Contrast(
        Words(
            "From 8 to 56 layers the training loss of the plain network rises by at least ten times "
            "more than that of the residual one.",
            "从 8 层到 56 层，普通网络训练损失的上升倍数至少是残差网络的十倍。",
        ),
        lambda rows: _decades(rows, "plain") - _decades(rows, "residual"),
        limit=1.0,
        unit=Words("powers of ten", "个数量级"),
    ),
    secondary=(
        Contrast(
            Words(
                "The plain network of 56 layers has at least twice the training loss of the one of 20.",
                "56 层普通网络的训练损失至少是 20 层的两倍。",
            ),
            lambda rows: _decades(rows, "plain", 56, 20),
            limit=math.log10(2),
            unit=Words("powers of ten", "个数量级"),
            name="plain-rises",
        ),
        Contrast(
            Words(
                "Five times as many steps lower the training loss of the plain network of 32 layers at "
                "least tenfold: it is slow, not stuck.",
                "步数增加到五倍，32 层普通网络的训练损失降到十分之一以下：它只是慢，并没有卡死。",
            ),
            lambda rows: math.log10(_loss(rows, "plain", 32) / _loss(rows, "plain", 32, 5)),
            limit=1.0,
            unit=Words("powers of ten", "个数量级"),
            name="slow",
        ),
        Contrast(
            Words(
                "With and without shortcuts the networks have the same number of parameters.",
                "有无捷径，网络的参数量相同。",
            ),
            lambda rows: max(
                len(set(rows.only(depth=d).column("parameters"))) - 1
                for d in set(rows.column("depth"))
            ),
            limit=0,
            rule="exact",
            unit=Words("other counts", "不同的参数量"),
            name="same-size",
        ),
    ),
    modes={
        "quick": Mode(8, 0.8, {"depth": (8, 20, 32, 56), "rate": (0.03,)}, {"steps": 120}),
        "default": Mode(8, 3, settings={"steps": 225}),
        "long": Mode(8, 5.5, {"rate": (0.003, 0.01, 0.03, 0.1)}, {"steps": 225}),
    },
    plots=(
        Plot(
            "lines",
            Words("Training loss after training, by depth", "训练结束时的训练损失与深度"),
            x="depth", y="train", color="net", facet="rate", log_y=True, only={"length": 1},
            x_title=Words("layers", "层数"),
            reference=bench.CHANCE, reference_title=Words("guessing", "随机猜测"),
        ),
        Plot(
            "lines", Words("Test error, by depth", "测试错误率与深度"),
            x="depth", y="error", color="net", facet="rate", only={"length": 1},
            x_title=Words("layers", "层数"),
        ),
    ),
    published=(
        Published(
            Words(
                "CIFAR-10: deeper plain nets (20, 32, 44, 56) have a higher training error; shown as "
                "curves only",
                "CIFAR-10：普通网络越深（20、32、44、56），训练误差越高；原文只有曲线",
            ),
            Words("Figure 6, left", "图 6 左"),
            "He et al. 2015 (arXiv:1512.03385)",
        ),
        Published(
            Words(
                "CIFAR-10 test error of ResNet-20, 32, 44, 56, 110",
                "CIFAR-10 测试错误率，ResNet-20、32、44、56、110",
            ),
            "8.75, 7.51, 7.17, 6.97, 6.43 %",
            "He et al. 2015 (arXiv:1512.03385), Table 6",
        ),
    ),
    relied=True,
)  # fmt: skip
