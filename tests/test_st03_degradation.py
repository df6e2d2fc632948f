"""ST-03: the verdict both ways, a planted bug, and one training of it."""

import math

import pytest
from study_rows import concluded, small, verdicts

from addnorm.studies import st03_degradation as module

STUDY = module.STUDY


def made_up(plain_at_56, noise=0.1):
    """Training losses by depth: the residual net's stay, the plain net's rise to a level."""

    def metrics(cell):
        wobble = math.exp(noise * math.sin(7 * cell["seed"] + cell["depth"]))
        deep = {8: 1, 20: 2, 32: 5, 56: plain_at_56 / 1e-3}[cell["depth"]]
        train = 1e-3 * wobble * (deep if cell["net"] == "plain" else 1)
        return {"train": train, "test": train, "error": 0.02, "parameters": 100 + cell["depth"]}

    return metrics


def test_it_can_say_both():
    assert verdicts(concluded(STUDY, made_up(2.3)))["primary"] == "SUPPORTED"
    found = verdicts(concluded(STUDY, made_up(1e-3)))
    assert (found["primary"], found["plain-rises"]) == ("REFUTED", "REFUTED")
    assert (found["1.3"], found["0.13"]) == ("REFUTED", "REFUTED")


def test_a_training_that_diverged_counts_as_guessing():
    def metrics(cell):
        known = made_up(2.3)(cell)
        return known | (
            {"train": math.nan} if cell["depth"] == 56 and cell["net"] == "plain" else {}
        )

    result = concluded(STUDY, metrics)
    assert result["failed"] == STUDY.mode("default").seeds * len(STUDY.factors["rate"])
    assert result["verdict"] == "SUPPORTED"


@pytest.mark.slow
def test_the_residual_removed_flips_the_verdict(monkeypatch):
    """The real measure at two depths: supported, and refuted where the shortcut is missing."""
    study = small(STUDY, factors={"depth": (8, 56), "rate": (0.1,), "length": (1,)}, steps=120)
    assert concluded(study, study.measure)["verdict"] == "SUPPORTED"
    monkeypatch.setitem(module.WIRINGS, "residual", module.WIRINGS["plain"])
    assert concluded(study, study.measure)["verdict"] == "REFUTED"
