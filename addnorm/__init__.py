"""addnorm: build, train and X-ray the residual stream of deep networks.

The names below are imported when they are first used, so `import addnorm` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from addnorm.branches import Branch, Context, Matrix, Site
    from addnorm.comparison import CompareConfig, compare
    from addnorm.contract import Group, Stack, Wiring, register
    from addnorm.data.images import load_images
    from addnorm.data.sets import DataConfig
    from addnorm.data.text import load_text
    from addnorm.interop import load_gpt2, save_gpt2
    from addnorm.models.encoder import (
        Encoder,
        EncoderConfig,
        from_torch_layers,
        load_torch_layers,
    )
    from addnorm.models.gpt import GPT, GPTConfig
    from addnorm.models.layers import (
        Attention,
        AttentionConfig,
        EmbeddingConfig,
        FeedForward,
        FeedForwardConfig,
        Parallel,
    )
    from addnorm.models.mlp import MLP, MLPConfig
    from addnorm.models.ngpt import NGPT, NGPTConfig
    from addnorm.models.resnet import ResNet, ResNetConfig
    from addnorm.models.zoo import build
    from addnorm.probe.lint import lint
    from addnorm.probe.trace import Trace
    from addnorm.probe.vitals import xray
    from addnorm.probe.watch import watch
    from addnorm.rewiring import Rewired, rewire
    from addnorm.runs import load_run, sample, train
    from addnorm.training.config import Runtime, TrainConfig

__version__ = "0.1.0"

_HOMES = {
    "branches": ("Branch", "Context", "Matrix", "Site"),
    "comparison": ("CompareConfig", "compare"),
    "contract": ("Group", "Stack", "Wiring", "register"),
    "data.images": ("load_images",),
    "data.sets": ("DataConfig",),
    "data.text": ("load_text",),
    "interop": ("load_gpt2", "save_gpt2"),
    "models.encoder": ("Encoder", "EncoderConfig", "from_torch_layers", "load_torch_layers"),
    "models.gpt": ("GPT", "GPTConfig"),
    "models.layers": (
        "Attention",
        "AttentionConfig",
        "EmbeddingConfig",
        "FeedForward",
        "FeedForwardConfig",
        "Parallel",
    ),
    "models.ngpt": ("NGPT", "NGPTConfig"),
    "models.mlp": ("MLP", "MLPConfig"),
    "models.resnet": ("ResNet", "ResNetConfig"),
    "models.zoo": ("build",),
    "probe.lint": ("lint",),
    "probe.trace": ("Trace",),
    "probe.vitals": ("xray",),
    "probe.watch": ("watch",),
    "rewiring": ("Rewired", "rewire"),
    "runs": ("load_run", "sample", "train"),
    "training.config": ("Runtime", "TrainConfig"),
}

__all__ = [
    "GPT",
    "MLP",
    "NGPT",
    "Attention",
    "AttentionConfig",
    "Branch",
    "CompareConfig",
    "Context",
    "DataConfig",
    "EmbeddingConfig",
    "Encoder",
    "EncoderConfig",
    "FeedForward",
    "FeedForwardConfig",
    "GPTConfig",
    "Group",
    "MLPConfig",
    "Matrix",
    "NGPTConfig",
    "Parallel",
    "ResNet",
    "ResNetConfig",
    "Rewired",
    "Runtime",
    "Site",
    "Stack",
    "Trace",
    "TrainConfig",
    "Wiring",
    "build",
    "compare",
    "from_torch_layers",
    "lint",
    "load_gpt2",
    "load_images",
    "load_run",
    "load_text",
    "load_torch_layers",
    "register",
    "rewire",
    "sample",
    "save_gpt2",
    "train",
    "watch",
    "xray",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"addnorm.{home}"), name)
    raise AttributeError(f"module 'addnorm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
