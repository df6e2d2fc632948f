"""ST-05: the verdicts both ways, variants restated naively, planted bugs."""

import math

import pytest
import torch
from study_rows import concluded, small, verdicts
from torch.nn import functional as F

from addnorm.branches import Context
from addnorm.studies import st05_shortcuts as module

STUDY = module.STUDY


def made_up(errors=None, *, harmed=0.6, kept=0.03):
    """Test errors by group, or by name in `errors`; the better rate is the first."""

    def metrics(cell):
        name = cell["variant"]
        wobble = 0.002 * math.sin(7 * cell["seed"] + len(name))
        level = harmed if name in module.MULTIPLIED or name == "plain" else kept
        error = (errors or {}).get(name, level) + wobble
        falls = 0.0 if name in ("ReLU before +", "each ReLU") else 0.5
        worse = 0.3 if cell["rate"] != module.RATE else 0.0
        return {"error": error + worse, "train": 0.1, "passed": -2.0, "alike": 0.5, "falls": falls}

    return metrics


def test_it_can_say_supported():
    errors = {
        "dropout on stream": 0.5,
        "each ReLU": 0.02,
        "each GELU": 0.02,
        "ReLU before +": 0.05,
        "one layer": 0.05,
    }
    found = verdicts(concluded(STUDY, made_up(errors)))
    assert {found[c.name] for c in STUDY.contrasts} == {"SUPPORTED"}
    assert [found[c] for c in ("2.10", "2.15", "0.2", "1.16")] == [
        "REFUTED",
        "SUPPORTED",
        "REFUTED",
        "SUPPORTED",
    ]


def test_it_can_say_refuted():
    """One multiplied variant that does well is enough; one activation that does not gain."""
    errors = {"W x + F": 0.02, "each ReLU": 0.06, "0.9 x + F": 0.4}
    found = verdicts(concluded(STUDY, made_up(errors)))
    refuted = ("primary", "stream-dropout", "every-nonlinearity", "relu-before-costs", "dose")
    assert [found[name] for name in refuted] == ["REFUTED"] * 5
    assert [found[c] for c in ("2.10", "2.15", "0.2", "1.16")] == [
        "SUPPORTED",
        "REFUTED",
        "SUPPORTED",
        "SUPPORTED",
    ]
    turned = verdicts(concluded(STUDY, made_up({"as drawn": 0.3}, harmed=0.03, kept=0.6)))
    assert (turned["primary"], turned["agrees"]) == ("REFUTED", "REFUTED")
    assert (turned["drawn"], turned["1.16"]) == ("REFUTED", "REFUTED")


def test_a_training_that_diverged_counts_as_guessing():
    def metrics(cell):
        known = made_up()(cell)
        lost = {"error": math.nan, "train": math.nan}
        return known | lost if cell["variant"] == "dropout 0.5 on x" else known

    result = concluded(STUDY, metrics)
    assert result["failed"] == 2 * STUDY.mode("default").seeds
    assert result["verdict"] == "SUPPORTED"


def test_what_the_paper_does_not_have_is_trained_at_one_rate():
    cells = [c for c in STUDY.cells("default") if c["seed"] == 0]
    rates = {v: [c["rate"] for c in cells if c["variant"] == v] for v in module.VARIANTS}
    assert rates["original"] == rates["one layer"] == [0.02, 0.05]
    assert rates["as drawn"] == rates["0.9 x + F"] == [0.05]


def dense(branch, x):
    """The branch of two layers in training mode, step by step."""
    first, last = branch.norms
    inside = F.relu(F.batch_norm(branch.linear(x), None, None, first.weight, first.bias, True))
    out = branch.out(inside)
    if isinstance(last, torch.nn.Identity):
        return out
    return F.batch_norm(out, None, None, last.weight, last.bias, True)


def normed(norm, x):
    return F.batch_norm(x, None, None, norm.weight, norm.bias, True)


