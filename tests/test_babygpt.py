"""The babygpt ladder: counts, and each rung against its equations with one matrix for each head."""

import math

import pytest
import torch
from torch import nn

from addnorm.models.babygpt import LADDER
from addnorm.models.gpt import GPT, GPTConfig

COUNTS = {
    "babygpt-v6": 412_260,
    "babygpt-v7": 412_260,
    "babygpt-v8": 437_316,
    "babygpt-v9": 437_764,
    "babygpt-v12": 15_466_756,
}
SMALL = {"babygpt-v12": {"depth": 2, "dim": 12, "heads": 3, "context": 8}}  # v12 is large


def rung(name, **changes):
    return GPT(GPTConfig(**{**LADDER[name], "vocab_size": 13, **changes}))


# -- the oracle --------------------------------------------------------------------------------


def norm(x, p, name):
    """Return LayerNorm of the last axis, or x where p has no such norm."""
    if f"{name}.weight" not in p:
        return x
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / spread * p[f"{name}.weight"] + p[f"{name}.bias"]


def attention(x, p, name, heads):
    """Return the joined heads, each from matrices of its own, through the projection, if any."""
    _, T, D = x.shape
    E = D // heads
    outputs = []
    for h in range(heads):
        own = [p[f"{name}.qkv.weight"][i * D + h * E : i * D + (h + 1) * E] for i in range(3)]
        q, k, v = (x @ matrix.T for matrix in own)
        scores = q @ k.transpose(1, 2) / math.sqrt(E)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        outputs.append(scores.softmax(-1) @ v)
    joined = torch.cat(outputs, dim=-1)
    if f"{name}.out.weight" not in p:
        return joined
    return joined @ p[f"{name}.out.weight"].T + p[f"{name}.out.bias"]


def feedforward(x, p, name):
    """Return max(W x + b, 0), through a second layer where there is one."""
    h = (x @ p[f"{name}.lift.weight"].T + p[f"{name}.lift.bias"]).clamp(min=0)
    if f"{name}.out.weight" not in p:
        return h
    return h @ p[f"{name}.out.weight"].T + p[f"{name}.out.bias"]


def babygpt(tokens, p, depth, heads, residual):
    """Return the logits of a rung from its parameters by name."""
    x = p["token.weight"][tokens] + p["position.weight"][: tokens.shape[1]]
    for layer in range(depth):
        for place, branch in ((2 * layer, "attention"), (2 * layer + 1, "feed-forward")):
            at = f"stack.connections.{place}"
            seen = norm(x, p, f"{at}.norm_in")
            if branch == "attention":
                update = attention(seen, p, f"{at}.branch", heads)
            else:
                update = feedforward(seen, p, f"{at}.branch")
            x = x + update if residual else update
    return norm(x, p, "norm") @ p["head.weight"].T + p["head.bias"]


# -- tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LADDER)
def test_parameter_counts_are_the_originals(name):
    """At the original's vocabulary of 6,148 each rung has the parameters of the original."""
    with torch.device("meta"):
        model = rung(name, vocab_size=6148)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    assert sum(model.parameters_by_part().values()) == COUNTS[name]


def test_the_ladder_is_complete():
    """The rungs are those that the document and its sequel name, in order."""
    assert list(LADDER) == list(COUNTS)


@pytest.mark.parametrize("path", ["sdpa", "matmul"])
@pytest.mark.parametrize("name", LADDER)
def test_a_rung_is_its_equations(name, path):
    """Logits and the gradients of all parameters are those of the equations, head by head."""
    torch.manual_seed(0)
    model = rung(name, **SMALL.get(name, {})).double().eval()
    model.choose("attention", path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    p = dict(model.named_parameters())
    tokens = torch.randint(13, (3, 8))
    shape = model.config
    want = babygpt(tokens, p, shape.depth, shape.heads, residual=name != "babygpt-v6")
    got = model(tokens)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(want)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), list(p.values())) for y in (got, want))
    for key, one, other in zip(p, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=key)


def test_which_parameters_a_rung_has():
    """v7 has no output matrices and no biases on q, k, v; v8 adds the matrices, v9 the norms."""
    layer = "stack.connections."
    found = {name: set(dict(rung(name).named_parameters())) for name in list(LADDER)[:4]}
    assert found["babygpt-v6"] == found["babygpt-v7"]
    assert {n.removeprefix(layer) for n in found["babygpt-v7"] if n.startswith(f"{layer}0.")} == {
        "0.branch.qkv.weight"
    }
    assert {n.removeprefix(layer) for n in found["babygpt-v7"] if n.startswith(f"{layer}1.")} == {
        "1.branch.lift.weight",
        "1.branch.lift.bias",
    }
    new = {f"{layer}{i}.branch.out.{kind}" for i in range(6) for kind in ("weight", "bias")}
    assert found["babygpt-v8"] - found["babygpt-v7"] == new
    norms = {f"{layer}{i}.norm_in.{kind}" for i in range(6) for kind in ("weight", "bias")}
    assert found["babygpt-v9"] - found["babygpt-v8"] == norms | {"norm.weight", "norm.bias"}
    assert not found["babygpt-v7"] - found["babygpt-v8"]
    assert not found["babygpt-v8"] - found["babygpt-v9"]


@pytest.mark.parametrize("name", ["babygpt-v7", "babygpt-v9"])
def test_a_rung_starts_as_torch_does(name):
    """Every matrix and bias starts as `nn.Embedding`, `nn.Linear` and `nn.LayerNorm` start."""
    torch.manual_seed(1)
    model = rung(name, vocab_size=2000)
    for embedding in (model.token, model.position):
        assert embedding.weight.std().item() == pytest.approx(1, rel=0.1)
    for label, module in model.named_modules():
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            for parameter in module.parameters():
                assert parameter.abs().max() <= bound, label
                std = bound / 3**0.5
                assert parameter.std().item() == pytest.approx(std, rel=0.4), label
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), label
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_where_the_dropout_of_v12_falls():
    """0.2 on the attention weights and on the output of every branch, none on the embedding."""
    model = rung("babygpt-v12", **SMALL["babygpt-v12"])
    assert model.dropout.p == 0
    for index, connection in enumerate(model.stack):
        assert connection.branch.dropout.p == 0.2
        if index % 2 == 0:
            assert connection.branch.weight_dropout == 0.2
        else:
            assert connection.branch.hidden_dropout.p == 0
