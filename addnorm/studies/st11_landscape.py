"""ST-11 Loss landscapes: are those of residual networks smoother, at the same training loss?"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from addnorm.probe.landscape import landscape
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

# By depth in layers: the training loss at which the networks are compared, in nats, and the most
# steps that they may take to it.
TARGETS: Mapping[int, tuple[float, int]] = {8: (0.05, 150), 20: (0.05, 400), 32: (0.15, 800)}
WIRINGS = {"plain": "plain(act='relu')", "residual": "postact"}
IMAGES = 512  # of the training set, on which the loss is compared and the picture computed
RADIUS, POINTS = 0.5, 25  # 1 would be a step as long as the weights themselves
WELL = 0.1  # nats that a minimum must be deep to count


class Reached:
    """Looks on at a training and keeps the first state whose loss on the images is small enough."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, target: float) -> None:
        self.model, self.x, self.y, self.target = model, x, y, target
        self.step = self.steps = 0
        self.state: dict[str, Tensor] = {}

    def begin(self, step: int) -> None:
        """Begin."""

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at nothing."""

    def after_update(self, loss: Tensor) -> None:
        """Keep the state; the loss of the batch says when it is worth looking."""
        self.step += 1
        if not self.state and loss.item() < 3 * self.target:
            bench.refit(self.model, self.x)
            value, _ = bench.loss_on(self.model, self.x, self.y)
            self.model.train()
            if value < self.target:
                self.steps, self.state = self.step, copy.deepcopy(self.model.state_dict())

    def flush(self) -> None:
        """Write nothing."""


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train a network of two-layer branches on digits to the loss of its depth; look around it."""
    data, (target, steps) = bench.digits(), TARGETS[cell["depth"]]
    x, y = (part[:IMAGES] for part in bench.training_set(data))
    model = bench.mlp(
        cell["seed"],
        cell["depth"] // 2,
        WIRINGS[cell["net"]],
        branch_layers=2,
        inner_norm="batchnorm",
        start="he",
    )
    reached = Reached(model, x, y, target)
    settings = bench.SGD | {"lr": 0.05, "steps": steps}
    bench.trained(model, data, cell["seed"], watcher=reached, **settings)
    if not reached.state:
        return {"steps": math.nan}
    model.load_state_dict(reached.state)
    test, right = bench.loss_on(model, *bench.test_set(data))
    pictures, nearer = (
        [
            landscape(model, x, y, points=POINTS, radius=radius, seed=seed, budget=math.inf)
            for seed in range(97 * cell["seed"], 97 * cell["seed"] + cell["directions"])
        ]
        for radius in (RADIUS, RADIUS / 2)
    )
    middle, last = POINTS // 2, POINTS - 1
    rises = [
        p.losses[i][j] - p.center
        for p in pictures
        for i, j in ((middle, 0), (middle, last), (0, middle), (last, middle))
    ]
    return {
        "steps": reached.steps,
        "loss": pictures[0].center,
        "test": test,
        "error": 1 - right,
        "non_convex": sum(p.non_convex for p in pictures) / len(pictures),
        "near": sum(p.non_convex for p in nearer) / len(nearer),
        "rise": sum(rises) / len(rises),
        "wells": sum(wells(p.losses, WELL) for p in pictures) / len(pictures),
        "held_out": max(p.error for p in pictures),
        "section": [max(value, 1e-3) for value in pictures[0].losses[middle]],
        "place": pictures[0].x,
    }


