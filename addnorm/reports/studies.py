"""The studies in the terminal: the live table, the list of verdicts, the claims; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from addnorm.reports.study_words import (
    MODES,
    effect_in,
    probability,
    text_in,
    verdict_in,
)

COLOURS = {"SUPPORTED": "green", "REFUTED": "red", "INCONCLUSIVE": "yellow", "": "dim"}


class LiveStudies:
    """A table on the console with a row per study, filled while the cells are computed.

    It hears what `addnorm.studies.running.StudyObserver` does. Where the console is no terminal it
    prints one line per concluded study.
    """

    def __init__(self, console: Console, lang: str) -> None:
        self.console, self.lang = console, lang
        self.live = Live(console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, message: str) -> None:
        """Print a sentence."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def begin(self, studies: Sequence[Any], mode: str, cells: Sequence[tuple[int, int]]) -> None:
        """Take the studies, and of each how many cells it has and how many are known."""

    def cell(self, study: Any, row: Mapping[str, Any]) -> None:
        """Take one row."""

    def concluded(self, study: Any, result: Mapping[str, Any]) -> None:
        """Take the result of a study."""
        if self.live is None:
            self.say(f"{result['id']} {result['name']}: {verdict_in(result['verdict'], self.lang)}")


def print_studies(console: Console, rows: Sequence[Mapping[str, Any]], lang: str) -> None:
    """Print one line per study: its last verdict, effect, p, seeds, minutes, date."""
    table = Table(box=None, pad_edge=False)
    for name in ("id", "name", "title", "verdict", "effect", "p", "seeds", "min", "date", "mode"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            row["id"],
            row["name"],
            text_in(row["title"], lang),
            Text(verdict_in(row["verdict"], lang), style=COLOURS[row["verdict"]]),
            effect_in(row, lang),
            probability(row["p"]),
            str(len(row["seeds"])),
            f"{row['seconds'] / 60:.1f}",
            row["date"],
            MODES[row["mode"]][lang == "zh"],
        )
    console.print(table)
