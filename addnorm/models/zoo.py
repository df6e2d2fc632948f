"""Every kind of network and every preset by name: what `--model` and `--preset` may say.

A *kind* is a config class and the model that eats it. A *preset* is a kind with the sizes of a
known network, and, where its authors state one, the recipe it was trained by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import nn

from addnorm.contract import parse_spec, unknown
from addnorm.models.babygpt import LADDER
from addnorm.models.encoder import Encoder, EncoderConfig
from addnorm.models.gpt import GPT, GPTConfig
from addnorm.models.layers import AttentionConfig, EmbeddingConfig, FeedForwardConfig
from addnorm.models.mlp import MLP, MLPConfig
from addnorm.models.ngpt import NGPT, NGPTConfig
from addnorm.models.resnet import ResNet, ResNetConfig


class NetworkConfig(Protocol):
    """What every config states; `depth` is in layers."""

    @property
    def depth(self) -> int:
        """The number of layers, or what names a ResNet's depth."""


@dataclass(frozen=True)
class Kind:
    """A family of networks."""

    config: Callable[..., Any]  # the config class
    model: Callable[[Any], nn.Module]
    reads: Literal["text", "images", "vectors"]
    fit: Mapping[str, str] = field(default_factory=dict)  # config field: what it is of the data
    shape: Mapping[str, Any] = field(default_factory=dict)  # fields that `--model` sets


TEXT = {"vocab_size": "vocab_size", "context": "context"}
IMAGES = {"classes": "classes", "channels": "channels"}
KINDS: Mapping[str, Kind] = {
    "gpt": Kind(GPTConfig, GPT, "text", TEXT),
    "ngpt": Kind(NGPTConfig, NGPT, "text", TEXT),
    "resnet": Kind(ResNetConfig, ResNet, "images", IMAGES),
    "mlp": Kind(
        MLPConfig, MLP, "images", {"in_dim": "pixels", "out_dim": "classes"}, {"flatten": True}
    ),
    "encoder": Kind(EncoderConfig, Encoder, "vectors"),
}


@dataclass(frozen=True)
class Preset:
    """A known network: its kind, its sizes, and the name of the recipe that trained it."""

    kind: str
    shape: Mapping[str, Any]
    recipe: str = ""


def _resnets() -> dict[str, Preset]:
    found = {}
    for depth in (20, 32, 44, 56, 110, 1202):
        recipe = "he2015-warm" if depth >= 110 else "he2015"
        found[f"resnet{depth}"] = Preset("resnet", {"depth": depth}, recipe)
    for depth in (164, 1001):
        shape = {"depth": depth, "wiring": "residual", "block": "bottleneck"}
        found[f"preresnet{depth}"] = Preset("resnet", shape, "he2015-warm")
    for depth in (18, 34, 50, 101, 152):
        shape = {"depth": depth, "stem": "imagenet", "width": 64, "classes": 1000}
        found[f"resnet{depth}"] = Preset("resnet", shape)
    return found


PRESETS: Mapping[str, Preset] = {
    **{
        name: Preset("gpt", shape, "babygpt-v12" if name == "babygpt-v12" else "babygpt")
        for name, shape in LADDER.items()
    },
    "gpt2": Preset(
        "gpt",
        {
            "depth": 12,
            "dim": 768,
            "heads": 12,
            "context": 1024,
            "tied": True,
            "dropout": 0.1,
            "embedding": EmbeddingConfig(embedding_dropout=0.1, embedding_start="gpt2"),
            "attention": AttentionConfig(attention_dropout=0.1),
            "feedforward": FeedForwardConfig(activation="gelu-tanh"),
            "vocab_size": 50257,
        },
    ),
    "char-small": Preset("gpt", {"depth": 4, "dim": 128, "heads": 4, "context": 64}),
    "char-large": Preset("gpt", {"depth": 6, "dim": 384, "heads": 6, "context": 256}),
    **_resnets(),
}


def network(name: str) -> tuple[str, Any]:
    """Return the kind and the config that a kind or a preset stands for.

    Raises `ValueError` for an unknown name.
    """
    if name in PRESETS:
        preset = PRESETS[name]
        return preset.kind, KINDS[preset.kind].config(**preset.shape)
    if name in KINDS:
        return name, KINDS[name].config(**KINDS[name].shape)
    raise ValueError(unknown_network("model", name, [*KINDS, *PRESETS]))


def unknown_network(what: str, name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown `what`; of names that end in a number the nearest is meant.

    `resnet21` is nearer to resnet20 than to resnet32, which shares as many letters.
    """
    known = list(known)
    stem, number = _numbered(name)
    near = {other: _numbered(other)[1] for other in known if _numbered(other)[0] == stem}
    if not number or not any(near.values()):
        return unknown(what, name, known)
    meant = min((n for n in near if near[n]), key=lambda n: abs(int(near[n]) - int(number)))
    return f"unknown {what} {name!r}; did you mean {meant!r}? (known: {', '.join(known)})"


def _numbered(name: str) -> tuple[str, str]:
    """Split a name into what stands before the number at its end, and the number."""
    stem = name.rstrip("0123456789")
    return stem, name[len(stem) :]


def build(name: str, **changes: Any) -> nn.Module:
    """Return the model of a kind or preset with some fields of its config changed.

    `build("babygpt-v7", vocab_size=6148)`. Raises `ValueError` for an unknown name or field, and
    for a config that does not fit.
    """
    kind, config = network(name)
    known = [f.name for f in dataclasses.fields(config)]
    for key in changes:
        if key not in known:
            raise ValueError(unknown(f"field of {name}", key, known))
    return KINDS[kind].model(dataclasses.replace(config, **changes))


def fitted(kind: str, config: Any, shape: Mapping[str, int]) -> Any:
    """Return `config` with the fields that the data decide, such as the size of the vocabulary."""
    fit = {ours: shape[theirs] for ours, theirs in KINDS[kind].fit.items()}
    return dataclasses.replace(config, **fit)


def start_of(config: Any) -> str:
    """Return the name of the start that the branches of a network have."""
    return str(config.start or parse_spec(config.wiring).wiring.start)


def training_flops(model: nn.Module, shape: Mapping[str, int]) -> int:
    """Return the FLOPs of a training step per token, or per image of this shape.

    6 N + 12 L T C of a GPT; six multiply-adds' worth, forward and backward, of other networks.
    """
    if isinstance(model, GPT):
        return model.flops_per_token()
    if isinstance(model, ResNet):
        return 6 * model.flops(shape["size"])
    return 6 * sum(p.numel() for p in model.parameters() if p.dim() >= 2)


def kind_of(model: nn.Module) -> str:
    """Return the kind of a model of ours, or an empty string."""
    for name, kind in KINDS.items():
        if type(model) is kind.model:
            return name
    return ""
