"""The logit lens: its ends are known exactly, what lies between is the stack cut short."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from addnorm import GPT, MLP, GPTConfig, MLPConfig, ResNet, ResNetConfig
from addnorm.files import finite
from addnorm.probe.discover import discover
from addnorm.probe.lens import lens

VOCABULARY = 11


def shaken(model):
    """Move the weights away from their start, where branches may be silent."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def gpt(wiring, depth=3, **changes):
    torch.manual_seed(0)
    settings = {"dim": 16, "heads": 2, "context": 8, "vocab_size": VOCABULARY} | changes
    model = shaken(GPT(GPTConfig(depth=depth, wiring=wiring, **settings)))
    return model, torch.randint(VOCABULARY, (2, 8)), torch.randint(VOCABULARY, (2, 8))


def measured(logits, own, targets):
    """Loss, agreement and divergence of logits beside the model's own, by their definitions."""
    logits, own = (x.detach().reshape(-1, x.shape[-1]).double() for x in (logits, own))
    loss = F.cross_entropy(logits, targets.flatten()).item()
    agree = sum(int(a.argmax() == b.argmax()) for a, b in zip(logits, own, strict=True)) / len(own)
    p, q = own.softmax(-1), logits.softmax(-1)
    return loss, agree, (p * (p / q).log()).sum(-1).mean().item()


