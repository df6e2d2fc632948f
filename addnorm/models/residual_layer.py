"""Document 004's three examples as they are meant: residual block, LayerNorm, residual layer.

Shapes: images `(B, C, H, W)`, tokens `(B, T, D)`. Each is put together from parts that the models
have; what the printed versions do instead stands in `addnorm.twins`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from addnorm.branches import Context, Site
from addnorm.contract import Stack
from addnorm.models.layers import Attention, FeedForward, FeedForwardConfig
from addnorm.models.resnet import Change, Projection, Unit
from addnorm.norms import BATCH_NORMS


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * gamma + beta over the last axis, variance divided by D.

    Ba et al. 2016 (arXiv:1607.06450), written out: it equals `nn.LayerNorm`, which the models use.
    gamma and beta are vectors of width D. A width of 1 has no spread: the output is beta.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised `x (..., D)`."""
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + self.eps) * self.weight + self.bias

    def reset_parameters(self) -> None:
        """Start gamma at 1 and beta at 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


class ResidualBlock(nn.Module):
    """relu(S(x) + F(x)) on images: `(B, C, H, W)` to `(B, D, H/stride, W/stride)`.

    He et al. 2015 (arXiv:1512.03385), figure 2: F is conv-BN-ReLU-conv-BN, S the identity, or a 1x1
    convolution and batch norm where the channels or the size change. The caller's tensor is not
    changed, and blocks can follow one another. Raises `ValueError` for numbers below 1.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        given = {"in_channels": in_channels, "out_channels": out_channels, "stride": stride}
        for name, value in given.items():
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            shortcut = Projection(in_channels, out_channels, stride, BATCH_NORMS["batchnorm"])
        self.unit = Change(
            Unit(in_channels, out_channels, stride=stride), shortcut, Site(out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(S(x) + F(x))."""
        y: Tensor = self.unit(x.movedim(1, -1))
        return y.movedim(-1, 1)

    def reset_parameters(self) -> None:
        """Start convolutions with N(0, 2 / fan_out), norms with gain 1 and bias 0."""
        self.unit.reset_parameters()


class ResidualLayer(nn.Module):
    """x <- x + Attention(N(x)), x <- x + FFN(N(x)): `(B, T, D) -> (B, T, D)`, a pre-norm layer.

    Xiong et al. 2020 (arXiv:2002.04745), figure 1b. FFN is W_2 relu(W_1 x) of width `d_inner`;
    dropout falls on what is added and never on the stream. Layers in a row need a final norm.
    Raises `ValueError` for heads that do not divide d_model.
    """

    def __init__(self, d_model: int, d_inner: int, *, heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        relu = FeedForwardConfig(activation="relu")
        self.stack = Stack(
            [
                Attention(d_model, heads, causal=False, dropout=dropout),
                FeedForward(d_model, d_inner, config=relu, dropout=dropout),
            ],
            "prenorm",
            dim=d_model,
            parts=2,
            start="xavier",
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the layer's output.

        `mask` is boolean, broadcastable to `(B, heads, T, T)`, True where a query may look.
        """
        y: Tensor = self.stack(x, Context(mask))
        return y

    def reset_parameters(self) -> None:
        """Start matrices Xavier-normal, norms with gain 1, biases at 0."""
        self.stack.reset_parameters()
