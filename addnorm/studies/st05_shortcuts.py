"""ST-05 The shortcut zoo: what may be done to a shortcut, and to the branch beside it."""

from __future__ import annotations

import math
import statistics
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

BLOCKS = 27  # of two linear layers, 64 wide; twice as many of one
FAIL = 0.2  # test error above which a training has failed (He et al. 2016, table 1)
RATE = 0.05  # of the two the one that is shown where one must do
DROP = 0.1  # the rate of dropout in document 002
LOST, KEPT = 0.01, 0.1  # of the identity, behind all blocks; expected in between: e^-3 = 0.05


class Variant(NamedTuple):
    """A wiring, what else differs in the network, and the paper's error in % (100: it failed).

    `factor` is what the formula multiplies x by in each block as training starts, without the ReLU
    behind the addition: lambda, 1 - g at the gate's bias, the mean of W's diagonal. NaN where it is
    random.
    """

    wiring: str
    factor: float
    paper: float = math.nan
    config: Mapping[str, Any] = {}
    edit: str = ""


def _closed(bias: float) -> float:
    """Return 1 - g of a gate at its bias."""
    return 1 - 1 / (1 + math.exp(-bias))


# BatchNorm behind the addition divides x by the deviation of the sum: 1 of the branch, and the
# variance 1/2 - 1/(2 pi) of a ReLU of unit normals.
_BEHIND_NORM = (1 + 0.5 - 0.5 / math.pi) ** -0.5
ONE = {"branch_layers": 1}
VARIANTS = {
    "plain": Variant("plain(act='relu')", 0.0, 100),
    "W x + F": Variant("linear-shortcut", 0.0, 12.22),
    "0.5 x + F": Variant("constant-scaling(skip=0.5,scale=1.0)", 0.5, 100),
    "0.5 x + 0.5 F": Variant("constant-scaling", 0.5, 12.35),
    "exclusive gate 0": Variant("exclusive-gating(bias=0.0)", _closed(0), 100),
    "shortcut gate 0": Variant("shortcut-gating(bias=0.0)", _closed(0), 12.86),
    "0.8 x + F": Variant("constant-scaling(skip=0.8,scale=1.0)", 0.8),
    "BN after +": Variant(
        "norm-after-addition", _BEHIND_NORM, 8.17, {"norm": "batchnorm"}, "one norm less"
    ),
    "0.9 x + F": Variant("constant-scaling(skip=0.9,scale=1.0)", 0.9),
    "0.95 x + F": Variant("constant-scaling(skip=0.95,scale=1.0)", 0.95),
    "exclusive gate -3": Variant("exclusive-gating(bias=-3.0)", _closed(-3), 100),
    "exclusive gate -6": Variant("exclusive-gating", _closed(-6), 8.70),
    "shortcut gate -6": Variant("shortcut-gating", _closed(-6), 6.91),
    "original": Variant("postact", 1.0, 6.61),
    "ReLU before +": Variant("relu-before-addition", 1.0, 7.84),
    "ReLU-only pre-act": Variant("residual", 1.0, 6.71, edit="ReLU in front"),
    "pre-activation": Variant("residual", 1.0, 6.37, {"preactivation": True}),
    "one layer": Variant("postact", 1.0, 9.90, ONE, "no activation inside"),
    "each ReLU": Variant("residual", 1.0, config=ONE),
    "each GELU": Variant("residual", 1.0, config={**ONE, "activation": "gelu"}),
    "as drawn": Variant("residual", 1.0),
    "as drawn, GELU": Variant("residual", 1.0, config={"activation": "gelu"}),
    "dropout 0.5 on x": Variant("dropout-shortcut", math.nan, 100),
    "dropout on stream": Variant("postact", math.nan, edit="dropout on the stream"),
    "dropout on branch": Variant("postact", math.nan, edit="dropout on the branch"),
}


