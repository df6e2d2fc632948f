"""Generation: the cache, many prompts at once, what is drawn from, streaming, what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from addnorm.branches import Context
from addnorm.contract import catalogue
from addnorm.generation import Sampling, distribution, draw, generate
from addnorm.models.gpt import GPT, GPTConfig
from addnorm.models.layers import AttentionConfig, EmbeddingConfig, FeedForwardConfig
from addnorm.models.ngpt import NGPT, NGPTConfig

SHAPE = {"depth": 2, "dim": 16, "heads": 4, "context": 10, "vocab_size": 13}
CANON = {
    "attention": AttentionConfig(canon_a=True, canon_b=True),
    "feedforward": FeedForwardConfig(canon_c=True, canon_d=True),
}
# Options that could keep something of the past, or number the positions otherwise.
OPTIONS = {
    "rotary": {"embedding": EmbeddingConfig(positions="rotary")},
    "no positions": {"embedding": EmbeddingConfig(positions="none")},
    "grouped": {"attention": AttentionConfig(kv_heads=2)},
    "grouped rotary": {
        "attention": AttentionConfig(kv_heads=1, qk_norm=True),
        "embedding": EmbeddingConfig(positions="rotary"),
    },
    "values": {"attention": AttentionConfig(value_residual=True)},
    "canon": CANON,
    "parallel": {"parallel": True},
    "hyper rotary": {"wiring": "hyper", "embedding": EmbeddingConfig(positions="rotary")},
    "attnres canon": {"wiring": "attnres", **CANON},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def randomised(model, scale=0.3):
    """Move every parameter away from its start, where many schemes do nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model.eval()


def gpt(**changes):
    return randomised(GPT(GPTConfig(**{**SHAPE, **changes})))


