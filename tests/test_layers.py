"""Options of the branches that change their matrices: heads, positions, biases, activations."""

import math
from dataclasses import replace

import naive
import pytest
import torch
from test_branches import hold_after_meta
from test_models import agree, gpt, masks, randomised
from torch.utils.flop_counter import FlopCounterMode

from addnorm.branches import STARTS, Context, Site, start
from addnorm.contract import catalogue
from addnorm.models.gpt import GPTConfig
from addnorm.models.layers import (
    ATTENTION_PATHS,
    Attention,
    AttentionConfig,
    EmbeddingConfig,
    FeedForward,
    FeedForwardConfig,
    rotate,
)

each_path = pytest.mark.parametrize("path", ATTENTION_PATHS)


def tokens(B, T, D):
    return torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)


def parameters(module):
    return dict(module.named_parameters())


# -- the oracle: complex numbers for the rotation, one query at a time --------------------------


def turned(x, t):
    """Return `x (E,)` turned to position t: channels i and i + E/2 are one complex number."""
    half = len(x) // 2
    out = list(x)
    for i in range(half):
        angle = t * 10000 ** (-2 * i / len(x))
        z = torch.complex(x[i], x[i + half]) * complex(math.cos(angle), math.sin(angle))
        out[i], out[i + half] = z.real, z.imag
    return torch.stack(out)


def linear(x, p, name):
    """Return W x + b, x where p has no such matrix."""
    if f"{name}.weight" not in p:
        return x
    y = p[f"{name}.weight"] @ x
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def attention(x, p, heads, kv_heads, *, rotary=False, causal=True, mask=None):
    """Return the attention over `x (B, T, D)`, query head h reading head h kv_heads // heads."""
    B, T, D = x.shape
    E = D // heads

    def placed(vector, norm, t):
        if f"{norm}.weight" in p:
            vector = naive.rmsnorm(vector, p[f"{norm}.weight"])
        return turned(vector, t) if rotary else vector

    out = []
    for b in range(B):
        fused = [linear(x[b, t], p, "qkv") for t in range(T)]
        for t in range(T):
            joined = [torch.zeros(E, dtype=x.dtype) for _ in range(heads)]
            for h in range(heads):
                g = h * kv_heads // heads
                own, key, value = h * E, D + g * E, D + (kv_heads + g) * E
                ahead = range(t + 1) if causal else range(T)
                seen = [s for s in ahead if mask is None or mask[b, h, t, s]]
                q = placed(fused[t][own : own + E], "q_norm", t)
                keys = [placed(fused[s][key : key + E], "k_norm", s) for s in seen]
                weights = [torch.exp(q @ k / math.sqrt(E)) for k in keys]
                for weight, s in zip(weights, seen, strict=True):
                    joined[h] = joined[h] + weight / sum(weights) * fused[s][value : value + E]
            out.append(linear(torch.cat(joined), p, "out"))
    return torch.stack(out).reshape(B, T, D)


# -- attention ---------------------------------------------------------------------------------

# Options of the config, then of the attention itself.
CASES = {
    "kv_heads=1": ({"kv_heads": 1}, {}),
    "kv_heads=2": ({"kv_heads": 2}, {}),
    "rotary": ({}, {"rotary": True}),
    "rotary qk_norm kv_heads=2": ({"kv_heads": 2, "qk_norm": True}, {"rotary": True}),
    "no biases": ({"attention_biases": "none"}, {}),
    "biases of qkv": ({"attention_biases": "qkv"}, {}),
    "biases of out": ({"attention_biases": "out"}, {}),
    "no projection": ({"attention_projection": False}, {}),
    "both ways": ({}, {"causal": False}),
    "both ways, rotary, kv_heads=1": ({"kv_heads": 1}, {"causal": False, "rotary": True}),
}


@each_path
@pytest.mark.parametrize("case", CASES)
def test_attention_is_its_formula(case, path):
    """Each option, and some together, equal the naive attention; outputs and gradients."""
    inside, own = CASES[case]
    config = AttentionConfig(**inside)
    module = randomised(Attention(16, 4, config=config, path=path, **own).double(), 0.3)
    x = tokens(2, 4, 16)  # heads of width 4: rotation has two planes
    want = attention(x, parameters(module), 4, config.kv_heads or 4, **own)
    agree(module(x, Context()), want, x, module)


