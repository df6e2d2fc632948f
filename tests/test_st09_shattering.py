"""ST-09: the verdicts both ways, planted bugs, and that the networks are what is said of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from study_rows import concluded, small, verdicts

from addnorm.probe.whiteness import brown_noise
from addnorm.studies import st09_shattering as module

STUDY = module.STUDY


def made_up(**changed):
    """Correlations of neighbours by depth: white soon, falling as a root, falling slowly."""
    laws = {
        "plain": lambda depth: 0.5**depth,
        "residual": lambda depth: depth**-0.3,
        "residual-0.1": lambda depth: depth**-0.1,
        "unnormalised": lambda depth: depth**-0.2,
        "white noise": lambda _: 0.0,
        "brown noise": lambda _: 0.98,
    } | changed

    def metrics(cell):
        wobble = 0.01 * math.sin(7 * cell["seed"] + cell["depth"])
        lag1 = laws[cell["net"]](cell["depth"]) + wobble
        return {"acf": [1.0, lag1], "lag1": lag1, "reversals": 0.1, "ratio": changed.get("r", 2.0)}

    return metrics


def test_it_can_say_both():
    found = verdicts(concluded(STUDY, made_up()))
    assert found.pop("1.21b") == "REFUTED"
    assert set(found.values()) == {"SUPPORTED"}
    whole = verdicts(concluded(STUDY, made_up(plain=lambda _: 0.9)))
    assert (whole["primary"], whole["white"], whole["order"]) == ("REFUTED",) * 3
    assert whole["norm-shatters"] == "REFUTED"


def test_the_other_statements_can_be_refuted():
    steep = verdicts(concluded(STUDY, made_up(residual=lambda depth: 1.2**-depth)))
    assert steep["root-law"] == "REFUTED"
    small_gradient = verdicts(concluded(STUDY, made_up(r=0.1)))
    assert (small_gradient["not-size"], small_gradient["1.21b"]) == ("REFUTED", "INCONCLUSIVE")


@pytest.mark.parametrize(("deepest", "verdict"), [(4, "SUPPORTED"), (10, "REFUTED")])
def test_the_order_counts_beyond_4_layers_in_every_mode(deepest, verdict):
    """In long mode 2 layers are there as well: up to 4 the plain network may be above."""
    long = replace(STUDY, modes=STUDY.modes | {"default": STUDY.mode("long")})
    above = made_up(plain=lambda depth: 1.2 if depth <= deepest else 0.5**depth)
    assert verdicts(concluded(long, above))["order"] == verdict


def test_all_networks_start_with_the_same_matrices():
    models = {net: module._model({"net": net, "depth": 3, "seed": 5}) for net in module.NETS}
    first = [c.branch.linear.weight for c in models["plain"].stack]
    for model in models.values():
        for weight, connection in zip(first, model.stack, strict=True):
            assert torch.equal(weight, connection.branch.linear.weight)


@pytest.mark.parametrize(
    ("net", "skip", "scale"), [("plain", 0, 1), ("residual", 1, 1), ("residual-0.1", 1, 0.1)]
)
def test_a_layer_is_the_one_of_the_paper(net, skip, scale):
    """x <- skip x + scale W relu(BN(x)), written out."""
    model = module._model({"net": net, "depth": 1, "seed": 0})
    (connection,) = model.stack
    x = torch.randn(32, module.WIDTH, dtype=torch.float64)
    normed = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    naive = skip * x + scale * F.relu(normed) @ connection.branch.linear.weight.T
    torch.testing.assert_close(model.stack(x), naive)


def test_noises_are_what_they_are_called():
    """White noise has no correlation; brown noise is the running sum of the same steps."""
    steps = np.random.default_rng(0).standard_normal(module.POINTS)
    walk = torch.from_numpy(steps).cumsum(0)
    torch.testing.assert_close(module.NOISES["brown noise"](torch.from_numpy(steps)), walk)
    acf = {
        net: np.mean([STUDY.measure({"net": net, "seed": s})["acf"] for s in range(40)], axis=0)
        for net in module.NOISES
    }
    assert np.abs(acf["white noise"][1:]).max() < 0.05
    assert acf["brown noise"][1] == pytest.approx(brown_noise(module.POINTS, 1)[1], abs=0.02)
    assert (np.diff(acf["brown noise"]) < 0).all()


@pytest.mark.slow
def test_a_shortcut_in_the_plain_net_flips_the_verdict(monkeypatch):
    """The real measure of the two networks that decide the primary statement."""
    deciding = ("plain", "residual-0.1")
    alone = replace(STUDY, secondary=(), claims=(), skip=lambda cell: cell["net"] not in deciding)
    study = small(alone, factors={"depth": (24,)})
    assert concluded(study, study.measure)["verdict"] == "SUPPORTED"
    monkeypatch.setitem(module.NETS, "plain", "prenorm")
    assert concluded(study, study.measure)["verdict"] == "REFUTED"
