"""nGPT: its formulas written out, the sphere that everything lies on, and its training."""

import math
from dataclasses import replace

import naive
import pytest
import torch
from test_models import agree, randomised
from torch import nn

from addnorm import Runtime, TrainConfig
from addnorm.branches import Branch, Context
from addnorm.models.layers import ATTENTION_PATHS
from addnorm.models.ngpt import (
    NGPT,
    Gain,
    NGPTConfig,
    SphereAttention,
    SphereFeedForward,
    SphereUpdate,
)
from addnorm.probe.vitals import xray
from addnorm.training.loop import Constrained, train_loop
from addnorm.training.tune import Choice

each_path = pytest.mark.parametrize("path", ATTENTION_PATHS)


def ngpt(**changes):
    shape = {"depth": 2, "dim": 8, "heads": 2, "context": 6, "vocab_size": 11}
    return NGPT(NGPTConfig(**{**shape, **changes})).eval()


def tokens(B, T, D):
    return torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)


# -- the formulas, one token at a time ---------------------------------------------------------


def unit(x):
    return x / sum(value**2 for value in x) ** 0.5


def matvec(weight, x):
    return torch.stack([sum(row * x) for row in weight])


def attention(x, p, heads):
    """Return W_o of the heads: softmax(sqrt(E) q k) v with q and k of norm s."""
    B, T, D = x.shape
    E = D // heads
    out = []
    for b in range(B):
        fused = [matvec(p["qkv.weight"], x[b, t]) for t in range(T)]
        joined = [[] for _ in range(T)]
        for h in range(heads):
            q, k, v = ([f[i * D + h * E : i * D + (h + 1) * E] for f in fused] for i in range(3))
            s = p["scale.weight"][h * E : (h + 1) * E] * math.sqrt(D)  # stored at 1 / sqrt(D)
            for t in range(T):
                scores = [math.sqrt(E) * sum(s * unit(q[t]) * s * unit(k[i])) for i in range(t + 1)]
                weights = [torch.exp(score - max(scores)) for score in scores]
                mixed = sum(weight * v[i] for i, weight in enumerate(weights)) / sum(weights)
                joined[t].append(mixed)
        out += [matvec(p["out.weight"], torch.cat(y)) for y in joined]
    return torch.stack(out).reshape(B, T, D)


