"""Every wiring against its formula restated naively, and what the contract promises of all."""

import copy
import functools
import inspect
import itertools
import math
import re
import typing

import naive
import naive_wirings as oracle
import pytest
import torch
from torch import nn

from addnorm.branches import STARTS, DropPath, Site
from addnorm.contract import (
    Drawing,
    Group,
    Law,
    Stack,
    Wiring,
    catalogue,
    options_of,
    parse_spec,
    register,
)
from addnorm.groups import parameter_groups
from addnorm.models.layers import Attention, FeedForward, FeedForwardConfig
from addnorm.norms import NORMS as KINDS

DIM, HIDDEN = 8, 5
BETA = 0.42044820762685725  # 32 ** (-1/4)


def using(formula, **options):
    """Return the formula with its options set."""
    return functools.partial(formula, **options)


OMEGA = {
    "log": lambda K: ((K + 1) / math.log(K + 1) - 1) ** 0.5,
    "constant": lambda K: K**0.5,
    "linear": lambda K: 1.0,
}
NEAR = oracle.near_identity(4)

# The spec | what its stack equals at the start | its formula. Both are whole stacks of one token.
ROWS = [
    ("plain", oracle.plain, oracle.plain),
    ("plain(norm=true)", using(oracle.plain, norm=True), using(oracle.plain, norm=True)),
    ("plain(act=relu)", using(oracle.plain, act="relu"), using(oracle.plain, act="relu")),
    ("plain(act=tanh)", using(oracle.plain, act="tanh"), using(oracle.plain, act="tanh")),
    ("residual", oracle.residual, oracle.residual),
    ("postact", oracle.postact, oracle.postact),
    ("postact(act=none)", oracle.residual, using(oracle.postact, act="none")),
    ("postact(act=gelu)", using(oracle.postact, act="gelu"), using(oracle.postact, act="gelu")),
    ("postact(act=silu)", using(oracle.postact, act="silu"), using(oracle.postact, act="silu")),
    ("postnorm", oracle.postnorm, oracle.postnorm),
    ("prenorm", oracle.prenorm, oracle.prenorm),
    ("sandwich", oracle.sandwich, oracle.sandwich),
    ("peri", oracle.peri, oracle.peri),
    ("reordered", oracle.reordered, oracle.reordered),
    ("mixln", oracle.mixln, oracle.mixln),
    ("mixln(fraction=0.4)", using(oracle.mixln, fraction=0.4), using(oracle.mixln, fraction=0.4)),
    ("mixln(fraction=0.7)", using(oracle.mixln, fraction=0.7), using(oracle.mixln, fraction=0.7)),
    ("deepnorm", oracle.deepnorm, oracle.deepnorm),
    ("admin", using(oracle.admin, omega=OMEGA["log"]), oracle.admin),
    ("admin(change=constant)", using(oracle.admin, omega=OMEGA["constant"]), oracle.admin),
    ("admin(change=linear)", oracle.postnorm, oracle.admin),
    ("b2t", oracle.b2t, oracle.b2t),
    ("resi-dual", oracle.resi_dual, oracle.resi_dual),
    ("lns", oracle.lns, oracle.lns),
    ("gpas", oracle.prenorm, oracle.gpas),
    ("keel", oracle.keel, oracle.keel),
    ("siamese", oracle.siamese, oracle.siamese),
    ("hybridnorm", oracle.hybridnorm, oracle.hybridnorm),
    ("rezero", oracle.identity, oracle.rezero),
    ("skipinit", oracle.identity, oracle.rezero),
    ("layerscale", using(oracle.layerscale, init=1e-4), oracle.layerscale),
    ("layerscale(init=0.5)", using(oracle.layerscale, init=0.5), oracle.layerscale),
    ("stable", oracle.stable, oracle.stable),
    ("completep", oracle.completep, oracle.completep),
    (
        "completep(base_depth=1, exponent=0.5)",
        using(oracle.completep, base_depth=1, exponent=0.5),
        using(oracle.completep, base_depth=1, exponent=0.5),
    ),
    ("droppath", oracle.prenorm, oracle.droppath),
    (
        "droppath(rate=0.3, per=batch)",
        using(oracle.droppath, rate=0.3, per="batch"),
        using(oracle.droppath, rate=0.3, per="batch"),
    ),
    ("highway", using(oracle.highway, bias=-1.0), oracle.highway),
    ("highway(bias=-3.0)", using(oracle.highway, bias=-3.0), oracle.highway),
    ("gtrxl", using(oracle.gtrxl, bias=2.0), oracle.gtrxl),
    ("deep-delta", using(oracle.deep_delta, biases=False), oracle.deep_delta),
    ("orthogonal", oracle.orthogonal, oracle.orthogonal),
    ("constant-scaling", oracle.constant_scaling, oracle.constant_scaling),
    (
        "constant-scaling(skip=0.25, scale=1.0)",
        using(oracle.constant_scaling, skip=0.25, scale=1.0),
        using(oracle.constant_scaling, skip=0.25, scale=1.0),
    ),
    ("exclusive-gating", using(oracle.exclusive_gating, bias=-6.0), oracle.exclusive_gating),
    ("exclusive-gating(bias=0.0)", using(oracle.exclusive_gating, bias=0), oracle.exclusive_gating),
    ("shortcut-gating", using(oracle.shortcut_gating, bias=-6.0), oracle.shortcut_gating),
    ("shortcut-gating(bias=0.0)", using(oracle.shortcut_gating, bias=0), oracle.shortcut_gating),
    ("linear-shortcut", oracle.linear_shortcut, oracle.linear_shortcut),
    ("dropout-shortcut", oracle.dropout_shortcut, oracle.dropout_shortcut),
    (
        "dropout-shortcut(rate=0.2)",
        using(oracle.dropout_shortcut, rate=0.2),
        using(oracle.dropout_shortcut, rate=0.2),
    ),
    ("norm-after-addition", oracle.norm_after_addition, oracle.norm_after_addition),
    ("relu-before-addition", oracle.relu_before_addition, oracle.relu_before_addition),
    ("inject", using(oracle.inject, start=True), oracle.inject),
    ("unet", using(oracle.unet, start=True), oracle.unet),
    ("denseformer", oracle.prenorm, oracle.denseformer),
    ("denseformer(dilation=2)", oracle.prenorm, using(oracle.denseformer, dilation=2)),
    (
        "denseformer(dilation=2, period=3)",
        oracle.prenorm,
        using(oracle.denseformer, dilation=2, period=3),
    ),
    ("laurel", oracle.prenorm, oracle.laurel),
    ("laurel(rank=3)", oracle.prenorm, oracle.laurel),
    ("attnres", oracle.attnres_start, oracle.attnres),
    ("attnres-block", oracle.attnres_block_start, oracle.attnres_block),
    (
        "attnres-block(size=2)",
        using(oracle.attnres_block_start, size=2),
        using(oracle.attnres_block, size=2),
    ),
    ("hyper", oracle.hyper_start, oracle.hyper),
    ("hyper(n=3)", using(oracle.hyper_start, n=3), using(oracle.hyper, n=3)),
    ("hyper(dynamic=false)", oracle.hyper_start, using(oracle.hyper, dynamic=False)),
    ("frac", oracle.prenorm, oracle.frac),
    ("frac(m=2)", oracle.prenorm, using(oracle.frac, m=2)),
    ("mhc", using(oracle.mhc_start, entry=NEAR), oracle.mhc),
    (
        "mhc(n=3, iterations=2)",
        using(oracle.mhc_start, n=3, entry=oracle.near_identity(3)),
        using(oracle.mhc, n=3, iterations=2),
    ),
    ("mhc-v4", using(oracle.mhc_v4, alpha=1.0, bias=0.0), oracle.mhc_v4),
    (
        "mhc-v4(n=3)",
        using(oracle.mhc_v4, n=3, alpha=1.0, bias=0.0),
        using(oracle.mhc_v4, n=3),
    ),
    ("ihc", oracle.mhc_start, oracle.ihc),
    ("ihc(n=2)", using(oracle.mhc_start, n=2), using(oracle.ihc, n=2)),
    (
        "mhc-lite",
        using(oracle.mhc_start, entry=oracle.near_identity_permutation(4)),
        oracle.mhc_lite,
    ),
    (
        "mhc-lite(n=3)",
        using(oracle.mhc_start, n=3, entry=oracle.near_identity_permutation(3)),
        using(oracle.mhc_lite, n=3),
    ),
    ("krom", using(oracle.mhc_start, entry=oracle.near_identity_factors(4)), oracle.krom),
    (
        "krom(n=8)",
        using(oracle.mhc_start, n=8, entry=oracle.near_identity_factors(8)),
        using(oracle.krom, n=8),
    ),
    ("gated-residual", using(oracle.gated_residual, gain=False), oracle.gated_residual),
    (
        "gated-residual(n=3, rank=4)",
        using(oracle.gated_residual, n=3, gain=False),
        using(oracle.gated_residual, n=3),
    ),
    ("reversible", oracle.reversible, oracle.reversible),
]
SPECS = [row[0] for row in ROWS]
NORMS = {
    "layernorm": (KINDS["layernorm"], naive.layernorm),
    "rmsnorm": (KINDS["rmsnorm"], naive.rmsnorm),
}
# connections, connections in a layer, norm: enough for each scheme to show what depends on where.
PLACES = [(8, 2, "layernorm"), (5, 1, "rmsnorm")]
# A user's own wirings and those of other tests may lie in the catalogue too.
OURS = {n: c for n, c in catalogue().items() if c.__module__.startswith("addnorm.")}
REQUIRED = ("name", "equation", "paper", "year", "at_start", "stream_law", "gradient_law")

