"""The loss over one or two coordinates of the weights, from few points and a polynomial.

The loss is computed on a Chebyshev grid, interpolated to the points of a picture, and held against
the loss at random points that the polynomial has not seen. The grid of n points to an axis lies
inside the one of 2n - 1, so refining it repeats nothing.

Letters: n nodes of the Chebyshev grid to an axis, P points of the picture to an axis.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from addnorm.probe.losses import Loss, Progress, call_model, loss_of
from addnorm.probe.purity import eager, untouched

Directions = Sequence[Mapping[str, Tensor]]  # one for each axis: parameter or buffer -> step

LEVELS = (5, 9, 17, 33, 65)  # nodes to an axis, each grid inside the next
HELD_OUT = {1: 16, 2: 35}  # with 17 x 17 and the origin 325 points, an eighth of 51 x 51
ERROR = 0.01  # of the range of the loss; above it the grid is refined


@dataclass(frozen=True)
class Landscape:
    """The loss over one or two coordinates of the weights, in plain numbers.

    `losses[i][j]` is the loss at `y[i]`, `x[j]`; in one dimension there is one row. `error` and
    `error_rms` were measured at `held_out` random points that the interpolation has not seen, as
    shares of the range of the losses computed. The largest over the whole picture is larger than
    that over so few points, up to twice in `benchmarks/landscape.py`; the root mean squares agree.
    `converged` says whether `error` is at most 1 %. `path`, `path_losses` and `explained` belong to
    a trajectory: the projected states, the losses of the states themselves (not of their
    projections), and the shares of the variance of the path that lie in the two directions.
    """

    kind: str  # random, line or trajectory
    loss_kind: str  # which loss it is
    x: list[float]
    y: list[float]  # [0.0] in one dimension
    losses: list[list[float]]
    center: float  # the loss at the origin, computed, not interpolated
    nodes: int  # to an axis, of the grid that was interpolated
    evaluations: int  # forward passes, held-out points and the origin included
    held_out: int
    error: float  # the largest difference at a held-out point / range
    error_rms: float  # the root mean square of the differences / range
    converged: bool
    note: str  # what happened, one sentence
    seed: int
    seconds: float
    path: list[list[float]]
    path_losses: list[float]
    explained: list[float]

    @property
    def low(self) -> float:
        """The lowest loss of the picture."""
        return min(map(min, self.losses))

    @property
    def high(self) -> float:
        """The highest loss of the picture."""
        return max(map(max, self.losses))

    @property
    def range(self) -> float:
        """The highest minus the lowest loss of the picture."""
        return self.high - self.low

    def sharpness(self, epsilon: float) -> float:
        """Return by how many percent the loss rises at most within `|x|, |y| <= epsilon`.

        `100 (max f - f(0)) / (1 + f(0))` over the points of the picture, with the plane as the
        random subspace: Keskar et al. 2017 (arXiv:1609.04836), metric 2.1. Raises `ValueError`
        where no point of the picture lies so near.
        """
        near = [
            loss
            for y, row in zip(self.y, self.losses, strict=True)
            for x, loss in zip(self.x, row, strict=True)
            if abs(x) <= epsilon and abs(y) <= epsilon
        ]
        if not near:
            raise ValueError(f"epsilon {epsilon} holds no point of the picture")
        return 100 * (max(*near, self.center) - self.center) / (1 + self.center)

    def share_below(self, level: float) -> float:
        """Return the share of the picture's points whose loss is below `level`: the basin."""
        values = [loss for row in self.losses for loss in row]
        return sum(loss < level for loss in values) / len(values)

    @property
    def non_convex(self) -> float:
        """The share of inner points whose curvature in the picture is clearly negative.

        The Hessian of the picture by central differences; clearly negative is a smallest
        eigenvalue below a tenth of the largest, negated (Li et al. 2018, section 6, map the ratio).
        A plane that is not convex says that the loss is not; a convex one says nothing.
        """
        f = torch.tensor(self.losses, dtype=torch.float64)
        step_x = self.x[1] - self.x[0]
        xx = (f[:, 2:] - 2 * f[:, 1:-1] + f[:, :-2]) / step_x**2
        if len(self.y) == 1:
            return float((xx < 0).double().mean())
        step_y = self.y[1] - self.y[0]
        yy = (f[2:] - 2 * f[1:-1] + f[:-2])[:, 1:-1] / step_y**2
        xx = xx[1:-1]
        xy = (f[2:, 2:] - f[2:, :-2] - f[:-2, 2:] + f[:-2, :-2]) / (4 * step_x * step_y)
        mean, half = (xx + yy) / 2, torch.hypot((xx - yy) / 2, xy)
        return float((mean - half < -0.1 * (mean + half).abs()).double().mean())

    @property
    def barrier(self) -> float:
        """How far the line rises above the mean of its two ends, at least 0.

        The instability of linear interpolation of Frankle et al. 2020 (arXiv:1912.05671), section
        2. It means something where the ends are the ends of a line.
        """
        ends = (self.losses[0][0] + self.losses[0][-1]) / 2
        return max(0.0, self.high - ends)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the derived ones included."""
        derived: dict[str, Any] = {
            "low": self.low,
            "high": self.high,
            "range": self.range,
            "non_convex": self.non_convex,
        }
        if self.kind == "line":
            derived["barrier"] = self.barrier
        return asdict(self) | derived


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent and other buffers by name, each tensor once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


# -- one forward pass at a point -----------------------------------------------------------------


class Moved:
    """The loss of a model on one batch with its weights moved; puts all back at the end."""

    def __init__(
        self,
        model: nn.Module,
        batch: tuple[Any, Any, Loss | None],
        directions: Directions,
        origin: Mapping[str, Tensor] | None,
    ) -> None:
        self._model = model
        self._batch = batch
        self._tensors = tensors_of(model)
        self._saved = {n: t.detach().clone() for n, t in self._tensors.items()}
        self._origin = self._saved if origin is None else self._saved | dict(origin)
        self._directions = [
            {n: d.to(self._tensors[n]) for n, d in direction.items()} for direction in directions
        ]
        self._row: tuple[float, dict[str, Tensor]] | None = None
        self._exits = contextlib.ExitStack()
        self.kind = ""
        self.evaluations = 0

    def __enter__(self) -> Moved:
        with contextlib.ExitStack() as exits:
            exits.enter_context(untouched(self._model))
            exits.enter_context(eager(self._model))
            exits.callback(self._put, self._saved)
            self._model.eval()
            self._put(self._origin)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._exits.close()

    def _put(self, values: Mapping[str, Tensor]) -> None:
        # `.data`: what is put back at the end leaves a graph of the user's valid.
        for name, tensor in self._tensors.items():
            if name in values:
                tensor.data.copy_(values[name])

    def at(self, point: Sequence[float]) -> float:
        """Return the loss at `origin + sum_k point[k] directions[k]`.

        Points that share the last coordinate share the part of the sum that it makes.
        """
        if len(point) == 1:
            base, near = self._origin, self._directions[0]
        else:
            near, far = self._directions
            if self._row is None or self._row[0] != point[1]:
                self._row = (
                    point[1],
                    {
                        n: torch.add(self._origin[n].to(d), d, alpha=point[1])
                        for n, d in far.items()
                    },
                )
            base = self._row[1]
        for name, step in near.items():
            torch.add(base[name].to(step), step, alpha=point[0], out=self._tensors[name].data)
        return self._loss(f"at {tuple(point)}")

    def of_state(self, state: Mapping[str, Tensor]) -> float:
        """Return the loss of a state dict."""
        self._put(state)
        return self._loss("of a state")

    @torch.no_grad()
    def _loss(self, where: str) -> float:
        torch.manual_seed(0)  # a loss that draws draws the same everywhere
        inputs, targets, loss = self._batch
        value, self.kind = loss_of(call_model(self._model, inputs), targets, loss)
        self.evaluations += 1
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"the loss {where} is {number}; take a smaller radius, span or margin")
        return number


# -- few points and a polynomial -------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Where the picture lies and what it may cost."""

    box: Sequence[tuple[float, float]]
    points: int
    budget: float
    evaluations: int | None
    seed: int
    progress: Progress | None

    def __post_init__(self) -> None:
        if self.points < 3:
            raise ValueError(f"points {self.points} must be at least 3")
        if not self.budget >= 0:
            raise ValueError(f"budget {self.budget} must be at least 0 seconds")
        if self.most < self.cost(LEVELS[0]):
            raise ValueError(
                f"evaluations {self.most} must be at least {self.cost(LEVELS[0])}: the coarsest "
                f"grid and its held-out points"
            )

    @property
    def dimensions(self) -> int:
        """The axes of the picture, 1 or 2."""
        return len(self.box)

    @property
    def most(self) -> int:
        """The most forward passes."""
        if self.evaluations is None:
            return max(math.prod([self.points] * self.dimensions), self.cost(LEVELS[0]))
        return self.evaluations

    def cost(self, nodes: int) -> int:
        """Return the forward passes of a grid, its held-out points and the origin."""
        count = nodes if self.dimensions == 1 else nodes * nodes
        return count + HELD_OUT[self.dimensions] + 1

    def scale(self, axis: int, unit: Tensor) -> Tensor:
        """Map -1 .. 1 to the axis."""
        low, high = self.box[axis]
        return low + (unit + 1) * ((high - low) / 2)


