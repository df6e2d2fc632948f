"""The encoder: against the layers of torch.nn, masks, heads, and what it refuses."""

import copy
import json
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from test_models import randomised
from torch import nn

from addnorm.contract import catalogue
from addnorm.models.encoder import Encoder, EncoderConfig, from_torch_layers, load_torch_layers
from addnorm.models.layers import (
    ATTENTION_PATHS,
    Attention,
    AttentionConfig,
    EmbeddingConfig,
    FeedForwardConfig,
)

B, T, D = 3, 5, 8
each_path = pytest.mark.parametrize("path", ATTENTION_PATHS)
SHAPE = {"depth": 2, "dim": D, "heads": 2, "context": 6}


def encoder(**changes):
    """Return a small encoder in evaluation mode."""
    return Encoder(EncoderConfig(**{**SHAPE, **changes})).eval()


def layer(**changes):
    """Return a layer of torch in evaluation mode, with random norms too."""
    shape = {"d_model": D, "nhead": 2, "dim_feedforward": 12, "batch_first": True}
    made = nn.TransformerEncoderLayer(**{**shape, **changes}).double().eval()
    return randomised(made, 0.4)


def stacked(one, count=2, norm=False):
    """Return an `nn.TransformerEncoder` of copies of a layer, each with weights of its own."""
    final = randomised(nn.LayerNorm(D).double(), 0.4) if norm else None
    return randomised(nn.TransformerEncoder(one, count, final, enable_nested_tensor=False), 0.4)


def vectors(dtype=torch.float64):
    return torch.randn(B, T, D, dtype=dtype, requires_grad=True)


def padding():
    """Return where positions are kept: the second example ends, the third begins with padding."""
    keep = torch.ones(B, T, dtype=torch.bool)
    keep[1, 3:] = False
    keep[2, 0] = False
    return keep


def looks(kind):
    """Return an attention mask in which every query sees a kept key."""
    if kind == "none":
        return None
    shape = (T, T) if kind == "shared" else (B, T, T)
    look = torch.rand(shape) < 0.5
    look[..., 1:3] = True  # kept everywhere
    return look


def theirs_of(look, heads=2):
    """Return torch's mask: True is never, with one row of masks for each head of each example."""
    if look is None:
        return None
    return ~look if look.dim() == 2 else ~look.repeat_interleave(heads, dim=0)


# -- the layers of torch -----------------------------------------------------------------------

# Ours for each parameter of a layer of torch; the norms' name depends on the order.
NAMES = {
    "self_attn.in_proj_weight": "0.branch.qkv.weight",
    "self_attn.in_proj_bias": "0.branch.qkv.bias",
    "self_attn.out_proj.weight": "0.branch.out.weight",
    "self_attn.out_proj.bias": "0.branch.out.bias",
    "linear1.weight": "1.branch.lift.weight",
    "linear1.bias": "1.branch.lift.bias",
    "linear2.weight": "1.branch.out.weight",
    "linear2.bias": "1.branch.out.bias",
    "norm1.weight": "0.NORM.weight",
    "norm1.bias": "0.NORM.bias",
    "norm2.weight": "1.NORM.weight",
    "norm2.bias": "1.NORM.bias",
}


def our_name(name, norm_first):
    """Return our name of a parameter of an `nn.TransformerEncoder`."""
    if name.startswith("norm."):
        return name
    _, index, rest = name.split(".", 2)
    part, ours = NAMES[rest].split(".", 1)
    ours = ours.replace("NORM", "norm_in" if norm_first else "norm")
    return f"stack.connections.{2 * int(index) + int(part)}.{ours}"


