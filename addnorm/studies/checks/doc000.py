"""The checks of what document 000 has wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from addnorm.branches import Context
from addnorm.models.babygpt import LADDER
from addnorm.models.layers import Attention
from addnorm.studies.checks.parts import (
    DOUBLE,
    GONE,
    Proof,
    gradient_ratio,
)
from addnorm.studies.frame import Words


def guarantee(branch: Callable[[Tensor], Tensor] = torch.neg) -> Proof:
    """E03: the Jacobian of x + F(x) can lose a direction, or all of them."""
    x = torch.randn(8, dtype=DOUBLE, requires_grad=True)
    y = x + branch(x)
    rows = [torch.autograd.grad(y[i], x, retain_graph=True)[0] for i in range(len(y))]
    gains = torch.linalg.svdvals(torch.stack(rows))
    lost = int((gains < GONE).sum())
    return Proof(
        lost > 0,
        Words(
            f"x + F(x) with F(x) = -x: {lost} of {len(gains)} singular values of its Jacobian are 0.",
            f"x + F(x) 取 F(x) = -x：其雅可比矩阵的 {len(gains)} 个奇异值中有 {lost} 个为 0。",
        ),
    )


def slope_below_one(activation: str = "relu", start: str = "he") -> Proof:
    """E21: a plain ReLU network from He's start keeps the size of its gradient."""
    depth = 20
    factor = gradient_ratio("plain", depth, activation, start) ** (1 / depth)
    x = torch.linspace(-3, 3, 1000, dtype=DOUBLE, requires_grad=True)  # without 0
    (slopes,) = torch.autograd.grad(F.relu(x).sum(), x)
    values = sorted({f"{s:g}" for s in slopes.tolist()})
    return Proof(
        factor > 0.9,
        Words(
            f"The slope of ReLU takes the values {' and '.join(values)}; through {depth} plain ReLU "
            f"layers with He's start the gradient changes by a factor of {factor:.3f} per layer.",
            f"ReLU 的导数只取 {' 和 '.join(values)}；在 {depth} 层、He 初始化的普通 ReLU 网络中，梯度每层只乘以 "
            f"{factor:.3f}。",
        ),
    )


def token_reach(layer: Callable[[Tensor], Tensor] | None = None) -> Proof:
    """E20: one attention layer joins the last token of the context with the first."""
    baby = LADDER["babygpt-v7"]
    T, D, depth = int(baby["context"]), int(baby["dim"]), int(baby["depth"])
    if layer is None:
        attention = Attention(D, int(baby["heads"]))
        layer = lambda x: attention(x, Context())  # noqa: E731
    x = torch.randn(1, T, D, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0, -1].square().sum(), x)
    reached = float(gradient[0, 0].norm())
    return Proof(
        reached > 0,
        Words(
            f"babygpt v7 has {depth} blocks and reads {T} tokens; a single attention layer already "
            f"joins token {T} with token 1: gradient {reached:.2g}, not 0.",
            f"babygpt v7 有 {depth} 个块，上下文为 {T} 个词元；只用一层注意力，第 {T} 个词元就已连到第 1 个：梯度为 "
            f"{reached:.2g}，不为 0。",
        ),
    )


# Block v9 as it is drawn: the skip around the feed-forward ends two nodes too early.
DRAWN = (
    ("x", "norm 1"),
    ("norm 1", "attention"),
    ("attention", "add 1"),
    ("add 1", "norm 2"),
    ("norm 2", "ffn"),
    ("ffn", "add 2"),
    ("add 2", "output"),
    ("x", "add 1"),
    ("add 1", "norm 2"),
)


def missing_edge(edges: Sequence[tuple[str, str]] = DRAWN) -> Proof:
    """E16: an addition of the diagram has one input only, and an edge is drawn twice."""
    twice = [edge for edge in dict.fromkeys(edges) if edges.count(edge) > 1]
    adds = {node for edge in edges for node in edge if node.startswith("add")}
    single = sorted(a for a in adds if len({s for s, target in edges if target == a}) < 2)
    drawn = ", ".join(f"{a} → {b}" for a, b in twice) or "–"
    return Proof(
        bool(single),
        Words(
            f"Edges drawn twice: {drawn}. Additions with a single input: {', '.join(single) or '–'}.",
            f"重复的边：{drawn}。只有一个输入的加法节点：{'、'.join(single) or '–'}。",
        ),
    )
