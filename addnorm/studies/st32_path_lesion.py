"""ST-32 Do path lengths, or anything else in an X-ray, foretell what lesions do?"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from addnorm.probe.discover import discover
from addnorm.probe.lesion import lesions
from addnorm.probe.losses import loss_of
from addnorm.probe.paths import spectrum
from addnorm.probe.structure import Structure
from addnorm.probe.tap import Point, tapped
from addnorm.probe.vitals import xray
from addnorm.studies import bench
from addnorm.studies.frame import (
    Contrast,
    Metric,
    Mode,
    Plot,
    Published,
    Rows,
    Study,
    Words,
)

CONNECTIONS = 12  # of every network
CONTEXT = 32  # characters
WIRINGS = {
    "residual, BN": "residual",
    "pre-norm": "prenorm",
    "post-norm": "postnorm",
    "ReZero": "rezero",
    "LayerScale 0.1": "layerscale(init=0.1)",
    "peri-norm": "peri",
    "LNS": "lns",
    "1/sqrt(K)": "stable",
}
COUNTS = (2, 3, 4, 6)  # branches that are removed together
THIRD = 4
DRAWS = 12  # sets for each count
SEEN = 64  # examples behind the path spectrum


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one network, X-ray it, then remove branches, one by one and in random sets.

    `rho_*`: rank correlation, over the sets, of a predictor summed over the branches that are
    removed with the rise of the loss. `rise`: without a third of them, the median over those sets.
    `survives`: the share of the gradient's energy that is on paths through none of a third.
    """
    found = _trained(cell)
    if found is None:
        return {"rise": math.nan}
    model, x, y = found
    structure = discover(model, x)
    alone = lesions(model, x, y, structure=structure, budget=math.inf)
    paths = spectrum(
        model, x[:SEEN], y[:SEEN], incoherent="off", budget=math.inf, structure=structure
    )
    seen = xray(model, x, y).connections
    predictors: dict[str, Sequence[float]] = {
        "slope": alone.first_order,
        # |<gradient, update>| is at most this, and so is any first-order effect of the update
        "pull": [c.branch_share * c.stream_before * c.gradient_after for c in seen],
        "share": [c.branch_share for c in seen],
        "gain": [abs(c.identity_gain - 1) for c in seen],
        "count": [1.0] * len(seen),
        "singles": alone.singles,
    }
    sets = list(_sets(cell["seed"], len(structure)))
    rises = [loss_without(model, structure, s, x, y) - alone.clean for s in sets]
    energy = [g * g for g in paths.norm]
    return {
        "loss": alone.clean,
        "rise": statistics.median(r for r, s in zip(rises, sets, strict=True) if len(s) == THIRD),
        "survives": survival(energy, THIRD),
        "length": paths.mean_length,
        "updates": statistics.fmean(predictors["share"]),
        **{
            f"rho_{name}": rank_correlation([sum(values[i] for i in s) for s in sets], rises)
            for name, values in predictors.items()
        },
        "singles": alone.singles,
        "pull": predictors["pull"],
        "slope": predictors["slope"],
        "connection": list(range(1, len(structure) + 1)),
    }


