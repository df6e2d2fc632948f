"""ST-00: sums against fractions and hand counts, the verdicts both ways, planted mistakes."""

import itertools
from fractions import Fraction

import pytest
from study_rows import concluded, verdicts

from addnorm.studies import st00_arithmetic as module

STUDY = module.STUDY
REFUTED = {"labels", "shallowest", "bars"}


def found():
    return verdicts(concluded(STUDY, STUDY.measure))


def test_what_is_right_and_what_is_wrong():
    verdict = found()
    assert {name for name in verdict if verdict[name] == "REFUTED" and "." not in name} == REFUTED
    assert {name for name in verdict if verdict[name] == "REFUTED" and "." in name} == {
        "1.14",
        "1.31",
        "1.38",
    }
    assert {verdict[name] for name in ("1.11", "1.12", "1.24", "1.37")} == {"SUPPORTED"}


def test_the_numbers_by_hand():
    row = STUDY.measure({"chain": "0.9", "seed": 0})
    assert row["left"][28] == pytest.approx(float(Fraction(9, 10) ** 28), rel=1e-12)
    assert round(100 * row["left"][28], 1) == 5.2
    assert round(100 * row["left"][56], 2) == 0.27
    assert (round(row["at12"], 1), round(row["at3"], 1)) == (20.1, 33.3)
    ways = [[1, 1], [1, 2, 1], [1, 3, 3, 1]]  # Pascal's triangle, on to 54
    while len(ways[-1]) < 55:
        ways.append([1, *(a + b for a, b in itertools.pairwise(ways[-1])), 1])
    assert row["middle"] == pytest.approx(sum(ways[-1][19:36]) / 2**54, rel=1e-12)
    assert round(row["middle"], 4) == 0.9802
    assert round(row["short"], 6) == 0.004537
    assert row["shorter"] == 3  # paths 4 and 6 pass one block, path 8 none


@pytest.mark.parametrize(
    ("name", "mended", "contrast"),
    [
        ("LABELS", ((100, 0), (5, 28), (0, 56)), "labels"),
        ("SHORTEST", 8, "shallowest"),
        ("ERRORS", ((16.4, 16), (7.3, 7), (6.7, 7), (3.57, 4)), "bars"),
    ],
)
def test_the_corrected_document_would_be_supported(monkeypatch, name, mended, contrast):
    monkeypatch.setattr(module, name, mended)
    assert found()[contrast] == "SUPPORTED"


@pytest.mark.parametrize(
    ("name", "wrong", "refuted"),
    [
        ("POWERS", ((0.9, 20, 0.13, 0.01),), "primary"),
        ("CHAINS", {**module.CHAINS, "0.1 + 1": (0.1, "plain")}, "chain"),  # no shortcut
        ("BLOCKS", 55, "binomial"),
    ],
)
def test_planted_mistakes_flip_the_verdict(monkeypatch, name, wrong, refuted):
    assert found()[refuted] == "SUPPORTED"
    monkeypatch.setattr(module, name, wrong)
    assert found()[refuted] == "REFUTED"


def test_made_up_results_are_judged_both_ways():
    real = {name: STUDY.measure({"chain": name, "seed": 0}) for name in module.CHAINS}
    for metric, value, contrast in (
        ("power", 1.5, "primary"),
        ("paths", 9, "paths"),
        ("hundred", 13790.0, "hundred"),
        ("scaled", 1.2, "scaled"),
    ):
        wrong = concluded(STUDY, lambda c, m=metric, v=value: real[c["chain"]] | {m: v})
        assert verdicts(wrong)[contrast] == "REFUTED"
