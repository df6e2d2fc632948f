"""ST-23: the verdicts both ways, a step worked out by hand, and DeepNorm replaced by post-norm."""

import math

import pytest
import torch
from study_rows import concluded, small, verdicts

from addnorm.models.gpt import GPT, GPTConfig
from addnorm.studies import bench
from addnorm.studies import st23_model_update as module

STUDY = module.STUDY
LEVEL = {"post-norm": 1000.0, "DeepNorm": 50.0, "pre-norm": 300.0}


def made_up(powers, gradient=0.0):
    """Updates that grow with depth to a power by wiring, and gradients to another."""

    def metrics(cell):
        wobble = 1 + 0.02 * math.sin(5 * cell["seed"] + cell["depth"] + len(cell["wiring"]))
        deeper = cell["depth"] / 6
        power = powers.get((cell["wiring"], cell["optimizer"]), powers.get(cell["wiring"], 0.0))
        update = LEVEL[cell["wiring"]] * deeper**power * wobble
        return {"update": update, "gradient": 2 * deeper**gradient * wobble}

    return metrics


@pytest.mark.parametrize(
    ("powers", "gradient", "expected"),
    [
        ({"post-norm": 1}, 0, ["SUPPORTED"] * 6),
        ({"post-norm": 1, "DeepNorm": 0.5}, 0, ["SUPPORTED", "REFUTED", "REFUTED"]),
        ({"post-norm": 0.5, "DeepNorm": 0.5}, 0, ["REFUTED"]),
        ({"post-norm": 1, ("DeepNorm", "Adam"): 0.5}, 0, ["SUPPORTED", "SUPPORTED", "REFUTED"]),
        ({"DeepNorm": 0.5, "pre-norm": 0.5}, 0.5, ["REFUTED"] * 6),
    ],
)
def test_it_can_say_both(powers, gradient, expected):
    found = verdicts(concluded(STUDY, made_up(powers, gradient)))
    names = ["primary", "flat-sgd", "flat-adam", "smaller", "pre-smaller", "no-explosion"]
    assert [found[name] for name in names[: len(expected)]] == expected


def test_a_step_that_failed_decides_nothing():
    def metrics(cell):
        lost = cell["depth"] == 96 and cell["wiring"] == "post-norm"
        return {"update": math.nan, "gradient": math.nan} if lost else made_up({})(cell)

    result = concluded(STUDY, metrics)
    assert result["failed"] == 2 * STUDY.mode("default").seeds
    assert result["verdict"] == "INCONCLUSIVE"


def test_the_state_in_front_of_the_head_is_normalised():
    torch.manual_seed(0)
    for wiring in module.WIRINGS.values():
        model = GPT(GPTConfig(depth=3, dim=16, heads=2, context=8, vocab_size=5, wiring=wiring))
        state = module.hidden(model, torch.randint(5, (2, 8)))
        assert state.shape == (2, 8, 16)
        assert state.square().mean().sqrt().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("optimizer", "rate"), [("SGD", 1e-3), ("Adam", 1e-6)])
def test_one_step_by_hand(optimizer, rate):
    """The step of SGD is the gradient, that of Adam its sign; both moves are worked out anew."""
    row = STUDY.measure({"seed": 1, "wiring": "post-norm", "depth": 2, "optimizer": optimizer})
    relu = module.FeedForwardConfig(activation="relu", hidden=128)
    model = bench.gpt(1, 2, "postnorm", 32, heads=2, start="xavier", feedforward=relu)
    text = bench.text(32)
    x, y = (torch.as_tensor(v) for v in text.training_batch(1, 0, 16))
    seen, _ = bench.windows(32, 32)
    before = module.hidden(model, seen)
    loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for p, g in zip(model.parameters(), gradients, strict=True):
            p -= rate * (g if optimizer == "SGD" else g / (g.abs() + 1e-8))
    moved = (module.hidden(model, seen) - before).square().mean().sqrt().item() / rate
    assert row["update"] == pytest.approx(moved, rel=2e-3)
    if optimizer == "SGD":
        length = torch.stack([g.norm() for g in gradients]).norm().item()
        assert row["gradient"] == pytest.approx(length, rel=1e-3)


@pytest.mark.slow
def test_post_norm_in_the_place_of_deepnorm_flips_the_verdict(monkeypatch):
    """The real measure at two depths."""
    study = small(STUDY, factors={"depth": (2, 20), "optimizer": ("Adam",)})
    study = module.Study(**{**vars(study), "secondary": ()})
    assert concluded(study, study.measure)["verdict"] == "SUPPORTED"
    monkeypatch.setitem(module.WIRINGS, "DeepNorm", "postnorm")
    assert concluded(study, study.measure)["verdict"] == "REFUTED"
