"""The loss around the weights: in random filter-normalised directions, on a line, on a path."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from addnorm.contract import unknown
from addnorm.probe.losses import Loss, Progress
from addnorm.probe.purity import unwrap
from addnorm.probe.surface import HELD_OUT, Landscape, Moved, Plan, surface, tensors_of

NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance norms of every kind
)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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
    plan = Plan(box, points, budget, evaluations, seed, progress)
    return surface(model, (inputs, targets, loss), directions, plan, "random")


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
    own = {n: t for n, t in tensors_of(model).items() if n in start}
    step = {
        n: end[n].to(t) - start[n].to(t)
        for n, t in own.items()
        if t.is_floating_point()  # a count of batches cannot lie between two
    }
    plan = Plan([span], points, budget, evaluations, seed, progress)
    return surface(model, (inputs, targets, loss), [step], plan, "line", origin=start)


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
    plan = Plan(box, points, budget, evaluations, seed, progress)
    batch = (inputs, targets, loss)
    losses = []
    with Moved(model, batch, [], None) as probe:
        for state in states:
            losses.append(probe.of_state(state))
    made = surface(model, batch, directions, plan, "trajectory", origin=states[-1])
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
