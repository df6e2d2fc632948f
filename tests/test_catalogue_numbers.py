"""The catalogue against published numbers, and constants and corners that formulas hide."""

import math

import naive_wirings as oracle
import pytest
import torch
from catalogue_cases import Fixed, Same, close, each_wiring, fill, one, published, small
from test_wirings import OURS, connections, stack, stream
from torch import nn

from addnorm.branches import Context, Site, Wrapped, keep_mask
from addnorm.contract import Stack, options_of, parse_spec
from addnorm.models.layers import FeedForward
from addnorm.wirings import streams
from addnorm.wirings.memory import DepthAttention

X = fill((4, 3), 1)


# -- numbers that reference implementations produced -------------------------------------------


def test_hyper_connections_reproduce_their_reference():
    """The code of LIMe and lucidrains' package agree on one connection at the start, index 1."""
    wiring = one("hyper")
    published(streams.read(wiring.maps(X)[0], X), [-0.756802, -0.958924, -0.279415])
    published(
        wiring(X, Context()),
        [
            [0.202281, -0.048442, 0.413484],
            [-1.395992, -1.916664, -0.007051],
            [0.017797, 0.031619, 0.684483],
            [-1.183211, -1.957730, -0.264209],
        ],
    )


def test_mhc_lite_reproduces_its_reference():
    """One connection of mHC-lite at its start, index 1."""
    wiring = one("mhc-lite")
    pre = torch.sigmoid(wiring.generate(X)[0])
    published(streams.read(pre, X), [-0.296579, -0.459341, -0.199787])
    published(
        wiring(X, Context()),
        [
            [0.680136, 0.511800, 0.245522],
            [-1.171713, -2.011819, 0.010579],
            [0.497126, 0.591221, 0.514356],
            [-0.694287, -1.382234, -0.426756],
        ],
    )


def test_gated_residual_reproduces_its_reference():
    """One connection with all of its matrices away from 0."""
    wiring = one("gated-residual(rank=2)")
    with torch.no_grad():
        wiring.read.gain.copy_(fill((4, 3), 2, 0.1))
        wiring.read.down.weight.copy_(fill((2, 12), 5))
        wiring.read.up.weight.copy_(fill((12, 2), 7))
        wiring.write.weight.copy_(fill((4, 12), 9))
    h, z = wiring.read(X)
    published(h, [0.059416, 0.029941, -0.069460])
    published(2 * torch.sigmoid(wiring.write(z / 4)), [0.819051, 1.397195, 1.712543, 1.795296])
    published(
        wiring(X, Context()),
        [
            [0.890078, 0.958285, 0.197920],
            [-0.673885, -0.875358, -0.182521],
            [0.758619, 1.091785, 0.530882],
            [-0.437478, -0.892614, -0.412071],
        ],
    )


def test_attention_over_depth_reproduces_its_reference():
    """flash-linear-attention's naive form: three sources of width 4, query [.5, -.25, .125, 1]."""
    read = DepthAttention(Site(4, dtype=torch.float64))
    with torch.no_grad():
        read.query.copy_(torch.tensor([0.5, -0.25, 0.125, 1.0]))
    sources = tuple(fill((3, 4), 1))
    published(read(sources), [-0.464879, -0.163291, 0.288426, 0.474965])
    values = tuple(torch.eye(3, dtype=torch.float64))  # what they are weighted by
    scores = [(v * read.query).sum() / (v.square().mean() + 1e-6).sqrt() for v in sources]
    p = torch.stack(scores).softmax(0)
    published(sum(a * b for a, b in zip(p, values, strict=True)), [0.137662, 0.682767, 0.179571])


def test_denseformer_reproduces_its_reference():
    """Dilation 2, four blocks tanh(x) + x: the state after each, and the sizes of the weights."""
    model = Stack(
        [Wrapped(nn.Tanh()) for _ in range(4)],
        "denseformer(dilation=2)", dim=3, norm=Same, dtype=torch.float64,
    )  # fmt: skip
    with torch.no_grad():
        for i, connection in enumerate(model):
            connection.alpha.copy_(fill(connection.alpha.shape, 2 + i, 0.5))
    assert [len(connection.alpha) for connection in model] == [1, 2, 2, 3]
    state, trace = next(iter(model)).open(fill((1, 3), 1)), []
    for connection in model:
        state = connection(state, Context())
        trace.append(state[0][0])
    published(
        torch.stack(trace),
        [
            [0.694730, 0.741119, 0.127898],
            [-0.430936, -0.454605, -0.086574],
            [-0.176890, -0.194767, -0.023534],
            [-0.700095, -0.754667, -0.118762],
        ],
    )