@each_path
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["shared", "batch", "heads", "padding"])
def test_masks_with_shared_keys(kind, causal, path):
    """Masks of every shape hold with grouped queries, looking back and both ways."""
    config = AttentionConfig(kv_heads=2)
    module = randomised(Attention(8, 4, config=config, causal=causal, path=path).double(), 0.5)
    x, mask = tokens(2, 4, 8), masks(2, 4, 4)[kind]
    full = mask.expand(2, 4, 4, 4)
    want = attention(x, parameters(module), 4, 2, causal=causal, mask=full)
    agree(module(x, Context(mask=mask)), want, x, module)


@each_path
def test_a_query_that_sees_nothing_gets_zero(path):
    """Looking both ways too, a query without any key gets 0, and no nan spreads."""
    module = randomised(Attention(8, 4, causal=False, path=path).double(), 0.5)
    x = tokens(2, 4, 8)
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[0, 0, 2] = False
    want = attention(x, parameters(module), 4, 4, causal=False, mask=mask.expand(2, 4, 4, 4))
    agree(module(x, Context(mask=mask)), want, x, module)


@each_path
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries_are_full_attention_with_repeated_keys(kv_heads, path):
    """With each key and value head repeated, full attention gives the grouped one's output."""
    grouped = randomised(
        Attention(8, 4, config=AttentionConfig(kv_heads=kv_heads), path=path).double(), 0.5
    )
    full = Attention(8, 4, path=path).double()
    full.out.load_state_dict(grouped.out.state_dict())
    with torch.no_grad():
        for name in ("weight", "bias"):
            fused = getattr(grouped.qkv, name)
            q, k, v = fused.split((8, 2 * kv_heads, 2 * kv_heads))
            blocks = (m.unflatten(0, (kv_heads, 2)) for m in (k, v))
            wider = [m.repeat_interleave(4 // kv_heads, 0).flatten(0, 1) for m in blocks]
            getattr(full.qkv, name).copy_(torch.cat((q, *wider)))
    x = tokens(2, 4, 8)
    torch.testing.assert_close(grouped(x, Context()), full(x, Context()), rtol=1e-12, atol=1e-12)


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    """A turned vector has its length, and q k depends on how far apart the two stand."""
    q, k = (torch.randn(1, 1, 1, 6, dtype=torch.float64).expand(1, 1, 9, 6) for _ in range(2))
    turned_q, turned_k = rotate(q, k, 3)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    products = (turned_q @ turned_k.mT)[0, 0]
    for distance in range(-8, 9):
        line = products.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line))
    assert products.diagonal(1)[0] != pytest.approx(products.diagonal(2)[0].item())


def test_rotation_pairs_the_halves():
    """Channels i and i + E/2 turn together, at position t by t and by t/100 where E is 4."""
    for channel, past, angle in [(0, 1, 1.0), (1, 1, 0.01), (1, 100, 1.0)]:
        q = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
        q[..., channel] = 1
        want = torch.zeros(4, dtype=torch.float64)
        want[channel], want[channel + 2] = math.cos(angle), math.sin(angle)
        for got in rotate(q, q, past):
            torch.testing.assert_close(got.flatten(), want)


def test_the_cache_keeps_the_shared_heads():
    """With grouped queries the cache holds the heads of keys, not of queries."""
    module = Attention(8, 4, config=AttentionConfig(kv_heads=2), rotary=True)
    context = Context(cache={})
    module(torch.randn(3, 5, 8), context)
    assert [part.shape for part in context.cache[module]] == [(3, 2, 5, 2)] * 2


@pytest.mark.parametrize("kv_heads", [0, 1, 2, 4])
def test_matrices_are_the_rows_by_role(kv_heads):
    """Query, key and value are the rows of the fused weight that make q, k and v."""
    module = Attention(8, 4, config=AttentionConfig(kv_heads=kv_heads)).double()
    found = {matrix.role: matrix for matrix in module.matrices()}
    width = 2 * (kv_heads or 4)
    shapes = {"query": (8, 8), "key": (width, 8), "value": (width, 8), "out": (8, 8)}
    assert {role: tuple(matrix.weight.shape) for role, matrix in found.items()} == shapes
    assert sum(m.weight.numel() for m in found.values()) == sum(
        p.numel() for p in module.parameters() if p.dim() == 2
    )
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    with torch.no_grad():  # without queries the weights are even, so values alone speak
        found["query"].weight.zero_()
        module.qkv.bias.zero_()
        even = module(x, Context())
        found["key"].weight.zero_()
        assert torch.equal(module(x, Context()), even)
        found["value"].weight.zero_()
        assert torch.equal(module(x, Context()), module.out.bias.expand(1, 3, 8))


