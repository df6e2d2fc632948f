"""The optimiser's groups of any module: what decays, and what a scheme asks for its parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from addnorm.contract import Group, Wiring, unknown


def parameter_groups(
    model: nn.Module, weight_decay: float, every: bool = False
) -> list[dict[str, Any]]:
    """Split the parameters of any module into optimiser groups.

    A group holds `params`, `weight_decay`, and the factors `lr_scale` and `eps_scale`.

    Matrices (two axes or more) decay, vectors and scalars only with `every`; a wiring's own
    parameters follow its `groups`. Shared parameters are listed once, frozen ones are left out.
    """
    own: dict[int, Group] = {}
    for module in model.modules():
        if isinstance(module, Wiring):
            parameters = dict(module.named_parameters())
            for name, group in module.groups().items():
                if name not in parameters:
                    raise ValueError(
                        unknown(f"parameter in groups() of {module.name}", name, parameters)
                    )
                own[id(parameters[name])] = group
    split: dict[Group, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            group = own.get(id(parameter), Group())
            if group.weight_decay is None:
                group = replace(group, weight_decay=float(every or parameter.dim() >= 2))
            split.setdefault(group, []).append(parameter)
    return [
        {
            "params": params,
            "lr_scale": group.lr,
            "eps_scale": group.eps,
            "weight_decay": weight_decay * (group.weight_decay or 0.0),
        }
        for group, params in split.items()
    ]
