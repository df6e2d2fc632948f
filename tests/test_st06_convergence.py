"""ST-06: the verdicts both ways, what the race notes, planted bugs."""

import copy
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
    assert (found["4.4"], found["4.4b"]) == ("REFUTED", "REFUTED")
    found = verdicts(concluded(STUDY, made_up(slow=1.0, gain=0.05)))
    assert [found[name] for name in ("primary", "grows", "same-test")] == ["REFUTED"] * 3
    assert found["deep-test"] == "SUPPORTED"
    assert [found[c] for c in ("0.14", "4.3")] == ["REFUTED"] * 2
    assert (found["4.4"], found["4.4b"]) == ("SUPPORTED", "SUPPORTED")


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


@pytest.fixture
def race(monkeypatch):
    """A race of a network that learns nothing; `standing` is what its evaluations find."""
    found = module.Race(bench.mlp(0, 1, "plain", branch_layers=2))
    found.standing = (1.0, 0.5)
    monkeypatch.setattr(module, "measured", lambda _model: found.standing)
    return found


def test_the_race_notes_the_steps_and_the_early_error(race):
    """A loss of 1 for 30 steps, then 0: the corrected mean 0.9^k falls below 0.1 at k = 22."""
    for loss in 30 * [1.0] + 29 * [0.0]:
        race.after_update(torch.tensor(loss))
    assert race.steps == 52
    assert math.isnan(race.early)
    race.after_update(torch.tensor(0.0))
    assert (race.early, len(race.losses)) == (0.5, 60)
    assert math.isnan(race.error)
    race.standing = (0.019, 0.03)
    for _ in range(4):
        race.after_update(torch.tensor(0.0))
    with pytest.raises(module.Matched):
        race.after_update(torch.tensor(0.0))
    assert (race.train, race.error, race.early) == (0.019, 0.03, 0.5)


def test_a_network_that_is_there_before_step_60_is_compared_there(race):
    """Its error is that of step 20, not that of the end."""
    for step in range(1, 60):
        race.standing = (0.3 / step, 1 / step)  # below 0.02 from step 16 on, looked at in step 20
        race.after_update(torch.tensor(0.01))
    with pytest.raises(module.Matched):
        race.after_update(torch.tensor(0.01))
    assert (race.train, race.error) == pytest.approx((0.015, 0.05))
    assert race.early == pytest.approx(1 / 59)


def test_where_it_looks_batch_norm_is_that_of_the_training_images():
    """The loss of one batch of all of them in training mode, whatever was gathered before."""
    model = bench.mlp(0, 2, "plain", branch_layers=2, inner_norm="batchnorm")
    x, y = bench.training_set(bench.digits())
    model.train()(3 * x[:128])  # gathers other statistics
    with torch.no_grad():
        known = torch.nn.functional.cross_entropy(copy.deepcopy(model).train()(x), y).item()
    assert module.measured(model)[0] == pytest.approx(known, rel=1e-3)  # 1/N or 1/(N - 1)


def test_a_training_that_ends_early_has_no_error():
    cell = {"net": "plain", "depth": 4, "rate": 0.02, "steps": 5, "seed": 0}
    found = module.measure(cell)
    assert all(math.isnan(found[name]) for name in ("steps", "error", "train", "early"))


@pytest.mark.slow
def test_the_shortcut_removed_flips_the_verdict(monkeypatch):
    study = small(STUDY, factors={"depth": (20,), "rate": (0.05,)}, steps=80)
    assert concluded(study, study.measure)["verdict"] == "SUPPORTED"
    monkeypatch.setitem(module.WIRINGS, "residual", module.WIRINGS["plain"])
    assert concluded(study, study.measure)["verdict"] == "REFUTED"
