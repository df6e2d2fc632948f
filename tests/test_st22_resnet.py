"""ST-22: the verdicts both ways, failures, and the shortcut removed from real networks."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from study_rows import concluded, small, verdicts

from addnorm.models.resnet import ResNet, ResNetConfig
from addnorm.studies import bench
from addnorm.studies import st22_resnet as module

STUDY = module.STUDY


def made_up(plain_at_56, residual_at_56=0.002, plain_error=0.5, extra=0):
    """Training losses of both networks; the other rates have three times the loss."""

    def metrics(cell):
        wobble = math.exp(0.1 * math.sin(7 * cell["seed"] + cell["depth"]))
        deep, plain = cell["depth"] == 56, cell["net"] == "plain"
        train = (plain_at_56 if plain else residual_at_56) if deep else 0.05 if plain else 0.001
        train *= wobble * (3 if cell["rate"] > 0.03 else 1)
        error = plain_error if plain and deep else 0.02
        parameters = 100 * cell["depth"] + extra * plain
        found = {"train": train, "train_error": error, "test": train, "error": error * wobble}
        return found | {"parameters": parameters}

    return metrics


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (made_up(2.3), {"primary": "SUPPORTED", "plain-rises": "SUPPORTED", "1.3": "SUPPORTED"}),
        (made_up(0.05), {"primary": "REFUTED", "plain-rises": "REFUTED", "1.6": "REFUTED"}),
        (made_up(2.3, 2.3), {"primary": "REFUTED", "residual-stays": "REFUTED", "1.3": "REFUTED"}),
        (made_up(2.3), {"residual-stays": "SUPPORTED", "test-error": "SUPPORTED"}),
        (made_up(2.3, plain_error=0.03), {"test-error": "REFUTED"}),
        (made_up(2.3, extra=1), {"same-size": "REFUTED", "primary": "SUPPORTED"}),
        (made_up(2.3, 0.009), {"residual-stays": "SUPPORTED"}),  # nine times, but all are fitted
    ],
)
def test_it_can_say_both(metrics, expected):
    found = verdicts(concluded(STUDY, metrics))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("rates", "verdict"), [((0.1,), "SUPPORTED"), ((0.03, 0.1, 0.3), "SUPPORTED")]
)
def test_a_training_that_diverged_counts_as_guessing(rates, verdict):
    """At one rate the other one stands; at both, the loss is that of guessing."""

    def metrics(cell):
        known = made_up(2.0)(cell)
        lost = cell["net"] == "plain" and cell["depth"] == 56 and cell["rate"] in rates
        return {"parameters": known["parameters"]} if lost else known

    result = concluded(STUDY, metrics)
    assert result["failed"] == STUDY.mode("default").seeds * len(rates)
    assert result["verdict"] == verdict


def test_the_test_error_is_that_of_the_rate_with_the_lowest_training_loss():
    """At another rate the deep plain network errs less; that one does not count."""

    def metrics(cell):
        found = made_up(2.0, plain_error=0.5)(cell)
        return found | ({"error": 0.01} if cell["rate"] == 0.3 else {})

    assert verdicts(concluded(STUDY, metrics))["test-error"] == "SUPPORTED"


def test_losses_are_measured_with_statistics_of_the_training_set():
    """In evaluation mode as in training mode on one batch of all images; test images by these."""
    cell = {"net": "plain", "depth": 8, "rate": 0.1, "steps": 3, "seed": 0}
    found = STUDY.measure(cell)
    torch.manual_seed(0)
    wiring = module.WIRINGS["plain"]
    model = ResNet(ResNetConfig(depth=8, width=module.WIDTH, wiring=wiring, channels=1))
    bench.trained(model, bench.digits(), 0, **bench.SGD | {"lr": 0.1, "steps": 3})
    stale, _ = bench.loss_on(model, *bench.test_set(bench.digits()))
    x, y = bench.training_set(bench.digits())
    logits = model.train()(x)
    assert found["train"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-3)
    wrong = (logits.argmax(1) != y).float().mean().item()
    assert found["train_error"] == pytest.approx(wrong, abs=2e-3)
    assert found["test"] != pytest.approx(stale, rel=1e-2)


@pytest.mark.slow
def test_the_shortcut_removed_flips_the_verdict(monkeypatch):
    """The real measure at 8 and 32 layers, 4 wide: refuted where nothing is skipped.

    The limit is a quarter here, for so small networks differ less.
    """
    monkeypatch.setattr(module, "WIDTH", 4)
    monkeypatch.setattr(module, "DEPTHS", (8, 32))
    known = {}

    def measured(cell):
        key = module.WIRINGS[cell["net"]], cell["depth"], cell["seed"]
        if key not in known:
            known[key] = STUDY.measure(cell)
        return known[key]

    study = small(STUDY, seeds=7, factors={"rate": (0.1,), "depth": (8, 32)}, steps=60)
    study = replace(study, primary=replace(STUDY.primary, limit=0.1), secondary=(), claims=())
    assert concluded(study, measured)["verdict"] == "SUPPORTED"
    monkeypatch.setitem(module.WIRINGS, "residual", module.WIRINGS["plain"])
    assert concluded(study, measured)["verdict"] == "REFUTED"
