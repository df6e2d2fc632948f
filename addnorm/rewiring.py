"""Put a trained model under another wiring, and say what of it was kept."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from addnorm.contract import Stack, parse_spec

Model = TypeVar("Model", bound=nn.Module)
# What a name says of a connection's norm in every wiring: in front of the branch, behind it, after
# the addition.
NORMS = ("norm_in", "norm_out", "norm")


@dataclass(frozen=True, eq=False)
class Rewired(Generic[Model]):
    """A model under its new wiring, and the names of its tensors by what became of them."""

    model: Model
    kept: tuple[str, ...]  # in the new model with the old values
    fresh: tuple[str, ...]  # in the new model with the values that the new wiring starts from
    dropped: tuple[str, ...]  # only in the old model, or of another meaning or shape there

    def __str__(self) -> str:
        """Return three lines: what was kept, what starts fresh, what was dropped."""
        return "\n".join(
            f"{what:8} {_summary(names)}"
            for what, names in (
                ("kept", self.kept),
                ("fresh", self.fresh),
                ("dropped", self.dropped),
            )
        )


def rewire(model: Model, wiring: str) -> Rewired[Model]:
    """Return a new model under another wiring, with everything kept that keeps its meaning.

    `model`: a GPT, an MLP, or any module that is built from its config alone, holds it as `config`
    with a field `wiring`, and holds one `Stack`. The old model is not touched.

    Kept are tensors of the same name and shape: the branches, what lies outside the stack, such as
    embeddings, head and final norm, and the norms that stand in the same place of a connection
    (`norm_in`, `norm_out`, `norm`). What else a wiring has learned keeps its meaning only under the
    same equation with the same options. The rest starts as the new wiring does.

    Kept weights are not rescaled: where a scheme starts its branches differently, as DeepNorm with
    its beta, the new model has the branches of the old one and not that start. Device, dtype,
    frozen parameters and train or eval are those of the old model.

    Raises `ValueError` for a model without such a config or stack, and for an unknown wiring.
    """
    spec = parse_spec(wiring)
    config: Any = getattr(model, "config", None)
    if not dataclasses.is_dataclass(config) or not hasattr(config, "wiring"):
        raise ValueError(f"{type(model).__name__} has no config with a field 'wiring' to change")
    was = _stack_of(model)[1].spec
    changed: Any = dataclasses.replace(config, wiring=str(spec))  # type: ignore[type-var]
    new = type(model)(changed)
    _like(new, model)
    prefix, stack = _stack_of(new)
    now = stack.spec
    alike = (was.wiring.equation, was.options) == (now.wiring.equation, now.options)
    old, tensors = model.state_dict(), new.state_dict()
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if name in old and old[name].shape == tensor.shape and (alike or _lasts(name, prefix))
    }
    with torch.no_grad():
        for name, tensor in kept.items():
            tensor.copy_(old[name])  # a view of the model's own tensor
    learned = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in new.named_parameters(remove_duplicate=False):
        if name in kept:
            parameter.requires_grad_(learned[name].requires_grad)
    new.train(model.training)
    fresh = tuple(name for name in tensors if name not in kept)
    return Rewired(new, tuple(kept), fresh, tuple(name for name in old if name not in kept))


def _lasts(name: str, stack: str) -> bool:
    """Return whether a tensor means the same under every wiring; names below `stack` begin so."""
    found = re.match(rf"{re.escape(stack)}connections\.\d+\.(\w+)", name)
    return found is None or found[1] in ("branch", *NORMS)


def _stack_of(model: nn.Module) -> tuple[str, Stack]:
    """Return the one stack of the model and what its tensors' names begin with."""
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, Stack)]
    if len(stacks) != 1:
        raise ValueError(f"{type(model).__name__} has {len(stacks)} stacks, not one, to rewire")
    name, stack = stacks[0]
    return f"{name}." if name else "", stack


def _like(new: nn.Module, old: nn.Module) -> None:
    """Move the new model to the device and dtype of the old one."""
    tensor: Tensor | None = next(old.parameters(), None)
    if tensor is not None:
        new.to(device=tensor.device, dtype=tensor.dtype)


def _summary(names: Iterable[str]) -> str:
    """Return the number of tensors and their names, a number in a name as *, with how often."""
    patterns = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    parts = [f"{name} ({times})" if times > 1 else name for name, times in patterns.items()]
    return f"{patterns.total()}: {', '.join(parts)}" if parts else "nothing"
