"""What stands inside a branch, branches in parallel, and the named starts."""

import json
from dataclasses import asdict, fields, replace

import naive_branches
import pytest
import torch
from test_models import agree, gpt, randomised
from torch import nn

from addnorm.branches import STARTS, Branch, Context, Matrix, Site, start
from addnorm.contract import Stack, Wiring, catalogue, register
from addnorm.models.gpt import GPT, GPTConfig, asked
from addnorm.models.layers import (
    ATTENTION_PATHS,
    Attention,
    AttentionConfig,
    Canon,
    FeedForward,
    FeedForwardConfig,
    HeadScale,
    Parallel,
    ValueResidual,
)

INSIDE = [f.name for f in fields(AttentionConfig) if f.default is False]
HIDDEN = [f.name for f in fields(FeedForwardConfig) if f.default is False]
OPTIONS = sorted(f.name for config in (AttentionConfig, FeedForwardConfig) for f in fields(config))
EVERYTHING = {
    "attention": AttentionConfig(**dict.fromkeys(INSIDE, True)),
    "feedforward": FeedForwardConfig(**dict.fromkeys(HIDDEN, True)),
}
# Changes of a GPT's configuration: every option alone, all together, and in parallel.
CHANGES = {
    **{name: {"attention": AttentionConfig(**{name: True})} for name in INSIDE},
    **{name: {"feedforward": FeedForwardConfig(**{name: True})} for name in HIDDEN},
    "parallel": {"parallel": True},
    "everything": {**EVERYTHING, "parallel": True},
}
each_path = pytest.mark.parametrize("path", ATTENTION_PATHS)
each_change = pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)


def tokens(B, T, D):
    return torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)


def parameters(module):
    return dict(module.named_parameters())


# -- options of the branches -------------------------------------------------------------------


@each_path
@pytest.mark.parametrize("on", [[], *([name] for name in INSIDE), INSIDE], ids=str)
def test_attention_with_options_is_its_formula(on, path):
    """Each option alone, and all of them, equal the naive attention; outputs and gradients."""
    config = AttentionConfig(**dict.fromkeys(on, True))
    attention = randomised(Attention(6, 2, config=config, path=path).double(), 0.7)
    x = tokens(2, 5, 6)
    want = naive_branches.attention(x, parameters(attention), 2, {})
    agree(attention(x, Context()), want, x, attention)


@pytest.mark.parametrize("on", [[], *([name] for name in HIDDEN), HIDDEN], ids=str)
def test_feedforward_with_options_is_its_formula(on):
    """Each option alone, and all of them, equal the naive feed-forward; outputs and gradients."""
    config = FeedForwardConfig(**dict.fromkeys(on, True))
    feedforward = randomised(FeedForward(3, 5, config=config).double())
    x = tokens(2, 5, 3)
    want = naive_branches.feedforward(x, parameters(feedforward))
    agree(feedforward(x, Context()), want, x, feedforward)


def test_value_residual_reads_the_first_attention():
    """V_l is l1 V_1 + l2 V_l with V_1 from the first attention of the stack, through the stack."""
    config = AttentionConfig(value_residual=True)
    layers = [Attention(4, 2, config=config) for _ in range(3)]
    stack = randomised(Stack(layers, "residual", dim=4).double(), 0.7)
    x, first = tokens(2, 4, 4), {}
    want = x
    for layer in layers:
        want = want + naive_branches.attention(want, parameters(layer), 2, first)
    agree(stack(x), want, x, stack)


def test_value_residual_starts_as_the_mean():
    """At the start the second attention mixes half of V_1 and half of its own, the first none."""
    mix, context = ValueResidual(), Context()
    first, second = torch.randn(2, 1, 2, 3, 4)
    assert torch.equal(mix(first, context), first)
    torch.testing.assert_close(mix(second, context), (first + second) / 2)
    assert list(context.values) == ["value"]


def test_the_cache_keeps_the_mixed_values():
    """With a value residual the cache holds what the attention reads, not V itself."""
    model = randomised(gpt(attention=AttentionConfig(value_residual=True)), 0.5)
    context = Context(cache={})
    model(torch.arange(6)[None], context)
    second = model.stack.connections[2].branch
    seen = {}
    second.value_residual.register_forward_hook(lambda _m, _i, out: seen.update(v=out))
    model(torch.arange(6)[None])
    torch.testing.assert_close(context.cache[second][1], seen["v"])