def _trained(cell: Mapping[str, Any]) -> tuple[nn.Module, Tensor, Tensor] | None:
    """Return the network in evaluation mode with held-out inputs and targets; None if it failed."""
    seed, name = cell["seed"], cell["wiring"]
    if cell["task"] == "text":
        run = bench.deep_gpt(seed, WIRINGS[name], cell["steps"], depth=CONNECTIONS // 2)
        x, y = bench.windows(CONTEXT, 64)
    else:
        data = bench.digits()
        batch_norm = {"inner_norm": "batchnorm", "preactivation": True, "start": "he"}
        settings = batch_norm if name == "residual, BN" else {}
        model = bench.mlp(seed, CONNECTIONS, WIRINGS[name], branch_layers=2, **settings)
        steps = cell["steps"] * 2 // 3
        adam = bench.ADAM | {"lr": 3e-3, "schedule": "cosine", "warmup": steps // 10}
        run = bench.trained(model, data, seed, steps=steps, **adam)
        pair = next(iter(data.validation_batches(len(data.validation), 1)))
        x, y = (torch.as_tensor(t) for t in pair)
    return (run.model.eval(), x, y) if run.status == "finished" else None


def _sets(seed: int, n: int) -> Iterator[set[int]]:
    """Yield the sets of branches that are removed."""
    draw = random.Random(seed)
    for count in COUNTS:
        for _ in range(DRAWS):
            yield set(draw.sample(range(n), count))


@torch.no_grad()
def loss_without(
    model: nn.Module, structure: Structure, removed: Collection[int], x: Tensor, y: Tensor
) -> float:
    """Return the loss where the updates of these connections are 0."""

    def visit(k: int, point: Point) -> Tensor | None:
        return torch.zeros_like(point.update) if k in removed else None

    with tapped(model, structure, visit):
        return loss_of(model(x), y, None)[0].item()


def survival(energy: Sequence[float], removed: int) -> float:
    """Return the share of the energy on paths that pass none of so many branches drawn at random.

    `energy[k]` is that of the paths through k of the n branches; a path survives with probability
    C(n - k, removed) / C(n, removed).
    """
    n = len(energy) - 1
    kept = [math.comb(n - k, removed) / math.comb(n, removed) for k in range(n + 1)]
    return sum(e * share for e, share in zip(energy, kept, strict=True)) / sum(energy)


def rank_correlation(one: Sequence[float], two: Sequence[float]) -> float:
    """Return Spearman's rho; 0 where one of them does not vary."""
    if len(set(one)) < 2 or len(set(two)) < 2:
        return 0.0
    return float(spearmanr(one, two)[0])


def _across(rows: Rows, metric: str) -> float:
    """Return the rank correlation over the wirings of a metric with the rise: mean of the tasks."""
    by_task = [rows.only(task=task) for task in sorted(set(rows.column("task")))]
    found = [
        float(spearmanr(nets.column(metric), nets.column("rise"), nan_policy="propagate")[0])
        for nets in by_task
    ]
    return statistics.fmean(found)


def _typical(metric: str) -> Callable[[Rows], float]:
    """Return the effect: the median of a metric over all networks of a seed."""
    return lambda rows: float(torch.tensor(rows.column(metric)).quantile(0.5))


def _over_counting(rows: Rows) -> float:
    """Return by how much the pull ranks the sets better than the number that is removed."""
    pairs = zip(rows.column("rho_pull"), rows.column("rho_count"), strict=True)
    return float(torch.tensor([pull - count for pull, count in pairs]).quantile(0.5))


RHO = Words("Spearman's ρ", "Spearman ρ")

STUDY = Study(
    id="ST-32",
    name="path-lesion",
    title=Words("Can an X-ray foretell a lesion?", "X 光能预测删块的后果吗"),
    question=Words(
        "Do the lengths of the paths that carry the gradient, or simpler readings of an X-ray, predict what "
        "the removal of branches does to a trained network?",
        "携带梯度的路径有多长，或者 X 光中更简单的读数，能否预测从训练好的网络中删去分支的后果？",
    ),
    design=Words(
        "Networks of 12 connections are trained under eight wirings on digits (two-layer branches) and under "
        "seven on text (character GPTs of 6 layers). Then random sets of 2, 3, 4 and 6 branches lose their "
        "updates, 12 sets of each size. Two questions. Between networks: the exact path spectrum says which "
        "share of the gradient's energy |g_k|² runs through none of a third of the branches, drawn at random; "
        "does the loss rise less where that is larger? Within a network: which reading, summed over the "
        "branches that are removed, ranks the sets by the rise of the loss? Readings: the first-order slope "
        "-⟨∂L/∂u, u⟩ of the loss; the pull |∂L/∂x|·|u|; the update beside the stream; the distance of the "
        "identity gain from 1; the mere number; and the rises of the single lesions.",
        "训练含 12 个连接的网络：手写数字上用八种接法（双层分支），文本上用七种（6 层字符 GPT）。然后随机选 2、3、4、6 个"
        "分支，把其更新置零，每种大小 12 组。两个问题。其一，网络之间：精确的路径谱给出，随机去掉三分之一分支后，梯度能量"
        " |g_k|² 中有多大份额不经过这些分支；这个份额越大，损失是否上升越少？其二，同一网络之内：哪种读数（对被删分支求和）"
        "能按损失的上升给各组排序？读数包括：损失的一阶斜率 -⟨∂L/∂u, u⟩；拉力 |∂L/∂x|·|u|；更新与残差流之比；恒等增益与 1 "
        "之差；仅仅是个数；以及单独删除时的损失上升。",
    ),
    controls=Words(
        "All readings and losses are of the same held-out examples (the spectrum of 64 of them) in "
        "evaluation mode; the sets are the same for all networks of a seed. The number of branches removed is "
        "itself a strong predictor, so what a reading adds to it is a contrast of its own. A limit: within "
        "one task the wirings differ in more than their path lengths. The limits were set after a pilot on "
        "two other seeds.",
        "所有读数与损失都取自相同的留出样本（路径谱用其中 64 个），评估模式；同一种子的各网络删去的组相同。删去的个数本身"
        "就是很强的预测量，因此读数比它多说了多少另作一项对比。局限：同一任务中，各接法的差别不止路径长度。各项界限是在另外两个种子的预实验之后设定的。",
    ),
    lesson=Words(
        "The exact path spectrum does foretell between wirings which networks suffer from lesions (rank "
        "correlation -0.62 over eight wirings), but no better than the mean size of the updates, which is far "
        "cheaper to look at. Within a network, which sets of branches are missed: the sum of the single lesions "
        "says it best (0.91), the pull |∂L/∂x|·|u| nearly as well without a single lesion (0.89), the mere number "
        "of branches 0.7, and the first-order slope of the loss least (0.41, which these seeds do not hold "
        "against the 0.5 asked for). Before a reading is trusted as a forecast, hold it against counting.",
        "精确的路径谱确实能预告哪种接法怕删块（八种接法间的秩相关为 -0.62），但并不比更新的平均大小更好，而后者容易看得多。同一网络内部，"
        "删去哪些分支损失大：单独删块之和预告得最好（0.91），拉力 |∂L/∂x|·|u| 不必删一块也几乎同样好（0.89），单纯数个数为 0.7，"
        "损失的一阶斜率最差（0.41，是否低于所要求的 0.5，这些种子不能断定）。在把某种读数当作预测之前，先与数个数作比较。",
    ),
    claims=(),
    factors={"task": ("digits", "text"), "wiring": tuple(WIRINGS)},
    measure=measure,
    skip=lambda cell: cell["task"] == "text" and cell["wiring"] == "residual, BN",
    metrics={
        "rise": Metric(Words("rise of the loss without a third of the branches", "去掉三分之一分支后损失的上升"),
                       Words("nats", "nat")),
        "survives": Metric(Words("share of the gradient that survives by the path spectrum", "按路径谱，梯度存活的份额")),
        "length": Metric(Words("mean path length", "平均路径长度"), Words("branches", "个分支")),
        "updates": Metric(Words("update / stream, mean", "更新与残差流之比，平均")),
        "loss": Metric(Words("loss of the whole network", "完整网络的损失"), Words("nats", "nat")),
        "rho_slope": Metric(Words("ρ of the first-order slope", "一阶斜率的 ρ")),
        "rho_pull": Metric(Words("ρ of the pull", "拉力的 ρ")),
        "rho_share": Metric(Words("ρ of update / stream", "更新与残差流之比的 ρ")),
        "rho_gain": Metric(Words("ρ of the identity gain", "恒等增益的 ρ")),
        "rho_count": Metric(Words("ρ of the number removed", "个数的 ρ")),
        "rho_singles": Metric(Words("ρ of the single lesions", "单独删除的 ρ")),
        "singles": Metric(Words("rise of the loss without the branch", "删去该分支后损失的上升"), Words("nats", "nat")),
        "pull": Metric(Words("pull", "拉力")),
        "slope": Metric(Words("first-order slope", "一阶斜率"), Words("nats", "nat")),
        "connection": Metric(Words("connection", "连接")),
    },
    primary=Contrast(
        Words(
            "Between networks the path spectrum foretells the lesions: the share of the gradient that "
            "survives, and the rise of the loss without a third of the branches, have a rank correlation below "
            "-0.5 over the wirings (mean of both tasks).",
            "在网络之间，路径谱能预测删块的后果：梯度存活的份额与去掉三分之一分支后损失的上升，在各接法之间的秩相关低于 -0.5"
            "（两个任务平均）。",
        ),
        lambda rows: _across(rows, "survives"),
        limit=-0.5,
        rule="below",
        unit=RHO,
    ),
    secondary=(
        Contrast(
            Words(
                "It foretells no more than the mean size of the updates does: the two correlations differ by "
                "less than 0.1.",
                "它并不比更新的平均大小预测得更多：两个相关系数相差不到 0.1。",
            ),
            lambda rows: -_across(rows, "survives") - _across(rows, "updates"),
            limit=0.1, rule="within", name="adds-nothing", unit=RHO,
        ),
        Contrast(
            Words(
                "Within a network the first-order slope of the loss ranks the sets: ρ above 0.5 (median over "
                "the networks).",
                "在同一网络之内，损失的一阶斜率能给各组排序：ρ 高于 0.5（各网络的中位数）。",
            ),
            _typical("rho_slope"), limit=0.5, name="first-order", unit=RHO,
        ),
        Contrast(
            Words("The pull |∂L/∂x|·|u| ranks them: ρ above 0.7.", "拉力 |∂L/∂x|·|u| 能排序：ρ 高于 0.7。"),
            _typical("rho_pull"), limit=0.7, name="pull", unit=RHO,
        ),
        Contrast(
            Words("The update beside the stream ranks them: ρ above 0.7.", "更新与残差流之比能排序：ρ 高于 0.7。"),
            _typical("rho_share"), limit=0.7, name="share", unit=RHO,
        ),
        Contrast(
            Words(
                "The pull ranks them better than the mere number of branches, by more than 0.1.",
                "拉力的排序比单纯的个数更好，ρ 高出 0.1 以上。",
            ),
            _over_counting, limit=0.1, name="beats-counting", unit=RHO,
        ),
        Contrast(
            Words(
                "The sum of the single lesions ranks them: ρ above 0.7.",
                "单独删除时损失上升之和能排序：ρ 高于 0.7。",
            ),
            _typical("rho_singles"), limit=0.7, name="additive", unit=RHO,
        ),
    ),
    modes={
        "quick": Mode(8, 1.5, {"wiring": ("pre-norm", "post-norm", "LayerScale 0.1", "peri-norm")},
                      {"steps": 120}),
        "default": Mode(8, 5, settings={"steps": 300}),
    },
    plots=(
        Plot(
            "dots", Words("Rise of the loss without a third of the branches", "去掉三分之一分支后损失的上升"),
            x="wiring", y="rise", facet="task",
        ),
        Plot(
            "dots", Words("Share of the gradient that survives, by the path spectrum", "按路径谱，梯度存活的份额"),
            x="wiring", y="survives", facet="task",
        ),
        Plot(
            "dots", Words("How well the pull ranks the lesions", "拉力对删块后果的排序"),
            x="wiring", y="rho_pull", facet="task", reference=0.0,
            reference_title=Words("no relation", "无关"),
        ),
        Plot(
            "dots", Words("How well the first-order slope does", "一阶斜率的排序"),
            x="wiring", y="rho_slope", facet="task", reference=0.0,
            reference_title=Words("no relation", "无关"),
        ),
    ),
    published=(
        Published(
            Words(
                "Lesions of ResNet-110 are explained by its short paths; no prediction for one network against "
                "another is given",
                "ResNet-110 的删块结果用短路径来解释；文中没有在网络之间作预测",
            ),
            Words("lengths 5 to 17 of 54", "长度 5 至 17（共 54）"),
            "Veit et al. 2016 (arXiv:1605.06431)",
        ),
        Published(
            Words(
                "Language models: layers are removed in the order of 1 - cos(x_l, x_(l+1)); about a quarter of "
                "the parameters can go",
                "语言模型：按 1 - cos(x_l, x_(l+1)) 的次序删层，约四分之一参数可去除",
            ),
            Words("about 92 % of the score kept", "保留约 92% 的得分"),
            "Men et al. 2024 (arXiv:2403.03853)",
        ),
    ),
    heavy=True,
)  # fmt: skip
