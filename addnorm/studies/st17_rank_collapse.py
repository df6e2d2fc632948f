"""ST-17 Rank collapse: without shortcuts attention makes all tokens alike; x + x is no shortcut."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addnorm.branches import Branch, Context
from addnorm.contract import Stack
from addnorm.models.layers import Attention, FeedForward, FeedForwardConfig
from addnorm.models.residual_layer import ResidualLayer
from addnorm.probe.vitals import xray
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
from addnorm.twins import DoubledLayer

T, D, LAYERS = 32, 64, 12  # tokens, width, layers
EARLY = 4  # layers after which the tokens are compared
FLOOR = 1e-16  # of a spread in float64
WIRINGS = {"plain": "plain", "residual": "residual"}
LAYER: dict[str, type[nn.Module]] = {"printed": DoubledLayer, "healthy": ResidualLayer}
DECADES = Words("powers of ten", "个数量级")


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Send random tokens through layers of one kind, and a random direction back; float64."""
    torch.manual_seed(cell["seed"])
    branches = [_branch(cell["part"]) for _ in range(LAYERS)]
    stack = Stack(branches, WIRINGS[cell["net"]], dim=D, start="xavier").double()
    x = torch.randn(1, T, D, dtype=torch.float64, requires_grad=True)
    streams = [x]
    for connection in stack:
        streams.append(connection(streams[-1], Context()))
        streams[-1].retain_grad()
    (streams[-1] * torch.randn_like(x)).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [_decades(stream.grad) for stream in streams]
    spreads = [spread(stream) for stream in streams]
    return {
        "spread": spreads,
        "gradient": [g - gradients[-1] for g in gradients],
        "early": spreads[EARLY],
        "last": spreads[-1],
        "lost": gradients[-1] - gradients[0],
        **printed(cell["seed"]),
    }


def _branch(part: str) -> Branch:
    if part == "attention":
        return Attention(D, 4, causal=False)
    return FeedForward(D, config=FeedForwardConfig(activation="relu"))


def spread(x: Tensor) -> float:
    """Return log10 of |x - mean of the tokens| / |x| for `x (..., T, D)`: 0 is no common part."""
    apart = (x - x.mean(dim=-2, keepdim=True)).norm() / x.norm()
    return math.log10(max(apart.item(), FLOOR))


def _decades(x: Tensor | None) -> float:
    """Return log10 of the root mean square."""
    assert x is not None
    return math.log10(x.square().mean().sqrt().item())


@functools.cache
def printed(seed: int) -> dict[str, Any]:
    """Return what the layer of document 004 does, the healthy layer, and a network without skips.

    `passes`: share of the input in the output where both branches are 0. `gain`: what the X-ray
    finds of the identity in a layer's Jacobian. `spreads`: of the tokens by layer.
    """
    found: dict[str, Any] = {}
    for name in LAYER:
        torch.manual_seed(seed)
        layers = _layers(name)
        found[f"{name}_passes"] = _passes(_layers(name)[0])
        x = torch.randn(4, T, D)
        trace = xray(nn.Sequential(*layers), x)
        gains = [connection.identity_gain for connection in trace.connections]
        found[f"{name}_gain"] = sum(gains) / len(gains)
        streams = itertools.accumulate(
            layers.double(), lambda h, layer: layer(h), initial=x.double()
        )
        with torch.no_grad():
            found[f"{name}_spreads"] = [spread(h) for h in streams]
    torch.manual_seed(seed)
    found["difference"] = _difference(_layers("printed"))
    return found


def _layers(name: str) -> nn.ModuleList:
    return nn.ModuleList(LAYER[name](D, 4 * D, dropout=0.0) for _ in range(LAYERS))


@torch.no_grad()
def _passes(layer: nn.Module) -> float:
    """Return |output| / |input| of a layer whose branches give 0."""
    for branch in _branches([layer]):
        for parameter in branch.parameters():
            parameter.zero_()
    x = torch.randn(1, T, D)
    return float(layer(x).norm() / x.norm())


def _branches(layers: Sequence[nn.Module]) -> list[Branch]:
    parts = (module for layer in layers for module in layer.modules())
    return [part for part in parts if isinstance(part, Attention | FeedForward)]


def _difference(layers: nn.ModuleList) -> float:
    """Return how the gradients of the printed layers differ from those without any skip.

    The same branches stand in x <- F(N(x)), and a last norm takes away the factor of 2. The largest
    difference of a matrix's gradient, relative to that gradient.
    """
    branches = _branches(list(layers))
    bare = Stack(branches, "plain(norm=true)", dim=D, parts=2)  # starts the branches anew
    networks = [nn.Sequential(*layers).double(), bare.double()]
    x = torch.randn(1, T, D, dtype=torch.float64)
    direction = torch.randn_like(x)
    weights = [matrix.parameter for branch in branches for matrix in branch.matrices()]
    found = []
    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-12  # 1e-5 is seen beside a variance that is small
        loss = (F.layer_norm(network(x), (D,), eps=1e-12) * direction).sum()
        found.append(torch.autograd.grad(loss, weights))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True))


