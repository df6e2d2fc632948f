"""The models: branches against the naive oracle, structure by hand, and golden gradients."""

from dataclasses import replace

import naive
import pytest
import torch
from torch import nn

from addnorm.branches import STARTS, Context
from addnorm.models.gpt import GPT, GPTConfig
from addnorm.models.layers import ATTENTION_PATHS, Attention, FeedForward
from addnorm.models.mlp import MLP, MLPConfig

SPECS = [
    "plain",
    "plain(norm=true)",
    "residual",
    "postnorm",
    "prenorm",
    "sandwich",
    "deepnorm",
    "rezero",
    "layerscale",
]
each_path = pytest.mark.parametrize("path", ATTENTION_PATHS)
each_spec = pytest.mark.parametrize("spec", SPECS)


# -- helpers -----------------------------------------------------------------------------------


def randomised(module, scale=1.0):
    """Fill every parameter with random values of order `scale`."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=scale)
    return module


def agree(got, want, x, module):
    """Hold an output and the gradients of input and parameters against those of the oracle."""
    weights = torch.randn_like(want)
    named = {"input": x, **dict(module.named_parameters())}
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    ours = torch.autograd.grad((got * weights).sum(), list(named.values()))
    theirs = torch.autograd.grad((want * weights).sum(), list(named.values()))
    for name, one, other in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


def gpt(**changes):
    """Return a small GPT in evaluation mode."""
    shape = {"depth": 2, "dim": 8, "heads": 2, "context": 6, "vocab_size": 11}
    return GPT(GPTConfig(**{**shape, **changes})).eval()


def masks(B, T, heads):
    """Return masks of every shape that broadcasts to `(B, heads, T, T)`; each sees itself."""
    diagonal = torch.eye(T, dtype=torch.bool)
    padding = torch.ones(B, 1, 1, T, dtype=torch.bool)
    padding[0, ..., T - 1] = False  # the last key of the first example; its query sees the others
    return {
        "none": None,
        "shared": (torch.rand(T, T) < 0.5) | diagonal,
        "batch": (torch.rand(B, 1, T, T) < 0.5) | diagonal,
        "heads": (torch.rand(B, heads, T, T) < 0.5) | diagonal,
        "padding": padding,
    }


# -- branches ----------------------------------------------------------------------------------


@each_path
@pytest.mark.parametrize("kind", ["none", "shared", "batch", "heads", "padding"])
def test_attention_is_its_formula(kind, path):
    """Attention, with and without a mask, is the sum over the visible keys, head by head."""
    B, T, D, heads = 2, 4, 6, 2
    attention = randomised(Attention(D, heads, path=path).double(), 0.7)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    mask = masks(B, T, heads)[kind]
    full = None if mask is None else mask.expand(B, heads, T, T)
    want = naive.attention(x, dict(attention.named_parameters()), heads, full)
    agree(attention(x, Context(mask=mask)), want, x, attention)


@pytest.mark.parametrize("path", ["sdpa", "matmul"])
def test_attention_survives_a_query_that_sees_nothing(path):
    """Where padding stands on the left, a query without any key gets 0, and no nan spreads."""
    attention = randomised(Attention(6, 2, path=path).double(), 0.7)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 1, 1, 4, dtype=torch.bool)
    mask[0, ..., 0] = False
    p = dict(attention.named_parameters())
    want = naive.attention(x, p, 2, mask.expand(2, 2, 4, 4))
    agree(attention(x, Context(mask=mask)), want, x, attention)


@each_path
@pytest.mark.parametrize("pieces", [(1, 1, 1, 1, 1), (2, 3), (3, 1, 1), (5,)])
def test_attention_with_a_cache_is_attention(pieces, path):
    """Read in pieces through the cache, a text has the outputs and gradients of the whole."""
    attention = randomised(Attention(6, 2, path=path).double(), 0.7)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    context = Context(cache={})
    got = torch.cat([attention(piece, context) for piece in x.split(pieces, dim=1)], dim=1)
    want = naive.attention(x, dict(attention.named_parameters()), 2)
    agree(got, want, x, attention)
    key, value = context.cache[attention]
    assert key.shape == value.shape == (2, 2, 5, 3)


def test_feedforward_is_its_formula():
    """The feed-forward is W_out gelu(W_in x + b_in) + b_out of each token."""
    feedforward = randomised(FeedForward(3, 5).double())
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    p = dict(feedforward.named_parameters())
    want = naive.by_token(lambda token: naive.feedforward(token, p, naive.gelu), x)
    agree(feedforward(x, Context()), want, x, feedforward)


@pytest.mark.parametrize("branch", [Attention(8, 2), FeedForward(8)], ids=["attn", "ffn"])
def test_matrices_by_role_are_the_weights(branch):
    """The matrices by role are views that cover every weight matrix of the branch once."""
    views = [matrix.weight for matrix in branch.matrices()]
    assert sum(view.numel() for view in views) == sum(
        p.numel() for p in branch.parameters() if p.dim() == 2
    )
    with torch.no_grad():
        for view in views:
            view.fill_(7)
    assert all((p == 7).all() for p in branch.parameters() if p.dim() == 2)


# -- GPT ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "wiring", "final_norm"),
    [
        # 4 connections of width 8: LayerNorm has 16 parameters, RMSNorm 8
        ({"wiring": "plain"}, 0, 0),
        ({"wiring": "plain(norm=true)"}, 64, 0),
        ({"wiring": "residual"}, 0, 0),
        ({"wiring": "postnorm"}, 64, 0),
        ({"wiring": "prenorm"}, 64, 16),
        ({"wiring": "sandwich"}, 128, 16),
        ({"wiring": "deepnorm"}, 64, 0),
        ({"wiring": "rezero"}, 4, 0),
        ({"wiring": "layerscale"}, 96, 16),
        ({"wiring": "prenorm", "norm": "rmsnorm"}, 32, 8),
        ({"wiring": "sandwich", "norm": "rmsnorm"}, 64, 8),
        ({"wiring": "prenorm", "tied": True}, 64, 16),
    ],
)
def test_parameters_by_part(changes, wiring, final_norm):
    """Each part has the number of parameters counted by hand, and the parts add up."""
    model = gpt(**changes)
    parts = {
        "token": 11 * 8,
        "position": 6 * 8,
        "attention": 2 * (3 * (8 * 8 + 8) + 8 * 8 + 8),  # 576
        "feed-forward": 2 * (32 * 8 + 32 + 8 * 32 + 8),  # 1104
        "wiring": wiring,
        "final norm": final_norm,
        "head": 0 if model.config.tied else 8 * 11,
    }
    assert model.parameters_by_part() == parts
    assert sum(p.numel() for p in model.parameters()) == sum(parts.values())


@each_spec
def test_final_norm_stands_where_the_wiring_needs_it(spec):
    """A final norm stands exactly behind the wirings that normalise inside the branch only."""
    needed = spec in ("prenorm", "sandwich", "layerscale")
    assert isinstance(gpt(wiring=spec).norm, nn.LayerNorm if needed else nn.Identity)
    assert isinstance(gpt(wiring=spec, norm="rmsnorm").norm, nn.RMSNorm if needed else nn.Identity)


def test_tied_head_is_the_embedding():
    """A tied head is the token embedding's weight itself, with the spread of a head."""
    shape = {"vocab_size": 500, "context": 500}
    tied, free = gpt(tied=True, **shape), gpt(**shape)
    assert tied.head.weight is tied.token.weight
    assert free.head.weight is not free.token.weight
    for module, std in [
        (tied.token, 0.02),
        (tied.position, 0.02),
        (free.token, 0.1),
        (free.position, 0.1),
        (free.head, 0.02),
    ]:
        assert module.weight.std().item() == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize("tied", [False, True])
