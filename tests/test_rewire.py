"""Rewiring: what keeps its meaning is kept, what does not starts fresh, nothing else changes."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from addnorm import GPT, MLP, GPTConfig, MLPConfig, Stack, rewire
from addnorm.contract import catalogue

OURS = [n for n, w in catalogue().items() if w.__module__.startswith("addnorm.")]
SHAPE = {"depth": 4, "dim": 16, "heads": 2, "context": 6, "vocab_size": 11}
TOKENS = torch.arange(12).view(2, 6) % 11


def gpt(wiring="prenorm", **options):
    """A GPT away from its start, in float64."""
    model = GPT(GPTConfig(wiring=wiring, **{**SHAPE, **options})).double()
    scramble(model)
    return model


def mlp(wiring="prenorm"):
    model = MLP(MLPConfig(in_dim=5, dim=16, out_dim=3, depth=4, wiring=wiring))
    scramble(model)
    return model


def scramble(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


AS_BEFORE = [
    "gpas",
    "denseformer",
    "denseformer(dilation=2, period=2)",
    "laurel",
    "layerscale(init=1.0)",
    "droppath",
    "frac(m=2)",
    "mixln(fraction=0.0)",
    "completep(base_depth=4)",
    "prenorm",
]


@pytest.mark.parametrize("wiring", AS_BEFORE)
def test_what_starts_as_pre_norm_leaves_the_function_unchanged(wiring):
    """To 1e-12 in float64, outputs and input gradients alike."""
    old = gpt().eval()
    new = rewire(old, wiring).model
    assert not new.training
    torch.testing.assert_close(new(TOKENS), old(TOKENS), rtol=1e-12, atol=1e-12)
    for model in (old, new):
        model(TOKENS).square().sum().backward()
    torch.testing.assert_close(new.token.weight.grad, old.token.weight.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("wiring", ["prenorm", "mhc(n=2)", "admin", "hybridnorm", "keel"])
def test_rewiring_to_itself_is_the_identity(wiring):
    """Every tensor is kept, bit by bit, and shares no memory with the old one."""
    old = gpt(wiring)
    done = rewire(old, wiring)
    assert set(done.kept) == set(old.state_dict())
    assert (done.fresh, done.dropped) == ((), ())
    assert torch.equal(done.model(TOKENS), old(TOKENS))
    scramble(done.model)
    again = rewire(old, wiring).model
    assert torch.equal(again(TOKENS), old(TOKENS))


@pytest.mark.parametrize("name", OURS)
def test_every_wiring_takes_over_a_gpt_and_an_mlp_and_trains(name):
    """Branches and embeddings are kept, names add up, and one step changes the loss."""
    torch.manual_seed(1)
    for old, inputs, targets in (
        (gpt("sandwich").float(), TOKENS, TOKENS.flatten()),
        (mlp(), torch.randn(7, 5), torch.arange(7) % 3),
    ):
        before = {key: value.clone() for key, value in old.state_dict().items()}
        done = rewire(old, name)
        new = done.model.state_dict()
        assert done.model.config.wiring == name
        assert {*done.kept, *done.fresh} == set(new)
        assert {*done.kept, *done.dropped} == set(before)
        assert not {*done.kept} & {*done.fresh, *done.dropped}
        assert {k for k in before if ".branch." in k or ".connections" not in k} - {
            "norm.weight", "norm.bias"
        } <= set(done.kept)  # fmt: skip
        assert all(torch.equal(new[key], before[key]) for key in done.kept)
        step(done.model, inputs, targets)
        assert all(torch.equal(v, before[key]) for key, v in old.state_dict().items())


def step(model, inputs, targets):
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for _ in range(2):
        torch.manual_seed(2)  # the same drops
        loss = F.cross_entropy(model(inputs).flatten(0, -2), targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(0 < loss < 100 for loss in losses)
    assert losses[0] != losses[1]


def kinds(names):
    """Return the last parts of names below a connection, without the branch's."""
    return {n.split(".")[3] for n in names if ".connections." in n and ".branch." not in n}


CROSSINGS = [
    ("prenorm", "postnorm", set(), {"norm"}, {"norm_in"}),
    ("postnorm", "deepnorm", {"norm"}, set(), set()),
    ("sandwich", "prenorm", {"norm_in"}, set(), {"norm_out"}),
    ("sandwich", "peri", {"norm_in", "norm_out"}, {"norm_open"}, set()),
    ("prenorm", "mhc", {"norm_in"}, {"generate"}, set()),
    # The same equation: alpha means the same.
    ("rezero", "skipinit", {"alpha"}, set(), set()),
    # The same name and shape, (1,) and (4, 4), and another meaning.
    ("rezero", "denseformer(dilation=5, period=4)", set(), {"alpha", "norm_in"}, {"alpha"}),
    ("hyper", "frac", {"norm_in"}, {"read", "mix", "write", "generate", "scale"}, None),
    # The same equation and another option: of another shape, or of the same and another meaning.
    ("laurel", "laurel(rank=4)", {"norm_in"}, {"down", "up"}, None),
    ("mhc", "mhc(iterations=3)", {"norm_in"}, {"generate"}, None),
    ("denseformer(dilation=2)", "denseformer(dilation=3)", {"norm_in"}, {"alpha"}, None),
    ("denseformer(dilation=2)", "denseformer(dilation=2)", {"norm_in", "alpha"}, set(), None),
]


