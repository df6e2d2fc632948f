"""What the checks of the errata share: a proof, and small networks to look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addnorm import twins
from addnorm.branches import Branch, Context
from addnorm.models.mlp import MLP, MLPConfig
from addnorm.studies.frame import Words

DOUBLE = torch.float64
GONE = 1e-9  # a gain or an error below is 0 but for rounding


@dataclass(frozen=True)
class Proof:
    """Whether an erratum holds, and what was measured."""

    holds: bool
    evidence: Words


Tokens = Callable[[Tensor], Tensor]  # (B, T, D) -> (B, T, D)


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
    stack = small_mlp(wiring, depth, activation, start).double().stack
    x = torch.randn(128, 64, dtype=DOUBLE, requires_grad=True)
    y = stack(x)
    probe = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * probe).sum(), x)
    growth = y.detach().square().mean() / x.detach().square().mean()
    return float(growth), float(gradient.norm() / probe.norm())


def gradient_ratio(wiring: str, depth: int, activation: str, start: str) -> float:
    """Return gradient RMS at the input of a stack over that at its output."""
    return propagated(wiring, depth, activation, start)[1]


def small_mlp(wiring: str, depth: int, activation: str, start: str) -> MLP:
    """Return an initialised MLP of width 64."""
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


def skew(x: Tensor) -> float:
    """Return the mean skewness of the rows of x `(N, D)`."""
    centred = x - x.mean(-1, keepdim=True)
    spread = centred.square().mean(-1).sqrt()
    return float((centred.pow(3).mean(-1) / spread.pow(3)).mean())


def over_tokens(x: Tensor) -> Tensor:
    """Return x `(B, T, D)` with mean 0 and variance 1 along the sequence."""
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, unbiased=False)


def over_batch(x: Tensor) -> Tensor:
    """Return x `(B, T, D)` with mean 0 and variance 1 over the batch, for every neuron."""
    return (x - x.mean(0, keepdim=True)) / x.std(0, keepdim=True, unbiased=False)