def _value(metric: str, part: str, net: str, rows: Rows) -> float:
    return float(rows.value(metric, part=part, net=net))


def _first(metric: str, rows: Rows) -> Any:
    """Return what does not depend on the levels."""
    return rows.column(metric)[0]


def _acceleration(rows: Rows) -> float:
    """Return how many times more decades the third attention takes off than the second."""
    s = rows.value("spread", part="attention", net="plain")
    return float((s[2] - s[3]) / (s[1] - s[2]))


STUDY = Study(
    id="ST-17",
    name="rank-collapse",
    title=Words("Rank collapse, and a skip that is none", "秩坍缩，与名不副实的残差"),
    question=Words(
        "Does attention bring the vanishing of gradients, or a trouble of its own? And does "
        "`x = x + x` after x was overwritten skip anything?",
        "梯度消失是注意力带来的吗，还是注意力另有自己的毛病？x 被覆盖之后的 `x = x + x` 还算残差吗？",
    ),
    design=Words(
        "Twelve attentions alone, and twelve feed-forwards alone, 64 wide, Xavier-normal, with and "
        "without shortcuts, map 32 random tokens in float64. Measured by layer are the spread of the "
        "tokens |x - x̄| / |x| around their mean and the gradient of a random direction at the end. "
        "The layer printed in document 004, which overwrites x before x + x, stands beside the healthy "
        "pre-norm layer and beside the same branches without any skip.",
        "只用十二层注意力，或只用十二层前馈，宽 64，Xavier 初始化，加或不加捷径，以 float64 处理 32 个随机词元。"
        "逐层测量词元相对其均值的离散程度 |x - x̄| / |x|，以及末端随机方向回传的梯度。文档 004 所印的层先覆盖 x、"
        "再算 x + x；与它对照的是正常的 pre-norm 层，以及同样分支但完全没有捷径的网络。",
    ),
    controls=Words(
        "All are at their start, nothing is trained. Attention and feed-forward have the same start, "
        "and the gradient is that of the whole depth; what the printed layer does is compared on the "
        "same weights.",
        "全部在初始状态，不涉及训练。注意力与前馈的初始化相同，梯度取自整个深度；所印层与无捷径网络用同一组权重比较。",
    ),
    lesson=Words(
        "Attention does not bring the vanishing of gradients: without shortcuts feed-forwards alone lose "
        "a thousandfold over twelve layers, attentions alone a few times. Its own trouble is that all "
        "tokens become alike, each layer about tripling the powers of ten until float64 ends after four. "
        "Shortcuts stop it. A layer that overwrites x before it adds x to itself has none, and collapses "
        "as a network without skips does, with the same gradients.",
        "梯度消失不是注意力带来的：没有捷径时，十二层前馈使梯度缩小上千倍，十二层注意力只缩小几倍。注意力自己的毛病是"
        "所有词元变得一样，每层使衰减的数量级增至约三倍，四层就到 float64 的极限；捷径能阻止它。先覆盖 x、再把 x 与自己"
        "相加的层并没有捷径，它像无捷径网络一样坍缩，梯度也与之相同。",
    ),
    claims=(
        Claim("2.1", "002", 9, Words(
            "Self-attention brought vanishing and exploding gradients, hence the residual connection.",
            "自注意力结构带来了梯度消失和爆炸，因此引入残差连接。",
        ), by="not-attention", stands=False),
        Claim("4.17", "004", 110, Words(
            "The printed layer has residual connections around its attention and its feed-forward.",
            "所印的层在注意力与前馈之外都有残差连接。",
        ), by="nothing-passes", stands=False),
    ),
    factors={"part": ("attention", "feed-forward"), "net": ("plain", "residual")},
    measure=measure,
    metrics={
        "spread": Metric(Words("spread of the tokens", "词元的离散程度"), DECADES),
        "gradient": Metric(Words("gradient, that at the end is 0", "梯度，以末端为 0"), DECADES),
        "early": Metric(Words("spread after four layers", "四层之后的离散程度"), DECADES),
        "last": Metric(Words("spread after all layers", "全部层之后的离散程度"), DECADES),
        "lost": Metric(Words("gradient lost on its way back", "梯度回传的损失"), DECADES),
        "printed_spreads": Metric(Words("spread of the tokens, printed layer", "词元的离散程度，所印的层"),
                                  DECADES),
        "healthy_spreads": Metric(Words("spread of the tokens, healthy layer", "词元的离散程度，正常的层"),
                                  DECADES),
        "printed_passes": Metric(Words("output over input without branches, printed layer",
                                       "分支为零时输出与输入之比，所印的层")),
        "healthy_passes": Metric(Words("output over input without branches, healthy layer",
                                       "分支为零时输出与输入之比，正常的层")),
        "printed_gain": Metric(Words("identity in the Jacobian, printed layer", "雅可比中的恒等成分，所印的层")),
        "healthy_gain": Metric(Words("identity in the Jacobian, healthy layer", "雅可比中的恒等成分，正常的层")),
        "difference": Metric(Words("gradients of the printed layers against no skip",
                                   "所印的层与无捷径网络的梯度之差")),
    },
    primary=Contrast(
        Words(
            "After four attentions without shortcuts the tokens differ a thousand times less than with "
            "shortcuts.",
            "四层注意力之后，无捷径时词元之间的差异不到有捷径时的千分之一。",
        ),
        lambda rows: (
            _value("early", "attention", "residual", rows) - _value("early", "attention", "plain", rows)
        ),
        limit=3.0,
        unit=DECADES,
    ),
    secondary=(
        Contrast(
            Words("The collapse speeds up: the third attention takes off twice the powers of ten of the "
                  "second.",
                  "坍缩越来越快：第三层注意力减去的数量级是第二层的两倍以上。"),
            _acceleration, limit=2.0, name="accelerates",
        ),
        Contrast(
            Words("Twelve feed-forwards without shortcuts keep more than a tenth of the spread.",
                  "十二层前馈即使没有捷径，也保住十分之一以上的离散程度。"),
            functools.partial(_value, "last", "feed-forward", "plain"),
            limit=-1.0, unit=DECADES, name="attention-alone",
        ),
        Contrast(
            Words("Without shortcuts twelve feed-forwards lose ten times more of the gradient than twelve "
                  "attentions.",
                  "没有捷径时，十二层前馈损失的梯度比十二层注意力多十倍。"),
            lambda rows: (
                _value("lost", "feed-forward", "plain", rows) - _value("lost", "attention", "plain", rows)
            ),
            limit=1.0, unit=DECADES, name="not-attention",
        ),
        Contrast(
            Words("The printed layer passes nothing of its input where its branches give 0.",
                  "分支输出为零时，所印的层完全不传递输入。"),
            functools.partial(_first, "printed_passes"), limit=0.0, rule="exact", name="nothing-passes",
        ),
        Contrast(
            Words("The healthy layer passes its input as it is there.", "正常的层此时原样传递输入。"),
            lambda rows: _first("healthy_passes", rows) - 1,
            limit=1e-6, rule="exact", name="healthy-passes",
        ),
        Contrast(
            Words("The X-ray finds less than a tenth of the identity in the printed layer's Jacobian.",
                  "X 光检查在所印的层的雅可比中找到的恒等成分不到十分之一。"),
            functools.partial(_first, "printed_gain"), limit=0.1, rule="within", name="no-identity",
        ),
        Contrast(
            Words("Its gradients are those of a network without any skip.",
                  "其梯度与完全没有捷径的网络相同。"),
            functools.partial(_first, "difference"), limit=1e-6, rule="exact", name="as-without",
        ),
        Contrast(
            Words("After twelve printed layers the tokens differ a thousand times less than after twelve "
                  "healthy ones.",
                  "经过十二个所印的层，词元之间的差异不到经过十二个正常层时的千分之一。"),
            lambda rows: _first("healthy_spreads", rows)[-1] - _first("printed_spreads", rows)[-1],
            limit=3.0, unit=DECADES, name="printed-collapses",
        ),
    ),
    modes={"quick": Mode(8, 0.2), "default": Mode(12, 0.3)},
    plots=(
        Plot(
            "profile", Words("Spread of the tokens by layer", "逐层的词元离散程度"),
            x="", y="spread", color="net", facet="part", x_title=Words("layer", "层"),
        ),
        Plot(
            "profile", Words("Gradient by layer", "逐层的梯度"),
            x="", y="gradient", color="net", facet="part", x_title=Words("layer", "层"),
        ),
        Plot(
            "profile", Words("The printed layer: spread of the tokens", "所印的层：词元的离散程度"),
            x="", y="printed_spreads", only={"part": "attention", "net": "plain"},
            x_title=Words("layer", "层"),
        ),
    ),
    published=(
        Published(
            Words(
                "attention alone loses its rank doubly exponentially with depth; shortcuts and "
                "feed-forwards stop it",
                "只有注意力时，秩随深度双指数式下降；捷径与前馈可以阻止",
            ),
            Words("theorem, no table", "定理，无表格"),
            "Dong et al. 2021 (arXiv:2103.03404), abstract",
        ),
    ),
)  # fmt: skip