@pytest.mark.parametrize("name", STARTS)
def test_starts_without_an_output_matrix(name):
    """Every start fills what there is; alone it lacks the 0 or the factor of `out`."""
    config = AttentionConfig(attention_projection=False)
    module = Attention(8, 2, config=config)
    assert [matrix.role for matrix in module.matrices()] == ["query", "key", "value"]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
    start(module, name, Site(8, count=4, parts=2), {})
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert all(matrix.weight.any() for matrix in module.matrices())
    assert module(torch.randn(1, 3, 8), Context()).any()


@each_path
def test_dropout_on_the_weights(path):
    """In training, weights are 0 or scaled by 1/(1 - p); in evaluation nothing happens."""
    config = AttentionConfig(attention_dropout=0.25, attention_projection=False)
    module = Attention(1, 1, config=config, causal=False, path=path).double()
    with torch.no_grad():  # queries are 0: every weight is 1/T, and the values are all 1
        module.qkv.weight.zero_()
        module.qkv.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
    T = 200
    x = torch.zeros(4, T, 1, dtype=torch.float64)
    torch.manual_seed(0)
    y = module.train()(x, Context())
    kept = y * T * 0.75  # the number of weights that are kept
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-9)
    assert kept.mean().item() / T == pytest.approx(0.75, abs=0.01)
    assert kept.unique().numel() > 5
    torch.testing.assert_close(module.eval()(x, Context()), torch.ones_like(x))


# -- feed-forward ------------------------------------------------------------------------------

FORMULAS = {
    "gelu": naive.gelu,
    "gelu-tanh": lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": torch.tanh,
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
}


def feedforward(x, p, activation):
    def one(token):
        h = linear(token, p, "lift")
        gated = activation == "swiglu"
        h = FORMULAS["silu"](linear(token, p, "gate")) * h if gated else FORMULAS[activation](h)
        return linear(h, p, "out")

    return naive.by_token(one, x)


@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [*FORMULAS, "swiglu"])
def test_feedforward_is_its_formula(activation, bias, projection):
    """Each activation, with and without biases and output matrix; outputs and gradients."""
    config = FeedForwardConfig(
        activation=activation, feedforward_bias=bias, feedforward_projection=projection
    )
    module = randomised(FeedForward(3, config=config).double())
    x = tokens(2, 3, 3)
    p = parameters(module)
    assert any(name.endswith("bias") for name in p) == bias
    assert ("out.weight" in p) == projection
    agree(module(x, Context()), feedforward(x, p, activation), x, module)


@pytest.mark.parametrize(
    ("dim", "options", "hidden"),
    [
        (48, {}, 192),
        (48, {"hidden": 100}, 100),
        (48, {"activation": "swiglu"}, 128),
        (50, {"activation": "swiglu"}, 136),  # 133.3, up to a multiple of 8
        (768, {"activation": "swiglu"}, 2048),
        (4096, {"activation": "swiglu"}, 10928),  # 10922.7
        (48, {"activation": "swiglu", "hidden": 5}, 5),
        (48, {"feedforward_projection": False}, 48),
        (48, {"activation": "swiglu", "feedforward_projection": False}, 48),
    ],
)
def test_hidden_width(dim, options, hidden):
    """The hidden width is 4 D, of a gated one 8/3 D up to a multiple of 8, or what is said."""
    with torch.device("meta"):
        module = FeedForward(dim, config=FeedForwardConfig(**options))
    assert module.lift.out_features == hidden


@pytest.mark.parametrize(
    ("options", "roles"),
    [
        ({}, ["in", "out"]),
        ({"activation": "swiglu"}, ["in", "in", "out"]),
        ({"feedforward_projection": False}, ["out"]),
        ({"feedforward_projection": False, "activation": "swiglu"}, ["in", "out"]),
    ],
)
def test_feedforward_matrices_by_role(options, roles):
    """Every matrix has a role, and a start of 0 for out makes the branch 0."""
    module = FeedForward(6, config=FeedForwardConfig(**options))
    assert [matrix.role for matrix in module.matrices()] == roles
    covered = {id(matrix.parameter) for matrix in module.matrices()}
    assert covered == {id(p) for p in module.parameters() if p.dim() == 2}
    start(module, "zero", Site(6, count=4), {})
    assert not module(torch.randn(2, 6), Context()).any()


def test_dropout_on_the_hidden_width():
    """In training a hidden unit is dropped before the output matrix; not in evaluation."""
    config = FeedForwardConfig(activation="relu", feedforward_dropout=0.5, hidden=1000)
    module = FeedForward(1, config=config).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
        module.out.bias.zero_()
    x = torch.zeros(3, 1, dtype=torch.float64)
    kept = module.train()(x, Context()) / 2
    torch.testing.assert_close(kept, kept.round())
    assert ((kept > 400) & (kept < 600)).all()
    assert (module.eval()(x, Context()) == 1000).all()


