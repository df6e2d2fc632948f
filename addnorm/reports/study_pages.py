"""The pages of studies: one per study and an index, both languages inside; no torch."""

from __future__ import annotations

from pathlib import Path


def write_study_pages(out: Path, lang: str = "en") -> None:
    """Write a page for every result in `out`, and `index.html`."""
