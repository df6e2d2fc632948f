"""ST-04: the verdicts both ways, planted bugs, and what its changes do to a network."""

import math
from dataclasses import replace

import pytest
import torch
from study_rows import concluded, small, verdicts

from addnorm.branches import Context
from addnorm.studies import bench
from addnorm.studies import st04_vanishing as module

STUDY = module.STUDY
# The loss at 8, 20 and 56 layers, and the gradient ratio at 56, where degradation needs none lost.
LOSSES = {
    ("he", "none"): (1e-3, 2e-2, 0.9),
    ("he", "equalised"): (1e-3, 2e-2, 0.9),
    ("he", "adam"): (1e-3, 1e-2, 0.3),
    ("batchnorm", "none"): (1e-3, 8e-2, 2.3),
    ("default", "none"): (2.3, 2.3, 2.3),
    ("default", "equalised"): (0.5, 1.7, 2.3),
}
RATIOS = {"he": 0.5, "batchnorm": 1e4, "default": 1e-22, "looks-linear": 0.7}


def made_up(losses=None, ratios=None):
    """Training losses by network and depth, 1e-3 where nothing is said, with a little noise."""
    losses, ratios = LOSSES | (losses or {}), RATIOS | (ratios or {})

    def metrics(cell):
        wobble = math.exp(0.1 * math.sin(7 * cell["seed"] + cell["depth"]))
        levels = losses.get((cell["net"], cell["change"]), (1e-3, 1e-3, 1e-3))
        train = levels[module.DEPTHS.index(cell["depth"])] * wobble
        ratio = ratios[cell["net"]]
        rest = {"profile": [ratio, 1.0], "rate": 0.03}
        return {"train": train, "test": train, "ratio": ratio, "late": ratio, **rest}

    return metrics


def test_it_can_say_both():
    """What was found: every claim is refuted. Without degradation nothing speaks against them."""
    found = verdicts(concluded(STUDY, made_up()))
    assert {found[name] for name in ("1.10", "1.13", "1.21", "1.29", "3.9")} == {"REFUTED"}
    assert {found[c.name] for c in STUDY.contrasts} == {"SUPPORTED"}
    healthy = verdicts(concluded(STUDY, made_up({("he", "none"): (1e-3, 1e-3, 1e-3)})))
    assert (healthy["primary"], healthy["1.10"]) == ("REFUTED", "SUPPORTED")


def test_a_gradient_that_vanishes_cannot_speak_against_the_claim():
    found = verdicts(concluded(STUDY, made_up(ratios={"he": 0.01})))
    assert (found["primary"], found["1.10"]) == ("REFUTED", "SUPPORTED")
    known = made_up()
    late = {"he": 0.01}
    gone = concluded(STUDY, lambda cell: known(cell) | {"late": late.get(cell["net"], 1.0)})
    assert gone["verdict"] == "REFUTED"


@pytest.mark.parametrize(
    ("net", "change", "losses", "name", "claim"),
    [
        ("default", "none", (1e-3, 1e-3, 1e-3), "sufficient", ""),
        ("batchnorm", "shortcut", (1e-3, 8e-2, 2.3), "cures-without", "3.9"),
        ("he", "equalised", (1e-3, 1e-3, 2e-3), "equalised", "1.21"),
        ("he", "adam", (1e-3, 1e-3, 2e-3), "adam", ""),
        ("looks-linear", "none", (1e-3, 0.3, 2.3), "plain-can", "1.29"),
        ("looks-linear", "adam-faded", (1e-3, 0.3, 2.3), "faded", "1.13"),
    ],
)
def test_each_statement_can_be_refuted(net, change, losses, name, claim):
    found = verdicts(concluded(STUDY, made_up({(net, change): losses})))
    assert found[name] == "REFUTED"
    assert found.get(claim, "SUPPORTED") == "SUPPORTED"


def test_a_training_that_diverged_counts_as_guessing():
    known = made_up()
    result = concluded(
        STUDY,
        lambda cell: (
            known(cell)
            | ({"train": math.nan} if (cell["net"], cell["depth"]) == ("he", 56) else {})
        ),
    )
    assert result["failed"] == 3 * STUDY.mode("default").seeds
    assert result["verdict"] == "SUPPORTED"


