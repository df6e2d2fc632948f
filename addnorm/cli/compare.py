"""`addnorm compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console

from addnorm.cli.data import reading
from addnorm.cli.networks import asked, word
from addnorm.cli.parsing import Lang, emit_json, messages, results
from addnorm.comparison import Cell, CompareConfig, CompareObserver, compare, compared
from addnorm.data.sets import load_data
from addnorm.models.zoo import KINDS, PRESETS
from addnorm.reports.pages import write_comparison_page
from addnorm.reports.terminal import LiveComparison, print_comparison

Network = TypeVar("Network")


@dataclass(frozen=True)
class Options(Generic[Network]):
    """The options of `addnorm compare`."""

    config: CompareConfig[Network]
    model: str = "gpt"
    """gpt, resnet, mlp, or a known network such as babygpt-v9"""
    out: Path = Path("comparison")
    """folder of the finished cells, comparison.json and report.html; a second call resumes"""
    plugins: tuple[str, ...] = ()
    """modules or .py files that define wirings of your own"""
    json: str = ""
    """also write the comparison as JSON to this file; - is stdout"""
    lang: Lang = "en"
    """language of what is printed, and the page's first language"""


def defaults(argv: Sequence[str]) -> tuple[Any, Options[Any]]:
    """Return the options that the network of this command line has, and where they begin."""
    given = asked(argv)
    config = compared(given.kind or given.model)
    if given.model in PRESETS:
        config = replace(config, network=given.config)
    for option, grid in (("--depth", "--depths"), ("--wiring", "--wirings")):
        if word(argv, option):
            raise ValueError(f"a comparison takes several; use {grid} in place of {option}")
    kind: Any = Options
    return kind[type(config.network)], Options(config)


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


def run(options: Options[Any]) -> int:
    """Compare, write the page, print the table and what was found."""
    console = messages()
    live, config = _Live(console), options.config
    with reading(console) as bar:  # a long text is encoded here, once
        context = getattr(config.network, "context", 0)
        load_data(config.data, KINDS[config.kind].reads, context, progress=bar)
    with live.table:
        result = compare(config, out=options.out, observer=live, plugins=options.plugins)
    page = options.out / "report.html"
    write_comparison_page(result, page, options.lang)
    print_comparison(results(options.json), result, options.lang)
    emit_json(result, options.json)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return 0
