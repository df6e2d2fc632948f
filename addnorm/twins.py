"""Sick twins: small modules with the defects of the documents, each beside a healthy counterpart.

They are written anew with the same defect; document and line say where it is printed, the erratum
(E..) what is wrong. Tests show each symptom, and that the counterpart has none; the X-ray must
catch those that can be seen from outside. Never build a network from the sick side.

Shapes: tokens `(B, T, D)`, images `(B, C, H, W)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addnorm.branches import Context
from addnorm.contract import Stack
from addnorm.models.layers import Attention, FeedForward
from addnorm.models.residual_layer import LayerNorm, ResidualBlock, ResidualLayer


class InplaceBlock(nn.Module):
    """004:27-43, E37: ReLU changes x in place, so that the skip carries relu(x), the caller's too.

    Two in a row cannot train. Healthy: `ResidualBlock`.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.second = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        widens = in_channels != out_channels
        self.project = nn.Conv2d(in_channels, out_channels, 1) if widens else None

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(S(x) + F(x)) with what is left of x."""
        skip = x
        h = self.first(F.relu(x, inplace=True))
        h = self.second(F.relu(h, inplace=True))
        h += skip if self.project is None else self.project(skip)
        return F.relu(h, inplace=True)


class DoubledLayer(nn.Module):
    """004:120-126, E39: x is overwritten by the branch before x + x, so that nothing is skipped.

    Healthy: `ResidualLayer`.
    """

    def __init__(self, d_model: int, d_inner: int, *, heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.attention = Attention(d_model, heads, causal=False, dropout=dropout)
        self.feedforward = FeedForward(d_model, d_inner, dropout=dropout)
        self.norms = nn.ModuleList([nn.LayerNorm(d_model), nn.LayerNorm(d_model)])

    def forward(self, x: Tensor) -> Tensor:
        """Return twice what the second branch gives."""
        for norm, branch in zip(self.norms, (self.attention, self.feedforward), strict=True):
            x = branch(norm(x), Context())
            x = x + x
        return x


class UnbiasedLayerNorm(nn.Module):
    """004:82, E38: the variance is divided by D - 1, a factor sqrt((D-1)/D), and NaN at D = 1.

    Healthy: `LayerNorm`.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised by the wrong variance."""
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)
        return centred / torch.sqrt(variance + self.eps) * self.weight + self.bias


class UndefinedParts(nn.Module):
    """004:113-114, E40: built from two classes that exist neither in the example nor in torch.

    Healthy: `ResidualLayer`.
    """

    def __init__(self, d_model: int, d_inner: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(d_model, d_inner)  # type: ignore[name-defined] # noqa: F821
        self.feedforward = PositionwiseFeedForward(d_model, d_inner)  # type: ignore[name-defined] # noqa: F821


class InnerWidth(nn.Module):
    """004:113, E40: an attention that is told the hidden width, which is the feed-forward's.

    torch's own class takes it for the number of heads. Healthy: `ResidualLayer`.
    """

    def __init__(self, d_model: int, d_inner: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(d_model, d_inner, num_heads=8)  # type: ignore[misc]


class SequenceNorm(nn.Module):
    """002:45-52, E25: mean and variance over the sequence, so that every token sees the others.

    Without a constant under the root, without gain and bias. Healthy: `LayerNorm`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """Return `x (B, T, D)` normalised along T."""
        return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, unbiased=False)


