"""ST-04: the verdicts both ways, planted bugs, and what its changes do to a network."""

import math
from dataclasses import replace

import pytest
import torch
from study_rows import concluded, small, verdicts

from addnorm.branches import Context
from addnorm.studies import bench
from addnorm.studies import st04_vanishing as module
from addnorm.studies.frame import Rows

STUDY = module.STUDY
# The loss at 8, 20 and 56 layers, and the smallest gradient ratio, of networks as they were found.
LOSSES = {
    ("he", "none"): (1e-3, 2e-2, 0.9),
    ("he", "equalised"): (1e-4, 2e-2, 0.9),
    ("he", "adam"): (1e-3, 1e-2, 0.3),
    ("batchnorm", "none"): (1e-3, 8e-2, 2.3),
    ("default", "none"): (2.3, 2.3, 2.3),
}
RATIOS = {"he": 0.5, "batchnorm": 1e4, "default": 1e-22, "looks-linear": 0.7}
SEEDS = STUDY.mode("default").seeds


def made_up(losses=None, ratios=None):
    """Training losses by network and depth, 1e-3 where nothing is said, with a little noise."""
    losses, ratios = LOSSES | (losses or {}), RATIOS | (ratios or {})

    def metrics(cell):
        wobble = math.exp(0.1 * math.sin(7 * cell["seed"] + cell["depth"]))
        levels = losses.get((cell["net"], cell["change"]), (1e-3, 1e-3, 1e-3))
        train = levels[module.DEPTHS.index(cell["depth"])] * wobble
        ratio = ratios[cell["net"]]
        rest = {"profile": [ratio, 1.0], "rate": 0.03, "edge": 0.0}
        return {"train": train, "test": train, "late": ratio, "least": ratio, **rest}

    return metrics


def test_it_can_say_both():
    """What was found: every claim is refuted. Without degradation nothing speaks against 1.10."""
    found = verdicts(concluded(STUDY, made_up()))
    assert {found[c.id] for c in STUDY.claims} == {"REFUTED"}
    assert {found[c.name] for c in STUDY.contrasts} == {"SUPPORTED"}
    healthy = verdicts(concluded(STUDY, made_up({("he", "none"): (1e-3, 1e-3, 1e-3)})))
    assert (healthy["primary"], healthy["1.10"]) == ("REFUTED", "INCONCLUSIVE")


@pytest.mark.parametrize("net", ["he", "batchnorm"])
def test_a_gradient_that_vanishes_decides_nothing(net):
    """Where the premise fails there is no evidence on either side, whatever the losses are."""
    for losses in ({}, {(net, "none"): (1e-3, 1e-3, 1e-3)}):
        found = verdicts(concluded(STUDY, made_up(losses, {net: 0.01})))
        assert (found["primary"], found["1.10"]) == ("INCONCLUSIVE", "INCONCLUSIVE")
    assert (found["cures-without"] == "INCONCLUSIVE") == (net == "batchnorm")


@pytest.mark.parametrize(
    ("net", "change", "losses", "name", "claim"),
    [
        ("default", "none", (1e-3, 1e-3, 1e-3), "sufficient", None),
        ("batchnorm", "shortcut", (1e-3, 8e-2, 2.3), "cures-without", "1.21"),
        ("he", "equalised", (1e-3, 1e-3, 2e-3), "equalised", None),
        ("he", "adam", (1e-3, 1e-3, 2e-3), "adam", None),
        ("looks-linear", "none", (1e-3, 0.3, 2.3), "plain-can", "1.29"),
        ("looks-linear", "faded", (1e-3, 0.3, 2.3), "faded", "1.13"),
        ("looks-linear", "adam-faded", (1e-3, 0.3, 2.3), "faded", "1.13"),
    ],
)
def test_each_statement_can_be_refuted(net, change, losses, name, claim):
    found = verdicts(concluded(STUDY, made_up({(net, change): losses})))
    assert found[name] == "REFUTED"
    assert claim is None or found[claim] == "INCONCLUSIVE"


def test_equal_gradients_gain_a_share_of_the_powers_of_ten():
    """From 1 to 0.01 nats are two powers of ten, of which 0.1 is half; no gap, no answer."""

    def gain(equalised, shortcut=1e-9):
        losses = {("he", "none"): 1.0, ("he", "equalised"): equalised}
        losses |= {("batchnorm", "shortcut"): shortcut}
        levels = {"depth": 56}
        rows = [{"net": n, "change": c, "train": t, **levels} for (n, c), t in losses.items()]
        return module._gain(Rows(rows))

    assert [gain(v) for v in (1.0, 0.1, 1e-5, 10.0)] == pytest.approx([0, 0.5, 1, -0.5])
    assert math.isnan(gain(0.5, shortcut=0.2))


