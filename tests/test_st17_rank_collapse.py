"""ST-17: the verdicts both ways, the measures by hand, planted bugs in the real measure."""

import math

import pytest
import torch
from study_rows import concluded, small, verdicts

from addnorm.models.residual_layer import ResidualLayer
from addnorm.studies import st17_rank_collapse as module

STUDY = module.STUDY
SOUND = {
    "printed_passes": 0.0,
    "healthy_passes": 1.0,
    "printed_gain": 0.0,
    "healthy_gain": 1.0,
    "difference": 1e-11,
    "printed_spreads": [0.0, -15.0],
    "healthy_spreads": [0.0, -0.3],
}


def made_up(spreads=(0.0, -0.2, -2.0, -7.0, -15.0), kept=-0.3, lost=3.0, **printed):
    """Spreads of the attentions without shortcuts; what feed-forwards keep and lose."""

    def metrics(cell):
        wobble = 0.05 * math.sin(7 * cell["seed"] + 1)
        attention, plain = cell["part"] == "attention", cell["net"] == "plain"
        found = [s + wobble for s in spreads] if attention and plain else [0.0, -0.1]
        return {
            "spread": found,
            "gradient": [0.0],
            "early": found[-1] if attention else -0.1,
            "last": found[-1] if attention else kept + wobble,
            "lost": 0.7 if attention else lost + wobble,
            **SOUND,
            "printed_gain": wobble,
            **printed,
        }

    return metrics


def test_it_can_say_both():
    found = verdicts(concluded(STUDY, made_up()))
    assert {found[c.name] for c in STUDY.contrasts} == {"SUPPORTED"}
    assert {found[c.id] for c in STUDY.claims} == {"REFUTED"}
    contrary = {
        "printed_passes": 1.0,
        "healthy_passes": 0.5,
        "printed_gain": 1.0,
        "difference": 0.3,
        "printed_spreads": [0.0, -0.3],
    }
    level = made_up((0.0, -0.1, -0.3, -0.45, -0.5), -5.0, 0.3, **contrary)
    found = verdicts(concluded(STUDY, level))
    assert {found[c.name] for c in STUDY.contrasts} == {"REFUTED"}
    assert {found[c.id] for c in STUDY.claims} == {"INCONCLUSIVE"}


def test_the_spread_by_hand():
    """Two tokens m + d and m - d, which are orthogonal: |d| / sqrt(|m|^2 + |d|^2)."""
    m, d = torch.tensor([3.0, 0.0]).double(), torch.tensor([0.0, 0.03]).double()
    found = module.spread(torch.stack((m + d, m - d)))
    assert found == pytest.approx(math.log10(0.03 / math.hypot(3, 0.03)))
    assert module.spread(torch.stack((m, m))) == -16


@pytest.mark.slow
def test_the_shortcut_removed_flips_the_verdict(monkeypatch):
    study = small(STUDY, seeds=8)
    found = verdicts(concluded(study, study.measure))
    assert (found["primary"], found["2.1"], found["4.17"]) == ("SUPPORTED", "REFUTED", "REFUTED")
    monkeypatch.setitem(module.WIRINGS, "residual", "plain")
    assert concluded(study, study.measure)["verdict"] == "REFUTED"


@pytest.mark.slow
def test_a_healthy_layer_in_place_of_the_printed_one_flips_its_claim(monkeypatch):
    monkeypatch.setitem(module.LAYER, "printed", ResidualLayer)
    found = [module.printed.__wrapped__(seed) for seed in range(8)]
    study = small(STUDY, seeds=8)
    result = concluded(study, lambda cell: made_up()(cell) | found[cell["seed"]])
    names = ("nothing-passes", "no-identity", "as-without", "printed-collapses")
    assert {verdicts(result)[name] for name in names} == {"REFUTED"}
    assert verdicts(result)["4.17"] == "INCONCLUSIVE"