def chebyshev(nodes: int) -> Tensor:
    """Return the extrema of a Chebyshev polynomial, `cos(pi j / (n - 1))`, from -1 to 1."""
    j = torch.arange(nodes, dtype=torch.float64)
    return torch.sin(math.pi * (2 * j - (nodes - 1)) / (2 * (nodes - 1)))  # 0 is exactly 0


def barycentric(nodes: int, at: Tensor) -> Tensor:
    """Return the matrix `(points, n)` that interpolates values at `chebyshev(nodes)` to `at`.

    Berrut and Trefethen 2004, "Barycentric Lagrange Interpolation", equations 4.2 and 5.4; exact
    for polynomials of degree n - 1.
    """
    weights = torch.ones(nodes, dtype=torch.float64)
    weights[1::2] = -1
    weights[[0, -1]] /= 2
    distance = at.double()[:, None] - chebyshev(nodes)
    hit = distance == 0
    terms = weights / torch.where(hit, 1.0, distance)
    matrix = terms / terms.sum(1, keepdim=True)
    return torch.where(hit.any(1, keepdim=True), hit.double(), matrix)


def surface(
    model: nn.Module,
    batch: tuple[Any, Any, Loss | None],
    directions: Directions,
    plan: Plan,
    kind: str,
    origin: Mapping[str, Tensor] | None = None,
) -> Landscape:
    """Compute the grid, refine it while it is too coarse and the budget lasts, interpolate it."""
    began = time.monotonic()
    generator = torch.Generator().manual_seed(plan.seed + 1)
    held = torch.rand(HELD_OUT[plan.dimensions], plan.dimensions, generator=generator).double()
    held = 2 * held - 1
    with Moved(model, batch, directions, origin) as moved:

        def compute(point: Sequence[float], total: int) -> float:
            value = moved.at(point)
            if plan.progress is not None:
                plan.progress(moved.evaluations, total)
            return value

        total = plan.cost(LEVELS[0])
        center = compute([0.0] * plan.dimensions, total)
        units = [plan.scale(axis, held[:, axis]).tolist() for axis in range(plan.dimensions)]
        losses_held = [compute(point, total) for point in zip(*units, strict=True)]
        truth = torch.tensor(losses_held, dtype=torch.float64)
        grid, error, error_rms, note = _refined(plan, moved, compute, held, truth, began)
    nodes, two = grid.shape[1], plan.dimensions == 2
    picture = torch.linspace(-1, 1, plan.points, dtype=torch.float64)
    along = barycentric(nodes, picture)
    losses = (along if two else torch.ones(1, 1).double()) @ grid @ along.T
    return Landscape(
        kind=kind,
        loss_kind=moved.kind,
        x=plan.scale(0, picture).tolist(),
        y=plan.scale(1, picture).tolist() if two else [0.0],
        losses=losses.tolist(),
        center=center,
        nodes=nodes,
        evaluations=moved.evaluations,
        held_out=len(held),
        error=error,
        error_rms=error_rms,
        converged=error <= ERROR,
        note=f"stopped at {nodes} nodes to an axis: {note}",
        seed=plan.seed,
        seconds=time.monotonic() - began,
        path=[],
        path_losses=[],
        explained=[],
    )


