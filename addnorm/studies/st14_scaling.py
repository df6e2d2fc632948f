"""ST-14 Scaling: a shortcut alone explodes with depth; a norm or a small factor makes it train."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

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
    Rows,
    Study,
    Words,
)

TARGET = 0.2  # nats, of the running loss
CAP = 300  # steps
RATES = (1e-3, 3e-3, 1e-2)
SHALLOW = 32


class Net(NamedTuple):
    """A wiring, the norm inside its branches, and the power of L that stands as their factor."""

    wiring: str
    inner: str = "none"
    power: float | None = None
    learned: bool = False


NETS = {
    "plain": Net("plain"),
    "plain, norm in front": Net("plain(norm=true)"),
    "plain, norm inside": Net("plain", inner="layernorm"),
    "residual": Net("residual"),
    "post-norm": Net("postnorm"),
    "pre-norm": Net("prenorm"),
    "1/sqrt(L)": Net("skipinit", power=-0.5),
    "1/L": Net("skipinit", power=-1.0),
    "1/sqrt(L), learned": Net("skipinit", power=-0.5, learned=True),
    "rezero": Net("rezero"),
}
DEEP = ("plain", "residual", "pre-norm", "1/sqrt(L)", "1/L", "rezero")  # those beyond 32 layers


class Reached(Exception):  # noqa: N818  # no error
    """The running loss is below the target: there is nothing more to train for."""


class Finish:
    """Ends a training once its running loss is below the target; `steps` says when, else NaN."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.steps = math.nan

    def begin(self, step: int) -> None:
        """Begin with the first step."""

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the gradients be."""

    def after_update(self, loss: Tensor) -> None:
        """Raise `Reached` at the target."""
        self.losses.append(loss.item())
        self.steps = bench.steps_to(self.losses, TARGET)
        if not math.isnan(self.steps):
            raise Reached

    def flush(self) -> None:
        """Have nothing to write."""


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """X-ray one network of one-layer ReLU branches at its start, then train it to the target."""
    model = build(cell["seed"], cell["depth"], NETS[cell["net"]])
    x, y = bench.training_set(bench.digits())
    trace = xray(model, x[:128], y[:128])
    growth = trace.stream_growth
    finish = Finish()
    settings = bench.ADAM | {"lr": cell["rate"], "steps": cell["steps"]}
    with contextlib.suppress(Reached):
        bench.trained(model, bench.digits(), cell["seed"], watcher=finish, **settings)
    return {
        "steps": finish.steps,
        "growth": math.log10(growth) if growth > 0 else math.nan,
        "slope": -trace.gradient_slope,
        "stream": [math.log10(min(max(c.stream_after, 1e-38), 1e38)) for c in trace.connections],
    }


def build(seed: int, depth: int, net: Net) -> MLP:
    """Return the network, He-normal; a factor that is not learned stays what it is."""
    model = bench.mlp(seed, depth, net.wiring, start="he", inner_norm=net.inner)
    if net.power is not None:
        for connection in model.stack:
            alpha = connection.get_parameter("alpha")
            nn.init.constant_(alpha, depth**net.power)
            alpha.requires_grad_(net.learned)
    return model


def _unfit(cell: Mapping[str, Any]) -> bool:
    return bool(cell["depth"] > SHALLOW and cell["net"] not in DEEP)


def _times(rows: Rows, slow: str, fast: str, depth: int) -> float:
    """Return how many doublings of the steps one network needs more than another."""
    few, many = (rows.best("steps", net=net, depth=depth) for net in (fast, slow))
    return math.log2(many / few)


def _deepest(rows: Rows) -> int:
    return int(max(rows.column("depth")))


def _start(rows: Rows, metric: str, net: str) -> float:
    """Return a number of the start, which is the same for every rate."""
    return float(next(iter(rows.only(net=net, depth=SHALLOW).column(metric)), math.nan))


def _factor(rows: Rows) -> float:
    """Return the doublings of steps that the better fixed factor needs more than pre-norm."""
    return min(_times(rows, net, "pre-norm", SHALLOW) for net in ("1/sqrt(L)", "1/L"))


def _norm_alone(rows: Rows) -> float:
    """Return the doublings of steps that a norm without shortcut needs more than none."""
    nets = ("plain, norm in front", "plain, norm inside")
    return min(_times(rows, net, "plain", SHALLOW) for net in nets)


DOUBLINGS = Words("doublings of the steps", "次步数翻倍")

STUDY = Study(
    id="ST-14",
    name="scaling",
    title=Words("How much of a branch is let in", "分支该放进来多少"),
    question=Words(
        "Is the shortcut enough to train a deep network, or does it take a norm or a small factor?",
        "训练很深的网络，只要有捷径就够了，还是要有归一化或较小的系数？",
    ),
    design=Words(
        "Networks of 32 and 128 branches relu(W x + b), 64 wide, He-normal, on the digits of "
        "scikit-learn: without shortcut (bare, LayerNorm in front of W, LayerNorm behind it), with the "
        "shortcut alone, with post-norm, pre-norm, a fixed factor 1/√L or 1/L on the branch, a learned "
        "one from 1/√L (as in SkipInit), and a learned one from 0 (ReZero). Counted are the steps of "
        "Adam until the running loss is below 0.2 nats, at most 300, at the best of three rates. At "
        "128 branches, six of the ten.",
        "32 与 128 个分支 relu(W x + b) 组成的网络，宽 64，He 初始化，数据为 scikit-learn 手写数字：无捷径（不加"
        "归一化、LayerNorm 在 W 之前、在 W 之后）；只有捷径；post-norm；pre-norm；分支乘固定系数 1/√L 或 1/L；可学习系数，"
        "从 1/√L 开始（SkipInit 的做法）或从 0 开始（ReZero）。统计 Adam 使滑动平均损失降到 0.2 nat 以下所需的步数"
        "（至多 300 步），取三种学习率中最好的。128 个分支时只比较其中六种。",
    ),
    controls=Words(
        "All share seed, start of the matrices, batches, and gradients clipped at 5. A network that "
        "never comes below 0.2, or whose loss is not finite, counts as 300 steps, so that its "
        "slowness is understated. The X-ray measures the stream and the gradients at the start.",
        "各网络的种子、矩阵初始值与批次相同，梯度均裁剪到 5。始终达不到 0.2、或损失不再有限的网络记为 300 步，"
        "因此它的慢只会被低估。起始时的残差流与梯度由 X 光检查测得。",
    ),
    lesson=Words(
        "What the shortcut adds must be kept small. Alone it makes the stream grow 15 million times over 32 "
        "layers, where Adam still finds its way (154 steps), and to infinity over 128, where nothing trains. "
        "ReZero takes 33 and 30 steps, pre-norm 30 and 34, a factor of 1/L 37 at either depth, 1/√L 41 and 56 "
        "(each at its best rate): no norm is needed for that. Without a shortcut a norm is no cure: in front of "
        "each layer it makes gradients grow that were level without it, eightfold over ten layers, and no network "
        "with it gets there in 300 steps. Post-norm of 32 layers trains at 0.003 (99 steps) and not at 0.01.",
        "捷径上加进来的东西必须足够小。只有捷径时，残差流在 32 层内增大一千五百万倍，Adam 尚能应付（154 步）；128 层则增至无穷大，"
        "什么也训练不了。ReZero 两种深度各需 33、30 步，pre-norm 30、34 步，系数 1/L 都是 37 步，1/√L 41、56 步（各取最佳学习率）"
        "：这并不需要归一化。没有捷径时，归一化并不能治本：放在每层之前，反使原本平稳的梯度每十层增大八倍，300 步之内没有一个能训练到位。"
        "32 层的 post-norm 在学习率 0.003 时能训练（99 步），0.01 时不能。",
    ),
    claims=(
        Claim("1.42b", "001", 280, Words(
            "The shortcut is enough for hundreds of layers to train stably (here: alone, 128 layers).",
            "只凭捷径，数百层的网络就能稳定训练（此处指：别无其他，128 层）。",
        ), stands=False),
        Claim("2.2", "002", 19, Words(
            "The shortcut prevents vanishing and exploding (here: exploding of the stream).",
            "捷径能避免梯度消失和爆炸（此处指残差流的爆炸）。",
        ), by="explodes", stands=False),
        Claim("4.8", "004", 52, Words(
            "Layer normalisation cures vanishing and exploding gradients (here: in front of each layer, without "
            "shortcuts).",
            "层归一化能解决梯度消失和梯度爆炸（此处指：放在每层之前，没有捷径）。",
        ), by="norm-explodes", stands=False),
    ),
    factors={"net": tuple(NETS), "depth": (SHALLOW, 128), "rate": RATES},
    measure=measure,
    metrics={
        "steps": Metric(Words("steps to a loss of 0.2", "损失降到 0.2 的步数"), Words("steps", "步"), CAP),
        "growth": Metric(
            Words("growth of the stream over all layers at the start", "起始时残差流逐层累计的增长"),
            Words("powers of ten", "个数量级"), 38.0,
        ),
        "slope": Metric(
            Words("growth of the gradient on its way back, ten layers", "梯度每回传十层的增长"),
            Words("powers of ten", "个数量级"),
        ),
        "stream": Metric(Words("size of the stream", "残差流的大小"), Words("powers of ten", "个数量级")),
    },
    primary=Contrast(
        Words(
            "At the greatest depth a shortcut alone needs at least twice the steps of one whose branches "
            "start at zero (ReZero).",
            "深度最大时，只有捷径的网络所需步数至少是分支从零开始者（ReZero）的两倍。",
        ),
        lambda rows: _times(rows, "residual", "rezero", _deepest(rows)),
        limit=1.0,
        unit=DOUBLINGS,
    ),
    secondary=(
        Contrast(
            Words("With a shortcut alone the stream grows more than a thousandfold over 32 layers.",
                  "只有捷径时，残差流在 32 层内增长千倍以上。"),
            lambda rows: _start(rows, "growth", "residual"),
            limit=3.0, unit=Words("powers of ten", "个数量级"), name="explodes",
        ),
        Contrast(
            Words("At 32 layers a shortcut alone needs more than half the steps of no shortcut.",
                  "32 层时，只有捷径的网络所需步数仍超过无捷径时的一半。"),
            lambda rows: _times(rows, "plain", "residual", SHALLOW),
            limit=1.0, rule="below", unit=DOUBLINGS, name="naive",
        ),
        Contrast(
            Words("At 32 layers ReZero needs less than half the steps of no shortcut.",
                  "32 层时，ReZero 所需步数不到无捷径时的一半。"),
            lambda rows: _times(rows, "plain", "rezero", SHALLOW),
            limit=1.0, unit=DOUBLINGS, name="rezero-faster",
        ),
        Contrast(
            Words("A fixed factor of 1/√L or 1/L does without a norm: less than twice the steps of "
                  "pre-norm.",
                  "固定系数 1/√L 或 1/L 可以代替归一化：所需步数不到 pre-norm 的两倍。"),
            _factor, limit=1.0, rule="below", unit=DOUBLINGS, name="factor-is-enough",
        ),
        Contrast(
            Words("Without a shortcut, LayerNorm does not save steps at 32 layers.",
                  "没有捷径时，LayerNorm 在 32 层上并不减少步数。"),
            _norm_alone, limit=0.0, unit=DOUBLINGS, name="norm-alone",
        ),
        Contrast(
            Words("LayerNorm in front of each layer, without shortcuts: the gradient grows more than "
                  "threefold over ten layers on its way back.",
                  "每层之前加 LayerNorm、不加捷径：梯度每回传十层增长三倍以上。"),
            lambda rows: _start(rows, "slope", "plain, norm in front"),
            limit=0.5, unit=Words("powers of ten", "个数量级"), name="norm-explodes",
        ),
    ),
    modes={
        "quick": Mode(8, 0.8, {"depth": (SHALLOW,), "rate": (1e-2,)}, {"steps": CAP}),
        "default": Mode(8, 5, settings={"steps": CAP}),
    },
    plots=(
        Plot(
            "dots", Words("Steps to a loss of 0.2, by network", "损失降到 0.2 所需步数，各种网络"),
            x="net", y="steps", color="depth", facet="rate", log_y=True,
            x_title=Words("network", "网络"),
            reference=CAP, reference_title=Words("not reached", "未达到"),
        ),
        Plot(
            "profile", Words("The stream at the start, 32 layers", "起始时的残差流，32 层"),
            x="", y="stream", color="net", only={"depth": SHALLOW, "rate": 1e-2},
            x_title=Words("layer", "层"),
        ),
        Plot(
            "dots", Words("Growth of the gradient on its way back", "梯度回传时的增长"),
            x="net", y="slope", color="depth", only={"rate": 1e-2}, x_title=Words("network", "网络"),
        ),
    ),
    published=(
        Published(
            Words(
                "32-layer fully connected network with ReZero: how much faster it converges than the "
                "authors' plain one",
                "32 层全连接网络：ReZero 比作者的普通网络收敛快多少",
            ),
            Words("15 times (1,500 %)", "15 倍（1,500%）"),
            "Bachlechner et al. 2020 (arXiv:2003.04887, version 1), abstract",
        ),
        Published(
            Words(
                "residual networks of 1,000 layers without batch norm: SkipInit trains, a branch factor of "
                "1 does not",
                "1000 层、无批归一化的残差网络：SkipInit 能训练，分支系数为 1 则不能",
            ),
            Words("text and tables", "正文与表格"),
            "De and Smith 2020 (arXiv:2002.10444)",
        ),
    ),
    skip=_unfit,
)  # fmt: skip
