"""The checks of what document 004 has wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addnorm import twins
from addnorm.contract import Stack
from addnorm.models.residual_layer import ResidualBlock
from addnorm.studies.checks.parts import (
    GONE,
    Layer,
    Proof,
    Tokens,
    disturbed,
    over_batch,
    silent,
    skew,
    small_mlp,
)
from addnorm.studies.frame import Words


def inplace(block: Callable[[int, int], nn.Module] = twins.InplaceBlock) -> Proof:
    """E37: the block overwrites its input, and two in a row have no backward pass."""
    x = torch.randn(2, 4, 6, 6)
    given = x.clone()
    with torch.no_grad():
        block(4, 4)(given)
    changed = float((given != x).double().mean())
    message = "no error"
    try:
        nn.Sequential(block(4, 4), block(4, 4))(x).square().sum().backward()
    except RuntimeError as error:
        message = "modified by an inplace operation" if "inplace" in str(error) else str(error)
    return Proof(
        changed > 0 and message != "no error",
        Words(
            f"{changed:.0%} of the caller's values changed; backward through two blocks: {message}.",
            f"调用者张量的数值有 {changed:.0%} 被改动；两个块相接后反向传播：{message}。",
        ),
    )


@torch.no_grad()
def biased_variance(norm: Callable[[int], nn.Module] = twins.UnbiasedLayerNorm) -> Proof:
    """E38: the output is sqrt((D-1)/D) of a layer norm's, and NaN at width 1."""
    ratios = {}
    for width in (2, 8, 64):
        x = 100 * torch.randn(16, width)  # so large that eps does not matter
        ratios[width] = float(norm(width)(x).norm() / F.layer_norm(x, (width,)).norm())
    single = bool(torch.isnan(norm(1)(torch.randn(4, 1))).all())
    listed = ", ".join(f"{r:.4f} (D = {d})" for d, r in ratios.items())
    return Proof(
        ratios[2] < 0.99 and single,
        Words(
            f"Size over that of torch's LayerNorm: {listed}; D = 1: {'NaN' if single else 'finite'}.",
            f"与 torch 的 LayerNorm 之比：{listed}；D = 1 时为 {'NaN' if single else '有限值'}。",
        ),
    )


def doubled(layer: Callable[[int, int], nn.Module] = twins.DoubledLayer) -> Proof:
    """E39: with silent branches nothing of the input comes out."""
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        left = float(silent(layer(16, 32)).eval()(x).norm() / x.norm())
    return Proof(
        left < GONE,
        Words(
            f"With both branches silent the layer returns {left:.2g} of its input; with skips it would "
            "return all of it.",
            f"两个分支都输出零时，该层只返回输入的 {left:.2g}；若有捷径应原样返回。",
        ),
    )


def undefined(
    names: Sequence[str] = ("MultiHeadAttention", "PositionwiseFeedForward"),
) -> Proof:
    """E40: neither class exists in torch, and its attention takes no hidden width."""
    missing = [name for name in names if not hasattr(nn, name)]
    try:
        nn.MultiheadAttention(64, 256, num_heads=8)  # type: ignore[misc]
    except TypeError as error:
        message = str(error).partition("__init__() ")[2]
    else:
        message = "no error"
    return Proof(
        len(missing) == len(names),
        Words(
            f"Not in torch.nn: {', '.join(missing) or '–'}. torch's own class called like this: {message}.",
            f"torch.nn 中没有：{'、'.join(missing) or '–'}。以同样参数调用 torch 自己的类：{message}。",
        ),
    )


def parameters_added(wiring: str = "residual") -> Proof:
    """E41: the same network with and without shortcuts has the same number of parameters."""
    plain, wired = (
        sum(p.numel() for p in small_mlp(w, 20, "relu", "").parameters()) for w in ("plain", wiring)
    )
    return Proof(
        plain == wired,
        Words(
            f"20 layers of width 64: {plain:,} parameters without shortcuts, {wired:,} with.",
            f"20 层、宽 64：没有捷径时 {plain:,} 个参数，有捷径时 {wired:,} 个。",
        ),
    )


def additions(channels: tuple[int, int] = (64, 64)) -> Proof:
    """E42: the additions are a thousandth of the convolutions' multiplications."""
    block, x = ResidualBlock(*channels).eval(), torch.randn(1, channels[0], 8, 8)
    counts = {"branch": 0, "shortcut": 0}

    def count(module: nn.Module, _: object, y: Tensor) -> None:
        """Add one multiplication for each weight that an output sees."""
        assert isinstance(module, nn.Conv2d)
        counts["branch" if module.kernel_size == (3, 3) else "shortcut"] += (
            y.numel() * module.weight[0].numel()
        )

    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        added = block(x).numel()
    branch = counts["branch"]
    share = (added + counts["shortcut"]) / branch
    return Proof(
        share < 0.01,
        Words(
            f"Two 3×3 convolutions, {channels[0]} channels, 8×8: the shortcut's operations are "
            f"{share:.2%} of the convolutions' {branch:,.0f} multiply-adds.",
            f"两个 3×3 卷积、{channels[0]} 通道、8×8：捷径的运算量是卷积 {branch:,.0f} 次乘加的 {share:.2%}。",
        ),
    )


def per_neuron(norm: Tokens = over_batch) -> Proof:
    """E43: statistics of a neuron run over the batch; a layer norm's do not."""
    x = torch.randn(6, 3, 16)
    changed, own = disturbed(norm, x, 0), disturbed(nn.LayerNorm(16), x, 0)
    return Proof(
        changed > 1e-3,
        Words(
            f"Noise in one example changes the others by {changed:.0%} where each neuron has its own mean "
            f"and variance, and by {own:.0%} with torch's LayerNorm.",
            f"扰动一个样本：按每个神经元各自求均值和方差时，其余样本改变 {changed:.0%}；torch 的 LayerNorm 则为 "
            f"{own:.0%}。",
        ),
    )


def skewness(norm: Callable[[Tensor], Tensor] | None = None) -> Proof:
    """E44: a norm keeps the shape of the distribution; its gain is a vector."""
    D = 512
    module = nn.LayerNorm(D)
    x = torch.empty(64, D).exponential_()
    with torch.no_grad():
        y = (norm or module)(x)
    before, after = (skew(v) for v in (x, y))
    shape = tuple(module.weight.shape)
    return Proof(
        abs(after - before) < 0.01 and after > 0.5,
        Words(
            f"Skewness of an exponential input {before:.3f}, of the output {after:.3f}; of a normal "
            f"distribution 0. γ has the shape {shape}.",
            f"指数分布输入的偏度为 {before:.3f}，输出为 {after:.3f}；正态分布应为 0。γ 的形状是 {shape}。",
        ),
    )


def learned_shortcut(wiring: str = "residual") -> Proof:
    """E45: the shortcut has nothing to learn."""
    D = 16
    stack = Stack([Layer(D, torch.relu)], wiring, dim=D, start="")
    (connection,) = stack
    inside = {id(p) for p in connection.branch.parameters()}
    count = sum(p.numel() for p in stack.parameters() if id(p) not in inside)
    return Proof(
        count == 0,
        Words(
            f"Parameters of the connection beside its branch: {count}.",
            f"除分支以外，该连接的参数个数：{count}。",
        ),
    )
