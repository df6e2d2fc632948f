"""ST-30 Depth 64: which wirings of the catalogue train without warm-up, each at its own rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from addnorm.contract import catalogue, is_own
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

DEPTH = 64
RATES = (1e-3, 3e-4, 3e-3, 1e-2)  # tried in this order until one trains
FAIL = 0.2  # training error above which a training failed; He et al. 2016 count test errors so
GUESSING = 0.9
POWER = {"constant", "sqrt", "linear"}  # laws over depth that are no faster than a power
# What asks something of an attention has no place in an MLP.
ENTRIES = {name: kind for name, kind in catalogue().items() if not (is_own(kind) or kind.asks)}
LAWS = {
    name: "power" if {kind.stream_law, kind.gradient_law} <= POWER else "exponential"
    for name, kind in ENTRIES.items()
}
# The un-normalised sum with the small start of GPT-2, and pre-norm with the large one of Xavier.
CONTROLS = {"residual/gpt2": "control", "prenorm/fairseq": "control"}
NETS = LAWS | CONTROLS
SHARE = Words("share of wirings", "接法占比")
PERCENT = Words("% training error", "% 训练错误率")


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one deep MLP on digits at one rate after the other, until it trains.

    The errors are those at that rate, else at the one with the smallest training error.
    """
    errors: dict[float, tuple[float, float]] = {}
    for rate in RATES:
        errors[rate] = _errors(cell["wiring"], cell["seed"], rate, cell["steps"])
        if errors[rate][0] <= FAIL:
            break
    finished = [pair for pair in errors.values() if not math.isnan(pair[0])]
    error, test = min(finished, default=(math.nan, math.nan))
    return {
        "error": error,
        "test": test,
        "first": errors[RATES[0]][0],
        "rate": rate if errors[rate][0] <= FAIL else 0.0,
    }


def _errors(wiring: str, seed: int, rate: float, steps: int) -> tuple[float, float]:
    """Return training and test error after a training without warm-up; NaN where it diverged."""
    spec, _, start = wiring.partition("/")
    model, data = bench.mlp(seed, DEPTH, spec, branch_layers=2, start=start), bench.digits()
    run = bench.trained(model, data, seed, **bench.ADAM, lr=rate, steps=steps)
    if run.status != "finished":
        return math.nan, math.nan
    _, right = bench.loss_on(model, *bench.training_set(data))
    return 1 - right, 1 - run.evaluations[-1].accuracy


def _share(rows: Rows, law: str) -> float:
    """Return the share of the wirings of a law that train at one of the rates."""
    errors: list[float] = rows.only(law=law).column("error")
    return sum(error <= FAIL for error in errors) / len(errors)


def _of(rows: Rows, wiring: str, metric: str = "error") -> float:
    return float(rows.only(wiring=wiring)[0][metric])


