"""ST-05: the verdicts both ways, variants restated naively, planted bugs."""

import math

import pytest
import torch
from study_rows import concluded, small, verdicts
from torch.nn import functional as F

from addnorm.branches import Context
from addnorm.studies import st05_shortcuts as module

STUDY = module.STUDY


def made_up(errors=None, *, lost=0.6, kept=0.03):
    """Test errors by what is left of the identity, or by name in `errors`; one rate fits better."""

    def metrics(cell):
        name = cell["variant"]
        wobble = 0.002 * math.sin(7 * cell["seed"] + len(name))
        level = lost if module.left(module.VARIANTS[name]) < module.LOST else kept
        error = (errors or {}).get(name, level) + wobble
        falls = 0.0 if name in ("ReLU before +", "each ReLU") else 0.5
        other = cell["rate"] != module.RATE  # fits worse and tests better: it must not count
        train, error = (0.2, error - 0.01) if other else (0.1, error)
        return {"error": error, "train": train, "passed": -2.0, "alike": 0.5, "falls": falls}

    return metrics


FAILED = {"dropout 0.5 on x": 0.9, "exclusive gate -3": 0.5}  # as in the paper


def test_it_can_say_supported():
    errors = FAILED | {"each ReLU": 0.02, "each GELU": 0.02, "ReLU before +": 0.032}
    errors |= {"exclusive gate -3": 0.04, "one layer": 0.05}
    found = verdicts(concluded(STUDY, made_up(errors)))
    assert {found[c.name] for c in STUDY.contrasts} == {"SUPPORTED"}
    claims = {c.id: found[c.id] for c in STUDY.claims}
    assert claims.pop("2.3b") == "REFUTED"  # without an activation it does as well
    assert set(claims.values()) == {"SUPPORTED"}


def test_it_can_say_refuted():
    """One variant that does well without the identity is enough for the primary statement."""
    errors = {"W x + F": 0.02, "each ReLU": 0.6, "each GELU": 0.6, "plain": 0.61}
    errors |= {"dropout on stream": 0.5, "ReLU before +": 0.3, "as drawn": 0.3}
    found = verdicts(concluded(STUDY, made_up(errors)))
    refuted = {c.name for c in STUDY.contrasts} - {"agrees", "only-grows"}
    assert {found[name] for name in refuted} == {"REFUTED"}
    claims = {c.id: found[c.id] for c in STUDY.claims}
    assert claims.pop("2.3b") == "INCONCLUSIVE"
    assert set(claims.values()) == {"REFUTED"}
    turned = verdicts(concluded(STUDY, made_up(lost=0.03, kept=0.6)))
    assert (turned["primary"], turned["agrees"]) == ("REFUTED", "REFUTED")


def test_a_training_that_diverged_counts_as_guessing():
    def metrics(cell):
        known = made_up()(cell)
        lost = {"error": math.nan, "train": math.nan}
        return known | lost if cell["variant"] == "0.5 x + F" else known

    result = concluded(STUDY, metrics)
    assert result["failed"] == 2 * STUDY.mode("default").seeds
    assert result["verdict"] == "SUPPORTED"


def test_the_rate_is_picked_by_the_training_loss():
    """Of one variant the other rate tests better; of another it diverged: neither counts."""

    def metrics(cell):
        known = made_up({"as drawn": 0.5})(cell)
        if cell["rate"] == module.RATE:
            return known
        other = {"as drawn": (0.03, 2.0), "original": (math.nan, math.nan)}
        error, train = other.get(cell["variant"], (known["error"], known["train"]))
        return known | {"error": error, "train": train}

    result = concluded(STUDY, metrics)
    (drawn,) = (c["effects"] for c in result["contrasts"] if c["name"] == "drawn")
    assert drawn == pytest.approx([47.0] * 8, abs=0.5)


def test_what_the_formula_leaves_of_the_identity():
    """0.5^27, 0.9^27, (1 - sigmoid(-6))^27, and no less where a branch has one layer."""
    found = {name: module.left(variant) for name, variant in module.VARIANTS.items()}
    assert found["0.5 x + F"] == found["exclusive gate 0"] == 0.5**27
    assert found["0.9 x + F"] == pytest.approx(0.0581, abs=1e-4)
    assert found["shortcut gate -6"] == pytest.approx(0.9354, abs=1e-4)
    assert found["W x + F"] == found["plain"] == 0
    assert found["original"] == found["one layer"] == 1
    assert math.isnan(found["dropout on stream"])
    between = [n for n, share in found.items() if module.LOST <= share <= module.KEPT]
    assert between == ["BN after +", "0.9 x + F"]


def test_a_factor_is_the_derivative_where_the_branch_is_silent(monkeypatch):
    """d out / d x of one block, in training mode, on coordinates that ReLU passes."""
    monkeypatch.setattr(module, "BLOCKS", 1)
    for name in ("0.8 x + F", "exclusive gate -3", "shortcut gate -6", "original", "as drawn"):
        (connection,) = module.build(0, module.VARIANTS[name]).stack
        for norm in connection.branch.norms:
            torch.nn.init.zeros_(norm.weight)
        if "gate" in name:
            torch.nn.init.zeros_(connection.gate.weight)
        x = (torch.rand(4, 64) + 1).requires_grad_()
        (slope,) = torch.autograd.grad(connection(x, Context()).sum(), x)
        factor = torch.full_like(slope, module.VARIANTS[name].factor)
        torch.testing.assert_close(slope, factor, rtol=1e-4, atol=1e-5)


def test_the_norm_behind_the_addition_divides_by_what_it_says():
    """Unit normals behind ReLU, and an update of unit variance: deviation of the sum."""
    torch.manual_seed(0)
    x, update = torch.randn(2, 200_000)
    factor = module.VARIANTS["BN after +"].factor
    assert 1 / (F.relu(x) + update).std().item() == pytest.approx(factor, rel=0.01)


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
    """The real measure: supported, and refuted where the shortcut is not multiplied after all."""
    monkeypatch.setattr(module, "BLOCKS", 18)
    levels = {"variant": ("0.5 x + F", "original"), "rate": (0.05,)}
    study = small(STUDY, factors=levels, steps=60)
    assert concluded(study, study.measure)["verdict"] == "SUPPORTED"
    unharmed = module.VARIANTS["original"]._replace(factor=0.5)
    monkeypatch.setitem(module.VARIANTS, "0.5 x + F", unharmed)
    assert concluded(study, study.measure)["verdict"] == "REFUTED"


@pytest.mark.slow
def test_dropout_moved_to_the_branch_flips_its_verdict(monkeypatch):
    monkeypatch.setattr(module, "BLOCKS", 18)
    levels = {"variant": ("dropout on stream", "dropout on branch"), "rate": (0.05,)}
    study = small(STUDY, factors=levels, steps=60)
    assert verdicts(concluded(study, study.measure))["2.10"] == "REFUTED"
    branch = module.VARIANTS["dropout on branch"]
    monkeypatch.setitem(module.VARIANTS, "dropout on stream", branch)
    assert verdicts(concluded(study, study.measure))["2.10"] == "SUPPORTED"


def test_every_variant_has_the_size_of_the_original_but_for_its_own_parameters():
    sizes = {
        name: sum(p.numel() for p in module.build(0, variant).parameters())
        for name, variant in module.VARIANTS.items()
    }
    larger = {name for name in sizes if "gate" in name} | {"W x + F"}
    final_norm = 2 * 64
    for name, size in sizes.items():
        extra = size - sizes["original"]
        assert extra == (final_norm if name == "pre-activation" else 0) or name in larger, name
