"""The loss around the weights: along random filter-normalised directions, a path, or a line.

Few points and a polynomial: the loss is computed on a Chebyshev grid, interpolated to the points
of a picture, and held against the loss at random points that the polynomial has not seen. The grid
of n points to an axis lies inside the one of 2n - 1, so refining it repeats nothing.

Letters: n nodes of the Chebyshev grid to an axis, P points of the picture to an axis.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from addnorm.contract import unknown
from addnorm.probe.losses import Loss, Progress, call_model, loss_of
from addnorm.probe.purity import eager, untouched, unwrap

Directions = Sequence[Mapping[str, Tensor]]  # one for each axis: parameter or buffer -> step

LEVELS = (5, 9, 17, 33, 65)  # nodes to an axis, each grid inside the next
HELD_OUT = {1: 16, 2: 35}  # with 17 x 17 and the origin 325 points, an eighth of 51 x 51
ERROR = 0.01  # of the range of the loss; above it the grid is refined
NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance norms of every kind
)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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


def landscape(
    model: nn.Module,
    inputs: Any,
    targets: Any = None,
    *,
    loss: Loss | None = None,
    dimensions: int = 2,
    points: int = 51,
    radius: float = 1.0,
    budget: float = 60.0,
    evaluations: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Landscape:
    """Return the loss along one or two random filter-normalised directions around the weights.

    Li et al. 2018 (arXiv:1712.09913), section 4: a Gaussian direction in which every filter of a
    convolution and every row of a matrix is given the norm of the filter or row it moves. Norms,
    biases and other vectors are not moved; radius 1 is a step as long as the weights themselves.
    One batch throughout, the model in evaluation mode, the same random numbers at every point.
    `inputs`, `targets` and `loss` as in `xray`.

    The grid is refined, up to 65 nodes to an axis but never beyond `points`, while the
    largest error at the held-out points is above 1 % of the range and the budget lasts: `budget`
    seconds and at most `evaluations` forward passes (by default `points ** dimensions`).
    The coarsest grid, 5 nodes to an axis, is always computed; `note` says why it ended. Weights,
    modes, buffers and random state are as before afterwards, also after an error.

    Raises `ValueError` for a setting out of its range, a model without matrices, and a loss that
    is not finite in the picture.
    """
    model = unwrap(model)
    if dimensions not in HELD_OUT:
        raise ValueError(f"dimensions {dimensions!r} must be 1 or 2")
    if not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"radius {radius!r} must be a positive number")
    generator = torch.Generator().manual_seed(seed)
    directions = [filter_normalised(model, generator) for _ in range(dimensions)]
    box = [(-radius, radius)] * dimensions
    plan = _Plan(box, points, budget, evaluations, seed, progress)
    return _surface(model, (inputs, targets, loss), directions, plan, "random")


def line(
    model: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    inputs: Any,
    targets: Any = None,
    *,
    loss: Loss | None = None,
    points: int = 51,
    span: tuple[float, float] = (0.0, 1.0),
    budget: float = 60.0,
    evaluations: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Landscape:
    """Return the loss on the straight line from one state dict to another.

    Coordinate 0 is `start`, 1 is `end` (Goodfellow et al. 2015, arXiv:1412.6544, section 3);
    `span` may reach beyond. Parameters and floating-point buffers (the statistics of batch norms)
    are interpolated, so both ends are the networks themselves; other buffers are those of `start`.
    The rest as in `landscape`.

    Raises `ValueError` where a state does not fit the model, and as `landscape` does.
    """
    model = unwrap(model)
    for name, state in {"start": start, "end": end}.items():
        _fits(model, state, name)
    if not (span[0] < span[1] and all(map(math.isfinite, span))):
        raise ValueError(f"span {span!r} must be two numbers, the smaller first")
    own = {n: t for n, t in _tensors_of(model).items() if n in start}
    step = {
        n: end[n].to(t) - start[n].to(t)
        for n, t in own.items()
        if t.is_floating_point()  # a count of batches cannot lie between two
    }
    plan = _Plan([span], points, budget, evaluations, seed, progress)
    return _surface(model, (inputs, targets, loss), [step], plan, "line", origin=start)


def trajectory(
    model: nn.Module,
    states: Sequence[Mapping[str, Tensor]],
    inputs: Any,
    targets: Any = None,
    *,
    loss: Loss | None = None,
    normalised: bool = False,
    points: int = 51,
    margin: float = 0.2,
    budget: float = 60.0,
    evaluations: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Landscape:
    """Return the loss on the plane that shows most of a path of state dicts, and the path in it.

    The two first principal components of the states (Li et al. 2018, section 7); the last state is
    the origin. By default every parameter counts as it is and the two directions have norm 1, so
    lengths in the picture are lengths in weight space. `normalised`: every filter or row is
    measured in units of its norm in the last state, and what `landscape` does not move is left
    out. The picture reaches `margin` of the path's extent beyond it. Buffers are those of the last
    state; the losses of the states themselves are computed with their own buffers.

    Raises `ValueError` for fewer than three states, states on one line, a state that does not fit
    the model, and as `landscape` does.
    """
    model = unwrap(model)
    if len(states) < 3:
        raise ValueError(f"a trajectory of {len(states)} states needs at least 3; see line()")
    for i, state in enumerate(states):
        _fits(model, state, f"state {i}")
    if not (margin >= 0 and math.isfinite(margin)):
        raise ValueError(f"margin {margin!r} must be at least 0")
    directions, path, explained = _principal(model, states, normalised)
    box = []
    for axis in range(2):
        low, high = min(p[axis] for p in path), max(p[axis] for p in path)
        box.append((low - margin * (high - low), high + margin * (high - low)))
    plan = _Plan(box, points, budget, evaluations, seed, progress)
    batch = (inputs, targets, loss)
    losses = []
    with _Probe(model, batch, [], None) as probe:
        for state in states:
            losses.append(probe.of_state(state))
    made = _surface(model, batch, directions, plan, "trajectory", origin=states[-1])
    facts = {f: getattr(made, f) for f in made.__dataclass_fields__}
    found = {"path": path, "path_losses": losses, "explained": explained}
    return Landscape(**facts | found | {"evaluations": made.evaluations + len(states)})


def filter_normalised(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return a random direction, each filter or row of it as long as the one it moves.

    Raises `ValueError` where the model has no matrix to move.
    """
    direction = {}
    for name, (parameter, axis) in _movable(model).items():
        weight = parameter.detach()
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        direction[name] = drawn * _norms(weight, axis) / _norms(drawn, axis).clamp_min(1e-30)
    if not direction:
        raise ValueError(f"{type(model).__name__} has no matrix that a direction could move")
    return direction


