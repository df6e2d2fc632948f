"""What is called and what is measured: the arguments of a model, its tensors, the scalar loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Any, Any], Tensor]
Progress = Callable[[int, int], None]  # done, total


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call with a tensor, a tuple of arguments, or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def fields_of(output: Any) -> Mapping[str, Any]:
    """Return the named fields of a mapping or of an object such as a dataclass."""
    if isinstance(output, Mapping):
        return output
    if isinstance(output, Tensor):
        return {}
    own: Mapping[str, Any] = getattr(output, "__dict__", {})
    return own


def floats_in(value: Any) -> list[Tensor]:
    """Return the floating-point tensors in a tensor, tuple, list, mapping or record, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, tuple | list):
        return [t for v in value for t in floats_in(v)]
    return [t for v in fields_of(value).values() for t in floats_in(v)]


def loss_of(output: Any, targets: Any, loss: Loss | None) -> tuple[Tensor, str]:
    """Return the scalar that is measured, and what it is.

    `loss(output, targets)` where it is given; else the output's own `.loss`; else cross-entropy in
    nats where there are targets; else the inner product with a fixed random direction. Raises
    `ValueError` where the output holds no floating-point tensor.
    """
    if loss is not None:
        return loss(output, targets), "the loss that was given"
    fields = fields_of(output)
    own = fields.get("loss")
    if isinstance(own, Tensor):
        return own, "the model's own loss"
    found = floats_in(fields.get("logits", output))
    if not found:
        raise ValueError("the model returned no floating-point tensor; give loss=")
    if targets is not None:
        logits = found[0].reshape(-1, found[0].shape[-1]).float()
        return F.cross_entropy(logits, targets.reshape(-1)), "cross-entropy"
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(found[0].shape, generator=generator).to(found[0].device)
    return (found[0].float() * direction).sum() / math.sqrt(found[0].numel()), "random direction"