each_row = pytest.mark.parametrize(("spec", "at_start", "formula"), ROWS, ids=SPECS)
each_spec = pytest.mark.parametrize("spec", SPECS)
each_place = pytest.mark.parametrize(
    ("count", "parts", "norm"), PLACES, ids=[f"{p[0]}x{p[1]}" for p in PLACES]
)
each_wiring = pytest.mark.parametrize("name", OURS)


# -- helpers -----------------------------------------------------------------------------------


def randomised(module, scale=0.5):
    """Fill every parameter with random values."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=scale)
    return module


def stream(*shape, dim=DIM):
    """Return a random stream of order 1 that is neither centred nor of unit size."""
    return (1.5 * torch.randn(*shape, dim, dtype=torch.float64) + 0.5).requires_grad_()


def stack(spec, count=4, dim=DIM, **options):
    """Return a stack of feed-forward branches in float64."""
    branches = [
        FeedForward(dim, HIDDEN, config=FeedForwardConfig(activation="tanh")) for _ in range(count)
    ]
    return Stack(branches, spec, dim=dim, dtype=torch.float64, **options)


def connections(model, norm):
    """Return what the oracle knows of the connections of a stack."""
    return [
        oracle.Connection(
            dict(c.named_parameters()), c.site.index, len(model), c.site.parts, NORMS[norm][1]
        )
        for c in model
    ]


def outcome(y, weights, x, parameters):
    """Return the output and the gradients of a weighted sum of it, a zero where one is unused."""
    gradients = torch.autograd.grad(
        (y * weights).sum(), [x, *parameters], allow_unused=True, materialize_grads=True
    )
    return [y, *gradients]


def expect(model, x, norm, formula, among=None):
    """Hold outputs and gradients of input and parameters against the naive formula.

    `among` limits the gradients to the parameters whose names it accepts: a start formula does
    not know the parameters of the scheme.
    """
    p = {k: v for k, v in model.named_parameters() if among is None or among(k)}
    weights, known = torch.randn_like(x), connections(model, norm)
    got = outcome(model(x), weights, x, p.values())
    want = outcome(naive.by_token(lambda token: formula(token, known), x), weights, x, p.values())
    for name, ours, theirs in zip(["output", "input", *p], got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=said(name))


def of_branch(name):
    """Whether a parameter belongs to a branch."""
    return ".branch." in name


def said(name):
    """Put the name of what differs in front of the message."""
    return lambda message: f"{name}: {message}"


def transformer(spec, dim=64):
    """Return a stack of four Transformer layers."""
    parts = [b for _ in range(4) for b in (Attention(dim, 4), FeedForward(dim))]
    return Stack(parts, spec, dim=dim, parts=2)


# -- formulas ----------------------------------------------------------------------------------


@each_place
@each_row
def test_wiring_starts_as_its_row_says(spec, at_start, formula, count, parts, norm):
    """At the start values, outputs and gradients are those of the simpler start formula."""
    model = stack(spec, count, parts=parts, norm=NORMS[norm][0]).eval()
    expect(model, stream(2), norm, at_start, of_branch)


@each_place
@each_row
def test_wiring_is_its_formula_at_random_parameters(spec, at_start, formula, count, parts, norm):
    """Away from the start, outputs and all gradients are those of the paper's formula."""
    model = randomised(stack(spec, count, parts=parts, norm=NORMS[norm][0])).eval()
    expect(model, stream(2), norm, formula)