STUDY = Study(
    id="ST-30",
    name="depth-64",
    title=Words("The catalogue at depth 64", "深度 64 时的全部接法"),
    question=Words(
        "Which wirings train 64 connections deep without warm-up, and does the law of their stream and "
        "gradient at the start tell which?",
        "深达 64 个连接、不用预热时，哪些接法能训练？初始时残差流与梯度随深度的规律能否预示结果？",
    ),
    design=Words(
        f"Each wiring of the catalogue joins {DEPTH} two-layer branches with ReLU, 64 wide, into an MLP, "
        "which is trained on the digits of scikit-learn for about nine epochs of Adam without warm-up. The "
        "catalogue states for each how stream and gradient go with depth at its start: level or by a power "
        "of the depth, or exponentially. A wiring trains when it gets at least 80 % of the training images "
        "right at one of four rates, tried in the order 1e-3, 3e-4, 3e-3, 1e-2.",
        f"目录中的每种接法各连接 {DEPTH} 个两层 ReLU 分支（宽 64），构成一个 MLP，在 scikit-learn 手写数字上用 Adam 训练约 9 "
        "个周期，不预热。目录写明了每种接法初始时残差流与梯度随深度的规律：不变或按幂次变化，或按指数变化。依次尝试 1e-3、"
        "3e-4、3e-3、1e-2 四档学习率，任意一档能答对至少 80 % 的训练图像，即算能训练。",
    ),
    controls=Words(
        "Same branches, batches and steps. Each wiring has the start that its paper asks for, which is "
        "part of the scheme and of its law, so wiring and start are not told apart, except by two controls: "
        "the plain sum x + F(x) with the small start of GPT-2, and pre-norm with Xavier's large one. The "
        "laws were stated for a Transformer of 24 layers, before this study. hybridnorm, which asks for an "
        "attention, is left out. Short trainings on small images: a wiring that fails here is slow or "
        "fragile, not useless, and several were made for BatchNorm in the branch.",
        "分支、批次与步数都相同。每种接法采用其论文要求的初始化；初始化是方案及其规律的一部分，因此接法与初始化的作用没有分开，"
        "只有两个对照例外：x + F(x) 配 GPT-2 的小初始值，pre-norm 配 Xavier 的大初始值。这些规律是在本研究之前，针对 24 层 "
        "Transformer 写下的。hybridnorm 需要注意力，未列入。训练短、图像小：在此失败只说明慢或脆弱，并非无用；其中几种接法"
        "原是为分支内带 BatchNorm 的网络设计的。",
    ),
    lesson=Words(
        "At 64 layers and without warm-up, all 37 wirings whose law at the start is a power of depth, or level, "
        "train at one of four rates. Of the twelve with an exponential law three train all the same: inject and "
        "gtrxl, whose gates or inputs keep a way open, and relu-before-addition just below the line. The others, "
        "the plain sum, the 2015 block, highway and factors on the shortcut among them, train at no rate. But it "
        "is the start as much as the wiring: the plain sum without any norm trains to 0.3 % once its branches "
        "start small as in GPT-2. Post-norm, and b2t with it, is the one of the first group that needs care: 90 % "
        "error at 1e-3, 8 % at 3e-4; exclusive gates reach 10 %, the rest 3 % or less. 100 steps on small digits "
        "say what trains, not what is best.",
        "64 层、不预热时，初始规律为幂次或不变的 37 种接法，在四档学习率之一下全都能训练。规律为指数的十二种中，有三种照样能训练："
        "inject 与 gtrxl（其门控或输入留有通路），以及刚好越过界线的 relu-before-addition。其余的，包括直接相加、2015 年的块、highway 和捷径上的各种系数，"
        "在哪档学习率下都不行。但起作用的不只是接法，初始值同样重要：没有任何归一化的直接相加，只要分支像 GPT-2 那样从小处开始，就能训练到 0.3%。"
        "第一组中需要小心的是 post-norm（以及 b2t）：1e-3 时错误率 90%，3e-4 时 8%；exclusive-gating 为 10%，其余都在 3% 以内。在小幅数字图像上训练 100 步，"
        "说明的是能否训练，而不是谁最好。",
    ),
    claims=(),
    factors={"law": ("power", "exponential", "control"), "wiring": tuple(NETS)},
    skip=lambda cell: NETS[cell["wiring"]] != cell["law"],
    measure=measure,
    metrics={
        "error": Metric(Words("smallest training error", "最小训练错误率"), failed=GUESSING),
        "test": Metric(Words("test error at that rate", "该学习率下的测试错误率"), failed=GUESSING),
        "first": Metric(Words("training error at 1e-3", "学习率 1e-3 时的训练错误率"), failed=GUESSING),
        "rate": Metric(Words("first rate that trains, 0 for none", "首个能训练的学习率，0 表示没有")),
    },
    primary=Contrast(
        Words(
            "Of the wirings whose law is a power or level, the share that trains is larger by more than a half "
            "than of those whose law is exponential.",
            "规律为幂次或不变的接法中，能训练的占比，比规律为指数的接法高出一半（50 个百分点）以上。",
        ),
        in_points(lambda rows: _share(rows, "power") - _share(rows, "exponential")),
        limit=50,
        unit=POINTS,
    ),
    secondary=(
        Contrast(
            Words(
                "Of the wirings with a power or level law more than nine in ten train.",
                "规律为幂次或不变的接法，九成以上能训练。",
            ),
            lambda rows: _share(rows, "power"),
            limit=0.9, unit=SHARE, name="power-trains",
        ),
        Contrast(
            Words(
                "The plain sum x + F(x) does not train at any of the four rates.",
                "x + F(x) 在四档学习率下都不能训练。",
            ),
            in_points(lambda rows: _of(rows, "residual")),
            limit=100 * FAIL, unit=PERCENT, name="sum-fails",
        ),
        Contrast(
            Words(
                "With the small start of GPT-2 it does.",
                "改用 GPT-2 的小初始值，它就能训练。",
            ),
            in_points(lambda rows: _of(rows, "residual/gpt2")),
            limit=100 * FAIL, rule="below", unit=PERCENT, name="small-start",
        ),
        Contrast(
            Words(
                "At 1e-3 post-norm's training error is more than 30 points above pre-norm's.",
                "学习率 1e-3 时，post-norm 的训练错误率比 pre-norm 高 30 个百分点以上。",
            ),
            in_points(
                lambda rows: _of(rows, "postnorm", "first") - _of(rows, "prenorm", "first")
            ),
            limit=30, unit=POINTS, name="post-norm",
        ),
        Contrast(
            Words(
                "At one of the four rates post-norm trains all the same.",
                "但在四档学习率之一下，post-norm 仍能训练。",
            ),
            in_points(lambda rows: _of(rows, "postnorm")),
            limit=100 * FAIL, rule="below", unit=PERCENT, name="post-norm-slower",
        ),
    ),
    modes={
        "quick": Mode(8, 2.5, {"wiring": (
            "plain", "residual", "postact", "postnorm", "prenorm", "deepnorm", "rezero", "lns",
            "layerscale", "highway", "constant-scaling", "linear-shortcut", "residual/gpt2",
        )}, {"steps": 60}),
        "default": Mode(8, 20, settings={"steps": 100}),
    },
    plots=(
        Plot(
            "dots", Words("Training error by the law at the start", "训练错误率与初始规律"),
            x="law", y="error",
            x_title=Words("law over depth", "随深度的规律"),
            reference=FAIL, reference_title=Words("limit of failing", "失败界线"),
        ),
        Plot(
            "dots", Words("Exponential at the start", "初始时按指数变化"),
            x="wiring", y="error", only={"law": "exponential"},
            reference=FAIL, reference_title=Words("limit of failing", "失败界线"),
        ),
        Plot(
            "dots", Words("Level or a power at the start", "初始时不变或按幂次变化"),
            x="wiring", y="error", only={"law": "power"},
            reference=FAIL, reference_title=Words("limit of failing", "失败界线"),
        ),
        Plot(
            "dots", Words("Controls", "对照"),
            x="wiring", y="error", only={"law": "control"},
            reference=FAIL, reference_title=Words("limit of failing", "失败界线"),
        ),
    ),
    published=(
        Published(
            Words(
                "CIFAR-10, 110 layers: a shortcut scaled by 0.5 beside a full branch, exclusive gating with a "
                "bias of 0, and a shortcut with dropout of 0.5 exceed 20 % test error",
                "CIFAR-10，110 层：捷径乘以 0.5（分支不变）、偏置为 0 的互斥门控、以 0.5 随机丢弃的捷径，测试错误率都超过 20 %",
            ),
            Words("fail", "失败"),
            "He et al. 2016 (arXiv:1603.05027), Table 1",
        ),
        Published(
            Words(
                "Post-norm of 18 encoder and 18 decoder layers does not train on IWSLT-14 without a good start or "
                "warm-up",
                "IWSLT-14 上，编码器与解码器各 18 层的 post-norm 没有合适的初始化或预热就不能训练",
            ),
            Words("text", "正文"),
            "Wang et al. 2022 (arXiv:2203.00555), section 3",
        ),
    ),
    heavy=True,
)  # fmt: skip
