"""Run studies: every cell once, in parallel processes of one thread, kept by content; then judge.

A finished cell is a file in `OUT/cells`, named by a hash of what decides it: the levels, settings
and seed, the code of its measure, and the versions of addnorm and torch. A killed call goes on
where it stopped. `OUT/NAME.json` holds the last result of a study.
"""

from __future__ import annotations

import datetime
import hashlib
import inspect
import json
import math
import platform
import time
import types
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
from addnorm.studies.verdict import SEEDS, Judgement, judge, judge_all

SCHEMA = 1


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
    `ValueError` for a budget that cannot give a verdict.
    """
    observer = observer or StudyObserver()
    cells = {
        study.id: list(zip(given := list(study.cells(mode)), keys_of(study, given), strict=True))
        for study in studies
    }
    rows = {
        study.id: {
            k: dict(read_json(p)) for _, k in cells[study.id] if (p := _file(out, k)).exists()
        }
        for study in studies
    }
    counts = [(len(cells[s.id]), len(rows[s.id])) for s in studies]
    _check_budget(studies, mode, counts, budget)
    observer.begin(studies, mode, counts)
    waiting = [
        (study, cell, key)
        for study in studies
        for cell, key in cells[study.id]
        if key not in rows[study.id]
    ]
    ends = time.monotonic() + 60 * budget
    results: dict[str, dict[str, Any]] = {}

    def conclude() -> None:
        for study in studies:
            known = rows[study.id]
            if study.id not in results and len(known) == len(cells[study.id]):
                ordered = [known[key] for _, key in cells[study.id]]
                results[study.id] = _keep(conclude_study(study, mode, ordered), out)
                observer.concluded(study, results[study.id])

    for study in studies:
        for row in rows[study.id].values():
            observer.cell(study, row)
    conclude()
    by_id = {study.id: study for study in studies}
    for id, key, row in _measured(waiting, out, jobs, ends):
        rows[id][key] = row
        observer.cell(by_id[id], row)
        conclude()
    for study in studies:  # those that the budget has cut off
        if study.id not in results:
            known = rows[study.id]
            ordered = [known[key] for _, key in cells[study.id] if key in known]
            results[study.id] = _keep(conclude_study(study, mode, ordered), out)
            observer.concluded(study, results[study.id])
    return [results[study.id] for study in studies]


def _measured(
    waiting: Sequence[tuple[Study, dict[str, Any], str]], out: Path, jobs: int, ends: float
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (study's id, key, row) of each cell as it ends; begin none after `ends`."""
    run = joblib.delayed(_run_cell)
    tasks = (
        run(study.measure, study.id, cell, key, out)
        for study, cell, key in waiting
        if time.monotonic() < ends
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
) -> tuple[str, str, dict[str, Any]]:
    """Measure one cell with one thread, keep it, and return (study's id, key, row)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.process_time()  # of this core: the same beside a busy neighbour
    try:
        torch.manual_seed(cell["seed"])
        measured = plain_values(dict(measure(cell)))
    finally:
        torch.set_num_threads(threads)
    row = finite({**cell, **measured, "seconds": round(time.process_time() - began, 3)})
    write_json(_file(out, key), row)
    return id, key, row


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


def _keep(result: dict[str, Any], out: Path) -> dict[str, Any]:
    write_json(out / f"{result['name']}.json", result)
    return dict(finite(result))


def _check_budget(
    studies: Sequence[Study], mode: str, counts: Sequence[tuple[int, int]], budget: float
) -> None:
    """Raise `ValueError` where the budget is spent before the seeds of one verdict are complete."""
    needed = []
    for study, (count, known) in zip(studies, counts, strict=True):
        chosen = study.mode(mode)
        share = min(1.0, SEEDS / chosen.seeds) - known / count
        needed.append(max(0.0, share * chosen.minutes))
    total = sum(needed)
    if total > budget:
        quick = sum(study.mode("quick").minutes for study in studies)
        names = ", ".join(study.name for study in studies[:3])
        more = f" and {len(studies) - 3} more" if len(studies) > 3 else ""
        hint = (
            f", or --quick, which takes about {quick:.2g}"
            if mode != "quick" and quick < total
            else ""
        )
        raise ValueError(
            f"a budget of {budget:g} minutes is too small for a verdict on {names}{more}: it needs "
            f"about {total:.2g} on 2 cores{hint}"
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


def keys_of(study: Study, cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the name of each cell's file: a hash of all that decides its numbers."""
    facts = {
        "study": study.id,
        "code": code_of(study.measure),
        "addnorm": __version__,
        "torch": torch.__version__,
    }
    texts = (json.dumps({**facts, "cell": dict(cell)}, sort_keys=True) for cell in cells)
    return [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]


def code_of(function: Callable[..., Any]) -> str:
    """Return the source of a function and of what it uses of `addnorm.studies`, constants too."""
    found: dict[str, str] = {}
    _collect(function, found)
    return "\n".join(f"{name}: {found[name]}" for name in sorted(found))


def _collect(value: Any, found: dict[str, str]) -> None:
    source = inspect.getsource(value)
    name = f"{value.__module__}.{value.__qualname__}"
    if "<lambda>" in name:  # several of one name
        name += f" {source}"
    if name in found:
        return
    found[name] = source
    codes = [f.__code__ for f in _functions(value)]
    while codes:
        code = codes.pop()
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        for place, used in _globals(code.co_names, vars(inspect.getmodule(value))):
            other = inspect.unwrap(used) if callable(used) else used
            home = getattr(other, "__module__", "") or ""
            if isinstance(other, type | types.FunctionType) and home.startswith("addnorm.studies."):
                _collect(other, found)
            elif isinstance(other, int | float | str | tuple | list | dict):
                found[place] = _constant(other, found)


def _constant(value: Any, found: dict[str, str]) -> str:
    """Return a constant as text, the same in every process: functions in it by name and source."""
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
        if isinstance(value, types.FunctionType) and value.__module__.startswith("addnorm.studies"):
            _collect(value, found)
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {_constant(v, found)}' for k, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(_constant(item, found) for item in value)}]"
    if type(value) is tuple:
        inside = ", ".join(_constant(item, found) for item in value)
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return repr(value)


def _globals(names: Sequence[str], space: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what the names stand for in a module, and in those of `addnorm.studies` it imports."""
    for name in names:
        value = space.get(name)
        if isinstance(value, types.ModuleType):
            if value.__name__.startswith("addnorm.studies."):
                yield from ((f"{name}.{n}", vars(value)[n]) for n in names if n in vars(value))
        elif value is not None:
            yield f"{space['__name__']}.{name}", value


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """Yield a function, or the methods of a class."""
    if isinstance(value, types.FunctionType):
        yield value
    else:
        yield from (m for m in vars(value).values() if isinstance(m, types.FunctionType))


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
    paths = [(study, out / f"{study.name}.json") for study in all_studies()]
    return [dict(read_json(path)) for _, path in paths if path.exists()]


def last_verdicts(out: Path) -> list[dict[str, Any]]:
    """Return the row of every study: its last result in `out`, else the one the package ships.

    A study that was never run has no verdict.
    """
    shipped = Path(__file__).parent / "verdicts.json"
    known = {row["name"]: row for row in (read_json(shipped) if shipped.exists() else [])}
    known |= {result["name"]: summary(result) for result in last_results(out)}
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
    return summary(conclude_study(study, "default", [])) | {"verdict": "", "date": ""}
