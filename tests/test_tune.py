"""The measured choice: what is tried, what is taken, and that nothing is left behind."""

import pytest
import torch
from torch import nn

from addnorm import Runtime, TrainConfig
from addnorm.training import tune as module
from addnorm.training.loop import make_optimizer
from addnorm.training.objective import cross_entropy
from addnorm.training.tune import Choice, choice_from, tune


class Twofold(nn.Module):
    """Computes one thing in two ways, counts its calls in a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.way = "plain"

    def forward(self, tokens):
        self.calls += 1
        return self.head(self.dropout(self.embed(tokens)))

    def choices(self):
        return {"way": ("plain", "other")}

    def choose(self, name, value):
        self.way = value


def measured(monkeypatch, script, **runtime):
    """Tune with the clock replaced by `script`: words of a choice -> (seconds, loss)."""
    model, said = Twofold(), []

    def time(_self, choice, _loss):
        return script(str(choice))

    monkeypatch.setattr(module._Trial, "time", time)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda _n: None)
    batch = (torch.zeros(2, 3, dtype=torch.long),) * 2
    config = TrainConfig(steps=10)
    choice, _ = tune(
        model, make_optimizer, lambda *b: cross_entropy(model(b[0]), b[1]), batch, config,
        Runtime(device="cpu", **runtime), said.append,
    )  # fmt: skip
    return choice, model, said


def test_the_fastest_combination_is_taken_even_where_each_half_alone_is_slower(monkeypatch):
    """bfloat16 with the first variant is slow, and so is the second variant in float32."""
    script = {
        "float32, eager, way plain, 2 threads": 10.0,
        "float32, eager, way plain, 1 thread": 20.0,
        "bfloat16, eager, way plain, 2 threads": 12.0,
        "float32, eager, way other, 2 threads": 11.0,
        "bfloat16, eager, way other, 2 threads": 5.0,
    }
    choice, model, said = measured(monkeypatch, lambda c: (script[c], 3.0), compile="off")
    assert str(choice) == "bfloat16, eager, way other, 2 threads"
    assert model.way == "other"
    assert {row["choice"] for row in choice.measured} == set(script)
    assert said[-1].startswith(
        "computing in bfloat16, eager, way other, 2 threads (a step measured"
    )
    assert choice_from({"precision": "bfloat16", "variants": {"way": "other"}}).variants == {
        "way": "other"
    }


def test_a_fast_choice_whose_loss_is_off_is_not_taken(monkeypatch):
    def script(choice):
        return (1.0, 3.2) if "bfloat16" in choice else (10.0, 3.0)

    choice, *_ = measured(monkeypatch, script, compile="off")
    assert choice.precision == "float32"


def test_a_difference_within_the_noise_changes_nothing(monkeypatch):
    def script(choice):
        return (9.9, 3.0) if "other" in choice or "1 thread" in choice else (10.0, 3.0)

    choice, *_ = measured(monkeypatch, script, compile="off", precision="float32")
    assert str(choice) == "float32, eager, way plain, 2 threads"


def test_what_the_user_set_is_not_measured(monkeypatch):
    choice, *_ = measured(
        monkeypatch, lambda _c: (1.0, 3.0), compile="off", precision="bfloat16", threads=1
    )
    assert all("bfloat16" in row["choice"] for row in choice.measured)
    assert all("1 thread" in row["choice"] for row in choice.measured)


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_measuring_leaves_nothing_behind(precision):
    """Weights, buffers, also those not saved, the random state and the gradients are as before."""
    model = Twofold()
    before = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    random = torch.get_rng_state()
    batch = (torch.randint(5, (2, 3)), torch.randint(5, (2, 3)))
    random = torch.get_rng_state()
    tune(
        model, make_optimizer, lambda *b: cross_entropy(model(b[0]), b[1]), batch,
        TrainConfig(steps=10), Runtime(device="cpu", precision=precision, compile="off"),
        lambda _m: None,
    )  # fmt: skip
    after = [*model.parameters(), *model.buffers()]
    assert all(map(torch.equal, before, after))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_a_compiled_step_has_the_loss_of_the_eager_one():
    model = Twofold().eval()
    batch = (torch.randint(5, (2, 3)), torch.randint(5, (2, 3)))

    def loss(inputs, targets):
        return cross_entropy(model(inputs), targets)

    compiled = Choice(compiled=True).apply(model, loss)
    assert compiled(*batch).item() == pytest.approx(loss(*batch).item(), rel=1e-5)
    compiled(*batch).backward()
    assert all(p.grad is not None for p in model.parameters())