def test_gtrxl_reproduces_its_reference():
    """DI-engine's gate with b = 2 and all six matrices away from 0; it gets y after the ReLU."""
    y = fill((1, 3), 4)
    wiring = one("gtrxl")
    layers = (
        wiring.reset_y, wiring.reset_x, wiring.update_y, wiring.update_x, wiring.new_y, wiring.new_x
    )  # fmt: skip
    with torch.no_grad():
        for k, layer in enumerate(layers, 1):
            layer.weight.copy_(fill((3, 3), k, 0.7))
    p, x = dict(wiring.named_parameters()), fill((1, 3), 1)[0]
    r = oracle.sigma(layers[0].weight @ y[0] + layers[1].weight @ x)
    z = oracle.sigma(layers[2].weight @ y[0] + layers[3].weight @ x - p["bias"])
    h = torch.tanh(layers[4].weight @ y[0] + layers[5].weight @ (r * x))
    published((1 - z) * x + z * h, [0.827554, 0.599462, 0.178268])  # the gate itself
    wiring.branch = Fixed(y)
    got = wiring(x[None], Context())  # and with the ReLU, which the reference has before it
    positive = y[0].clamp(min=0)
    r = oracle.sigma(layers[0].weight @ positive + layers[1].weight @ x)
    z = oracle.sigma(layers[2].weight @ positive + layers[3].weight @ x - p["bias"])
    h = torch.tanh(layers[4].weight @ positive + layers[5].weight @ (r * x))
    close(got[0], (1 - z) * x + z * h)


def test_gtrxl_with_matrices_of_zero_lets_little_in():
    """z = sigma(-2) = 0.119203, h = 0."""
    wiring = one("gtrxl")
    with torch.no_grad():
        for name, parameter in wiring.named_parameters():
            if name != "bias":
                parameter.zero_()
    x = stream(2, dim=3)
    torch.testing.assert_close(wiring(x, Context()), (1 - 0.119203) * x, rtol=1e-6, atol=1e-6)


# -- constants by depth ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "alpha", "beta", "omega", "root"),
    [
        (6, 1.861210, 0.379918, 2.017009, 0.288675),
        (12, 2.213364, 0.319472, 2.601286, 0.204124),
        (24, 2.632148, 0.268642, 3.404484, 0.144338),
        (48, 3.130169, 0.225901, 4.494833, 0.102062),
        (100, 3.760603, 0.188030, 6.074611, 0.070711),
    ],
)
def test_constants_by_depth(layers, alpha, beta, omega, root):
    """DeepNorm's alpha and beta, Admin's omega, KEEL's alpha and 1/sqrt(2L) of L layers of two."""
    place = {"index": 3, "count": 2 * layers, "parts": 2, "norm": nn.LayerNorm}
    deepnorm = one("deepnorm", FeedForward(3).double(), **place)
    assert deepnorm.alpha == pytest.approx(alpha, abs=5.1e-7)
    assert deepnorm.gains() == pytest.approx(dict.fromkeys(("value", "in", "out"), beta), abs=6e-7)
    assert one("admin", **place).omega.tolist() == pytest.approx([omega] * 3, abs=5.1e-7)
    assert one("keel", **place).alpha == 2 * layers
    assert one("stable", **place).scale == pytest.approx(root, abs=5.1e-7)


@pytest.mark.parametrize(("count", "omega"), [(2, 1.315567), (36, 3.040839)])
def test_omega_of_other_depths(count, omega):
    wiring = one("admin", count=count, norm=nn.LayerNorm)
    assert wiring.omega.tolist() == pytest.approx([omega] * 3, abs=5.1e-7)


