"""ST-02 The "+1": what the identity term of a residual Jacobian guarantees, and what not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from addnorm.branches import Branch, Context
from addnorm.contract import Stack
from addnorm.studies.frame import (
    Claim,
    Contrast,
    Metric,
    Mode,
    Plot,
    Rows,
    Study,
    Words,
)

D = 32  # width of the random Jacobians
SPREADS = (0.1, 0.5, 1.0, 2.0)  # rho: entries of J are N(0, rho^2 / D), its spectral radius is rho
PATHS = (16, 3)  # width and blocks of the networks whose 2^n paths are summed
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
}


class Layer(Branch):
    """act(W x), W with entries N(0, 1/D)."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width, width, dtype=torch.float64))
        self.weight.data /= math.sqrt(width)
        self.activation = activation

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the update of `x (..., D)`."""
        return ACTIVATIONS[self.activation](x @ self.weight)


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Draw one random Jacobian of a branch, and the residual networks of three activations."""
    torch.manual_seed(cell["seed"])
    J = torch.randn(D, D, dtype=torch.float64) * cell["spread"] / math.sqrt(D)
    gains = torch.linalg.svdvals(torch.eye(D, dtype=torch.float64) + J)
    found = {name: _paths(name) for name in ACTIVATIONS}
    return {
        "smallest": gains.min(),
        "attenuated": (gains < 1).double().mean(),
        "identity": _autograd(),
        "linear": found["linear"][0],
        "relu": found["relu"][0],
        "tanh": found["tanh"][0],
        "mean": found["linear"][1],
        "cancelled": _cancelled(),
        **_block(),
    }


def _stack(width: int, blocks: int, activation: str) -> Stack:
    layers = [Layer(width, activation) for _ in range(blocks)]
    return Stack(layers, "residual", dim=width, start="").double()


def _block() -> dict[str, float]:
    """Return the largest error of x + F(x), and how much a residual connection learns itself."""
    stack = _stack(D, 1, "tanh")
    (connection,) = stack
    x = torch.randn(8, D, dtype=torch.float64)
    with torch.no_grad():
        error = (stack(x) - (connection.branch(x, Context()) + x)).abs().max()
    own = sum(p.numel() for p in stack.parameters())
    return {
        "sum": float(error),
        "learned": own - sum(p.numel() for p in connection.branch.parameters()),
    }


def _autograd() -> float:
    """Return the largest difference of autograd's Jacobian of x + F(x) from I + J_F."""
    stack = _stack(D, 1, "tanh")
    x = torch.randn(D, dtype=torch.float64)
    (connection,) = stack
    whole = torch.func.jacrev(stack)(x)
    part = torch.func.jacrev(lambda v: connection.branch(v, Context()))(x)
    return float((whole - part - torch.eye(D)).detach().abs().max())


def _cancelled() -> float:
    """Return the gain of x + F(x) for F(x) = -x: its Jacobian is I - I."""
    layer = Layer(D, "linear")
    layer.weight.data = -torch.eye(D, dtype=torch.float64)
    stack = Stack([layer], "residual", dim=D, start="").double()
    x = torch.randn(D, dtype=torch.float64)
    return float(torch.func.jacrev(stack)(x).detach().abs().max())


def _paths(activation: str) -> tuple[float, float]:
    """Return the relative error of the sum over all paths, and output over the paths' mean.

    A path passes some of the branches in order and skips the others.
    """
    width, blocks = PATHS
    stack = _stack(width, blocks, activation)
    x = torch.randn(8, width, dtype=torch.float64)
    with torch.no_grad():
        output = stack(x)
        total = torch.zeros_like(x)
        for taken in itertools.product((False, True), repeat=blocks):
            signal = x
            for connection, through in zip(stack, taken, strict=True):
                signal = connection.branch(signal, Context()) if through else signal
            total += signal
    error = (total - output).norm() / output.norm()
    return float(error), float(output.norm() / (total / 2**blocks).norm())