def test_gpt_works_after_the_meta_device(tied):
    """A GPT made on the meta device and reset is the GPT made in memory and reset."""
    made = gpt(tied=tied)
    with torch.device("meta"):
        late = gpt(tied=tied)
    late = late.to_empty(device="cpu")
    for model in (made, late):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))  # what the reset forgets stays visible
        torch.manual_seed(1)
        model.reset_parameters()
    assert (late.head.weight is late.token.weight) == tied
    for (name, ours), theirs in zip(late.named_parameters(), made.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_flops_per_token():
    """Training FLOPs per token are 6 N + 12 L T D, N the parameters in matrix products."""
    N = 2 * (3 * 8 * 8 + 8 * 8 + 2 * 8 * 32) + 11 * 8  # 1624
    for spec in SPECS:
        assert gpt(wiring=spec).flops_per_token() == 6 * N + 12 * 2 * 6 * 8
    assert gpt(tied=True).flops_per_token() == 6 * N + 12 * 2 * 6 * 8


@each_path
@each_spec
def test_gpt_is_causal(spec, path):
    """Another later token leaves the earlier logits as they are, and changes its own."""
    model = randomised(gpt(wiring=spec), 0.5)
    model.choose("attention", path)
    tokens = torch.randint(11, (2, 6))
    before = model(tokens)
    for t in range(6):
        changed = tokens.clone()
        changed[:, t] = (tokens[:, t] + 1) % 11
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-6)
        moved = (after[:, t] - before[:, t]).abs().amax(-1)
        assert (moved > 1e-3).all(), t


