"""Which network a command line asks for, known before its options are read.

`--model`, `--preset` and `--recipe` decide what options there are and where they begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from addnorm.contract import unknown
from addnorm.models.zoo import KINDS, PRESETS, network, unknown_network
from addnorm.training.config import RECIPES


@dataclass(frozen=True)
class OwnConfig:
    """What is asked of a network of the user's own: what it reads."""

    reads: Literal["text", "images"] = "text"
    """text: tokens (B, T) to (B, T, V); images: (B, C, H, W) to (B, classes)"""
    context: int = 64
    """tokens that the model sees at once"""


@dataclass(frozen=True)
class Asked:
    """The network and the recipe that the words of a command line name."""

    model: str  # as it was written: a kind, a preset, or pkg.module:function
    kind: str  # empty for a function of the user's
    config: Any
    recipe: dict[str, Any]

    @property
    def reads(self) -> str:
        """`text` or `images`."""
        return KINDS[self.kind].reads if self.kind else str(self.config.reads)


def asked(argv: Sequence[str]) -> Asked:
    """Return what `--model`, `--preset` and `--recipe` of a command line name (see `named`)."""
    return named(*(word(argv, name) for name in ("--model", "--preset", "--recipe")))


def named(model: str, preset: str = "", recipe: str = "") -> Asked:
    """Return the network and the recipe that these names stand for; GPT where there is none.

    Raises `ValueError` for unknown names, and for both a model and a preset.
    """
    if model and preset:
        raise ValueError("--preset names a network and how it is trained; leave --model out")
    if preset and preset not in PRESETS:
        raise ValueError(unknown_network("preset", preset, PRESETS))
    name = preset or model or "gpt"
    recipe = recipe or (PRESETS[preset].recipe if preset else "")
    if recipe and recipe not in RECIPES:
        raise ValueError(unknown("recipe", recipe, RECIPES))
    training = dict(RECIPES[recipe]) if recipe else {}
    if ":" in name:
        return Asked(name, "", OwnConfig(), training)
    if name.endswith(".py"):
        raise ValueError(
            f"{name!r} names no function; write {name}:FUNCTION, which returns a model"
        )
    trainable = [kind for kind, facts in KINDS.items() if facts.reads != "vectors"]
    if name in KINDS and name not in trainable:
        raise ValueError(f"{name} reads vectors and cannot be trained from the command line")
    if name not in (*KINDS, *PRESETS):
        raise ValueError(unknown_network("model", name, [*trainable, *PRESETS]))
    kind, config = network(name)
    return Asked(name, kind, config, training)


def word(argv: Sequence[str], option: str) -> str:
    """Return the word after `option`, or an empty string."""
    for i, given in enumerate(argv):
        name, equals, value = given.partition("=")
        if name == option:
            return value if equals else [*argv, ""][i + 1]
    return ""
