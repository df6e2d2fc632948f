"""The loss landscape: closed forms, naive loops, honest errors, and weights put back."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn

from addnorm import GPT, GPTConfig
from addnorm.probe import landscape as module
from addnorm.probe import surface as surfaces
from addnorm.probe.landscape import filter_normalised, landscape, line, trajectory
from addnorm.probe.surface import LEVELS, Landscape, barycentric, chebyshev


class Quadratic(nn.Module):
    """The loss sum(W^2) / 2 as a model: its landscape is a paraboloid."""

    def __init__(self, rows=4, columns=6):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns, dtype=torch.float64))

    def forward(self, _x):
        return {"loss": self.weight.square().sum() / 2}


def small_net(seed=0, width=16, depth=2):
    torch.manual_seed(seed)
    layers = [nn.Linear(8, width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def small_batch():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(32, 8, generator=generator)
    return x, (x[:, :3] + 0.1 * x[:, 3:6]).argmax(1)


def fitted(model, steps=60):
    x, y = small_batch()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    states = [copy.deepcopy(model.state_dict())]
    for i in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if i % 10 == 9:
            states.append(copy.deepcopy(model.state_dict()))
    return states


def numbers(made):
    """Everything but the time it took."""
    return {k: v for k, v in made.to_dict().items() if k != "seconds"}


# -- directions


def test_filter_normalisation_against_its_definition():
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.ConvTranspose2d(5, 4, 2),
        nn.LayerNorm((4, 2)),
        nn.Linear(6, 2),
        nn.Embedding(9, 3),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    direction = filter_normalised(model, torch.Generator().manual_seed(3))
    assert set(direction) == {"0.weight", "2.weight", "4.weight", "5.weight"}  # no norm, no bias
    for name, step in direction.items():
        weight = model.get_parameter(name)
        if name == "2.weight":  # a transposed convolution counts its filters on the second axis
            weight, step = weight.transpose(0, 1), step.transpose(0, 1)
        assert step.shape == weight.shape
        for filter_of_step, filter_of_weight in zip(step, weight, strict=True):
            assert filter_of_step.norm().item() == pytest.approx(filter_of_weight.norm().item())
    again = filter_normalised(model, torch.Generator().manual_seed(3))
    assert all(torch.equal(again[n], direction[n]) for n in direction)
    assert len({round(float(r.sum()), 6) for r in direction["5.weight"]}) == 9  # rows differ


def test_a_tied_matrix_is_moved_once():
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth=1, dim=8, heads=2, context=4, vocab_size=5))
    tied = [n for n, p in model.named_parameters(remove_duplicate=False) if p.dim() >= 2]
    direction = filter_normalised(model, torch.Generator())
    held = {id(model.get_parameter(name)) for name in tied}
    assert len(direction) == len(held)


def test_a_model_without_matrices_is_refused():
    with pytest.raises(ValueError, match="LayerNorm has no matrix that a direction could move"):
        landscape(nn.LayerNorm(3), torch.ones(2, 3))


# -- interpolation


@pytest.mark.parametrize("nodes", LEVELS[:4])
def test_interpolation_is_exact_for_polynomials_of_lower_degree(nodes):
    at = torch.linspace(-1, 1, 51, dtype=torch.float64)
    matrix = barycentric(nodes, at)
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(nodes, generator=generator, dtype=torch.float64)

    def polynomial(x):
        return sum(c * x**k for k, c in enumerate(coefficients))

    torch.testing.assert_close(matrix @ polynomial(chebyshev(nodes)), polynomial(at))
    above = chebyshev(nodes) ** nodes  # one degree more is not, by 2^(1 - n) of it
    assert nodes > 17 or not torch.allclose(matrix @ above, at**nodes, atol=1e-9)


def test_every_grid_lies_in_the_next():
    for few, many in itertools.pairwise(LEVELS):
        torch.testing.assert_close(chebyshev(few), chebyshev(many)[::2], atol=1e-15, rtol=0)
    assert all(chebyshev(n)[n // 2] == 0 for n in LEVELS)


# -- closed forms


@pytest.mark.parametrize("radius", [1.0, 0.3])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_a_quadratic_model_has_its_paraboloid(dimensions, radius):
    model = Quadratic()
    weight = model.weight.detach().clone()
    made = landscape(model, torch.zeros(1), dimensions=dimensions, radius=radius, points=21, seed=4)
    generator = torch.Generator().manual_seed(4)
    steps = [filter_normalised(model, generator)["weight"] for _ in range(dimensions)]
    for i, y in enumerate(made.y):
        for j, x in enumerate(made.x):
            moved = weight + sum(c * d for c, d in zip((x, y), steps, strict=False))
            assert made.losses[i][j] == pytest.approx(moved.square().sum().item() / 2, rel=1e-9)
    assert made.center == pytest.approx(weight.square().sum().item() / 2)
    assert made.nodes == 5
    assert made.converged
    assert made.error < 1e-12
    assert made.non_convex == 0
    assert made.x[0] == -radius
    assert made.x[-1] == radius
    assert made.loss_kind == "the model's own loss"


class Saddle(nn.Module):
    """(a - 1)(b - 1) at weights (1, 1): a saddle along the axes of the weights."""

    def __init__(self, sign=-1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1, dtype=torch.float64))
        self.sign = sign

    def forward(self, _x):
        return {"loss": self.sign * (self.weight - 1).square().sum()}


def test_non_convexity_and_sharpness_of_known_shapes():
    down = landscape(Saddle(-1.0), torch.zeros(1), dimensions=1, points=11)
    assert down.non_convex == 1
    up = landscape(Saddle(1.0), torch.zeros(1), dimensions=1, points=11)
    assert up.non_convex == 0
    assert up.sharpness(1.0) == pytest.approx(100.0)  # from 0 to 1 over 1 + 0
    assert up.sharpness(0.4) == pytest.approx(16.0)
    assert up.share_below(0.05) == pytest.approx(3 / 11)  # x = -0.2, 0, 0.2
    with pytest.raises(ValueError, match="epsilon -1 holds no point"):
        up.sharpness(-1)
    assert up.range == pytest.approx(1.0)


def surface(function, points=21):
    axis = torch.linspace(-1, 1, points, dtype=torch.float64).tolist()
    losses = [[function(x, y) for x in axis] for y in axis]
    fields = {"center": function(0, 0), "x": axis, "y": axis, "losses": losses}
    rest = dict.fromkeys(Landscape.__dataclass_fields__, 0) | fields
    return Landscape(**rest)


@pytest.mark.parametrize(
    ("function", "share"),
    [
        (lambda x, y: x * x + y * y, 0.0),
        (lambda x, y: x * y, 1.0),
        (lambda x, y: x * x - 0.05 * y * y, 0.0),  # less than a tenth
        (lambda x, y: x * x - 0.2 * y * y, 1.0),
        (lambda x, y: -x * x - y * y, 1.0),
        (lambda x, y: x**3 + 2.5 * y * y, 9 / 19),  # where 6 x < -0.1 * 5
    ],
)
def test_share_of_clearly_negative_curvature(function, share):
    made = surface(function)
    assert made.non_convex == pytest.approx(share)


# -- against the dense evaluation


def dense(model, inputs, targets, made, seed):
    """Every point of the picture, by a naive loop over a copy."""
    generator = torch.Generator().manual_seed(seed)
    one, two = filter_normalised(model, generator), filter_normalised(model, generator)
    losses = []
    for y in made.y:
        row = []
        for x in made.x:
            moved = copy.deepcopy(model).eval()
            with torch.no_grad():
                for name in one:
                    moved.get_parameter(name).add_(x * one[name] + y * two[name])
                row.append(nn.functional.cross_entropy(moved(inputs), targets).item())
        losses.append(row)
    return torch.tensor(losses)


def test_the_held_out_error_is_honest():
    model = small_net(depth=3)
    fitted(model)
    inputs, targets = small_batch()
    for limit in (61, 325):  # too coarse, and fine enough
        made = landscape(model, inputs, targets, points=17, evaluations=limit, seed=1)
        truth = dense(model, inputs, targets, made, 1)
        share = (torch.tensor(made.losses) - truth).abs() / (truth.max() - truth.min())
        rms = share.square().mean().sqrt().item()
        assert rms == pytest.approx(made.error_rms, rel=0.7)
        assert share.max().item() < 4 * made.error  # the corners are the hardest
        assert made.evaluations <= limit
        assert made.converged == (made.error <= 0.01)
    assert made.converged
    assert made.error < 0.01


def test_same_seed_same_landscape_other_seed_another():
    model, (inputs, targets) = small_net(), small_batch()
    one, two, three = (landscape(model, inputs, targets, points=9, seed=s) for s in (2, 2, 3))
    assert numbers(one) == numbers(two)
    assert one.losses != three.losses


def test_a_loss_that_draws_draws_the_same_everywhere():
    model = small_net()

    def noisy(output, targets):
        noise = torch.rand(())
        return nn.functional.cross_entropy(output, targets) + noise

    inputs, targets = small_batch()
    before = torch.get_rng_state()
    plain = landscape(model, inputs, targets, points=9)
    made = landscape(model, inputs, targets, points=9, loss=noisy)
    shift = made.center - plain.center
    assert shift > 0
    torch.testing.assert_close(
        torch.tensor(made.losses), torch.tensor(plain.losses) + shift, rtol=0, atol=1e-5
    )
    assert torch.equal(torch.get_rng_state(), before)


# -- the budget


def test_the_budget_in_evaluations_is_kept_and_said():
    model, (inputs, targets) = small_net(depth=6), small_batch()
    calls, seen = [], []
    model.register_forward_hook(lambda *_: calls.append(1))
    made = landscape(
        model, inputs, targets, radius=3.0, evaluations=200, progress=lambda *p: seen.append(p)
    )
    assert made.evaluations == len(calls) == len(seen) <= 200
    assert [done for done, _ in seen] == list(range(1, len(calls) + 1))
    assert seen[-1][0] == seen[-1][1]
    if not made.converged:
        assert "evaluations" in made.note
    with pytest.raises(ValueError, match="evaluations 20 must be at least 61: the coarsest"):
        landscape(model, inputs, targets, evaluations=20)


def test_no_time_gives_the_coarsest_grid():
    model, (inputs, targets) = small_net(depth=6), small_batch()
    made = landscape(model, inputs, targets, radius=3.0, budget=0.0)
    assert made.nodes == LEVELS[0]
    assert not made.converged
    assert made.note.endswith("9 nodes to an axis would pass 0 s")


def test_time_is_predicted_from_what_a_pass_took(monkeypatch):
    clock = iter(range(10**6))  # a second at every look
    monkeypatch.setattr(surfaces.time, "monotonic", lambda: next(clock))
    model, (inputs, targets) = small_net(depth=6), small_batch()
    # Before 9 nodes: 2 s for 61 passes, so 1.8 s for 56 more; before 17: 3 s, and 5.3 s for 208.
    assert landscape(model, inputs, targets, radius=3.0, budget=3.7).nodes == 5
    assert landscape(model, inputs, targets, radius=3.0, budget=3.9).nodes == 9


# -- nothing changes


class Failing(nn.Module):
    """Raises at its n-th call."""

    def __init__(self, calls):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.tied = nn.Linear(8, 8, bias=False)
        self.inner[0].weight = self.tied.weight
        self.left = calls

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("in the middle")
        return self.tied(self.inner(x))


@pytest.mark.parametrize("calls", [0, 1, 5, 40, 70])
def test_weights_are_as_before_also_after_an_error(calls):
    model = Failing(calls)
    model.inner[2].eval()
    x = torch.randn(6, 8)
    model.tied.weight.grad = torch.ones(8, 8)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    version, rng = model.tied.weight._version, torch.get_rng_state()
    if calls:
        with pytest.raises(RuntimeError, match="in the middle"):
            landscape(model, x, torch.zeros(6).long(), points=17, radius=5.0)
    else:
        landscape(model, x, torch.zeros(6).long(), points=17)
    after = model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model.tied.weight.grad, torch.ones(8, 8))
    assert model.tied.weight._version == version  # a graph of the user's stays valid
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.inner[0].weight is model.tied.weight


def test_the_model_is_in_evaluation():
    model = Failing(0)
    x = torch.randn(6, 8)
    made = landscape(model, x, torch.zeros(6).long(), points=5)
    model.eval()
    expected = nn.functional.cross_entropy(model(x), torch.zeros(6).long()).item()
    assert made.center == pytest.approx(expected)


def test_a_loss_that_is_not_finite_is_named():
    model = small_net()
    with torch.no_grad():
        model[0].weight.mul_(1e38)
    with pytest.raises(ValueError, match=r"the loss at \(.*\) is nan; take a smaller radius"):
        landscape(model, small_batch()[0], small_batch()[1], radius=100.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dimensions": 3}, "dimensions 3 must be 1 or 2"),
        ({"radius": 0.0}, "radius 0.0 must be a positive number"),
        ({"radius": math.inf}, "radius inf must be a positive number"),
        ({"points": 2}, "points 2 must be at least 3"),
        ({"budget": -1.0}, "budget -1.0 must be at least 0 seconds"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        landscape(small_net(), *small_batch(), **settings)


# -- lines and paths


def with_norm(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model(3 * torch.randn(64, 8) + seed)  # statistics of its own
    return model


def test_a_line_ends_in_its_two_networks():
    one, two = with_norm(1), with_norm(2)
    x, y = small_batch()
    made = line(copy.deepcopy(one), one.state_dict(), two.state_dict(), x, y, points=11)
    for model, loss in ((one, made.losses[0][0]), (two, made.losses[0][-1])):
        model.eval()
        assert loss == pytest.approx(nn.functional.cross_entropy(model(x), y).item(), rel=1e-5)
    halfway = copy.deepcopy(one)
    for name, tensor in halfway.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_((one.state_dict()[name] + two.state_dict()[name]) / 2)
    middle = nn.functional.cross_entropy(halfway(x), y).item()
    assert made.losses[0][5] == pytest.approx(middle, rel=1e-5)
    assert made.x[0] == 0
    assert made.x[-1] == 1
    ends = (made.losses[0][0] + made.losses[0][-1]) / 2
    assert made.barrier == pytest.approx(max(0.0, max(made.losses[0]) - ends))
    left, right = small_net(1).state_dict(), small_net(2).state_dict()
    wider = line(small_net(), left, right, x, y, span=(-0.5, 1.5), points=9)
    assert (wider.x[0], wider.x[-1]) == (-0.5, 1.5)
    with pytest.raises(ValueError, match="span"):
        line(one, one.state_dict(), two.state_dict(), x, y, span=(1.0, 0.0))


def test_a_state_that_does_not_fit_is_refused():
    model = small_net()
    state, (x, y) = model.state_dict(), small_batch()
    with pytest.raises(
        ValueError, match=r"end: unknown name '0\.weigth'; did you mean '0\.weight'"
    ):
        line(model, state, {"0.weigth": state["0.weight"]}, x, y)
    with pytest.raises(ValueError, match=r"end: 0\.bias is \(3,\), in the model \(16,\)"):
        line(model, state, state | {"0.bias": torch.zeros(3)}, x, y)
    with pytest.raises(ValueError, match=r"start has no 0\.bias, which Sequential holds"):
        line(model, {k: v for k, v in state.items() if k != "0.bias"}, state, x, y)


@pytest.mark.parametrize("normalised", [False, True])
def test_a_trajectory_is_the_pca_of_its_states(normalised):
    model = small_net(width=6, depth=1)
    states, (x, y) = fitted(model), small_batch()
    made = trajectory(model, states, x, y, points=9, normalised=normalised, evaluations=100)

    def coordinates(state):
        parts = []
        for name, tensor in state.items():
            if not normalised:
                parts.append(tensor.flatten())
            elif tensor.dim() == 2:
                parts += [r / o.norm() for r, o in zip(tensor, states[-1][name], strict=True)]
        return torch.cat(parts).double()

    matrix = torch.stack([coordinates(s) for s in states])
    centred = matrix - matrix.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    expected = (matrix - matrix[-1]) @ directions[:2].T
    expected = expected * torch.sign(expected[0] * torch.tensor(made.path)[0])  # signs are free
    torch.testing.assert_close(torch.tensor(made.path).double(), expected, atol=1e-5, rtol=1e-4)
    variance = values.square() / values.square().sum()
    assert made.explained == pytest.approx(variance[:2].tolist(), rel=1e-4)
    assert made.path[-1] == pytest.approx([0, 0], abs=1e-9)
    for state, loss in zip(states, made.path_losses, strict=True):
        probe = copy.deepcopy(model)
        probe.load_state_dict(state)
        assert loss == pytest.approx(nn.functional.cross_entropy(probe(x), y).item(), rel=1e-5)
    assert made.center == pytest.approx(made.path_losses[-1])
    low, high = made.x[0], made.x[-1]
    reach = [p[0] for p in made.path]
    extent = max(reach) - min(reach)
    assert (low, high) == pytest.approx((min(reach) - extent / 5, max(reach) + extent / 5))


def test_the_plane_of_a_path_goes_through_its_states():
    """Three states lie in their plane, so the losses there are those of the states themselves."""
    model = small_net(width=6, depth=1).double()
    states = fitted_double(model)
    x, y = small_batch()
    made = trajectory(model, states, x.double(), y, points=5, margin=0.0, evaluations=2000)
    again = [loss_at(model, states, made, point, x.double(), y) for point in made.path]
    assert again == pytest.approx(made.path_losses, rel=1e-6)


def fitted_double(model):
    torch.manual_seed(3)
    states = [copy.deepcopy(model.state_dict())]
    for _ in range(2):
        states.append({n: t + 0.1 * torch.randn_like(t) for n, t in states[-1].items()})
    return states


def loss_at(model, states, _made, point, x, y):
    directions, _, _ = module._principal(model, states, False)
    state = {
        n: t + point[0] * directions[0][n] + point[1] * directions[1][n]
        for n, t in states[-1].items()
    }
    return nn.functional.cross_entropy(torch.func.functional_call(model, state, x), y).item()


def test_paths_that_have_no_plane_are_refused():
    model, (x, y) = small_net(), small_batch()
    state = model.state_dict()
    with pytest.raises(ValueError, match="a trajectory of 2 states needs at least 3"):
        trajectory(model, [state, state], x, y)
    on_a_line = [{n: (1 + s) * t for n, t in state.items()} for s in (0.0, 0.1, 0.3)]
    with pytest.raises(ValueError, match="the states lie on one line"):
        trajectory(model, on_a_line, x, y)


def test_the_result_is_plain_data():
    model, (x, y) = small_net(), small_batch()
    made = landscape(model, x, y, points=7)
    facts = json.loads(json.dumps(made.to_dict()))
    assert facts["low"] == made.low
    assert "barrier" not in facts
    assert facts["held_out"] == 35


def test_any_gpt_with_keywords():
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth=2, dim=16, heads=2, context=8, vocab_size=11))
    tokens = torch.randint(11, (2, 8))
    made = landscape(model, tokens, tokens, points=9, evaluations=120)
    assert made.loss_kind == "cross-entropy"
    assert made.low <= made.center <= made.high + 1e-6