def _refined(
    plan: Plan,
    moved: Moved,
    compute: Callable[[Sequence[float], int], float],
    held: Tensor,
    truth: Tensor,
    began: float,
) -> tuple[Tensor, float, float, str]:
    """Return the losses on the last grid, its two held-out errors, and why it was the last."""
    two = plan.dimensions == 2
    levels = [n for n in LEVELS if n <= plan.points or n == LEVELS[0]]
    finest = LEVELS[-1] - 1
    fine = [plan.scale(axis, chebyshev(LEVELS[-1])).tolist() for axis in range(plan.dimensions)]
    known: dict[tuple[int, ...], float] = {}  # by the place in the finest grid

    def places(nodes: int) -> Iterable[tuple[int, ...]]:
        steps = range(0, finest + 1, finest // (nodes - 1))
        return ((i, j) for i in steps for j in steps) if two else ((j,) for j in steps)

    grid, error, error_rms = torch.empty(0), math.inf, math.inf
    for level in levels:
        new = [place for place in places(level) if place not in known]
        spent = time.monotonic() - began
        ahead = spent / moved.evaluations * len(new)
        if known and moved.evaluations + len(new) > plan.most:
            note = f"{level} nodes to an axis would pass {plan.most} evaluations"
            return grid, error, error_rms, note
        if known and spent + ahead > plan.budget:
            note = f"{level} nodes to an axis would pass {plan.budget:g} s"
            return grid, error, error_rms, note
        total = moved.evaluations + len(new)
        for place in new:
            x = fine[0][place[-1]]
            known[place] = compute([x, fine[1][place[0]]] if two else [x], total)
        values = torch.tensor([known[p] for p in places(level)], dtype=torch.float64)
        grid = values.view(level, level) if two else values.view(1, level)
        error, error_rms = _held_out(grid, held, truth)
        if error <= ERROR:
            return grid, error, error_rms, "the held-out error is small enough"
    return grid, error, error_rms, "the finest grid"


def _held_out(grid: Tensor, held: Tensor, truth: Tensor) -> tuple[float, float]:
    """Return the largest and the root-mean-square error at the held-out points / range."""
    along = barycentric(grid.shape[1], held[:, 0])
    if held.shape[1] == 2:
        guess = torch.einsum("pi,ij,pj->p", barycentric(grid.shape[0], held[:, 1]), grid, along)
    else:
        guess = along @ grid[0]
    difference = (guess - truth).abs()
    spread = float(
        torch.cat([grid.flatten(), truth]).max() - torch.cat([grid.flatten(), truth]).min()
    )
    if spread == 0:
        return 0.0, 0.0  # a loss that is the same everywhere
    return float(difference.max()) / spread, float(difference.square().mean().sqrt()) / spread
