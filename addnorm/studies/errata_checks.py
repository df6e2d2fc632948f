"""The checks of the errata that a computation of a second can decide.

Each takes the thing that is wrong as its default argument, and says with measured numbers whether
the erratum holds for it. Given the healthy counterpart it does not hold; the tests try both. The
sick layers are those of `addnorm.twins`; nothing is trained. Shapes: tokens `(B, T, D)`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addnorm import twins
from addnorm.branches import Branch, Context
from addnorm.contract import Stack
from addnorm.models.babygpt import LADDER
from addnorm.models.layers import Attention, FeedForward
from addnorm.models.mlp import MLP, MLPConfig
from addnorm.models.residual_layer import ResidualBlock
from addnorm.studies.frame import Words

DOUBLE = torch.float64
GONE = 1e-9  # a gain or an error below is 0 but for rounding


@dataclass(frozen=True)
class Proof:
    """Whether an erratum holds, and what was measured."""

    holds: bool
    evidence: Words


Tokens = Callable[[Tensor], Tensor]  # (B, T, D) -> (B, T, D)

# -- 000 -----------------------------------------------------------------------------------------


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


# -- 001 -----------------------------------------------------------------------------------------


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


# -- 002 -----------------------------------------------------------------------------------------


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


def _over_tokens(x: Tensor) -> Tensor:
    """Return x `(B, T, D)` with mean 0 and variance 1 along the sequence."""
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, unbiased=False)


def _over_batch(x: Tensor) -> Tensor:
    """Return x `(B, T, D)` with mean 0 and variance 1 over the batch, for every neuron."""
    return (x - x.mean(0, keepdim=True)) / x.std(0, keepdim=True, unbiased=False)


def norm_axis(norm: Tokens = _over_tokens) -> Proof:
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


# -- 003 -----------------------------------------------------------------------------------------

# The mean absolute gradients that are printed, layer 0 to 4: without and with shortcuts, in the
# notebook's own output and in the listing below it.
PRINTED = (
    (
        (2.017411752603948e-4, 1.2011770741082728e-4, 7.152437465265393e-4, 1.3988513965159655e-3,
         5.049604922533035e-3),
        (0.22186796367168427, 0.207092747092247, 0.32923877239227295, 0.2667771875858307,
         1.3268063068389893),
    ),
    (
        (2.0173587836325169e-4, 1.201116101583466e-4, 7.152041653171182e-4, 1.398873864673078e-3,
         5.049646366387606e-3),
        (0.22169792652130127, 0.20694105327129364, 0.32896995544433594, 0.2665732502937317,
         1.3258541822433472),
    ),
)  # fmt: skip
Listing = tuple[Sequence[float], Sequence[float]]
CLOSE = 2e-6  # relative: the printed digits against those of another build of torch


def monotone(gradients: Sequence[float] | None = None) -> Proof:
    """E32: the gradient does not fall from each layer to the one before it."""
    if gradients is None:
        gradients = example_network("plain").gradients
    rises = [i for i in range(len(gradients) - 1) if gradients[i] > gradients[i + 1]]
    listed = ", ".join(f"{g:.3g}" for g in gradients)
    where = ", ".join(f"layers.{i} > layers.{i + 1}" for i in rises) or "–"
    return Proof(
        bool(rises),
        Words(
            f"Mean |gradient| of layers.0 to layers.4: {listed}. Not falling: {where}.",
            f"layers.0 至 layers.4 的平均绝对梯度：{listed}。违反单调之处：{where}。",
        ),
    )


def confounded(without: str = "plain", with_skip: str = "residual") -> Proof:
    """E33: a part of the printed gain is the larger output, which scales all gradients alike."""
    a, b = example_network(without), example_network(with_skip)
    whole = b.gradients[0] / a.gradients[0]
    loss = abs(b.output / a.output)  # of output^2 the derivative is 2 output
    first_last = [n.gradients[0] / n.gradients[-1] for n in (a, b)]
    return Proof(
        loss > 2,
        Words(
            f"layers.0 gains a factor of {whole:.0f}; {loss:.1f} of it is dL/dy = 2y, since the output goes "
            f"from {a.output:.3f} to {b.output:.3f}, and layers.4 gains "
            f"{b.gradients[-1] / a.gradients[-1]:.0f} as well. First over last layer: "
            f"{first_last[0]:.3f} and {first_last[1]:.3f}.",
            f"layers.0 的梯度增大 {whole:.0f} 倍，其中 {loss:.1f} 倍来自 dL/dy = 2y，因为输出从 {a.output:.3f} 变为 "
            f"{b.output:.3f}；layers.4 也增大 {b.gradients[-1] / a.gradients[-1]:.0f} 倍。首层与末层之比："
            f"{first_last[0]:.3f} 与 {first_last[1]:.3f}。",
        ),
    )


def two_formulas(first: Listing = PRINTED[0], second: Listing = PRINTED[1]) -> Proof:
    """E34: the two listings are those of the exact GELU and of its tanh approximation."""
    ours = {
        name: [example_network(w, name).gradients for w in ("plain", "residual")]
        for name in ("gelu", "gelu-tanh")
    }

    def away(listing: Listing, name: str) -> float:
        pairs = zip(itertools.chain(*listing), itertools.chain(*ours[name]), strict=True)
        return max(abs(a / b - 1) for a, b in pairs)

    exact, approximate, apart = (
        away(first, "gelu"), away(second, "gelu-tanh"), away(second, "gelu"),
    )  # fmt: skip
    return Proof(
        exact < CLOSE and approximate < CLOSE < apart,
        Words(
            f"Largest relative difference: first listing from the exact GELU {exact:.0e}, second from the "
            f"tanh formula {approximate:.0e}, second from the exact GELU {apart:.0e}.",
            f"最大相对差异：第一组与精确 GELU 相差 {exact:.0e}，第二组与 tanh 近似相差 {approximate:.0e}，第二组与精确 "
            f"GELU 相差 {apart:.0e}。",
        ),
    )


def accumulates(
    listing: Callable[[nn.Module, Callable[[], Tensor]], dict[str, float]] = (
        twins.accumulated_gradients
    ),
) -> Proof:
    """E36: a second call shows the sum of both."""
    model, x = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 1)), torch.randn(4, 3)
    one, two = (listing(model, lambda: model(x).square().mean()) for _ in range(2))
    ratio = max(two[name] / one[name] for name in one)
    return Proof(
        ratio > 1.5,
        Words(
            f"The second call prints {ratio:.3g} times what the first one prints.",
            f"第二次调用打印的数值是第一次的 {ratio:.3g} 倍。",
        ),
    )


# -- 004 -----------------------------------------------------------------------------------------


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
        sum(p.numel() for p in _mlp(w, 20, "relu", "").parameters()) for w in ("plain", wiring)
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


def per_neuron(norm: Tokens = _over_batch) -> Proof:
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
    before, after = (_skew(v) for v in (x, y))
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


# -- what they share -----------------------------------------------------------------------------


class Layer(Branch):
    """act(W x), W with entries N(0, 1/D)."""

    def __init__(self, width: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / math.sqrt(width))
        self.activation = activation

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the update of `x (..., D)`."""
        return self.activation(x @ self.weight)


