"""ST-25: the verdicts both ways, arrangements held against loops, and layers that commute."""

import functools
import math

import pytest
import torch
from study_rows import concluded, small, verdicts

from addnorm import GPT, GPTConfig
from addnorm.branches import Context
from addnorm.studies import st25_painters as module

STUDY = module.STUDY


def made_up(**levels):
    """Metrics in which each way costs its level per layer, `post` times as much in post-norm."""
    levels = {"skip": 0.03, "random": 0.01, "reverse": 0.02, "parallel": 0.02, "repeat": 0.1} | {
        **levels
    }

    def metrics(cell):
        wobble = 1 + 0.02 * math.sin(3 * cell["seed"] + len(cell["wiring"]))
        factor = wobble * (levels.get("post", 3) if cell["wiring"] == "post-norm" else 1)
        ways = ("skip", "random", "reverse", "parallel", "repeat")
        return {
            "loss": 2.4,
            **{way: [levels[way] * factor * n for n in module.CHANGED] for way in ways},
            "one": [0.2, *[levels.get("one", 0.01) * wobble] * 11],
            "swap": [0.1] * 11,
            "changed": list(module.CHANGED),
            "layer": list(range(1, 13)),
            "pair": list(range(1, 12)),
        }

    return metrics


def test_it_can_say_both():
    found = verdicts(concluded(STUDY, made_up()))
    names = ("primary", "order-matters", "one-missing", "parallel", "reverse", "repeat-worst")
    assert [found[name] for name in (*names, "post-norm")] == ["SUPPORTED"] * 7
    assert found["1.41"] == "SUPPORTED"
    other = made_up(skip=0.001, random=0.004, reverse=0.002, repeat=0, one=0.3, post=0.1)
    found = verdicts(concluded(STUDY, other))
    assert [found[name] for name in (*names, "post-norm")] == ["REFUTED"] * 7
    assert found["1.41"] == "REFUTED"


def test_a_training_that_diverged_decides_nothing():
    def metrics(cell):
        return {"loss": math.nan} if cell["wiring"] == "post-norm" else made_up()(cell)

    result = concluded(STUDY, metrics)
    assert result["failed"] == STUDY.mode("default").seeds
    found = verdicts(result)
    assert (found["primary"], found["post-norm"]) == ("SUPPORTED", "INCONCLUSIVE")


def test_arrangements_by_name():
    layers = [[torch.nn.Identity()] for _ in "abcdef"]
    names = {id(layer[0]): name for layer, name in zip(layers, "abcdef", strict=True)}
    made = module.arrangements(layers, 4, 0)
    whole = {
        name: ["".join(names.get(id(layer[0]), "*") for layer in way) for way in ways]
        for name, ways in made.items()
    }
    assert whole["parallel"] == ["a*f"]
    assert whole["skip"] == ["af"]
    assert whole["reverse"] == ["aedcbf"]
    assert whole["repeat"] == ["addddf"]
    assert len(whole["random"]) == module.DRAWS
    assert all("".join(sorted(way)) == "abcdef" for way in whole["random"])
    assert all(way[0] + way[-1] == "af" for way in whole["random"])
    assert len(set(whole["random"])) > 1


def gpt_and_batch(wiring="prenorm"):
    torch.manual_seed(0)
    config = GPTConfig(depth=4, dim=16, heads=2, context=8, vocab_size=11, wiring=wiring)
    model = GPT(config).eval()
    for parameter in model.parameters():  # away from the start, where branches are small
        parameter.data += 0.2 * torch.randn_like(parameter)
    x, y = torch.randint(11, (2, 2, 8)).unbind()
    own = list(model.stack)
    return model, [own[i : i + 2] for i in range(0, 8, 2)], x, y


@torch.no_grad()
def by_hand(model, stream_of, x, y):
    stream = stream_of(model.token(x) + model.position(torch.arange(8)))
    logits = model.head(model.norm(stream))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()


def through(layers, stream):
    for layer in layers:
        for connection in layer:
            stream = connection(stream, Context())
    return stream


def test_losses_are_those_of_loops_by_hand():
    model, layers, x, y = gpt_and_batch()
    a, b, c, d = layers
    made = {name: ways[0] for name, ways in module.arrangements(layers, 2, 0).items()}
    expected = {
        "skip": lambda s: through([a, d], s),
        "reverse": lambda s: through([a, c, b, d], s),
        "repeat": lambda s: through([a, c, c, d], s),
        "parallel": lambda s: through(
            [d], (through([b], through([a], s)) + through([c], through([a], s))) / 2
        ),
    }
    clean = by_hand(model, lambda s: through(layers, s), x, y)
    assert module.loss_as(model, layers, x, y) == pytest.approx(clean, rel=1e-6)
    for name, stream_of in expected.items():
        value = by_hand(model, stream_of, x, y)
        assert module.loss_as(model, made[name], x, y) == pytest.approx(value, rel=1e-6), name
        assert abs(value - clean) > 1e-3, name
    assert list(model.stack) == [c for layer in layers for c in layer]


@pytest.mark.slow
def test_a_wrong_arrangement_flips_the_verdict(monkeypatch):
    """The real measure: refuted where the orders are those with layers missing."""
    monkeypatch.setattr(module, "CHANGED", (6, 4))
    monkeypatch.setattr(module, "DEPTH", 8)
    monkeypatch.setattr(module, "CONTEXT", 16)
    monkeypatch.setattr(module, "DRAWS", 2)
    monkeypatch.setattr(module.bench, "deep_gpt", functools.cache(module.bench.deep_gpt))
    study = small(STUDY, factors={"wiring": ("pre-norm",)}, steps=80)
    assert concluded(study, study.measure)["verdict"] == "SUPPORTED"
    right = module.arrangements

    def mislabelled(*args):
        made = right(*args)
        return made | {"skip": made["random"], "random": made["skip"]}

    monkeypatch.setattr(module, "arrangements", mislabelled)
    assert concluded(study, study.measure)["verdict"] == "REFUTED"
