"""Run studies: every cell once, in parallel processes of one thread, kept by content; then judge.

A finished cell is a file in `OUT/cells`, named by a hash of what decides it: the levels, settings
and seed, the code of its measure and of the package, the versions of Python, numpy and torch. A
killed call goes on where it stopped. `OUT/NAME.json` holds the last result of a study.
"""

from __future__ import annotations

import datetime
import math
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch

from addnorm import __version__
from addnorm.files import finite, read_json, write_json
from addnorm.studies import all_studies
from addnorm.studies.frame import Contrast, Rows, Study
from addnorm.studies.keys import keys_of
from addnorm.studies.verdict import SEEDS, Judgement, judge, judge_all

SCHEMA = 1  # of a result


class StudyObserver:
    """Hears how the studies go. The base class is silent."""

    def say(self, message: str) -> None:
        """Hear a sentence."""

    def begin(self, studies: Sequence[Study], mode: str, cells: Sequence[tuple[int, int]]) -> None:
        """Hear for each study how many cells it has, and how many of them are known already."""

    def cell(self, study: Study, row: Mapping[str, Any]) -> None:
        """Hear the row of one cell, known or new."""

    def concluded(self, study: Study, result: dict[str, Any]) -> None:
        """Hear the result of a study."""


class _Course:
    """A study on its way: its cells, the rows that are known, and its result."""

    def __init__(self, study: Study, mode: str, out: Path) -> None:
        self.study, self.out = study, out
        self.mode = mode if mode in study.modes else "default"
        cells = list(study.cells(mode))
        self.cells = dict(zip(keys_of(study, cells), cells, strict=True))
        kept = {k: _kept(_file(out, k), cell) for k, cell in self.cells.items()}
        self.rows = {key: row for key, row in kept.items() if row}
        self.result: dict[str, Any] | None = None
        self.error = ""  # the traceback of a defect in its measure

    def conclude(self) -> dict[str, Any]:
        """Judge the rows that are there, in the order of the cells, and keep the result."""
        ordered = [self.rows[key] for key in self.cells if key in self.rows]
        self.result = dict(finite(conclude_study(self.study, self.mode, ordered)))
        _keep(self.result, self.out)
        return self.result


def run_studies(
    studies: Sequence[Study],
    mode: str = "default",
    *,
    out: Path,
    jobs: int = 0,
    budget: float = math.inf,
    observer: StudyObserver | None = None,
) -> list[dict[str, Any]]:
    """Run the cells that are not known yet, judge each study, and return the results in order.

    `budget` in minutes: no cell is begun after it; what is complete by then is judged. Raises
    `ValueError` for a budget that cannot give a verdict, and `RuntimeError` where a measure failed,
    after the other studies have ended.
    """
    observer = observer or StudyObserver()
    courses = [_Course(study, mode, out) for study in studies]
    _check_budget(courses, budget)
    observer.begin(studies, mode, [(len(c.cells), len(c.rows)) for c in courses])
    for course in courses:
        before = _last_result(out / f"{course.study.name}.json")
        if before and before["mode"] != course.mode:
            observer.say(
                f"{course.study.name}: replaces the result of {before['mode']} mode of "
                f"{before['date']}; its cells are kept"
            )
    for course in courses:
        for row in course.rows.values():
            observer.cell(course.study, row)
        if len(course.rows) == len(course.cells):
            observer.concluded(course.study, course.conclude())
    by_id = {course.study.id: course for course in courses}
    for id, key, row, error in _measured(courses, out, jobs, time.monotonic() + 60 * budget):
        course = by_id[id]
        if error:
            course.error = error
            observer.say(f"{course.study.name}: a cell failed; its other cells are left out")
            continue
        course.rows[key] = row
        observer.cell(course.study, row)
        if len(course.rows) == len(course.cells):
            observer.concluded(course.study, course.conclude())
    for course in courses:
        if course.error:
            raise RuntimeError(f"study {course.study.name} failed:\n{course.error}")
        if course.result is None:  # cut off by the budget
            observer.concluded(course.study, course.conclude())
    return [course.result or {} for course in courses]


def _measured(
    courses: Sequence[_Course], out: Path, jobs: int, ends: float
) -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """Yield (study's id, key, row, error) of each cell as it ends; begin none after `ends`."""
    run = joblib.delayed(_run_cell)
    waiting = [(c, key) for c in courses for key in c.cells if key not in c.rows]
    tasks = (
        run(c.study.measure, c.study.id, c.cells[key], key, out.absolute())
        for c, key in waiting
        if time.monotonic() < ends and not c.error
    )
    count = min(jobs or joblib.cpu_count(), len(waiting)) or 1
    parallel = joblib.Parallel(n_jobs=count, return_as="generator_unordered", pre_dispatch="n_jobs")
    yield from parallel(tasks)


