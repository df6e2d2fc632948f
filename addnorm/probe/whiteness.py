"""Gradient whiteness: how like noise the input gradient is along a line of inputs.

In deep networks without skip connections the gradients at two near inputs have nothing to do with
each other: along a line the gradient looks like white noise, where that of a shallow or residual
network looks like brown noise (Balduzzi et al. 2017, arXiv:1702.08591, sections 1 and 2).

Letters: n points along a line, B entries of a batch, k a lag in steps.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from addnorm.contract import unknown
from addnorm.probe.losses import Progress, call_model, floats_in
from addnorm.probe.purity import eager, untouched, unwrap

SHUFFLES = 200  # orders of the same gradients that make the band of white noise
CONSTANT = 1e-10  # share of the squared gradient that varies, below which it does not


@dataclass(frozen=True)
class Whiteness:
    """The autocorrelation of the input gradient along lines of inputs, and two references.

    `autocorrelation[k]` is the mean over the lines of `sum_t <g_t - m, g_(t+k) - m> /
    sum_t |g_t - m|^2`, m the mean gradient of the line; 1 at lag 0. `error` is its standard error
    over the lines, NaN for one line. White noise lies between `white_low` and `white_high` in 95
    of 100 cases: the same gradients in random order. `brown` is what a random walk of n steps gives
    in expectation, exactly, as a ratio of expectations. A gradient that is constant along every
    line, as that of a linear model, has no autocorrelation: all values are NaN, and `constant`
    counts such lines, which are left out.
    """

    where: str  # the module whose output is the line; "" for the input
    points: int  # n
    lines: int  # that were measured
    autocorrelation: list[float]  # by lag, from 0
    error: list[float]
    white_low: list[float]
    white_high: list[float]
    brown: list[float]
    reversals: float  # share of neighbouring points with gradients at more than 90 degrees
    constant: int  # lines with a constant gradient
    seed: int
    seconds: float

    @property
    def white(self) -> bool:
        """Whether lag 1 is no larger than that of white noise: neighbours share nothing."""
        return self.autocorrelation[1] <= self.white_high[1]

    @property
    def brownness(self) -> float:
        """The sum over the lags from 1 / that of brown noise: about 0 for white, 1 for brown."""
        return sum(self.autocorrelation[1:]) / sum(self.brown[1:])

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the derived ones included."""
        return asdict(self) | {"white": self.white, "brownness": self.brownness}


