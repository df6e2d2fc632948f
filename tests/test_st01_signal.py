"""ST-01: the verdicts both ways, planted bugs, and the measured gradients against a naive pass."""

import math
from dataclasses import replace

import pytest
import torch
from study_rows import concluded, small, verdicts

from addnorm.studies import bench
from addnorm.studies import st01_signal as module
from addnorm.studies.frame import Rows

STUDY = module.STUDY
# What a layer multiplies the gradient by on its way back, as the theory has it.
FACTORS = {
    ("plain", "sigmoid"): 0.23,
    ("plain", "tanh"): 0.96,
    ("plain", "default"): 0.41,
    ("plain", "he"): 0.99,
    ("plain", "layernorm"): 0.99,
    ("plain", "batchnorm"): module.BATCHNORM**0.5,
    ("residual", "sigmoid"): 1.004,
    ("residual", "default"): 1.2,
    ("residual", "he"): 1.6,
    ("residual", "batchnorm"): 1.06,
}


def made_up(**factors):
    """Gradient ratios of given factors a layer, "net-layer" each, with a little noise."""

    def metrics(cell):
        key = (cell["wiring"], cell["layer"])
        factor = factors.get("_".join(key), FACTORS.get(key, 1.0))
        wobble = 1 + 0.03 * math.sin(5 * cell["seed"] + cell["depth"])
        ratio = factor ** cell["depth"] * wobble
        return {"ratio": ratio, "signal": 1.0, "gradients": [ratio, 1.0], "signals": [1.0, 1.0]}

    return metrics


def test_it_can_say_both():
    found = verdicts(concluded(STUDY, made_up()))
    assert found.pop("primary") == "SUPPORTED"
    refuted = [name for name, verdict in found.items() if verdict == "REFUTED"]
    assert refuted == ["0.4", "0.8", "2.2", "4.1"]
    assert {found[name] for name in ("0.1", "0.4b", "1.42", "2.2b", "4.1b")} == {"SUPPORTED"}
    tame = verdicts(concluded(STUDY, made_up(residual_he=1.001)))
    assert (tame["primary"], tame["2.2"], tame["4.1"]) == ("REFUTED",) + 2 * ("INCONCLUSIVE",)
    gone = verdicts(concluded(STUDY, made_up(residual_default=0.9)))
    assert {gone[name] for name in ("1.42", "2.2b", "4.1b")} == {"REFUTED"}


@pytest.mark.parametrize("mode", STUDY.modes)
def test_every_mode_has_the_seeds_for_a_verdict(mode):
    """Holm's correction of seven contrasts asks 2 / 2^n <= 0.05 / 7."""
    corrected = sum(c.rule != "exact" for c in STUDY.secondary)
    assert 2 ** (1 - STUDY.mode(mode).seeds) * corrected <= 0.05


@pytest.mark.parametrize(
    ("net", "factor", "name"),
    [
        ("residual_prenorm", 1.2, "tamed"),
        ("residual_default", 0.9, "no-vanishing"),
        ("plain_sigmoid", 0.3, "sigmoid-vanishes"),
        ("plain_he", 0.8, "relu-holds"),
        ("plain_default", 0.8, "start-decides"),
        ("plain_batchnorm", 1.25, "batchnorm-law"),
    ],
)
def test_each_statement_can_be_refuted(net, factor, name):
    assert verdicts(concluded(STUDY, made_up(**{net: factor})))[name] == "REFUTED"


@pytest.mark.parametrize(
    ("vanishing", "share", "verdict"),
    [(3, 3 / 6, "INCONCLUSIVE"), (4, 4 / 6, "SUPPORTED"), (2, 2 / 6, "REFUTED")],
)
def test_how_many_of_the_plain_networks_are_often(vanishing, share, verdict):
    """0.96^100 = 0.017 and 1.04^100 = 51 are gone, 0.98^100 = 0.13 and 1.02^100 = 7 are not."""
    factors = [0.96, 1.04, 0.9, 1.1][:vanishing] + [0.98, 1.02, 1, 1][: 6 - vanishing]
    names = [f"plain_{layer}" for layer in module.NETS["plain"]]
    result = concluded(STUDY, made_up(**dict(zip(names, factors, strict=True))))
    (often,) = (c for c in result["contrasts"] if c["name"] == "often")
    assert often["effects"] == pytest.approx([share] * STUDY.mode("default").seeds)
    found = verdicts(result)
    assert (found["often"], found["0.1"]) == (verdict, verdict)