def _run_cell(
    measure: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    id: str,
    cell: dict[str, Any],
    key: str,
    out: Path,
) -> tuple[str, str, dict[str, Any], str]:
    """Measure one cell with one thread, keep it, and return (study's id, key, row, error)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.process_time()  # of this core: the same beside a busy neighbour
    try:
        torch.manual_seed(cell["seed"])
        measured = plain_values(dict(measure(cell)))
    except Exception:  # noqa: BLE001  # told at the end, so that the other studies are not lost
        return id, key, {}, f"{cell}\n{traceback.format_exc()}"
    finally:
        torch.set_num_threads(threads)
    row = finite({**cell, **measured, "seconds": round(time.process_time() - began, 3)})
    write_json(_file(out, key), row)
    return id, key, row, ""


def plain_values(value: Any) -> Any:
    """Return `value` as JSON has it: arrays and tensors as lists, numpy scalars as numbers."""
    if isinstance(value, Mapping):
        return {k: plain_values(v) for k, v in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain_values(v) for v in value]
    return value


def _file(out: Path, key: str) -> Path:
    return out / "cells" / f"{key}.json"


def _kept(path: Path, cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row in the file; nothing where it is missing or damaged: it is measured again."""
    row = _json_object(path)
    return row if {*cell, "seconds"} <= row.keys() else {}


def _json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one where there is none."""
    try:
        found = read_json(path)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _keep(result: dict[str, Any], out: Path) -> None:
    """Write the result, unless a budget has cut it short and a whole one is there."""
    path = out / f"{result['name']}.json"
    if len(result["seeds"]) < result["planned"]:
        before = _last_result(path)
        if before and len(before["seeds"]) == before["planned"]:
            return
    write_json(path, result)


def _check_budget(courses: Sequence[_Course], budget: float) -> None:
    """Raise `ValueError` where the budget is spent before the seeds of one verdict are complete."""
    total = 0.0
    for course in courses:
        chosen = course.study.mode(course.mode)
        share = min(1.0, SEEDS / chosen.seeds) - len(course.rows) / len(course.cells)
        total += max(0.0, share * chosen.minutes)
    if total <= budget:
        return
    studies = [course.study for course in courses]
    modes = [study.mode("quick") for study in studies]
    quick = sum(min(1.0, SEEDS / m.seeds) * m.minutes for m in modes)
    names = ", ".join(study.name for study in studies[:3])
    more = f" and {len(studies) - 3} more" if len(studies) > 3 else ""
    shorter = courses[0].mode != "quick" and quick < total
    hint = f", those of --quick about {quick:.2g}" if shorter else ""
    raise ValueError(
        f"a budget of {budget:g} minutes is too small for a verdict on {names}{more}: the "
        f"fewest seeds that can decide need about {total:.2g} on 2 cores{hint}"
    )


def conclude_study(study: Study, mode: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the result of a study, plain values: its texts, its rows, and its verdicts.

    Only seeds of which every cell is there are judged. A metric that is missing or not finite is a
    training that failed: the row is marked and takes the metric's `failed` value.
    """
    shown = [_with_failures(study, row) for row in rows]
    per_seed = len([c for c in study.cells(mode) if c["seed"] == 0])
    seeds = sorted({row["seed"] for row in shown})
    seeds = [s for s in seeds if sum(row["seed"] == s for row in shown) == per_seed]
    effects = [
        [_effect(c, Rows([row for row in shown if row["seed"] == s])) for s in seeds]
        for c in study.contrasts
    ]
    main = judge(effects[0], study.primary.rule, study.primary.limit)
    others = judge_all(
        [(e, c.rule, c.limit) for e, c in zip(effects[1:], study.secondary, strict=True)]
    )
    judged = [(main, main.p), *others]
    contrasts = [
        _describe(c, e, *j) for c, e, j in zip(study.contrasts, effects, judged, strict=True)
    ]
    verdicts = {c["name"]: c["verdict"] for c in contrasts}
    planned = study.mode(mode).seeds
    return {
        "schema": SCHEMA,
        "id": study.id,
        "name": study.name,
        **{
            key: getattr(study, key)._asdict()
            for key in ("title", "question", "design", "controls", "lesson")
        },
        "verdict": main.verdict,
        "claims": [
            {
                "id": claim.id,
                "document": claim.document,
                "line": claim.line,
                "says": claim.says._asdict(),
                "by": claim.by,
                "stands": claim.stands,
                "verdict": claim.answer(verdicts[claim.by]),
            }
            for claim in study.claims
        ],
        "effect": main.effect,
        "interval": list(main.interval),
        "p": main.p,
        "seeds": seeds,
        "planned": planned,
        "mode": mode,
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "heavy": study.heavy,
        "relied": study.relied,
        "failed": sum(row["failed"] for row in shown),
        "factors": {k: list(v) for k, v in {**study.factors, **study.mode(mode).factors}.items()},
        "settings": dict(study.mode(mode).settings),
        "metrics": {
            name: {"title": m.title._asdict(), "unit": m.unit._asdict(), "failed": m.failed}
            for name, m in study.metrics.items()
        },
        "contrasts": contrasts,
        "plots": [_words(asdict(plot)) for plot in study.plots],
        "published": [_words(asdict(one)) for one in study.published],
        "rows": shown,
        "date": datetime.date.today().isoformat(),
        "addnorm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{joblib.cpu_count()} cores, {platform.machine()}",
    }


