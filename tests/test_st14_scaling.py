"""ST-14: the verdicts both ways, trainings that fail, the factors, and planted bugs."""

import math

import pytest
import torch
from study_rows import concluded, small, verdicts
from torch.nn.functional import relu

from addnorm.studies import bench
from addnorm.studies import st14_scaling as module

STUDY = module.STUDY
STEPS = {
    "plain": 200,
    "plain, norm in front": 300,
    "plain, norm inside": 280,
    "residual": 150,
    "post-norm": 80,
    "pre-norm": 32,
    "1/sqrt(L)": 40,
    "1/L": 36,
    "1/sqrt(L), learned": 42,
    "rezero": 32,
}


def made_up(growth=7.0, slope=0.9, **steps):
    """Steps by network as above or as given, a little more at other rates than the last."""

    def metrics(cell):
        wobble = math.exp(0.05 * math.sin(7 * cell["seed"] + 100 * cell["rate"]))
        count = (STEPS | steps)[cell["net"]] * wobble * (1 if cell["rate"] == 1e-2 else 1.3)
        return {"steps": count, "growth": growth, "slope": slope, "stream": [0.0, growth]}

    return metrics


def test_it_can_say_both():
    found = verdicts(concluded(STUDY, made_up()))
    assert {found[c.name] for c in STUDY.contrasts} == {"SUPPORTED"}
    assert {found[c.id] for c in STUDY.claims} == {"REFUTED"}
    contrary = dict.fromkeys(STEPS, 100) | {"plain": 400, "residual": 100, "rezero": 250}
    found = verdicts(concluded(STUDY, made_up(0.3, 0.1, **contrary | {"pre-norm": 30})))
    assert {found[c.name] for c in STUDY.contrasts} == {"REFUTED"}
    assert {found[c.id] for c in STUDY.claims} == {"INCONCLUSIVE"}


def test_a_training_that_never_gets_there_counts_as_all_steps():
    def metrics(cell):
        lost = cell["net"] == "residual" and cell["depth"] == 128
        gone = {"steps": math.nan, "growth": math.inf, "slope": math.nan}
        return made_up()(cell) | (gone if lost else {})

    result = concluded(STUDY, metrics)
    assert result["failed"] == STUDY.mode("default").seeds * len(module.RATES)
    assert result["verdict"] == "SUPPORTED"
    rows = [row for row in result["rows"] if row["failed"]]
    assert {(row["steps"], row["growth"]) for row in rows} == {(module.CAP, 38.0)}


@pytest.mark.parametrize(
    ("net", "joined"),
    [
        ("plain", lambda x, f: f),
        ("residual", lambda x, f: x + f),
        ("1/sqrt(L)", lambda x, f: x + f / 3**0.5),
        ("1/L", lambda x, f: x + f / 3),
        ("1/sqrt(L), learned", lambda x, f: x + f / 3**0.5),
        ("rezero", lambda x, f: x),
    ],
)
def test_each_network_is_what_its_name_says(net, joined):
    """The stack restated: x <- joined(x, relu(W x + b)), three times."""
    model = module.build(5, 3, module.NETS[net])
    x = torch.randn(4, 64)
    expected = x
    for connection in model.stack:
        linear = connection.branch.linear
        expected = joined(expected, relu(expected @ linear.weight.T + linear.bias))
    torch.testing.assert_close(model.stack(x), expected)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("alpha" in name for name in learned) == (net in ("1/sqrt(L), learned", "rezero"))


def test_the_training_ends_at_the_target_and_counts_as_the_trainer_does():
    """The same network trained to the end has the same losses, and reaches the target there."""
    cell = {"net": "1/L", "depth": 4, "rate": 1e-2, "steps": 80, "seed": 0}
    found = module.measure(cell)["steps"]
    model = module.build(0, 4, module.NETS["1/L"])
    settings = bench.ADAM | {"lr": 1e-2, "steps": 80}
    whole = bench.trained(model, bench.digits(), 0, **settings)
    assert found == bench.steps_to(whole.losses, module.TARGET) < 80
    assert math.isnan(module.measure(cell | {"steps": 5})["steps"])


@pytest.mark.slow
def test_the_factor_removed_flips_the_verdict(monkeypatch):
    """The real measure at 32 layers: supported, refuted where the factor is missing."""
    levels = {"net": ("residual", "rezero"), "depth": (32,), "rate": (1e-2,)}
    study = small(STUDY, factors=levels)
    found = verdicts(concluded(study, study.measure))
    assert (found["primary"], found["1.42b"], found["explodes"]) == (
        "SUPPORTED",
        "REFUTED",
        "SUPPORTED",
    )
    monkeypatch.setitem(module.NETS, "rezero", module.NETS["residual"])
    assert concluded(study, study.measure)["verdict"] == "REFUTED"


def test_the_norm_removed_leaves_the_gradient_level(monkeypatch):
    """LayerNorm in front of each layer makes the gradient grow; without it the start is level."""
    cell = {"net": "plain, norm in front", "depth": 32, "rate": 1e-3, "steps": 1, "seed": 1}
    assert module.measure(cell)["slope"] > 0.7
    monkeypatch.setitem(module.NETS, cell["net"], module.NETS["plain"])
    assert abs(module.measure(cell)["slope"]) < 0.3
