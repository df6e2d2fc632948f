"""ST-31: the verdicts both ways, sizes by hand, loss at equal time, a wiring that is none."""

import math

import pytest
from study_rows import concluded, small, verdicts

from addnorm.studies import st31_streams as module

STUDY = module.STUDY


def made_up(gain, slower=2.0):
    """Pre-norm falls by 0.1 nats for every doubling; the streams gain so much in `slower` time."""

    def metrics(cell):
        wobble = 0.002 * math.sin(5 * cell["seed"] + len(cell["wiring"]))
        loss = 2.5 - 0.1 * math.log2(cell["length"])
        streams = cell["wiring"] != "prenorm"
        return {
            "loss": loss - gain * streams + wobble,
            "minutes": cell["length"] * (slower if streams else 1.0),
            "parameters": 1000,
            "hidden": 64,
        }

    return metrics


@pytest.mark.parametrize(
    ("gain", "slower", "expected"),
    [
        (0.3, 2.0, ("SUPPORTED", "SUPPORTED", "SUPPORTED")),
        (0.05, 2.0, ("SUPPORTED", "REFUTED", "SUPPORTED")),  # 0.1 is what pre-norm gains meanwhile
        (-0.1, 2.0, ("REFUTED", "REFUTED", "REFUTED")),
    ],
)
def test_it_can_say_both(gain, slower, expected):
    found = verdicts(concluded(STUDY, made_up(gain, slower)))
    assert tuple(found[name] for name in ("primary", "equal-time", "hyper")) == expected


def test_every_model_has_the_size_of_prenorm():
    """Counted as the modules' own numbers, beside pre-norm with a hidden width of 4 D."""
    target = sum(p.numel() for p in module._gpt(0, "prenorm", 4 * module.DIM).parameters())
    for wiring in ("prenorm", *module.STREAMS):
        count = sum(p.numel() for p in module._fitted(0, wiring).parameters())
        assert count == pytest.approx(target, rel=0.01), wiring


def test_a_training_that_diverged_counts_as_the_uniform_guess():
    def metrics(cell):
        return made_up(0.3)(cell) | ({"loss": math.nan} if cell["wiring"] != "prenorm" else {})

    result = concluded(STUDY, metrics)
    assert result["verdict"] == "REFUTED"
    assert result["failed"] == STUDY.mode("default").seeds * len(module.STREAMS)


@pytest.mark.slow
def test_a_family_that_learns_nothing_is_refuted(monkeypatch):
    """The real measure, short, where no stream is left in the family: layers without a shortcut."""
    monkeypatch.setattr(module, "STREAMS", ("plain",))
    monkeypatch.setattr(module, "DIM", 16)
    monkeypatch.setattr(module, "DEPTH", 6)
    factors = {"wiring": ("prenorm", "plain"), "length": (1.0,)}
    study = small(STUDY, factors=factors, steps=120, rate=5e-3)
    assert concluded(study, study.measure)["verdict"] == "REFUTED"
