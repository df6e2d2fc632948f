"""The norms by name: maps over the last axis, `(..., D) -> (..., D)`, for streams and inner widths.

Each is made as `NORMS[name](width)`, has `reset_parameters`, and takes `device` and `dtype`. Those
of `NORMS` treat every token by itself, as a language model must; `BATCH_NORMS` has batch norm too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean x^2 + 1e-6) * gamma, gamma = 1 of width D at the start.

    Zhang and Sennrich 2019 (arXiv:1910.07467). Where autocast hands it bfloat16 it computes in the
    gain's float32, as `nn.LayerNorm` does there.
    """

    def __init__(
        self,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, eps=1e-6, device=device, dtype=dtype)  # torch's is the dtype's eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x."""
        return super().forward(x.to(torch.promote_types(x.dtype, self.weight.dtype)))


class ScaleNorm(nn.Module):
    """g x / |x|, |x| the Euclidean norm, g one learned number that starts at sqrt(D).

    Nguyen and Salazar 2019 (arXiv:1910.05895), section 2.2. At its start it is RMSNorm without a
    gain. |x| counts as 1e-5 where it is less, so that x = 0 gives 0.
    """

    def __init__(
        self,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return g x / |x|."""
        return self.weight * F.normalize(x, dim=-1, eps=1e-5)

    def reset_parameters(self) -> None:
        """Start g at sqrt(D)."""
        nn.init.constant_(self.weight, self.width**0.5)

    def extra_repr(self) -> str:
        """Show the width."""
        return str(self.width)


class DyT(nn.Module):
    """gamma * tanh(a x) + beta, elementwise: a in place of statistics of x.

    Zhu et al. 2025 (arXiv:2503.10622), equation 1. gamma = 1 and beta = 0 of width D, a one learned
    number that starts at 0.5. It bounds x and does not normalise it.
    """

    def __init__(
        self,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return gamma * tanh(a x) + beta."""
        return self.weight * torch.tanh(self.alpha * x) + self.bias

    def reset_parameters(self) -> None:
        """Start gamma at 1, beta at 0 and a at 0.5."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.constant_(self.alpha, 0.5)

    def extra_repr(self) -> str:
        """Show the width."""
        return str(self.weight.numel())


class Derf(nn.Module):
    """gamma * erf(a x + s) + beta, elementwise.

    Chen et al. 2025 (arXiv:2512.10938). gamma = 1 and beta = 0 of width D; a and s are one learned
    number each and start at 0.5 and 0. It bounds x and does not normalise it.
    """

    def __init__(
        self,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return gamma * erf(a x + s) + beta."""
        return self.weight * torch.erf(self.alpha * x + self.shift) + self.bias

    def reset_parameters(self) -> None:
        """Start gamma at 1, beta at 0, a at 0.5 and s at 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.constant_(self.alpha, 0.5)
        nn.init.zeros_(self.shift)

    def extra_repr(self) -> str:
        """Show the width."""
        return str(self.weight.numel())


class BatchNorm(nn.BatchNorm1d):
    """(x - mean) / sqrt(variance + 1e-5) * gamma + beta, mean and variance over all but channels.

    Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithm 1, for channels in the last axis of
    `x (..., D)`; the running statistics of evaluation move by a tenth in each step. It mixes the
    examples of a batch and the positions of a text. Raises `ValueError` where a channel has one
    value in training.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x."""
        if self.training and x.shape[:-1].numel() == 1:
            raise ValueError(
                "batch norm has one value in each channel to train on; give it a larger batch"
            )
        if x.dim() == 4:  # torch's kernel for channels_last images, without a copy
            return super().forward(x.movedim(-1, 1)).movedim(1, -1)
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)

    def _check_input_dim(self, input: Tensor) -> None:
        """Take inputs of two and of four axes."""


Norm = nn.LayerNorm | RMSNorm | ScaleNorm | DyT | Derf
NormName = Literal["layernorm", "rmsnorm", "scalenorm", "dyt", "derf"]
NORMS: Mapping[str, Callable[[int], Norm]] = {
    "layernorm": nn.LayerNorm,  # eps 1e-5
    "rmsnorm": RMSNorm,
    "scalenorm": ScaleNorm,
    "dyt": DyT,
    "derf": Derf,
}
BatchNormName = Literal["batchnorm", "layernorm", "rmsnorm", "scalenorm", "dyt", "derf"]
BATCH_NORMS: Mapping[str, Callable[[int], Norm | BatchNorm]] = {"batchnorm": BatchNorm, **NORMS}
