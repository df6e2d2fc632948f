"""The checks of what document 002 has wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from addnorm import twins
from addnorm.branches import Context
from addnorm.models.layers import Attention, FeedForward
from addnorm.studies.checks.parts import (
    Proof,
    Tokens,
    disturbed,
    gradient_ratio,
    over_tokens,
    propagated,
    silent,
    tokens_apart,
)
from addnorm.studies.frame import Words


def explosion(wiring: str = "residual") -> Proof:
    """E04: unscaled residual sums grow by a factor at every layer, and their gradients too."""
    depth, width = 56, 64
    growth, ratio = propagated(wiring, depth, "relu", "he")
    per_layer = growth ** (1 / depth)
    return Proof(
        growth > 1e6 and ratio > 1e3,
        Words(
            f"{depth} blocks x + relu(W x), width {width}, He's start: the variance of the stream grows "
            f"{growth:.0e}-fold ({per_layer:.2f} per block), the gradient {ratio:.0e}-fold.",
            f"{depth} 个 x + relu(W x) 块，宽 {width}，He 初始化：残差流的方差增至 {growth:.0e} 倍（每块 "
            f"{per_layer:.2f} 倍），梯度增至 {ratio:.0e} 倍。",
        ),
    )


def depth_not_attention(*, skip: bool = False) -> Proof:
    """E31: a deep network without attention vanishes as well; attention collapses to one token."""
    depth, layers = 20, 4
    ratio = gradient_ratio("plain", depth, "relu", "torch")
    spread, kept = tokens_apart(layers, skip=skip), tokens_apart(layers, skip=True)
    return Proof(
        ratio < 1e-6 and spread < 1e-6,
        Words(
            f"Without any attention: {depth} plain layers with torch's default start shrink the gradient "
            f"to {ratio:.0e}. Attention alone, without skips: after {layers} layers the tokens differ by "
            f"{spread:.0e} of their size; with skips by {kept:.2f}.",
            f"没有注意力：{depth} 层普通网络（torch 默认初始化）就把梯度缩到 {ratio:.0e}。只有注意力、没有捷径："
            f"{layers} 层后词元间的差异只剩自身大小的 {spread:.0e}；有捷径时为 "
            f"{kept:.2f}。",
        ),
    )


def one_skip(layer: Callable[[int, int], nn.Module] = twins.OneSkip) -> Proof:
    """E23: with a ReLU behind the addition nothing negative stays on the stream."""
    with torch.no_grad():
        y = layer(16, 2).eval()(torch.randn(4, 8, 16))
    negative = float((y < 0).double().mean())
    return Proof(
        negative == 0,
        Words(
            f"As described, {negative:.0%} of the outputs are negative; with a skip around each "
            "sublayer and no activation about half.",
            f"按所述结构，输出中负数占 {negative:.0%}；若每个子层各有捷径、其后没有激活函数，则约占一半。",
        ),
    )


def five_forms(forms: Mapping[str, Tokens] | None = None) -> Proof:
    """E24: what text, formulas and code say are different functions of the same sublayers."""
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        forms = forms or _forms()
        outputs = [form(x) for form in forms.values()]
        pairs = itertools.combinations(outputs, 2)
        least = min(float((a - b).norm() / a.norm()) for a, b in pairs)
    names = ", ".join(forms)
    return Proof(
        least > 0.01,
        Words(
            f"The same attention, feed-forward and norm put together as in lines {names}: any two outputs "
            f"differ by at least {least:.0%}.",
            f"用同样的注意力、前馈和归一化，分别按第 {names} 行组合：任意两个输出至少相差 {least:.0%}。",
        ),
    )


def _forms() -> dict[str, Tokens]:
    """Return the block by the lines that describe it, in evaluation."""
    attention, feedforward = Attention(16, 2, causal=False), FeedForward(16)
    attend: Tokens = lambda x: attention(x, Context())  # noqa: E731
    feed: Tokens = lambda x: feedforward(x, Context())  # noqa: E731
    norm = nn.LayerNorm(16)

    def formula(x: Tensor) -> Tensor:
        y = norm(x + attend(x))
        return torch.as_tensor(norm(y + feed(y)))

    def code(x: Tensor) -> Tensor:
        y = x + attend(norm(x))
        return y + feed(norm(y))

    return {
        "34": lambda x: x + feed(attend(norm(x))),
        "38-39": formula,
        "77": lambda x: x + norm(feed(attend(norm(x)))),
        "80": lambda x: norm(x + feed(attend(norm(x)))),
        "106-118": code,
    }


def norm_axis(norm: Tokens = over_tokens) -> Proof:
    """E25: a norm along the sequence lets every token see the others."""
    x = torch.randn(2, 6, 16)
    changed, own = disturbed(norm, x, 1), disturbed(nn.LayerNorm(16), x, 1)
    return Proof(
        changed > 1e-3,
        Words(
            f"Noise in the last token changes the others by {changed:.0%} where μ and σ run over the "
            f"sequence, and by {own:.0%} with torch's LayerNorm.",
            f"扰动最后一个词元：μ、σ 沿序列计算时，其余词元改变 {changed:.0%}；torch 的 LayerNorm 则为 {own:.0%}。",
        ),
    )


def batch_axis(layer: Callable[[int, int], nn.Module] = twins.BatchMixer) -> Proof:
    """E28: without batch_first a batch (B, T, D) is read as T sequences of B tokens."""
    module, x = layer(16, 2).eval(), torch.randn(3, 5, 16)
    between, within = disturbed(module, x, 0), disturbed(module, x, 1)
    return Proof(
        between > 1e-3,
        Words(
            f"(B, T, D) as input: noise in one example changes the others by {between:.1%}; noise in "
            f"one token changes the other tokens by {within:.1%}.",
            f"输入为 (B, T, D)：扰动一个样本，其余样本改变 {between:.1%}；扰动一个词元，其余词元改变 "
            f"{within:.1%}。",
        ),
    )


def mask_keyword(layer: Callable[[int, int], nn.Module] = twins.MaskKeyword) -> Proof:
    """E26: nn.MultiheadAttention knows no argument `mask`."""
    try:
        layer(8, 2)(torch.randn(2, 4, 8))
    except TypeError as error:
        message = str(error)
    else:
        message = "no error"
    return Proof(
        "unexpected keyword argument 'mask'" in message,
        Words(f"The call without a mask: {message}.", f"不传掩码的调用：{message}。"),
    )


def stream_dropout(layer: Callable[[int], nn.Module] = twins.StreamDropout) -> Proof:
    """E27: dropout on the stream thins the skip from layer to layer."""
    depth = 12
    net = silent(nn.Sequential(*(layer(64) for _ in range(depth)))).train()
    with torch.no_grad():
        kept = float((net(torch.ones(16, 64, 64)) != 0).double().mean())
    return Proof(
        kept < 0.99,
        Words(
            f"Silent branches, p = 0.1, training: after {depth} such layers {kept:.0%} of the stream's "
            f"values are left (0.9^{depth} = {0.9**depth:.0%}).",
            f"分支输出为零、p = 0.1、训练模式：经过 {depth} 个这样的层，残差流的数值只剩 {kept:.0%}"
            f"（0.9^{depth} = {0.9**depth:.0%}）。",
        ),
    )


def batch_or_data(norm: Callable[[int], nn.Module] = nn.BatchNorm1d) -> Proof:
    """E30: batch norm's noise falls with the batch, and not with the data set."""
    D = 16
    module, one = norm(D), torch.randn(1, D)

    def noise(batch: int, examples: int) -> float:
        """Return the standard deviation of one example's output over batches it is drawn into."""
        data = torch.randn(examples, D)
        drawn = torch.randint(examples, (400, batch - 1))
        with torch.no_grad():
            out = torch.stack([module(torch.cat([one, data[rows]]))[0] for rows in drawn])
        return float(out.std(0).mean())

    small, large, more = noise(4, 4000), noise(64, 4000), noise(4, 40000)
    return Proof(
        small > 2 * large and 0.8 < more / small < 1.25,
        Words(
            f"Noise in the output of one example: {small:.2f} with batches of 4, {large:.2f} with 64; with "
            f"batches of 4 from ten times the data {more:.2f}.",
            f"同一样本输出的波动：批大小为 4 时 {small:.2f}，64 时 {large:.2f}；批大小仍为 4、数据增至十倍时 "
            f"{more:.2f}。",
        ),
    )