def test_every_depth_of_a_prenorm_gpt_is_the_head_on_its_stream():
    """Depth 0 is head(norm(embedding)), depth j the same on what the j-th connection leaves."""
    model, inputs, targets = gpt("prenorm")
    seen = []
    connections = model.stack.connections
    connections[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    for connection in connections:
        connection.register_forward_hook(lambda _m, _a, out: seen.append(out))
    own = model(inputs)
    streams = seen[:]
    found = lens(model, inputs, targets)
    assert found.depths == tuple(range(7))
    assert found.names == ("", *discover(model, inputs).names)
    assert found.complete
    assert found.answers == 16
    assert found.loss_kind == "cross-entropy"
    for depth, stream in enumerate(streams):
        loss, agree, apart = measured(model.head(model.norm(stream)), own, targets)
        assert found.loss[depth] == pytest.approx(loss, rel=1e-5)
        assert found.agreement[depth] == pytest.approx(agree)
        assert found.divergence[depth] == pytest.approx(apart, abs=1e-5)
    assert len({round(x, 5) for x in found.loss}) == 7  # no two depths are mixed up unseen


def zeroed(model, inputs, places):
    """The output with what these modules return replaced by zeros."""
    handles = [m.register_forward_hook(lambda _m, _a, out: torch.zeros_like(out)) for m in places]
    with torch.no_grad():
        out = model(inputs)
    for handle in handles:
        handle.remove()
    return out


def check(model, inputs, targets, places):
    """Hold every depth against the network whose later branches return zeros."""
    own = zeroed(model, inputs, [])
    found = lens(model, inputs, targets)
    assert found.notes == ()
    for depth in range(len(places) + 1):
        expected = measured(zeroed(model, inputs, places[depth:]), own, targets)
        assert found.loss[depth] == pytest.approx(expected[0], rel=1e-5)
        assert found.agreement[depth] == pytest.approx(expected[1])
        assert found.divergence[depth] == pytest.approx(expected[2], abs=1e-5)
    assert found.loss[-1] == pytest.approx(measured(own, own, targets)[0], rel=1e-6)
    assert found.agreement[-1] == 1.0
    assert found.divergence[-1] == 0.0
    return found


def branches(model):
    """The modules whose output is a branch, in our stacks."""
    return [m.branch for m in model.modules() if hasattr(m, "branch") and hasattr(m, "site")]


@pytest.mark.parametrize(
    "wiring",
    [
        "prenorm",
        "postnorm",
        "sandwich",
        "rezero",
        "hyper",
        "mhc",
        "attnres",
        "attnres-block",
        "unet",
    ],
)
def test_wirings_are_cut_at_their_branches(wiring):
    """Norms between connections stay; of several streams and histories the branches add zeros."""
    model, inputs, targets = gpt(wiring, depth=2)
    check(model, inputs, targets, branches(model))


@pytest.mark.parametrize("wiring", ["postact", "residual"])
def test_a_resnet_keeps_its_projections(wiring):
    torch.manual_seed(0)
    model = shaken(ResNet(ResNetConfig(depth=14, width=4, wiring=wiring, shortcut="B")))
    check(model, torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), branches(model))


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_torch_encoder(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model = shaken(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    places = [m for block in model.layers for m in (block.dropout1, block.dropout2)]
    check(model, torch.randn(2, 5, 8), torch.randint(8, (2, 5)), places)


def test_a_stack_without_skips_hands_its_stream_on():
    """What adds nothing to a stream that no skip carries leaves it as it is."""
    model, inputs, targets = gpt("plain", depth=2)
    seen, own = [], None
    for connection in model.stack.connections:
        connection.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    own = model(inputs)
    streams = seen[:]
    found = lens(model, inputs, targets)
    assert found.loss[-1] == pytest.approx(measured(own, own, targets)[0], rel=1e-6)
    for depth, stream in enumerate(streams):
        expected = measured(model.head(model.norm(stream)), own, targets)
        assert found.loss[depth] == pytest.approx(expected[0], rel=1e-5)


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x):
        return torch.tanh(self.linear(x))


def test_a_block_that_changes_the_shape_always_works():
    """It is said that it does."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(i, o) for i, o in ((4, 4), (4, 6), (6, 6))], nn.Linear(6, 3))
    x, targets = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    found = lens(model, x, targets, blocks="[012]")
    assert found.notes == ("1 changes the shape and always works",)
    expected = model[3](torch.tanh(model[1].linear(x)))
    assert found.loss[0] == pytest.approx(F.cross_entropy(expected, targets).item(), rel=1e-6)


def test_the_loss_that_was_given_and_none_at_all():
    model, inputs, _ = gpt("prenorm")
    found = lens(model, inputs, loss=lambda out, _: out.square().mean())
    assert found.loss_kind == "the loss that was given"
    assert found.loss[-1] == pytest.approx(model(inputs).square().mean().item(), rel=1e-6)
    without = lens(model, inputs)
    assert all(map(math.isnan, without.loss))
    assert without.loss_kind == ""
    assert without.divergence == found.divergence

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, tokens):
            logits = self.inner(tokens)
            return {"loss": logits.abs().mean(), "logits": logits}

    own = lens(Own(), inputs)
    assert own.loss_kind == "the model's own loss"
    assert own.loss[-1] == pytest.approx(model(inputs).abs().mean().item(), rel=1e-6)
    assert own.divergence == found.divergence


def test_the_mode_and_the_seed_are_kept_at_every_depth():
    """Dropout draws the same at every depth, so the last depth is the model's own."""
    model, inputs, targets = gpt("prenorm", dropout=0.3)
    model.train()
    one, two = lens(model, inputs, targets, seed=1), lens(model, inputs, targets, seed=1)
    assert one.loss == two.loss
    assert one.divergence[-1] == 0.0
    torch.manual_seed(1)
    own = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()
    assert one.loss[-1] == pytest.approx(own, rel=1e-6)
    assert one.loss != lens(model, inputs, targets, seed=2).loss


def test_the_budget_leaves_depths_that_lie_evenly():
    model, inputs, targets = gpt("prenorm")
    told = []
    found = lens(model, inputs, targets, budget=0.0, progress=lambda *p: told.append(p))
    assert found.depths == (0, 6)
    assert not found.complete
    assert told == [(1, 7), (2, 7)]
    whole = lens(model, inputs, targets)
    assert found.loss == (whole.loss[0], whole.loss[6])
    assert found.names == ("", whole.names[6])


def test_a_time_that_runs_out_in_the_middle(monkeypatch):
    """The ends come first, then the middle of the widest gap."""
    clock = iter(range(100))
    monkeypatch.setattr("addnorm.probe.lens.time.monotonic", lambda: next(clock))
    model, inputs, targets = gpt("prenorm", depth=4)
    assert lens(model, inputs, targets, budget=3.5).depths == (0, 2, 4, 6, 8)


def test_it_is_called_a_biased_estimate():
    model, inputs, targets = gpt("prenorm", depth=1)
    plain = json.loads(json.dumps(finite(lens(model, inputs, targets).to_dict())))
    assert plain["label"].startswith("biased estimate")
    assert plain["label_zh"].startswith("有偏估计")
    assert plain["depths"] == [0, 1, 2]


def test_what_cannot_be_read_is_said():
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="no residual addition"):
        lens(nn.Linear(4, 4), x)
    model = MLP(MLPConfig(in_dim=4, dim=4, out_dim=1, depth=2))
    with pytest.raises(ValueError, match="needs a model that returns logits along the last axis"):
        lens(model, x)
