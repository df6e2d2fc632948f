"""ST-12: the verdicts both ways, and the norm taken out of pre-norm."""

import functools
import math

import pytest
from study_rows import concluded, small, verdicts

from addnorm.studies import st12_skip_norm as module

STUDY = module.STUDY
STUCK = 3.3


def made_up(**losses):
    """Losses by network; of the skip alone it fails with embeddings of 1, else it trains."""

    def metrics(cell):
        wobble = 0.02 * math.sin(3 * cell["seed"] + 1)
        known = {"both": 2.6, "norm": STUCK, "neither": STUCK, "rezero": 2.6} | losses
        skip = 2.7 if cell["embedding"] == 0.1 else module.bench.UNIFORM
        return {
            **dict.fromkeys(("loss", "train"), known.get(cell["net"], skip) + wobble),
            "fades": {"neither": 6.0, "norm": -0.5}.get(cell["net"], 0.0) + wobble,
            "alike": 0.99 + wobble / 10,
            **{key: [1.0] for key in ("curve", "step", "layer", "gradient", "stream")},
        }

    return metrics


def test_it_can_say_both():
    found = verdicts(concluded(STUDY, made_up()))
    assert {k for k, v in found.items() if v == "REFUTED"} == {"norm-needed", "0.19c", "0.19d"}
    assert set(found.values()) == {"SUPPORTED", "REFUTED"}
    found = verdicts(concluded(STUDY, made_up(skip=3.0)))
    assert {k for k, v in found.items() if v != "SUPPORTED"} == {"0.19d"}
    found = verdicts(concluded(STUDY, made_up(norm=2.6, both=2.7, rezero=3.0)))
    assert {k for k, v in found.items() if v == "REFUTED"} == {
        *("primary", "skip-needed", "norm-needed", "gate-instead"),
        *("0.19a", "0.19b", "0.19c", "0.19d", "3.15"),
    }


def test_one_setting_does_not_decide_the_claims():
    """Where both fail in one setting, the primary statement falls, the claims on each part stay."""

    def metrics(cell):
        lost = cell["net"] == "both" and (cell["embedding"], cell["rate"]) == (1.0, 1e-2)
        return made_up(skip=3.0)(cell) | ({"loss": math.nan, "train": math.nan} if lost else {})

    found = verdicts(concluded(STUDY, metrics))
    assert [found[k] for k in ("primary", "0.19a", "0.19c")] == ["REFUTED", *["SUPPORTED"] * 2]


def test_the_training_loss_picks_the_setting():
    """The skip alone is best on the validation text where it is worst on the training text."""

    def metrics(cell):
        return made_up()(cell) | {"train": -cell["embedding"]}

    assert verdicts(concluded(STUDY, metrics))["norm-needed"] == "SUPPORTED"


def test_quick_mode_can_answer_the_secondary_claims():
    """Six p-values after Holm's correction: the smallest of eight seeds, 2/2^8, times six."""
    quick = small(STUDY, seeds=STUDY.mode("quick").seeds)
    found = verdicts(concluded(quick, made_up(skip=3.0)))
    assert {k for k, v in found.items() if v != "SUPPORTED"} == {"0.19d"}


def test_a_gradient_that_underflows_counts_as_the_faintest():
    assert module.fading([1e-3, 1.0, 1e-1]) == pytest.approx(2)
    assert module.fading([0.0, 1e-3, 1e-1]) == pytest.approx(17.97, abs=0.01)
    assert module.fading([1e-1, 1.0, 0.0]) == pytest.approx(-17.97, abs=0.01)
    assert module.fading([0.0, 0.0]) == 0
    assert math.isnan(module.fading([math.nan, 1.0]))


def test_one_alone_that_trains_everywhere_refutes():
    assert concluded(STUDY, made_up(skip=2.6))["verdict"] == "REFUTED"


def test_a_training_that_overflows_counts_as_guessing():
    result = concluded(STUDY, made_up(skip=math.nan))
    assert result["failed"] == 4 * STUDY.mode("default").seeds
    assert result["verdict"] == "SUPPORTED"


@pytest.mark.slow
def test_the_norm_removed_flips_the_verdict(monkeypatch):
    """The real trainings of pre-norm and of the norm alone; then pre-norm without its norm."""
    monkeypatch.setattr(module, "LAYERS", 8)
    study = small(STUDY, factors={"embedding": (1.0,), "rate": (1e-3,)}, steps=40)
    real = functools.cache(lambda wiring, cell: study.measure(dict(cell)))

    def metrics(cell):
        if cell["net"] in ("both", "norm"):
            return real(module.WIRINGS[cell["net"]], tuple(cell.items()))
        return made_up()(cell)

    assert concluded(study, metrics)["verdict"] == "SUPPORTED"
    monkeypatch.setitem(module.WIRINGS, "both", "residual")
    assert concluded(study, metrics)["verdict"] == "REFUTED"
