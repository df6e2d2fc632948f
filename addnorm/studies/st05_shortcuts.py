"""ST-05 The shortcut zoo: what may be done to a shortcut, and to the branch beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from scipy.stats import kendalltau
from torch import Tensor, nn
from torch.nn import functional as F

from addnorm.models.mlp import MLP
from addnorm.probe.discover import discover
from addnorm.probe.tap import Point, Visitor, tapped
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

BLOCKS = 27  # of two linear layers, 64 wide; twice as many of one
FAIL = 0.2  # test error above which a training has failed (He et al. 2016, table 1)
RATE = 0.05  # of what is not in the paper
DROP = 0.1  # the rate of dropout in document 002


class Variant(NamedTuple):
    """A wiring, what else differs in the network, and the paper's error in % (100: it failed)."""

    wiring: str
    paper: float = math.nan
    config: Mapping[str, Any] = {}
    edit: str = ""


MULTIPLIED = {  # the shortcut is x times something that is not 1, or BatchNorm is on it
    "0.5 x + F": Variant("constant-scaling(skip=0.5,scale=1.0)", 100),
    "0.5 x + 0.5 F": Variant("constant-scaling", 12.35),
    "exclusive gate 0": Variant("exclusive-gating(bias=0.0)", 100),
    "shortcut gate 0": Variant("shortcut-gating(bias=0.0)", 12.86),
    "W x + F": Variant("linear-shortcut", 12.22),
    "dropout 0.5 on x": Variant("dropout-shortcut", 100),
    "BN after +": Variant("norm-after-addition", 8.17, {"norm": "batchnorm"}, "one norm less"),
}
IDENTITY = {  # or nearly so: a gate of -6 lets 0.9975 of x pass
    "original": Variant("postact", 6.61),
    "exclusive gate -6": Variant("exclusive-gating", 8.70),
    "shortcut gate -6": Variant("shortcut-gating", 6.91),
    "ReLU before +": Variant("relu-before-addition", 7.84),
    "ReLU-only pre-act": Variant("residual", 6.71, edit="ReLU in front"),
    "pre-activation": Variant("residual", 6.37, {"preactivation": True}),
}
ONE = {"branch_layers": 1}
OTHERS = {
    "plain": Variant("plain(act='relu')", 100),
    "0.95 x + F": Variant("constant-scaling(skip=0.95,scale=1.0)"),
    "0.9 x + F": Variant("constant-scaling(skip=0.9,scale=1.0)"),
    "0.8 x + F": Variant("constant-scaling(skip=0.8,scale=1.0)"),
    "dropout on stream": Variant("postact", edit="dropout on the stream"),
    "dropout on branch": Variant("postact", edit="dropout on the branch"),
    "one layer": Variant("postact", 9.90, ONE, "no activation inside"),
    "each ReLU": Variant("residual", config=ONE),
    "each GELU": Variant("residual", config={**ONE, "activation": "gelu"}),
    "as drawn": Variant("residual"),
    "as drawn, GELU": Variant("residual", config={"activation": "gelu"}),
}
VARIANTS = MULTIPLIED | IDENTITY | OTHERS


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """X-ray one network at its start, train it on digits, and look at its stream again."""
    model = build(cell["seed"], VARIANTS[cell["variant"]])
    data = bench.digits()
    x, y = bench.training_set(data)
    start = xray(model, x[:128], y[:128])
    settings = bench.SGD | {"lr": cell["rate"], "steps": cell["steps"]}
    run = bench.trained(model, data, cell["seed"], **settings)
    finished = run.status == "finished"
    falls = Falls()
    model.eval()
    with torch.no_grad(), tapped(model, discover(model, x[:128]), falls):
        model(x[:128])
    return {
        "error": 1 - run.evaluations[-1].accuracy if finished else math.nan,
        "train": bench.loss_on(model, x, y)[0] if finished else math.nan,
        "passed": sum(math.log10(max(c.identity_gain, 1e-3)) for c in start.connections),
        "alike": start.token_similarity,
        "falls": max(falls.shares),
    }