# -- GPT ---------------------------------------------------------------------------------------

ROTARY = EmbeddingConfig(positions="rotary")
LLAMA = {
    "norm": "rmsnorm",
    "embedding": ROTARY,
    "attention": AttentionConfig(kv_heads=1, attention_biases="none"),
    "feedforward": FeedForwardConfig(activation="swiglu", feedforward_bias=False),
}
CHANGES = {
    "rotary": {"embedding": ROTARY},
    "no positions": {"embedding": EmbeddingConfig(positions="none")},
    "head bias": {"head_bias": True},
    "tied head bias": {"head_bias": True, "tied": True},
    "kv_heads": {"attention": AttentionConfig(kv_heads=1)},
    "no projections": {
        "attention": AttentionConfig(attention_projection=False),
        "feedforward": FeedForwardConfig(feedforward_projection=False),
    },
    "relu2": {"feedforward": FeedForwardConfig(activation="relu2", hidden=5)},
    "llama": LLAMA,
    "all": {
        **LLAMA,
        "parallel": True,
        "attention": AttentionConfig(
            kv_heads=1, qkv_norm=True, value_residual=True, head_scale=True, canon_b=True
        ),
    },
}
each_change = pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)


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


@pytest.mark.parametrize("wiring", sorted(catalogue()))
def test_options_combine_with_every_wiring(wiring):
    """Under every wiring the branches get finite gradients, and the cache gives the logits."""
    model = gpt(wiring=wiring, start="xavier", **LLAMA)
    text = torch.randint(11, (2, 6))
    model(text).square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()
    randomised(model, 0.3).double()
    context = Context(cache={})
    first = model(text[:, :4], context)
    second = model(text[:, 4:], replace(context, past=4))
    got = torch.cat((first, second), dim=1)
    torch.testing.assert_close(got, model(text), rtol=1e-8, atol=1e-8)


@each_change
def test_flops_are_those_of_the_products(changes):
    """3 times the forward products, counted as they run, is `flops_per_token`."""
    model = gpt(**changes)
    model.choose("attention", "matmul")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 6, dtype=torch.long))
    found = counter.get_flop_counts()["Global"]
    convolved = sum(flops for op, flops in found.items() if "convolution" in str(op))
    kernels = sum(p.numel() for n, p in model.named_parameters() if "canon" in n)
    # A convolution here is one layer's kernel over 6 tokens and 3 before; the rule takes 6 N each.
    counted = (counter.get_total_flops() - convolved) / 6 + 2 * kernels
    assert model.flops_per_token() == pytest.approx(3 * counted)


@each_change
def test_parts_add_up(changes):
    """The parts hold every parameter once, the head its bias."""
    model = gpt(**changes)
    parts = model.parameters_by_part()
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    learned = model.config.embedding.positions == "learned"
    assert parts["position"] == (6 * 8 if learned else 0)
    head = (0 if model.config.tied else 88) + (11 if model.config.head_bias else 0)
    assert parts["head"] == head


@each_change
def test_gpt_is_causal(changes):
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
def test_gpt_works_after_the_meta_device(changes):
    hold_after_meta(lambda: gpt(**changes))


