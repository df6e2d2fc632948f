"""Which branches are dead: they do nothing with the stream, and no step would change that."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from addnorm.probe.structure import Join, Structure
from addnorm.probe.tap import Point, Visitor

OFFSET = 1e-3  # 1 - cosine up to which a gradient is the incoming vector alone


class Pulse(Visitor):
    """Notes the branches that are dead, with how it shows.

    Dead: what a branch adds is the same at every position of the batch, and a vector-Jacobian
    product from there finds no parameter but offsets. A branch that starts silent (an output matrix
    or a factor of 0) has one, and one that is constant because its units are off has none. A branch
    is dead as well when it is cut off from its own parameters. Only what is the same everywhere
    costs a product, of one branch.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self.modules = dict(model.named_modules())
        self.joins = structure.joins
        self.dead: dict[int, str] = {}

    def __call__(self, k: int, point: Point) -> None:
        """Look at what the branch returned."""
        join = self.joins[k]
        if join.kind == "block":
            return
        if point.update.grad_fn is None:
            if self._trainable(join):
                self.dead[k] = "no gradient reaches its parameters"
            return
        with torch.no_grad():
            rows = _rows(point.update, join.features)
            if len(rows) < 2 or not bool((rows == rows[:1]).all()):
                return
            silent = not bool(rows.any())
        parameters = _between(point.stream, point.update)
        if parameters and not self._learns(point.update, parameters, join.features):
            self.dead[k] = "it adds 0" if silent else "it adds the same at every position"

    def _trainable(self, join: Join) -> bool:
        """Whether the module that made the update, else its block, is not frozen on purpose."""
        for name in (join.name.partition("#")[0], join.block, ""):
            own = list(self.modules[name].parameters()) if name in self.modules else []
            if own:
                return any(p.requires_grad for p in own)
        return False

    def _learns(self, update: Tensor, parameters: list[nn.Parameter], features: int) -> bool:
        """Whether a gradient reaches a parameter that is more than an offset."""
        generator = torch.Generator(update.device).manual_seed(0)
        vector = torch.randn(update.shape, generator=generator, device=update.device)
        vector = vector.to(update.dtype)
        alone = _rows(vector, features).float().sum(dim=0)
        for parameter in parameters:  # the nearest first, whose products are cheap
            (gradient,) = torch.autograd.grad(
                update, parameter, vector, retain_graph=True, allow_unused=True
            )
            if gradient is None or not bool(gradient.any()):
                continue
            if gradient.numel() != alone.numel():
                return True
            flat = gradient.flatten().float()
            cosine = torch.dot(flat, alone).abs() / (flat.norm() * alone.norm())
            if not bool(cosine > 1 - OFFSET):
                return True
        return False


def _between(stream: Any, update: Tensor) -> list[nn.Parameter]:
    """Return the parameters that the update is made with, the nearest first, and not the stream."""
    seen = {t.grad_fn for t in pytree.tree_leaves(stream) if isinstance(t, Tensor)}
    found: dict[nn.Parameter, None] = {}
    ahead = deque([update.grad_fn])
    while ahead:
        maker = ahead.popleft()
        if maker is None or maker in seen:
            continue
        seen.add(maker)
        variable = getattr(maker, "variable", None)
        if isinstance(variable, nn.Parameter):
            found[variable] = None
        ahead += [following for following, _ in maker.next_functions]
    return list(found)


def _rows(x: Tensor, features: int) -> Tensor:
    """Return `(positions, features)`."""
    return x.reshape(1, -1) if x.dim() < 2 else x.movedim(features, -1).flatten(0, -2)
