"""ST-06 Convergence at equal depth, and generalisation where both fit their data equally well."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

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

DEPTHS = (4, 8, 14, 20)  # linear layers in pairs, as in ST-03; an output layer follows
RATES = (0.02, 0.05)
WIRINGS = {"plain": "plain(act='relu')", "residual": "postact"}
SPEED = 0.1  # nats of the running training loss: the race is to there
MATCHED = 0.02  # nats of the loss of all training images: there the test errors are compared
EVERY = 5  # steps, after which that loss is looked at
EARLY = 60  # steps, where the test errors are compared too
CAP = 800  # steps at most; stands for a network that does not get there


class Matched(Exception):  # noqa: N818  # no error
    """All is noted: the error at the level of the comparison, and the early one."""


class Race:
    """Looks on at a training: when its losses are where, and the test errors there."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.losses: list[float] = []
        self.steps = math.nan  # until the running loss is below `SPEED`
        self.early = math.nan  # test error after `EARLY` steps
        self.train = math.nan  # the loss of all training images, once it is below `MATCHED`
        self.error = math.nan  # the test error there

    def begin(self, step: int) -> None:
        """Begin with the first step."""

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the gradients be."""

    def after_update(self, loss: Tensor) -> None:
        """Take the times and the errors; raise `Matched` where nothing is left to note."""
        self.losses.append(loss.item())
        step = len(self.losses)
        if math.isnan(self.steps):
            self.steps = bench.steps_to(self.losses, SPEED)
        early = step == EARLY
        if early or (math.isnan(self.train) and step % EVERY == 0):
            train, error = measured(self.model)
            self.model.train()
            self.early = error if early else self.early
            if math.isnan(self.train) and train < MATCHED:
                self.train, self.error = train, error
        if step >= EARLY and not math.isnan(self.train + self.steps):
            raise Matched

    def flush(self) -> None:
        """Have nothing to write."""


def measured(model: nn.Module) -> tuple[float, float]:
    """Return the loss of all training images and the test error, in evaluation mode.

    The statistics of BatchNorm become those of the training images, which training does not read.
    """
    x, y = bench.training_set(bench.digits())
    bench.refit(model, x)
    train, _ = bench.loss_on(model, x, y)
    _, right = bench.loss_on(model, *bench.test_set(bench.digits()))
    return train, 1 - right


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one network until its training loss is below `MATCHED`; NaN where it never is."""
    model = bench.mlp(
        cell["seed"],
        cell["depth"] // 2,
        WIRINGS[cell["net"]],
        branch_layers=2,
        inner_norm="batchnorm",
        start="he",
    )
    race = Race(model)
    settings = bench.SGD | {"lr": cell["rate"], "steps": cell["steps"]}
    with contextlib.suppress(Matched):
        bench.trained(model, bench.digits(), cell["seed"], watcher=race, **settings)
    return {"steps": race.steps, "early": race.early, "train": race.train, "error": race.error}


def _doublings(rows: Rows, depth: int) -> float:
    """Return log2 of the steps of the plain net over those of the residual one, at best rates."""
    plain, residual = (rows.best("steps", net=net, depth=depth) for net in WIRINGS)
    return math.log2(plain / residual)


def _gain(rows: Rows, metric: str, depth: int) -> float:
    """Return how much higher the plain net's error is, the mean over the rates; NaN if none.

    A rate at which one of the two did not get there is left out.
    """
    gains = []
    for rate in sorted(set(rows.only(depth=depth).column("rate"))):
        plain, residual = (rows.value(metric, net=n, depth=depth, rate=rate) for n in WIRINGS)
        gains.append(plain - residual)
    return statistics.fmean([g for g in gains if not math.isnan(g)] or [math.nan])


def _gain_at_all_depths(rows: Rows) -> float:
    return statistics.fmean(
        _gain(rows, "error", depth) for depth in DEPTHS if depth in rows.column("depth")
    )


DOUBLINGS = Words("doublings of the steps", "次步数翻倍")

