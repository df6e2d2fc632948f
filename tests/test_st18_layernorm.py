"""ST-18: every claim both ways, the formulas in NumPy, and planted bugs in the real measure."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from study_rows import concluded, small, verdicts
from torch import nn

from addnorm.studies import st18_layernorm as module

STUDY = module.STUDY


def made_up(**found):
    """Numbers as they should be, or as given; a little different for every seed."""

    def metrics(cell):
        wobble = 0.02 * math.sin(7 * cell["seed"] + 1)
        sound = {
            "ratio": math.sqrt(1 - 1 / cell["width"]),
            "lone": 1.0,
            "parameters": 0,
            "axes": 0.0,
            "others": 0.0,
            "others_batch": 0.2,
            "neurons": 0.3,
            "skew": 1.7,
            "skew_change": 0.0,
            "invariance": 0.0,
            "lost": 2.0,
            "noise": [0.8, 0.6, 0.45, 0.36, 0.27, 0.2, 0.14],
            "batch": [2, 4, 8, 16, 32, 64, 128],
            "slope": -0.45,
            "size_effect": 0.0,
        } | found
        return sound | {k: sound[k] + wobble for k in ("neurons", "skew", "size_effect")}

    return metrics


@pytest.mark.parametrize(
    ("wrong", "contrast", "claim"),
    [
        ({"others": 0.1}, "primary", "2.5"),
        ({"axes": 0.1}, "axes", "2.16"),
        ({"size_effect": 1.0}, "data-size", None),
        ({"neurons": 0.0}, "mixes-neurons", "4.9"),
        ({"skew": 0.0}, "skewed", "4.10"),
        ({"parameters": -14}, "vectors", "4.11"),
        ({"ratio": 1.0}, "printed", "4.12"),
        ({"invariance": 0.1}, "invariant", "4.14"),
        ({"lost": 0.0}, "loses", "4.15"),
        ({"skew_change": 0.1}, "shape-kept", None),
        ({"lone": 0.0}, "printed-one", None),
        ({"noise": [0.3] * 7}, "small-batch", "2.17"),
    ],
)
def test_every_statement_can_be_refuted(wrong, contrast, claim):
    sound, found = (verdicts(concluded(STUDY, made_up(**w))) for w in ({}, wrong))
    assert (sound[contrast], found[contrast]) == ("SUPPORTED", "REFUTED")
    changed = {name for name in sound if sound[name] != found[name]}
    assert changed == {contrast} | ({claim} if claim else set())


def test_the_measures_in_numpy():
    """The printed norm divides by the sample deviation; skewness is SciPy's."""
    x = module.skewed(6, 5, 7)
    assert module._ratio(x) == pytest.approx(math.sqrt(6 / 7))
    array = x.numpy()
    printed = (array - array.mean(-1, keepdims=True)) / array.std(-1, ddof=1, keepdims=True)
    norm = module.NORMS["printed"](7).double()
    np.testing.assert_allclose(norm(x).detach().numpy(), printed, rtol=1e-3)
    np.testing.assert_allclose(module.skewness(x).numpy(), stats.skew(array, axis=-1))
    deviation = np.sqrt(array.var((0, 1)) + 1e-5)
    np.testing.assert_allclose(
        module.standardised(x, (0, 1)).numpy(), (array - array.mean((0, 1))) / deviation
    )


def test_the_noise_of_a_mean():
    """Normal data in batches of 128 beside a 0: the mean of 127 others over 128 is the noise."""
    torch.manual_seed(1)
    data = torch.randn(100_000, 200, dtype=torch.float64)
    data[0] = 0.0
    noise = module.batch_noise(data)
    assert noise[6] == pytest.approx(math.sqrt(127) / 128, rel=0.05)


def test_batch_norm_in_its_place_flips_the_claims(monkeypatch):
    """Through the real measure: statistics over the batch are what two documents describe."""
    monkeypatch.setitem(module.NORMS, "layer", module.NORMS["batch"])
    study = small(STUDY, seeds=8, factors={"width": (2, 64)})
    found = verdicts(concluded(study, study.measure))
    claims = {name: found[name] for name in ("2.5", "4.9", "2.16", "4.14", "4.15")}
    assert claims == {
        "2.5": "INCONCLUSIVE",
        "4.9": "INCONCLUSIVE",
        "2.16": "REFUTED",
        "4.14": "REFUTED",
        "4.15": "REFUTED",
    }


def test_the_right_variance_flips_the_claim_of_the_printed_module(monkeypatch):
    monkeypatch.setitem(module.NORMS, "printed", nn.LayerNorm)
    study = small(STUDY, seeds=6, factors={"width": (2, 64)})
    found = verdicts(concluded(study, study.measure))
    assert (found["4.12"], found["printed-one"]) == ("INCONCLUSIVE", "REFUTED")
