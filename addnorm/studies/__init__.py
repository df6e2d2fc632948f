"""The studies: claims about residual connections as experiments with a verdict.

Each file `stNN_name.py` here declares one. `frame` says what a study is, `running` runs it,
`verdict` judges it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from addnorm.studies.frame import Study


def all_studies() -> list[Study]:
    """Return every study, in the order of their numbers."""
    names = sorted(p.stem for p in Path(__file__).parent.glob("st[0-9][0-9]_*.py"))
    return [importlib.import_module(f"addnorm.studies.{name}").STUDY for name in names]


def find_studies(wanted: Sequence[str]) -> list[Study]:
    """Return the studies of these names or numbers ("degradation", "ST-03", "3"), each once.

    Raises `ValueError` for one that is unknown.
    """
    from addnorm.contract import unknown

    known = {study.name: study for study in all_studies()}
    by_number = {int(study.id[3:]): study for study in known.values()}
    found: dict[str, Study] = {}
    for name in wanted:
        number = re.fullmatch(r"(?:st-?)?(\d{1,2})", name.lower())
        study = by_number.get(int(number[1])) if number else known.get(name.lower())
        if study is None:
            raise ValueError(unknown("study", name, [*known, "errata"]))
        found[study.id] = study
    return list(found.values())
