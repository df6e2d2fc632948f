"""ST-24: the verdicts both ways, the compute by hand, and what the real measure does."""

import math

import numpy as np
import pytest
import torch
from study_rows import concluded, small, verdicts

from addnorm.branches import keep_mask
from addnorm.studies import st24_stochastic_depth as module
from addnorm.wirings.scale import StochasticDepth

STUDY = module.STUDY


def made_up(equal, compute, train=3.0):
    """Test errors that differ by so much at equal epochs and at equal compute."""

    def metrics(cell):
        wobble = 1 + 0.1 * math.sin(5 * cell["seed"] + len(cell["length"]))
        drop, long = cell["net"] == "stochastic", cell["length"] == "long"
        error = 0.05 + (equal * wobble if drop else 0) + (compute - equal if long else 0)
        loss = 1e-3 * wobble * (train if drop else 1)
        return {"error": error, "test": error, "train": loss, "compute": 1.0, "steps": 300}

    return metrics


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (made_up(-0.02, -0.03), ["SUPPORTED", "SUPPORTED", "SUPPORTED", "REFUTED"]),
        (made_up(0.02, 0.01), ["REFUTED", "REFUTED", "SUPPORTED", "REFUTED"]),
        (made_up(0.002, -0.02, 1.0), ["REFUTED", "SUPPORTED", "REFUTED", "SUPPORTED"]),
    ],
)
def test_it_can_say_both(metrics, expected):
    found = verdicts(concluded(STUDY, metrics))
    names = ["primary", "equal-compute", "regularises", "within-a-point"]
    assert [found[name] for name in names] == expected


def test_chance_decides_nothing():
    def metrics(cell):
        return made_up(0.002 * (-1) ** cell["seed"], 0)(cell)

    assert verdicts(concluded(STUDY, metrics))["primary"] == "INCONCLUSIVE"


def test_a_training_that_diverged_has_the_error_of_guessing():
    def metrics(cell):
        known = made_up(-0.02, -0.02)(cell)
        lost = cell["net"] == "stochastic"
        return {"steps": 300, "compute": 1.0} if lost else known

    result = concluded(STUDY, metrics)
    assert result["failed"] == 2 * STUDY.mode("default").seeds
    assert result["verdict"] == "REFUTED"


def test_compute_by_hand():
    """Sixteen units that keep the width, the second and third stage's first ones never dropped."""
    keeps = [1 - 0.5 * unit / 18 for unit in range(1, 19) if unit not in (7, 13)]
    assert module.share(module.network("stochastic")) == pytest.approx((sum(keeps) + 2) / 18)
    assert module.share(module.network("full")) == 1


def test_a_few_digits_of_each_seed():
    """400 to train on, none of them tested on, other ones with another seed."""
    one, other = (module.few_digits(seed, 400) for seed in (0, 1))
    assert (len(one.training), len(one.validation)) == (400, 1397)
    assert not set(one.training) & set(one.validation)
    assert len(np.intersect1d(one.training, other.training)) < 200


def test_a_unit_is_dropped_for_the_whole_batch_and_expected_in_evaluation():
    torch.manual_seed(0)
    model = module.network("stochastic")
    x = torch.randn(3, 1, 8, 8)
    (last,) = [m for m in model.modules() if getattr(m, "keep", 1) == 0.5]
    seen = []
    last.register_forward_hook(
        lambda m, args, out: seen.append((out - args[0]).flatten(1).norm(dim=1))
    )
    for _ in range(40):
        model.train()(x)
    silent = [not update.any() for update in seen]
    assert all(update.all() or not update.any() for update in seen)
    assert 8 < sum(silent) < 32
    seen.clear()
    torch.testing.assert_close(model.eval()(x), model(x))
    assert seen[0].all()


def dropping_always(self, stream, context):
    """Drop in evaluation as in training."""
    f = self.branch(self.norm_in(stream), context)
    return stream + keep_mask(f, self.keep, per_sample=False) * f


@pytest.mark.slow
def test_dropping_in_evaluation_flips_the_verdict(monkeypatch):
    """The real measure at 20 layers, with the units dropped when it is tested too.

    The net that they are dropped of is then the worse one, whatever it is called.
    """
    monkeypatch.setattr(module, "DEPTH", 20)
    monkeypatch.setattr(StochasticDepth, "forward", dropping_always)
    study = small(STUDY, steps=40)
    study = module.Study(**{**vars(study), "secondary": (), "claims": ()})
    known = {}

    def measured(cell):
        key = module.WIRINGS[cell["net"]], cell["length"], cell["seed"]
        if key not in known:
            known[key] = STUDY.measure(cell)
        return known[key]

    assert concluded(study, measured)["verdict"] == "REFUTED"
    one, other = module.WIRINGS.values()
    monkeypatch.setattr(module, "WIRINGS", {"full": other, "stochastic": one})
    assert concluded(study, measured)["verdict"] == "SUPPORTED"