def test_losses_below_the_floor_are_one_loss():
    """A thousandfold rise from 1e-6 to 1e-3 is none: all images are fitted at both depths."""
    found = verdicts(concluded(STUDY, made_up({("looks-linear", "none"): (1e-6, 1e-6, 9e-3)})))
    assert found["plain-can"] == "SUPPORTED"
    assert verdicts(concluded(STUDY, made_up({("he", "none"): (1e-6, 1e-6, 9e-3)})))["primary"] == (
        "REFUTED"
    )


def test_a_training_that_diverged_counts_as_guessing():
    """Its gradient at the start, which is all that is known of it, did not vanish."""
    known = made_up()
    lost = {"train": math.nan, "test": math.nan, "late": math.nan}
    result = concluded(
        STUDY,
        lambda cell: known(cell) | (lost if (cell["net"], cell["depth"]) == ("he", 56) else {}),
    )
    assert result["failed"] == 3 * SEEDS
    assert result["verdict"] == "SUPPORTED"


def test_a_rate_that_diverges_is_not_taken(monkeypatch):
    """The better rate counts; where all end at NaN the training has failed."""
    cell = {"net": "he", "change": "none", "depth": 8, "seed": 0, "steps": 2, "rates": 2}
    monkeypatch.setitem(module.RATES, "sgd", (1e30, 0.01, 0.02))
    one = STUDY.measure(cell)
    assert (one["rate"], one["edge"]) == (0.01, 1.0)
    inner = STUDY.measure(cell | {"rates": 3, "steps": 8})
    assert (inner["rate"], inner["edge"]) == (0.02, 0.0)
    failed = STUDY.measure(cell | {"rates": 1})
    assert math.isnan(failed["train"])
    assert math.isnan(failed["late"])
    assert failed["least"] == failed["profile"][0] > module.TRAINABLE


@pytest.mark.parametrize(
    ("change", "clip", "optimizer"),
    [("none", 5.0, "sgd"), ("equalised", 0.0, "sgd"), ("adam", 5.0, "adamw")],
)
def test_only_equal_gradients_are_not_clipped(monkeypatch, change, clip, optimizer):
    """The norm of 113 gradients of norm 1 is above 5."""
    given, real = [], bench.trained

    def trained(*args, **settings):
        run = real(*args, **settings)
        given.append((run.config.clip, run.config.optimizer))
        return run

    monkeypatch.setattr(bench, "trained", trained)
    STUDY.measure({"net": "he", "change": change, "depth": 8, "seed": 0, "steps": 1, "rates": 1})
    assert given == [(clip, optimizer)]


def test_what_counts_as_least_is_the_smaller_of_start_and_end(monkeypatch):
    cell = {"net": "he", "change": "none", "depth": 8, "seed": 0, "steps": 2, "rates": 1}
    ratios = iter([3.0, 2.0, 3.0, 4.0])  # after training, then at the start
    monkeypatch.setattr(module, "_profile", lambda model, seed: [next(ratios), 1.0])
    assert [STUDY.measure(cell)["least"] for _ in range(2)] == [2.0, 3.0]


def test_the_loss_is_measured_with_statistics_of_the_training_set():
    """BatchNorm in evaluation mode gives what one batch of all images gives in training mode."""
    cell = {"net": "batchnorm", "change": "none", "depth": 8, "seed": 0, "steps": 3, "rates": 1}
    found = STUDY.measure(cell)
    network, data = model("batchnorm", depth=8), bench.digits()
    settings = bench.SGD | {"lr": found["rate"], "steps": 3, "schedule": "linear"}
    bench.trained(network, data, 0, **settings)
    x, y = bench.training_set(data)
    loss = torch.nn.functional.cross_entropy(network.train()(x), y).item()
    assert found["train"] == pytest.approx(loss, rel=1e-3)
    assert bench.loss_on(network, x, y)[0] != pytest.approx(loss, rel=1e-2)


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
        return cell["net"] not in ("he", "batchnorm") or cell["change"] != "none"

    alone = replace(STUDY, secondary=(), claims=(), skip=others)
    study = small(alone, factors={"depth": (8, 56)}, steps=steps, rates=1)
    if bug:
        monkeypatch.setattr(module, "PLAIN", module.SHORTCUT)
    assert concluded(study, study.measure)["verdict"] == verdict
