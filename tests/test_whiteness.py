"""Gradient whiteness: closed forms, noise of both colours, and deep plain against residual."""

import json
import math

import pytest
import torch
from torch import nn

from addnorm import GPT, GPTConfig
from addnorm.probe.whiteness import _inner_products, autocorrelation, brown_noise, whiteness

LINE = torch.tensor([[-2.0], [2.0]])


class Function(nn.Module):
    """A plain function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Deep(nn.Module):
    """The net of Balduzzi et al., section 2: one input, He start, batch norm, ReLU, He branches."""

    def __init__(self, depth, beta, width=64):
        super().__init__()
        self.first = nn.Linear(1, width)
        nn.init.normal_(self.first.weight)
        nn.init.uniform_(self.first.bias, -2, 2)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(depth))
        self.last = nn.Linear(width, 1)
        self.beta = beta  # None: no skip connection

    def forward(self, x):
        h = self.first(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            branch = layer(torch.relu(norm(h)))
            h = branch if self.beta is None else h + self.beta * branch
        return self.last(torch.relu(h))


def deep(depth, beta, seeds=3):
    """Return the mean autocorrelation and reversals over some nets."""
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        made = whiteness(Deep(depth, beta), LINE, batch_statistics=True, seed=seed)
        found.append([*made.autocorrelation, made.reversals])
    mean = torch.tensor(found).mean(0).tolist()
    return mean[:-1], mean[-1]


# -- closed forms


def test_a_linear_model_has_no_autocorrelation():
    model = nn.Linear(6, 3)
    made = whiteness(model, torch.randn(4, 6), points=32)
    assert made.constant == made.lines == 2
    assert all(map(math.isnan, made.autocorrelation + made.white_low))
    assert made.reversals == 0
    assert not made.white


def test_a_quadratic_has_the_autocorrelation_of_a_ramp():
    """The gradient of x^2 is linear in x, and a ramp t - m has a closed form."""
    n, lags = 40, 7
    made = whiteness(Function(lambda x: x.square()), LINE, points=n, lags=lags, batch=11)
    ramp = [t - (n - 1) / 2 for t in range(n)]
    whole = sum(r * r for r in ramp)
    expected = [sum(ramp[t] * ramp[t + k] for t in range(n - k)) / whole for k in range(lags + 1)]
    assert made.autocorrelation == pytest.approx(expected, rel=1e-5)
    assert made.reversals == pytest.approx(1 / 39)  # where the input passes 0


def test_a_sine_has_the_autocorrelation_of_a_cosine():
    n, turns = 200, 5
    line = torch.tensor([[0.0], [2 * math.pi * turns]])
    made = whiteness(Function(torch.sin), line, points=n, lags=40)
    wave = [math.cos(2 * math.pi * turns * t / (n - 1)) for t in range(n)]
    wave = [w - sum(wave) / n for w in wave]
    whole = sum(w * w for w in wave)
    for k in (0, 10, 20, 40):
        part = sum(wave[t] * wave[t + k] for t in range(n - k))
        assert made.autocorrelation[k] == pytest.approx(part / whole, abs=1e-4)
    assert made.autocorrelation[20] == pytest.approx(-0.9, abs=0.01)  # half a turn is 19.9 steps
    assert made.reversals == pytest.approx(2 * turns / (n - 1), abs=0.01)


def test_autocorrelation_of_several_dimensions_by_a_naive_loop():
    gradients = torch.randn(30, 4, dtype=torch.float64).cumsum(0)
    products, reversals = _inner_products(gradients)
    mean = gradients.mean(0)
    whole = sum(((g - mean) @ (g - mean)).item() for g in gradients)
    for k, value in enumerate(autocorrelation(products, 5)):
        part = sum(
            ((gradients[t] - mean) @ (gradients[t + k] - mean)).item() for t in range(30 - k)
        )
        assert value == pytest.approx(part / whole)
    turned = sum((gradients[t] @ gradients[t + 1]).item() < 0 for t in range(29))
    assert reversals == pytest.approx(turned / 29)


def test_brown_noise_against_simulated_walks():
    generator = torch.Generator().manual_seed(0)
    walks = torch.randn(64, 4000, generator=generator, dtype=torch.float64).cumsum(0)
    products, _ = _inner_products(walks)  # 4000 independent coordinates
    assert autocorrelation(products, 10) == pytest.approx(brown_noise(64, 10), abs=0.01)


def test_white_noise_lies_in_its_band():
    """A gradient of fresh noise: the band of one coordinate is 1.96 / sqrt(n) on either side."""
    torch.manual_seed(0)
    noise = torch.randn(256)

    def function(x):
        index = ((x.detach() + 2) / 4 * 255).round().long().clamp(0, 255)
        return x * noise[index]

    made = whiteness(Function(function), LINE)
    assert made.white_high[1] == pytest.approx(1.96 / 16, rel=0.25)
    assert made.white_low[1] == pytest.approx(-1.96 / 16, rel=0.25)
    inside = [
        low <= a <= high
        for low, a, high in zip(
            made.white_low[1:], made.autocorrelation[1:], made.white_high[1:], strict=True
        )
    ]
    assert sum(inside) >= 13  # of 15
    assert made.white
    assert abs(made.brownness) < 0.1
    assert made.reversals == pytest.approx(0.5, abs=0.1)


# -- networks


def test_one_layer_of_relu_is_brown():
    """Its gradient is a sum of steps at random places (Balduzzi et al., section 2.1)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 2000), nn.ReLU(), nn.Linear(2000, 1))
    nn.init.normal_(model[0].weight)
    with torch.no_grad():
        kinks = torch.empty(2000).uniform_(-2, 2)
        model[0].bias.copy_(-model[0].weight[:, 0] * kinks)
    made = whiteness(model, LINE, seed=1)
    assert made.autocorrelation[1] == pytest.approx(made.brown[1], abs=0.03)
    assert made.autocorrelation[15] == pytest.approx(made.brown[15], abs=0.25)
    assert not made.white