def _movable(model: nn.Module) -> dict[str, tuple[nn.Parameter, int]]:
    """Return the parameters that are moved, each with the axis that counts its filters.

    Those of two axes and more; the affine map of a norm over several axes is none.
    """
    moved, seen = {}, set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.dim() >= 2 and not isinstance(module, NORMS) and id(parameter) not in seen:
                seen.add(id(parameter))  # a tied matrix is moved once
                if parameter.is_floating_point():
                    moved[name] = (parameter, 1 if isinstance(module, TRANSPOSED) else 0)
    return moved


def _norms(weight: Tensor, axis: int) -> Tensor:
    """Return the norm of every slice along `axis`, broadcastable to the weight."""
    others = [i for i in range(weight.dim()) if i != axis]
    norms: Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return norms


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent and other buffers by name, each tensor once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _fits(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Raise `ValueError` where a state does not hold what the model's own state dict holds."""
    own = model.state_dict()
    for name, tensor in state.items():
        if name not in own:
            raise ValueError(f"{what}: " + unknown("name", name, own, f"{type(model).__name__}"))
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{what}: {name} is {tuple(tensor.shape)}, in the model {tuple(own[name].shape)}"
            )
    missing = [name for name in own if name not in state]
    if missing:
        raise ValueError(f"{what} has no {missing[0]}, which {type(model).__name__} holds")


def _principal(
    model: nn.Module, states: Sequence[Mapping[str, Tensor]], normalised: bool
) -> tuple[list[dict[str, Tensor]], list[list[float]], list[float]]:
    """Return two directions, the states in their coordinates, and the shares of variance.

    From the S x S matrix of inner products, so that no more than one parameter of all the states
    is held at a time. The directions are orthonormal in the coordinates in which they were found.
    """
    units: dict[str, Tensor | None] = dict.fromkeys(dict(model.named_parameters()))
    if normalised:
        units = {
            name: _norms(states[-1][name].double(), axis).clamp_min(1e-30)
            for name, (_, axis) in _movable(model).items()
        }

    def rows(name: str) -> Tensor:
        """Return the states' offsets from the last one, (S, elements of the parameter)."""
        unit, last = units[name], states[-1][name].double()
        offsets = (s[name].double() - last for s in states)
        return torch.stack([(o if unit is None else o / unit).flatten() for o in offsets]).cpu()

    gram = sum((r @ r.T for r in map(rows, units)), torch.zeros(len(states), len(states)).double())
    center = torch.eye(len(states)).double() - 1 / len(states)
    values, vectors = torch.linalg.eigh(center @ gram @ center)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    if not values[1] > 1e-10 * values[0]:
        raise ValueError("the states lie on one line; line() shows the loss along it")
    mix = vectors[:, :2] / values[:2].sqrt()  # the centred states times it are the directions
    mix = mix * torch.where(mix[0] < 0, -1.0, 1.0)  # a sign, so that a picture can be repeated
    path = (gram @ center @ mix).tolist()
    directions: list[dict[str, Tensor]] = [{}, {}]
    for name, unit in units.items():
        parts = (center @ mix).T @ rows(name)
        for direction, part in zip(directions, parts, strict=True):
            shaped = part.view(states[-1][name].shape)
            direction[name] = shaped if unit is None else shaped * unit.cpu()
    shares = (values[:2] / values.sum()).tolist()
    return directions, path, shares