class StreamDropout(nn.Module):
    """002:111, E27: dropout on the stream after the addition, so that the skip fades with depth.

    Healthy: `BranchDropout`.
    """

    def __init__(self, dim: int, rate: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.branch = FeedForward(dim)
        self.dropout = nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return dropout(x + F(N(x)))."""
        y: Tensor = self.dropout(x + self.branch(self.norm(x), Context()))
        return y


class InputDropout(nn.Module):
    """002:115-117: dropout on what the feed-forward reads, and none on what it adds.

    Healthy: `BranchDropout`.
    """

    def __init__(self, dim: int, rate: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.branch = FeedForward(dim)
        self.dropout = nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + F(dropout(N(x)))."""
        return x + self.branch(self.dropout(self.norm(x)), Context())


class BranchDropout(nn.Module):
    """x + dropout(F(N(x))): the healthy counterpart of `StreamDropout` and `InputDropout`."""

    def __init__(self, dim: int, rate: float = 0.1) -> None:
        super().__init__()
        self.stack = Stack([FeedForward(dim, dropout=rate)], "prenorm", dim=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + dropout(F(N(x)))."""
        y: Tensor = self.stack(x)
        return y


class BatchMixer(nn.Module):
    """002:95, E28: attention without batch_first on (B, T, D) looks along the batch, not the text.

    Healthy: `Mixer`.
    """

    batch_first = False

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=self.batch_first)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + Attention(x)."""
        y: Tensor = x + self.attention(x, x, x, need_weights=False)[0]
        return y


class Mixer(BatchMixer):
    """x + Attention(x) along the text: the healthy counterpart of `BatchMixer`."""

    batch_first = True


class MaskKeyword(nn.Module):
    """002:109, E26: `mask=` is no argument of `nn.MultiheadAttention`: every call is a TypeError.

    Healthy: `AttnMaskKeyword`.
    """

    keyword = "mask"

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return x + Attention(x); `mask (T, T)` is True where a query may not look."""
        y: Tensor = x + self.attention(x, x, x, need_weights=False, **{self.keyword: mask})[0]
        return y


class AttnMaskKeyword(MaskKeyword):
    """The call with `attn_mask=`: the healthy counterpart of `MaskKeyword`."""

    keyword = "attn_mask"


class OneSkip(nn.Module):
    """002:27-30, E23: one skip over attention, feed-forward and norm, and a ReLU after it.

    The stream can only be positive. Healthy: `TwoSkips`.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, causal=False)
        self.feedforward = FeedForward(dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(x + N(FFN(Attention(x))))."""
        context = Context()
        return F.relu(x + self.norm(self.feedforward(self.attention(x, context), context)))


class TwoSkips(nn.Module):
    """x + Attention(N(x)), then x + FFN(N(x)): the healthy counterpart of `OneSkip`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        parts = [Attention(dim, heads, causal=False), FeedForward(dim)]
        self.stack = Stack(parts, "prenorm", dim=dim, parts=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        y: Tensor = self.stack(x)
        return y


def accumulated_gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, float]:
    """003:69-85, E36: lists mean |gradient| without emptying it: the second call shows the sum.

    Healthy: `gradients`.
    """
    loss().backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad for n, p in model.named_parameters() if n.endswith("weight")}
    return {n: g.abs().mean().item() for n, g in found.items() if g is not None}


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, float]:
    """Return mean |gradient| of every weight by name, and leave no gradient behind.

    The healthy counterpart of `accumulated_gradients`.
    """
    named = {n: p for n, p in model.named_parameters() if n.endswith("weight") and p.requires_grad}
    found = torch.autograd.grad(loss(), list(named.values()), allow_unused=True)
    pairs = zip(named, found, strict=True)
    return {n: g.abs().mean().item() for n, g in pairs if g is not None}


@dataclass(frozen=True)
class Twin:
    """A defect of a document, and what has it and what has not."""

    sick: Callable[..., object]
    healthy: Callable[..., object]
    document: str  # document and lines
    erratum: str  # empty where it is none but a custom that is not kept


TWINS: Mapping[str, Twin] = {
    "inplace": Twin(InplaceBlock, ResidualBlock, "004:27-43", "E37"),
    "doubled": Twin(DoubledLayer, ResidualLayer, "004:120-126", "E39"),
    "unbiased": Twin(UnbiasedLayerNorm, LayerNorm, "004:82", "E38"),
    "undefined": Twin(UndefinedParts, ResidualLayer, "004:113-114", "E40"),
    "inner-width": Twin(InnerWidth, ResidualLayer, "004:113", "E40"),
    "stream-dropout": Twin(StreamDropout, BranchDropout, "002:111", "E27"),
    "input-dropout": Twin(InputDropout, BranchDropout, "002:115-117", ""),
    "sequence-norm": Twin(SequenceNorm, LayerNorm, "002:45-52", "E25"),
    "batch-mixer": Twin(BatchMixer, Mixer, "002:95", "E28"),
    "mask-keyword": Twin(MaskKeyword, AttnMaskKeyword, "002:109", "E26"),
    "one-skip": Twin(OneSkip, TwoSkips, "002:27-30", "E23"),
    "accumulated": Twin(accumulated_gradients, gradients, "003:69-85", "E36"),
}
