"""What goes into a block on trial, and what leaves it when its branches are silent.

Shapes: x `(B, ..., D)` for a norm, any shape `(B, ...)` for the rest.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addnorm.probe.losses import floats_in

CLOSE = 1e-4  # share of the RMS that rounding may make
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Form(NamedTuple):
    """What a block returns when its branches return 0."""

    name: str  # x, act(x), N(x), S(x), something of x, nothing of x
    meaning: str


def stream_of(example: Any) -> Tensor:
    """Return the first floating-point tensor of the example."""
    found = floats_in(list(example.values()) if isinstance(example, Mapping) else example)
    if not found or not found[0].dim():
        raise ValueError("the example must hold a floating-point tensor (B, ...)")
    return found[0]


def with_stream(example: Any, stream: Tensor) -> Any:
    """Return the example with another stream, and clones of the other tensors."""
    left = [stream]

    def change(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if left and value.is_floating_point():
            return left.pop()
        return value.detach().clone()

    if isinstance(example, Tensor):
        return change(example)
    if isinstance(example, Mapping):
        return {key: change(value) for key, value in example.items()}
    return tuple(change(value) for value in example)


def rms(x: Tensor) -> float:
    """Return the root mean square."""
    return float(x.double().square().mean().sqrt())


def lively(x: Tensor) -> Tensor:
    """Return x, or noise where x varies too little to show what depends on it."""
    if float(x.double().std()) > CLOSE * max(rms(x), 1e-30):
        return x.clone()
    return torch.randn(x.shape).to(x)


def depends(call: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether the output changes with the input."""
    other = x + torch.randn(x.shape).to(x) * rms(x)
    first, second = call(x.clone()), call(other)
    return rms(second - first) > CLOSE * max(rms(first), rms(x) * 1e-4)


def form_of(call: Callable[[Tensor], Tensor], x: Tensor) -> Form:
    """Say what of x leaves a silent block."""
    out = call(x.clone())
    if not depends(call, x):
        return Form("nothing of x", "no skip")
    if out.shape != x.shape:
        return Form("S(x)", "a shortcut that changes the shape")
    if _same(out, x):
        return Form("x", "the identity")
    factor = float((out * x).sum() / (x * x).sum())
    if _same(out, factor * x):
        return Form("c x", f"the input times {factor:.4g}")
    for name, function in ACTIVATIONS.items():
        if _same(out, function(x)):
            return Form(f"{name}(x)", "an activation after the addition")
        positive = function(x)
        factor = float((out * positive).sum() / (positive * positive).sum().clamp_min(1e-30))
        if name == "relu" and factor > 0 and _same(out, factor * positive):
            return Form(f"{name}(c x)", f"an activation after the addition, x times {factor:.4g}")
    for name, normed in normed_of(x).items():
        for inner, function in {"": lambda z: z, **ACTIVATIONS}.items():
            if _affine(out, function(normed)):
                what = f" and {inner}" if inner else ""
                return Form(f"{inner}({name})" if inner else name, f"a norm{what} after the sum")
    if _affine(out, x) or (x.dim() > 2 and _affine(out.movedim(1, -1), x.movedim(1, -1))):
        return Form("a * x + b", "every channel times a factor, as an evaluated batch norm does")
    return Form("something of x", "a gate, a norm or a projection on the stream")


def normed_of(x: Tensor) -> dict[str, Tensor]:
    """Return the two norms over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    return {
        "N(x), a layer norm": centred / centred.square().mean(-1, keepdim=True).add(1e-5).sqrt(),
        "N(x), an RMS norm": x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt(),
    }


def _same(one: Tensor, other: Tensor) -> bool:
    return rms(one - other) <= CLOSE * max(rms(other), 1e-30)


def _affine(out: Tensor, of: Tensor) -> bool:
    """Whether every channel (last axis) of `out` is an affine function of the same one of `of`.

    Needs four positions and more, for two always lie on a line.
    """
    slope, _, rest = fit(out, of)
    varies = slope.abs().max() > 0
    return slope.numel() > 0 and bool(varies) and rest <= 10 * CLOSE * max(rms(out), 1e-30)


def fit(out: Tensor, of: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return slope and shift of every channel, least squares over positions, and the RMS left."""
    y, z = out.double().flatten(0, -2), of.double().flatten(0, -2)
    if y.shape[0] < 4:
        return torch.empty(0), torch.empty(0), math.inf
    y0, z0 = y - y.mean(0), z - z.mean(0)
    slope = (y0 * z0).sum(0) / z0.square().sum(0).clamp_min(1e-30)
    return slope, y.mean(0) - slope * z.mean(0), rms(y0 - slope * z0)


def norm_ratio(module: nn.Module, shape: Sequence[int]) -> float | None:
    """Return by what factor a layer norm is too small for its variance; None for any other module.

    A gain (a vector of the module's) is divided out. NaN where the width 1 makes it so.
    """
    width = shape[-1]
    trial = copy.deepcopy(module).double()
    rows = max(2, math.ceil(16 / max(1, math.prod(shape[1:-1]))))
    z = torch.randn(rows, *shape[1:]) if len(shape) > 1 else torch.randn(shape)
    device = next((p.device for p in trial.parameters()), torch.device("cpu"))
    z = 100 * z.double().to(device)  # so large that the small constant under the root is nothing
    with contextlib.suppress(RuntimeError, TypeError, ValueError):  # it cannot be called so
        out = trial(z.clone())
        if width == 1:
            bad = bool(out.isnan().all()) and not bool(z.isnan().any())
            return math.nan if bad else None
        slope, _, rest = fit(out, normed_of(z)["N(x), a layer norm"])
        if not slope.numel() or rest > CLOSE * max(rms(out), 1e-30):
            return None
        expected = math.sqrt((width - 1) / width)
        for gain in _gains(trial, width):
            ratio = slope / gain
            if bool(((ratio - expected).abs() < (1 - expected) / 4).all()):
                return float(ratio.mean())
    return None


def _gains(module: nn.Module, width: int) -> Iterator[Tensor]:
    """Yield 1 and every vector of the module that may be its gain."""
    yield torch.ones(width).double()
    for parameter in module.parameters():
        if parameter.numel() == width and bool((parameter != 0).all()):
            yield parameter.detach().flatten()