@each_row
def test_wiring_takes_channel_last_images(spec, at_start, formula):
    """Every pixel of a channel-last image `(B, H, W, D)` is a token."""
    model = randomised(stack(spec, 2)).eval()
    expect(model, stream(1, 2, 1), "layernorm", formula)


@each_wiring
def test_registered_means_tested(name):
    """Every wiring in the catalogue has a row in the table above, and every option another one."""
    rows = [parse_spec(spec) for spec in SPECS]
    own = [row for row in rows if row.name == name]
    assert any(not row.options for row in own)
    assert {option for row in own for option in row.options} == set(options_of(OURS[name]))


@each_place
@each_spec
def test_every_parameter_gets_a_gradient(spec, count, parts, norm):
    """Away from the start, every parameter in a stack gets a gradient."""
    model = randomised(stack(spec, count, parts=parts, norm=NORMS[norm][0])).eval()
    x = stream(8, 8)
    (model(x) * torch.randn_like(x)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-9, name


# -- starts ------------------------------------------------------------------------------------


@each_spec
def test_wiring_works_after_the_meta_device(spec):
    """A stack made on the meta device and reset has the starts of one made in memory."""
    one, other = transformer(spec), transformer(spec)
    with torch.device("meta"):
        late = transformer(spec)
    late = late.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in late.parameters():
            parameter.fill_(float("nan"))  # what the reset forgets stays visible
    late.reset_parameters()
    made = zip(one.parameters(), other.parameters(), strict=True)
    for (name, ours), (theirs, again) in zip(late.named_parameters(), made, strict=True):
        if torch.equal(theirs, again):  # not random
            assert torch.equal(ours, theirs), name
        else:
            error = 5 * ours.numel() ** -0.5  # five standard errors of a spread or a mean
            assert ours.isfinite().all(), name
            assert (ours.std() / theirs.std()).item() == pytest.approx(1, abs=error), name
            assert ours.mean().abs() < error * ours.std(), name


@pytest.mark.parametrize("start", STARTS)
@each_wiring
def test_reset_twice_is_reset_once(name, start):
    """A reset depends on the seed alone, not on the values that were there before."""
    site = Site(8, index=3, count=8, parts=2, start=start)
    wiring = parse_spec(name).build(Attention(8, 2), site)
    values = []
    for _ in range(2):
        torch.manual_seed(3)
        wiring.branch.reset_parameters()
        wiring.reset_parameters()
        values.append([parameter.clone() for parameter in wiring.parameters()])
    assert all(map(torch.equal, *values))


def started(spec, branch, start=""):
    """Return the branch as the wiring starts it, from seed 5."""
    torch.manual_seed(5)
    return parse_spec(spec).build(branch, Site(8, index=3, count=8, parts=2, start=start)).branch


def test_deepnorm_scales_value_and_out_of_fused_attention():
    """DeepNorm puts beta on the value and out matrices and leaves query and key alone."""
    scaled = started("deepnorm", Attention(8, 2))
    gain_1 = started("residual", Attention(8, 2), start="xavier")
    rows, plain = scaled.qkv.weight, gain_1.qkv.weight  # query, key, value: 8 rows each
    torch.testing.assert_close(rows[:16], plain[:16], rtol=0, atol=0)
    torch.testing.assert_close(rows[16:], BETA * plain[16:])
    torch.testing.assert_close(scaled.out.weight, BETA * gain_1.out.weight)


def test_deepnorm_scales_both_matrices_of_the_feedforward():
    """DeepNorm puts beta on both matrices of the feed-forward."""
    scaled = started("deepnorm", FeedForward(8))
    gain_1 = started("residual", FeedForward(8), start="xavier")
    torch.testing.assert_close(scaled.lift.weight, BETA * gain_1.lift.weight)
    torch.testing.assert_close(scaled.out.weight, BETA * gain_1.out.weight)


@pytest.mark.parametrize(
    ("spec", "start", "std"),
    [
        # Attention of width 64, K = 8: query, key, value, out
        ("plain", "", (0.0884, 0.0884, 0.0884, 0.125)),
        ("residual", "", (0.0884, 0.0884, 0.0884, 0.125)),
        ("postnorm", "", (0.0884, 0.0884, 0.0884, 0.125)),
        ("rezero", "", (0.0884, 0.0884, 0.0884, 0.125)),
        ("prenorm", "", (0.02, 0.02, 0.02, 0.00707)),
        ("sandwich", "", (0.02, 0.02, 0.02, 0.00707)),
        ("layerscale", "", (0.02, 0.02, 0.02, 0.02)),
        ("deepnorm", "", (0.125, 0.125, 0.125 * BETA, 0.125 * BETA)),
        ("deepnorm", "normal", (0.02, 0.02, 0.02 * BETA, 0.02 * BETA)),
        ("prenorm", "normal", (0.02, 0.02, 0.02, 0.02)),
        ("prenorm", "xavier", (0.125, 0.125, 0.125, 0.125)),
        ("prenorm", "he", (0.1768, 0.1768, 0.1768, 0.1768)),
    ],
)
def test_start_has_its_spread(spec, start, std):
    """Each scheme starts the matrices of its branch with the spread that its source gives."""
    branch = Attention(64, 4)
    parse_spec(spec).build(branch, Site(64, index=3, count=8, parts=2, start=start))
    weights = [*branch.qkv.weight.split(64), branch.out.weight]
    for weight, expected in zip(weights, std, strict=True):
        assert weight.std().item() == pytest.approx(expected, rel=0.05)
    assert not branch.qkv.bias.any()
    assert not branch.out.bias.any()


def test_deepnorm_refuses_a_branch_without_matrices():
    """A scheme that scales its branch refuses one that does not name its matrices."""
    message = r"^Linear names no matrices, but the wiring scales value, in, out; .* matrices\(\)"
    with pytest.raises(ValueError, match=message):
        Stack([nn.Linear(4, 4)], "deepnorm", dim=4)


# -- facts -------------------------------------------------------------------------------------


@each_wiring
def test_class_states_its_facts(name):
    """Every wiring states equation, source, start and laws as class attributes of its own."""
    wiring = OURS[name]
    laws = typing.get_args(Law)
    assert wiring.__dict__["name"] == name
    assert wiring.equation.startswith("x <-")
    assert re.match(r"(x|X|\(a, b\)) <- ", inspect.cleandoc(wiring.__doc__))
    assert inspect.getdoc(wiring.forward)
    assert isinstance(wiring.year, int)
    assert 2014 < wiring.year < 2030
    assert re.search(rf" {wiring.year}, (arXiv:\d{{4}}\.\d{{5}}|github\.com/\w+/)", wiring.paper)
    assert isinstance(wiring.at_start, str)
    assert wiring.at_start
    assert isinstance(wiring.final_norm, bool)
    assert isinstance(wiring.verified, bool)
    assert wiring.start in STARTS
    assert laws == ("constant", "sqrt", "linear", "geometric", "vanishing")
    assert wiring.stream_law in laws
    assert wiring.gradient_law in laws
    assert isinstance(wiring.expected, frozenset)
    assert all(isinstance(finding, str) for finding in wiring.expected)
    assert set(wiring.limits) <= set(options_of(wiring))
    assert isinstance(wiring.drawing, Drawing)


@each_wiring
def test_options_are_keywords(name):
    """A wiring takes branch and site, then keyword-only options with defaults, and no **kwargs."""
    _, branch, site, *options = inspect.signature(OURS[name].__init__).parameters.values()
    assert (branch.name, site.name) == ("branch", "site")
    assert all(option.kind is inspect.Parameter.KEYWORD_ONLY for option in options)
    assert all(option.default is not inspect.Parameter.empty for option in options)


def test_wirings_are_final():
    """No wiring is a subclass of another one."""
    for one, other in itertools.permutations(OURS.values(), 2):
        assert not issubclass(one, other), f"{one} is a subclass of {other}"


def test_a_name_belongs_to_one_wiring():
    """A second wiring of the same name is refused."""
    facts = {k: getattr(OURS["prenorm"], k) for k in REQUIRED}
    with pytest.raises(ValueError, match="the wiring 'prenorm' exists already; choose another"):
        register(type("Another", (Wiring,), facts))
    assert catalogue()["prenorm"] is OURS["prenorm"]


@each_spec
def test_wiring_makes_its_parameters_where_asked(spec):
    """All parameters of a stack have the dtype and the device that were asked for."""
    options = {"dim": DIM, "dtype": torch.bfloat16, "device": "meta"}
    for connection in Stack([FeedForward(DIM)], spec, **options):
        for name, parameter in connection.named_parameters():
            assert parameter.dtype == torch.bfloat16, name
            assert parameter.is_meta, name


@pytest.mark.parametrize(
    ("spec", "shown"),
    [
        ("plain", "norm=false, act=none"),
        ("plain(norm=true)", "norm=true, act=none"),
        ("droppath(rate=0.2, per=batch)", "rate=0.2, per=batch"),
        ("mhc(n=2)", "n=2, iterations=20"),
        ("layerscale(init=1e-05)", "init=1e-5"),
        ("prenorm", ""),
    ],
)
def test_repr_shows_the_options(spec, shown):
    """The printed module shows the options of its wiring."""
    assert next(iter(stack(spec))).extra_repr() == shown


# -- the stack ---------------------------------------------------------------------------------


@each_spec
def test_stack_calls_each_branch_once(spec):
    """One forward pass calls every branch exactly once, as a module, in order."""
    model, calls = stack(spec), []
    for index, connection in enumerate(model):
        connection.branch.register_forward_hook(lambda *_, index=index: calls.append(index))
    model(stream(2, 3))
    assert calls == [0, 1, 2, 3]


def test_stack_tells_each_connection_its_site():
    """Index, count, layer and the ends are those of the place in the stack."""
    sites = [connection.site for connection in stack("prenorm", 6, parts=2)]
    assert [site.index for site in sites] == [0, 1, 2, 3, 4, 5]
    assert [site.layer for site in sites] == [0, 0, 1, 1, 2, 2]
    assert {(site.dim, site.count, site.parts, site.layers) for site in sites} == {(DIM, 6, 2, 3)}
    assert [site.first for site in sites] == [True] + 5 * [False]
    assert [site.last for site in sites] == 5 * [False] + [True]


def test_stack_refuses_the_same_module_twice():
    """The same module twice is refused unless the caller says that sharing is meant."""
    branch = FeedForward(DIM)
    message = "the same branch occurs twice in a stack; say shared=True if meant"
    with pytest.raises(ValueError, match=message):
        Stack([branch, branch], dim=DIM)
    shared = Stack([branch, branch], dim=DIM, shared=True)
    assert [connection.branch for connection in shared] == [branch, branch]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"branches": []},
            "a stack of 0 branches does not make layers of 1",
        ),
        (
            {"branches": [nn.Linear(4, 4)], "parts": 2},
            "a stack of 1 branches does not make layers of 2",
        ),
        (
            {"branches": [nn.Linear(4, 4)], "parts": 0},
            "a stack of 1 branches does not make layers of 0",
        ),
        (
            {"branches": [nn.Linear(4, 4)], "dim": 0},
            "dim 0 must be at least 1",
        ),
        (
            {"branches": [nn.Linear(4, 4)], "start": "xaver"},
            f"unknown start 'xaver'; did you mean 'xavier'? (known: {', '.join(STARTS)})",
        ),
        (
            {"branches": [nn.Linear(4, 4), nn.Linear(4, 4)], "drop_path": 1.0},
            "drop_path 1.0 must be at least 0 and less than 1",
        ),
    ],
)
def test_stack_refuses(arguments, message):
    """What does not make a stack is refused with the value and the reason."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole text is compared
        Stack(**{"dim": 4, **arguments})
    assert str(caught.value) == message


# -- stochastic depth --------------------------------------------------------------------------


def test_drop_path_keeps_the_expectation():
    """In training a sample's update is 0 or f / (1 - rate), and its mean is f."""
    x = stream(1, 2).expand(20_000, 2, DIM)
    per_sample = (DropPath(0.3).train()(x) / x)[:, 0, 0]
    ratio = DropPath(0.3).eval()(x) / x
    torch.testing.assert_close(ratio, torch.ones_like(ratio))
    kept = per_sample != 0
    torch.testing.assert_close(per_sample[kept], torch.full_like(per_sample[kept], 1 / 0.7))
    assert per_sample.mean().item() == pytest.approx(1, abs=4 * (0.3 / 0.7 / 20_000) ** 0.5)