STUDY = Study(
    id="ST-06",
    name="convergence",
    title=Words("Speed, and generalisation at equal fit", "收敛速度，与同等拟合下的泛化"),
    question=Words(
        "Does the shortcut make training faster at equal depth, and does it generalise better where both "
        "networks fit the training data equally well?",
        "深度相同时，捷径使训练更快吗？两种网络对训练数据拟合得同样好时，有捷径的泛化更好吗？",
    ),
    design=Words(
        "Plain and residual networks of 4, 8, 14 and 20 layers, and an output layer, built as in the "
        "degradation study, are trained on digits. Speed: steps until the running training loss is below 0.1 nats. Generalisation: every "
        "5 steps the loss of all training images is taken, and where it is first below 0.02 nats the test "
        "errors are compared; beside it, after 60 steps of both. A gain must exceed 1 point; that there is "
        "none at 8 layers is tested as well, as equivalence within 1 point.",
        "与退化实验构造相同的 4、8、14、20 层网络（另有输出层），有无捷径，在手写数字上训练。速度：滑动训练损失降到 0.1 nat 所需步数。"
        "泛化：每 5 步计算一次全部训练图像的损失，在它首次低于 0.02 nat 处比较测试错误率；另外再比较各训练 60 步之后的"
        "测试错误率。超过 1 个百分点才算有提高；8 层时“没有差别”也单独检验（1 个百分点以内的等价性）。",
    ),
    controls=Words(
        "The networks of a seed have the same parameters, start and batches, and both rates, 0.02 and 0.05. "
        "Speeds are compared at the better rate of each, errors at equal rates (mean of the two). A step "
        "costs both the same. Running losses are those of batches in training mode; the loss of all training "
        "images and the test errors are taken in evaluation mode with BatchNorm statistics of the training "
        "set. Equal loss is not equal time: the slower network has seen more epochs by then. The limits were set after a pilot on three other seeds.",
        "同一种子的网络参数量、初始值与批次相同，学习率都用 0.02 与 0.05。速度按各自较好的学习率比较，错误率按相同"
        "学习率比较（两者取平均）。每一步的计算量相同。滑动损失取自训练模式下的批次；全部训练图像的损失与测试错误率"
        "在评估模式下测得，BatchNorm 统计量先在训练集上重新计算。损失相同不等于时间相同：较慢的网络此时看过更多周期。各项界限是在另外三个种子的预实验之后设定的。",
    ),
    lesson=Words(
        "At 20 layers the plain network takes four times the steps to a training loss of 0.1 (about 214 against "
        "54), at 4 layers hardly more (58 against 48). After 60 steps its test error at 20 layers is 29 points "
        "higher in the mean over two rates, 42 where a lower third one counts as well. But where both fit the "
        "training data equally well, the residual network is no better (0.8 points worse at 20 layers). It trains "
        "faster; that it generalises better, beyond that, is not seen here.",
        "20 层时，普通网络要用四倍的步数（约 214 对 54）才降到 0.1 的训练损失，4 层时只略多（58 对 48）。训练 60 步后，20 层普通网络的测试错误率平均高 29 个百分点（两档学习率）"
        "，再算上更低的第三档则高 42 个。但在拟合同样好时，残差网络并不更好（20 层时还差 0.8 个百分点）。看到的是它训练更快，此外并没有泛化得更好。",
    ),
    claims=(
        Claim("0.14", "000", 80, Words(
            "The shortcut speeds up convergence considerably.",
            "捷径显著加快收敛。",
        )),
        Claim("4.3", "004", 13, Words(
            "Residual connections make training faster.",
            "残差连接加快训练。",
        )),
        Claim("2.14b", "002", 141, Words(
            "Shallow networks may train well without shortcuts.",
            "较浅的网络没有捷径也能稳定训练。",
        ), by="shallow"),
        Claim("4.4", "004", 15, Words(
            "Residual connections improve generalisation (beyond fitting better: at equal training loss).",
            "残差连接提高泛化能力（不只是拟合得更好：训练损失相同时）。",
        ), by="generalises"),
        Claim("4.4b", "004", 15, Words(
            "In a deep network they improve it, at equal training loss.",
            "在深层网络中，训练损失相同时，残差连接提高泛化能力。",
        ), by="deep-test"),
        Claim("4.4c", "004", 15, Words(
            "Residual connections improve generalisation (here: after the same 60 steps, at 20 layers).",
            "残差连接提高泛化能力（此处指：20 层，同样训练 60 步之后）。",
        ), by="early-test"),
    ),
    factors={"net": tuple(WIRINGS), "depth": DEPTHS, "rate": RATES},
    measure=measure,
    metrics={
        "steps": Metric(Words("steps to a loss of 0.1", "损失降到 0.1 的步数"), failed=CAP),
        "error": Metric(Words("test error at a training loss of 0.02", "训练损失为 0.02 时的测试错误率")),
        "train": Metric(Words("training loss there", "此时的训练损失"), Words("nats", "nat")),
        "early": Metric(Words("test error after 60 steps", "60 步后的测试错误率"), failed=0.9),
    },
    primary=Contrast(
        Words(
            "At 20 layers the plain network needs at least twice the steps of the residual one.",
            "20 层时，普通网络所需步数至少是残差网络的两倍。",
        ),
        lambda rows: _doublings(rows, 20),
        limit=1.0,
        unit=DOUBLINGS,
    ),
    secondary=(
        Contrast(
            Words(
                "At 4 layers the plain network needs less than 1.5 times the steps of the residual one.",
                "4 层时，普通网络所需步数不到残差网络的 1.5 倍。",
            ),
            lambda rows: _doublings(rows, 4), limit=math.log2(1.5), rule="below", name="shallow",
            unit=DOUBLINGS,
        ),
        Contrast(
            Words(
                "The ratio of their steps, plain to residual, at least doubles from 4 to 20 layers.",
                "普通与残差网络步数之比，从 4 层到 20 层至少翻倍。",
            ),
            lambda rows: _doublings(rows, 20) - _doublings(rows, 4), limit=1.0, name="grows",
            unit=DOUBLINGS,
        ),
        Contrast(
            Words(
                "At 8 layers and equal training loss, both have the same test error, within 1 point.",
                "8 层、训练损失相同时，两者测试错误率相同，相差不到 1 个百分点。",
            ),
            in_points(lambda rows: _gain(rows, "error", 8)), limit=1, rule="within",
            name="same-test", unit=POINTS,
        ),
        Contrast(
            Words(
                "At equal training loss the residual network has a lower test error, by more than 1 point "
                "(mean over the depths).",
                "训练损失相同时，残差网络的测试错误率低 1 个百分点以上（各深度平均）。",
            ),
            in_points(_gain_at_all_depths), limit=1, name="generalises", unit=POINTS,
        ),
        Contrast(
            Words(
                "At 20 layers and equal training loss, the residual network has a lower test error, by more "
                "than 1 point.",
                "20 层、训练损失相同时，残差网络的测试错误率低 1 个百分点以上。",
            ),
            in_points(lambda rows: _gain(rows, "error", 20)), limit=1, name="deep-test", unit=POINTS,
        ),
        Contrast(
            Words(
                "At 20 layers, after 60 steps, the residual network's test error is lower by more than 5 points.",
                "20 层、训练 60 步时，残差网络的测试错误率低 5 个百分点以上。",
            ),
            in_points(lambda rows: _gain(rows, "early", 20)), limit=5, name="early-test", unit=POINTS,
        ),
    ),
    modes={
        "quick": Mode(8, 0.3, {"depth": (4, 8, 20), "rate": (0.05,)}, {"steps": CAP}),
        "default": Mode(12, 1.2, settings={"steps": CAP}),
        "long": Mode(12, 4, {"depth": (*DEPTHS, 32), "rate": (0.01, *RATES)}, {"steps": CAP}),
    },
    plots=(
        Plot(
            "lines", Words("Steps to a training loss of 0.1", "训练损失降到 0.1 的步数"),
            x="depth", y="steps", color="net", facet="rate", log_y=True, x_title=Words("layers", "层数"),
        ),
        Plot(
            "lines", Words("Test error at equal training loss", "训练损失相同时的测试错误率"),
            x="depth", y="error", color="net", facet="rate", x_title=Words("layers", "层数"),
        ),
        Plot(
            "lines", Words("Test error after 60 steps", "60 步后的测试错误率"),
            x="depth", y="early", color="net", facet="rate", x_title=Words("layers", "层数"),
        ),
    ),
    published=(
        Published(
            Words(
                "ImageNet, 18 layers: top-1 error, plain and residual (10-crop); the residual one converges "
                "faster",
                "ImageNet，18 层：Top-1 错误率，普通与残差（十次裁剪）；残差网络收敛更快",
            ),
            "27.94 %; 27.88 %",
            "He et al. 2015 (arXiv:1512.03385), Table 2",
        ),
        Published(
            Words("The same at 34 layers", "同上，34 层"),
            "28.54 %; 25.03 %",
            "He et al. 2015 (arXiv:1512.03385), Table 2",
        ),
    ),
)  # fmt: skip
