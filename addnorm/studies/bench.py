"""What the studies build and train with: the package's data, models and trainer, one thread.

Every condition with one seed has the same start where its shapes allow, and the same batches in
the same order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from addnorm.data.images import ImageData, load_images
from addnorm.data.text import TextData, load_text
from addnorm.models.gpt import GPT, GPTConfig
from addnorm.models.mlp import MLP, MLPConfig
from addnorm.training.config import Runtime, TrainConfig
from addnorm.training.loop import Watcher, train_loop
from addnorm.training.objective import Objective, cross_entropy
from addnorm.training.run import Data, Run
from addnorm.training.tune import Choice

CHANCE = math.log(10)  # nats, of guessing one of ten digits
UNIGRAM = 3.27  # nats: the built-in text, guessed by the frequency of its characters
UNIFORM = math.log(103)  # nats: its characters, guessed as equally frequent
SGD: dict[str, Any] = {
    "batch": 128,
    "optimizer": "sgd",
    "betas": (0.9, 0.999),
    "warmup": 0,
    "schedule": "constant",
    "weight_decay": 1e-4,
    "clip": 5.0,
}
ADAM: dict[str, Any] = {
    "batch": 128,
    "betas": (0.9, 0.999),
    "warmup": 0,
    "schedule": "constant",
    "weight_decay": 0.0,
    "clip": 5.0,
}


@functools.cache
def digits() -> ImageData:
    """Return the 1,797 real 8x8 digits of scikit-learn, every fifth held out."""
    return load_images("digits", augment="off")


@functools.cache
def text(context: int) -> TextData:
    """Return the built-in English corpus by characters, in windows of `context`."""
    return load_text("pydoc", context)


def mlp(seed: int, depth: int, wiring: str, **changes: Any) -> MLP:
    """Return an MLP on digits; `depth` counts connections, a two-layer branch is one of them."""
    torch.manual_seed(seed)
    settings = {"flatten": True, "activation": "relu", "dim": 64, "in_dim": 64, **changes}
    return MLP(MLPConfig(depth=depth, wiring=wiring, **settings))


def gpt(seed: int, depth: int, wiring: str, context: int, **changes: Any) -> GPT:
    """Return a character GPT on the built-in text."""
    torch.manual_seed(seed)
    vocabulary = text(context).vocab_size
    settings = {"dim": 64, "heads": 4, **changes}
    return GPT(
        GPTConfig(depth=depth, wiring=wiring, context=context, vocab_size=vocabulary, **settings)
    )


def trained(
    model: nn.Module,
    data: Data,
    seed: int,
    *,
    watcher: Watcher | None = None,
    objective: Objective = cross_entropy,
    **settings: Any,
) -> Run:
    """Train `model` on the CPU in float32 with the package's trainer and return the run.

    `settings` are those of `TrainConfig`; it is evaluated at both ends unless told otherwise.
    """
    steps = settings["steps"]
    config = TrainConfig(**{"eval_every": steps, **settings, "seed": seed})
    return train_loop(
        model,
        data,
        config,
        Runtime(device="cpu", watch=0),
        choice=Choice(precision="float32", threads=1),
        watcher=watcher,
        objective=objective,
    )


def training_set(data: ImageData) -> tuple[Tensor, Tensor]:
    """Return all training images `(N, C, S, S)` and labels `(N,)`, the first epoch of seed 0."""
    x, y = data.training_batch(0, 0, len(data.training))
    return torch.from_numpy(x), torch.from_numpy(y)


def test_set(data: ImageData) -> tuple[Tensor, Tensor]:
    """Return all test images `(N, C, S, S)` and labels `(N,)`."""
    x, y = next(iter(data.validation_batches(len(data.validation), 1)))
    return torch.from_numpy(x), torch.from_numpy(y)


@torch.no_grad()
def refit(model: nn.Module, x: Tensor) -> None:
    """Set the statistics of every BatchNorm to those of `x`, all of it one batch.

    What it gathered in training lags behind the weights: at a constant rate a deep network can
    then seem worse than it is.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        model(x)
    for norm, momentum in zip(norms, before, strict=True):
        norm.eval()
        norm.momentum = momentum


@torch.no_grad()
def loss_on(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return loss in nats and share right of a classifier on `x`, in evaluation mode."""
    model.eval()
    logits = model(x)
    right = (logits.argmax(-1) == y).float().mean().item()
    return cross_entropy(logits, y).item(), right


def steps_to(losses: Sequence[float], target: float, decay: float = 0.9) -> float:
    """Return the first step whose running mean of the loss is below `target`; NaN where none is.

    The mean is exponential, corrected for its start as Adam's are.
    """
    mean, weight = 0.0, 0.0
    for step, loss in enumerate(losses, 1):
        mean, weight = decay * mean + (1 - decay) * loss, decay * weight + (1 - decay)
        if mean / weight < target:
            return float(step)
    return math.nan


class Pairs:
    """Inputs `(N, ...)` with targets `(N, ...)`, in batches; nothing is held out."""

    unit = "examples"

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs.numpy(), targets.numpy()

    def training_batch(self, seed: int, step: int, size: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return a random batch; seed and step alone decide it."""
        chosen = np.random.default_rng((seed, step)).integers(len(self.inputs), size=size)
        return self.inputs[chosen], self.targets[chosen]

    def validation_batches(
        self, size: int, batches: int
    ) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Yield the first `size * batches` pairs."""
        for first in range(0, min(size * batches, len(self.inputs)), size):
            yield self.inputs[first : first + size], self.targets[first : first + size]


def deep_gpt(
    seed: int, wiring: str, steps: int, *, depth: int = 12, context: int = 32, rate: float = 1e-3
) -> Run:
    """Train a narrow deep character GPT, a fifth of the steps warm-up; its model is in eval mode.

    Batches of 16 windows, AdamW of the package's default, cosine decay to a tenth.
    """
    model = gpt(seed, depth, wiring, context)
    settings: dict[str, Any] = {"steps": steps, "warmup": steps // 5, "batch": 16, "lr": rate}
    run = trained(model, text(context), seed, **settings)
    model.eval()
    return run


def windows(context: int, count: int = 128) -> tuple[Tensor, Tensor]:
    """Return `count` windows of validation text and what follows each character, `(count, T)`."""
    x, y = next(iter(text(context).validation_batches(count, 1)))
    return torch.as_tensor(x), torch.as_tensor(y)
