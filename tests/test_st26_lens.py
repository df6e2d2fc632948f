"""ST-26: the verdicts both ways, and readings in the wrong order planted."""

import functools
import math
from dataclasses import replace

import pytest
from study_rows import concluded, small, verdicts

from addnorm.studies import st26_lens as module

STUDY = module.STUDY


def made_up(*, pre_bump=0.0, post_bump=0.3, half=0.8, post_half=3.5):
    """Metrics of networks whose readings fall but for a bump at the third layer."""

    def metrics(cell):
        wobble = 1 + 0.02 * math.sin(3 * cell["seed"] + len(cell["wiring"]))
        pre = cell["wiring"] == "pre-norm"
        losses = [3.0 - 0.05 * i for i in range(13)]
        losses[6] = losses[-1] + (0.1 if pre else post_half - 2.4) * wobble
        return {
            "loss": 2.4,
            "lens": losses,
            "agreement": [i / 12 for i in range(13)],
            "divergence": [1 - i / 12 for i in range(13)],
            "rise": (pre_bump if pre else post_bump) * wobble,
            "rising": 0,
            "half": (half if pre else 0.4) * wobble,
            "layer": list(range(13)),
        }

    return metrics


def test_it_can_say_both():
    found = verdicts(concluded(STUDY, made_up()))
    assert (found["primary"], found["pre-falls"]) == ("SUPPORTED", "SUPPORTED")
    assert (found["half-decided"], found["post-unreadable"]) == ("SUPPORTED", "SUPPORTED")
    other = made_up(pre_bump=0.5, post_bump=0.01, half=0.3, post_half=2.5)
    found = verdicts(concluded(STUDY, other))
    assert (found["primary"], found["pre-falls"]) == ("REFUTED", "REFUTED")
    assert (found["half-decided"], found["post-unreadable"]) == ("REFUTED", "REFUTED")


def test_a_training_that_diverged_decides_nothing():
    def metrics(cell):
        return {"loss": math.nan} if cell["wiring"] == "post-norm" else made_up()(cell)

    result = concluded(STUDY, metrics)
    assert result["failed"] == STUDY.mode("default").seeds
    found = verdicts(result)
    assert (found["primary"], found["pre-falls"]) == ("INCONCLUSIVE", "SUPPORTED")


@pytest.mark.slow
def test_readings_in_the_wrong_order_flip_the_verdict(monkeypatch):
    """The real measure with six layers, where both wirings fall; turned round, post-norm rises."""
    monkeypatch.setattr(module, "DEPTH", 6)
    monkeypatch.setattr(module, "CONTEXT", 16)
    monkeypatch.setattr(module.bench, "deep_gpt", functools.cache(module.bench.deep_gpt))
    study = small(STUDY, seeds=8, steps=60)
    found = verdicts(concluded(study, study.measure))
    assert (found["primary"], found["pre-falls"]) == ("REFUTED", "SUPPORTED")
    right = module.lens

    def turned(model, *args, **settings):
        read = right(model, *args, **settings)
        post = model.config.wiring == "postnorm"
        return replace(read, loss=read.loss[::-1]) if post else read

    monkeypatch.setattr(module, "lens", turned)
    assert concluded(study, study.measure)["verdict"] == "SUPPORTED"