def test_a_rate_that_diverges_is_not_taken(monkeypatch):
    """The better rate counts; where both end at NaN the training has failed."""
    cell = {"net": "he", "change": "none", "depth": 8, "seed": 0, "steps": 2, "rates": 2}
    monkeypatch.setitem(module.RATES, "sgd", (1e30, 0.01))
    assert STUDY.measure(cell)["rate"] == 0.01
    assert math.isnan(STUDY.measure(cell | {"rates": 1})["train"])


def model(net, change="none", depth=20):
    return module._model({"net": net, "change": change, "depth": depth, "seed": 0})


def gradients(net, change="none"):
    x, y = (torch.from_numpy(a) for a in bench.digits().training_batch(0, 0, 16))
    network = model(net, change).double()
    torch.nn.functional.cross_entropy(network(x.double()), y).backward()
    return {n: p.grad for n, p in network.named_parameters()}


def test_looks_linear_is_an_isometry():
    """a <- W a through every layer: the difference of the halves keeps the norm of A x."""
    network = model("looks-linear", depth=56)
    x = torch.randn(5, 64)
    first = module._layers(network)[0].weight[:32] @ x.T
    out = network.stack(x)
    a = out[:, :32] - out[:, 32:]
    torch.testing.assert_close(a.norm(dim=1), first.norm(dim=0), rtol=1e-4, atol=0)
    assert torch.linalg.svdvals(module._layers(network)[0].weight[:32]).sub(1).abs().max() < 1e-5
    torch.testing.assert_close(network.stack(-x)[:, 32:], out[:, :32], rtol=1e-4, atol=1e-5)


def test_equalised_gradients_have_norm_one():
    assert {
        round(g.norm().item(), 4)
        for name, g in gradients("default", "equalised").items()
        if g.any() or "bias" not in name
    } == {1.0}
    tiny = torch.tensor([3e-30, 4e-30])
    torch.testing.assert_close(module.unit(tiny), torch.tensor([0.6, 0.8]))
    assert not module.unit(torch.zeros(3)).any()


def test_fading_multiplies_the_gradient_by_its_power_and_nothing_else():
    """The weights of the first of 20 layers get 0.9^20 of their gradient, those of the last 0.9."""
    whole, faded = gradients("looks-linear"), gradients("looks-linear", "faded")
    weights = [name for name in whole if name.endswith("weight")]
    for back, name in zip(range(20, -1, -1), weights, strict=True):
        torch.testing.assert_close(faded[name], 0.9**back * whole[name], rtol=1e-9, atol=1e-15)
    x = torch.randn(3, 64)
    assert torch.equal(model("looks-linear")(x), model("looks-linear", "faded")(x))


def test_the_gradients_are_those_of_plain_autograd():
    """Default start: the ratio of 20 layers beside that of float64 through the whole network."""
    network = model("default")
    profile = module._profile(network, 0)
    x, y = (torch.from_numpy(a) for a in bench.digits().training_batch(0, 0, 128))
    streams = [x.double().flatten(1).requires_grad_()]
    for connection in network.double().stack:
        streams.append(connection(streams[-1], Context()))
    loss = torch.nn.functional.cross_entropy(network.head(streams[-1]), y)
    sizes = [g.square().mean().sqrt().item() for g in torch.autograd.grad(loss, streams)]
    assert profile == pytest.approx([s / sizes[-1] for s in sizes], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "steps", "verdict"), [(False, 100, "SUPPORTED"), (True, 30, "REFUTED")]
)
def test_a_shortcut_in_the_plain_nets_flips_the_verdict(monkeypatch, bug, steps, verdict):
    """The real measure of the networks that decide the primary statement."""

    def others(cell):
        return (cell["net"], cell["change"]) not in (("he", "none"), ("batchnorm", "none"))

    alone = replace(STUDY, secondary=(), claims=(), skip=others)
    study = small(alone, factors={"depth": (8, 56)}, steps=steps, rates=1)
    if bug:
        monkeypatch.setattr(module, "PLAIN", module.SHORTCUT)
    assert concluded(study, study.measure)["verdict"] == verdict
