"""addnorm: build, train and X-ray the residual stream of deep networks.

The names below are imported when they are first used, so `import addnorm` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from addnorm.branches import Branch, Context, Matrix, Site
    from addnorm.comparison import CompareConfig, compare
    from addnorm.contract import Group, Stack, Wiring
    from addnorm.data.text import load_text
    from addnorm.models.gpt import GPT, GPTConfig
    from addnorm.models.layers import Attention, FeedForward
    from addnorm.models.mlp import MLP, MLPConfig
    from addnorm.probe.trace import Trace
    from addnorm.probe.vitals import xray
    from addnorm.runs import load_run, sample, train
    from addnorm.training.config import Runtime, TrainConfig

__version__ = "0.1.0"

_HOMES = {
    "branches": ("Branch", "Context", "Matrix", "Site"),
    "comparison": ("CompareConfig", "compare"),
    "contract": ("Group", "Stack", "Wiring"),
    "data.text": ("load_text",),
    "models.gpt": ("GPT", "GPTConfig"),
    "models.layers": ("Attention", "FeedForward"),
    "models.mlp": ("MLP", "MLPConfig"),
    "probe.trace": ("Trace",),
    "probe.vitals": ("xray",),
    "runs": ("load_run", "sample", "train"),
    "training.config": ("Runtime", "TrainConfig"),
}

__all__ = [
    "GPT",
    "MLP",
    "Attention",
    "Branch",
    "CompareConfig",
    "Context",
    "FeedForward",
    "GPTConfig",
    "Group",
    "MLPConfig",
    "Matrix",
    "Runtime",
    "Site",
    "Stack",
    "Trace",
    "TrainConfig",
    "Wiring",
    "compare",
    "load_run",
    "load_text",
    "sample",
    "train",
    "xray",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"addnorm.{home}"), name)
    raise AttributeError(f"module 'addnorm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
