"""ST-20: both verdicts, the drawings by hand, and planted errors of sick, healthy and linter."""

import pytest
import torch
from study_rows import concluded, small, verdicts
from torch import nn

from addnorm import twins
from addnorm.models.residual_layer import ResidualLayer
from addnorm.studies import clinic_examination, drawings
from addnorm.studies import st20_clinic as module

STUDY = module.STUDY
# By twin: the checks that fail as printed.
SICK = {
    "000 v9-drawing": {"skip", "jacobian", "edges"},
    "000 source-lines": {"lines"},
    "001 rows": {"agree"},
    "002 one-skip": {"skip", "jacobian"},
    "002 placements": {"agree"},
    "002 words-formula": {"agree"},
    "002 sequence-norm": {"apart", "agree"},
    "002 batch-mixer": {"apart"},
    "002 mask-keyword": {"built"},
    "002 stream-dropout": {"steady"},
    "002 input-dropout": {"dropout"},
    "003 accumulated": {"repeat"},
    "004 inplace": {"input", "trains"},
    "004 unbiased": {"norm"},
    "004 doubled": {"skip", "jacobian"},
    "004 undefined": {"built"},
    "004 inner-width": {"built"},
}


def made_up(cell, failing=None):
    """Metrics as they should be; `failing` are the checks that fail in place of those."""
    sick = SICK.get(cell["twin"], set()) if cell["side"] == "printed" else set()
    fails = sick if failing is None else failing
    return {
        **{name: float(name not in fails) for name in module.CHECKS},
        "failed_checks": len(fails),
        "sick": float(cell["twin"] in SICK),
        "named": float(sick <= fails),
        "said": 1.0,
        "left": 0.0,
        "parameters": 2224,
        "norms": 7 if cell["twin"] == "000 v9-block" else 0,
        "layers": 3,
    }


def test_every_diagnosis_is_right():
    found = verdicts(concluded(STUDY, made_up))
    assert set(found.values()) == {"SUPPORTED", "REFUTED"}
    right = ("0.2", "0.9", "0.16", "1.17", "1.32", "2.6", "2.7")
    assert {found[c] for c in right} == {"SUPPORTED"}
    wrong = ("0.20", "0.21", "2.3", "2.4", "2.8", "2.9", "2.11", "2.12", "4.5", "4.17", "4.18")
    assert {found[c] for c in wrong} == {"REFUTED"}
    assert {found[c.name] for c in STUDY.contrasts} == {"SUPPORTED"}


@pytest.mark.parametrize(
    ("twin", "side", "contrast"),
    [
        ("004 doubled", "printed", "doubled"),
        ("002 mask-keyword", "printed", "mask-keyword"),
        ("000 v7-block", "printed", "v7-block"),
        ("004 doubled", "corrected", None),
        ("002 stream-dropout", "printed", None),
    ],
)
def test_one_wrong_diagnosis_refutes(twin, side, contrast):
    """A defect that is missed in one seed, a false alarm, a corrected form that fails."""

    def metrics(cell):
        if (cell["twin"], cell["side"], cell["seed"]) != (twin, side, 3):
            return made_up(cell)
        missed = side == "printed" and twin in SICK
        return made_up(cell, set() if missed else {"skip"})

    found = verdicts(concluded(STUDY, metrics))
    assert found["primary"] == "REFUTED"
    refuted = {c.name for c in STUDY.secondary if found[c.name] == "REFUTED"}
    assert refuted == ({contrast} if contrast else set())


@pytest.mark.parametrize(
    ("twin", "change", "contrast", "claim"),
    [
        ("000 v7-block", {"layers": 6}, "three-blocks", "0.9"),
        ("000 v7-block", {"norms": 1}, "norms", "0.16"),
        ("004 doubled", {"parameters": 2300}, "free", None),
    ],
)
def test_facts_can_refute(twin, change, contrast, claim):
    def metrics(cell):
        changed = cell["twin"] == twin and cell["side"] == "corrected"
        return made_up(cell) | (change if changed else {})

    found = verdicts(concluded(STUDY, metrics))
    assert (found["primary"], found[contrast]) == ("SUPPORTED", "REFUTED")
    assert claim is None or found[claim] == "REFUTED"


def examined(twin, side, seed=0):
    row = module.measure({"twin": twin, "side": side, "seed": seed})
    return row, {name for name in module.CHECKS if not row[name]}


