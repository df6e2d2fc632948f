"""`addnorm compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console

from addnorm.cli.data import reading
from addnorm.cli.networks import asked, word
from addnorm.cli.parsing import Lang, emit_json, messages, options_in, options_of, results
from addnorm.comparison import (
    COMPARED,
    Cell,
    CompareConfig,
    CompareObserver,
    compare,
    compared,
)
from addnorm.data.sets import load_data
from addnorm.models.zoo import KINDS, PRESETS
from addnorm.reports.pages import write_comparison_page
from addnorm.reports.terminal import LiveComparison, print_comparison
from addnorm.training.config import Runtime, TrainConfig

Network = TypeVar("Network")


_TAKES = f"compare takes {', '.join(COMPARED)}, or a known network of these, such as babygpt-v9"
OF_TRAIN = options_of(TrainConfig()) | options_of(Runtime()) | {"--recipe"}
# What stands here for an option of `addnorm train`.
INSTEAD = {
    f"--{one}": f"a comparison takes several; use --{several} in place of --{one}"
    for one, several in (
        *(("depth", "depths"), ("wiring", "wirings"), ("lr", "rates")),
        *(("warmup", "warmups"), ("seed", "seeds")),
    )
} | {
    "--threads": "a comparison runs each training on one thread; --jobs says how many at once",
    "--preset": "a comparison has its own training; name the network alone, with --model",
    "--resume": "a comparison goes on by itself; give the same --out again",
}


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
    if ":" in (model := word(argv, "--model")):
        raise ValueError(
            f"{model} is a model of your own, and these are for train and xray; {_TAKES}"
        )
    given = asked(argv)
    if given.kind not in COMPARED:
        raise ValueError(f"{given.kind} takes no wiring and cannot be compared; {_TAKES}")
    config = compared(given.kind)
    if given.model in PRESETS:
        config = replace(config, network=given.config)
    options = Options(config)
    for option in options_in(argv):
        if option in INSTEAD:  # the network's own depth and wiring among them
            raise ValueError(INSTEAD[option])
        if option not in options_of(options) and option in OF_TRAIN:
            raise ValueError(
                f"{option} is an option of addnorm train; a comparison has none (addnorm compare "
                "--help lists its options)"
            )
    kind: Any = Options
    return kind[type(config.network)], options


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
