"""`addnorm report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from addnorm import runs
from addnorm.cli.parsing import Lang, emit_json
from addnorm.comparison import join_comparisons
from addnorm.files import read_json
from addnorm.probe.trace import Trace
from addnorm.reports.pages import write_comparison_page, write_trace_page


@dataclass(frozen=True)
class Options:
    """The options of `addnorm report`."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of comparisons (joined into one page), the folder of a run, or a trace as JSON"""
    out: str = ""
    """the page; by default report.html in the first folder"""
    lang: Lang = "en"
    """the page's first language"""
    json: str = ""
    """also write what the page shows as JSON to this file; - is stdout"""


def run(options: Options) -> int:
    """Write the page that fits the saved results."""
    if not options.paths:
        raise ValueError("name a folder or a file to report on")
    first = options.paths[0]
    for path in options.paths:
        if not path.exists():
            raise ValueError(f"no file or folder {str(path)!r}")
    page = (
        Path(options.out)
        if options.out
        else (first if first.is_dir() else first.parent) / "report.html"
    )
    facts: Any
    if (first / "config.json").exists():
        runs.write_report(first, options.lang, page)
        facts = read_json(first / "summary.json")
    elif first.is_file() and "connections" in (facts := read_json(first)):
        write_trace_page(Trace.from_dict(facts).to_dict(), page, options.lang)
    else:
        facts = join_comparisons(options.paths)
        write_comparison_page(facts, page, options.lang)
    emit_json(facts, options.json)
    if options.json != "-":
        print(page)
    return 0