def test_qkv_norm_is_qk_norm_and_one_more():
    """The per-head norms have a gain of the width of a head, for q and k, or for q, k and v."""
    for config, names in [
        (AttentionConfig(qk_norm=True), ["q_norm", "k_norm"]),
        (AttentionConfig(qkv_norm=True), ["q_norm", "k_norm", "v_norm"]),
        (AttentionConfig(qk_norm=True, qkv_norm=True), ["q_norm", "k_norm", "v_norm"]),
    ]:
        p = parameters(Attention(8, 2, config=config))
        assert [n for n in p if "norm" in n] == [f"{name}.weight" for name in names]
        assert all(p[f"{name}.weight"].shape == (4,) for name in names)


def test_inner_norms_make_the_branch_deaf_to_scale():
    """With Sub-LN's norms a branch does not change when value and in matrices grow tenfold."""
    x = tokens(1, 4, 8)
    attention = Attention(8, 2, config=AttentionConfig(joined_norm=True)).double()
    feedforward = FeedForward(
        8,
        config=FeedForwardConfig(hidden_norm=True, activation="relu", feedforward_bias=False),
    ).double()
    nn.init.zeros_(attention.qkv.bias)
    for branch, matrix in [
        (attention, attention.matrices()[2].weight),
        (feedforward, feedforward.lift.weight),
    ]:
        before = branch(x, Context())
        with torch.no_grad():
            matrix.mul_(1000)  # from where eps does not count
        middle = branch(x, Context())
        with torch.no_grad():
            matrix.mul_(10)
        torch.testing.assert_close(branch(x, Context()), middle, rtol=1e-4, atol=1e-6)
        assert (before - middle).abs().max() < 0.1


def test_canon_is_an_impulse_response_of_four_tokens():
    """A canon layer answers an impulse with 4 tokens; with a kernel of 0 it is the identity."""
    canon, context = Canon(2), Context()
    with torch.no_grad():
        canon.weight.copy_(torch.tensor([[[1.0, 2, 3, 4]], [[5, 6, 7, 8]]]))
    h = torch.zeros(1, 8, 2)
    h[0, 2] = 1
    want = torch.zeros(8, 2)
    want[2:6] = torch.tensor([[1.0 + 4, 1 + 8], [3, 7], [2, 6], [1, 5]])
    assert torch.equal(canon(h, context)[0], want)
    nn.init.zeros_(canon.weight)
    h = torch.randn(2, 5, 2)
    assert torch.equal(canon(h, context), h)


def test_canon_starts_as_conv1d():
    """The kernel starts in U(-1/2, 1/2): standard deviation 1/sqrt(12)."""
    weight = Canon(4000).weight
    assert weight.shape == (4000, 1, 4)
    assert weight.abs().max() <= 0.5
    assert weight.std().item() == pytest.approx(12**-0.5, rel=0.02)


@each_path
@each_change
def test_cached_logits_are_the_logits(changes, path):
    """In pieces through the cache, the logits are those of the whole text, for every option."""
    model = randomised(gpt(**changes), 0.5).double()
    model.choose("attention", path)
    text = torch.randint(11, (2, 6))
    for pieces in [(1, 1, 1, 1, 1, 1), (2, 4), (5, 1)]:
        context, past, steps = Context(cache={}), 0, []
        for piece in text.split(pieces, dim=1):
            steps.append(model(piece, replace(context, past=past)))
            past += piece.shape[1]
        torch.testing.assert_close(torch.cat(steps, dim=1), model(text), rtol=1e-9, atol=1e-9)


@each_change
def test_gpt_with_options_is_causal(changes):
    """Another later token leaves the earlier logits as they are, and changes its own."""
    model = randomised(gpt(**changes), 0.5).double()
    text = torch.randint(11, (2, 6))
    before = model(text)
    for t in range(6):
        changed = text.clone()
        changed[:, t] = (text[:, t] + 1) % 11
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        assert ((after[:, t] - before[:, t]).abs().amax(-1) > 1e-3).all(), t


@each_change
@pytest.mark.parametrize("name", ["", "zero", "fixup", "subln"])
def test_every_parameter_gets_a_gradient(changes, name):
    """Within three steps from the start every parameter has had a gradient."""
    model = gpt(start=name, **changes).train()
    moved = set()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        text = torch.randint(11, (4, 6))
        loss = nn.functional.cross_entropy(model(text).flatten(0, 1), text.flatten())
        optimizer.zero_grad()
        loss.backward()
        moved |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert set(parameters(model)) - moved == set()