def test_a_rate_of_0_draws_nothing_and_a_rate_of_1_is_refused():
    x = stream(2, 2)
    before = torch.get_rng_state()
    assert torch.equal(DropPath(0.0).train()(x), x)
    assert torch.equal(torch.get_rng_state(), before)
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"drop_path {rate} must be at least 0 and less than"):
            DropPath(rate)


@pytest.mark.parametrize(
    "spec", ["prenorm", "sandwich", "peri", "reordered", "rezero", "layerscale", "hyper", "mhc"]
)
def test_what_is_added_keeps_its_expectation(spec):
    """Where the sum is linear in the update, the mean over draws is what evaluation gives.

    The norm behind a branch stands before the drop, or it would take the rescaling back.
    """
    one = randomised(stack(spec, 2, drop_path=0.5))
    assert all(isinstance(connection.drop_path, DropPath) for connection in one)
    x = stream(1, 2)
    draws = one.train()(x.expand(4000, 2, DIM)).detach()
    whole = one.eval()(x).detach()
    spread = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - whole[0]).abs() < 5 * spread + 1e-9).all()
    assert (spread > 0).all()


@each_spec
def test_drop_path_is_off_in_evaluation(spec):
    """In evaluation a stack with stochastic depth is the stack without, and in training not."""
    dropped = randomised(stack(spec, drop_path=0.5))
    assert isinstance(next(iter(dropped)).drop_path, DropPath)
    full = randomised(stack(spec))
    full.load_state_dict(dropped.state_dict())  # and its tensors have the same names
    x = stream(64, 3)
    assert torch.equal(dropped.eval()(x), full.eval()(x))
    assert not torch.equal(dropped.train()(x), full.train()(x))
    assert not torch.equal(copy.deepcopy(dropped)(x), full(x))