BY_HAND = {
    "original": lambda c, x: F.relu(x + dense(c.branch, x)),
    "0.5 x + F": lambda c, x: F.relu(0.5 * x + dense(c.branch, x)),
    "W x + F": lambda c, x: F.relu(c.shortcut(x) + dense(c.branch, x)),
    "BN after +": lambda c, x: F.relu(normed(c.norm, x + dense(c.branch, x))),
    "ReLU before +": lambda c, x: x + F.relu(dense(c.branch, x)),
    "ReLU-only pre-act": lambda c, x: x + dense(c.branch, F.relu(x)),
    "as drawn": lambda c, x: x + dense(c.branch, x),
    "each ReLU": lambda c, x: x + F.relu(normed(c.branch.norms[0], c.branch.linear(x))),
    "one layer": lambda c, x: F.relu(x + normed(c.branch.norms[0], c.branch.linear(x))),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_variant_is_its_formula(name, monkeypatch):
    """Three blocks at random parameters, in training mode, against the equation written out."""
    monkeypatch.setattr(module, "BLOCKS", 3)
    model = module.build(0, module.VARIANTS[name]).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(32, 1, 8, 8)
    stream = x.flatten(1)
    for connection in model.stack:
        stream = BY_HAND[name](connection, stream)
    if name == "ReLU-only pre-act":
        stream = F.relu(stream)
    torch.testing.assert_close(model(x), model.head(stream), rtol=1e-4, atol=1e-4)


def test_dropout_stands_where_it_says(monkeypatch):
    """On the stream a tenth of the coordinates is lost, none in evaluation."""
    monkeypatch.setattr(module, "BLOCKS", 1)
    x = torch.rand(512, 64) + 5  # no zeros behind ReLU
    for name, lost in (("dropout on stream", 0.1), ("dropout on branch", 0.0)):
        (connection,) = module.build(0, module.VARIANTS[name]).stack
        zeros = (connection(x, Context()) == 0).float().mean().item()
        assert zeros == pytest.approx(lost, abs=0.01), name
        again = [connection.eval()(x, Context()) for _ in range(2)]
        torch.testing.assert_close(*again)


def test_only_relu_before_the_addition_never_falls():
    data = {"rate": 0.05, "seed": 0, "steps": 1}
    found = {v: module.measure(data | {"variant": v}) for v in ("ReLU before +", "as drawn")}
    assert found["ReLU before +"]["falls"] == 0
    assert found["as drawn"]["falls"] > 0.3
    assert found["ReLU before +"]["alike"] > 0.8 > 0.2 > found["as drawn"]["alike"]


@pytest.mark.slow
def test_the_multiplication_removed_flips_the_verdict(monkeypatch):
    """The real measure: supported, and refuted where the gates are open or are the original's."""
    monkeypatch.setattr(module, "BLOCKS", 18)
    levels = {"variant": ("0.5 x + F", "original"), "rate": (0.05,)}
    study = small(STUDY, factors=levels, steps=80)
    assert concluded(study, study.measure)["verdict"] == "SUPPORTED"
    monkeypatch.setitem(module.VARIANTS, "0.5 x + F", module.VARIANTS["original"])
    assert concluded(study, study.measure)["verdict"] == "REFUTED"


@pytest.mark.slow
def test_dropout_moved_to_the_branch_flips_its_verdict(monkeypatch):
    monkeypatch.setattr(module, "BLOCKS", 18)
    levels = {"variant": ("dropout on stream", "dropout on branch"), "rate": (0.05,)}
    study = small(STUDY, factors=levels, steps=60)
    assert verdicts(concluded(study, study.measure))["2.10"] == "REFUTED"
    branch = module.VARIANTS["dropout on branch"]
    monkeypatch.setitem(module.VARIANTS, "dropout on stream", branch)
    found = verdicts(concluded(study, study.measure))
    assert found["2.10"] == "SUPPORTED"


def test_every_variant_has_the_size_of_the_original_but_for_its_own_parameters():
    sizes = {
        name: sum(p.numel() for p in module.build(0, variant).parameters())
        for name, variant in module.VARIANTS.items()
    }
    larger = {
        "exclusive gate 0",
        "exclusive gate -6",
        "shortcut gate 0",
        "shortcut gate -6",
        "W x + F",
    }
    final_norm = 2 * 64
    for name, size in sizes.items():
        extra = size - sizes["original"]
        assert extra == (final_norm if name == "pre-activation" else 0) or name in larger, name
