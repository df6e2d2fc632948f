"""What `watch` reads of the parameters: the gradients, and how far a step moves the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from addnorm.probe.watch_places import Place

GRADIENT, WEIGHT, UPDATE, ELEMENTS = range(4)  # columns: sums of squares, and how many are summed


class Parameters:
    """Gradients and updates of the parameters, by connection and for the rest."""

    def __init__(self, model: nn.Module, places: list[Place]) -> None:
        self._model = model
        self._labels = [place.label for place in places] + ["rest"]
        self._paths = [f"{place.path}." for place in places]
        self._sums: Tensor | None = None
        self._true = [0] * len(self._labels)  # elements, of sharded parameters over all processes
        self._names: tuple[str, ...] = ()
        self._owners = self._elements = torch.zeros(0)  # group by parameter; here, by group
        self._parameters: list[nn.Parameter] = []
        self._before: list[Tensor] = []

    @torch.no_grad()
    def read(self, scale: Tensor | None, keep: bool) -> None:
        """Take the gradients, divided by `scale`; with `keep` also the weights before a step."""
        named = {n: p for n, p in self._model.named_parameters() if p.grad is not None}
        if not named:
            return
        self._parameters = list(named.values())  # FSDP2 replaces them
        gradients = [_local(p.grad) for p in self._parameters if p.grad is not None]
        device = gradients[0].device
        self._assign(tuple(named), device)
        self._sums = torch.zeros(len(self._labels), 4, device=device)
        self._add(GRADIENT, gradients, scale)
        self._sums[:, ELEMENTS] = self._elements
        if keep:
            self._before = [_local(p).detach().clone() for p in self._parameters]
            self._add(WEIGHT, self._before)

    def _assign(self, names: tuple[str, ...], device: torch.device) -> None:
        """Find out which connection owns which parameter, again where others have a gradient."""
        if names == self._names:
            return
        rest = len(self._paths)
        owners = [
            next((i for i, path in enumerate(self._paths) if name.startswith(path)), rest)
            for name in names
        ]
        self._names, self._owners = names, torch.tensor(owners).to(device)
        self._true = [0] * len(self._labels)
        here = [0.0] * len(self._labels)
        for owner, parameter in zip(owners, self._parameters, strict=True):
            self._true[owner] += parameter.numel()
            here[owner] += _local(parameter).numel()
        self._elements = torch.tensor(here).to(device)

    @torch.no_grad()
    def compare(self) -> None:
        """Take the difference to the weights before the step."""
        if self._before:
            torch._foreach_sub_(self._before, [_local(p).detach() for p in self._parameters])
            self._add(UPDATE, self._before)
            self._before = []

    def _add(self, column: int, tensors: Sequence[Tensor], scale: Tensor | None = None) -> None:
        assert self._sums is not None
        device = self._sums.device
        norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)
        stacked = torch.stack([norm.to(device) for norm in norms])
        if scale is not None:
            stacked = stacked / scale.to(device)
        self._sums[:, column].index_add_(0, self._owners, stacked.square())

    def take(self, device: torch.device) -> Tensor:
        """Return `(groups, 4)` and forget it; zeros where nothing was read."""
        sums, self._sums, self._parameters = self._sums, None, []
        return torch.zeros(len(self._labels), 4, device=device) if sums is None else sums.to(device)

    def row(self, sums: Sequence[Sequence[float]]) -> dict[str, float]:
        """Return the norms by name, from sums over all processes. A copy in each counts once."""
        row: dict[str, float] = {}
        total = 0.0
        for label, true, group in zip(self._labels, self._true, sums, strict=True):
            if not group[ELEMENTS]:
                continue
            squares = group[GRADIENT] * true / group[ELEMENTS]
            total += squares
            row[f"parameters/{label}/gradient_norm"] = math.sqrt(squares)
            if group[WEIGHT]:
                row[f"parameters/{label}/update_ratio"] = math.sqrt(group[UPDATE] / group[WEIGHT])
        return row | {"parameters/gradient_norm": math.sqrt(total)} if row else row


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that is spread over several."""
    inner = getattr(tensor, "_local_tensor", None)
    return inner if isinstance(inner, Tensor) else tensor