def test_plain_nets_whiten_with_depth_and_residual_ones_less():
    """Three nets each, width 64, 256 points, batch norm over the line.

    Measured, lag 1 of the mean: plain 0.97 at depth 1, 0.17 at 10, -0.04 at 24; with skips and
    beta = 1 0.67 at 24, with beta = 0.1 0.95. Reversals at 24: 0.50, 0.22, 0.04.
    """
    shallow, _ = deep(1, None)
    plain, plain_turns = deep(24, None)
    skip, skip_turns = deep(24, 1.0)
    scaled, scaled_turns = deep(24, 0.1)
    assert shallow[1] > 0.93
    assert abs(plain[1]) < 0.1
    assert 0.55 < skip[1] < 0.85
    assert scaled[1] > 0.9
    assert plain_turns == pytest.approx(0.5, abs=0.06)
    assert plain_turns > 0.3 > skip_turns > 0.1 > scaled_turns


def test_the_batch_size_does_not_matter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(2, 5)
    one, two = (whiteness(model, x, points=50, batch=b) for b in (7, 64))
    assert one.autocorrelation == pytest.approx(two.autocorrelation, abs=1e-5)


def test_error_over_lines_and_determinism():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(6, 5)
    made = whiteness(model, x, points=40, lags=5)
    again = whiteness(model, x, points=40, lags=5)
    assert made.autocorrelation == again.autocorrelation
    assert made.white_high == again.white_high
    assert made.lines == 3
    alone = whiteness(model, x[:2], points=40, lags=5)
    assert math.isnan(alone.error[1])
    others = [whiteness(model, x[2 * i : 2 * i + 2], points=40, lags=5) for i in range(3)]
    assert made.error[0] == pytest.approx(0, abs=1e-6)
    assert made.autocorrelation[1] == pytest.approx(
        sum(o.autocorrelation[1] for o in others) / 3, abs=0.1
    )  # each with a projection of its own


# -- tokens, named modules, arguments


def gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(depth=2, dim=16, heads=2, context=8, vocab_size=11))