# -- one forward pass at a point -----------------------------------------------------------------


class _Probe:
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
        self._tensors = _tensors_of(model)
        self._saved = {n: t.detach().clone() for n, t in self._tensors.items()}
        self._origin = self._saved if origin is None else self._saved | dict(origin)
        self._directions = [
            {n: d.to(self._tensors[n]) for n, d in direction.items()} for direction in directions
        ]
        self._row: tuple[float, dict[str, Tensor]] | None = None
        self._exits = contextlib.ExitStack()
        self.kind = ""
        self.evaluations = 0

    def __enter__(self) -> _Probe:
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
class _Plan:
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


def _surface(
    model: nn.Module,
    batch: tuple[Any, Any, Loss | None],
    directions: Directions,
    plan: _Plan,
    kind: str,
    origin: Mapping[str, Tensor] | None = None,
) -> Landscape:
    """Compute the grid, refine it while it is too coarse and the budget lasts, interpolate it."""
    began = time.monotonic()
    two = plan.dimensions == 2
    generator = torch.Generator().manual_seed(plan.seed + 1)
    held = torch.rand(HELD_OUT[plan.dimensions], plan.dimensions, generator=generator).double()
    held = 2 * held - 1
    levels = [n for n in LEVELS if n <= plan.points or n == LEVELS[0]]
    known: dict[tuple[int, ...], float] = {}  # by the place in the finest grid
    finest = LEVELS[-1] - 1
    note = "the finest grid"

    def places(nodes: int) -> Iterable[tuple[int, ...]]:
        steps = range(0, finest + 1, finest // (nodes - 1))
        return ((i, j) for i in steps for j in steps) if two else ((j,) for j in steps)

    fine = [plan.scale(axis, chebyshev(LEVELS[-1])).tolist() for axis in range(plan.dimensions)]
    with _Probe(model, batch, directions, origin) as probe:

        def compute(point: Sequence[float], total: int) -> float:
            value = probe.at(point)
            if plan.progress is not None:
                plan.progress(probe.evaluations, total)
            return value

        total = plan.cost(levels[0])
        center = compute([0.0] * plan.dimensions, total)
        units = [plan.scale(axis, held[:, axis]).tolist() for axis in range(plan.dimensions)]
        losses_held = [compute(point, total) for point in zip(*units, strict=True)]
        truth = torch.tensor(losses_held, dtype=torch.float64)
        nodes, grid, matrices = 0, torch.empty(0), []
        error = error_rms = math.inf
        for level in levels:
            new = [place for place in places(level) if place not in known]
            spent = time.monotonic() - began
            ahead = spent / probe.evaluations * len(new)
            if nodes and probe.evaluations + len(new) > plan.most:
                note = f"{level} nodes to an axis would pass {plan.most} evaluations"
                break
            if nodes and spent + ahead > plan.budget:
                note = f"{level} nodes to an axis would pass {plan.budget:g} s"
                break
            total = probe.evaluations + len(new)
            for place in new:
                x = fine[0][place[-1]]
                known[place] = compute([x, fine[1][place[0]]] if two else [x], total)
            nodes = level
            values = torch.tensor([known[p] for p in places(level)], dtype=torch.float64)
            grid = values.view(level, level) if two else values.view(1, level)
            error, error_rms = _held_out(grid, held, truth)
            if error <= ERROR:
                note = "the held-out error is small enough"
                break
    picture = torch.linspace(-1, 1, plan.points, dtype=torch.float64)
    matrices = [barycentric(nodes, picture)] * 2 if two else [torch.ones(1, 1).double()]
    losses = matrices[0] @ grid @ barycentric(nodes, picture).T
    return Landscape(
        kind=kind,
        loss_kind=probe.kind,
        x=plan.scale(0, picture).tolist(),
        y=plan.scale(1, picture).tolist() if two else [0.0],
        losses=losses.tolist(),
        center=center,
        nodes=nodes,
        evaluations=probe.evaluations,
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
