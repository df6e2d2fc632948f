"""What the vitals are sums of: norms, cosines, ranks, counts; all in float32.

Shapes: B batch, T positions, n streams, D width; `(..., D)` is a stream.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

POSITIONS = 256  # sample of positions for the effective rank


def norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm of all elements, summed in float32, of float64 in float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(x, dtype=wide)
    return length


def rms(tensors: list[Tensor]) -> Tensor | float:
    """Return the root of the mean square over all tensors; NaN of none."""
    count = sum(t.numel() for t in tensors)
    if not count:
        return math.nan
    squares = torch.stack([norm(t.detach()).square() for t in tensors]).sum()
    return (squares / count).sqrt()


def non_finites(tensors: list[Tensor]) -> Tensor | int:
    """Count the values that are not finite in all tensors."""
    return sum((non_finite_in(t.detach(), norm(t.detach())) for t in tensors), torch.zeros(()))


def non_finite_in(x: Tensor, length: Tensor) -> Tensor:
    """Count the values that are not finite; on a CPU only where the norm says that there are some.

    Elsewhere asking for the norm would wait for the device.
    """
    if x.device.type == "cpu" and math.isfinite(length):
        return torch.zeros(())
    return (~torch.isfinite(x)).sum()


def by_feature(x: Tensor, features: int) -> Tensor:
    """Return the sum of absolute values of each feature over all positions."""
    if x.dim() < 2:
        return x.abs()
    return x.abs().sum(dim=[i for i in range(x.dim()) if i != features % x.dim()])


# Written with sums over the last axis: norms and cosines of torch take up to a hundred times as
# long where that axis is not the innermost in memory, as in images.


def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows whose largest value is 1, and 1 / their norm, 0 for a row of zeros.

    The squares of a stream near 1e-20 would underflow.
    """
    x = x.detach().float()
    size = x.abs().amax(dim=-1, keepdim=True)
    x = x / torch.where(size > 0, size, 1)
    squares = x.square().sum(dim=-1)
    return x, torch.where(squares > 0, squares.rsqrt(), 0)


def cosine(one: Tensor, two: Tensor) -> Tensor:
    """Return the mean cosine between the rows of two tensors; with a row of zeros it is 0."""
    (one, unit_one), (two, unit_two) = scaled(one), scaled(two)
    return ((one * two).sum(dim=-1) * unit_one * unit_two).mean()


@torch.no_grad()
def similarity(x: Tensor) -> Tensor | float:
    """Return the mean cosine between different positions: T of `(B, T, D)`, rows of `(B, D)`."""
    if x.dim() < 2:
        return math.nan
    x = x.unsqueeze(0) if x.dim() == 2 else x.flatten(1, -2)  # (B, T, D)
    T = x.shape[1]
    if T < 2:
        return math.nan
    x, unit = scaled(x)
    together = (unit[:, None] @ x).square().sum(dim=(1, 2))  # all cosines, T ones among them
    alone = (unit > 0).sum(dim=1)
    return ((together - alone) / (T * (T - 1))).mean()


@torch.no_grad()
def effective_rank(x: Tensor, positions: int = POSITIONS) -> Tensor | float:
    """Return the participation ratio of the spectrum of `x (..., D)` as positions x width.

    `(sum s^2)^2 / sum s^4` over the singular values s: between 1 and the smaller side. At most
    `positions` rows count, evenly spread over all of them. Streams of one row have no spectrum.
    """
    if x.dim() < 2:
        return math.nan
    rows = x.detach().flatten(0, -2)
    if len(rows) > positions:
        rows = rows[torch.linspace(0, len(rows) - 1, positions, device=x.device).long()]
    rows = rows.float()
    size = rows.abs().amax()  # before squares that would underflow
    rows = torch.where(size > 0, rows / size, rows)
    gram = rows @ rows.mT if len(rows) < rows.shape[1] else rows.mT @ rows
    return gram.trace().square() / gram.square().sum()


def between_streams(stream: Any, now: Tensor) -> Tensor | float:
    """Return the mean cosine between the streams, at the same position, where there are several."""
    if isinstance(stream, Tensor) and stream.dim() == now.dim() + 1:  # (..., n, D)
        return similarity(stream.detach().flatten(0, -3))
    if isinstance(stream, tuple | list) and len(stream) > 1:
        parts = [t.detach() for t in stream if isinstance(t, Tensor) and t.shape == now.shape]
        if len(parts) == len(stream):
            return similarity(torch.stack(parts, dim=-2).flatten(0, -3))
    return math.nan