def hold_after_meta(make):
    """A model made on the meta device and reset is the model made in memory and reset."""
    made = make()
    with torch.device("meta"):
        late = make()
    late = late.to_empty(device="cpu")
    for model in (made, late):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))  # what the reset forgets stays visible
        torch.manual_seed(1)
        model.reset_parameters()
    for (name, ours), theirs in zip(late.named_parameters(), made.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@each_change
def test_options_work_after_the_meta_device(changes):
    hold_after_meta(lambda: gpt(**changes))


@each_change
def test_state_dict_round_trip(changes):
    """The state of one model, loaded into another, gives the same logits."""
    one, other = (randomised(gpt(**changes), 0.5) for _ in range(2))
    text = torch.arange(6)[None]
    assert not torch.equal(one(text), other(text))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(text), other(text))


@each_path
@each_change
def test_options_run_in_bfloat16(changes, path):
    """Under autocast the options work in both attentions, with a loss near the float32 one."""
    model = gpt(**changes)
    model.choose("attention", path)
    text = torch.randint(11, (2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(text)
    torch.testing.assert_close(low.float(), model(text), rtol=0.1, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        context = Context(cache={})
        model(text[:, :5], context)
        model(text[:, 5:], replace(context, past=5))


@pytest.mark.parametrize("name", ["qkv_norm", "everything"])
def test_options_compile_in_one_graph(name):
    """Compiled without a break, logits and gradients are the eager ones."""
    model = randomised(gpt(**CHANGES[name]), 0.5).double()
    text, found = torch.arange(6)[None], []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        logits = function(text)
        found.append([logits, *torch.autograd.grad(logits.square().sum(), model.parameters())])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-9)


def test_no_option_changes_nothing():
    """Without options a branch has the parameters of its matrices, drawn in the same order."""
    torch.manual_seed(3)
    attention, feedforward = Attention(8, 2), FeedForward(8)
    torch.manual_seed(3)
    linears = [nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(32, 8)]
    ours = [*attention.named_parameters(), *feedforward.named_parameters()]
    theirs = [p for linear in linears for p in linear.parameters()]
    assert [n for n, _ in ours[:4]] == ["qkv.weight", "qkv.bias", "out.weight", "out.bias"]
    assert [n for n, _ in ours[4:]] == ["lift.weight", "lift.bias", "out.weight", "out.bias"]
    assert all(torch.equal(p, q) for (_, p), q in zip(ours, theirs, strict=True))


def test_head_scale_starts_at_one():
    """At its start a head scale leaves every head as it is."""
    y = torch.randn(2, 3, 4, 5)
    assert torch.equal(HeadScale(3)(y), y)


def test_inner_norms_are_of_the_models_kind():
    """Inner norms are of the kind that the model names; those of q, k and v are RMSNorm."""
    model = gpt(norm="dyt", **EVERYTHING)
    attention, feedforward = (model.stack.connections[i].branch for i in range(2))
    kinds = [attention.q_norm, attention.v_norm, attention.joined_norm, feedforward.hidden_norm]
    assert [type(k).__name__ for k in kinds] == ["RMSNorm", "RMSNorm", "DyT", "DyT"]


def test_config_survives_json():
    """A configuration read back from JSON, as a run's folder keeps it, is the one written."""
    config = GPTConfig(parallel=True, vocab_size=11, **EVERYTHING)
    assert GPTConfig(**json.loads(json.dumps(asdict(config)))) == config


# -- what a wiring asks for --------------------------------------------------------------------


def asking(**options):
    """Return the name of a new wiring that asks for these options of its branches."""

    @register
    class Asking(Wiring):
        """x <- x + F(x)."""

        name, equation, paper, year = "asking", "x <- x + F(x)", "none", 2026
        at_start, stream_law, gradient_law = "x + F(x)", "sqrt", "constant"
        asks = options

        def forward(self, stream, context):
            return stream + self.branch(stream, context)

    return Asking.name


def test_a_gpt_sets_what_its_wiring_asks():
    """Options that the wiring asks for are switched on, and the user's own ones stay."""
    name = asking(qkv_norm=True, hidden_norm=True)
    config = GPTConfig(wiring=name, attention=AttentionConfig(canon_a=True))
    inside = AttentionConfig(qkv_norm=True, canon_a=True)
    assert asked(config) == (inside, FeedForwardConfig(hidden_norm=True))
    assert asked(GPTConfig()) == (AttentionConfig(), FeedForwardConfig())
    names = parameters(gpt(wiring=name))
    assert "stack.connections.2.branch.v_norm.weight" in names
    assert "stack.connections.1.branch.hidden_norm.weight" in names


def test_the_catalogue_asks_for_what_branches_have():
    """No wiring of ours asks for an option that a GPT's branches lack."""
    asks = {name: wiring.asks for name, wiring in catalogue().items() if wiring.asks}
    assert {option for options in asks.values() for option in options} <= {*INSIDE, *HIDDEN}
    for name in asks:
        asked(GPTConfig(wiring=name))


def test_a_gpt_refuses_what_no_branch_has():
    """An option that no branch has is refused with what was probably meant."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole text is compared
        gpt(wiring=asking(qkv_nrm=True))
    assert str(caught.value) == (
        "unknown option that asking asks of its branches 'qkv_nrm'; did you mean 'qkv_norm'? "
        f"(known: {', '.join(OPTIONS)})"
    )


# -- branches in parallel ----------------------------------------------------------------------


def test_parallel_is_the_sum():
    """Parallel branches add what each makes of the same input; outputs and gradients."""
    parts = Attention(4, 2), FeedForward(4, 5), FeedForward(4, 3)
    parallel = randomised(Parallel(*parts).double(), 0.7)
    x = tokens(2, 4, 4)
    want = naive_branches.attention(x, parameters(parts[0]), 2, {})
    for part in parts[1:]:
        want = want + naive_branches.feedforward(x, parameters(part))
    agree(parallel(x, Context()), want, x, parallel)


def test_a_parallel_layer_is_one_connection_with_one_norm():
    """x + Attn(N x) + FFN(N x): as many connections as layers, one norm for both branches."""
    model = randomised(gpt(parallel=True, dim=4, context=4), 0.5).double()
    assert len(model.stack) == model.config.depth == 2
    assert {connection.site.parts for connection in model.stack} == {1}
    usual = gpt(dim=4, context=4).parameters_by_part()
    parts = model.parameters_by_part()
    assert parts["wiring"] == usual["wiring"] / 2
    assert {k: v for k, v in parts.items() if k != "wiring"} == {
        k: v for k, v in usual.items() if k != "wiring"
    }
    x = tokens(1, 4, 4)
    want = x
    for connection in model.stack:
        normed = connection.norm_in(want)
        attention, feedforward = connection.branch
        want = want + naive_branches.attention(normed, parameters(attention), 2, {})
        want = want + naive_branches.feedforward(normed, parameters(feedforward))
    agree(model.stack(x), want, x, model.stack)


def test_a_parallel_branch_starts_like_its_parts():
    """A start finds the matrices of all parts by role, and their biases become 0."""
    parallel = Parallel(Attention(8, 2), FeedForward(8))
    roles = ["query", "key", "value", "out", "in", "out"]
    assert [matrix.role for matrix in parallel.matrices()] == roles
    start(parallel, "zero", Site(8, count=4), {})
    for matrix in parallel.matrices():
        assert matrix.weight.any() == (matrix.role != "out")
    assert not any(p.any() for n, p in parallel.named_parameters() if n.endswith("bias"))


def test_parallel_refuses_no_branches():
    """Parallel needs a branch."""
    with pytest.raises(ValueError, match="Parallel needs at least one branch"):
        Parallel()


# -- named starts ------------------------------------------------------------------------------

ROLES = ("query", "key", "value", "in", "out")


def weight_of(name, role, layers=6, index=4, m=2, shape=(24, 16)):
    """Return a float64 weight as the named start fills it from seed 7, at 2 parts a layer."""
    torch.manual_seed(7)
    weight = torch.empty(shape, dtype=torch.float64)
    with torch.no_grad():
        STARTS[name](role, weight, Site(16, index, 2 * layers, 2), m)
    return weight


def factor(name, base, role, **where):
    """Return how many times the weight of one start is that of another, everywhere the same."""
    ratio = weight_of(name, role, **where) / weight_of(base, role, **where)
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio.mean()))
    return ratio.mean().item()


# N layers | 1/sqrt(2N) | Sub-LN sqrt(ln 2N) | T-Fixup encoder .67 N^-1/4 | decoder (9N)^-1/4
GAINS = [
    (6, 0.288675, 1.576359, 0.428092, 0.368894),
    (12, 0.204124, 1.782710, 0.359981, 0.310202),
    (24, 0.144338, 1.967537, 0.302707, 0.260847),
    (48, 0.102062, 2.136434, 0.254545, 0.219346),
    (100, 0.070711, 2.301807, 0.211873, 0.182574),
]


@pytest.mark.parametrize("row", GAINS, ids=lambda row: f"{row[0]} layers")
def test_gains_by_depth(row):
    """The starts that know the depth have the gains that their papers' formulas give."""
    layers, gpt2, subln, encoder, decoder = row
    assert factor("gpt2", "normal", "out", layers=layers) == pytest.approx(gpt2, abs=1e-6)
    for role in ("value", "in", "out"):
        for name, base, gain in [
            ("subln", "fairseq", subln),
            ("tfixup", "xavier", encoder),
            ("tfixup-decoder", "xavier", decoder),
        ]:
            assert factor(name, base, role, layers=layers) == pytest.approx(gain, abs=1e-6), name
    for role in ("query", "key"):
        for name in ("subln", "tfixup", "tfixup-decoder"):
            assert factor(name, "xavier", role, layers=layers) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(("index", "layer"), [(0, 1), (1, 1), (2, 2), (5, 3), (11, 6)])
def test_depth_scaled_counts_its_own_layer(index, layer):
    """`depth-scaled` puts 1/sqrt(2 l) on the out matrix of the l-th layer, from 1, and no other."""
    assert factor("depth-scaled", "normal", "out", index=index) == pytest.approx(
        (2 * layer) ** -0.5
    )
    for role in ("query", "key", "value", "in"):
        assert factor("depth-scaled", "normal", role, index=index) == 1


def test_zero_is_zero_at_out():
    """`zero` is N(0, 0.02) with out matrices of 0."""
    assert not weight_of("zero", "out").any()
    for role in ("query", "key", "value", "in"):
        assert torch.equal(weight_of("zero", role), weight_of("normal", role))


@pytest.mark.parametrize(
    ("branch", "connections", "gain"),
    [
        (FeedForward(32, 512), 16, 0.25),  # m = 2: L^(-1/2)
        (Attention(256, 4), 64, 0.5),  # m = 4: L^(-1/6)
        (Parallel(FeedForward(32, 512), FeedForward(32, 512)), 16, 0.25),  # each has m = 2
    ],
)
def test_fixup_by_branch(branch, connections, gain):
    """Fixup is He by the outputs times L^(-1/(2m-2)), and 0 for out, so that a branch is 0."""
    start(branch, "fixup", Site(32, count=connections), {})
    for matrix in branch.matrices():
        he = (2 / matrix.weight.shape[0]) ** 0.5
        want = 0 if matrix.role == "out" else he * gain
        assert matrix.weight.std().item() == pytest.approx(want, rel=0.03), matrix.role
    assert not branch(torch.randn(1, 3, branch.matrices()[0].weight.shape[1]), Context()).any()


class Bottleneck(Branch):
    """Three convolutions, 1 x 1, 3 x 3, 1 x 1, by their weights alone."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(
            torch.empty(shape) for shape in [(128, 256, 1, 1), (128, 128, 3, 3), (256, 128, 1, 1)]
        )

    def forward(self, x, context):
        raise NotImplementedError

    def matrices(self):
        roles = ("in", "in", "out")
        return [Matrix(r, w) for r, w in zip(roles, self.weights, strict=True)]


def test_fixup_of_a_bottleneck():
    """With three convolutions Fixup puts L^(-1/4) on sqrt(2 / (k k out)) of the first two."""
    branch = Bottleneck()
    start(branch, "fixup", Site(256, count=16, parts=1), {})
    one, three, last = (weight.std().item() for weight in branch.weights)
    assert one == pytest.approx((2 / 128) ** 0.5 / 2, rel=0.02)
    assert three == pytest.approx((2 / (9 * 128)) ** 0.5 / 2, rel=0.02)
    assert last == 0


@pytest.mark.parametrize("name", STARTS)
def test_a_start_fills_every_role(name):
    """Every start fills a weight of every role with finite numbers, also in a one-layer model."""
    for role in ROLES:
        for layers in (1, 6):
            weight = weight_of(name, role, layers=layers, index=0, m=1)
            assert torch.isfinite(weight).all()
            assert weight.any() or role == "out"


@pytest.mark.parametrize("name", STARTS)
def test_a_gpt_takes_every_start(name):
    """A GPT is built with every named start and begins near uniform guessing."""
    model = gpt(start=name, norm="rmsnorm", attention=AttentionConfig(joined_norm=True))
    assert isinstance(model, GPT)
    text = torch.arange(6)[None]
    loss = nn.functional.cross_entropy(model(text)[0], text[0])
    assert loss.item() == pytest.approx(torch.tensor(11.0).log().item(), abs=0.3)