def _describe(c: Contrast, effects: list[float], judged: Judgement, p: float) -> dict[str, Any]:
    """Return a contrast as plain values; `corrected` is p after Holm's correction."""
    return {
        "name": c.name,
        "statement": c.statement._asdict(),
        "rule": c.rule,
        "limit": c.limit,
        "unit": c.unit._asdict(),
        "effects": effects,
        "verdict": judged.verdict,
        "effect": judged.effect,
        "interval": list(judged.interval),
        "p": judged.p,
        "corrected": p,
    }


def _words(value: Any) -> Any:
    """Return plain values where `asdict` has left texts as pairs."""
    if isinstance(value, dict):
        return {k: _words(v) for k, v in value.items()}
    return value._asdict() if hasattr(value, "_asdict") else value


def _effect(contrast: Contrast, rows: Rows) -> float:
    return float(contrast.effect(rows))


def _with_failures(study: Study, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with `failed`, and what stands for the metrics of a failed training."""
    lost = [name for name in study.metrics if row.get(name) is None]
    return {
        **row,
        **{name: study.metrics[name].failed for name in lost},
        "failed": bool(lost),
    }


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a study in the list of verdicts."""
    keys = (
        "id",
        "name",
        "title",
        "verdict",
        "claims",
        "effect",
        "interval",
        "p",
        "seeds",
        "seconds",
    )
    more = ("mode", "failed", "relied", "heavy", "date", "addnorm", "torch", "python", "machine")
    (main,) = [c for c in result["contrasts"] if c["name"] == "primary"]
    return {
        **{key: result[key] for key in (*keys, *more)},
        "statement": main["statement"],
        "unit": main["unit"],
        "rule": main["rule"],
        "limit": main["limit"],
    }


def last_results(out: Path) -> list[dict[str, Any]]:
    """Return the last result of every study that `out` holds one of, in their order."""
    found = [_last_result(out / f"{study.name}.json") for study in all_studies()]
    return [result for result in found if result]


def _last_result(path: Path) -> dict[str, Any]:
    """Return the result in the file; nothing where it is missing, damaged or of another schema."""
    found = _json_object(path)
    parts = {"name", "verdict", "claims", "contrasts", "rows", "seeds", "planned"}
    return found if found.get("schema") == SCHEMA and parts <= found.keys() else {}


def damaged_results(out: Path) -> list[Path]:
    """Return the files in `out` that are named as results of studies and are none."""
    paths = [out / f"{study.name}.json" for study in all_studies()]
    return [path for path in paths if path.exists() and not _last_result(path)]


def last_verdicts(out: Path) -> list[dict[str, Any]]:
    """Return the row of every study: its last result in `out`, else the one the package ships.

    `shipped` says which. A study that was never run has no verdict, and no claim of it has one.
    """
    shipped = Path(__file__).parent / "verdicts.json"
    rows = read_json(shipped) if shipped.exists() else []
    known = {row["name"]: {**row, "shipped": True} for row in rows}
    known |= {r["name"]: summary(r) | {"shipped": False} for r in last_results(out)}
    return [known.get(study.name) or _unknown(study) for study in all_studies()]


def claim_verdicts(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """Return by ("ST-04", "1.10") the verdict on each claim of the studies that were run."""
    return {
        (row["id"], claim["id"]): claim["verdict"]
        for row in rows
        if row["verdict"]
        for claim in row["claims"]
    }


def _unknown(study: Study) -> dict[str, Any]:
    row = summary(conclude_study(study, "default", []))
    claims = [claim | {"verdict": ""} for claim in row["claims"]]
    nothing = dict.fromkeys(("verdict", "mode", "date", "torch", "python", "machine"), "")
    return row | nothing | {"claims": claims, "shipped": False}
