"""What a training minimises: a mean over the examples of a batch, of outputs and targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Objective = Callable[[Any, Tensor], Tensor]


def cross_entropy(output: Any, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of logits `(..., V)`, or of `output.logits`."""
    logits = logits_of(output)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1))


def squared_error(output: Any, targets: Tensor) -> Tensor:
    """Return the mean squared error of outputs in the targets' shape."""
    return F.mse_loss(output, targets)


def logits_of(output: Any) -> Tensor:
    """Return the logits `(..., V)`: the output itself, or its `logits`."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits
