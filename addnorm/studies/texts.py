"""The glossary and the reading path, as plain values; no torch."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any


def load_glossary() -> list[dict[str, Any]]:
    """Return the entries of the glossary in their order.

    Each has `topic` and `defined` in both languages, `en` (the term), `zh` (its renderings, the
    usual one first), `wrong` (renderings that mislead) and `see` ("study NAME", "wiring NAME").
    """
    data = _toml("glossary.toml")
    blank: dict[str, Any] = {"wrong": [], "see": []}
    return [{**blank, **entry, "topic": data["topics"][entry["topic"]]} for entry in data["entry"]]


def load_reading() -> list[dict[str, Any]]:
    """Return the steps of the reading path: `title`, `text` in both languages, `studies`."""
    steps: list[dict[str, Any]] = _toml("reading.toml")["step"]
    return steps


def _toml(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files("addnorm.studies").joinpath(name).read_text("utf-8"))
