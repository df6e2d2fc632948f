"""The checks of what document 001 has wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from addnorm.branches import Context
from addnorm.contract import Stack
from addnorm.studies.checks.parts import (
    DOUBLE,
    GONE,
    Layer,
    Proof,
)
from addnorm.studies.frame import Words


def bracket(jacobian: Tensor | None = None) -> Proof:
    """E02: I + J shrinks every direction in which J points backwards."""
    D, size = 32, 0.1
    J = torch.randn(D, D, dtype=DOUBLE) * size / math.sqrt(D) if jacobian is None else jacobian
    gains = torch.linalg.svdvals(torch.eye(len(J), dtype=DOUBLE) + J)
    share, least = float((gains < 1).double().mean()), float(gains.min())
    powers = {slope: (1 + slope) ** 10 for slope in (-0.1, -0.5)}
    listed = ", ".join(f"({1 + s:g})^10 = {p:.2g}" for s, p in powers.items())
    return Proof(
        share > 0,
        Words(
            f"Slopes -0.1 and -0.5: {listed}. A random J with ρ = {size}: {share:.0%} of the gains of "
            f"I + J are below 1, the smallest is {least:.2f}.",
            f"导数取 -0.1 与 -0.5 时：{listed}。随机 J（ρ = {size}）：I + J 的增益有 {share:.0%} 小于 1，最小为 "
            f"{least:.2f}。",
        ),
    )


def path_sum(activation: Callable[[Tensor], Tensor] = torch.relu) -> Proof:
    """E05: the paths of a residual network do not add up to its output, nor average to it."""
    D, n = 16, 3
    branches = [Layer(D, activation) for _ in range(n)]
    stack = Stack(branches, "residual", dim=D, start="").double()
    x = torch.randn(64, D, dtype=DOUBLE)
    with torch.no_grad():
        output = stack(x)
        total = torch.zeros_like(x)
        for taken in itertools.product((False, True), repeat=n):
            signal = x
            for branch, through in zip(branches, taken, strict=True):
                signal = branch(signal, Context()) if through else signal
            total += signal
    error = float((total - output).norm() / output.norm())
    return Proof(
        error > 0.01,
        Words(
            f"Three ReLU blocks: the sum of the {2**n} paths misses the output by {error:.0%}, and "
            f"their mean is {2**n} times smaller than that sum.",
            f"三个 ReLU 块：{2**n} 条路径之和与输出相差 {error:.0%}，而路径的平均又只是这个和的 1/{2**n}。",
        ),
    )


# Share in per cent that is shown, and layers behind the output where its label puts it, of 56: the
# middle, a quarter from the input ("first few layers", read generously), the input.
BARS = ((100, 0), (12, 28), (3, 42), (0, 56))


def bar_labels(bars: Sequence[tuple[int, int]] = BARS) -> Proof:
    """E10: 0.9^n at the labelled layers is not what the bars show."""
    shares = {n: 100 * 0.9**n for _, n in bars}
    wrong = [(shown, n) for shown, n in bars if round(shares[n]) != shown]
    at = {share: math.log(share / 100) / math.log(0.9) for share in (12, 3)}
    return Proof(
        bool(wrong),
        Words(
            "0.9^n of 56 layers, shown and true: "
            + "; ".join(f"{shown} % and {shares[n]:.3g} % at n = {n}" for shown, n in bars)
            + f". 12 % is reached {at[12]:.0f} layers behind the output, 3 % {at[3]:.0f} layers.",
            "56 层网络的 0.9^n，所示与实际："
            + "；".join(f"n = {n} 处 {shown}% 与 {shares[n]:.3g}%" for shown, n in bars)
            + f"。12% 出现在离输出 {at[12]:.0f} 层处，3% 在 {at[3]:.0f} 层处。",
        ),
    )


def shortest_path(named: int = 7) -> Proof:
    """E11: of the eight paths in their order, another one passes the fewest branches."""
    lengths = [sum(taken) for taken in itertools.product((1, 0), repeat=3)]
    same = [i + 1 for i, length in enumerate(lengths) if length == lengths[named - 1]]
    shortest = lengths.index(min(lengths)) + 1
    listed = ", ".join(map(str, lengths))
    return Proof(
        shortest != named,
        Words(
            f"Branches passed by paths 1 to 8: {listed}. Path {shortest} is the shortest; "
            f"{len(same)} paths are as long as path {named}.",
            f"路径 1 至 8 经过的分支数：{listed}。最浅的是路径 {shortest}；与路径 {named} 一样深的共 {len(same)} 条。",
        ),
    )


ERRORS = (16.4, 7.3, 6.7, 3.57)  # per cent, as the table has them


def chart_bars(bars: Sequence[int] = (16, 7, 6, 4)) -> Proof:
    """E12: the bars are neither the rounded nor the truncated numbers beside them."""
    rounded, floored = [round(e) for e in ERRORS], [math.floor(e) for e in ERRORS]
    shown = [", ".join(map(str, each)) for each in (bars, rounded, floored)]
    return Proof(
        list(bars) not in (rounded, floored),
        Words(
            f"Bars {shown[0]}; rounded {shown[1]}; truncated {shown[2]}. The error of the winning "
            "entry stands in the abstract of the paper.",
            f"条长 {shown[0]}；四舍五入应为 {shown[1]}，舍去小数应为 {shown[2]}。冠军方案的错误率见该论文摘要。",
        ),
    )


def identity_matrix(first: Tensor | None = None, second: Tensor | None = None) -> Proof:
    """E14: W' relu(W x) is the identity for matrices that are far from I."""
    D = 8
    if first is None or second is None:
        turn = torch.linalg.qr(torch.randn(D, D, dtype=DOUBLE))[0]
        first, second = torch.cat([turn, -turn]), torch.cat([turn.T, -turn.T], 1)
    x = torch.randn(100, first.shape[1], dtype=DOUBLE)
    error = float((torch.relu(x @ first.T) @ second.T - x).abs().max())
    near = torch.eye(*first.shape, dtype=DOUBLE)
    away = float((first - near).norm() / near.norm())
    return Proof(
        error < GONE and away > 0.5,
        Words(
            f"A plain layer W' relu(W x) of any rotation, W = (A; -A), W' = (Aᵀ, -Aᵀ): largest error "
            f"{error:.0e} from x, distance of W from I {away:.1f} times the size of I.",
            f"普通层 W' relu(W x)，W = (A; -A)，W' = (Aᵀ, -Aᵀ)，A 为任意旋转：与 x 的最大误差 {error:.0e}，"
            f"而 W 与 I 的距离是 I 的范数的 {away:.1f} 倍。",
        ),
    )


def drawn_blocks(
    plain: Sequence[str] = ("weights", "activation", "weights", "activation"),
    residual: Sequence[str] = ("weights", "activation", "weights", "add"),
) -> Proof:
    """E15: the two drawings differ in more than the addition."""
    counts = [row.count("activation") for row in (plain, residual)]
    return Proof(
        counts[0] != counts[1],
        Words(
            f"Activations: {counts[0]} in the plain row, {counts[1]} in the residual block.",
            f"激活函数：普通网络一行有 {counts[0]} 个，残差块中有 {counts[1]} 个。",
        ),
    )
