"""ST-06: the verdicts both ways, what the race notes, planted bugs."""

import math

import pytest
import torch
from study_rows import concluded, small, verdicts

from addnorm.studies import bench
from addnorm.studies import st06_convergence as module

STUDY = module.STUDY


def made_up(*, slow=3.0, gain=0.0):
    """Steps of the plain net grow to `slow` times the residual ones; its error is `gain` higher."""

    def metrics(cell):
        wobble = math.sin(7 * cell["seed"] + cell["depth"])
        plain = cell["net"] == "plain"
        times = 1 + (slow - 1) * (cell["depth"] - 4) / 16 if plain else 1
        error = 0.02 + 0.001 * wobble * plain + (gain if plain else 0)
        early = 0.03 + (0.1 if plain else 0)
        steps = 50 * times * math.exp(0.05 * wobble * plain) * (0.05 / cell["rate"])
        return {"steps": steps, "error": error, "train": 0.005, "early": early}

    return metrics


def test_it_can_say_both():
    found = verdicts(concluded(STUDY, made_up()))
    names = ("primary", "shallow", "grows", "same-test", "early-test")
    assert [found[name] for name in names] == ["SUPPORTED"] * 5
    assert (found["deep-test"], found["generalises"]) == ("REFUTED", "REFUTED")
    assert [found[c] for c in ("0.14", "4.3", "2.14b")] == ["SUPPORTED"] * 3
    assert found["4.4"] == "REFUTED"
    found = verdicts(concluded(STUDY, made_up(slow=1.0, gain=0.05)))
    assert [found[name] for name in ("primary", "grows", "same-test")] == ["REFUTED"] * 3
    assert found["deep-test"] == "SUPPORTED"
    assert [found[c] for c in ("0.14", "4.3")] == ["REFUTED"] * 2
    assert found["4.4"] == "SUPPORTED"


def test_a_network_that_does_not_get_there_counts_with_the_cap_and_decides_no_error():
    def metrics(cell):
        known = made_up()(cell)
        lost = {"steps": math.nan, "error": math.nan, "train": math.nan}
        return known | lost if cell["net"] == "plain" and cell["depth"] == 20 else known

    result = concluded(STUDY, metrics)
    assert result["failed"] == 2 * STUDY.mode("default").seeds
    assert verdicts(result)["deep-test"] == "INCONCLUSIVE"
    assert result["verdict"] == "SUPPORTED"
    assert result["effect"] == pytest.approx(math.log2(module.CAP / 50), abs=0.2)


def test_the_race_notes_the_steps_and_the_early_error():
    """A loss of 1 for 30 steps, then 0: the corrected mean 0.9^k falls below 0.1 at k = 22."""
    model = bench.mlp(0, 1, "plain", branch_layers=2)
    race = module.Race(model)
    for _ in range(30):
        race.after_update(torch.tensor(1.0))
    for _ in range(29):
        race.after_update(torch.tensor(0.0))
    assert race.steps == 52
    assert math.isnan(race.early)
    race.after_update(torch.tensor(0.0))
    assert race.early == pytest.approx(module.measured(model)[1])
    assert 0.7 < race.early < 1
    race.losses += [0.0] * 10  # the mean is below the level now
    with pytest.raises(module.Matched):
        race.after_update(torch.tensor(0.0))


def test_a_training_that_ends_early_has_no_error():
    cell = {"net": "plain", "depth": 4, "rate": 0.02, "steps": 5, "seed": 0}
    found = module.measure(cell)
    assert all(math.isnan(found[name]) for name in ("steps", "error", "train", "early"))


@pytest.mark.slow
def test_the_shortcut_removed_flips_the_verdict(monkeypatch):
    study = small(STUDY, factors={"depth": (20,), "rate": (0.05,)}, steps=200)
    assert concluded(study, study.measure)["verdict"] == "SUPPORTED"
    monkeypatch.setitem(module.WIRINGS, "residual", module.WIRINGS["plain"])
    assert concluded(study, study.measure)["verdict"] == "REFUTED"
