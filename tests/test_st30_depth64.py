"""ST-30: the verdict both ways, the order of rates, and all shortcuts taken out."""

import math

import pytest
from study_rows import concluded, small, verdicts

from addnorm.contract import catalogue
from addnorm.studies import bench
from addnorm.studies import st30_depth64 as module

STUDY = module.STUDY


def made_up(power=0.03, exponential=0.9, low=0.1):
    """Training errors by law; post-norm's at a lower rate."""

    def metrics(cell):
        wobble = 0.01 * math.sin(3 * cell["seed"] + 1)
        error = {"power": power, "exponential": exponential, "control": 0.03}[cell["law"]] + wobble
        first = error
        if cell["wiring"] == "postnorm":
            error, first = low, 0.85 + wobble
        return {"error": error, "test": error, "first": first, "rate": 1e-3}

    return metrics


def test_it_can_say_both():
    assert set(verdicts(concluded(STUDY, made_up())).values()) == {"SUPPORTED"}
    found = verdicts(concluded(STUDY, made_up(exponential=0.1, low=0.5)))
    assert {k for k, v in found.items() if v == "REFUTED"} == {
        *("primary", "sum-fails", "post-norm-slower")
    }
    assert concluded(STUDY, made_up(power=0.5))["verdict"] == "REFUTED"


def test_a_training_that_diverged_counts_as_guessing():
    result = concluded(STUDY, made_up(exponential=math.nan))
    assert result["failed"] == 12 * STUDY.mode("default").seeds
    assert result["verdict"] == "SUPPORTED"


def test_every_entry_has_its_law():
    """All of the catalogue but the one that asks something of an attention."""
    assert set(module.LAWS) == set(catalogue()) - {"hybridnorm"}
    expected = {"prenorm": "power", "unet": "power", "norm-after-addition": "exponential"}
    assert {name: module.NETS[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("errors", "error", "first", "rate"),
    [
        ([0.1], 0.1, 0.1, 1e-3),
        ([0.9, 0.15], 0.15, 0.9, 3e-4),
        ([0.9, 0.5, math.nan, 0.2], 0.2, 0.9, 1e-2),
        ([0.9, 0.5, 0.4, 0.6], 0.4, 0.9, 0.0),
    ],
)
def test_rates_are_tried_until_one_trains(monkeypatch, errors, error, first, rate):
    left = iter(errors)

    def one(*_):
        e = next(left)
        return e, 1 - e

    monkeypatch.setattr(module, "_errors", one)
    found = module.measure({"wiring": "prenorm", "seed": 0, "steps": 1})
    assert found == {"error": error, "test": 1 - error, "first": first, "rate": rate}
    assert not list(left)


def test_the_error_is_that_of_the_training_images(monkeypatch):
    """After one step: the share wrong, by hand, of the trained model that the test keeps."""
    kept, build = [], bench.mlp
    monkeypatch.setattr(bench, "mlp", lambda *a, **k: kept.append(build(*a, **k)) or kept[-1])
    monkeypatch.setattr(module, "DEPTH", 2)
    error, _ = module._errors("prenorm", 0, 1e-3, 1)
    x, y = bench.training_set(bench.digits())
    assert len(y) == 1438
    assert error == pytest.approx((kept[0].eval()(x).argmax(-1) != y).double().mean().item())


@pytest.mark.slow
def test_the_shortcuts_removed_flip_the_verdict(monkeypatch):
    """The real trainings of pre-norm and of plain layers; then all are plain."""
    monkeypatch.setattr(module, "DEPTH", 32)
    monkeypatch.setattr(module, "RATES", (1e-3,))
    known = ("prenorm", "postnorm", "plain", "residual", "residual/gpt2")
    study = small(STUDY, factors={"wiring": known}, steps=25)

    def metrics(cell):
        if cell["wiring"] in ("prenorm", "plain"):
            return study.measure(cell)
        return made_up()(cell) | ({"error": 0.9} if cell["wiring"] == "postnorm" else {})

    monkeypatch.setitem(module.NETS, "postnorm", "control")  # not counted
    assert concluded(study, metrics)["verdict"] == "SUPPORTED"
    build = bench.mlp
    monkeypatch.setattr(
        bench, "mlp", lambda seed, depth, _, **more: build(seed, depth, "plain", **more)
    )
    assert concluded(study, metrics)["verdict"] == "REFUTED"