def test_gradients_are_those_of_a_naive_pass():
    """Three plain layers with He's start, written out by hand: RMS of stream and gradient."""
    cell = {"wiring": "plain", "layer": "he", "depth": 3, "seed": 4}
    model = module._model(cell).double()
    found = STUDY.measure(cell)
    x, y = (torch.from_numpy(a) for a in bench.digits().training_batch(4, 0, 128))
    h = [x.double().flatten(1)]
    masks, weights = [], []
    for connection in model.stack:
        linear = connection.branch.linear
        h.append(torch.relu(h[-1] @ linear.weight.T + linear.bias))
        masks.append(h[-1] > 0)
        weights.append(linear.weight)
    logits = h[-1] @ model.head.weight.T + model.head.bias
    error = torch.softmax(logits, -1) - torch.nn.functional.one_hot(y, 10)
    g = [error / 128 @ model.head.weight]
    for mask, weight in zip(reversed(masks), reversed(weights), strict=True):
        g.insert(0, (g[0] * mask) @ weight)
    sizes = [t.detach().square().mean().sqrt() for t in g]
    levels = [t.detach().square().mean().sqrt() for t in h]
    assert found["gradients"] == pytest.approx([float(s / sizes[-1]) for s in sizes], rel=1e-9)
    assert found["signals"] == pytest.approx([float(s / levels[0]) for s in levels], rel=1e-9)
    assert found["ratio"] == pytest.approx(float(sizes[0] / sizes[-1]), rel=1e-9)


@pytest.mark.slow
def test_the_skip_removed_flips_the_verdict(monkeypatch):
    """The real measure of the two networks that decide the primary statement."""
    alone = replace(
        STUDY,
        secondary=(),
        claims=(),
        skip=lambda cell: (cell["wiring"], cell["layer"]) not in DECIDING,
    )
    study = small(alone, factors={"depth": (56,)})
    assert concluded(study, study.measure)["verdict"] == "SUPPORTED"
    for layer in module.UNSCALED:
        monkeypatch.setitem(module.NETS["residual"], layer, module.NETS["plain"][layer])
    assert concluded(study, study.measure)["verdict"] == "REFUTED"


@pytest.mark.slow
def test_planted_bugs_move_each_effect_over_its_limit(monkeypatch):
    """The real measure of one seed, all networks right, then with a mistake in every one."""
    study = small(STUDY, seeds=1, factors={"depth": (56, 100)})

    def holding():
        rows = Rows([{**cell, **study.measure(cell)} for cell in study.cells("default")])
        return {c.name: judged_alone(c, c.effect(rows)) for c in study.contrasts}

    assert set(holding().values()) == {True}
    plain, residual = module.NETS["plain"], module.NETS["residual"]
    residual_nets = {layer: plain[layer] for layer in (*module.UNSCALED, "sigmoid")}
    monkeypatch.setitem(module.NETS, "residual", residual | residual_nets | {"prenorm": NO_NORM})
    xavier = {"wiring": "plain", "start": "xavier"}
    wrong = {"sigmoid": plain["tanh"], "he": xavier, "default": xavier, "batchnorm": plain["he"]}
    monkeypatch.setitem(module.NETS, "plain", plain | wrong)
    found = holding()
    assert found.pop("often")  # Xavier's start loses a ReLU network's gradient too
    assert set(found.values()) == {False}


@pytest.mark.slow
def test_plain_networks_that_are_none_are_not_often(monkeypatch):
    """The real measure of 100 plain layers; with a gate at 0 in them no gradient changes."""

    def share():
        cells = [{"wiring": "plain", "layer": n, "depth": 100, "seed": 0} for n in plain]
        return module._often(Rows([{**cell, **STUDY.measure(cell)} for cell in cells]))

    plain = module.NETS["plain"]
    assert share() >= 4 / 6
    gated = dict.fromkeys(plain, module.NETS["residual"]["rezero"])
    monkeypatch.setitem(module.NETS, "plain", gated)
    assert share() == 0


DECIDING = [("residual", layer) for layer in module.UNSCALED]
NO_NORM = {"wiring": "residual", "start": "he"}


def judged_alone(contrast, effect):
    """Whether one effect lies on the side of the limit that the statement is about."""
    if contrast.rule == "within":
        return abs(effect) < contrast.limit
    return (effect > contrast.limit) == (contrast.rule == "above")
