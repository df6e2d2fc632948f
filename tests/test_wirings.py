"""Every wiring against its formula restated naively, and what the contract promises of all."""

import copy
import functools
import inspect
import itertools
import typing

import naive
import pytest
import torch
from torch import nn

from addnorm.branches import STARTS, Context, DropPath, Site
from addnorm.contract import Group, Stack, Wiring, catalogue, parameter_groups, parse_spec
from addnorm.models import layers
from addnorm.models.layers import Attention, FeedForward

DIM, HIDDEN = 5, 6
ALPHA, BETA = 1.681792830507429, 0.42044820762685725  # 8 ** (1/4), 32 ** (-1/4)

# The spec | what one token becomes at the start (F: branch, N: norm with gain 1) | the formula.
ROWS = [
    ("plain", lambda x, F, N: F(x), naive.plain),
    ("plain(norm=true)", lambda x, F, N: F(N(x)), naive.plain_norm),
    ("residual", lambda x, F, N: x + F(x), naive.residual),
    ("postnorm", lambda x, F, N: N(x + F(x)), naive.postnorm),
    ("prenorm", lambda x, F, N: x + F(N(x)), naive.prenorm),
    ("sandwich", lambda x, F, N: x + N(F(N(x))), naive.sandwich),
    (
        "deepnorm",
        lambda x, F, N: N(ALPHA * x + F(x)),
        functools.partial(naive.deepnorm, alpha=ALPHA),
    ),
    ("rezero", lambda x, F, N: x, naive.rezero),
    ("layerscale", lambda x, F, N: x + 1e-4 * F(N(x)), naive.layerscale),
    ("layerscale(init=0.5)", lambda x, F, N: x + 0.5 * F(N(x)), naive.layerscale),
]
SPECS = [row[0] for row in ROWS]
NORMS = {
    "layernorm": (nn.LayerNorm, naive.layernorm),
    "rmsnorm": (layers.NORMS["rmsnorm"], naive.rmsnorm),
}
# A user's own wirings and those of other tests may lie in the catalogue too.
OURS = {n: c for n, c in catalogue().items() if c.__module__.startswith("addnorm.")}

each_row = pytest.mark.parametrize(("spec", "at_start", "formula"), ROWS, ids=SPECS)
each_spec = pytest.mark.parametrize("spec", SPECS)
each_norm = pytest.mark.parametrize("norm", NORMS)
each_wiring = pytest.mark.parametrize("name", OURS)


# -- helpers -----------------------------------------------------------------------------------


def middle(spec, norm="layernorm"):
    """Return the wiring in the middle of a longer stack, in float64."""
    site = Site(DIM, index=3, count=8, parts=2, norm=NORMS[norm][0])
    return parse_spec(spec).build(FeedForward(DIM, HIDDEN, activation="tanh"), site).double()


