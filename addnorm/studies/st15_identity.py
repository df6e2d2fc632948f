"""ST-15 Identity: "do nothing" is easy to learn with a shortcut only, because it is near."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from addnorm.branches import Context
from addnorm.contract import Stack
from addnorm.models.mlp import MLP, Dense
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
from addnorm.training.objective import squared_error

D = 32  # width of the vectors that are to be copied, and of the branches
EXAMPLES = 2048
WIRINGS = {"plain": "plain", "residual": "residual"}
INSERTED = 8  # identity layers put into a trained network
DECADES = Words("powers of ten", "个数量级")


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Teach a stack of two-layer branches W' relu(W x + b) + b' a linear map of random vectors."""
    seed = cell["seed"]
    torch.manual_seed(seed)
    x = torch.randn(EXAMPLES, D)
    turn = torch.linalg.qr(torch.randn(D, D)).Q
    targets = {"x": x, "-x": -x, "rotated": x @ turn}[cell["target"]]
    stack = _stack(WIRINGS[cell["net"]], cell["depth"], hidden=2 * D, start="he")
    before = _sizes(stack)
    settings = bench.ADAM | {"lr": cell["rate"], "steps": cell["steps"]}
    run = bench.trained(
        stack,
        bench.Pairs(x, targets),
        seed,
        objective=squared_error,
        eval_every=cell["steps"] // 10,
        eval_batches=EXAMPLES // settings["batch"],
        **settings,
    )
    kept = [after / size for after, size in zip(_sizes(stack), before, strict=True)]
    return {
        "error": run.validation,
        "kept": sum(kept) / len(kept),
        "curve": [evaluation.loss for evaluation in run.evaluations],
        "step": [evaluation.step for evaluation in run.evaluations],
        **constructions(seed),
    }


def _stack(wiring: str, depth: int, **settings: Any) -> Stack:
    start = settings.pop("start", "")
    layers = [Dense(D, "relu", **settings) for _ in range(depth)]
    return Stack(layers, wiring, dim=D, start=start)


def _sizes(stack: Stack) -> list[float]:
    """Return the Euclidean norm of every matrix."""
    return [m.weight.norm().item() for connection in stack for m in connection.branch.matrices()]


@functools.cache
def constructions(seed: int) -> dict[str, float]:
    """Return what networks with chosen weights give, where nothing has to be learned."""
    torch.manual_seed(seed)
    error, distance, doubled = _mirrored()
    passed, gradient = _last_zero()
    return {
        "inserted": _inserted(seed),
        "mirrored": error,
        "distance": distance,
        "doubled": doubled,
        "passed": passed,
        "moves": gradient,
        "saddle": _all_zero(),
    }