def wells(losses: Sequence[Sequence[float]], deep: float) -> int:
    """Return how many minima of a picture are at least `deep` below the pass to a lower one.

    The lowest always counts. Points join their eight neighbours in the order of their losses; where
    two basins meet, the one with the higher minimum ends (0-dimensional persistence, Edelsbrunner
    et al. 2002, "Topological persistence and simplification").
    """
    heights = {(i, j): v for i, row in enumerate(losses) for j, v in enumerate(row)}
    basin: dict[tuple[int, int], tuple[int, int]] = {}  # point -> a lower one of its basin

    def lowest(point: tuple[int, int]) -> tuple[int, int]:
        while basin[point] != point:
            point = basin[point]
        return point

    ended = 0
    for point in sorted(heights, key=heights.__getitem__):
        i, j = point
        basin[point] = point
        around = [(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
        met = sorted({lowest(p) for p in around if p in basin}, key=heights.__getitem__)
        for other in met[1:]:
            ended += heights[point] - heights[other] >= deep
            basin[other] = met[0]
        if met:
            basin[point] = met[0]
    return 1 + ended


def _gap(rows: Rows, metric: str, depth: int) -> float:
    """Return the metric of the plain network minus that of the residual one; NaN without both."""
    both = [rows.only(net=net, depth=depth).column(metric) for net in WIRINGS]
    return float(both[0][0] - both[1][0]) if all(both) else math.nan


def _decades(rows: Rows, metric: str, depth: int) -> float:
    """Return log10 of the metric, plain over residual."""
    both = [rows.only(net=net, depth=depth).column(metric) for net in WIRINGS]
    return math.log10(both[0][0] / both[1][0]) if all(both) else math.nan


def _wells(rows: Rows) -> float:
    """Return the wells in a picture of the deepest plain network, on average over directions."""
    return float(sum(rows.only(net="plain", depth=32).column("wells")) or math.nan)


STUDY = Study(
    id="ST-11",
    name="landscape",
    title=Words("Loss landscapes", "损失地形"),
    question=Words(
        "Is the loss smoother around a residual network than around a plain one that fits its data as well?",
        "在拟合程度相同时，残差网络周围的损失是否比普通网络更平滑？",
    ),
    design=Words(
        "Networks of 8, 20 and 32 linear layers with BatchNorm, 64 wide, with and without the shortcut "
        "around each pair of layers, are trained on digits until their loss on 512 training images first "
        "falls below 0.05 nats (0.15 at 32 layers, since plain networks there hardly get that low). Around that point "
        "the loss is computed on planes of two random filter-normalised directions (Li et al. 2018), out "
        "to half the length of the weights. Counted are the points of clearly negative curvature, the wells at "
        "least 0.1 nats deep, and the rise towards the edges.",
        "带 BatchNorm、宽 64 的全连接网络，8、20、32 层，每两层之上加或不加捷径，在手写数字上训练，直到在 512 张"
        "训练图像上的损失首次低于 0.05 nat（32 层为 0.15，因为普通网络在此深度连这一值也未必达到）。然后在该点周围，沿两个随机的"
        "滤波器归一化方向（Li 等 2018）张成的平面计算损失，范围为权重长度的一半。统计曲率明显为负的点所占比例、"
        "深度至少 0.1 nat 的谷的个数，以及损失向边缘的上升量。",
    ),
    controls=Words(
        "Both networks of a depth are compared at the same training loss: a deep plain network that has not "
        "trained yet would look rough for that reason alone. They have the same parameters, start, batches "
        "and directions. The statistics of BatchNorm are taken anew from the 512 images first and kept while "
        "the weights are moved. The pictures are interpolated; their largest error at held-out points is reported. A plane that is not convex says "
        "that the loss is not; a smooth plane says little about all other directions.",
        "同一深度的两种网络在相同的训练损失处比较：尚未训练好的深层普通网络会仅仅因此显得粗糙。参数量、初始值、"
        "批次与方向都相同。BatchNorm 的统计量先在这 512 张图像上重新计算，移动权重时保持不变。图由插值得到，并报告留出点上的最大误差。平面内"
        "非凸说明损失非凸；而一个平面光滑，对其余方向几乎不说明什么。",
    ),
    lesson=Words(
        "Smooth has several meanings, and they do not agree. At 20 layers and equal training loss, 27 % of the "
        "plane around the plain network has negative curvature, and 4 % around the residual one; at 8 layers "
        "hardly any in either. But within a quarter of the length of the weights the two differ by only 1.6 "
        "points, so most of it lies far out, where the loss of the plain network bends to the plateau of "
        "guessing. The loss around the residual network even rises faster (by 3.9 against 2.1 nats half a length "
        "away). Every picture that could be drawn has a single well or nearly so; but at 32 layers three of eight "
        "plain networks never reached the loss at which they are compared, so on chaos as drawn in the document "
        "there is no verdict. In the five that did, the negative curvature is near by as well (33 % against 0.3 "
        "%). What is plain to see is the way there: 199 steps against 38 at 20 layers.",
        "“平滑”有几种含义，彼此并不一致。20 层、训练损失相同时，普通网络周围的平面上有 27% 曲率为负，残差网络只有 4%；8 层时两者都几乎没有。"
        "但在权重长度的四分之一以内，两者只差 1.6 个百分点：负曲率大多在远处，普通网络的损失在那里弯向随机猜测的平台。残差网络周围的损失甚至升得更快（走出半个长度，"
        "上升 3.9 对 2.1 nat）。能画出的每幅图基本只有一个谷；但 32 层时，八个普通网络中有三个始终没有达到用来比较的损失，因此对文中所画的混乱不作结论。"
        "达到的五个，负曲率在近处也很多（33% 对 0.3%）。真正显而易见的是到达那里的路程：20 层时 199 步对 38 步。",
    ),
    claims=(
        Claim("1.25", "001", 162, Words(
            "Residual connections make the loss landscape smoother (here: fewer points of negative curvature, "
            "at 20 layers).",
            "残差连接使损失地形更平滑（此处指：20 层时负曲率的点更少）。",
        )),
        Claim("1.25b", "001", 162, Words(
            "They make it smoother (here: it rises less steeply, at 20 layers).",
            "残差连接使损失地形更平滑（此处指：20 层时上升得更平缓）。",
        ), by="sharper"),
        Claim("1.25c", "001", 167, Words(
            "The loss of a deep plain network has many wells (here: of 32 layers).",
            "深层普通网络的损失有许多谷（此处指 32 层）。",
        ), by="chaos"),
        Claim("1.43", "001", 282, Words(
            "With them the network finds a good minimum more easily.",
            "有了它，网络更容易找到好的极小值。",
        ), by="sooner"),
    ),
    factors={"net": tuple(WIRINGS), "depth": tuple(TARGETS)},
    measure=measure,
    metrics={
        "non_convex": Metric(Words("share of negative curvature", "负曲率点的比例")),
        "near": Metric(Words("share of negative curvature within 0.25", "0.25 范围内负曲率点的比例")),
        "section": Metric(Words("loss", "损失"), Words("nats", "nat")),
        "rise": Metric(Words("rise of the loss at 0.5", "距离 0.5 处损失的上升"), Words("nats", "nat")),
        "wells": Metric(Words("wells in a picture", "每幅图中谷的个数")),
        "steps": Metric(Words("steps to the loss", "达到该损失所需步数"), failed=800),
        "loss": Metric(Words("training loss", "训练损失"), Words("nats", "nat")),
        "test": Metric(Words("test loss", "测试损失"), Words("nats", "nat")),
        "error": Metric(Words("test error", "测试错误率")),
        "held_out": Metric(Words("error of the pictures / range", "图的插值误差与取值范围之比")),
        "place": Metric(Words("distance / length of the weights", "距离与权重长度之比")),
    },
    primary=Contrast(
        Words(
            "At 20 layers and the same training loss, the share of negative curvature is larger around the "
            "plain network than around the residual one, by more than 0.05.",
            "20 层、训练损失相同时，普通网络周围负曲率点的比例比残差网络高 0.05 以上。",
        ),
        lambda rows: _gap(rows, "non_convex", 20),
        limit=0.05,
        unit=Words("share of the plane", "（平面占比）"),
    ),
    secondary=(
        Contrast(
            Words(
                "At 8 layers the shares differ by less than 0.05.",
                "8 层时，二者的比例相差不到 0.05。",
            ),
            lambda rows: _gap(rows, "non_convex", 8), limit=0.05, rule="within", name="shallow-alike",
            unit=Words("share of the plane", "（平面占比）"),
        ),
        Contrast(
            Words(
                "At 32 layers the share is larger around the plain network by more than 0.05.",
                "32 层时，普通网络周围的比例高 0.05 以上。",
            ),
            lambda rows: _gap(rows, "non_convex", 32), limit=0.05, name="deeper",
            unit=Words("share of the plane", "（平面占比）"),
        ),
        Contrast(
            Words(
                "At 20 layers the loss rises faster around the plain network: it is sharper.",
                "20 层时，普通网络周围的损失上升更快，即更尖锐。",
            ),
            lambda rows: _decades(rows, "rise", 20), limit=0.0, name="sharper",
            unit=Words("powers of ten", "个数量级"),
        ),
        Contrast(
            Words(
                "At 32 layers the plain network's landscape is chaotic: a picture has more than 1.5 wells on "
                "average.",
                "32 层普通网络的地形是混乱的：每幅图平均有 1.5 个以上的谷。",
            ),
            _wells, limit=1.5, name="chaos", unit=Words("wells", "个"),
        ),
        Contrast(
            Words(
                "At 20 layers the plain network needs more than twice as many steps to the same loss.",
                "20 层时，普通网络达到相同损失所需的步数是残差网络的两倍以上。",
            ),
            lambda rows: _decades(rows, "steps", 20), limit=math.log10(2), name="sooner",
            unit=Words("powers of ten", "个数量级"),
        ),
        Contrast(
            Words(
                "The share of negative curvature differs near by, too: within 0.25 of the 20-layer networks it is "
                "larger around the plain one by more than 0.05.",
                "近处负曲率的比例也有差别：在 20 层网络的 0.25 范围内，普通网络周围的比例高 0.05 以上。",
            ),
            lambda rows: _gap(rows, "near", 20), limit=0.05, name="near-by",
            unit=Words("share of the plane", "（平面占比）"),
        ),
    ),
    modes={
        "quick": Mode(8, 0.6, {"depth": (8, 20)}, {"directions": 2}),
        "default": Mode(8, 3, settings={"directions": 5}),
    },
    plots=(
        Plot(
            "lines", Words("Negative curvature around the network, by depth", "网络周围的负曲率与深度"),
            x="depth", y="non_convex", color="net", x_title=Words("layers", "层数"),
        ),
        Plot(
            "profile", Words("The loss along one direction", "沿一个方向的损失"),
            x="place", y="section", color="net", facet="depth", log_y=True,
        ),
        Plot(
            "dots", Words("How far the loss rises at 0.5", "距离 0.5 处损失的上升"),
            x="depth", y="rise", color="net", log_y=True, x_title=Words("layers", "层数"),
        ),
        Plot(
            "dots", Words("Steps to the same training loss", "达到相同训练损失所需步数"),
            x="depth", y="steps", color="net", log_y=True, x_title=Words("layers", "层数"),
        ),
    ),
    published=(
        Published(
            Words(
                "CIFAR-10: without shortcuts the surface of 20 layers is benign, those of 56 and 110 are "
                "chaotic; the effect of shortcuts at 20 layers is hardly noticeable",
                "CIFAR-10：无捷径时 20 层的曲面温和，56 与 110 层则混乱；20 层时捷径的影响几乎看不出来",
            ),
            Words(
                "figures; test error without / with shortcuts 8.18 / 7.37 % (20), 13.31 / 5.89 % (56), "
                "16.44 / 5.79 % (110)",
                "见图；无 / 有捷径的测试错误率：8.18 / 7.37%（20 层）、13.31 / 5.89%（56 层）、16.44 / 5.79%（110 层）",
            ),
            "Li et al. 2018 (arXiv:1712.09913)",
        ),
    ),
)  # fmt: skip
