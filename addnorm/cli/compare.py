"""`addnorm compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from addnorm.cli.parsing import Lang, emit_json, messages, results
from addnorm.comparison import Cell, CompareConfig, CompareObserver, compare
from addnorm.reports.pages import write_comparison_page
from addnorm.reports.terminal import LiveComparison, print_comparison


@dataclass(frozen=True)
class Options:
    """The options of `addnorm compare`."""

    config: CompareConfig
    out: Path = Path("comparison")
    """folder of the finished cells, comparison.json and report.html; a second call resumes"""
    plugins: tuple[str, ...] = ()
    """modules or .py files that define wirings of your own"""
    json: str = ""
    """also write the comparison as JSON to this file; - is stdout"""
    lang: Lang = "en"
    """language of what is printed, and the page's first language"""


class _Live(CompareObserver):
    """Passes what a comparison does on to the live table."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.table = LiveComparison(console)

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False)

    def begin(self, result: dict[str, Any], cells: Sequence[Cell]) -> None:
        grid = [(c.model.wiring, c.model.depth, c.training.warmup) for c in cells]
        self.table.begin(result["cells"], grid)

    def finished(self, cell: dict[str, Any]) -> None:
        self.table.finished(cell)


def run(options: Options) -> int:
    """Compare, write the page, print the table and what was found."""
    console = messages()
    live = _Live(console)
    with live.table:
        result = compare(options.config, out=options.out, observer=live, plugins=options.plugins)
    page = options.out / "report.html"
    write_comparison_page(result, page, options.lang)
    print_comparison(results(options.json), result, options.lang)
    emit_json(result, options.json)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return 0