def randomised(module):
    """Fill every parameter with random values of order 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def stream(*shape):
    """Return a random stream of order 1 that is neither centred nor of unit size."""
    return (1.5 * torch.randn(*shape, DIM, dtype=torch.float64) + 0.5).requires_grad_()


def outcome(y, weights, x, parameters):
    """Return the output and the gradients of a weighted sum of it, a zero where one is unused."""
    gradients = torch.autograd.grad(
        (y * weights).sum(), [x, *parameters], allow_unused=True, materialize_grads=True
    )
    return [y, *gradients]


def expect(wiring, x, norm, formula, at_start=None):
    """Hold outputs and the gradients of input and parameters against the naive formulas."""
    norm = NORMS[norm][1]
    p = dict(wiring.named_parameters())
    weights = torch.randn_like(x)
    F = branch_of(p)
    got = outcome(stack_of_one(wiring, x), weights, x, p.values())
    y = naive.by_token(lambda token: formula(token, p, F, norm), x)
    want = outcome(y, weights, x, p.values())
    for name, ours, theirs in zip(["output", "input", *p], got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=said(name))
    if at_start:
        y = naive.by_token(lambda token: at_start(token, F, norm), x)
        for name, ours, theirs in zip(
            ["output at start", "input at start"], got, outcome(y, weights, x, []), strict=False
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=said(name))


def branch_of(p):
    """Return the branch of the connection with parameters `p`, as a function of one token."""
    return lambda token: naive.feedforward(token, p, torch.tanh, prefix="branch.")


def stack_of_one(wiring, x):
    """Return x through open, the connection and close, as a stack would run it."""
    return wiring.close(type(wiring).run([wiring], wiring.open(x), Context()))


def said(name):
    """Put the name of what differs in front of the message."""
    return lambda message: f"{name}: {message}"


def stack(spec, count=4, dim=DIM, **options):
    """Return a stack of feed-forward branches in float64."""
    parts = [FeedForward(dim, HIDDEN, activation="tanh") for _ in range(count)]
    return Stack(parts, spec, dim=dim, **options).double()


def transformer(spec, dim=64):
    """Return a stack of four Transformer layers."""
    parts = [b for _ in range(4) for b in (Attention(dim, 4), FeedForward(dim))]
    return Stack(parts, spec, dim=dim, parts=2)


# -- formulas ----------------------------------------------------------------------------------


@each_norm
@each_row
def test_wiring_starts_as_its_row_says(spec, at_start, formula, norm):
    """At the start values, outputs and gradients are those of the simpler start formula."""
    expect(middle(spec, norm), stream(2, 3), norm, formula, at_start)


@each_norm
@each_row
def test_wiring_is_its_formula_at_random_parameters(spec, at_start, formula, norm):
    """Away from the start, outputs and gradients are those of the paper's formula."""
    expect(randomised(middle(spec, norm)), stream(2, 3), norm, formula)


@each_row
def test_wiring_takes_channel_last_images(spec, at_start, formula):
    """Every pixel of a channel-last image `(B, H, W, D)` is a token."""
    expect(randomised(middle(spec)), stream(2, 3, 2), "layernorm", formula)


@each_wiring
def test_registered_means_tested(name):
    """Every wiring in the catalogue has a row in the table above."""
    assert name in {parse_spec(spec).name for spec in SPECS}


@each_norm
@each_spec
def test_every_parameter_gets_a_gradient(spec, norm):
    """Away from the start, no element of any parameter in a stack has a zero gradient."""
    model = randomised(stack(spec, norm=NORMS[norm][0]))
    x = stream(2, 3)
    (model(x) * torch.randn_like(x)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).all(), name


# -- starts ------------------------------------------------------------------------------------


@each_spec
def test_wiring_works_after_the_meta_device(spec):
    """A stack made on the meta device and reset has the starts of one made in memory."""
    made = transformer(spec)
    with torch.device("meta"):
        late = transformer(spec)
    late = late.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in late.parameters():
            parameter.fill_(float("nan"))  # what the reset forgets stays visible
    late.reset_parameters()
    for (name, ours), theirs in zip(late.named_parameters(), made.parameters(), strict=True):
        if ours.dim() < 2:
            assert torch.equal(ours, theirs), name
        else:
            ratio = ours.std() / theirs.std()
            assert ours.isfinite().all(), name
            assert 0.95 < ratio < 1.05, name
            assert ours.mean().abs() < 0.1 * ours.std(), name


@pytest.mark.parametrize("start", STARTS)
@each_spec
def test_reset_twice_is_reset_once(spec, start):
    """A reset depends on the seed alone, not on the values that were there before."""
    site = Site(8, index=3, count=8, parts=2, start=start)
    wiring = parse_spec(spec).build(Attention(8, 2), site)
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


def test_deepnorm_scales_through_drop_path():
    """Stochastic depth around a branch does not hide its matrices from the scheme."""
    scaled = started("deepnorm", DropPath(FeedForward(8), 0.5))
    gain_1 = started("residual", FeedForward(8), start="xavier")
    torch.testing.assert_close(scaled.branch.out.weight, BETA * gain_1.out.weight)


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
    laws = typing.get_args(typing.get_type_hints(Wiring)["stream_law"].__args__[0])
    assert wiring.__dict__["name"] == name
    assert wiring.equation.startswith("x <-")
    assert inspect.cleandoc(wiring.__doc__).startswith("x <-")
    assert inspect.getdoc(wiring.forward)
    assert isinstance(wiring.year, int)
    assert 2014 < wiring.year < 2030
    assert f" {wiring.year}, arXiv:" in wiring.paper
    assert isinstance(wiring.at_start, str)
    assert wiring.at_start
    assert isinstance(wiring.final_norm, bool)
    assert isinstance(wiring.verified, bool)
    assert wiring.start in STARTS
    assert laws == ("constant", "sqrt", "geometric", "vanishing")
    assert wiring.stream_law in laws
    assert wiring.gradient_law in laws
    assert isinstance(wiring.expected, frozenset)
    assert all(isinstance(finding, str) for finding in wiring.expected)