def test_tokens_run_along_the_embedding():
    model = gpt()
    tokens = torch.randint(11, (2, 8))
    made = whiteness(model, tokens, points=32, lags=4)
    assert made.where == "token"
    model.eval()
    ends = model.token(tokens)
    t = torch.linspace(0, 1, 32)[:, None, None]
    path = (ends[0] + t * (ends[1] - ends[0])).detach().requires_grad_()
    positions = model.position.weight[:8]
    out = model.head(model.norm(model.stack(path + positions)))
    direction = torch.randn(out.shape[1:], generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((out * direction).sum(), path)
    products, _ = _inner_products(gradient.flatten(1).double())
    assert made.autocorrelation == pytest.approx(autocorrelation(products, 4), abs=1e-5)


def test_a_module_by_name():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    x = torch.randn(2, 3)
    inner = whiteness(model, x, at="1", points=20, lags=3)
    tail = whiteness(model[2:], model[:2](x).detach(), points=20, lags=3)
    assert inner.autocorrelation == pytest.approx(tail.autocorrelation, abs=1e-5)
    assert inner.where == "1"


class TwoArguments(nn.Module):
    """Keyword arguments, one of them for every entry of the batch."""

    def forward(self, *, x, shift, scale):
        return {"out": scale * (x + shift).sin()}


def test_other_arguments_are_those_of_the_first_entry():
    x, shift = torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0], [50.0]])
    made = whiteness(TwoArguments(), {"x": x, "shift": shift, "scale": 2.0}, points=64, lags=3)
    alone = whiteness(Function(lambda z: 2 * (z + 1).sin()), x, points=64, lags=3)
    assert made.autocorrelation == pytest.approx(alone.autocorrelation, abs=1e-5)


@pytest.mark.parametrize(
    ("inputs", "settings", "message"),
    [
        (torch.zeros(1, 3), {}, "a line needs two inputs; the batch holds 1"),
        (torch.zeros(2, 3), {}, "entries 0 and 1 are equal: no line"),
        (torch.randn(2, 3), {"lags": 256}, "lags 256 must be at least 1 and less than points, 256"),
        (torch.randn(2, 3), {"batch": 0}, "batch 0 must be at least 1"),
        (torch.randn(2, 3), {"at": "wieght"}, "unknown module 'wieght'"),
        (torch.zeros(2, 3).long(), {}, "no nn.Embedding was called"),
        (torch.randn(3), {}, r"must hold a tensor \(B, \.\.\.\)"),
    ],
)
def test_what_cannot_be_is_refused(inputs, settings, message):
    with pytest.raises(ValueError, match=message):
        whiteness(Function(lambda x: x * 1.0), inputs, **settings)


def test_a_module_without_the_batch_is_refused():
    with pytest.raises(ValueError, match=r"the output of position is \(8, 16\), which does not"):
        whiteness(gpt(), torch.randint(11, (2, 8)), at="position")


def test_the_budget_leaves_lines_out_but_not_the_first():
    x = torch.randn(10, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    seen = []
    made = whiteness(model, x, points=20, lags=3, budget=0.0, progress=lambda *p: seen.append(p))
    assert made.lines == 1
    assert seen == [(20, 100)]


def test_nothing_changes():
    model = Deep(3, None)
    model.norms[0].eval()
    model.first.weight.grad = torch.ones(64, 1)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    wrong = torch.randn(2, 7)
    modes, rng = [m.training for m in model.modules()], torch.get_rng_state()
    for at in (None, "first"):
        whiteness(model, LINE, batch_statistics=True, at=at)
    with pytest.raises(RuntimeError):
        whiteness(model, wrong, at="first")
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(model.first.weight.grad, torch.ones(64, 1))
    assert all(not m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters() if p is not model.first.weight)


def test_the_result_is_plain_data():
    made = whiteness(Function(torch.sin), LINE, points=20, lags=3)
    facts = json.loads(json.dumps(made.to_dict()))
    assert facts["brownness"] == made.brownness
    assert len(facts["autocorrelation"]) == 4