def test_drop_path_rises_linearly():
    """The rate rises linearly from 0 at the first connection to `drop_path` at the last."""
    rates = [connection.drop_path.rate for connection in stack("prenorm", 5, drop_path=0.4)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_an_unknown_name_in_groups_is_refused():
    """A typo in the parameter groups of a scheme is no silent loss of its learning rate."""

    class Typo(Wiring):
        def groups(self):
            return {"alhpa": Group()}

        def forward(self, stream, context):
            return stream

    Typo.name = "typo"
    with pytest.raises(ValueError, match="unknown parameter in groups\\(\\) of typo 'alhpa'"):
        parameter_groups(Typo(FeedForward(DIM), Site(DIM)), 0.1)


def test_groups_reach_into_submodules_and_the_branch():
    """A scheme may set the rate of its branch's matrices, as CompleteP does."""

    class Slow(Wiring):
        def __init__(self, branch, site):
            super().__init__(branch, site)
            self.norm = self.new_norm()

        def groups(self):
            return {
                "branch.out.weight": Group(lr=0.5, weight_decay=2.0),
                "norm.bias": Group(lr=3.0),
            }

        def forward(self, stream, context):
            return stream

    Slow.name = "slow-test"
    wiring = Slow(FeedForward(DIM), Site(DIM))
    found = {id(p): g for g in parameter_groups(wiring, 0.1) for p in g["params"]}
    out, bias = found[id(wiring.branch.out.weight)], found[id(wiring.norm.bias)]
    assert (out["lr_scale"], out["weight_decay"]) == (0.5, 0.2)
    assert (bias["lr_scale"], bias["weight_decay"]) == (3.0, 0.0)


def test_a_wiring_that_does_not_state_its_facts_is_refused():
    message = "the wiring Silent does not state equation, paper, year, at_start, stream_law, "
    with pytest.raises(ValueError, match=message):
        register(type("Silent", (Wiring,), {"name": "silent"}))
    assert "silent" not in catalogue()