@pytest.mark.parametrize("twin", STUDY.factors["twin"])
def test_each_twin(twin):
    """The printed side fails what this table says, and no other check; the corrected one passes."""
    row, failed = examined(twin, "printed")
    assert failed == SICK.get(twin, set())
    assert (row["sick"], row["named"], row["said"]) == (float(twin in SICK), 1, 1)
    row, failed = examined(twin, "corrected")
    assert failed == set()
    assert (row["named"], row["said"], row["left"]) == (1, 1, pytest.approx(0, abs=1e-6))


def test_numbers_of_the_rows():
    """All of the stream is gone behind a doubled layer, nothing behind a mended one."""
    assert examined("004 doubled", "printed")[0]["left"] == 1
    assert examined("000 v9-drawing", "printed")[0]["left"] == 1
    row = examined("000 v9-block", "corrected")[0]
    assert (row["norms"], row["layers"]) == (7, 3)
    assert examined("000 v7-block", "corrected")[0]["norms"] == 0


# -- planted errors through the real measure


def verdict_of(*names):
    study = small(STUDY, seeds=2, factors={"twin": tuple(names)})
    rows = [study.measure(cell) | cell for cell in study.cells("default")]
    return module._wrong(module.Rows(rows))


def test_a_healthy_module_in_place_of_the_sick_one(monkeypatch):
    assert verdict_of("004 doubled", "004 inplace") == 0
    monkeypatch.setattr(twins, "DoubledLayer", ResidualLayer)
    assert verdict_of("004 doubled", "004 inplace") == 2  # one for each seed


def test_a_sick_module_in_place_of_the_healthy_one(monkeypatch):
    monkeypatch.setattr(twins, "BranchDropout", twins.StreamDropout)
    assert verdict_of("002 stream-dropout") == 2


def test_a_blind_linter(monkeypatch):
    monkeypatch.setattr(clinic_examination, "lint", lambda *_, **__: [])
    assert verdict_of("002 batch-mixer", "002 stream-dropout", "004 unbiased") == 6
    assert verdict_of("004 doubled", "000 v9-drawing") == 0  # the stream itself is looked at


def test_another_exception_is_not_the_defect(monkeypatch):
    class Broken(nn.Module):
        def __init__(self, dim, heads):
            raise TypeError("something else")

    monkeypatch.setattr(twins, "MaskKeyword", Broken)
    assert verdict_of("002 mask-keyword") == 2


# -- drawings


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


class Square(nn.Module):
    def forward(self, x):
        return x**2


PARTS = {"attention": Double(), "ffn": Square(), "norm 1": nn.Tanh(), "norm 2": nn.Sigmoid()}
n1, n2 = torch.tanh, torch.sigmoid


@pytest.mark.parametrize(
    ("edges", "formula"),
    [
        (drawings.TWO_SKIPS, lambda x: 3 * x + (3 * x) ** 2),
        (drawings.PRE_NORM, lambda x: (y := x + 2 * n1(x)) + n2(y) ** 2),
        (drawings.DRAWN, lambda x: n2(x + 2 * n1(x)) ** 2),
        (drawings.PRE_BOX, lambda x: x + 2 * n1(x)),
        (drawings.POST_BOX, lambda x: n1(3 * x)),
        (drawings.LINE_34, lambda x: x + (2 * n1(x)) ** 2),
        (drawings.LINES_38_39, lambda x: n2((y := n1(3 * x)) + y**2)),
        (drawings.LINE_77, lambda x: x + n2((2 * n1(x)) ** 2)),
        (drawings.LINE_80, lambda x: n2(x + (2 * n1(x)) ** 2)),
    ],
)
def test_a_drawing_computes_its_formula(edges, formula):
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(drawings.Drawn(edges, PARTS)(x), formula(x))


def test_what_is_wrong_with_a_drawing():
    assert drawings.doubled(drawings.DRAWN) == [("add 1", "norm 2")]
    assert drawings.lonely(drawings.DRAWN) == ["add 2"]
    for edges in (drawings.PRE_NORM, drawings.TWO_SKIPS, drawings.RESIDUAL_ROW):
        assert not drawings.doubled(edges)
        assert not drawings.lonely(edges)


def test_what_cannot_be_computed():
    with pytest.raises(ValueError, match="the node 'gate' has no part"):
        drawings.Drawn([("x", "gate"), ("gate", "output")], PARTS)
    with pytest.raises(ValueError, match="the part 'ffn' has several inputs"):
        drawings.Drawn([("x", "attention"), ("x", "ffn"), ("attention", "ffn")], PARTS)
