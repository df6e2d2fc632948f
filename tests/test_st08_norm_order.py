"""ST-08: the verdicts both ways, the norm's place swapped, the gradient against autograd."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from study_rows import concluded, small, verdicts

from addnorm.studies import bench
from addnorm.studies import st08_norm_order as module
from addnorm.training.run import Evaluation

STUDY = module.STUDY


def made_up(pre=-0.5, post=0.0, cold=3.27, low=2.75):
    """Slopes of both; the loss of post-norm without warm-up at the high and at the low rate."""

    def metrics(cell):
        wobble = 0.02 * math.sin(5 * cell["seed"] + 1)
        is_pre = cell["norm"] == "pre"
        fails = cell["norm"] == "post" and not cell["warmup"]
        loss = {True: 2.6, False: 2.7}[is_pre]
        return {
            "slope": (pre if is_pre else post) + wobble,
            "profile": [0.4, 0.1] if is_pre else [0.2, 0.4],
            "growth": 0.9 + wobble,
            **dict.fromkeys(
                ("loss", "train"),
                wobble + ((cold if cell["rate"] == module.RATE else low) if fails else loss),
            ),
            **{key: [1.0] for key in ("curve", "step", "depth", "gradient", "layer", "stream")},
            "alike": 0.9,
        }

    return metrics


def test_it_can_say_both():
    assert set(verdicts(concluded(STUDY, made_up())).values()) == {"SUPPORTED"}
    assert verdicts(concluded(STUDY, made_up(low=3.2)))["lower-rate"] == "REFUTED"
    found = verdicts(concluded(STUDY, made_up(pre=0.0, cold=2.7)))
    assert {k for k, v in found.items() if v == "REFUTED"} == {
        *("primary", "pre-slope", "warm-up", "1.33", "1.35")
    }


def test_a_training_that_diverged_counts_as_guessing():
    result = concluded(STUDY, made_up(cold=math.nan))
    assert result["failed"] == STUDY.mode("default").seeds
    assert verdicts(result)["warm-up"] == "SUPPORTED"


def test_the_training_loss_picks_the_rate():
    """The low rate has the lower validation loss, the high one the lower training loss."""

    def metrics(cell):
        return made_up()(cell) | {"train": 1 - cell["rate"]}

    assert verdicts(concluded(STUDY, metrics))["lower-rate"] == "REFUTED"


def test_quick_mode_can_answer_the_secondary_claims():
    """Six p-values after Holm's correction: the smallest of eight seeds, 2/2^8, times six."""
    assert STUDY.mode("quick").seeds >= 8
    quick = small(STUDY, seeds=STUDY.mode("quick").seeds)
    assert set(verdicts(concluded(quick, made_up())).values()) == {"SUPPORTED"}


@pytest.mark.parametrize(
    ("status", "loss", "expected"),
    [("finished", 2.5, 2.5), ("finished", 9.0, module.bench.UNIFORM), ("diverged", 9.0, math.nan)],
)
def test_no_training_counts_as_worse_than_guessing(monkeypatch, status, loss, expected):
    def trained(model, data, seed, **settings):
        seen = [Evaluation(40, loss, 1.0)]
        run = bench.Run(model, data, bench.TrainConfig(**settings), None, evaluations=seen)
        run.losses, run.status = [loss] * 40, status
        return run

    monkeypatch.setattr(bench, "trained", trained)
    monkeypatch.setattr(module, "_start", lambda seed, wiring: {})
    found = module.measure({"norm": "pre", "warmup": 0.0, "rate": 1e-3, "steps": 40, "seed": 0})
    assert found["loss"] == pytest.approx(expected, nan_ok=True)
    assert found["train"] == pytest.approx(expected, nan_ok=True)


def test_the_gradient_of_one_position_is_autograds():
    """The closed form beside one backward pass for each position."""
    model = bench.gpt(3, 2, "postnorm", 4, dim=8, heads=2)
    x, y = bench.windows(4, 2)
    weight = module._feedforwards(model)[-1].out.weight
    losses = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
    norms = [torch.autograd.grad(one, weight, retain_graph=True)[0].norm() for one in losses]
    mean = torch.stack(norms).square().mean().sqrt().item()
    assert module.last_gradient(model, x, y) == pytest.approx(mean, rel=1e-5)


def test_only_the_warm_up_differs(monkeypatch):
    told = []

    def trained(model, data, seed, **settings):
        told.append(settings)
        return bench.Run(model, data, bench.TrainConfig(**settings), None, losses=[1.0] * 40)

    monkeypatch.setattr(bench, "trained", trained)
    monkeypatch.setattr(module, "_start", lambda seed, wiring: {})
    for warmup in (0.0, 0.5):
        cell = {"norm": "post", "warmup": warmup, "rate": 1e-3, "steps": 40, "seed": 0}
        assert module.measure(cell)["step"] == [5, 15, 25, 35]
    cold, warm = told
    assert (cold["warmup"], warm["warmup"]) == (0, 20)
    assert cold | {"warmup": 20} == warm


@pytest.mark.slow
def test_pre_norm_made_post_norm_flips_the_verdict(monkeypatch):
    """The real networks at the start: supported, and refuted where both have the norm behind."""
    start = functools.cache(module._start)
    monkeypatch.setattr(module, "DEPTHS", (8, 32))

    def metrics(cell):
        return made_up()(cell) | start(cell["seed"], module.WIRINGS[cell["norm"]])

    study = small(STUDY)
    assert concluded(study, metrics)["verdict"] == "SUPPORTED"
    monkeypatch.setitem(module.WIRINGS, "pre", "postnorm")
    assert concluded(study, metrics)["verdict"] == "REFUTED"