@each_path
@pytest.mark.parametrize("name", ["llama", "all"])
def test_gpt_runs_in_bfloat16(name, path):
    """Under autocast the options work in both attentions, near the float32 logits, cached too."""
    model = gpt(**CHANGES[name])
    model.choose("attention", path)
    text = torch.randint(11, (2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(text)
        context = Context(cache={})
        model(text[:, :5], context)
        model(text[:, 5:], replace(context, past=5))
    torch.testing.assert_close(low.float(), model(text), rtol=0.1, atol=0.02)


@pytest.mark.slow
def test_gpt_compiles_in_one_graph():
    """Compiled without a break, logits and gradients are the eager ones."""
    model = randomised(gpt(**LLAMA), 0.5).double()
    text, found = torch.arange(6)[None], []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        logits = function(text)
        found.append([logits, *torch.autograd.grad(logits.square().sum(), model.parameters())])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-9)


def test_without_positions_the_last_logits_know_no_order():
    """Without positions the last token sees the earlier ones as a set; with them it does not."""
    text = torch.tensor([[1, 2, 3, 4, 5]])
    mixed = torch.tensor([[3, 1, 4, 2, 5]])
    for positions, alike in [("none", True), ("rotary", False), ("learned", False)]:
        embedding = EmbeddingConfig(positions=positions)
        model = randomised(gpt(depth=1, embedding=embedding), 0.5).double()
        apart = (model(text)[0, -1] - model(mixed)[0, -1]).abs().max()
        assert (apart < 1e-10) == alike, positions


@pytest.mark.parametrize(
    ("start", "tied", "embedding", "head"),
    [
        ("normal", False, 0.1, 0.02),
        ("normal", True, 0.02, 0.02),
        ("gpt2", False, 0.02, 0.02),
        ("gpt2", True, 0.02, 0.02),
        ("torch", False, 1.0, (3 * 8) ** -0.5),
        ("torch", True, (3 * 8) ** -0.5, (3 * 8) ** -0.5),
    ],
)
def test_starts_of_the_ends(start, tied, embedding, head):
    """Embeddings and head have the spread that `embedding_start` names; a tied one is a head."""
    ends = EmbeddingConfig(embedding_start=start)
    model = gpt(vocab_size=2000, embedding=ends, tied=tied, head_bias=True)
    assert model.token.weight.std().item() == pytest.approx(embedding, rel=0.05)
    assert model.head.weight.std().item() == pytest.approx(head, rel=0.05)
    if start == "torch":
        assert model.head.bias.abs().max() <= 8**-0.5
        assert model.head.bias.std().item() == pytest.approx((3 * 8) ** -0.5, rel=0.1)
    else:
        assert not model.head.bias.any()


def test_dropout_on_the_embedding():
    """In training the sum of the embeddings is dropped and rescaled, in front of the stack."""
    ends = EmbeddingConfig(embedding_dropout=0.5)
    model = gpt(dim=8, embedding=ends, wiring="residual")
    seen = []
    model.stack.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    text = torch.arange(6)[None]
    model(text)
    model.train()(text)
    whole, dropped = seen
    assert torch.equal(whole, model.token(text) + model.position.weight)
    assert ((dropped == 0) | torch.isclose(dropped, 2 * whole)).all()
    assert 0.2 < (dropped == 0).float().mean() < 0.8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: gpt(heads=4, attention=AttentionConfig(kv_heads=3)),
            "kv_heads 3 does not divide heads 4 (allowed: 1, 2, 4)",
        ),
        (
            lambda: gpt(heads=4, attention=AttentionConfig(kv_heads=8)),
            "kv_heads 8 does not divide heads 4 (allowed: 1, 2, 4)",
        ),
        (lambda: AttentionConfig(kv_heads=-1), "kv_heads -1 must be at least 0"),
        (
            lambda: gpt(heads=8, embedding=ROTARY),
            "rotary positions turn pairs of channels, but heads have width 1 (dim 8 / heads 8); "
            "it must be even",
        ),
        (
            lambda: AttentionConfig(attention_biases="outs"),
            "unknown attention_biases 'outs'; did you mean 'out'? (known: all, qkv, out, none)",
        ),
        (
            lambda: AttentionConfig(attention_dropout=1.0),
            "attention_dropout 1.0 must be at least 0 and less than 1",
        ),
        (
            lambda: FeedForwardConfig(activation="swigluu"),
            "unknown activation 'swigluu'; did you mean 'swiglu'? "
            "(known: gelu, gelu-tanh, relu, relu2, silu, tanh, sigmoid, swiglu)",
        ),
        (lambda: FeedForwardConfig(hidden=-4), "hidden -4 must be at least 0"),
        (
            lambda: gpt(feedforward=FeedForwardConfig(hidden=16, feedforward_projection=False)),
            "hidden 16 must be dim 8 (or 0) without feedforward_projection",
        ),
        (
            lambda: EmbeddingConfig(positions="rope"),
            "unknown positions 'rope' (known: learned, rotary, none)",
        ),
        (
            lambda: EmbeddingConfig(embedding_dropout=-0.1),
            "embedding_dropout -0.1 must be at least 0 and less than 1",
        ),
        (
            lambda: GPTConfig(attention={"kv_head": 1}),
            "unknown option of attention 'kv_head'; did you mean 'kv_heads'? (known: kv_heads, "
            "attention_biases, attention_projection, attention_dropout, qk_norm, qkv_norm, "
            "value_residual, head_scale, joined_norm, output_norm, canon_a, canon_b)",
        ),
    ],
)
def test_refused(make, message):
    """What does not fit is refused with the value and what would fit."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole text is compared
        make()
    assert str(caught.value) == message


def test_flags_of_nested_configs_are_distinct():
    """The command line leaves out the nesting, so no two configs may share a field's name."""
    configs = (GPTConfig, AttentionConfig, FeedForwardConfig, EmbeddingConfig)
    names = [name for config in configs for name in config.__dataclass_fields__]
    assert len(names) == len(set(names))
