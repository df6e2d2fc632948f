"""ST-07 Lesions: does a residual network behave like an ensemble, and how long are its paths?"""

from __future__ import annotations

import copy
import math
import random
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addnorm.models.mlp import MLP
from addnorm.probe.discover import discover
from addnorm.probe.lesion import lesions
from addnorm.probe.paths import spectrum
from addnorm.probe.structure import Structure
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

NETS = {"plain 6": 6, "residual 6": 6, "residual 27": 27, "ensemble of 27": 27}  # blocks, members
COUNTS = {6: (0, 1, 2, 3, 4, 5), 27: (0, 1, 2, 3, 5, 7, 10, 15, 20, 25)}  # parts that are removed
DRAWS = 20  # sets of parts for each count
REFITS = 8  # of them those that get their BatchNorm statistics anew
HALVES = 48  # sub-networks of each part with probability 1/2, whose answers are averaged
IMAGES = 128  # training images behind the gradients of the paths
HARMLESS = 0.006  # two of the 359 test images
MANY = 15  # blocks without which 2^12 = 4,096 of the 2^27 paths are left
EQUAL = 5  # blocks without which 1/32 of the paths is left; one member is 1/27 of the ensemble

Answers = Callable[[Collection[int], bool], Tensor]


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one network, or the members of an ensemble, then take parts out of it.

    Lists: over the block (`singles`, `share`), over the number of parts removed (`rise`, `refit`),
    over 16 orders (`shuffled`), over the path length (`sampled`, `incoherent`, `coherent`); empty
    where a network has none.
    """
    n = NETS[cell["net"]]
    models = _trained(cell, n)
    if not models:
        return {"error": math.nan}
    x, y = bench.test_set(bench.digits())
    alone = cell["net"].startswith("ensemble")
    structure = None if alone else discover(models[0], x)
    answers = _ensemble(models, x) if structure is None else _network(models[0], structure, x)

    def rise(sets: Sequence[Collection[int]], anew: bool = False) -> float:
        errors = [error_rate(answers(removed, anew), y).item() for removed in sets]
        return statistics.fmean(errors) - clean

    clean = error_rate(answers((), False), y).item()
    first = 0 if alone else 1  # the first block of a network does the work of an input layer
    draw = random.Random(1000 * cell["seed"])
    counts = (*COUNTS[n], n - 1) if alone else COUNTS[n]  # of the ensemble one member is left too
    drawn = {k: [set(draw.sample(range(first, n), k)) for _ in range(DRAWS)] for k in counts}
    halves = [{i for i in range(first, n) if draw.random() < 0.5} for _ in range(HALVES)]
    return {
        "error": clean,
        "block": list(range(1, n + 1)),
        "singles": [rise([{i}]) for i in range(n)],
        "removed": [k / n for k in drawn],
        "rise": [rise(sets[: DRAWS if k else 1]) for k, sets in drawn.items()],
        "refit": [rise(sets[: REFITS if k else 1], True) for k, sets in drawn.items()],
        "average": _error_of_mean(answers, halves, y, False) - clean,
        "average_anew": _error_of_mean(answers, halves, y, True) - clean,
        **_orders(models, structure, x, y, cell["seed"]),
        **_paths(models, structure, cell),
    }


def _ensemble(models: Sequence[MLP], x: Tensor) -> Answers:
    """Return the mean probabilities `(N, 10)` as a function of the members that are removed."""
    with torch.no_grad():
        votes = torch.stack([F.softmax(model(x), -1) for model in models])  # (M, N, 10)

    def answers(removed: Collection[int], _anew: bool) -> Tensor:
        return votes[[i for i in range(len(votes)) if i not in removed]].mean(0)

    return answers


def _network(model: MLP, structure: Structure, x: Tensor) -> Answers:
    """Return the probabilities `(N, 10)` as a function of the blocks that are removed.

    The second argument says whether BatchNorm gets its statistics anew, without the blocks.
    """

    @torch.no_grad()
    def answers(removed: Collection[int], anew: bool) -> Tensor:
        chosen = copy.deepcopy(model) if anew else model
        with tapped(chosen, structure, Lesion(removed)):
            if anew:
                bench.refit(chosen, bench.training_set(bench.digits())[0])
            return F.softmax(chosen(x), -1)

    return answers


def _error_of_mean(
    answers: Answers, sets: Sequence[Collection[int]], y: Tensor, anew: bool
) -> float:
    """Return the error of the mean of the answers of sub-networks."""
    mean = torch.stack([answers(removed, anew) for removed in sets]).mean(0)
    return error_rate(mean, y).item()


def _trained(cell: Mapping[str, Any], n: int) -> list[MLP]:
    """Return the trained networks: one, or the members; none where a training failed."""
    seed, kind = cell["seed"], cell["net"]
    members = n if kind.startswith("ensemble") else 1
    models = []
    for member in range(members):
        own = seed if members == 1 else 1000 * (seed + 1) + member
        model = build(kind, own)
        settings = bench.SGD | {"schedule": "step", "lr": 0.05, "steps": cell["steps"]}
        if bench.trained(model, bench.digits(), own, **settings).status != "finished":
            return []
        models.append(model.eval())
    return models


def build(kind: str, seed: int) -> MLP:
    """Return a network of two-layer branches with BatchNorm; a member of the ensemble has one."""
    plain = kind.startswith("plain")
    return bench.mlp(
        seed,
        1 if kind.startswith("ensemble") else NETS[kind],
        "plain(act='relu')" if plain else "residual",
        branch_layers=2,
        inner_norm="batchnorm",
        preactivation=not plain,
        start="he",
    )


def error_rate(logits: Tensor, y: Tensor) -> Tensor:
    """Return the share of wrong answers."""
    return (logits.argmax(-1) != y).float().mean()


class Lesion(Visitor):
    """Removes blocks: what entered them is what leaves them, with or without a shortcut."""

    def __init__(self, removed: Collection[int]) -> None:
        self.removed = removed
        self.entered: Any = None

    def __call__(self, k: int, point: Point) -> None:
        """Keep what enters the block."""
        self.entered = point.stream

    def after(self, k: int, out: Any) -> Any:
        """Let it leave the block."""
        return self.entered if k in self.removed else None


def _orders(
    models: Sequence[MLP], structure: Structure | None, x: Tensor, y: Tensor, seed: int
) -> dict[str, Any]:
    """Return what other orders of the blocks do to the error: of ever more swaps, of neighbours."""
    if structure is None:
        return {"tau": [], "shuffled": [], "swapped": []}
    most = len(structure) * (len(structure) - 1) / 2
    found = {
        order: lesions(
            models[0], x, y, loss=error_rate, singles=False, estimate=False, order=order,
            budget=math.inf, seed=seed, structure=structure,
        ).order
        for order in ("shuffle", "swap")
    }  # fmt: skip
    return {
        "tau": [1 - 2 * o.swaps / most for o in found["shuffle"]],
        "shuffled": [o.delta for o in found["shuffle"]],
        "swapped": [o.delta for o in reversed(found["swap"])],
    }


def _paths(
    models: Sequence[MLP], structure: Structure | None, cell: Mapping[str, Any]
) -> dict[str, Any]:
    """Return shares by path length k = 0 ... n of the gradient at the first block, in three readings.

    `sampled`: Veit's, the number of paths times the mean of |g_p| over a few of them.
    `incoherent`: the sum of |g_p|^2; `coherent`: |g_k|^2, g_k the sum of g_p over the paths.
    `estimate`: sqrt(number x sum of |g_p|^2), what `sampled` would be if all |g_p| were alike.
    """
    if structure is None or cell["net"].startswith("plain"):
        names = ("length", "sampled", "incoherent", "coherent", "estimate", "share")
        return {name: [] for name in names}
    (model,) = models
    x, y = (t[:IMAGES] for t in bench.training_set(bench.digits()))
    n = len(structure)
    found = spectrum(
        model, x, y, incoherent="exact" if n <= 12 else "sample", samples=cell["samples"],
        budget=math.inf, seed=cell["seed"], structure=structure,
    )  # fmt: skip
    draw = random.Random(cell["seed"])
    norms = []
    for k in range(n + 1):
        chosen = [draw.sample(range(n), k) for _ in range(cell["paths"])]
        norms.append(statistics.fmean(path_gradient(model, structure, c, x, y) for c in chosen))
    return {
        "length": list(range(n + 1)),
        "sampled": _shares([math.comb(n, k) * g for k, g in enumerate(norms)]),
        "incoherent": _shares(found.incoherent),
        "coherent": _shares([g * g for g in found.norm]),
        "estimate": _shares(
            [math.sqrt(math.comb(n, k) * e) for k, e in enumerate(found.incoherent)]
        ),
        "share": [c.branch_share for c in xray(model, x, y).connections],
    }


def path_gradient(
    model: nn.Module, structure: Structure, through: Collection[int], x: Tensor, y: Tensor
) -> float:
    """Return |g_p| at the first block, p the path through these branches and around all others.

    The forward pass is that of the whole network (Veit et al. 2016, section 4.3): backwards, the
    chosen blocks pass the gradient through the branch only, the others around it only.
    """
    entered: list[Tensor] = []

    def visit(k: int, point: Point) -> Tensor:
        assert point.skip is not None
        if k == 0:
            entered.append(point.stream)
        if k in through:
            return point.update + (point.skip.detach() - point.skip)
        return point.update.detach()

    with tapped(model, structure, visit), torch.enable_grad():
        loss = F.cross_entropy(model(x), y)
    (gradient,) = torch.autograd.grad(loss, entered)
    return float(gradient.norm())


def _shares(values: Sequence[float]) -> list[float]:
    return [v / sum(values) for v in values]


def _list(rows: Rows, metric: str, net: str) -> list[float]:
    """Return a list of one network; empty where its training failed or it was left out."""
    found = rows.value(metric, net=net) if len(rows.only(net=net)) else math.nan
    return found if isinstance(found, list) else []


def _rise(rows: Rows, net: str, removed: int) -> float:
    """Return the rise of the error without that many of 27 parts, BatchNorm taken anew or not.

    The smaller of the two.
    """
    both = [_list(rows, metric, net) for metric in ("rise", "refit")]
    return min(rises[COUNTS[27].index(removed)] if rises else math.nan for rises in both)


def _one(rows: Rows, metric: str, net: str) -> float:
    """Return a number of one network; NaN where it was left out."""
    return float(rows.value(metric, net=net)) if len(rows.only(net=net)) else math.nan


def _one_left(rows: Rows) -> float:
    """Return the rise of the error where one member of the ensemble is left, drawn at random."""
    return (_list(rows, "rise", "ensemble of 27") or [math.nan])[-1]


def _equal_shares(rows: Rows) -> float:
    """Return the rise of the network's error - the ensemble's where equal shares are left."""
    refit = _list(rows, "refit", "residual 27")
    return refit[COUNTS[27].index(EQUAL)] - _one_left(rows) if refit else math.nan


def _average(rows: Rows) -> float:
    """Return the rise of the error in the mean of sub-networks, BatchNorm taken anew or not."""
    return min(_one(rows, metric, "residual 27") for metric in ("average", "average_anew"))


def _single(rows: Rows, net: str) -> float:
    """Return the median rise of the error where one block is removed."""
    return statistics.median(_list(rows, "singles", net) or [math.nan])


def _silent(rows: Rows) -> float:
    """Return the median size of the updates, beside the stream, of blocks that nobody misses."""
    singles, shares = (_list(rows, m, "residual 27") for m in ("singles", "share"))
    both = zip(singles, shares, strict=True)
    return statistics.median([s for rise, s in both if rise <= HARMLESS] or [math.nan])


def _length(rows: Rows, metric: str) -> float:
    """Return the mean path length by these shares."""
    shares = _list(rows, metric, "residual 27")
    return sum(k * s for k, s in enumerate(shares)) if shares else math.nan


BLOCKS = Words("blocks", "块")

STUDY = Study(
    id="ST-07",
    name="lesions",
    title=Words("Lesions, shuffles and effective paths", "删块、换序与有效路径"),
    question=Words(
        "Is a deep residual network in essence an ensemble of shallow ones, so that blocks can be taken "
        "out of it?",
        "深层残差网络本质上是浅层网络的集成，因而可以随意删块吗？",
    ),
    design=Words(
        "Four networks of blocks with two linear layers and BatchNorm, 64 wide, are trained on digits: plain "
        "with 6 blocks, residual (pre-activation) with 6 and with 27, and a true ensemble: 27 residual "
        "networks of one block, each trained alone, whose probabilities are averaged. Then blocks (of the "
        "ensemble: members) are removed from the trained networks, one by one and in random sets, and the "
        "blocks are put in other orders. Sub-networks that keep each block with "
        "probability 1/2 are averaged, as an ensemble would be. Last, the gradient at the first block is split by path length k, the number of branches that it "
        "came through: by the sampling of Veit et al. 2016 (number of paths times mean |g_p| of a few), by "
        "the sum of |g_p|² over all paths, and by |g_k|², g_k the sum of all g_p of that length. The last one "
        "is exact.",
        "在手写数字上训练四种网络，块由两层线性层和 BatchNorm 组成，宽 64：6 块的普通网络，6 块与 27 块的残差"
        "网络（预激活），以及真正的集成：27 个只有一块的残差网络各自训练，再对概率取平均。随后从训练好的网络中"
        "删去块（集成则删去成员），逐个删或随机成组地删，并打乱块的次序。再像集成那样，"
        "对以 1/2 概率保留各块的子网络取平均。最后把第一块处的梯度按路径长度 k"
        "（经过的分支数）分解，用三种读法：Veit 等 2016 的抽样（路径数乘以少数路径 |g_p| 的均值）、全部路径 |g_p|² 之和，"
        "以及 |g_k|²（g_k 是该长度所有 g_p 之和），其中最后一种是精确的。",
    ),
    controls=Words(
        "Removed means: what enters the block leaves it, in every network alike. All have the same images, "
        "rate and number of steps. A removal changes what later BatchNorms see, so the lesions are repeated "
        "with the statistics taken anew on the training set; where many blocks go the contrast takes the "
        "smaller rise of the two. The input of 64 pixels is the stream itself, so the first block does the "
        "work of an input layer: random sets leave it in place. A network of 6 blocks fits the digits as well, "
        "so most of the 27 are surplus. Each block that goes halves the number of paths, so as many blocks "
        "and members are no equal lesion. Two are matched by what is left. By number: 12 blocks leave 4,096 "
        "paths, and an ensemble of that many would do no worse than one of its members alone, which is what "
        "they are held against. By share: without 5 blocks 1/32 of the paths is left, and one member is 1/27 "
        "of the ensemble. The limits were set after a pilot on seed 0 and a few other seeds.",
        "所谓删去，在各网络中含义相同：进入该块的就是离开该块的。所有网络的图像、学习率与步数相同。删块会改变后面"
        "各 BatchNorm 的输入，因此另做一遍：删块后在训练集上重新统计；除非另有说明，对比时取两者中较小的上升。64 个像素"
        "直接就是残差流，第一块相当于输入层，随机成组删除时保留它。6 块的网络对手写数字拟合得同样好，所以 27 块中大部分是"
        "多余的。每删一块，路径数减半，因此删同样多的块与成员并不对等。这里按剩余部分做两种对等比较。按数目：剩 12 块即剩 "
        "4,096 条路径，若是这么多成员的集成，不会比单个成员更差，所以与一个成员单独作答相比。按份额：删去 5 块剩 1/32 的路径，"
        "一个成员是集成的 1/27。各项界限是在种子 0 与另外几个种子的预实验之后设定的。",
    ),
    lesson=Words(
        "What lesions show depends on what is set beside them. Beside a plain network, which errs more than 80 "
        "points more without any one of its blocks, a residual one of 6 stands the loss of most blocks, though "
        "not of its first. Beside a true ensemble of 27 it does not stand out: with 15 blocks removed, and 4,096 "
        "paths left, its error rises 20 points more than that of an ensemble with a single member left. At equal "
        "shares, 5 blocks or 26 members removed, the rises differ by 1.3 points if BatchNorm is taken anew; "
        "by about 7 points if not. Its answer is not the mean of its sub-networks. A block whose "
        "removal costs nothing is not an idle one: it still adds about a fifth of the stream. And the effective "
        "paths are shorter than the mean of 13.5, but how much shorter depends on the reading: by 6 blocks if "
        "lengths of gradients are added, by nearly 10 if they may cancel.",
        "删块实验说明什么，取决于与谁对照。普通网络少任何一块，错误率都上升 80 个百分点以上；6 块的残差网络少大多数块都无大碍，但少不了第一块。"
        "与 27 个成员的真正集成相比则不占优：去掉 15 块、还剩 4096 条路径时，其错误率比只剩一个成员的集成多上升 20 个百分点。剩余份额相同时（去掉 5 块，"
        "或去掉 26 个成员），重新统计 BatchNorm 后两者的上升相差 1.3 个百分点，不重新统计则约差 7 个。网络的输出并不是其子网络的平均。"
        "删去后错误率不升的块也并非闲置：它加入的量仍约为残差流的五分之一。有效路径比平均长度 13.5 短，但短多少取决于读法：把各梯度的长度相加，"
        "短 6 块；允许相互抵消，则短近 10 块。",
    ),
    claims=(
        Claim("1.36", "001", 251, Words(
            "Deep residual networks are in essence an ensemble of exponentially many shallow networks.",
            "深层残差网络本质上是指数级数量的浅层网络的集成。",
        ), stands=False),
        Claim("1.40", "001", 270, Words(
            "That amounts to averaging the predictions of networks of many depths.",
            "这等价于对不同深度网络的预测取平均。",
        ), by="not-the-average", stands=False),
        Claim("1.41", "001", 270, Words(
            "Residual networks are robust by their structure, as ensembles are (here: one block less, beside a "
            "plain network).",
            "残差网络像集成一样，在结构上天然鲁棒（此处指：少一块时，与普通网络相比）。",
        ), by="robust"),
        Claim("1.20", "001", 135, Words(
            "Surplus layers turn into the identity by themselves.",
            "多余的层会自然退化为恒等变换。",
        ), by="harmless-not-zero", stands=False),
        Claim("1.20b", "001", 135, Words(
            "Surplus layers do not disturb the training.",
            "多余的层不会干扰训练。",
        ), by="undisturbed"),
        Claim("0.15b", "000", 82, Words(
            "Where a sublayer is not needed, the weights adjust so that F(x) ≈ 0.",
            "不需要某个子层时，权重会自动调整，使 F(x) ≈ 0。",
        ), by="harmless-not-zero", stands=False),
    ),
    factors={"net": tuple(NETS)},
    measure=measure,
    metrics={
        "error": Metric(Words("test error", "测试错误率"), failed=0.9),
        "singles": Metric(Words("rise of the error without the block", "删去该块后错误率的上升")),
        "rise": Metric(Words("rise of the error", "错误率的上升")),
        "refit": Metric(Words("rise of the error, BatchNorm taken anew", "错误率的上升，重新统计 BatchNorm")),
        "shuffled": Metric(Words("rise of the error in another order", "换序后错误率的上升")),
        "average": Metric(Words("rise in the mean of sub-networks", "子网络取平均后的错误率上升")),
        "average_anew": Metric(
            Words("rise in the mean of sub-networks, BatchNorm taken anew", "同上，重新统计 BatchNorm")
        ),
        "swapped": Metric(Words("rise where neighbours change places", "相邻两块互换后错误率的上升")),
        "sampled": Metric(Words("share by number × mean |g_p|", "份额（路径数 × |g_p| 均值）")),
        "estimate": Metric(Words("the same, from the sum of |g_p|²", "同上，由 |g_p|² 之和推出")),
        "incoherent": Metric(Words("share of the sum of |g_p|²", "|g_p|² 之和的份额")),
        "coherent": Metric(Words("share of |g_k|²", "|g_k|² 的份额")),
        "share": Metric(Words("update / stream (RMS)", "更新与残差流之比（RMS）")),
        "block": Metric(Words("block", "块")),
        "removed": Metric(Words("share of the blocks that is removed", "删去的块所占比例")),
        "tau": Metric(Words("Kendall's τ of the order", "次序的 Kendall τ")),
        "length": Metric(Words("path length", "路径长度"), Words("branches", "个分支")),
    },
    primary=Contrast(
        Words(
            "With 15 of its 27 blocks removed, and 4,096 of its paths left, the error of the residual network "
            "rises by at least 10 points more than that of an ensemble of 27 of which a single member is left, "
            "also with BatchNorm statistics taken anew.",
            "27 块残差网络删去 15 块（剩 4,096 条路径），即使重新统计 BatchNorm，错误率的上升也比 27 个成员的集成只剩一个成员时"
            "至少高 10 个百分点。",
        ),
        in_points(lambda rows: _rise(rows, "residual 27", MANY) - _one_left(rows)),
        limit=10,
        unit=POINTS,
    ),
    secondary=(
        Contrast(
            Words(
                "The network is not the mean of its sub-networks: the mean answer of 48 of them errs more "
                "than 1 point more than the whole, also with BatchNorm taken anew in each.",
                "网络并不是其子网络的平均：48 个子网络的平均答案，即使各自重新统计 BatchNorm，错误率仍比整个网络高 1 个"
                "百分点以上。",
            ),
            in_points(_average), limit=1, name="not-the-average", unit=POINTS,
        ),
        Contrast(
            Words(
                "Where equal shares are left it behaves like an ensemble: without 5 of 27 blocks (1/32 of the "
                "paths is left, BatchNorm taken anew) the error rises as without 26 of 27 members, within 5 "
                "points.",
                "剩余份额相等时，它的表现像集成：27 块删去 5 块（剩 1/32 的路径，重新统计 BatchNorm）与 27 个成员删去 26 个，"
                "错误率的上升相差不到 5 个百分点。",
            ),
            in_points(_equal_shares), limit=5, rule="within", name="behaves-like", unit=POINTS,
        ),
        Contrast(
            Words(
                "Without one block, the error of the plain network of 6 rises by at least 20 points more "
                "than that of the residual one of 6 (median over the blocks).",
                "删去一块时，6 块普通网络错误率的上升比 6 块残差网络至少高 20 个百分点（各块的中位数）。",
            ),
            in_points(lambda rows: _single(rows, "plain 6") - _single(rows, "residual 6")),
            limit=20, name="robust", unit=POINTS,
        ),
        Contrast(
            Words(
                "Without 10 of the 26 blocks behind the first, drawn at random, the error of the residual "
                "network rises by more than 5 points, also with BatchNorm statistics taken anew.",
                "从第一块之后的 26 块中随机删去 10 块，即使重新统计 BatchNorm，错误率仍上升 5 个百分点以上。",
            ),
            in_points(lambda rows: _rise(rows, "residual 27", 10)),
            limit=5, name="not-identity", unit=POINTS,
        ),
        Contrast(
            Words(
                "The residual network of 27 blocks errs less than 1 point more than the one of 6.",
                "27 块残差网络的错误率比 6 块的高不到 1 个百分点。",
            ),
            in_points(
                lambda rows: _one(rows, "error", "residual 27") - _one(rows, "error", "residual 6")
            ),
            limit=1, rule="below", name="undisturbed", unit=POINTS,
        ),
        Contrast(
            Words(
                "Blocks of the 27 whose removal costs at most two of the 359 test images still add more than "
                "a tenth of the stream (median).",
                "27 块中，删去后至多多错两张测试图像（共 359 张）的块，其更新仍超过残差流的十分之一（中位数）。",
            ),
            _silent, limit=0.1, name="harmless-not-zero",
            unit=Words("update / stream", "更新与残差流之比"),
        ),
        Contrast(
            Words(
                "By Veit's sampling, the paths that carry the gradient of the 27 blocks are at least 3 blocks "
                "shorter on average than a path on average is, 13.5.",
                "按 Veit 的抽样，27 块网络中携带梯度的路径，平均长度比全部路径的平均（13.5）至少短 3 块。",
            ),
            lambda rows: NETS["residual 27"] / 2 - _length(rows, "sampled"),
            limit=3.0, name="short-paths", unit=BLOCKS,
        ),
        Contrast(
            Words(
                "The package's sum over all paths gives the mean length of Veit's reading, within 1 block.",
                "按本软件包对全部路径的求和推算，平均长度与 Veit 的读法相差不到 1 块。",
            ),
            lambda rows: _length(rows, "estimate") - _length(rows, "sampled"),
            limit=1.0, rule="within", name="sampling-agrees", unit=BLOCKS,
        ),
        Contrast(
            Words(
                "Adding the lengths |g_p| counts what cancels between paths: by the exact |g_k|² the mean "
                "length is at least 2 blocks shorter than by Veit's reading.",
                "把各 |g_p| 相加，会把路径之间相互抵消的部分也计入：按精确的 |g_k|²，平均长度比 Veit 的读法至少短 2 块。",
            ),
            lambda rows: _length(rows, "sampled") - _length(rows, "coherent"),
            limit=2.0, name="cancel", unit=BLOCKS,
        ),
    ),
    modes={
        "quick": Mode(9, 1.3, settings={"steps": 100, "samples": 8, "paths": 3}),
        "default": Mode(12, 3, settings={"steps": 330, "samples": 32, "paths": 12}),
    },
    plots=(
        Plot(
            "profile", Words("Blocks removed at random, BatchNorm left as it was", "随机删去若干块，BatchNorm 统计量不变"),
            x="removed", y="rise", color="net",
        ),
        Plot(
            "profile", Words("One block removed", "删去一块"),
            x="block", y="singles", color="net",
        ),
        Plot(
            "profile", Words("Gradient by path length: Veit's sampling", "梯度按路径长度的分布：Veit 的抽样"),
            x="length", y="sampled", only={"net": "residual 27"},
        ),
        Plot(
            "profile", Words("Gradient by path length: exact", "梯度按路径长度的分布：精确值"),
            x="length", y="coherent", only={"net": "residual 27"},
        ),
    ),
    published=(
        Published(
            Words(
                "ResNet-110 on CIFAR-10, 54 blocks: test error without 10 of them",
                "CIFAR-10 上的 ResNet-110（54 块）：删去 10 块后的测试错误率",
            ),
            Words("about 20 %", "约 20%"),
            "Veit et al. 2016 (arXiv:1605.06431)",
        ),
        Published(
            Words(
                "Lengths of the paths that carry nearly all of its gradient, by sampling",
                "同一网络中携带几乎全部梯度的路径长度（抽样）",
            ),
            Words("5 to 17 of 54 blocks, 0.45 % of the paths", "54 块中的 5 至 17 块，占全部路径的 0.45%"),
            "Veit et al. 2016 (arXiv:1605.06431)",
        ),
        Published(
            Words(
                "Test error of a training that updates 23 random blocks in each batch; of the whole network",
                "每批只训练随机 23 块时的测试错误率；完整网络的错误率",
            ),
            "5.96 %; 6.10 %",
            "Veit et al. 2016 (arXiv:1605.06431)",
        ),
    ),
)  # fmt: skip
