"""ST-15: the verdicts both ways, a failed training, the constructions, and planted bugs."""

import math

import pytest
import torch
from study_rows import concluded, small, verdicts

from addnorm.studies import st15_identity as module

STUDY = module.STUDY


def made_up(plain=0.6, residual=2e-3, opposite=(1e-3, 5e-3), kept=0.7, **constructions):
    """Errors of four blocks on x as given, of one block on -x as the pair says."""
    built = {"inserted": 0.0, "mirrored": 0.0, "distance": 3.0, "doubled": 0.0}
    built |= {"passed": 0.0, "moves": 0.5, "saddle": 0.0} | constructions

    def metrics(cell):
        wobble = math.exp(0.1 * math.sin(7 * cell["seed"] + 100 * cell["rate"]))
        alone = {"-x": opposite, "rotated": (1e-2, 1e-2)} if cell["depth"] == 1 else {}
        pair = alone.get(cell["target"], (plain, residual))
        error = wobble * pair[cell["net"] == "residual"]
        return {"error": error, "kept": kept, "curve": [1.0, error], "step": [0, 600], **built}

    return metrics


def test_it_can_say_both():
    found = verdicts(concluded(STUDY, made_up()))
    assert set(found.values()) == {"SUPPORTED", "REFUTED"}
    assert [k for k, v in found.items() if v == "REFUTED"] == ["1.18", "0.15"]
    found = verdicts(concluded(STUDY, made_up(3e-2, 2e-2, (5e-3, 1e-3), 0.1)))
    trained = ("primary", "opposite", "nearer", "any-target", "easy", "weights-stay", "1.9", "1.19")
    assert {found[name] for name in trained} == {"REFUTED"}


@pytest.mark.parametrize(
    ("built", "claim", "verdict"),
    [
        ({"inserted": 0.1}, "1.8", "REFUTED"),
        ({"mirrored": 0.1}, "1.18", "INCONCLUSIVE"),
        ({"distance": 0.0}, "1.18", "INCONCLUSIVE"),
        ({"doubled": 0.1}, "0.15", "INCONCLUSIVE"),
        ({"passed": 0.1}, "last-is-enough", "REFUTED"),
        ({"saddle": 0.1}, "saddle", "REFUTED"),
    ],
)
def test_each_construction_decides_its_claim(built, claim, verdict):
    assert verdicts(concluded(STUDY, made_up(**built)))[claim] == verdict


def test_a_training_that_diverged_counts_as_answering_zero():
    def metrics(cell):
        lost = {"error": math.nan} if cell["net"] == "plain" else {}
        return made_up()(cell) | lost

    result = concluded(STUDY, metrics)
    assert result["failed"] == len(list(STUDY.cells("default"))) // 2
    assert result["verdict"] == "SUPPORTED"
    assert min(row["error"] for row in result["rows"] if row["net"] == "plain") == 1.0


def test_the_mirrored_identity_holds_by_hand():
    """relu(Ax) and relu(-Ax) restated: their difference is Ax, which A's inverse brings back."""
    torch.manual_seed(3)
    A, x = torch.randn(5, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    back = (x @ A.T).clamp(min=0) - (-x @ A.T).clamp(min=0)
    torch.testing.assert_close(back @ A.inverse().T, x)
    found = module.constructions(3)
    assert found["mirrored"] < 1e-12
    assert found["distance"] > 2
    assert found["moves"] > 0


def test_no_shortcut_spoils_the_constructions(monkeypatch):
    """Without the shortcut the block is F: neither 2x where F is x, nor x where F is 0."""
    monkeypatch.setitem(module.WIRINGS, "residual", "plain")
    found = module.constructions.__wrapped__(0)
    assert found["doubled"] > 1
    assert found["passed"] > 1


def test_identity_layers_of_the_wrong_sign_change_the_loss(monkeypatch):
    monkeypatch.setattr(torch, "eye", lambda n, **kw: -torch.diag(torch.ones(n, **kw)))
    assert abs(module._inserted(0)) > 0.1


@pytest.mark.slow
def test_the_residual_removed_flips_the_verdict(monkeypatch):
    """The real measure with one rate: supported, and refuted where the shortcut is missing."""
    study = small(STUDY, factors={"rate": (1e-2,)}, steps=150)
    assert concluded(study, study.measure)["verdict"] == "SUPPORTED"
    monkeypatch.setitem(module.WIRINGS, "residual", "plain")
    assert concluded(study, study.measure)["verdict"] == "REFUTED"