def _inserted(seed: int) -> float:
    """Return how much a trained network's loss changes when identity layers are put into it.

    What a ReLU gives is not negative, so that a layer relu(I h) returns it.
    """
    data = bench.digits()
    shallow, deep = (
        bench.mlp(seed, depth, WIRINGS["plain"], start="he") for depth in (2, 2 + INSERTED)
    )
    bench.trained(shallow, data, seed, **bench.ADAM, lr=3e-3, steps=40)
    width = shallow.config.dim
    first, second = _linears(shallow)
    identity = (torch.eye(width), torch.zeros(width))
    weights = [(first.weight, first.bias), *[identity] * INSERTED, (second.weight, second.bias)]
    with torch.no_grad():
        for linear, (weight, bias) in zip(_linears(deep), weights, strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    deep.head.load_state_dict(shallow.head.state_dict())
    pairs = bench.training_set(data)
    return bench.loss_on(deep, *pairs)[0] - bench.loss_on(shallow, *pairs)[0]


def _linears(model: MLP) -> Sequence[torch.nn.Linear]:
    return [module.linear for module in model.modules() if isinstance(module, Dense)]


def _mirrored() -> tuple[float, float, float]:
    """Return what a branch [B, -B] relu([A; -A] x) with B A = I does: three numbers.

    Its largest error as the identity, A's distance from I relative to I, and the largest error of
    a block with shortcut around it as 2 x. A is three times a random rotation, since
    x = relu(x) - relu(-x) holds along every axis.
    """
    plain, residual = (_stack(wiring, 1, hidden=2 * D).double() for wiring in WIRINGS.values())
    A = 3 * torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    for stack in (plain, residual):
        _fill(stack, torch.cat((A, -A)), torch.cat((A.inverse(), -A.inverse()), dim=1))
    x = torch.randn(256, D, dtype=torch.float64)
    eye = torch.eye(D, dtype=torch.float64)
    with torch.no_grad():
        error, doubled = (plain(x) - x).abs().max(), (residual(x) - 2 * x).abs().max()
    return error.item(), ((A - eye).norm() / eye.norm()).item(), doubled.item()


def _last_zero() -> tuple[float, float]:
    """Return error as the identity of a block whose last matrix alone is 0, and its gradient."""
    stack = _stack(WIRINGS["residual"], 1, hidden=D, start="he")
    branch = next(iter(stack)).branch
    assert isinstance(branch, Dense)
    assert branch.out is not None
    _fill(stack, branch.linear.weight.detach(), torch.zeros(D, D))
    x = torch.randn(256, D)
    out = stack(x)
    squared_error(out, -x).backward()  # type: ignore[no-untyped-call]
    assert branch.out.weight.grad is not None
    return (out - x).abs().max().item(), branch.out.weight.grad.norm().item()


def _all_zero() -> float:
    """Return how far a branch of zeros comes on the way to -x: the norm of its matrices."""
    stack = _stack(WIRINGS["residual"], 1, hidden=D)
    _fill(stack, torch.zeros(D, D), torch.zeros(D, D))
    x = torch.randn(256, D)
    settings = bench.ADAM | {"lr": 1e-2, "steps": 20, "eval_batches": 2}
    bench.trained(stack, bench.Pairs(x, -x), 0, objective=squared_error, **settings)
    return sum(_sizes(stack))


@torch.no_grad()
def _fill(stack: Stack, inner: Tensor, out: Tensor) -> None:
    """Set both matrices of the only branch; its biases are 0."""
    (connection,) = stack
    for matrix, value in zip(connection.branch.matrices(), (inner, out), strict=True):
        matrix.weight.copy_(value)
    for linear in connection.branch.modules():
        if isinstance(linear, torch.nn.Linear):
            linear.bias.zero_()
    assert not connection.branch(torch.zeros(1, D).to(inner), Context()).any()


def _decades(rows: Rows, depth: int, target: str) -> float:
    """Return by how many powers of ten the plain network's error exceeds the residual one's."""
    plain, residual = (
        rows.best("error", net=net, depth=depth, target=target) for net in ("plain", "residual")
    )
    return math.log10(plain / residual)


def _deepest(rows: Rows) -> int:
    return int(max(rows.column("depth")))


def _kept(rows: Rows) -> float:
    """Return what the matrices keep of their size in the residual network that copies best."""
    found = rows.only(net="residual", depth=_deepest(rows), target="x")
    return float(min(found, key=lambda row: row["error"])["kept"])


def _first(metric: str, rows: Rows) -> float:
    """Return a number that does not depend on the levels."""
    return float(rows.column(metric)[0])


STUDY = Study(
    id="ST-15",
    name="identity",
    title=Words("Doing nothing", "学会“什么都不做”"),
    question=Words(
        "Is the identity hard to learn for plain layers, easy with a shortcut, and why?",
        "没有捷径的层难以学会恒等映射吗？有了捷径为什么就容易？",
    ),
    design=Words(
        "One or four two-layer branches W′ relu(W x + b) + b′, 32 wide and 64 inside (so that relu(x) - "
        "relu(-x) fits in), with and without shortcuts, "
        "learn to return random vectors x unchanged, by Adam at two rates. The control targets are "
        "-x and a random rotation of x, which are no nearer to x than to 0. Beside them stand "
        "networks with chosen weights: identity layers put into a trained classifier; an exact "
        "identity far from I; a block with shortcut around a branch that is the identity; branches "
        "whose last matrix, or every matrix, is zero.",
        "宽 32、内宽 64 的两层分支 W′ relu(W x + b) + b′（容得下 relu(x) - relu(-x)），一个或四个，加或不加捷径，用 Adam（两种学习率）学习原样输出"
        "随机向量 x。对照目标是 -x 与 x 的随机旋转，它们离 x 并不比离 0 更近。另有直接给定权重的网络：往训练好的"
        "分类器里插入恒等层；权重远离 I 却恰好是恒等映射的层；分支本身是恒等映射的残差块；最后一个矩阵为零、"
        "或全部矩阵为零的分支。",
    ),
    controls=Words(
        "With and without shortcuts the branches have the same parameters, He-normal start, data and "
        "batches; each keeps its best rate. A target on which the shortcut does not help shows that "
        "the gain is nearness to the target and not a better start.",
        "有无捷径，分支的参数量、He 初始值、数据与批次都相同，各取最佳学习率。若换一个目标后捷径不再有利，"
        "就说明优势来自起点离目标更近，而不是初始化更好。",
    ),
    lesson=Words(
        "Plain blocks hardly learn to copy, blocks with shortcuts do. For one block that is a matter of "
        "where it starts: with the target -x the shortcut is a burden. For four blocks it lowers "
        "the error about eightfold for -x too. Copying does not ask for weights near zero, nor a plain layer for the matrix I; "
        "and a branch with all weights at zero cannot learn at all.",
        "没有捷径的块很难学会复制输入，有捷径的块则容易。只有一个块时，关键在于起点：目标换成 -x，捷径反成负担。"
        "有四个块时，对目标 -x，捷径也使误差降到约八分之一。复制输入并不需要权重接近零，普通层也不必是单位矩阵；而权重全为零的分支"
        "根本学不动。",
    ),
    claims=(
        Claim("1.8", "001", 29, Words(
            "A deeper network cannot be worse in principle: the new layers may be the identity.",
            "理论上更深的网络不会更差：新增的层可以取恒等映射。",
        ), by="inserted"),
        Claim("1.9", "001", 29, Words(
            "In practice surplus layers hardly learn to do nothing.",
            "实践中，多余的层很难学会什么都不做。",
        )),
        Claim("1.18", "001", 128, Words(
            "Without a shortcut a layer is the identity only where its weight matrix is exactly I.",
            "没有捷径时，只有权重矩阵恰为 I 的层才是恒等映射。",
        ), by="far-from-I", stands=False),
        Claim("1.19", "001", 128, Words(
            "With a shortcut the identity is easy to reach: F only has to come near zero.",
            "有捷径时，只要 F 接近零就是恒等映射，很容易做到。",
        ), by="easy"),
        Claim("0.15", "000", 82, Words(
            "Where the sublayer F itself is near the identity, the block returns its input (read as it "
            "stands).",
            "子层 F 本身接近恒等映射时，块原样返回输入（按字面理解）。",
        ), by="doubles", stands=False),
    ),
    factors={
        "net": ("plain", "residual"),
        "target": ("x", "-x", "rotated"),
        "depth": (1, 4),
        "rate": (3e-3, 1e-2),
    },
    measure=measure,
    metrics={
        "error": Metric(Words("squared error", "均方误差"), failed=1.0),
        "kept": Metric(Words("size of the matrices over that at the start", "矩阵范数与初始范数之比")),
        "curve": Metric(Words("squared error in training", "训练中的均方误差")),
        "step": Metric(Words("step", "步数")),
        "inserted": Metric(Words("change of loss by identity layers", "插入恒等层引起的损失变化")),
        "mirrored": Metric(Words("error of an identity far from I", "远离 I 的恒等层的误差")),
        "distance": Metric(Words("its distance from I", "该层与 I 的距离")),
        "doubled": Metric(Words("distance from 2x where the branch is the identity",
                                "分支为恒等映射时与 2x 之差")),
        "passed": Metric(Words("error where the last matrix alone is 0", "仅最后一个矩阵为零时的误差")),
        "moves": Metric(Words("gradient of that matrix", "该矩阵的梯度")),
        "saddle": Metric(Words("size of matrices that started at 0, after 20 steps",
                               "从零开始的矩阵训练 20 步后的大小")),
    },
    primary=Contrast(
        Words(
            "Four blocks without shortcuts copy their input with at least ten times the error of four "
            "with shortcuts.",
            "复制输入时，四个无捷径的块，误差至少是有捷径时的十倍。",
        ),
        lambda rows: _decades(rows, _deepest(rows), "x"),
        limit=1.0,
        unit=DECADES,
    ),
    secondary=(
        Contrast(
            Words("One block: for the target -x the error is larger with the shortcut.",
                  "一个块、目标为 -x 时，有捷径的误差反而更大。"),
            lambda rows: _decades(rows, 1, "-x"),
            limit=0.0, rule="below", unit=DECADES, name="opposite",
        ),
        Contrast(
            Words("One block: the shortcut helps more towards x than towards a rotation of x, by a factor "
                  "of two or more.",
                  "一个块时，捷径对目标 x 的帮助，比对 x 的旋转至少大一倍。"),
            lambda rows: _decades(rows, 1, "x") - _decades(rows, 1, "rotated"),
            limit=math.log10(2), unit=DECADES, name="nearer",
        ),
        Contrast(
            Words("Four blocks: the shortcut lowers the error tenfold for -x as well.",
                  "四个块时，目标换成 -x，捷径同样使误差降到十分之一以下。"),
            lambda rows: _decades(rows, _deepest(rows), "-x"),
            limit=1.0, unit=DECADES, name="any-target",
        ),
        Contrast(
            Words("Four blocks with shortcuts copy their input with an error below 0.01.",
                  "四个有捷径的块复制输入的误差低于 0.01。"),
            lambda rows: math.log10(
                rows.best("error", net="residual", depth=_deepest(rows), target="x")
            ),
            limit=-2.0, rule="below", unit=DECADES, name="easy",
        ),
        Contrast(
            Words("There the matrices keep more than half of their size: F vanishes without them.",
                  "此时各矩阵仍保有一半以上的大小：F 趋于零并不需要权重趋于零。"),
            _kept, limit=0.5, name="weights-stay",
        ),
        Contrast(
            Words("Identity layers put into a trained plain network leave its loss as it is.",
                  "往训练好的普通网络里插入恒等层，损失不变。"),
            functools.partial(_first, "inserted"),
            limit=1e-6, rule="exact", unit=Words("nats", "nat"), name="inserted",
        ),
        Contrast(
            Words("A plain layer whose matrices are far from I can be the identity exactly.",
                  "矩阵远离 I 的普通层也能恰好是恒等映射。"),
            lambda rows: _first("mirrored", rows) if _first("distance", rows) > 1 else 1.0,
            limit=1e-9, rule="exact", name="far-from-I",
        ),
        Contrast(
            Words("Around a branch that is the identity the shortcut makes 2x.",
                  "分支本身是恒等映射时，加上捷径得到 2x。"),
            functools.partial(_first, "doubled"), limit=1e-9, rule="exact", name="doubles",
        ),
        Contrast(
            Words("It is enough that the last matrix of the branch is zero.",
                  "只要分支的最后一个矩阵为零就够了。"),
            functools.partial(_first, "passed"), limit=0.0, rule="exact", name="last-is-enough",
        ),
        Contrast(
            Words("A branch whose matrices are all zero gets no gradient and never moves.",
                  "矩阵全为零的分支得不到梯度，永远不动。"),
            functools.partial(_first, "saddle"), limit=0.0, rule="exact", name="saddle",
        ),
    ),
    modes={
        "quick": Mode(8, 0.4, {"rate": (1e-2,)}, {"steps": 300}),
        "default": Mode(8, 0.7, settings={"steps": 600}),
    },
    plots=(
        Plot(
            "profile", Words("Learning to return x: four blocks", "学习输出 x：四个块"),
            x="step", y="curve", color="net", log_y=True, only={"target": "x", "depth": 4, "rate": 1e-2},
            x_title=Words("step", "步"),
            reference=1.0, reference_title=Words("answering 0", "恒输出 0"),
        ),
        Plot(
            "dots", Words("Error after training", "训练后的误差"),
            x="target", y="error", color="net", facet="depth", log_y=True, only={"rate": 1e-2},
            x_title=Words("target", "目标"),
        ),
        Plot(
            "dots", Words("What the matrices keep of their size", "矩阵还保有多少大小"),
            x="net", y="kept", color="net", facet="depth", only={"target": "x", "rate": 1e-2},
        ),
    ),
    published=(
        Published(
            Words(
                "Where the identity is best, a residual is pushed to zero more easily than a stack of "
                "nonlinear layers is fitted to the identity: argued, not measured",
                "原文论证：若最优解是恒等映射，把残差推向零比用若干非线性层拟合恒等映射更容易；未给出测量",
            ),
            Words("section 3.1", "3.1 节"),
            "He et al. 2015 (arXiv:1512.03385)",
        ),
    ),
)  # fmt: skip