@pytest.mark.parametrize(
    ("layers", "of_x0", "kept"),
    [(12, 5.825391, 3.123128), (20, 13.970345, 6.676450), (24, 21.065371, 9.761588)],
)
def test_injected_embedding_by_depth(layers, of_x0, kept):
    """With branches of 0 the end holds x0 times nanochat's coefficient; r alone multiplies to."""
    silent = [Fixed(torch.zeros(2, dtype=torch.float64)) for _ in range(2 * layers)]
    model = Stack(silent, "inject", dim=2, parts=2, norm=Same, dtype=torch.float64)
    x = stream(1, dim=2)
    torch.testing.assert_close(model(x), of_x0 * x, rtol=1e-6, atol=1e-6)
    r = math.prod(c.keep.item() for c in model if c.mixes)
    assert r == pytest.approx(kept, abs=1e-6)


# -- numbers and corners that the formulas hide ------------------------------------------------


FACTS = {  # name: the start of its branch, whether the model must normalise what it returns
    "plain": ("fairseq", False), "residual": ("fairseq", False), "postact": ("he", False),
    "postnorm": ("fairseq", False), "prenorm": ("gpt2", True), "sandwich": ("gpt2", True),
    "peri": ("gpt2", True), "reordered": ("normal", True), "mixln": ("normal", True),
    "deepnorm": ("xavier", False), "admin": ("fairseq", False), "b2t": ("fairseq", False),
    "resi-dual": ("fairseq", False), "lns": ("normal", True), "gpas": ("gpt2", True),
    "keel": ("normal", False), "siamese": ("normal", False), "hybridnorm": ("normal", True),
    "rezero": ("fairseq", False), "skipinit": ("he", False), "layerscale": ("normal", True),
    "stable": ("normal", True), "completep": ("normal", True), "droppath": ("gpt2", True),
    "highway": ("fairseq", False), "gtrxl": ("gpt2", False), "deep-delta": ("gpt2", True),
    "orthogonal": ("gpt2", True), "constant-scaling": ("he", False),
    "exclusive-gating": ("he", False), "shortcut-gating": ("he", False),
    "linear-shortcut": ("he", False), "dropout-shortcut": ("he", False),
    "norm-after-addition": ("he", False), "relu-before-addition": ("he", False),
    "inject": ("gpt2", True), "unet": ("gpt2", True), "denseformer": ("gpt2", True),
    "laurel": ("gpt2", True), "attnres": ("gpt2", True), "attnres-block": ("gpt2", True),
    "hyper": ("gpt2", True), "frac": ("gpt2", True), "mhc": ("gpt2", True),
    "mhc-v4": ("gpt2", True), "ihc": ("gpt2", True), "mhc-lite": ("gpt2", True),
    "krom": ("gpt2", True), "gated-residual": ("gpt2", False), "reversible": ("gpt2", True),
}  # fmt: skip


@each_wiring
def test_start_and_final_norm_are_those_of_the_sources(name):
    """Layer-norm scaling and 1/sqrt(K) must not meet the start that scales by depth too."""
    assert (OURS[name].start, OURS[name].final_norm) == FACTS[name]
    assert OURS[name].verified == (name not in ("keel", "laurel"))


def test_a_fraction_of_layers_is_not_lost_to_rounding():
    """0.58 of 50 layers are 29, although 0.58 * 50 is less in floating point."""
    places = {"count": 100, "parts": 2, "norm": nn.LayerNorm}
    assert one("mixln(fraction=0.58)", index=2 * 28, **places).post
    assert not one("mixln(fraction=0.58)", index=2 * 29, **places).post


def test_keel_of_one_connection_needs_a_final_norm():
    assert stack("keel", 1).final_norm
    assert not stack("keel", 2).final_norm