def _one(metric: str, spread: float = 0.1) -> Callable[[Rows], float]:
    return lambda rows: float(rows.value(metric, spread=spread))


STUDY = Study(
    id="ST-02",
    name="plus-one",
    title=Words("The “+1” of the gradient", "梯度里的“+1”"),
    question=Words(
        "Does the identity term of ∂(x + F(x))/∂x keep every gradient at its size?",
        "∂(x + F(x))/∂x 中的恒等项能保证梯度不衰减吗？",
    ),
    design=Words(
        "The singular values of I + J for random J of four sizes, with entries N(0, ρ²/32); autograd's "
        "Jacobian of a residual block beside I + J; the block F(x) = -x; and residual networks of three "
        "blocks beside the sum of their eight paths, for a linear, a ReLU and a tanh branch.",
        "随机矩阵 J（元素服从 N(0, ρ²/32)，四种 ρ）下 I + J 的奇异值；残差块的自动微分雅可比矩阵与 I + J 之差；"
        "F(x) = -x 的块；以及三个残差块的网络与其八条路径之和，分支分别为线性、ReLU、tanh。",
    ),
    controls=Words(
        "Everything is computed in float64; nothing is trained. Each seed draws new matrices.",
        "全部以 float64 计算，不涉及训练。每个种子重新抽取矩阵。",
    ),
    lesson=Words(
        "The Jacobian of a residual block is I + J_F, exactly. That does not bound it from below: about "
        "half of the directions shrink even for a small random J, and F(x) = -x lets nothing through. "
        "The output is the sum of its paths only where the branches are linear, and never their mean.",
        "残差块的雅可比矩阵恰为 I + J_F，但这并不给出下界：即使 J 很小，也约有一半方向被缩小；F(x) = -x 时"
        "什么都传不过去。只有分支为线性时，输出才等于各路径之和，而且从来不是平均。",
    ),
    claims=(
        Claim("0.5b", "000", 50, Words(
            "Where the gradient of the branch is small, the whole gradient does not vanish (here: through one "
            "block).",
            "子层的梯度很小时，总梯度不会完全消失（此处指经过一个块）。",
        ), by="small-kept"),
        Claim("0.6", "000", 67, Words("dH/dx = dF/dx + I.", "dH/dx = dF/dx + I。"), by="identity"),
        Claim("0.7", "000", 69, Words(
            "The term I guarantees a part of the gradient that is not zero.",
            "I 保证梯度中总有非零分量。",
        ), by="cancels", stands=False),
        Claim("1.1", "001", 5, Words(
            "The output of a residual block is F(x) + x.", "残差块的输出是 F(x) + x。",
        ), by="sum"),
        Claim("4.2", "004", 13, Words(
            "The identity mapping across layers is something that the network learns (here: on a shortcut that "
            "leaves the size unchanged).",
            "跨越层的恒等映射是网络学到的（此处指形状不变的捷径）。",
        ), by="nothing-learned", stands=False),
        Claim("1.22", "001", 143, Words("∂H/∂x = ∂F/∂x + 1.", "∂H/∂x = ∂F/∂x + 1。"), by="identity"),
        Claim("1.23", "001", 149, Words(
            "The bracket (∂F/∂x + 1) is at least 1, so the gradient comes back unattenuated.",
            "括号内的值至少为 1，因此梯度不衰减地传回。",
        ), stands=False),
        Claim("1.39", "001", 270, Words(
            "The output is the superposition of the outputs of all paths.",
            "输出是所有路径输出的叠加。",
        ), by="not-a-sum", stands=False),
        Claim("1.40", "001", 270, Words(
            "That amounts to averaging the predictions of networks of many depths.",
            "这等价于对不同深度网络的预测取平均。",
        ), by="not-a-mean", stands=False),
    ),
    factors={"spread": SPREADS},
    measure=measure,
    metrics={
        "smallest": Metric(Words("smallest singular value of I + J", "I + J 的最小奇异值")),
        "attenuated": Metric(Words("share of directions that shrink", "被缩小的方向所占比例")),
        "identity": Metric(Words("error of I + J", "与 I + J 之差")),
        "sum": Metric(Words("error of x + F(x)", "与 x + F(x) 之差")),
        "learned": Metric(Words("parameters of the connection itself", "连接自身的参数量")),
        "cancelled": Metric(Words("gain where F(x) = -x", "F(x) = -x 时的增益")),
        "linear": Metric(Words("error of the path sum, linear", "路径和的相对误差，线性")),
        "relu": Metric(Words("error of the path sum, ReLU", "路径和的相对误差，ReLU")),
        "tanh": Metric(Words("error of the path sum, tanh", "路径和的相对误差，tanh")),
        "mean": Metric(Words("output over the mean of the paths", "输出与路径平均之比")),
    },
    primary=Contrast(
        Words(
            "With a branch whose derivative J = ∂F/∂x is small and random (entries N(0, ρ²/32), ρ = 0.1), more "
            "than a quarter of the directions of the gradient shrink on their way through I + J.",
            "分支的导数 J = ∂F/∂x 是很小的随机矩阵（元素服从 N(0, ρ²/32)，ρ = 0.1）时，经过 I + J，也有超过四分之一的"
            "梯度方向被缩小。",
        ),
        _one("attenuated"),
        limit=0.25,
        unit=Words("share of directions", "方向占比"),
    ),
    secondary=(
        Contrast(
            Words("Autograd's Jacobian of x + F(x) is I + J_F.", "x + F(x) 的自动微分雅可比矩阵等于 I + J_F。"),
            _one("identity"), limit=1e-6, rule="exact", name="identity",
        ),
        Contrast(
            Words("A residual block returns x + F(x).", "残差块返回 x + F(x)。"),
            _one("sum"), limit=1e-12, rule="exact", name="sum",
        ),
        Contrast(
            Words("The shortcut has no parameters: nothing on it is learned.",
                  "捷径没有参数，上面没有什么可学。"),
            _one("learned"), limit=0, rule="exact", name="nothing-learned",
        ),
        Contrast(
            Words("With a small random J (ρ = 0.1) every direction keeps more than half of its size.",
                  "J 很小（ρ = 0.1）时，每个方向都保留一半以上。"),
            _one("smallest"), limit=0.5, name="small-kept",
        ),
        Contrast(
            Words("A branch can cancel the identity: F(x) = -x passes no gradient.",
                  "分支可以抵消恒等项：F(x) = -x 时梯度为零。"),
            _one("cancelled"), limit=1e-12, rule="exact", name="cancels",
        ),
        Contrast(
            Words("The sum over all paths misses the output of ReLU branches by more than a tenth.",
                  "分支为 ReLU 时，所有路径之和与输出相差超过十分之一。"),
            _one("relu"), limit=0.1, name="not-a-sum",
        ),
        Contrast(
            Words("Linear branches: the output is the sum of its paths.", "分支为线性时，输出等于路径之和。"),
            _one("linear"), limit=1e-9, rule="exact", name="linear-sum",
        ),
        Contrast(
            Words("The output is 8 times the mean of the 8 paths, also where the sum is exact.",
                  "即使输出恰等于各路径之和，输出也是八条路径平均值的 8 倍。"),
            lambda rows: rows.value("mean", spread=0.1) - 2 ** PATHS[1],
            limit=1e-9, rule="exact", name="not-a-mean",
        ),
    ),
    modes={"quick": Mode(8, 0.1), "default": Mode(12, 0.1)},
    plots=(
        Plot("dots", Words("Directions that shrink", "被缩小的方向"), x="spread", y="attenuated",
             x_title=Words("ρ, size of J", "ρ，J 的大小")),
        Plot("dots", Words("Smallest gain of I + J", "I + J 的最小增益"), x="spread", y="smallest",
             x_title=Words("ρ, size of J", "ρ，J 的大小")),
    ),
    relied=True,
)  # fmt: skip