@pytest.mark.parametrize(("old", "new", "kept", "fresh", "dropped"), CROSSINGS)
def test_what_is_kept_between_wirings(old, new, kept, fresh, dropped):
    done = rewire(gpt(old), new)
    assert (kinds(done.kept), kinds(done.fresh)) == (kept, fresh)
    assert kinds(done.dropped) == (fresh if dropped is None else dropped)


def test_the_final_norm_is_kept_where_both_have_one():
    assert "norm.weight" in rewire(gpt("prenorm"), "sandwich").kept
    assert "norm.weight" in rewire(gpt("prenorm"), "postnorm").dropped
    assert "norm.weight" in rewire(gpt("postnorm"), "prenorm").fresh


def test_what_starts_fresh_has_the_start_of_the_scheme():
    """LayerScale's gamma and the norm of post-norm, whatever the old model learned."""
    assert (rewire(gpt(), "layerscale(init=0.25)").model.stack.connections[3].gamma == 0.25).all()
    assert (rewire(gpt(), "postnorm").model.stack.connections[0].norm.weight == 1).all()


def test_options_that_a_wiring_asks_of_the_branches_start_fresh():
    done = rewire(gpt(), "hybridnorm")
    assert "stack.connections.0.branch.v_norm.weight" in done.fresh
    assert "stack.connections.0.branch.v_norm.weight" in rewire(done.model, "prenorm").dropped


def test_dtype_frozen_parameters_and_tied_heads_are_those_of_the_old_model():
    old = gpt(tied=True)
    old.token.weight.requires_grad_(False)
    new = rewire(old, "rezero").model
    assert new.head.weight is new.token.weight
    assert torch.equal(new.token.weight, old.token.weight)
    assert not new.token.weight.requires_grad
    assert {p.dtype for p in new.parameters()} == {torch.float64}
    assert all(p.requires_grad for n, p in new.named_parameters() if "token" not in n)


def test_the_summary_counts_and_shortens():
    text = str(rewire(mlp("postnorm"), "prenorm"))
    assert text.splitlines() == [
        "kept     12: input.weight, input.bias, stack.connections.*.branch.linear.weight (4), "
        "stack.connections.*.branch.linear.bias (4), head.weight, head.bias",
        "fresh    10: stack.connections.*.norm_in.weight (4), "
        "stack.connections.*.norm_in.bias (4), norm.weight, norm.bias",
        "dropped  8: stack.connections.*.norm.weight (4), stack.connections.*.norm.bias (4)",
    ]
    assert "dropped  nothing" in str(rewire(mlp(), "prenorm"))


def test_what_cannot_be_rewired_is_refused():
    @dataclass(frozen=True)
    class Config:
        wiring: str = "prenorm"

    class Without(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config

    with pytest.raises(ValueError, match="Linear has no config with a field 'wiring'"):
        rewire(nn.Linear(2, 2), "prenorm")
    with pytest.raises(ValueError, match="Without has 0 stacks, not one, to rewire"):
        rewire(Without(Config()), "prenorm")
    with pytest.raises(ValueError, match="did you mean 'prenorm'"):
        rewire(mlp(), "prenrm")


def test_a_users_model_with_a_config_and_a_stack():
    """The stack may have any name, and what lies beside it keeps its names."""

    @dataclass(frozen=True)
    class Config:
        wiring: str = "prenorm"
        depth: int = 3

    class Own(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.gamma = nn.Linear(4, 4)
            layers = [nn.Linear(4, 4) for _ in range(config.depth)]
            self.trunk = Stack(layers, config.wiring, dim=4)

        def forward(self, x):
            return self.trunk(self.gamma(x))

    old = Own(Config())
    scramble(old)
    done = rewire(old, "gpas")
    assert {n.split(".")[3] for n in done.fresh} == {"gate"}
    x = torch.randn(2, 4)
    torch.testing.assert_close(done.model(x), old(x))
    other = rewire(Own(Config("rezero", 4)), "denseformer(dilation=5, period=4)")
    assert "trunk.connections.3.alpha" in other.fresh  # (1,) in both, of another meaning
    assert "trunk.connections.3.alpha" in other.dropped