def feedforward(x, p):
    """Return W_out (u silu(v)) of one token, u and v of size 1 by the factor sqrt(D)."""
    lifted = matvec(p["lift.weight"], x) * p["scale.weight"] * math.sqrt(len(x))
    u, v = lifted[: len(lifted) // 2], lifted[len(lifted) // 2 :]
    return matvec(p["out.weight"], u * v / (1 + torch.exp(-v)))


def update(h, f, alpha):
    """Return norm(h + |alpha| (norm(f) - h)) of one token."""
    return unit(h + abs(alpha) * (unit(f) - h))


@each_path
def test_attention_is_its_formula(path):
    """Attention is softmax(sqrt(E) q k) v with normalised q and k; outputs and gradients."""
    branch = randomised(SphereAttention(6, 2, path=path).double(), 0.7)
    x = tokens(2, 4, 6)
    agree(branch(x, Context()), attention(x, dict(branch.named_parameters()), 2), x, branch)


def test_feedforward_is_its_formula():
    """The feed-forward is W_out (u silu(v)) with learned factors around sqrt(D)."""
    branch = randomised(SphereFeedForward(3).double())
    x = tokens(2, 3, 3)
    p = dict(branch.named_parameters())
    want = naive.by_token(lambda token: feedforward(token, p), x)
    agree(branch(x, Context()), want, x, branch)


def test_the_model_is_its_formula():
    """Logits are s_z (W h), h two updates a layer of norm(token + position)."""
    model = randomised(ngpt(dim=4, vocab_size=5, context=4).double(), 0.7)
    text = torch.randint(5, (2, 4))
    p = dict(model.named_parameters())
    h = torch.stack(
        [
            unit(p["token.weight"][token] + p["position.weight"][t])
            for row in text
            for t, token in enumerate(row)
        ]
    ).reshape(2, 4, 4)
    for i in range(4):
        own = {k.removeprefix(f"connections.{i}."): v for k, v in p.items() if f"ons.{i}." in k}
        inside = {k.removeprefix("branch."): v for k, v in own.items()}
        if i % 2 == 0:
            f = attention(h, inside, 2)
        else:
            f = naive.by_token(lambda token, inside=inside: feedforward(token, inside), h)
        alpha = own["alpha.weight"] * 0.05 * math.sqrt(4)
        pairs = zip(h.flatten(0, 1), f.flatten(0, 1), strict=True)
        h = torch.stack([update(one, other, alpha) for one, other in pairs]).reshape(2, 4, 4)
    logits = naive.by_token(lambda token: matvec(p["head.weight"], token), h)
    want = logits * p["scale.weight"] * math.sqrt(4)
    got = model(text)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    weights = torch.randn_like(want)
    ours = torch.autograd.grad((got * weights).sum(), p.values())
    theirs = torch.autograd.grad((want * weights).sum(), p.values())
    for name, one, other in zip(p, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=name)


class Given(Branch):
    """A branch that returns one given tensor."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x, context):
        return self.f


def test_an_update_has_the_numbers_of_the_authors_code():
    """norm(h + |a| (norm(f) - h)) for h = norm(sin(1, 2, 3, 4)), f = 2 sin(5, ..., 8), a = .05."""
    h = nn.functional.normalize(torch.arange(1.0, 5).sin()[None], dim=-1)
    f = 2 * torch.arange(5.0, 9).sin()[None]
    torch.testing.assert_close(
        h, torch.tensor([[0.576897, 0.623397, 0.096749, -0.51885]]), rtol=0, atol=1e-6
    )
    want = torch.tensor([[0.56665, 0.639043, 0.123903, -0.505153]])
    step = SphereUpdate(Given(f), 4, 0.05)
    torch.testing.assert_close(step(h, Context()), want, rtol=0, atol=1e-6)
    with torch.no_grad():
        step.alpha.weight.neg_()  # only |a| counts
    torch.testing.assert_close(step(h, Context()), want, rtol=0, atol=1e-6)


# -- the sphere --------------------------------------------------------------------------------


def streams(model, text):
    """Return h after every connection."""
    seen, hooks = [], []
    for connection in model:
        hooks.append(connection.register_forward_hook(lambda _m, _i, out: seen.append(out)))
    model(text)
    for hook in hooks:
        hook.remove()
    return seen


def test_the_stream_has_norm_one_everywhere():
    """|h| = 1 after every connection, at the start and at random parameters."""
    text = torch.randint(11, (2, 6))
    for model in (ngpt(depth=5), randomised(ngpt(depth=5))):
        seen = streams(model, text)
        assert len(seen) == 10
        for h in seen:
            torch.testing.assert_close(h.norm(dim=-1), torch.ones(2, 6))


def test_without_a_step_the_model_is_the_identity():
    """With a = 0 every connection returns its stream."""
    model, text = ngpt(), torch.randint(11, (2, 6))
    for connection in model:
        nn.init.zeros_(connection.alpha.weight)
    h = nn.functional.normalize(model.token(text) + model.position.weight, dim=-1)
    for after in streams(model, text):
        torch.testing.assert_close(after, h)


def norms(model):
    """Return the norms along the axis of width D, by parameter: columns of out, else rows."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            found[name] = parameter.norm(dim=0 if name.endswith("out.weight") else 1)
    return found


def test_every_matrix_lies_on_the_sphere_after_a_step():
    """At the start and after `after_step` every row, or column of an out matrix, has norm 1."""
    model = ngpt()
    assert len(norms(model)) == 3 + 4 * 2
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.arange(6)[None]).square().sum().backward()
    for moved in (False, True):
        if moved:
            optimizer.step()
            assert any((n - 1).abs().max() > 1e-3 for n in norms(model).values())
            model.after_step()
        for name, lengths in norms(model).items():
            torch.testing.assert_close(lengths, torch.ones_like(lengths), msg=name)


def test_a_step_back_to_the_sphere_keeps_the_directions():
    """`after_step` shortens or lengthens; applied again it changes nothing."""
    model = randomised(ngpt().double())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.after_step()
    once = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.after_step()
    for name, p in model.named_parameters():
        if p.dim() == 2:
            axis = 0 if name.endswith("out.weight") else 1
            torch.testing.assert_close(
                once[name], before[name] / before[name].norm(dim=axis, keepdim=True)
            )
        else:
            assert torch.equal(once[name], before[name])
        torch.testing.assert_close(p, once[name], rtol=1e-14, atol=0)


def test_vectors_start_where_the_paper_says():
    """a is .05 stored as 1/sqrt(D), s and s_z 1 stored as 1/sqrt(D), s_u and s_v sqrt(D) as 1."""
    model = ngpt(dim=16, heads=2)
    attention, feedforward = (model.connections[i].branch for i in range(2))
    for gain, width, value, stored in [
        (model.connections[0].alpha, 16, 0.05, 0.25),
        (attention.scale, 16, 1.0, 0.25),
        (feedforward.scale, 2 * 4 * 16, 4.0, 1.0),
        (model.scale, 11, 1.0, 0.25),
    ]:
        assert gain.weight.shape == (width,)
        torch.testing.assert_close(gain(), torch.full((width,), value))
        torch.testing.assert_close(gain.weight, torch.full((width,), stored), check_dtype=False)


def test_a_gain_moves_by_init_over_scale():
    """A step of 1 on the stored vector moves its value by init / scale."""
    gain = Gain(3, init=0.05, scale=0.25)
    with torch.no_grad():
        gain.weight.add_(1)
    torch.testing.assert_close(gain(), torch.full((3,), 0.05 + 0.2))


# -- the model ---------------------------------------------------------------------------------