def whiteness(
    model: nn.Module,
    inputs: Any,
    *,
    at: str | None = None,
    lags: int = 15,
    points: int = 256,
    batch: int = 64,
    batch_statistics: bool = False,
    budget: float = 60.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Whiteness:
    """Return the autocorrelation of the input gradient along lines between inputs.

    `inputs` as in `xray`, with two or more entries along the first axis: a line runs from entry 0
    to 1, the next from 2 to 3, and so on. The gradient is that of the inner product of the first
    output with a random direction, one for each line. Where the first tensor is of tokens, the line
    runs in the output of the first `nn.Embedding` that is called; `at` names another module
    instead, whose output `(B, ...)` is replaced at its first call. All else that has the batch's
    size along its first axis is that of the line's first entry.

    `points` are taken `batch` at a time, in evaluation mode. With `batch_statistics` batch norms
    use the statistics of the line, all of whose points then go through at once, as in the paper's
    experiment; the gradient is that of the sum over the points. Lines are begun while `budget`
    seconds last, the first always. Nothing in the model changes.

    Raises `ValueError` for fewer than two entries, a module that is not found, not called or has
    no batch axis, two equal entries, and settings out of their range.
    """
    began = time.monotonic()
    if not 1 <= lags < points:
        raise ValueError(f"lags {lags} must be at least 1 and less than points, {points}")
    if batch < 1:
        raise ValueError(f"batch {batch} must be at least 1")
    model = unwrap(model)
    size = _entries(inputs)
    if size < 2:
        raise ValueError(f"a line needs two inputs; the batch holds {size}")
    generator = torch.Generator().manual_seed(seed)
    parts = [points] if batch_statistics else [batch] * (points // batch)
    parts += [points - sum(parts)] if sum(parts) < points else []
    done: list[tuple[Tensor, float]] = []
    with untouched(model), eager(model), torch.enable_grad():
        model.eval()
        if batch_statistics:
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.train()
        where = _where(model, inputs, at, size)
        for number in range(size // 2):
            if number and (time.monotonic() - began) * (number + 1) / number > budget:
                break
            ends = _ends(model, inputs, where, size, number)
            rows, first = [], 0
            direction: Tensor | None = None
            for part in parts:
                t = torch.arange(first, first + part, dtype=torch.float64) / (points - 1)
                t = t.to(ends[0].device).view(-1, *[1] * ends[0].dim()).to(ends[0].dtype)
                place = torch.lerp(ends[0], ends[1], t).requires_grad_()
                output = _output(model, inputs, where, size, 2 * number, place)
                if direction is None:
                    direction = torch.randn(output.shape[1:], generator=generator).to(output)
                (gradient,) = torch.autograd.grad((output * direction).sum(), place)
                rows.append(gradient.detach().flatten(1).double().cpu())
                first += part
                if progress is not None:
                    progress(number * points + first, size // 2 * points)
            done.append(_inner_products(torch.cat(rows)))
    return _summary(done, where, points, lags, seed, time.monotonic() - began)


def _inner_products(gradients: Tensor) -> tuple[Tensor, float]:
    """Return the inner products of the centred gradients `(n, n)`, and the share of reversals.

    An empty matrix stands for a constant gradient.
    """
    neighbours = (gradients[1:] * gradients[:-1]).sum(1)
    reversals = float((neighbours < 0).double().mean())
    centred = gradients - gradients.mean(0)
    products = centred @ centred.T
    if not products.trace() > CONSTANT * gradients.square().sum():
        return torch.empty(0, 0), reversals
    return products, reversals


def autocorrelation(products: Tensor, lags: int) -> list[float]:
    """Return `sum_t products[t, t + k] / trace` for the lags k from 0 to `lags`."""
    whole = products.trace()
    return [float(products.diagonal(k).sum() / whole) for k in range(lags + 1)]


def brown_noise(points: int, lags: int) -> list[float]:
    """Return the autocorrelation of a random walk, numerator and denominator in expectation.

    Its positions s and t have the covariance min(s, t); the mean over the walk is taken away.
    """
    steps = torch.arange(1, points + 1, dtype=torch.float64)
    center = torch.eye(points, dtype=torch.float64) - 1 / points
    return autocorrelation(center @ torch.minimum(steps[:, None], steps) @ center, lags)


def _summary(
    done: list[tuple[Tensor, float]], where: str, points: int, lags: int, seed: int, seconds: float
) -> Whiteness:
    """Average over the lines and shuffle them for the band of white noise."""
    products = [p for p, _ in done if p.numel()]
    generator = torch.Generator().manual_seed(seed + 1)
    mean = error = low = high = [math.nan] * (lags + 1)
    if products:
        lines = torch.tensor([autocorrelation(p, lags) for p in products], dtype=torch.float64)
        mean = lines.mean(0).tolist()
        if len(products) > 1:
            error = (lines.std(0) / math.sqrt(len(products))).tolist()
        shuffled = []
        for _ in range(SHUFFLES):
            orders = [torch.randperm(points, generator=generator) for _ in products]
            again = [
                autocorrelation(p[o][:, o], lags) for p, o in zip(products, orders, strict=True)
            ]
            shuffled.append(torch.tensor(again, dtype=torch.float64).mean(0))
        band = torch.tensor([0.025, 0.975], dtype=torch.float64)
        low, high = torch.stack(shuffled).quantile(band, dim=0).tolist()
    return Whiteness(
        where=where,
        points=points,
        lines=len(done),
        autocorrelation=mean,
        error=error,
        white_low=low,
        white_high=high,
        brown=brown_noise(points, lags),
        reversals=sum(r for _, r in done) / len(done),
        constant=len(done) - len(products),
        seed=seed,
        seconds=seconds,
    )


# -- a line of inputs ------------------------------------------------------------------------------


def _tensors(inputs: Any) -> list[Tensor]:
    """Return the tensors among the arguments."""
    if isinstance(inputs, Tensor):
        return [inputs]
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return [v for v in values if isinstance(v, Tensor)]


def _entries(inputs: Any) -> int:
    """Return the size of the batch: the first axis of the first tensor."""
    tensors = _tensors(inputs)
    if not tensors or tensors[0].dim() < 2:
        raise ValueError("the inputs must hold a tensor (B, ...) of at least two axes first")
    return int(tensors[0].shape[0])


def _replaced(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the arguments with every tensor changed."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {k: change(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return tuple(change(v) if isinstance(v, Tensor) else v for v in inputs)


def _picked(inputs: Any, size: int, rows: Tensor) -> Any:
    """Return the arguments with these entries of whatever has the batch's size."""
    return _replaced(
        inputs, lambda t: t[rows.to(t.device)] if t.dim() and t.shape[0] == size else t
    )


def _where(model: nn.Module, inputs: Any, at: str | None, size: int) -> str:
    """Return the name of the module whose output is the line; "" for the input itself."""
    named = dict(model.named_modules())
    if at is not None:
        if at not in named:
            raise ValueError(unknown("module", at, named, "model.named_modules()"))
        return at
    if _tensors(inputs)[0].is_floating_point():
        return ""
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in named.items()
        if isinstance(module, nn.Embedding)
    ]
    try:
        with torch.no_grad():
            call_model(model, _picked(inputs, size, torch.arange(2)))
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise ValueError("tokens, and no nn.Embedding was called; name a module by at=")
    return called[0]


@contextlib.contextmanager
def _first_output(
    model: nn.Module, where: str, change: Callable[[Tensor], Tensor]
) -> Iterator[list[Tensor]]:
    """Change the output of the first call of a module; the list then holds what it was."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if seen:
            return None
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise ValueError(
                f"the output of {where} is no floating-point tensor; name another by at="
            )
        seen.append(output)
        return change(output)

    handle = model.get_submodule(where).register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
    if not seen:
        raise ValueError(f"{where} was not called; name another module by at=")


def _ends(
    model: nn.Module, inputs: Any, where: str, size: int, number: int
) -> tuple[Tensor, Tensor]:
    """Return the two ends of a line."""
    pair = _picked(inputs, size, torch.tensor([2 * number, 2 * number + 1]))
    if where:
        with torch.no_grad(), _first_output(model, where, lambda output: output) as seen:
            call_model(model, pair)
        found = seen[0]
        if found.dim() < 2 or found.shape[0] != 2:
            raise ValueError(
                f"the output of {where} is {tuple(found.shape)}, which does not begin with the "
                "batch; name another module by at="
            )
    else:
        found = _tensors(pair)[0].detach()
    if torch.equal(found[0], found[1]):
        raise ValueError(f"entries {2 * number} and {2 * number + 1} are equal: no line")
    return found[0], found[1]


def _output(
    model: nn.Module, inputs: Any, where: str, size: int, entry: int, place: Tensor
) -> Tensor:
    """Return the first output of the model with the line's points in their place."""
    repeated = _picked(inputs, size, torch.full((len(place),), entry))
    if where:
        with _first_output(model, where, lambda _: place):
            output = call_model(model, repeated)
    else:
        left = [place]
        change: Callable[[Tensor], Tensor] = lambda t: left.pop() if left else t  # noqa: E731
        output = call_model(model, _replaced(repeated, change))
    found = floats_in(output)
    if not found or not found[0].dim() or found[0].shape[0] != len(place):
        raise ValueError("the first output of the model must be a floating-point tensor (B, ...)")
    return found[0]
