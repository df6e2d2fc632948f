"""ST-16: the verdicts both ways, a share worked out by hand, and the wrong norm planted."""

import math

import pytest
from study_rows import concluded, small, verdicts

from addnorm.studies import st16_curse as module

STUDY = module.STUDY
FALLING = [0.3, 0.15, 0.08, 0.04, 0.03, 0.02, 0.012, 0.01, 0.008, 0.006, 0.004, 0.002]


def made_up(profiles, losses=None, together=0.3):
    """Metrics of networks whose layers are worth `profiles[wiring]`; the other facts follow."""
    losses = losses or {}

    def metrics(cell):
        wobble = 1 + 0.02 * math.sin(5 * cell["seed"] + len(cell["wiring"]))
        worth = [w * wobble for w in profiles.get(cell["wiring"], FALLING)]
        update = 0.7 if profiles.get(cell["wiring"]) == FALLING[::-1] else 0.05
        return {
            "loss": losses.get(cell["wiring"], 2.4) * wobble,
            "worth": worth,
            "late": module.late_share(worth),
            "together": together * wobble,
            "angle": [0.1] * 24,
            "update": [update * wobble] * 24,
            "variance": [1.0] * 24,
            "growth": 1.0,
            "layer": list(range(1, 13)),
            "connection": list(range(1, 25)),
        }

    return metrics


def test_it_can_say_both():
    found = verdicts(concluded(STUDY, made_up({"post-norm": FALLING[::-1], "LNS": [0.1] * 12})))
    assert (found["primary"], found["pre-falls"], found["post-rises"]) == ("SUPPORTED",) * 3
    assert (found["lns-cures"], found["stirred"], found["not-identity"]) == ("SUPPORTED",) * 3
    assert found["1.20"] == "REFUTED"
    found = verdicts(concluded(STUDY, made_up({"pre-norm": FALLING[::-1]}, together=0.01)))
    assert (found["primary"], found["pre-falls"], found["post-rises"]) == ("REFUTED",) * 3
    assert (found["stirred"], found["not-identity"]) == ("REFUTED", "REFUTED")
    assert found["1.20"] == "INCONCLUSIVE"


@pytest.mark.parametrize(("lns", "verdict"), [(2.0, "SUPPORTED"), (2.8, "REFUTED")])
def test_the_remedy_can_be_better_and_worse(lns, verdict):
    found = verdicts(concluded(STUDY, made_up({}, {"LNS": lns})))
    assert found["lns-better"] == verdict


@pytest.mark.parametrize(
    ("worth", "share"),
    [([1, 1, 1, 1], 0.5), ([3, 0, 0, 1], 0.25), ([2, -5, 2, -1], 0.5), ([0, 0, 0, 4], 1.0)],
)
def test_share_of_the_second_half(worth, share):
    assert module.late_share(worth) == share


def test_a_training_that_diverged_decides_nothing():
    """The other wirings of the seeds are judged all the same."""

    def metrics(cell):
        known = made_up({"post-norm": FALLING[::-1]})(cell)
        return {"loss": math.nan} if cell["wiring"] == "post-norm" else known

    result = concluded(STUDY, metrics)
    assert result["failed"] == STUDY.mode("default").seeds
    found = verdicts(result)
    assert (found["primary"], found["pre-falls"]) == ("INCONCLUSIVE", "SUPPORTED")


def test_a_mode_without_some_wirings_is_judged():
    study = small(STUDY, seeds=8, factors={"wiring": ("pre-norm", "post-norm")})
    found = verdicts(concluded(study, made_up({"post-norm": FALLING[::-1]})))
    assert (found["primary"], found["lns-better"]) == ("SUPPORTED", "INCONCLUSIVE")


@pytest.mark.slow
def test_the_norm_in_the_wrong_place_flips_the_verdict(monkeypatch):
    """The real measure with six layers: refuted where "pre-norm" is post-norm too."""
    monkeypatch.setattr(module, "DEPTH", 6)
    monkeypatch.setattr(module, "CONTEXT", 16)
    known = {}

    def measured(cell):
        key = module.WIRINGS[cell["wiring"]], cell["seed"]
        if key not in known:
            known[key] = STUDY.measure(cell)
        return known[key]

    study = small(STUDY, factors={"wiring": ("pre-norm", "post-norm")}, steps=80)
    assert concluded(study, measured)["verdict"] == "SUPPORTED"
    monkeypatch.setitem(module.WIRINGS, "pre-norm", "postnorm")
    assert concluded(study, measured)["verdict"] == "REFUTED"
