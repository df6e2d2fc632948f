"""What a training run is told, without torch, so that the command line can read it quickly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast and with which seed."""

    steps: int = 2000
    """optimiser steps"""
    batch: int = 12
    """windows or images in a step"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov-free momentum"""
    lr: float = 1e-3
    """peak learning rate"""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's two; the first is SGD's momentum"""
    warmup: int = 100
    """steps of warm-up"""
    warmup_shape: Literal["linear", "tenth"] = "linear"
    """the rate in warm-up rises from 0, or stays at a tenth (He et al. 2015)"""
    schedule: Literal["cosine", "linear", "step", "constant"] = "cosine"
    """after warm-up: cosine to a tenth, linear to 0, steps of ten at 1/2 and 3/4, or constant"""
    weight_decay: float = 0.1
    """decay of weights: decoupled in AdamW, part of the gradient in SGD"""
    decay: Literal["matrices", "all"] = "matrices"
    """what decays: matrices and kernels, or every parameter"""
    clip: float = 1.0
    """gradient norm above which the gradient is scaled down; 0 for never"""
    eval_every: int = 250
    """steps between evaluations on the validation text"""
    eval_batches: int = 20
    """batches in an evaluation"""
    seed: int = 0
    """seed of the start, of the data order and of dropout"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "eval_every", "eval_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("warmup", "seed", "weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 0")
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON keeps a list
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"betas {self.betas} must be two numbers from 0 up to 1, such as 0.9,0.98"
            )
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr {self.lr} must be a positive number, for instance 1e-3")

    def rate(self, step: int) -> float:
        """Return the factor on the peak rate at `step` (0-based)."""
        if step < self.warmup:
            return (step + 1) / self.warmup if self.warmup_shape == "linear" else 0.1
        if self.schedule == "step":
            return 10.0 ** -((2 * step >= self.steps) + (4 * step >= 3 * self.steps))
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "linear":
            return 1 - progress
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


# Published ways to train, as fields of TrainConfig.
HE2015: dict[str, Any] = {
    "steps": 64_000,
    "batch": 128,
    "optimizer": "sgd",
    "lr": 0.1,
    "warmup": 0,
    "schedule": "step",
    "weight_decay": 1e-4,
    "decay": "all",
    "clip": 0.0,
    "eval_every": 1000,
}
# The babygpt ladder (simpx, "build your own LLM"): AdamW as torch has it, one rate all along.
BABYGPT: dict[str, Any] = {
    "steps": 5000,
    "batch": 32,
    "lr": 1e-2,
    "betas": (0.9, 0.999),
    "warmup": 0,
    "schedule": "constant",
    "weight_decay": 0.01,
    "decay": "all",
    "clip": 0.0,
    "eval_every": 200,
}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    # He et al. 2015 (arXiv:1512.03385), section 4.2: CIFAR-10; from 110 layers on with warm-up.
    "he2015": HE2015,
    "he2015-warm": HE2015 | {"warmup": 400, "warmup_shape": "tenth"},
    "babygpt": BABYGPT,
    "babygpt-v12": BABYGPT | {"batch": 64, "lr": 3e-4},
}


@dataclass(frozen=True)
class Runtime:
    """How the machine computes it, where `auto` keeps the fastest of a few steps, and looks on."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 runs matrix products under autocast; the weights stay float32"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto tries it only where the run is long enough to pay for it"""
    threads: int = 0
    """CPU threads of one training; 0 keeps what torch chose"""
    watch: int = 100
    """steps from one look at stream and gradients to the next, kept in watch.jsonl; 0 for none"""

    def __post_init__(self) -> None:
        for name in ("threads", "watch"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 0")