class Own(nn.Module):
    """A user's model without a cache: the logits count what came before, all of it."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(13, 13))

    def forward(self, tokens):
        logits = self.table[tokens].cumsum(1) * torch.arange(1, tokens.shape[1] + 1)[:, None]
        return type("Output", (), {"logits": logits})


def naive(model, prompt, context, sampling):
    """Generate with the whole window each time, one prompt, no cache."""
    generator = torch.Generator().manual_seed(sampling.seed)
    window, out = list(prompt)[-context:], []
    for _ in range(sampling.tokens):
        if len(window) > context:
            window = window[-max(1, context // 2) :]
        with torch.no_grad():
            output = model(torch.tensor([window]))
        logits = output if isinstance(output, torch.Tensor) else output.logits
        out.append(draw(logits[0, -1], sampling, generator))
        window.append(out[-1])
    return out


def rows(steps):
    return [list(row) for row in zip(*steps, strict=True)]


# -- the cache ---------------------------------------------------------------------------------


def agree_in_pieces(model, sizes):
    """Logits of a text read in pieces equal those of the whole."""
    model = model.double()
    tokens = torch.randint(13, (3, sum(sizes)))
    with torch.no_grad():
        want, cache, past, got = model(tokens), Context(cache={}), 0, []
        for size in sizes:
            got.append(model(tokens[:, past : past + size], replace(cache, past=past)))
            past += size
    assert want.std() > 1e-3
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("wiring", catalogue())
def test_cached_logits_equal_the_uncached_ones_under_every_wiring(wiring):
    agree_in_pieces(gpt(wiring=wiring), [4, 1, 1, 1, 2, 1])


@each_option
def test_cached_logits_equal_the_uncached_ones_with_every_option(options):
    agree_in_pieces(gpt(**options), [3, 1, 1, 4, 1])


def test_cached_logits_of_ngpt_equal_the_uncached_ones():
    agree_in_pieces(randomised(NGPT(NGPTConfig(**SHAPE))), [5, 1, 1, 3])


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5).filter(lambda s: sum(s) <= 10))
def test_any_way_to_cut_a_text_gives_the_same_logits(sizes):
    agree_in_pieces(gpt(wiring="attnres", **OPTIONS["grouped rotary"]), sizes)


# -- many prompts at once ----------------------------------------------------------------------

MODELS = {
    "gpt": gpt,
    "rotary canon": lambda: gpt(**{**OPTIONS["rotary"], **CANON}),
    "hyper": lambda: gpt(wiring="hyper"),
    "attnres": lambda: gpt(wiring="attnres"),
    "ngpt": lambda: randomised(NGPT(NGPTConfig(**SHAPE)), 0.05),
    "own": Own,
}
PROMPTS = [[1, 2, 3], [4], [3, 2, 1], [5, 6, 7, 8, 9, 10, 11, 12, 0, 1, 2, 3], [4], [7] * 10]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "drawing", [Sampling(14, 0), Sampling(14, 1.0), Sampling(14, 0.9, 6, 0.8, 3)], ids=str
)
def test_many_prompts_give_what_each_gives_alone_without_a_cache(make, drawing):
    """Past the window too: 14 tokens on top of up to 12 in a window of 10."""
    model = make()
    together = rows(generate(model, PROMPTS, 10, drawing))
    for i, (prompt, got) in enumerate(zip(PROMPTS, together, strict=True)):
        alone = replace(drawing, seed=drawing.seed + i)
        assert got == naive(model, prompt, 10, alone)
    if drawing.temperature:
        assert together[1] != together[4], "the same prompt twice gives two texts"


def test_a_row_does_not_depend_on_the_others():
    model, drawing = gpt(), Sampling(12, 1.0)
    first = rows(generate(model, PROMPTS, 10, drawing))
    other = rows(generate(model, [*PROMPTS[:3], [0], [0, 0], *PROMPTS[5:], [1]], 10, drawing))
    assert [first[i] for i in (0, 1, 2, 5)] == [other[i] for i in (0, 1, 2, 5)]


@pytest.mark.parametrize("context", [1, 2, 3, 7])
def test_a_smaller_window_is_the_naive_one(context):
    model, drawing = gpt(), Sampling(15, 1.0)
    (got,) = rows(generate(model, [[1, 2, 3, 4]], context, drawing))
    assert got == naive(model, [1, 2, 3, 4], context, drawing)


def test_equal_lengths_share_one_forward_pass_and_later_ones_read_one_token():
    model, shapes = gpt(), []
    model.token.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    list(generate(model, [[1, 2, 3], [4], [3, 2, 1]], 10, Sampling(3)))
    assert shapes == [(2, 3), (1, 1)] + [(2, 1), (1, 1)] * 2


def test_nothing_is_computed_before_the_first_token_is_asked_for():
    model, calls = gpt(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    steps = generate(model, [[1]], 10, Sampling(5))
    assert not calls
    assert len(next(steps)) == 1
    assert len(calls) == 1
    with torch.enable_grad():
        assert torch.is_grad_enabled()
        next(steps)
        assert torch.is_grad_enabled(), "a suspended generation leaves the mode alone"


# -- what is drawn from ------------------------------------------------------------------------


def naive_distribution(logits, temperature, top_k, top_p):
    """Softmax, top-k and nucleus in plain Python, ids in the order of falling probability."""
    if temperature == 0:
        best = max(range(len(logits)), key=lambda i: (logits[i], -i))
        return [float(i == best) for i in range(len(logits))]
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[: top_k or None]
    total, reached, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        kept.append(i)
        reached += weights[i]
        if reached >= top_p * total:
            break
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@settings(max_examples=300, deadline=None)
@given(
    logits=st.lists(st.integers(-30, 30).map(lambda i: i / 4), min_size=1, max_size=12),
    temperature=st.sampled_from([0.0, 1e-3, 0.3, 0.8, 1.0, 5.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1e-9, 0.1, 0.37, 0.62, 0.9, 0.999, 1.0]),
)
@example(logits=[1.0, 1.0, -30.0], temperature=1.0, top_k=2, top_p=0.5)  # reached exactly
def test_the_distribution_is_that_of_a_naive_one(logits, temperature, top_k, top_p):
    """With ties, which hypothesis likes to draw."""
    got = distribution(torch.tensor(logits), Sampling(1, temperature, top_k, top_p))
    want = naive_distribution(logits, temperature, top_k, top_p)
    torch.testing.assert_close(got, torch.tensor(want).double(), rtol=1e-6, atol=1e-9)


def test_draws_follow_the_distribution():
    """5,000 draws: each frequency within five standard errors."""
    logits, drawing = torch.tensor([0.3, -1.0, 2.0, 1.0, 0.3]), Sampling(1, 0.7, 4, 0.95)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(5)
    for _ in range(5_000):
        counts[draw(logits, drawing, generator)] += 1
    p = distribution(logits, drawing)
    assert (p > 0).tolist() == [True, False, True, True, True]
    error = (counts / 5_000 - p).abs()
    assert (error <= 5 * (p * (1 - p) / 5_000).sqrt()).all()


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e300])
def test_any_temperature_gives_probabilities(temperature):
    got = distribution(torch.tensor([1.0, 3.0, -torch.inf]), Sampling(1, temperature))
    want = [0.5, 0.5, 0.0] if temperature > 1 else [0.0, 1.0, 0.0]
    assert got.tolist() == want


def test_a_seed_means_the_same_draws_as_ever():
    """Golden: the numbers that plain multinomial draws gave before top-p existed."""
    logits = torch.linspace(-1, 1, 9).sin()
    generator, other = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    want = [
        int(torch.multinomial(torch.softmax(logits / 0.8, -1), 1, generator=other))
        for _ in range(50)
    ]
    assert [draw(logits, Sampling(1), generator) for _ in range(50)] == want


# -- streaming ---------------------------------------------------------------------------------


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tokens": 0}, "tokens 0 must be at least 1"),
        ({"temperature": -0.1}, "temperature -0.1 must be at least 0 and finite"),
        ({"temperature": math.inf}, "temperature inf must be at least 0 and finite"),
        ({"temperature": math.nan}, "temperature nan must be at least 0 and finite"),
        ({"top_k": -1}, "top_k -1 must be at least 0 (0: all tokens)"),
        ({"top_p": 0.0}, "top_p 0.0 must be above 0 and at most 1 (1: all tokens)"),
        ({"top_p": 1.1}, "top_p 1.1 must be above 0 and at most 1 (1: all tokens)"),
        ({"top_p": math.nan}, "top_p nan must be above 0"),
        ({"seed": -1}, "seed -1 must be at least 0 and below 2^63"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        Sampling(**setting)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("prompts", "context", "message"),
    [
        ([], 10, "there is no prompt; give at least one"),
        ([[]], 10, "the prompt is empty; give at least one token"),
        ([[1], []], 10, "prompt 2 of 2 is empty; give at least one token"),
        ([[1, 13]], 10, "the prompt has the token 13; the model knows 0 to 12"),
        ([[1], [-1]], 10, "prompt 2 of 2 has the token -1; the model knows 0 to 12"),
        ([[1]], 0, "context 0 must be from 1 to 10, which the model was built for"),
        ([[1]], 11, "context 11 must be from 1 to 10, which the model was built for"),
    ],
)
def test_bad_prompts_are_refused_at_the_call(prompts, context, message):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        generate(gpt(), prompts, context)
    assert str(error.value) == message


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_diverged_model_is_named_as_such(bad, temperature):
    model = gpt()
    with torch.no_grad():
        model.head.weight[3] = bad
    with pytest.raises(ValueError, match=r"^the largest logit is (nan|inf): the model has diver"):
        next(generate(model, [[1]], 10, Sampling(1, temperature)))