@each_path
@each_spec
def test_cached_logits_are_the_logits(spec, path):
    """Token by token through the cache, the logits are those of the whole text."""
    model = randomised(gpt(wiring=spec), 0.5).double()
    model.choose("attention", path)
    tokens = torch.randint(11, (2, 6))
    context = Context(cache={})
    steps = [model(tokens[:, t : t + 1], replace(context, past=t)) for t in range(6)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens), rtol=1e-9, atol=1e-9)
    assert len(context.cache) == 2


@each_spec
def test_paths_agree(spec):
    """Both ways to compute attention give the same logits to rounding."""
    model = randomised(gpt(wiring=spec), 0.5).double()
    tokens = torch.randint(11, (2, 6))
    logits = []
    assert model.choices() == {"attention": ("sdpa", "matmul")}
    for path in model.choices()["attention"]:
        model.choose("attention", path)
        chosen = {module.path for module in model.modules() if isinstance(module, Attention)}
        assert chosen == {path}
        logits.append(model(tokens))
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)


@each_spec
def test_one_seed_is_one_model(spec):
    """The same seed gives the same parameters, logits and gradients, bit by bit."""
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = gpt(wiring=spec, dropout=0.1).train()
        logits = model(torch.arange(6)[None])
        logits.square().sum().backward()
        runs.append([logits, *model.parameters(), *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, runs[0], runs[1]))
    assert not torch.equal(runs[0][0], runs[2][0])


@each_spec
def test_dropout_is_off_in_evaluation(spec):
    """In evaluation dropout does nothing; in training it changes the logits."""
    model, tokens = randomised(gpt(wiring=spec, dropout=0.3), 0.5), torch.arange(6)[None]
    assert torch.equal(model(tokens), model(tokens))
    assert not torch.equal(model.train()(tokens), model.eval()(tokens))


@each_spec
def test_optimiser_groups_hold_every_parameter_once(spec):
    """Every parameter lies in one optimiser group; matrices decay, vectors and scalars do not."""
    model = gpt(wiring=spec, tied=True)
    groups = model.parameter_groups(0.1)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert group["lr_scale"] == 1
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth 0 must be at least 1"),
        ({"dim": -8}, "dim -8 must be at least 1"),
        ({"heads": 0}, "heads 0 must be at least 1"),
        ({"context": 0}, "context 0 must be at least 1"),
        ({"heads": 3}, "heads 3 does not divide dim 8 (allowed: 1, 2, 4, 8)"),
        ({"vocab_size": 0}, "vocab_size 0 must be at least 1"),
        ({"vocab_size": -1}, "vocab_size -1 must be at least 1"),
        ({"dropout": 1.0}, "dropout 1.0 must be at least 0 and less than 1"),
        (
            {"norm": "layer"},
            "unknown norm 'layer'; did you mean 'layernorm'? "
            "(known: layernorm, rmsnorm, scalenorm, dyt, derf)",
        ),
        (
            {"start": "gpt"},
            f"unknown start 'gpt'; did you mean 'gpt2'? (known: {', '.join(STARTS)})",
        ),
    ],
)
def test_gpt_refuses(changes, message):
    """A configuration that does not fit is refused with the value and what would fit."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole text is compared
        gpt(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(("length", "past"), [(7, 0), (1, 6), (3, 4)])
def test_gpt_refuses_too_many_positions(length, past):
    """More positions than the model was built with are refused, those in the cache counted."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole text is compared
        gpt()(torch.zeros(1, length, dtype=torch.long), Context(past=past))
    assert str(caught.value) == "7 positions, but the model was built for 6"