@each_path
def test_ngpt_is_causal_and_its_cache_exact(path):
    """Later tokens change nothing earlier; through the cache the logits are the same."""
    model = randomised(ngpt().double(), 0.5)
    model.choose("attention", path)
    assert {m.path for m in model.modules() if isinstance(m, SphereAttention)} == {path}
    text = torch.randint(11, (2, 6))
    before = model(text)
    for t in range(6):
        changed = text.clone()
        changed[:, t] = (text[:, t] + 1) % 11
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        assert ((after[:, t] - before[:, t]).abs().amax(-1) > 1e-4).all(), t
    context = Context(cache={})
    steps = [model(text[:, t : t + 1], replace(context, past=t)) for t in range(6)]
    torch.testing.assert_close(torch.cat(steps, dim=1), before, rtol=1e-9, atol=1e-9)


def test_every_parameter_gets_a_gradient():
    """At the start every parameter has a gradient."""
    model = ngpt()
    text = torch.randint(11, (4, 6))
    nn.functional.cross_entropy(model(text).flatten(0, 1), text.flatten()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_nothing_decays():
    """Weight decay is 0 for every parameter, and each lies in one group."""
    model = ngpt()
    groups = model.parameter_groups(0.1)
    assert {group["weight_decay"] for group in groups} == {0.0}
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_ngpt_works_after_the_meta_device():
    """An nGPT made on the meta device and reset is the one made in memory and reset."""
    made = ngpt()
    with torch.device("meta"):
        late = ngpt()
    late = late.to_empty(device="cpu")
    for model in (made, late):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))  # what the reset forgets stays visible
        torch.manual_seed(1)
        model.reset_parameters()
    for (name, ours), theirs in zip(late.named_parameters(), made.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_ngpt_survives_its_state_dict():
    """The state of one model, loaded into another, gives the same logits."""
    one, other, text = ngpt(), ngpt(), torch.arange(6)[None]
    assert not torch.equal(one(text), other(text))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(text), other(text))


def test_ngpt_compiles_in_one_graph():
    """Compiled without a break, logits and gradients are the eager ones."""
    model, text, found = ngpt().double(), torch.arange(6)[None], []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        logits = function(text)
        found.append([logits, *torch.autograd.grad(logits.square().sum(), model.parameters())])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-9)


@each_path
def test_ngpt_runs_in_bfloat16(path):
    """Under autocast the logits are near the float32 ones, through the cache too."""
    model, text = ngpt(), torch.randint(11, (2, 6))
    model.choose("attention", path)
    context = Context(cache={})
    with torch.autocast("cpu", torch.bfloat16):
        low = model(text)
        model(text[:, :5], context)
        model(text[:, 5:], replace(context, past=5))
    torch.testing.assert_close(low.float(), model(text), rtol=0.05, atol=0.05)


def test_the_xray_finds_its_connections():
    """The X-ray of an nGPT measures its 2 depth connections."""
    text = torch.randint(11, (2, 6))
    assert len(xray(ngpt(), text, text).connections) == 4


class Pattern:
    """Text that counts upwards: the next token is one more, modulo 11."""

    unit = "tokens"

    def training_batch(self, seed, step, size):
        first = torch.Generator().manual_seed(1000 * seed + step)
        begin = torch.randint(11, (size, 1), generator=first)
        text = (begin + torch.arange(7)) % 11
        return text[:, :6].numpy(), text[:, 1:].numpy()

    def validation_batches(self, size, batches):
        for step in range(batches):
            yield self.training_batch(1, step, size)


def test_the_trainer_keeps_ngpt_on_the_sphere():
    """The trainer calls `after_step` before the first step and after each; the loss falls."""
    model, calls = ngpt(), []
    assert isinstance(model, Constrained)
    with torch.no_grad():
        model.token.weight.mul_(3)  # as a model that was made without care
    inside = model.after_step

    def after_step():
        if not calls:
            assert (model.token.weight.norm(dim=1) > 2).all()
        inside()
        calls.append(max((n - 1).abs().max().item() for n in norms(model).values()))

    model.after_step = after_step
    config = TrainConfig(steps=80, batch=8, lr=2e-2, warmup=0, eval_every=80, eval_batches=2)
    run = train_loop(model, Pattern(), config, Runtime("cpu"), choice=Choice())
    assert len(calls) == 81
    assert max(calls) < 1e-5
    assert run.evaluations[-1][1] < 0.5 * run.evaluations[0][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth 0 must be at least 1"),
        ({"vocab_size": 0}, "vocab_size 0 must be at least 1"),
        ({"heads": 3}, "heads 3 does not divide dim 8 (allowed: 1, 2, 4, 8)"),
        ({"alpha": 0.0}, "alpha 0.0 must be above 0 and at most 1"),
        ({"alpha": float("nan")}, "alpha nan must be above 0 and at most 1"),
    ],
)
def test_ngpt_refuses(changes, message):
    """A configuration that does not fit is refused with the value and what would fit."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole text is compared
        ngpt(**changes)
    assert str(caught.value) == message


def test_ngpt_refuses_too_many_positions():
    """More positions than the model was built with are refused, those in the cache counted."""
    with pytest.raises(ValueError, match="7 positions, but the model was built for 6"):
        ngpt()(torch.zeros(1, 4, dtype=torch.long), Context(past=3))
