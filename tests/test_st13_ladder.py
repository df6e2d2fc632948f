"""ST-13: the verdicts both ways, the loss by position, and the skip taken out of v7."""

import math

import pytest
import torch
from study_rows import concluded, small, verdicts

from addnorm.studies import bench
from addnorm.studies import st13_ladder as module

STUDY = module.STUDY


def made_up(deep=0.9, shallow=0.05, far=0.0, norm=0.15):
    """What the skip gains with several blocks and with one, how it goes by position; the norm's."""

    def metrics(cell):
        wobble = 0.01 * math.sin(3 * cell["seed"] + cell["depth"])
        gain = {1: shallow}.get(cell["depth"], deep)
        v7 = 2.15 + wobble + 0.2 * (cell["rate"] < 1e-2)
        loss = {"v6": v7 + gain, "v7": v7, "v8": v7, "v9": v7 - norm}
        by = [loss[cell["net"]] + (far * t if cell["net"] == "v6" else 0) for t in range(8)]
        return {
            **dict.fromkeys(("loss", "train"), loss[cell["net"]]),
            "position": by,
            "parameters": 100,
            **{key: [1.0] for key in ("curve", "step", "seen")},
        }

    return metrics


def test_it_can_say_both():
    found = verdicts(concluded(STUDY, made_up()))
    assert {found.pop(k) for k in ("range", "0.10")} == {"REFUTED"}
    assert set(found.values()) == {"SUPPORTED"}
    found = verdicts(concluded(STUDY, made_up(deep=0.0, shallow=0.4, far=0.2, norm=-0.1)))
    assert {found.pop(k) for k in ("range", "0.10")} == {"SUPPORTED"}
    assert set(found.values()) == {"REFUTED"}


def test_a_gain_that_falls_with_the_distance_is_no_support():
    found = verdicts(concluded(STUDY, made_up(far=-0.2)))
    assert (found["range"], found["0.10"]) == ("REFUTED", "REFUTED")


def test_the_training_loss_picks_the_rate():
    """At the low rate v6 comes close to v7 on the validation text, but not on the training text."""

    def metrics(cell):
        known = made_up()(cell)
        low = cell["rate"] < 1e-2 and cell["net"] == "v6"
        return known | {"train": known["train"] + 2 * low, "loss": known["loss"] - 0.9 * low}

    found = verdicts(concluded(STUDY, metrics))
    assert (found["primary"], found["both-rates"]) == ("SUPPORTED", "REFUTED")


def test_a_rate_left_out_decides_nothing():
    found = verdicts(concluded(small(STUDY, factors={"rate": (1e-2,)}), made_up()))
    assert (found["primary"], found["both-rates"]) == ("SUPPORTED", "INCONCLUSIVE")


def test_quick_mode_can_answer_the_secondary_claims():
    """Six p-values after Holm's correction: the smallest of eight seeds, 2/2^8, times six."""
    quick = small(STUDY, seeds=STUDY.mode("quick").seeds)
    found = verdicts(concluded(quick, made_up(far=0.2)))
    assert set(found.values()) == {"SUPPORTED"}


def test_positions_of_a_network_that_diverged_count_as_guessing(monkeypatch):
    monkeypatch.setattr(module, "position_losses", lambda model: [2.0, 9.0, math.nan])
    cell = {"net": "v6", "depth": 1, "rate": 1e-2, "steps": 1, "seed": 0}
    assert module.measure(cell)["position"] == [2.0, module.bench.UNIFORM, module.bench.UNIFORM]


def test_a_training_that_diverged_counts_as_guessing():
    def metrics(cell):
        lost = (
            {"loss": math.nan, "train": math.nan}
            if (cell["net"], cell["rate"]) == ("v6", 1e-2)
            else {}
        )
        return made_up()(cell) | lost

    result = concluded(STUDY, metrics)
    assert result["failed"] == 3 * STUDY.mode("default").seeds
    assert result["verdict"] == "SUPPORTED"


def test_losses_by_position_average_to_the_loss():
    """Of a network that has learned nothing but a table: position by position beside the whole."""
    torch.manual_seed(0)
    table = torch.nn.Embedding(bench.text(8).vocab_size, bench.text(8).vocab_size)
    found = module.position_losses(table)
    whole, _ = bench.loss_on(table, *bench.windows(8, 4096))
    assert sum(found) / 8 == pytest.approx(whole, rel=1e-5)
    x, y = bench.windows(8, 4096)
    second = torch.nn.functional.cross_entropy(table(x[:, 1]), y[:, 1]).item()
    assert found[1] == pytest.approx(second, rel=1e-5)


@pytest.mark.slow
def test_the_skip_removed_flips_the_verdict(monkeypatch):
    """The real trainings of v6 and v7; then v7 without its skip."""
    study = small(STUDY, factors={"rate": (1e-2,)}, steps=120)

    def metrics(cell):
        if cell["net"] in ("v6", "v7") and cell["depth"] == 3:
            return study.measure(cell)
        return made_up()(cell)

    assert concluded(study, metrics)["verdict"] == "SUPPORTED"
    monkeypatch.setitem(module.PRESETS, "v7", "babygpt-v6")
    assert concluded(study, metrics)["verdict"] == "REFUTED"
