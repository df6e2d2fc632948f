"""`addnorm study`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from addnorm.cli.parsing import Lang, emit_json, messages, results
from addnorm.files import locked
from addnorm.reports.errata import print_errata, print_erratum
from addnorm.reports.studies import LiveStudies, print_claims, print_studies
from addnorm.reports.study_pages import write_study_pages
from addnorm.studies import all_studies, find_studies
from addnorm.studies.errata import check_errata
from addnorm.studies.running import (
    StudyObserver,
    claim_verdicts,
    damaged_results,
    last_results,
    last_verdicts,
    run_studies,
    summary,
)

WIDTH = 140  # columns where the output is no terminal
FEW = 5  # studies, up to which a run also prints the claims


@dataclass(frozen=True)
class Options:
    """The options of `addnorm study`."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """studies by name or number; `errata` checks the documents' 47 errata, `errata E21` shows one
    whole; none lists all"""
    all: bool = False
    """run every study; the heavy ones only with --long"""
    quick: bool = False
    """fewer seeds and steps; may end INCONCLUSIVE"""
    long: bool = False
    """larger grids, and with --all the heavy studies too"""
    budget: float = math.inf
    """minutes after which no further training is begun"""
    jobs: int = 0
    """processes of one thread each; 0 is one for each CPU core"""
    out: str = "studies"
    """folder of cells, results and pages; what is there is not computed again"""
    json: str = ""
    """also write the verdicts as a JSON list to this file; - is stdout"""
    lang: Lang = "en"
    """language of the tables, and the pages' first one"""


class _Live(LiveStudies, StudyObserver):
    """Shows what it hears of a run."""


def run(options: Options) -> int:
    """List the studies, or run some and return 1 where one that the docs rely on is refuted.

    Or check the errata, and return 1 where one fails.
    """
    _check(options)
    out = Path(options.out)
    for path in damaged_results(out):
        messages().print(f"not the result of a study, left out: {path}", soft_wrap=True)
    if "errata" in options.names:
        return _errata(options, out)
    if not (options.names or options.all):
        _show(last_verdicts(out), options)
        return 0
    studies = [study for study in all_studies() if options.long or not study.heavy]
    if options.names:
        studies = find_studies(options.names)
    mode = "quick" if options.quick else "long" if options.long else "default"
    console = messages()
    with locked(out):
        with _Live(console, options.lang) as live:
            found = run_studies(
                studies, mode, out=out, jobs=options.jobs, budget=options.budget, observer=live
            )
        write_study_pages(last_results(out), out, options.lang, [study.name for study in studies])
    rows = [summary(result) for result in found]
    _show(rows, options, claims=len(rows) <= FEW)
    page = out / (f"{studies[0].name}.html" if len(studies) == 1 else "index.html")
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return int(any(row["relied"] and row["verdict"] == "REFUTED" for row in rows))


def _check(options: Options) -> None:
    """Raise `ValueError` for options that exclude each other or make no sense."""
    if options.quick and options.long:
        raise ValueError("--quick and --long exclude each other")
    if options.all and options.names:
        raise ValueError("--all runs every study; leave the names out")
    if not options.budget > 0:
        raise ValueError(f"budget {options.budget:g} must be above 0 minutes")
    if options.jobs < 0:
        raise ValueError(f"jobs {options.jobs} must be at least 0")
    runs = options.all or (options.names and "errata" not in options.names)
    given = {
        "--quick": options.quick,
        "--long": options.long,
        "--budget": options.budget < math.inf,
    }
    lone = [name for name, is_given in given.items() if is_given]
    if lone and not runs:
        raise ValueError(f"{lone[0]} needs something to run: name studies, or add --all")
    if not options.out or (Path(options.out).exists() and not Path(options.out).is_dir()):
        raise ValueError(f"--out {options.out!r} is not a folder")
    if options.json not in ("", "-") and Path(options.json).is_dir():
        raise ValueError(f"--json {options.json!r} is a folder; name a file, or - for stdout")


def _errata(options: Options, out: Path) -> int:
    """Check the errata, all or those named, and return 1 where one fails."""
    rows = check_errata(claim_verdicts(last_verdicts(out)))
    known = {row["id"]: row for row in rows}
    wanted = [name.upper() for name in options.names if name != "errata"]
    for name in wanted:
        if name not in known:
            raise ValueError(f"unknown erratum {name!r}: errata takes numbers from E01 to E47")
    console = results(options.json, width=WIDTH)
    if wanted:
        rows = [known[name] for name in wanted]
        for row in rows:
            print_erratum(console, row, options.lang)
    else:
        print_errata(console, rows, options.lang)
    emit_json(rows, options.json)
    return int(any(row["status"] == "fails" for row in rows))


def _show(rows: list[dict[str, Any]], options: Options, claims: bool = False) -> None:
    """Print the verdicts, and those on the claims where asked for, and write the JSON."""
    console = results(options.json, width=WIDTH)
    print_studies(console, rows, options.lang)
    if claims:
        print_claims(console, rows, options.lang)
    emit_json(rows, options.json)
