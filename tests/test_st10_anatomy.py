"""ST-10: the verdicts both ways, the stream of a network worked out by hand, a lost shortcut."""

import math

import pytest
import torch
from study_rows import concluded, small, verdicts

from addnorm import GPT, GPTConfig
from addnorm.branches import Context
from addnorm.probe.discover import discover
from addnorm.probe.tap import tapped
from addnorm.studies import st10_anatomy as module

STUDY = module.STUDY


def made_up(*, end=0.2, copy=1.2, update=0.1, late=0.5, rezero=0.9, bump=0.0):
    """Metrics of networks whose profiles end at these values."""

    def metrics(cell):
        wobble = 1 + 0.02 * math.sin(3 * cell["seed"] + len(cell["wiring"]))
        last = end * wobble if cell["wiring"] == "pre-norm" else 0.05 * wobble
        falling = [4 - 0.1 * i for i in range(13)]
        falling[7] += 0.1 * bool(bump) + bump * wobble
        return {
            "loss": 2.5,
            "cosine": [1 - (1 - last) * i / 12 for i in range(13)],
            "copy": [1 + (copy * wobble - 1) * i / 12 for i in range(13)],
            "update": [0.9, *[update * wobble] * 11],
            "variance": [1.0] * 13,
            "late": (rezero if cell["wiring"] == "ReZero" else late) * wobble,
            "lens": falling,
            "layer": list(range(13)),
            "step": list(range(1, 13)),
        }

    return metrics


def test_it_can_say_both():
    found = verdicts(concluded(STUDY, made_up()))
    assert (found["primary"], found["stays"], found["post-keeps-less"]) == ("SUPPORTED",) * 3
    assert (found["linear"], found["exponential"], found["refines"]) == ("SUPPORTED",) * 3
    assert (found["0.3"], found["0.11"], found["0.12"]) == ("SUPPORTED", "REFUTED", "SUPPORTED")
    other = made_up(end=0.95, copy=0.1, update=0.9, late=0.9, rezero=0.5, bump=0.3)
    found = verdicts(concluded(STUDY, other))
    assert (found["primary"], found["stays"], found["linear"]) == ("REFUTED",) * 3
    assert (found["exponential"], found["refines"]) == ("REFUTED", "REFUTED")
    assert (found["0.3"], found["0.11"], found["0.12"]) == ("REFUTED", "INCONCLUSIVE", "REFUTED")


@pytest.mark.parametrize(
    ("losses", "rise"), [([3, 2, 1], 0), ([3, 2, 2.5, 1, 1.25], 0.5), ([1, 3], 2)]
)
def test_largest_rise(losses, rise):
    assert module.rise(losses) == rise


def test_a_training_that_diverged_decides_nothing():
    def metrics(cell):
        return {"loss": math.nan} if cell["wiring"] == "pre-norm" else made_up()(cell)

    result = concluded(STUDY, metrics)
    assert result["failed"] == STUDY.mode("default").seeds
    found = verdicts(result)
    assert (found["primary"], found["exponential"]) == ("INCONCLUSIVE", "SUPPORTED")


def test_the_streams_are_those_of_the_model():
    """Against a loop over the blocks by hand."""
    model = GPT(GPTConfig(depth=3, dim=16, heads=2, context=8, vocab_size=11)).eval()
    x = torch.randint(11, (2, 8))
    streams = module.Streams()
    with torch.no_grad(), tapped(model, discover(model, x), streams):
        model(x)
    with torch.no_grad():
        stream = model.token(x) + model.position(torch.arange(8))
        expected = [stream]
        for i, connection in enumerate(model.stack):
            update = connection.branch(connection.norm_in(stream), Context())
            stream = stream + update
            if i % 2:
                expected.append(stream)
    assert len(streams.kept) == 4
    for mine, own in zip(streams.kept, expected, strict=True):
        torch.testing.assert_close(mine, own)


@pytest.mark.slow
def test_a_lost_shortcut_flips_the_verdict(monkeypatch):
    """The real measure: without the sum the input is gone at the start."""
    monkeypatch.setattr(module, "DEPTH", 6)
    monkeypatch.setattr(module, "CONTEXT", 16)
    study = small(STUDY, seeds=8, factors={"wiring": ("pre-norm",)}, steps=1)
    found = verdicts(concluded(study, study.measure))
    assert (found["stays"], found["0.3"]) == ("SUPPORTED", "SUPPORTED")
    monkeypatch.setitem(module.WIRINGS, "pre-norm", "plain(norm=true)")
    found = verdicts(concluded(study, study.measure))
    assert (found["stays"], found["0.3"]) == ("REFUTED", "REFUTED")


@pytest.mark.slow
def test_gates_shut_flip_the_verdict(monkeypatch):
    """A network whose branches add nothing keeps its input whole."""
    monkeypatch.setattr(module, "DEPTH", 4)
    monkeypatch.setattr(module, "CONTEXT", 16)
    study = small(STUDY, seeds=6, factors={"wiring": ("pre-norm",)}, steps=60)
    assert concluded(study, study.measure)["verdict"] == "SUPPORTED"
    monkeypatch.setitem(module.WIRINGS, "pre-norm", "layerscale(init=1e-9)")
    assert concluded(study, study.measure)["verdict"] == "REFUTED"