@each_spec
def test_groups_name_parameters(spec):
    """Optimiser groups name parameters of the wiring itself, and all of them but the norms'."""
    wiring = middle(spec)
    assert set(wiring.groups()) == {name for name, _ in wiring.named_parameters(recurse=False)}


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
    with pytest.raises(ValueError, match="the wiring 'prenorm' exists already"):
        type("Another", (Wiring,), {"name": "prenorm"})


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
        ("plain", "norm=false"),
        ("plain(norm=true)", "norm=true"),
        ("layerscale(init=1e-05)", "init=1e-5"),
        ("prenorm", ""),
    ],
)
def test_repr_shows_the_options(spec, shown):
    """The printed module shows the options of its wiring."""
    assert middle(spec).extra_repr() == shown


# -- the stack ---------------------------------------------------------------------------------


@each_spec
def test_stack_calls_each_branch_once(spec):
    """One forward pass calls every branch exactly once, as a module, in order."""
    model, calls = stack(spec), []
    for index, connection in enumerate(model):
        connection.branch.register_forward_hook(lambda *_, index=index: calls.append(index))
    model(stream(2, 3))
    assert calls == [0, 1, 2, 3]


@each_row
def test_stack_is_its_connections_in_a_row(spec, at_start, formula):
    """A stack applies the naive formula once for each connection."""
    if "deepnorm" in spec:
        formula = functools.partial(naive.deepnorm, alpha=1.4142135623730951)  # 4 ** (1/4)
    model, x = randomised(stack(spec)), stream(2, 3)
    y = x
    for connection in model:
        p = dict(connection.named_parameters())
        one = functools.partial(formula, p=p, F=branch_of(p), norm=naive.layernorm)
        y = naive.by_token(one, y)
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-12)


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
            "unknown start 'xaver'; did you mean 'xavier'? "
            "(known: normal, gpt2, xavier, fairseq, he, torch)",
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
    """In training a sample's update is 0 or F(x) / (1 - rate), and its mean is F(x)."""
    branch = FeedForward(DIM, HIDDEN).double()
    dropped = DropPath(branch, 0.3).train()
    x = stream(1, 2).expand(20_000, 2, DIM)
    full, got = branch(x[:1], None)[0], dropped(x, None)
    ratio = got / full  # (samples, tokens, D)
    per_sample = ratio[:, 0, 0]
    torch.testing.assert_close(ratio, per_sample[:, None, None].expand_as(ratio))
    kept = per_sample != 0
    torch.testing.assert_close(per_sample[kept], torch.full_like(per_sample[kept], 1 / 0.7))
    assert per_sample.mean().item() == pytest.approx(1, abs=4 * (0.3 / 0.7 / 20_000) ** 0.5)


@each_spec
def test_drop_path_is_off_in_evaluation(spec):
    """In evaluation a stack with stochastic depth is the stack without, and in training not."""
    dropped = randomised(stack(spec, drop_path=0.5))
    full = copy.deepcopy(dropped)
    for connection in full:
        connection.branch = connection.branch.branch
    x = stream(64, 3)
    assert torch.equal(dropped.eval()(x), full.eval()(x))
    assert not torch.equal(dropped.train()(x), full.train()(x))


def test_drop_path_rises_linearly():
    """The rate rises linearly from 0 at the first connection to `drop_path` at the last."""
    rates = [connection.branch.rate for connection in stack("prenorm", 5, drop_path=0.4)]
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
    with pytest.raises(ValueError, match="the wiring 'silent' does not state equation, paper, "):
        type("Silent", (Wiring,), {"name": "silent"})
    assert "silent" not in catalogue()