@pytest.mark.parametrize(
    ("spec", "dim", "names", "std"),
    [
        ("highway", 128, ["gate.weight"], 0.0884),  # Xavier-normal: 1 / sqrt(D)
        ("exclusive-gating", 128, ["gate.weight"], 0.0884),
        ("shortcut-gating", 128, ["gate.weight"], 0.0884),
        ("linear-shortcut", 128, ["shortcut.weight"], 0.125),  # He: sqrt(2 / D)
        ("gtrxl", 128, ["reset_y.weight", "update_x.weight", "new_y.weight"], 0.0510),
        ("deep-delta", 16384, ["step.weight", "value.weight"], 0.00391),  # 1 / (2 sqrt(D))
        ("laurel", 1024, ["down.weight"], 0.03125),  # 1 / sqrt(D)
        ("mhc-v4", 1024, ["generate.phi", "generate_close.phi"], 0.02),
        (
            "gated-residual",
            128,
            ["read.down.weight", "read.up.weight", "write.weight", "read_close.up.weight"],
            0.02,
        ),
    ],
)
def test_matrices_of_a_scheme_start_with_their_spread(spec, dim, names, std):
    """What a scheme draws for itself has the spread that its source gives."""
    torch.manual_seed(0)
    wiring = one(spec, Wrapped(nn.Identity()), dim=dim, index=2)
    own = dict(wiring.named_parameters())
    for name in names:
        assert own[name].std().item() == pytest.approx(std, rel=0.05), name
        assert own[name].mean().abs() < 0.1 * std, name


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("plain", {"norm": False, "act": "none"}),
        ("postact", {"act": "relu"}),
        ("mixln", {"fraction": 0.25}),
        ("admin", {"change": "log"}),
        ("layerscale", {"init": 1e-4}),
        ("completep", {"base_depth": 2, "exponent": 1.0}),
        ("droppath", {"rate": 0.1, "per": "sample"}),
        ("highway", {"bias": -1.0}),
        ("constant-scaling", {"skip": 0.5, "scale": 0.5}),
        ("exclusive-gating", {"bias": -6.0}),
        ("shortcut-gating", {"bias": -6.0}),
        ("dropout-shortcut", {"rate": 0.5}),
        ("denseformer", {"dilation": 1, "period": 1}),
        ("laurel", {"rank": 16}),
        ("attnres-block", {"size": 4}),
        ("hyper", {"n": 4, "dynamic": True}),
        ("frac", {"m": 4}),
        ("mhc", {"n": 4, "iterations": 20}),
        ("mhc-v4", {"n": 4}),
        ("ihc", {"n": 4}),
        ("mhc-lite", {"n": 4}),
        ("krom", {"n": 4}),
        ("gated-residual", {"n": 4, "rank": 0}),
    ],
)
def test_options_have_the_defaults_of_their_papers(name, defaults):
    """The numbers once more, so that a slip in one of them is seen."""
    assert {k: p.default for k, p in options_of(OURS[name]).items()} == defaults


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("hyper", (2, 4, 8), lambda X: X.sum(-2) / 4),
        ("mhc", (2, 4, 8), lambda X: X.sum(-2) / 4),
        ("gated-residual", (2, 4, 8), lambda X: X.sum(-2) / 4),
        ("attnres", (3, 2, 8), lambda v: v[2]),
        ("attnres-block", (3, 2, 8), lambda v: v[2]),
        ("reversible", (2, 2, 8), lambda pair: pair[1]),
        ("inject", (2, 2, 8), lambda pair: pair[0]),
    ],
)
def test_present_is_what_the_x_ray_shall_see(name, shape, expected):
    """Of several streams the mean, of a history the newest, of a pair the one written last."""
    X = torch.randn(shape, dtype=torch.float64)
    state = X if name in ("hyper", "mhc", "gated-residual") else tuple(X)
    torch.testing.assert_close(one(name, dim=8).present(state), expected(X))


def test_droppath_per_batch_drops_all_samples_or_none():
    wiring = one("droppath(rate=0.5, per=batch)").train()
    x = fill((3,), 1).expand(64, 2, 3)
    seen = set()
    for _ in range(20):
        kept = (wiring(x, Context()) != x).flatten(1).all(-1)
        assert kept.all() or not kept.any()
        seen.add(bool(kept.any()))
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("layers", "layer", "kept", "r", "m"),
    [(1, 0, 1.0, 1.15, 0.2), (2, 0, 1.0, 1.15, 0.2), (2, 1, 0.9, 1.05, 0.05)],
)
def test_lines_over_few_layers(layers, layer, kept, r, m):
    """droppath's rate and inject's r and m go from the first layer to the last."""
    assert one("droppath", index=layer, count=layers).keep == pytest.approx(kept)
    inject = one("inject", index=layer, count=layers)
    assert (inject.keep.item(), inject.inject.item()) == pytest.approx((r, m))


def test_b2t_closes_with_x():
    """Of (x, x0), which differ within a layer."""
    x, bottom = stream(2, dim=3), stream(2, dim=3)
    assert one("b2t", norm=nn.LayerNorm).close((x, bottom)) is x


