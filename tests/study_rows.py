"""Studies made small, and fed with made-up results: for the tests of their verdicts."""

from dataclasses import replace

import torch

from addnorm.files import finite
from addnorm.studies.frame import Mode
from addnorm.studies.running import conclude_study, plain_values


def small(study, *, seeds=6, factors=None, **settings):
    """Return the study with one mode of few seeds; `settings` go into every cell."""
    given = study.mode("default")
    mode = Mode(seeds, 1, {**given.factors, **(factors or {})}, {**given.settings, **settings})
    return replace(study, modes={"quick": mode, "default": mode})


def concluded(study, metrics_of):
    """Return the result of the study where `metrics_of(cell)` are the metrics of each cell.

    Made-up ones, or those that `study.measure` finds: then everything is computed in this process.
    """
    rows = []
    for cell in study.cells("default"):
        torch.manual_seed(cell["seed"])
        rows.append(finite({**cell, **plain_values(dict(metrics_of(cell))), "seconds": 0.0}))
    return conclude_study(study, "default", rows)


def verdicts(result):
    """Return the verdicts by name: those of the contrasts, and those of the claims."""
    contrasts = {c["name"]: c["verdict"] for c in result["contrasts"]}
    return contrasts | {c["id"]: c["verdict"] for c in result["claims"]}
