"""`addnorm xray`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from addnorm.cli.parsing import Lang, emit_json, messages, results
from addnorm.contract import unknown
from addnorm.probe.trace import Trace
from addnorm.probe.trace_comparison import TraceComparison, compare_traces
from addnorm.probe.vitals import DEEP, PART, xray
from addnorm.reports.trace_table import compared, rendered
from addnorm.targets import load_target

OF_A_MODEL = ("deep", "budget", "blocks", "text", "seed")  # a saved trace has none


@dataclass(frozen=True)
class Options:
    """The options of `addnorm xray`."""

    target: Annotated[str, tyro.conf.Positional] = ""
    """folder of a run, Hugging Face folder, pkg.module:function, or a saved trace"""
    deep: tuple[str, ...] = ()
    """deeper looks: lesion, paths, landscape, lens, whiteness"""
    budget: float = 60.0
    """seconds for each deeper look"""
    blocks: str = ""
    """glob over module names, in place of the search for connections"""
    text: str = ""
    """text that a language model is given: a UTF-8 file, folder or glob"""
    seed: int = 0
    """seed of random inputs, probe vectors and samples"""
    plugins: tuple[str, ...] = ()
    """modules or .py files that define wirings of your own"""
    compare: tuple[str, ...] = ()
    """two saved traces side by side, in place of a target"""
    html: str = ""
    """also write a page to this file"""
    json: str = ""
    """also write the trace as JSON to this file; - is stdout"""
    lang: Lang = "en"
    """language of the table, and the page's first one"""
    all: bool = False
    """show every connection and finding in the table"""


def run(options: Options) -> int:
    """X-ray the target, or show what is saved, and return 1 when a finding is sick."""
    shown = _comparison(options) if options.compare else _trace(options)
    if options.html:
        if Path(options.html).suffix != ".html":
            raise ValueError(f"the page {options.html!r} must end in .html")
        shown.save(options.html, options.lang)
    if options.json != "-":
        console = results(options.json)
        if console.is_terminal:
            draw = compared if isinstance(shown, TraceComparison) else rendered
            console.print(draw(shown.to_dict(), options.lang, options.all), highlight=False)
        else:
            print(shown.table(options.lang, everything=options.all))
    emit_json(shown.to_dict(), options.json)
    return 0 if shown.ok else 1


def _comparison(options: Options) -> TraceComparison:
    if options.target or len(options.compare) != 2:
        given = len(options.compare) + bool(options.target)
        raise ValueError(f"--compare takes two saved traces and no target; got {given}")
    _refuse_looks(options, "saved traces")
    a, b = (_load(path) for path in options.compare)
    return compare_traces(a, b)


def _trace(options: Options) -> Trace:
    if not options.target:
        raise ValueError("name a target: a run, a Hugging Face folder, or pkg.module:function")
    if Path(options.target).is_file() and Path(options.target).suffix == ".json":
        _refuse_looks(options, "a saved trace")
        return _load(options.target)
    for name in options.deep:
        if name not in DEEP:
            raise ValueError(unknown("deeper look", name, DEEP))
    if not options.budget > 0:
        raise ValueError(f"budget {options.budget:g} must be above 0 seconds")
    with _bar() as bar:
        task = bar.add_task("loading", total=None)
        target = load_target(options.target, options.text, options.seed)
        parts = ("measuring", *options.deep, "done")

        def progress(done: int, total: int) -> None:
            name = parts[max(0, min(done // PART, len(parts)) - 1)]
            bar.update(task, completed=done, total=total, description=name)

        bar.update(task, description="finding connections")
        trace = xray(
            target.model,
            target.inputs,
            target.targets,
            loss=target.loss,
            blocks=options.blocks or None,
            deep=tuple(dict.fromkeys(options.deep)),
            budget=options.budget,
            seed=options.seed,
            progress=progress,
        )
    return replace(trace, fed=target.fed)


def _bar() -> Progress:
    """Return a bar on stderr, where that is a terminal."""
    console = messages()
    return Progress(
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _load(path: str) -> Trace:
    if not Path(path).is_file():
        raise ValueError(f"no saved trace {path!r}")
    return Trace.load(path)


def _refuse_looks(options: Options, what: str) -> None:
    """Raise `ValueError` for an option that needs a model."""
    usual = {field.name: field.default for field in fields(options)}
    for name in OF_A_MODEL:
        if getattr(options, name) != usual[name]:
            raise ValueError(f"--{name} needs a model, not {what}")
