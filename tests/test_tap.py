"""Taps: what the visitor sees, and what happens when it replaces an update."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from addnorm import GPT, GPTConfig, Stack
from addnorm.probe.discover import discover
from addnorm.probe.spelling import sides
from addnorm.probe.tap import Point, Visitor, tapped

D = 6


def post_activation(x, f):
    f += x
    return F.relu(f, inplace=True)


def statement(x, f):
    f = f * 1.0
    f.add_(x)  # its value is not used: the tensor itself must change
    return f


JOINS = {
    "x + f": (lambda x, f: x + f, lambda x, f: x + f),
    "f + x": (lambda x, f: f + x, lambda x, f: x + f),
    "x - f": (lambda x, f: x - f, lambda x, f: x - f),
    "alpha": (lambda x, f: torch.add(x, f, alpha=0.5), lambda x, f: x + 0.5 * f),
    "lerp": (lambda x, f: torch.lerp(x, f, 0.25), lambda x, f: 0.75 * x + 0.25 * f),
    "addcmul": (
        lambda x, f: torch.addcmul(x, f, torch.full((D,), 0.5), value=3.0),
        lambda x, f: x + 1.5 * f,
    ),
    "baddbmm": (
        lambda x, f: torch.baddbmm(x, f, torch.eye(D).expand(len(x), D, D), beta=0.5, alpha=2.0),
        lambda x, f: 0.5 * x + 2 * f,
    ),
    "mean": (lambda x, f: torch.stack([x, f]).mean(0), lambda x, f: x / 2 + f / 2),
    "in place": (post_activation, lambda x, f: F.relu(x + f)),
    "statement": (statement, lambda x, f: x + f),
    "post-norm": (lambda x, f: F.layer_norm(x + f, (D,)), lambda x, f: F.layer_norm(x + f, (D,))),
}


class Net(nn.Module):
    def __init__(self, join, checkpointed=None):
        super().__init__()
        torch.manual_seed(0)
        self.join, self.checkpointed = join, checkpointed
        self.lift = nn.Linear(3, D)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)) for _ in range(3)
        )

    def step(self, x, block):
        return self.join(x, block(x))

    def forward(self, x):
        x = self.lift(x)
        for block in self.blocks:
            if self.checkpointed is None:
                x = self.step(x, block)
            else:
                x = checkpoint(self.step, x, block, use_reentrant=self.checkpointed)
        return x


def naive(model, formula, x, gates):
    """Run the network by hand with a factor on each update; the streams and updates as well."""
    x = model.lift(x)
    streams, updates = [x], []
    for block, gate in zip(model.blocks, gates, strict=True):
        updates.append(block(x))
        x = formula(x, gate * updates[-1])
        streams.append(x)
    return x, streams, updates


def inputs():
    return torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", JOINS)
def test_looking_only_leaves_the_output_and_gives_stream_and_gradient(name):
    join, formula = JOINS[name]
    model, x = Net(join), inputs()
    structure = discover(model, x)
    plain = model(x)
    seen, outs = [], []

    class Look(Visitor):
        def __call__(self, k, point):
            assert len(seen) == k
            seen.append(point.stream)

        def after(self, k, out):
            outs.append(out)

    with tapped(model, structure, Look()) as tap:
        out = model(x)
    assert tap.reached == [0, 1, 2]
    assert torch.equal(out, plain)
    end, streams, _ = naive(model, formula, x, [1, 1, 1])
    assert torch.allclose(out, end, atol=1e-6)
    wanted = torch.autograd.grad(end.square().sum(), streams[:-1])
    found = torch.autograd.grad(out.square().sum(), seen)
    for a, b, stream, kept in zip(found, wanted, streams, seen, strict=False):
        assert torch.allclose(a, b, atol=1e-5)
        assert torch.allclose(stream, kept, atol=1e-6)
    if name not in ("in place", "post-norm"):  # what leaves is the sum itself
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(outs, streams[1:], strict=True))


@pytest.mark.parametrize("name", JOINS)
def test_lesions_and_gates_equal_the_network_by_hand(name):
    join, formula = JOINS[name]
    model, x = Net(join), inputs()
    structure = discover(model, x)
    for k in range(3):
        with tapped(
            model, structure, lambda i, p, k=k: torch.zeros_like(p.update) if i == k else None
        ):
            out = model(x)
        assert torch.allclose(
            out, naive(model, formula, x, [float(i != k) for i in range(3)])[0], atol=1e-6
        )
    gates = torch.tensor([0.5, 2.0, 1.0], requires_grad=True)
    with tapped(model, structure, lambda i, p: gates[i] * p.update):
        found = torch.autograd.grad(model(x).square().sum(), [gates, *model.parameters()])
    end = naive(model, formula, x, gates)[0]
    wanted = torch.autograd.grad(end.square().sum(), [gates, *model.parameters()])
    assert all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_seen_through(reentrant):
    model, x = Net(lambda x, f: x + f, reentrant), inputs()
    structure = discover(model, x)
    gates = torch.ones(3, requires_grad=True)
    with tapped(model, structure, lambda i, p: gates[i] * p.update):
        (found,) = torch.autograd.grad(model(x).square().sum(), gates)
    end = naive(model, lambda x, f: x + f, x, gates)[0]
    (wanted,) = torch.autograd.grad(end.square().sum(), gates)
    assert torch.allclose(found, wanted, rtol=1e-4)


def test_the_stream_is_in_the_graph_where_all_parameters_are_frozen():
    model, x = Net(lambda x, f: x + f).requires_grad_(False), inputs()
    structure = discover(model, x)
    streams = []
    with tapped(model, structure, lambda k, p: streams.append(p.stream)):
        out = model(x)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(out.sum(), streams))
    assert not x.requires_grad


def test_without_gradients_nothing_is_attached():
    model, x = Net(lambda x, f: x + f), inputs()
    structure = discover(model, x)
    with torch.no_grad(), tapped(model, structure, lambda k, p: p.update * 0):
        assert torch.equal(model(x), model.lift(x))


def test_a_compiled_model_is_tapped_too():
    model, x = Net(lambda x, f: x + f), inputs()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    structure = discover(compiled, x)
    assert len(structure) == 3
    met = []
    with tapped(compiled, structure, lambda k, p: met.append(k)):
        compiled(x)
    assert met == [0, 1, 2]


@pytest.mark.parametrize("wiring", ["residual", "prenorm", "postnorm", "rezero", "attnres"])
def test_wirings_are_tapped_at_their_branch(wiring):
    torch.manual_seed(0)
    model, x = Stack([nn.Linear(D, D) for _ in range(4)], wiring, dim=D), torch.randn(3, D)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    structure = discover(model, x)
    outs = []
    for k in range(4):

        def lesion(i, point, k=k):
            assert isinstance(point, Point)
            return torch.zeros_like(point.update) if i == k else None

        with tapped(model, structure, lesion):
            outs.append(model(x))
        handle = model.connections[k].branch.register_forward_hook(
            lambda module, args, out: torch.zeros_like(out)
        )
        wanted = model(x)
        handle.remove()
        assert torch.allclose(outs[-1], wanted, atol=1e-6)
    assert not torch.allclose(outs[0], outs[1])


def test_the_sum_of_a_wiring_is_shown_with_its_gate():
    torch.manual_seed(0)
    model, x = Stack([nn.Linear(D, D) for _ in range(2)], "layerscale", dim=D), torch.randn(3, D)
    pairs = []

    class Look(Visitor):
        def joined(self, k, skip, update):
            pairs.append((skip, update))

    with tapped(model, discover(model, x), Look()):
        model(x)
    first = model.connections[0]
    update = first.gamma * first.branch.module(first.norm_in(x))
    assert torch.equal(pairs[0][0], x)
    assert torch.allclose(pairs[0][1], update)


def test_a_block_taken_whole_is_removed_by_its_input():
    model, x = Net(lambda x, f: x + f), inputs()
    structure = discover(model, x, "blocks.*")
    with tapped(model, structure, lambda k, p: torch.zeros_like(p.update)):
        assert torch.allclose(model(x), 8 * model.lift(x), atol=1e-5)


def test_the_two_sides_of_each_spelling_add_up():
    x, f, g = torch.randn(3, 4), torch.randn(3, 4), torch.rand(3, 4) + 1
    square = torch.randn(4, 4)
    calls = [
        ("add", (x, f), {"alpha": 2}),
        ("sub", (x, f), {}),
        ("lerp", (x, f, 0.3), {}),
        ("lerp", (x, f), {"weight": g}),
        ("addcmul", (x, f, g), {"value": 3}),
        ("addcdiv", (x, f, g), {}),
        ("addmm", (x, f, square), {"beta": 0.5, "alpha": 2}),
    ]
    for name, args, kwargs in calls:
        one, two = sides(name, args, kwargs)
        assert torch.allclose(one + two, getattr(torch, name)(*args, **kwargs), atol=1e-5), name


def test_what_a_visitor_calls_is_not_taken_for_the_models():
    """Its own additions before the sum of a wiring do not shift which addition that is."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth=2, dim=8, heads=2, context=4, vocab_size=7, wiring="residual"))
    tokens = torch.randint(7, (2, 4))

    class Busy(Visitor):
        def __init__(self):
            self.sums = []

        def __call__(self, k, point):
            torch.add(point.update, point.update)
            return None

        def joined(self, k, skip, update):
            self.sums.append((k, torch.add(skip, update)))

    left = []
    for connection in model.stack.connections:
        connection.register_forward_hook(lambda _m, _a, out: left.append(out))
    busy = Busy()
    with torch.no_grad(), tapped(model, discover(model, tokens), busy):
        left.clear()
        model(tokens)
    assert [k for k, _ in busy.sums] == [0, 1, 2, 3]
    for (_, total), out in zip(busy.sums, left, strict=True):
        torch.testing.assert_close(total, out)