def silent(net: nn.Module) -> nn.Module:
    """Return the network with all its linear layers at 0, so that its branches give 0."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net


@torch.no_grad()
def disturbed(function: Tokens, x: Tensor, axis: int) -> float:
    """Return how far noise in the last entry along the axis moves the others, over their size."""
    other = x.clone()
    last = other.select(axis, -1)
    last.copy_(torch.randn_like(last))
    before, after = (function(v).narrow(axis, 0, x.shape[axis] - 1) for v in (x, other))
    return float((after - before).norm() / before.norm())


def propagated(wiring: str, depth: int, activation: str, start: str) -> tuple[float, float]:
    """Return how variance grows through a stack, and how gradient RMS grows on the way back.

    Output over input, then input over output; width 64, 128 inputs from N(0, 1), a random gradient
    at the output.
    """
    stack = _mlp(wiring, depth, activation, start).double().stack
    x = torch.randn(128, 64, dtype=DOUBLE, requires_grad=True)
    y = stack(x)
    probe = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * probe).sum(), x)
    growth = y.detach().square().mean() / x.detach().square().mean()
    return float(growth), float(gradient.norm() / probe.norm())


def gradient_ratio(wiring: str, depth: int, activation: str, start: str) -> float:
    """Return gradient RMS at the input of a stack over that at its output."""
    return propagated(wiring, depth, activation, start)[1]


def _mlp(wiring: str, depth: int, activation: str, start: str) -> MLP:
    model = MLP(MLPConfig(depth=depth, wiring=wiring, activation=activation, start=start))
    model.reset_parameters()
    return model


def tokens_apart(layers: int, *, skip: bool) -> float:
    """Return |x - mean over tokens| / |x| behind so many attentions of one head.

    32 tokens of width 64, matrices with entries N(0, 1/64), float64.
    """
    T, D = 32, 64
    x = torch.randn(T, D, dtype=DOUBLE)
    for _ in range(layers):
        q, k, v = (x @ torch.randn(D, D, dtype=DOUBLE) / math.sqrt(D) for _ in range(3))
        update = torch.softmax(q @ k.T / math.sqrt(D), -1) @ v
        x = x + update if skip else update
    return float((x - x.mean(0)).norm() / x.norm())


@dataclass(frozen=True)
class Example:
    """Output and mean |gradient| of each layer of document 003's network."""

    output: float
    gradients: Sequence[float]


def example_network(wiring: str, activation: str = "gelu") -> Example:
    """Return document 003's network of five layers at seed 123: input (1, 0, -1), target 0."""
    model = MLP(
        MLPConfig(
            3, 3, 1, depth=4, wiring=wiring, activation=activation, head_activation=True,
            start="torch",
        )
    )  # fmt: skip
    torch.manual_seed(123)
    model.reset_parameters()
    y = model(torch.tensor([[1.0, 0.0, -1.0]]))
    found = twins.gradients(model, lambda: F.mse_loss(y, torch.zeros_like(y)))
    return Example(float(y.detach()), list(found.values()))


def _skew(x: Tensor) -> float:
    """Return the mean skewness of the rows of x `(N, D)`."""
    centred = x - x.mean(-1, keepdim=True)
    spread = centred.square().mean(-1).sqrt()
    return float((centred.pow(3).mean(-1) / spread.pow(3)).mean())


def _by_name(checks: Iterable[Callable[..., Proof]]) -> dict[str, Callable[..., Proof]]:
    return {check.__name__: check for check in checks}


CHECKS: Mapping[str, Callable[..., Proof]] = _by_name(
    (
        guarantee, slope_below_one, token_reach, missing_edge,
        bracket, path_sum, bar_labels, shortest_path, chart_bars, identity_matrix, drawn_blocks,
        explosion, depth_not_attention, one_skip, five_forms, norm_axis, batch_axis, mask_keyword,
        stream_dropout, batch_or_data,
        monotone, confounded, two_formulas, accumulates,
        inplace, biased_variance, doubled, undefined, parameters_added, additions, per_neuron,
        skewness, learned_shortcut,
    )
)  # fmt: skip


def prove(name: str) -> Proof:
    """Return the proof of a check on what the document has, with a seed of its own.

    Raises `KeyError` for an unknown name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CHECKS[name]()
