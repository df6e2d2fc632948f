"""ST-21: the verdicts both ways, the document's own network written out, planted errors."""

import itertools
import math
import statistics

import pytest
import torch
from study_rows import concluded, small, verdicts
from torch import nn

from addnorm.studies import st21_gradient_table as module

STUDY = module.STUDY
TRUE = {"3.6b", "3.1", "3.2", "3.3", "3.4", "3.7", "3.8", "3.12", "3.14"}
FALSE = {"3.5", "3.6", "3.13"}


def made_up(**changes):
    """Metrics near the known ones; `changes` by net replace some."""

    def metrics(cell):
        plain = cell["net"] == "none"
        wobble = 1 + 0.05 * math.sin(5 * cell["seed"] + len(cell["net"]))
        known = {
            "printed": [2e-4, 1.2e-4, 7e-4, 1.4e-3, 5e-3] if plain else [0.22, 0.2, 0.3, 0.26, 1.3],
            "error": 3e-7,
            "other": 5e-5,
            "output": 0.06 if plain else 0.6,
            "first": 2e-4 if plain else 0.22,
            "last": 5e-3 if plain else 1.3,
            "rises": 1,
            "slopes": [1e-3] * 5 if plain else [0.11] * 5,
            "monotone": (0.45 if plain else 0.05) * wobble,
            "ratio": (0.01 if plain else 0.11) * wobble,
            "profile": [0.03 * wobble, 0.04, 0.035, 0.03, 0.4],
            "whole_last": (0.01 if plain else 0.04) * wobble,
            "twice": 2.0,
            "layers": 5,
            "activations": 5,
            "shortest": 5 if plain else 1,
            "layer": [0, 1, 2, 3, 4],
        }
        return known | changes.get(cell["net"], {}) | changes.get("both", {})

    return metrics


def test_it_can_say_both():
    found = verdicts(concluded(STUDY, made_up()))
    assert found["primary"] == "SUPPORTED"
    assert {c for c in TRUE | FALSE if found[c] == "SUPPORTED"} == TRUE
    assert {c for c in TRUE | FALSE if found[c] == "REFUTED"} == FALSE
    assert (found["two-formulas"], found["seldom"], found["product"]) == ("SUPPORTED",) * 3


@pytest.mark.parametrize(
    ("change", "contrast", "claim"),
    [
        ({"shortcuts": {"ratio": 0.012}}, "primary", "3.6b"),
        ({"none": {"error": 2e-5}}, "first-none", "3.1"),
        ({"shortcuts": {"error": 2e-5}}, "second-shortcuts", "3.4"),
        ({"none": {"other": 1e-7}}, "two-formulas", None),
        ({"none": {"monotone": 0.9}}, "seldom", None),
        ({"shortcuts": {"profile": [0.01, 0.02, 0.03, 0.04, 0.4]}}, "level", "3.7"),
        ({"shortcuts": {"printed": [0.2, 1.4, 0.3, 0.2, 1.3]}}, "last-largest", "3.8"),
        ({"both": {"layers": 4}}, "five-layers", "3.12"),
        ({"shortcuts": {"shortest": 2}}, "shorter", "3.14"),
        ({"shortcuts": {"output": 0.7}}, "product", None),
    ],
)
def test_each_statement_can_be_refuted(change, contrast, claim):
    found = verdicts(concluded(STUDY, made_up(**change)))
    assert found[contrast] == "REFUTED"
    assert claim is None or found[claim] == "REFUTED"


@pytest.mark.parametrize(
    ("change", "claim", "verdict"),
    [
        ({"none": {"rises": 0}}, "3.5", "SUPPORTED"),
        ({"shortcuts": {"whole_last": 0.011}}, "3.6", "INCONCLUSIVE"),
        ({"none": {"twice": 1.0}}, "3.13", "INCONCLUSIVE"),
    ],
)
def test_a_false_claim_could_be_right(change, claim, verdict):
    """Where it is the contrary of a statement, that one's refutation leaves it open."""
    assert verdicts(concluded(STUDY, made_up(**change)))[claim] == verdict


class Five(nn.Module):
    """Document 003's network, written out."""

    def __init__(self, skip):
        super().__init__()
        sizes = [3, 3, 3, 3, 3, 1]
        self.linear = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.skip = skip

    def forward(self, x):
        for linear in self.linear:
            y = nn.functional.gelu(linear(x))
            x = x + y if self.skip and x.shape == y.shape else y
        return x


@pytest.mark.parametrize("net", ["none", "shortcuts"])
def test_numbers_of_one_cell(net):
    """The statistics over starts 40 to 59 by the network written out."""
    row = STUDY.measure({"net": net, "formula": "exact", "seed": 2, "starts": 20})
    slopes = []
    for seed in range(40, 60):
        torch.manual_seed(seed)
        model = Five(net == "shortcuts")
        model(torch.tensor([[1.0, 0.0, -1.0]])).sum().backward()
        slopes.append([m.weight.grad.abs().mean().item() for m in model.linear])
    assert row["ratio"] == pytest.approx(statistics.median(s[0] / s[4] for s in slopes), rel=1e-4)
    falls = [all(a <= b for a, b in itertools.pairwise(s)) for s in slopes]
    assert row["monotone"] == sum(falls) / 20
    middle = [statistics.median(s[i] for s in slopes) for i in range(5)]
    assert row["profile"] == pytest.approx(middle, rel=1e-4)
    assert row["error"] < 2e-6 < row["other"]
    assert (row["twice"], row["layers"], row["activations"]) == (pytest.approx(2), 5, 5)
    assert row["shortest"] == (5 if net == "none" else 1)


def real():
    study = small(STUDY, seeds=8, starts=60)
    return verdicts(concluded(study, study.measure))


def test_the_real_measure_and_the_shortcut_removed(monkeypatch):
    found = real()
    assert found["primary"] == "SUPPORTED"
    assert {c for c in TRUE | FALSE if found[c] == "SUPPORTED"} == TRUE
    monkeypatch.setitem(module.WIRINGS, "shortcuts", "plain")
    found = real()
    assert found["primary"] == "REFUTED"
    assert (found["3.3"], found["3.14"]) == ("REFUTED", "REFUTED")


def test_the_other_formula_planted(monkeypatch):
    monkeypatch.setitem(module.FORMULAS, "exact", "gelu-tanh")
    found = real()
    assert (found["3.1"], found["3.2"]) == ("REFUTED", "SUPPORTED")
    assert found["two-formulas"] == "REFUTED"