def build(seed: int, variant: Variant) -> MLP:
    """Return the network: He-normal, BatchNorm after every linear layer unless the variant differs."""
    config = {"branch_layers": 2, "inner_norm": "batchnorm", "start": "he", **variant.config}
    depth = BLOCKS * 2 // config["branch_layers"]
    model = bench.mlp(seed, depth, variant.wiring, **config)
    if variant.edit == "ReLU in front":
        model.norm = nn.ReLU()  # as the paper's: an activation behind the last addition
    for connection in model.stack:
        branch = connection.branch
        if variant.edit == "ReLU in front":
            branch.register_forward_pre_hook(_relu)
        elif variant.edit == "one norm less":
            branch.get_submodule("norms").register_module("1", nn.Identity())
        elif variant.edit == "no activation inside":
            branch.register_module("activation", nn.Identity())
        elif variant.edit == "dropout on the stream":
            connection.register_forward_hook(_dropout)  # document 002, line 111
        elif variant.edit == "dropout on the branch":
            branch.register_forward_hook(_dropout)
    return model


def _relu(_module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return F.relu(given[0]), *given[1:]


def _dropout(module: nn.Module, _given: Any, out: Tensor) -> Tensor:
    return F.dropout(out, DROP, module.training)


class Falls(Visitor):
    """The share of the stream's coordinates that are smaller behind a connection; over depth."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.entered = torch.empty(0)

    def __call__(self, k: int, point: Point) -> None:
        """Keep what enters."""
        self.entered = point.stream

    def after(self, k: int, out: Any) -> None:
        """Hold what leaves against it."""
        self.shares.append((out < self.entered).float().mean().item())


def _beyond_paper(cell: Mapping[str, Any]) -> bool:
    """Whether a rate is left out: what the paper does not have is trained at one."""
    return bool(math.isnan(VARIANTS[cell["variant"]].paper) and cell["rate"] != RATE)


def _error(rows: Rows, variant: str, rate: float | None = None) -> float:
    """Return the test error, at the better rate unless one is given; NaN where it was left out."""
    return rows.best("error", variant=variant, **({} if rate is None else {"rate": rate}))


def _gap(rows: Rows) -> float:
    """Return the least error of what multiplies the shortcut - the largest of what does not."""
    known = set(rows.column("variant"))
    harmed, kept = (
        [_error(rows, v) for v in group if v in known] for group in (MULTIPLIED, IDENTITY)
    )
    return min(harmed, default=math.nan) - max(kept, default=math.nan)


def _more(one: str, other: str, rate: float | None = None) -> Callable[[Rows], float]:
    """Return the effect: error of one variant minus that of another."""
    return lambda rows: _error(rows, one, rate) - _error(rows, other, rate)


def _agreement(rows: Rows) -> float:
    """Return Kendall's tau-b of our errors and the paper's; failures are ties in both."""
    known = set(rows.column("variant"))
    names = [v for v in VARIANTS if v in known and not math.isnan(VARIANTS[v].paper)]
    ours = [error if (error := _error(rows, v)) <= FAIL else 1.0 for v in names]
    return float(kendalltau(ours, [VARIANTS[v].paper for v in names])[0]) if names else math.nan


def _helps(rows: Rows) -> float:
    """Return what a shortcut around each activation gains; of ReLU and GELU the smaller gain."""
    pairs = (("as drawn", "each ReLU"), ("as drawn, GELU", "each GELU"))
    return min(_error(rows, two) - _error(rows, each) for two, each in pairs)


def _falls(rows: Rows) -> float:
    """Return how much of the stream falls where ReLU stands before the addition."""
    nets = ("ReLU before +", "each ReLU")
    return max(
        (v for net in nets for v in rows.only(variant=net).column("falls")), default=math.nan
    )


ERROR = Words("error", "错误率")
HE = "He et al. 2016 (arXiv:1603.05027)"

STUDY = Study(
    id="ST-05",
    name="shortcuts",
    title=Words("The shortcut zoo", "捷径大观"),
    question=Words(
        "Which changes to the shortcut, or to what stands beside it, can a deep residual network bear?",
        "对捷径本身或其旁边部件的哪些改动，是深层残差网络能够承受的？",
    ),
    design=Words(
        "27 blocks of two linear layers with BatchNorm, 64 wide, are trained on digits for 200 steps under "
        "the variants of He et al. 2016 (tables 1 to 3): in one group the shortcut is x times something (a "
        "constant, a gate, a matrix, dropout, BatchNorm behind the addition), in the other it is x itself or "
        "nearly so, and the parts of the branch are moved. To these come: factors between 1 and 0.5; dropout "
        "of 0.1 right behind the addition, as in document 002, and on the branch; 54 shortcuts, each around "
        "one layer with its activation, as document 002 advises; and the block as document 001 draws it, "
        "without an activation behind the addition.",
        "27 个由两层线性层与 BatchNorm 组成的块，宽 64，在手写数字上训练 200 步，采用 He 等 2016（表 1 至表 3）的"
        "各种变体：一组把捷径上的 x 乘以某物（常数、门、矩阵、dropout、加法之后的 BatchNorm），另一组捷径保持为 x"
        "（或几乎如此），只移动分支里的部件。此外还有：1 与 0.5 之间的系数；像文档 002 那样紧接在加法之后的 0.1 "
        "dropout，以及放在分支上的同样 dropout；按文档 002 的建议在每个激活函数之后各加一条捷径（54 条，各绕过一层"
        "及其激活）；以及文档 001 所画、加法之后没有激活的块。",
    ),
    controls=Words(
        "All variants of a seed start from the same draws where their shapes allow and see the same batches; "
        "54 layers of one have as many matrices as 27 of two. The paper's variants are trained at two rates, "
        "0.02 and 0.05, and the better one counts for each, so that no variant fails by the rate alone; the "
        "others at 0.05, beside others at 0.05. A failure is a test error above 20 %, as in the paper. The "
        "paper has 54 blocks of convolutions on CIFAR-10 and long trainings: errors are not comparable, the "
        "order of the variants is.",
        "同一种子的各变体在形状允许时初始值相同，批次相同；54 个单层块与 27 个双层块的矩阵数目相等。论文中的变体用两种"
        "学习率（0.02、0.05）训练，各取较好者，以免仅因学习率而失败；其余变体只用 0.05，也只与 0.05 的结果比较。失败"
        "指测试错误率超过 20%，与论文一致。论文用的是 CIFAR-10 上 54 个卷积块、训练很久：错误率数值不可直接比较，"
        "变体的次序可以。",
    ),
    lesson=Words(
        "Leave the shortcut alone: what multiplies it in every block fails.",
        "不要动捷径：在每个块里都乘上某物的变体都失败。",
    ),
    claims=(
        Claim("2.10", "002", 111, Words(
            "Dropout is applied to the sum, right behind the addition.",
            "dropout 作用于相加之后的和。",
        ), by="stream-dropout", stands=False),
        Claim("2.15", "002", 145, Words(
            "A shortcut is to be added after every nonlinearity, such as ReLU or GELU; it helps.",
            "应在每个非线性（如 ReLU、GELU）之后加捷径，这有帮助。",
        ), by="every-nonlinearity"),
        Claim("0.2", "000", 31, Words(
            "x = x + ffwd(x), where the feed-forward of that model ends in a ReLU, is a sound block.",
            "x = x + ffwd(x)（该模型的前馈层以 ReLU 结尾）是合适的块。",
        ), by="relu-before-costs", stands=False),
        Claim("1.16", "001", 97, Words(
            "A residual block is weights, activation, weights, addition, and no activation behind it.",
            "残差块是权重、激活、权重、相加，其后没有激活。",
        ), by="drawn"),
    ),
    factors={"variant": tuple(VARIANTS), "rate": (0.02, RATE)},
    measure=measure,
    metrics={
        "error": Metric(Words("test error", "测试错误率"), failed=0.9),
        "train": Metric(Words("training loss", "训练损失"), Words("nats", "nat"), bench.CHANCE),
        "passed": Metric(
            Words("identity that passes all blocks at the start", "初始时穿过全部块的恒等成分"),
            Words("powers of ten", "数量级"),
        ),
        "alike": Metric(Words("cosine between images at the start", "初始时图像之间的余弦")),
        "falls": Metric(Words("share of the stream that falls", "残差流中变小的比例")),
    },
    primary=Contrast(
        Words(
            "Every variant that multiplies the shortcut has a test error at least 5 points above that of "
            "every variant that leaves it alone, each at its better rate.",
            "凡对捷径做乘法的变体，测试错误率都比任何保持捷径不变的变体高至少 5 个百分点（各取较好的学习率）。",
        ),
        _gap,
        limit=0.05,
        unit=ERROR,
    ),
    secondary=(
        Contrast(
            Words(
                "Our errors rank the paper's 15 variants as the paper does: Kendall's τ above 0.4, failures "
                "tied.",
                "我们的错误率对论文 15 种变体的排序与论文一致：Kendall τ 高于 0.4（失败者并列）。",
            ),
            _agreement, limit=0.4, name="agrees", unit=Words("Kendall's τ", "Kendall τ"),
        ),
        Contrast(
            Words(
                "Dropout of 0.1 behind the addition costs at least 5 points more than on the branch.",
                "0.1 的 dropout 放在加法之后，错误率比放在分支上至少高 5 个百分点。",
            ),
            _more("dropout on stream", "dropout on branch"),
            limit=0.05, name="stream-dropout", unit=ERROR,
        ),
        Contrast(
            Words(
                "54 shortcuts, each around one layer and its activation, have a lower test error than 27 "
                "around two layers, for ReLU and for GELU.",
                "54 条各绕过一层及其激活的捷径，测试错误率低于 27 条绕过两层的捷径，ReLU 与 GELU 皆然。",
            ),
            _helps, limit=0.0, name="every-nonlinearity", unit=ERROR,
        ),
        Contrast(
            Words(
                "ReLU before the addition costs at least 1 point (the paper: 7.84 and 6.61 %).",
                "把 ReLU 放在加法之前，错误率至少高 1 个百分点（论文为 7.84% 与 6.61%）。",
            ),
            _more("ReLU before +", "original"), limit=0.01, name="relu-before-costs", unit=ERROR,
        ),
        Contrast(
            Words(
                "The block as drawn does as well as the original with ReLU behind the addition, within 2 "
                "points.",
                "所画的块与加法后有 ReLU 的原版相当，相差不到 2 个百分点。",
            ),
            _more("as drawn", "original", RATE), limit=0.02, rule="within", name="drawn", unit=ERROR,
        ),
        Contrast(
            Words(
                "A factor of 0.9 in each block, of which 0.06 is left behind all 27, costs less than 5 points.",
                "每块乘 0.9（27 块之后只剩 0.06），错误率的上升不到 5 个百分点。",
            ),
            _more("0.9 x + F", "original", RATE), limit=0.05, rule="below", name="dose", unit=ERROR,
        ),
        Contrast(
            Words(
                "With ReLU before the addition no coordinate of the stream ever falls.",
                "ReLU 在加法之前时，残差流的任何坐标都不会变小。",
            ),
            _falls, limit=0.0, rule="exact", name="only-grows", unit=Words("share", "比例"),
        ),
    ),
    modes={
        "quick": Mode(
            6, 1.5,
            {"variant": (*list(MULTIPLIED)[::2], "original", "exclusive gate -6", "ReLU before +"),
             "rate": (RATE,)},
            {"steps": 100},
        ),
        "default": Mode(8, 8, settings={"steps": 200}),
        "long": Mode(8, 50, {"rate": (0.01, 0.02, RATE, 0.1)}, {"steps": 600}),
    },
    skip=_beyond_paper,
    plots=(
        Plot(
            "dots", Words("Test error of each variant", "各变体的测试错误率"),
            x="variant", y="error", color="rate", reference=FAIL,
            reference_title=Words("failed", "失败"),
        ),
        Plot(
            "dots", Words("Training loss of each variant", "各变体的训练损失"),
            x="variant", y="train", color="rate", log_y=True, reference=bench.CHANCE,
            reference_title=Words("guessing", "随机猜测"),
        ),
        Plot(
            "dots", Words("X-ray at the start: identity left behind all blocks", "初始 X 光：穿过全部块后剩余的恒等成分"),
            x="variant", y="passed", only={"rate": RATE},
        ),
        Plot(
            "dots", Words("How alike the images have become at the start", "初始时图像变得多相似"),
            x="variant", y="alike", only={"rate": RATE},
        ),
    ),
    published=(
        Published(
            Words(
                "CIFAR-10 test error (%) of ResNet-110, median of 5: 0.5 x + F; 0.5 x + 0.5 F; exclusive gate 0 "
                "and -6; shortcut gate 0 and -6; W x + F; dropout 0.5; original",
                "CIFAR-10 上 ResNet-110 的测试错误率（%，5 次取中位数）：0.5 x + F；0.5 x + 0.5 F；互斥门 0 与 -6；"
                "捷径门 0 与 -6；W x + F；dropout 0.5；原版",
            ),
            "fail; 12.35; fail, 8.70; 12.86, 6.91; 12.22; fail; 6.61",
            f"{HE}, Table 1",
        ),
        Published(
            Words(
                "The same for BN after the addition; ReLU before it; ReLU-only pre-activation; pre-activation",
                "同上：加法后 BN；加法前 ReLU；仅 ReLU 预激活；预激活",
            ),
            "8.17; 7.84; 6.71; 6.37",
            f"{HE}, Table 2",
        ),
        Published(
            Words("The same for units of one layer: original, pre-activation", "同上，单层单元：原版、预激活"),
            "9.90; 8.91",
            f"{HE}, Table 3",
        ),
    ),
)  # fmt: skip