def left(variant: Variant) -> float:
    """Return what the formula leaves of x behind all blocks: the product of the factors."""
    return float(variant.factor ** (BLOCKS * 2 // variant.config.get("branch_layers", 2)))


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """X-ray one network at its start, train it on digits, and look at its stream again."""
    model = build(cell["seed"], VARIANTS[cell["variant"]])
    data = bench.digits()
    x, y = bench.training_set(data)
    start = xray(model, x[:128], y[:128])
    settings = bench.SGD | {"lr": cell["rate"], "steps": cell["steps"]}
    run = bench.trained(model, data, cell["seed"], **settings)
    finished = run.status == "finished"
    bench.refit(model, x)
    loss, _ = bench.loss_on(model, x, y)
    _, right = bench.loss_on(model, *bench.test_set(data))
    falls = Falls()
    with torch.no_grad(), tapped(model, discover(model, x[:128]), falls):
        model(x[:128])
    return {
        "error": 1 - right if finished else math.nan,
        "train": loss if finished else math.nan,
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


def _error(rows: Rows, variant: str) -> float:
    """Return the test error at the rate whose training loss is lower; NaN where it was left out."""
    found = rows.only(variant=variant)
    both = zip(found.column("train"), found.column("error"), strict=True)
    return min(both, default=(math.nan, math.nan))[1]


def _gap(rows: Rows) -> float:
    """Return the least error where the identity is lost - the largest where it is kept."""
    known = [v for v in VARIANTS if len(rows.only(variant=v))]
    lost = [_error(rows, v) for v in known if left(VARIANTS[v]) < LOST]
    kept = [_error(rows, v) for v in known if left(VARIANTS[v]) > KEPT]
    return min(lost, default=math.nan) - max(kept, default=math.nan)


def _more(one: str, other: str) -> Callable[[Rows], float]:
    """Return the effect: error of one variant minus that of another."""
    return lambda rows: _error(rows, one) - _error(rows, other)


def _agreement(rows: Rows) -> float:
    """Return Kendall's tau-b of our errors and the paper's; failures are ties in both."""
    known = set(rows.column("variant"))
    names = [v for v in VARIANTS if v in known and not math.isnan(VARIANTS[v].paper)]
    ours = [error if (error := _error(rows, v)) <= FAIL else 1.0 for v in names]
    return float(kendalltau(ours, [VARIANTS[v].paper for v in names])[0]) if names else math.nan


def _gain(rows: Rows) -> float:
    """Return what shortcuts around each layer gain over those around two: mean of ReLU and GELU."""
    pairs = (("as drawn", "each ReLU"), ("as drawn, GELU", "each GELU"))
    return statistics.fmean(_error(rows, two) - _error(rows, each) for two, each in pairs)


def _falls(rows: Rows) -> float:
    """Return how much of the stream falls where ReLU stands before the addition."""
    nets = ("ReLU before +", "each ReLU")
    return max(
        (v for net in nets for v in rows.only(variant=net).column("falls")), default=math.nan
    )


QUICK = (
    "plain", "0.5 x + F", "shortcut gate 0", "0.8 x + F", "0.95 x + F", "exclusive gate -6", "original",
    "ReLU before +", "each ReLU", "each GELU", "as drawn", "as drawn, GELU", "dropout on stream",
    "dropout on branch",
)  # fmt: skip
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
        "27 blocks of two linear layers with BatchNorm, 64 wide, are trained on digits for 150 steps under "
        "the variants of He et al. 2016 (tables 1 to 3). They are grouped by formula: λ is what x is multiplied "
        "by in each block as training starts (a constant; 1 - g of a gate at its bias; 0, the mean diagonal of "
        "a random W; 1 for the identity), and λ to the power of the blocks is what is left of the identity. To "
        "these come: factors between 1 and 0.5; dropout of 0.1 right behind the addition, as in document 002, "
        "and on the branch; 54 shortcuts, each around one layer with its activation, as document 002 advises; "
        "and the block as document 001 draws it, without an activation behind the addition.",
        "27 个由两层线性层与 BatchNorm 组成的块，宽 64，在手写数字上训练 150 步，采用 He 等 2016（表 1 至表 3）的"
        "各种变体，按公式分组：λ 是训练开始时每块中 x 所乘的因子（常数；门在其偏置处的 1 - g；随机矩阵 W 的对角线均值 "
        "0；恒等捷径为 1），λ 的块数次方就是恒等成分剩下的份额。此外还有：1 与 0.5 之间的系数；像文档 002 那样紧接在加法"
        "之后的 0.1 dropout，以及放在分支上的同样 dropout；按文档 002 的建议在每个激活函数之后各加一条捷径（54 条，各绕过"
        "一层及其激活）；以及文档 001 所画、加法之后没有激活的块。",
    ),
    controls=Words(
        "All variants of a seed start from the same draws where their shapes allow and see the same batches; "
        "54 layers of one have as many matrices as 27 of two. Each is trained at two rates, 0.02 and 0.05, and "
        "the one with the lower training loss counts, so that none fails by the rate alone and none is picked "
        "by its test error. Losses and errors are taken with the statistics of BatchNorm anew from the "
        "training images. Less than 1 % of the identity counts as lost, more than 10 % as kept; BatchNorm "
        "behind the addition (2 %) and the factor 0.9 (6 %) lie between, where the border was expected, and "
        "dropout has no factor. When these limits were set, two seeds of a pilot were known for most of the "
        "paper's variants, not for the factors 0.8 to 0.95. A failure is a test error above 20 %, as in the "
        "paper. The paper has 54 blocks of convolutions on CIFAR-10 and long trainings: errors are not "
        "comparable, the order of the variants is.",
        "同一种子的各变体在形状允许时初始值相同，批次相同；54 个单层块与 27 个双层块的矩阵数目相等。每种变体用两种学习率"
        "（0.02、0.05）训练，取训练损失较低者，以免仅因学习率而失败，也不按测试错误率挑选。损失与错误率都在 BatchNorm 统计量"
        "于训练图像上重新计算之后测得。恒等成分剩下不到 1% 算“丢失”，超过 10% 算“保留”；加法后的 BatchNorm（2%）与系数 "
        "0.9（6%）介于两者之间，界线预计就在那里；dropout 没有确定的系数。设定这些界限时，已知多数论文变体的两个种子的"
        "试验结果，但不包括 0.8 至 0.95 的系数。失败指测试错误率超过 20%，与论文一致。论文用的是 CIFAR-10 上 54 个卷积块、"
        "训练很久：错误率数值不可直接比较，变体的次序可以。",
    ),
    lesson=Words(
        "Multiply the factors on the shortcut over all 27 blocks before you change it. With 0.5 or a half-open "
        "gate next to nothing of the identity is left, and the error stays between 52 and 72 % at the better "
        "rate; with 0.95, which leaves 25 %, it is 3 %, as with the plain sum. The line between is less sharp "
        "than declared: 0.8 leaves 0.2 % and still trains, to 9 % error, while the worst variant that keeps the "
        "identity, the exclusive gate at -6, which nearly closes the branch, has 5 %. So the two groups lie about "
        "3 points apart and not 5; after half as many steps (--quick) it is 23 points, so the line is one of "
        "speed as well. (A random matrix on the shortcut keeps nothing of the identity by the formula, stands "
        "outside the two groups, and reaches 12 %.) Dropout right behind the addition costs more than 50 points, "
        "on the branch nothing. Whether a shortcut goes around one layer or around two, and whether a ReLU stands "
        "behind the addition, makes no difference that this size shows.",
        "改动捷径之前，先把 27 个块的系数连乘起来。系数为 0.5 或门半开时，恒等成分几乎不剩，在较好的学习率下错误率仍为 52% 至 72%；"
        "系数为 0.95 时还剩 25%，错误率为 3%，与直接相加相当。两组之间的界线不如事先设定的分明：0.8 只剩 0.2%，仍能训练到 9%；而保留恒等成分的变体中最差的，"
        "是偏置 -6 的互斥门（分支几乎关闭），为 5%。因此两组只相差约 3 个百分点，而不是 5 个；步数减半时（--quick）相差 23 个，可见这也是快慢之分。"
        "（捷径上用随机矩阵时，按公式恒等成分全无，不在两组之内，错误率为 12%。）dropout 放在相加之后，代价超过 50 个百分点，放在分支上则没有代价。"
        "捷径跨过一层还是两层，相加之后有没有 ReLU，在这一规模上都看不出差别。",
    ),
    claims=(
        Claim("2.10", "002", 111, Words(
            "Right behind the addition is a sound place for dropout.",
            "紧接在加法之后做 dropout 是合适的。",
        ), by="stream-dropout"),
        Claim("2.15", "002", 145, Words(
            "The place for shortcuts is behind every nonlinearity, such as ReLU or GELU.",
            "捷径应加在每个非线性（如 ReLU、GELU）之后。",
        ), by="every-nonlinearity"),
        Claim("2.15b", "002", 145, Words(
            "Shortcuts there help (against none).",
            "在那里加捷径有帮助（与没有捷径相比）。",
        ), by="better-than-none"),
        Claim("0.2b", "000", 31, Words(
            "x = x + ffwd(x) is a sound block (here: with a feed-forward that ends in a ReLU, as in the code "
            "that the document explains).",
            "x = x + ffwd(x) 是合适的块（此处指：前馈层以 ReLU 结尾，文档所讲的代码即如此）。",
        ), by="relu-before"),
        Claim("1.16", "001", 97, Words(
            "A residual block is weights, activation, weights, addition, and no activation behind it (here: "
            "it does as well as with one).",
            "残差块是权重、激活、权重、相加，其后没有激活（此处指：不比有激活的差）。",
        ), by="drawn"),
        Claim("2.3b", "002", 30, Words(
            "Behind the addition belongs a nonlinear activation such as ReLU (here: it cannot be left out).",
            "相加之后应再经过一个非线性激活，如 ReLU（此处指：不可缺少）。",
        ), by="drawn", stands=False),
    ),
    factors={"variant": tuple(VARIANTS), "rate": (0.02, RATE)},
    measure=measure,
    metrics={
        "error": Metric(Words("test error", "测试错误率"), failed=0.9),
        "train": Metric(Words("training loss", "训练损失"), Words("nats", "nat"), bench.CHANCE),
        "passed": Metric(
            Words("identity that passes all blocks at the start", "初始时穿过全部块的恒等成分"),
            Words("powers of ten", "个数量级"),
        ),
        "alike": Metric(Words("cosine between images at the start", "初始时图像之间的余弦")),
        "falls": Metric(Words("share of the stream that falls", "残差流中变小的比例")),
    },
    primary=Contrast(
        Words(
            "Every variant whose formula leaves less than 1 % of the identity behind all blocks has a test "
            "error at least 5 points above that of every variant that leaves more than 10 %.",
            "按公式，全部块之后恒等成分剩下不到 1% 的每个变体，测试错误率都比剩下超过 10% 的任何变体高至少 5 个百分点。",
        ),
        in_points(_gap),
        limit=5,
        unit=POINTS,
    ),
    secondary=(
        Contrast(
            Words(
                "Our errors rank the paper's 16 variants as the paper does: Kendall's τ above 0.4, failures "
                "tied.",
                "我们的错误率对论文 16 种变体的排序与论文一致：Kendall τ 高于 0.4（失败者并列）。",
            ),
            _agreement, limit=0.4, name="agrees", unit=Words("Kendall's τ", "Kendall τ"),
        ),
        Contrast(
            Words(
                "Dropout of 0.1 right behind the addition costs less than 5 points more than on the branch.",
                "0.1 的 dropout 紧接在加法之后，错误率比放在分支上高不到 5 个百分点。",
            ),
            in_points(_more("dropout on stream", "dropout on branch")),
            limit=5, rule="below", name="stream-dropout", unit=POINTS,
        ),
        Contrast(
            Words(
                "54 shortcuts, each around one layer and its activation, have a lower test error than 27 "
                "around two layers (mean of ReLU and GELU).",
                "54 条各绕过一层及其激活的捷径，测试错误率低于 27 条绕过两层的捷径（ReLU 与 GELU 平均）。",
            ),
            in_points(_gain), limit=0.0, name="every-nonlinearity", unit=POINTS,
        ),
        Contrast(
            Words(
                "54 shortcuts, each around one layer and its activation, have a test error at least 5 points "
                "below that of the same 54 layers without shortcuts (ReLU).",
                "54 条各绕过一层及其激活的捷径，测试错误率比没有捷径的同样 54 层至少低 5 个百分点（ReLU）。",
            ),
            in_points(_more("plain", "each ReLU")), limit=5, name="better-than-none", unit=POINTS,
        ),
        Contrast(
            Words(
                "With ReLU before the addition the test error is less than 1 point above that of the original "
                "block, which has it behind (the paper: 7.84 and 6.61 %).",
                "把 ReLU 放在加法之前，测试错误率比放在加法之后的原版块高不到 1 个百分点（论文为 7.84% 与 6.61%）。",
            ),
            in_points(_more("ReLU before +", "original")),
            limit=1, rule="below", name="relu-before", unit=POINTS,
        ),
        Contrast(
            Words(
                "Without the ReLU behind the addition, as document 001 draws the block, the test error is less "
                "than 1 point above that of the original block.",
                "去掉加法之后的 ReLU（如文档 001 所画），测试错误率比原版块高不到 1 个百分点。",
            ),
            in_points(_more("as drawn", "original")), limit=1, rule="below", name="drawn", unit=POINTS,
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
        "quick": Mode(8, 1, {"variant": QUICK, "rate": (RATE,)}, {"steps": 80}),
        "default": Mode(8, 7.4, settings={"steps": 150}),
    },
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
                "CIFAR-10 test error (%) of ResNet-110, median of 5: 0.5 x + F; 0.5 x + 0.5 F; exclusive gate 0, -3 "
                "and -6; shortcut gate 0 and -6; W x + F; dropout 0.5; original",
                "CIFAR-10 上 ResNet-110 的测试错误率（%，5 次取中位数）：0.5 x + F；0.5 x + 0.5 F；互斥门 0、-3 与 -6；"
                "捷径门 0 与 -6；W x + F；dropout 0.5；原版",
            ),
            Words("fail; 12.35; fail, fail, 8.70; 12.86, 6.91; 12.22; fail; 6.61", "失败；12.35；失败、失败、8.70；12.86、6.91；12.22；失败；6.61"),
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
