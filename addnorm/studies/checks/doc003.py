"""The checks of what document 003 has wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from addnorm import twins
from addnorm.studies.checks.parts import (
    Proof,
    example_network,
)
from addnorm.studies.frame import Words

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