# -- MLP ---------------------------------------------------------------------------------------

# Document 003: mean absolute weight gradient by layer, seed 123, input [[1, 0, -1]], target 0.
GOLDEN = [
    (
        "gelu",
        "plain",
        [
            0.0002017411752603948,
            0.00012011770741082728,
            0.0007152437465265393,
            0.0013988513965159655,
            0.005049604922533035,
        ],
    ),
    (
        "gelu",
        "residual",
        [
            0.22186796367168427,
            0.207092747092247,
            0.32923877239227295,
            0.2667771875858307,
            1.3268063068389893,
        ],
    ),
    (
        "gelu-tanh",
        "plain",
        [
            0.00020173587836325169,
            0.0001201116101583466,
            0.0007152041653171182,
            0.001398873864673078,
            0.005049646366387606,
        ],
    ),
    (
        "gelu-tanh",
        "residual",
        [
            0.22169792652130127,
            0.20694105327129364,
            0.32896995544433594,
            0.2665732502937317,
            1.3258541822433472,
        ],
    ),
]


@pytest.mark.parametrize(("activation", "wiring", "golden"), GOLDEN)
def test_mlp_has_the_printed_gradients(activation, wiring, golden):
    """The five-layer network of document 003 has the gradients printed there."""
    config = MLPConfig(
        3, 3, 1, depth=4, wiring=wiring, activation=activation, head_activation=True, start="torch"
    )
    model = MLP(config)
    torch.manual_seed(123)
    model.reset_parameters()
    y = model(torch.tensor([[1.0, 0.0, -1.0]]))
    nn.functional.mse_loss(y, torch.zeros_like(y)).backward()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    gradients = [layer.weight.grad.abs().mean().item() for layer in layers]
    assert gradients == pytest.approx(golden, rel=2e-6)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        # input (4 + 1) 3, three layers (3 + 1) 3, head (3 + 1) 2
        ({}, 15 + 36 + 8),
        ({"in_dim": 3}, 36 + 8),
        ({"wiring": "prenorm"}, 15 + 36 + 3 * 6 + 6 + 8),
        ({"wiring": "prenorm", "norm": "rmsnorm"}, 15 + 36 + 3 * 3 + 3 + 8),
        ({"wiring": "postnorm"}, 15 + 36 + 3 * 6 + 8),
    ],
)
def test_mlp_has_its_parts(changes, count):
    """An MLP has an input layer where the widths differ, and a norm where the wiring asks."""
    model = MLP(MLPConfig(**{"in_dim": 4, "dim": 3, "out_dim": 2, "depth": 3, **changes}))
    assert sum(p.numel() for p in model.parameters()) == count


@each_spec
def test_mlp_works_after_the_meta_device(spec):
    """An MLP made on the meta device and reset is the MLP made in memory and reset."""
    config = MLPConfig(4, 3, 2, depth=3, wiring=spec)
    made = MLP(config)
    with torch.device("meta"):
        late = MLP(config)
    late = late.to_empty(device="cpu")
    for model in (made, late):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))  # what the reset forgets stays visible
        torch.manual_seed(1)
        model.reset_parameters()
    assert all(map(torch.equal, made.parameters(), late.parameters()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth 0 must be at least 1"),
        ({"out_dim": 0}, "out_dim 0 must be at least 1"),
        (
            {"activation": "gelutanh"},
            "unknown activation 'gelutanh'; did you mean 'gelu-tanh'? "
            "(known: gelu, gelu-tanh, relu, relu2, silu, tanh, sigmoid)",
        ),
        (
            {"norm": "rms"},
            "unknown norm 'rms'; did you mean 'rmsnorm'? "
            "(known: batchnorm, layernorm, rmsnorm, scalenorm, dyt, derf)",
        ),
    ],
)
def test_mlp_refuses(changes, message):
    """A configuration that does not fit is refused with the value and what would fit."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole text is compared
        MLPConfig(**changes)
    assert str(caught.value) == message