@each_path
@pytest.mark.parametrize("kind", ["none", "shared", "batch"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_it_equals_torchs_layers(norm_first, padded, kind, path):
    """Outputs and all gradients in float64 are those of torch, both orders and all masks."""
    one = layer(norm_first=norm_first)
    reference = stacked(one, norm=norm_first)
    ours = from_torch_layers(reference)
    ours.choose("attention", path)
    x, keep, look = vectors(), padding() if padded else None, looks(kind)
    got = ours(x, keep=keep, look=look)
    pad = None if keep is None else ~keep
    want = reference(x, mask=theirs_of(look), src_key_padding_mask=pad)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    weights = torch.randn_like(want)
    named = dict(reference.named_parameters())
    own = dict(ours.named_parameters())
    assert len(own) == len(named)
    from_us = torch.autograd.grad(
        (got * weights).sum(), [x, *(own[our_name(name, norm_first)] for name in named)]
    )
    from_them = torch.autograd.grad((want * weights).sum(), [x, *named.values()])
    for name, one_gradient, other in zip(["input", *named], from_us, from_them, strict=True):
        torch.testing.assert_close(one_gradient, other, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("norm_first", [False, True])
def test_it_equals_torchs_layers_in_float32(norm_first):
    """In float32 the outputs differ from torch's by less than 1e-6 of their size."""
    reference = stacked(layer(norm_first=norm_first)).float()
    ours = from_torch_layers(reference)
    assert next(ours.parameters()).dtype == torch.float32
    x, keep, look = vectors(torch.float32), padding(), looks("batch")
    want = reference(x, mask=theirs_of(look), src_key_padding_mask=~keep)
    got = ours(x, keep=keep, look=look)
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


@pytest.mark.parametrize("norm_first", [False, True])
def test_it_equals_torchs_fast_path(norm_first):
    """Without gradients torch takes another kernel; kept positions are the same there."""
    reference = stacked(layer(norm_first=norm_first))
    ours = from_torch_layers(reference)
    x, keep = vectors().detach(), padding()
    with torch.no_grad():
        want = reference(x, src_key_padding_mask=~keep)
        got = ours(x, keep=keep)
    torch.testing.assert_close(got[keep], want[keep], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        ("relu", "relu"),
        ("gelu", "gelu"),
        (F.gelu, "gelu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu-tanh"),
        (F.silu, "silu"),
        (torch.tanh, "tanh"),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_activations_and_biases_of_torchs_layers(activation, name, bias):
    """The activation and the biases are theirs; a norm without bias has one of 0."""
    rows = [layer(activation=activation, bias=bias, norm_first=True) for _ in range(2)]
    ours = from_torch_layers(rows)
    assert ours.config.feedforward.activation == name
    assert isinstance(ours.norm, nn.Identity)
    x = vectors()
    torch.testing.assert_close(ours(x), rows[1](rows[0](x)), rtol=1e-10, atol=1e-11)
    biases = {n for n, p in ours.named_parameters() if n.endswith("bias") and p.any()}
    assert bool(biases) == bias


def test_a_list_leaves_embedding_norm_and_head_alone():
    """Layers in a row fill the stack; what stands around it stays, and takes part."""
    rows = [layer(norm_first=True, dim_feedforward=32) for _ in range(2)]
    ours = randomised(encoder(vocab_size=7, out_dim=3, feedforward=RELU).double(), 0.4)
    before = {n: p.clone() for n, p in ours.named_parameters()}
    load_torch_layers(ours, rows)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, before[name]) == (not name.startswith("stack")), name
    text = torch.randint(7, (B, T))
    x = ours.token(text) + ours.position.weight[:T]
    want = ours.head(ours.norm(rows[1](rows[0](x))))
    torch.testing.assert_close(ours(text), want, rtol=1e-10, atol=1e-11)


RELU = FeedForwardConfig(activation="relu")


def test_dropouts_are_where_torchs_are():
    """In training the four dropouts of a layer have its rates, and the mean is the output."""
    one = layer(dropout=0.3)
    one.dropout.p, one.dropout2.p, one.dropout1.p, one.self_attn.dropout = 0.1, 0.3, 0.3, 0.4
    ours = from_torch_layers([one])
    attention, feedforward = (connection.branch for connection in ours.stack)
    assert attention.dropout.p == feedforward.dropout.p == 0.3
    assert attention.weight_dropout == 0.4
    assert feedforward.hidden_dropout.p == 0.1
    assert ours.dropout.p == 0
    x = vectors().detach()
    assert not torch.equal(ours.train()(x), ours(x))


def test_dropout_falls_on_the_branch_and_never_on_the_stream():
    """With branches of 0 a training encoder is the identity, whatever its dropout."""
    ours = encoder(wiring="residual", start="zero", dropout=0.5, embedding=NO_POSITIONS).train()
    x = vectors(torch.float32)
    assert torch.equal(ours(x), x)


NO_POSITIONS = EmbeddingConfig(positions="none")


@pytest.mark.parametrize(
    ("changes", "make", "message"),
    [
        (
            {"dim": 16, "heads": 4},
            lambda: [layer(norm_first=True), layer(norm_first=True)],
            "dim 16, theirs 8; heads 4, theirs 2; hidden 64, theirs 12; activation gelu, theirs "
            "relu",
        ),
        (
            {"feedforward": FeedForwardConfig(activation="relu", hidden=12)},
            lambda: [layer(norm_first=True), layer(), layer(norm_first=True, bias=False)],
            "wiring prenorm, theirs postnorm (layer 1); attention_biases all, theirs none "
            "(layer 2); feedforward_bias True, theirs False (layer 2); depth 2, theirs 3",
        ),
        (
            {
                "feedforward": FeedForwardConfig(activation="relu", hidden=12),
                "attention": AttentionConfig(qk_norm=True),
                "embedding": EmbeddingConfig(positions="rotary"),
                "norm": "rmsnorm",
                "wiring": "deepnorm",
            },
            lambda: [layer(layer_norm_eps=1e-6, activation=F.elu)] * 2,
            "wiring deepnorm, theirs postnorm; activation relu, theirs something else; norm "
            "rmsnorm, theirs layernorm; eps of the norms 1e-05, theirs 1e-06; positions in the "
            "attention rotary, theirs none; options of the branches some, theirs none",
        ),
        (
            {"feedforward": FeedForwardConfig(activation="relu", hidden=12)},
            lambda: stacked(layer(norm_first=True)),
            "final norm yes, theirs none",
        ),
    ],
)
def test_what_does_not_fit_is_listed_and_nothing_loaded(changes, make, message):
    """One error names every difference, and no parameter has changed."""
    ours = encoder(**changes)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole text is compared
        load_torch_layers(ours, make())
    assert str(caught.value) == f"the layers do not fit the encoder: {message}"
    assert all(map(torch.equal, ours.state_dict().values(), before.values()))


def test_a_wrong_shape_is_named_and_nothing_loaded():
    """A layer whose weight was replaced by one of another shape is refused as a whole."""
    rows = [layer(norm_first=True), layer(norm_first=True)]
    rows[1].linear2 = nn.Linear(11, D)
    ours = encoder(feedforward=FeedForwardConfig(activation="relu", hidden=12))
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole text is compared
        load_torch_layers(ours, rows)
    assert str(caught.value) == (
        "the layers do not fit the encoder: stack.connections.3.branch.out.weight (8, 12), "
        "theirs (8, 11)"
    )
    assert all(map(torch.equal, ours.state_dict().values(), before.values()))


class Other(nn.TransformerEncoderLayer):
    """A layer that may compute something else."""


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "there are no layers to read"),
        ([nn.Linear(2, 2)], "layer 0 is of class Linear, not nn.TransformerEncoderLayer"),
        ([Other(8, 2)], "layer 0 is of class Other, not nn.TransformerEncoderLayer"),
        (
            [nn.TransformerEncoderLayer(8, 2, activation=F.elu)],
            "no option of an encoder is what the layers have: activation",
        ),
        (
            [layer(), nn.TransformerEncoderLayer(6, 2, 12)],
            "the layers read (T, B, D) and an encoder (B, T, D): make them with batch_first=True, "
            "or set self_attn.batch_first of each to True, which changes no weight",
        ),
    ],
)
def test_other_layers_are_refused(layers, message):
    """Modules that are not torch's layers, or have what we lack, are refused by name."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole text is compared
        from_torch_layers(layers)
    assert str(caught.value) == message


def test_layers_that_read_the_batch_second_are_taken_once_that_is_changed():
    """What the refusal advises: the outputs are those of the layers, and no weight changed."""
    one = layer(batch_first=False)
    x = vectors()
    want = one(x.transpose(0, 1)).transpose(0, 1)
    one.self_attn.batch_first = True
    torch.testing.assert_close(from_torch_layers([one])(x), want, rtol=1e-10, atol=1e-11)


# -- the encoder by itself ---------------------------------------------------------------------


@pytest.mark.parametrize("wiring", sorted(catalogue()))
def test_every_wiring(wiring):
    """Under every wiring padding changes nothing at kept positions, and gradients are finite."""
    ours = randomised(encoder(wiring=wiring, embedding=NO_POSITIONS).double(), 0.3)
    x, keep = vectors(), padding()
    y = ours(x, keep=keep)
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    other = torch.where(keep[..., None], x, 7.0)
    torch.testing.assert_close(ours(other, keep=keep)[keep], y[keep], rtol=1e-9, atol=1e-9)


@each_path
def test_it_looks_both_ways(path):
    """Another last token changes the first output; where `look` forbids it, it does not."""
    ours = randomised(encoder(vocab_size=7).double(), 0.4)
    ours.choose("attention", path)
    assert {m.path for m in ours.modules() if isinstance(m, Attention)} == {path}
    text = torch.randint(7, (B, T))
    other = text.clone()
    other[:, -1] = (text[:, -1] + 1) % 7
    assert ((ours(text) - ours(other))[:, 0].abs().amax(-1) > 1e-3).all()
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    before, after = ours(text, look=causal), ours(other, look=causal)
    torch.testing.assert_close(before[:, :-1], after[:, :-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("positions", ["learned", "rotary", "none"])
def test_only_positions_know_the_order(positions):
    """Without positions a reordered text has the reordered outputs; with them it has not."""
    embedding = EmbeddingConfig(positions=positions)
    ours = randomised(encoder(vocab_size=7, embedding=embedding).double(), 0.4)
    text, order = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([3, 0, 4, 1, 2])
    apart = (ours(text)[:, order] - ours(text[:, order])).abs().max()
    assert (apart < 1e-10) == (positions == "none")


def test_vectors_are_read_as_embedded_tokens_are():
    """An encoder reads the vectors of its token embedding as it reads the tokens."""
    ours = randomised(encoder(vocab_size=7), 0.4)
    text = torch.randint(7, (B, T))
    assert torch.equal(ours(text), ours(ours.token(text)))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pool", ["none", "mean", "first"])
@pytest.mark.parametrize("out_dim", [0, 3])
def test_pool_and_head(out_dim, pool, padded):
    """The mean runs over kept positions; the head reads what is pooled."""
    ours = randomised(encoder(out_dim=out_dim, pool=pool).double(), 0.4)
    bare = encoder().double()
    bare.load_state_dict(ours.state_dict(), strict=False)
    x, keep = vectors(), padding() if padded else None
    y = bare(x, keep=keep)
    if pool == "first":
        y = y[:, 0]
    elif pool == "mean":
        kept = [range(T)] * B if keep is None else [[0, 1, 2, 3, 4], [0, 1, 2], [1, 2, 3, 4]]
        y = torch.stack([sum(y[b, t] for t in kept[b]) / len(kept[b]) for b in range(B)])
    want = y @ ours.head.weight.T + ours.head.bias if out_dim else y
    torch.testing.assert_close(ours(x, keep=keep), want, rtol=1e-10, atol=1e-11)


def test_an_example_of_padding_alone_gives_zeros_and_no_nan():
    """Where nothing is kept the mean is 0 and every gradient is a number."""
    ours = encoder(pool="mean")
    x, keep = vectors(torch.float32), padding()
    keep[0] = False
    y = ours(x, keep=keep)
    y.sum().backward()
    assert not y[0].any()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("final_norm", "wiring", "there"),
    [
        ("auto", "prenorm", True),
        ("auto", "postnorm", False),
        ("yes", "postnorm", True),
        ("no", "prenorm", False),
    ],
)
def test_final_norm(final_norm, wiring, there):
    """A final norm stands where the wiring needs one, or as the config says."""
    ours = encoder(final_norm=final_norm, wiring=wiring)
    assert isinstance(ours.norm, nn.LayerNorm) == there


@pytest.mark.parametrize("changes", [{}, {"vocab_size": 7, "out_dim": 3}], ids=["bare", "full"])
def test_it_works_after_the_meta_device(changes):
    """An encoder made on the meta device and reset is the one made in memory and reset."""
    made = encoder(**changes)
    with torch.device("meta"):
        late = encoder(**changes)
    late = late.to_empty(device="cpu")
    for model in (made, late):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))  # what the reset forgets stays visible
        torch.manual_seed(1)
        model.reset_parameters()
    assert all(map(torch.equal, late.parameters(), made.parameters()))
    assert all(torch.isfinite(p).all() for p in made.parameters())


def test_groups_and_config():
    """Every parameter lies in one group, and a config survives its JSON."""
    ours = encoder(vocab_size=7, out_dim=3, attention=AttentionConfig(kv_heads=1))
    grouped = [id(p) for group in ours.parameter_groups(0.1) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in ours.parameters())
    assert EncoderConfig(**json.loads(json.dumps(asdict(ours.config)))) == ours.config
    assert ours.choices() == {"attention": ("sdpa", "matmul")}


def test_a_wirings_wish_is_granted():
    """An option that the wiring asks of its branches is on, as in a GPT."""
    ours = encoder(wiring="hybridnorm")
    assert not isinstance(ours.stack.connections[0].branch.v_norm, nn.Identity)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": torch.ones(B, T + 1).bool()}, "keep has shape (3, 6), not (3, 5)"),
        ({"keep": torch.ones(T).bool()}, "keep has shape (5,), not (3, 5)"),
        (
            {"keep": torch.ones(B, T)},
            "keep must be boolean, True where one may look, not torch.float32",
        ),
        (
            {"look": torch.ones(B, T).bool()},
            "look has shape (3, 5), not (5, 5) or (3, 5, 5)",
        ),
        (
            {"look": torch.ones(2 * B, T, T).bool()},
            "look has shape (6, 5, 5), not (5, 5) or (3, 5, 5)",
        ),
        (
            {"look": torch.zeros(T, T)},
            "look must be boolean, True where one may look, not torch.float32",
        ),
        ({"inputs": torch.zeros(B, T, 9)}, "vectors of shape (3, 5, 9), but the encoder reads"),
        ({"inputs": torch.zeros(B, T)}, "vectors of shape (3, 5), but the encoder reads (B, T, 8)"),
        (
            {"inputs": torch.zeros(B, T).long()},
            "the encoder has no vocabulary; it reads vectors (B, T, 8)",
        ),
        ({"inputs": torch.zeros(B, 7, D)}, "7 positions, but the encoder was built for 6"),
    ],
)
def test_wrong_inputs_and_masks_are_refused(arguments, message):
    """An input or a mask of another shape or type gives one line with both shapes."""
    given = {"inputs": torch.zeros(B, T, D), **arguments}
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the text is compared
        encoder()(given.pop("inputs"), **given)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_wrong_tokens_are_refused():
    """Tokens have two axes."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole text is compared
        encoder(vocab_size=7)(torch.zeros(B, T, 1).long())
    assert str(caught.value) == "tokens of shape (3, 5, 1), but the encoder reads (B, T)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth 0 must be at least 1"),
        ({"heads": 3}, "heads 3 does not divide dim 8 (allowed: 1, 2, 4, 8)"),
        ({"vocab_size": -1}, "vocab_size -1 must be at least 0"),
        ({"out_dim": -2}, "out_dim -2 must be at least 0"),
        ({"pool": "max"}, "unknown pool 'max' (known: none, mean, first)"),
        ({"final_norm": "on"}, "unknown final_norm 'on' (known: auto, yes, no)"),
        ({"wiring": "prenrm"}, "unknown wiring 'prenrm'; did you mean 'prenorm'?"),
    ],
)
def test_encoder_refuses(changes, message):
    """A configuration that does not fit is refused with the value and what would fit."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the text is compared
        encoder(**changes)
    assert str(caught.value).startswith(message)
