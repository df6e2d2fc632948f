"""What a training run is told, without torch, so that the command line can read it quickly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast and with which seed."""

    steps: int = 2000
    """optimiser steps"""
    batch: int = 12
    """windows in a step"""
    lr: float = 1e-3
    """peak learning rate of AdamW"""
    warmup: int = 100
    """steps over which the rate rises linearly from 0"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """what the rate does after warm-up: cosine to a tenth, linear to 0, or nothing"""
    weight_decay: float = 0.1
    """decoupled weight decay on matrices"""
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
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr {self.lr} must be a positive number, for instance 1e-3")

    def rate(self, step: int) -> float:
        """Return the factor on the peak rate at `step` (0-based)."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "linear":
            return 1 - progress
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Runtime:
    """How the machine computes it; `auto` measures a few steps and keeps the fastest."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 runs matrix products under autocast; the weights stay float32"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto tries it only where the run is long enough to pay for it"""
    threads: int = 0
    """CPU threads of one training; 0 keeps what torch chose"""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError(f"threads {self.threads} must be at least 0")