@pytest.mark.parametrize(
    ("name", "starts"),
    [
        ("hyper", {"generate.weight": 0.0, "scale": 0.01, "write": 1.0}),
        ("frac", {"generate.weight": 0.0, "scale": 0.01, "write": 1.0}),
        ("mhc", {"generate.phi": 0.0, "generate.alpha": 0.01}),
        ("mhc-lite", {"generate.phi": 0.0, "generate.alpha": 0.01}),
        ("krom", {"generate.phi": 0.0, "generate.alpha": 0.01}),
        ("ihc", {"generate.phi": 0.0, "generate.alpha": 0.01}),
        ("mhc-v4", {"generate.alpha": 1.0, "generate.bias": 0.0, "generate_close.alpha": 1.0}),
        ("attnres", {"read.query": 0.0, "read.gain": 1.0, "read_close.query": 0.0}),
        ("gated-residual", {"read.gain": 0.0, "read_close.gain": 0.0}),
    ],
)
def test_small_parts_start_at_their_number(name, starts):
    """What does not show in the output at the start: factors of generators that are 0."""
    own = dict(one(name, dim=8, index=2, norm=nn.LayerNorm).named_parameters())
    for key, value in starts.items():
        torch.testing.assert_close(own[key], torch.full_like(own[key], value))


@pytest.mark.parametrize(("shape", "mask"), [((64,), (1,)), ((64, 3), (64, 1))])
def test_keep_mask_is_one_for_each_sample(shape, mask):
    """A tensor of one axis is one sample."""
    assert keep_mask(torch.ones(shape), 0.5).shape == mask


# -- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mixln(fraction=1.5)", "fraction=1.5 of mixln must be from 0 to 1"),
        ("mixln(fraction=-0.1)", "fraction=-0.1 of mixln must be from 0 to 1"),
        ("completep(base_depth=0)", "base_depth=0 of completep must be at least 1"),
        ("completep(exponent=2.0)", "exponent=2.0 of completep must be from 0 to 1"),
        ("droppath(rate=1.0)", "rate=1.0 of droppath must be from 0 to 0.99"),
        (
            "droppath(per=token)",
            "unknown value 'token' of per in 'droppath:per=token' (known: sample, batch)",
        ),
        ("highway(bias=1e999)", "bias=inf of highway must be a finite number"),
        ("denseformer(dilation=0)", "dilation=0 of denseformer must be at least 1"),
        ("denseformer(period=0)", "period=0 of denseformer must be at least 1"),
        ("laurel(rank=0)", "rank=0 of laurel must be at least 1"),
        ("attnres-block(size=0)", "size=0 of attnres-block must be at least 1"),
        ("hyper(n=1)", "n=1 of hyper must be from 2 to 16"),
        ("mhc(iterations=0)", "iterations=0 of mhc must be from 1 to 1000"),
        ("mhc-lite(n=6)", "n=6 of mhc-lite must be from 2 to 5"),
        ("krom(n=6)", "n=6 of krom must be a power of 2: 2, 4, 8 or 16"),
        ("krom(n=1)", "n=1 of krom must be from 2 to 16"),
        ("gated-residual(rank=-1)", "rank=-1 of gated-residual must be at least 0"),
        ("dropout-shortcut(rate=1.1)", "rate=1.1 of dropout-shortcut must be from 0 to 1"),
        (
            "postact(act=rulu)",
            "unknown value 'rulu' of act in 'postact:act=rulu'; did you mean 'relu'? "
            "(known: none, relu, gelu, silu, tanh)",
        ),
        (
            "admin(change=square)",
            "unknown value 'square' of change in 'admin:change=square' "
            "(known: log, constant, linear)",
        ),
    ],
)
def test_bad_option_is_refused_in_one_line(spec, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole text is compared
        parse_spec(spec)
    assert str(caught.value) == message


def test_pieces_must_divide_the_width():
    with pytest.raises(ValueError, match="m=3 of frac must divide the width 16"):
        small("frac(m=3)")


def test_the_oracle_sees_every_connection():
    """The naive formulas get the places that the wirings have."""
    known = connections(stack("prenorm", 6, parts=2), "layernorm")
    assert [c.index for c in known] == list(range(6))
    assert [c.layer for c in known] == [0, 0, 1, 1, 2, 2]
    assert [(c.first_part, c.last_part) for c in known[:2]] == [(True, False), (False, True)]
    assert {(c.K, c.L) for c in known} == {(6, 3)}
