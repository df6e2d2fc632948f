"""The X-ray: vitals against plain autograd, any module, and nothing changed by looking."""

import copy
import math
import sys

import pytest
import torch
from ranks import joined, two_processes
from torch import nn

from addnorm import (
    GPT,
    MLP,
    GPTConfig,
    MLPConfig,
    Stack,
    Trace,
    Wiring,
    contract,
    register,
    xray,
)
from addnorm.files import finite
from addnorm.probe.measures import effective_rank, similarity
from addnorm.probe.trace import Connection

VOCABULARY = 11


def gpt(wiring, depth=3, **changes):
    torch.manual_seed(0)
    settings = {"dim": 16, "heads": 2, "context": 8} | changes
    return GPT(GPTConfig(depth=depth, wiring=wiring, vocab_size=VOCABULARY, **settings))


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (2, 2, 8), generator=generator)


def rms(x):
    return x.square().mean().sqrt().item()


WIRINGS = [
    "plain",
    "residual",
    "postnorm",
    "prenorm",
    "sandwich",
    "deepnorm",
    "rezero",
    "layerscale",
]


def naive(model, wiring, inputs, targets):
    """Run the stack by hand: streams, updates and skips of every connection, and the gradients."""
    x = model.token(inputs) + model.position.weight[: inputs.shape[1]]
    streams, shares = [x], []
    for c in model.stack:
        if wiring == "plain":
            x, skip, update = c.branch(x, None_context()), None, None
        elif wiring == "residual":
            skip, update = x, c.branch(x, None_context())
            x = skip + update
        elif wiring == "postnorm":
            skip, update = x, c.branch(x, None_context())
            x = c.norm(skip + update)
        elif wiring == "prenorm":
            skip, update = x, c.branch(c.norm_in(x), None_context())
            x = skip + update
        elif wiring == "sandwich":
            skip, update = x, c.norm_out(c.branch(c.norm_in(x), None_context()))
            x = skip + update
        elif wiring == "deepnorm":
            skip, update = 6**0.25 * x, c.branch(x, None_context())
            x = c.norm(skip + update)
        elif wiring == "rezero":
            skip, update = x, c.alpha * c.branch(x, None_context())
            x = skip + update
        else:
            skip, update = x, c.gamma * c.branch(c.norm_in(x), None_context())
            x = skip + update
        shares.append(math.nan if skip is None else rms(update) / rms(skip))
        streams.append(x)
    logits = model.head(model.norm(x))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    gradients = torch.autograd.grad(loss, streams)
    return loss.item(), [rms(s) for s in streams], shares, [rms(g) for g in gradients]


def None_context():  # noqa: N802
    from addnorm import Context

    return Context()


@pytest.mark.parametrize("wiring", WIRINGS)
def test_vitals_equal_plain_autograd(wiring):
    model, (inputs, targets) = gpt(wiring), batch()
    with torch.no_grad():  # away from the start, so that gates are open
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    trace = xray(model, inputs, targets)
    loss, streams, shares, gradients = naive(model, wiring, inputs, targets)
    assert trace.loss == pytest.approx(loss, rel=1e-6)
    assert trace.loss_kind == "cross-entropy"
    assert trace.wiring == wiring
    c = trace.connections
    assert len(c) == 6
    assert [x.stream_before for x in c] == pytest.approx(streams[:-1], rel=1e-5)
    assert [x.stream_after for x in c] == pytest.approx(streams[1:], rel=1e-5)
    assert [x.gradient_before for x in c] == pytest.approx(gradients[:-1], rel=1e-4)
    assert [x.gradient_after for x in c] == pytest.approx(gradients[1:], rel=1e-4)
    assert [x.branch_share for x in c] == pytest.approx(shares, rel=1e-5, nan_ok=True)
    assert trace.stream_growth == pytest.approx(streams[-1] / streams[0], rel=1e-5)


def test_a_branch_that_starts_silent_has_share_zero():
    assert [c.branch_share for c in xray(gpt("rezero"), *batch()).connections] == [0.0] * 6


def line(gradients):
    rows = [Connection(str(i), 1, 1, 1, g, g, 0, 0) for i, g in enumerate(gradients)]
    return Trace("M", "", "", 1.0, "", tuple(rows))


@pytest.mark.parametrize(
    ("gradients", "slope"),
    [
        ([10 ** (0.3 * i) for i in range(12)], 3.0),
        ([10 ** (-0.05 * i) for i in range(12)], -0.5),
        ([1.0, 1.0, 1.0], 0.0),
        ([1e-3, 1e-2, 1e-2, 1e-1], 6.0),
        ([1.0], math.nan),
        ([1.0, math.inf], math.nan),
    ],
)
def test_gradient_slope_is_decades_per_ten_connections(gradients, slope):
    assert line(gradients).gradient_slope == pytest.approx(slope, nan_ok=True)


def test_token_similarity_is_the_mean_cosine_between_positions():
    x = torch.randn(3, 5, 7)
    cosines = [
        torch.cosine_similarity(x[b, i], x[b, j], dim=0)
        for b in range(3)
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    assert float(similarity(x)) == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-6)
    assert float(similarity(torch.ones(2, 4, 3))) == pytest.approx(1.0)


def test_plain_shrinks_the_gradient_and_prenorm_does_not():
    assert xray(gpt("plain", depth=8), *batch()).gradient_slope > 1.5
    assert abs(xray(gpt("prenorm", depth=8), *batch()).gradient_slope) < 0.3


class Block(nn.Module):
    """A foreign block that returns a tuple, takes its stream by keyword, and works in place."""

    def __init__(self, dim):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Linear(dim, dim))
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, *, hidden_states):
        return (hidden_states + self.inner(self.norm(hidden_states)), "extra")


class Foreign(nn.Module):
    def __init__(self, depth=4, dim=6):
        super().__init__()
        self.lift = nn.Linear(3, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(dim, 5)

    def forward(self, x):
        h = self.lift(x)
        for block in self.blocks:
            h = block(hidden_states=h)[0]
        return {"logits": self.head(self.dropout(h))}


def state(model):
    return {
        "weights": copy.deepcopy(model.state_dict()),
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "random": torch.get_rng_state(),
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
    }


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_changes_by_looking(fails):
    """Weights, buffers, gradients, modes, random state and hooks, also after an error."""
    model = Foreign()
    model.blocks[1].inner[0].weight.requires_grad_(False)
    model.head.eval()
    model(torch.randn(4, 3))["logits"].sum().backward()
    before = state(model)
    if fails:
        with pytest.raises(RuntimeError):
            xray(model, torch.randn(4, 7))
        with pytest.raises(IndexError):
            xray(model, torch.randn(4, 3), torch.tensor([9, 9, 9, 9]))
    else:
        torch.set_rng_state(before["random"])
        trace = xray(model, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
        assert len(trace.connections) == 4
        assert trace.loss_kind == "random direction"
    if fails:
        torch.set_rng_state(before["random"])
    assert equal(before, state(model))


def test_a_foreign_block_is_found_by_itself():
    model, x = Foreign(), torch.randn(8, 3)
    trace = xray(model, x, torch.arange(8) % 5)
    assert trace.blocks == "4 connections found by their additions"
    assert [c.name for c in trace.connections] == [f"blocks.{i}.inner" for i in range(4)]
    assert [c.block for c in trace.connections] == [f"blocks.{i}" for i in range(4)]
    h = model.lift(x)
    update = model.blocks[0].inner(model.blocks[0].norm(h))
    assert trace.connections[0].branch_share == pytest.approx(rms(update) / rms(h), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3), 6),
        (nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))), 3),
        (
            torch.compile(
                nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))), backend="eager"
            ),
            3,
        ),
    ],
    ids=["encoder", "plain", "compiled"],
)
def test_common_modules_work_as_they_are(model, count):
    trace = xray(model, torch.randn(2, 5, 8))
    assert len(trace.connections) == count
    assert all(c.gradient_after > 0 for c in trace.connections)


def test_a_block_called_repeatedly_is_counted_by_call():
    class Looped(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

        def forward(self, x):
            for block in (*self.blocks, *self.blocks):
                x = x + block(x)
            return x

    names = [c.name for c in xray(Looped(), torch.randn(2, 4)).connections]
    assert names == ["blocks.0", "blocks.1", "blocks.0#2", "blocks.1#2"]


def test_blocks_override_the_search_and_a_wrong_name_is_answered():
    trace = xray(Foreign(), torch.randn(4, 3), blocks="blocks.[12]")
    assert [c.name for c in trace.connections] == ["blocks.1", "blocks.2"]
    with pytest.raises(
        ValueError, match=r"is named 'layers\.\*'; the repeated block .* 'blocks\.\*'"
    ):
        xray(Foreign(), torch.randn(4, 3), blocks="layers.*")
    with pytest.raises(
        ValueError, match=r"Linear has no residual addition and no repeated block .* name the"
    ):
        xray(nn.Linear(2, 2), torch.randn(1, 2))


def test_a_residual_mlp_is_seen():
    trace = xray(MLP(MLPConfig(4, 8, 2, depth=5)), torch.randn(6, 4))
    assert len(trace.connections) == 5
    assert all(c.branch_share > 0 for c in trace.connections)


def poison(model, name):
    dict(model.named_parameters())[name].data.fill_(math.nan)
    return model


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("token.weight", "the input of stack.connections.0"),
        ("stack.connections.2.branch.qkv.weight", "stack.connections.2"),
        ("stack.connections.5.norm_in.weight", "stack.connections.5"),
        ("head.weight", "stack.connections.5"),
    ],
)
def test_the_first_block_that_is_not_finite_is_named(name, where):
    """A NaN in the head shows first in the gradient of the last connection."""
    trace = xray(poison(gpt("prenorm"), name), *batch())
    assert not trace.ok
    assert [(f.code, f.where) for f in trace.findings] == [("non-finite", where)]
    assert not math.isfinite(trace.loss)


def test_a_trace_survives_its_file(tmp_path):
    trace = xray(gpt("plain"), *batch())
    trace.save(tmp_path / "t.json")
    again = Trace.load(tmp_path / "t.json")
    assert finite(again.to_dict()) == finite(trace.to_dict())
    assert str(again) == str(trace)
    (tmp_path / "u.json").write_text('{"connections": [{}], "schema": 99}')
    with pytest.raises(ValueError, match="trace of schema 99; this version reads 2"):
        Trace.load(tmp_path / "u.json")


# -- cases that a first X-ray got wrong --------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.checkpointed = checkpointed

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return x


def test_activation_checkpointing_changes_nothing():
    x = torch.randn(2, 4, requires_grad=True)
    plain, checked = (xray(Checkpointed(on), x) for on in (False, True))
    assert finite(plain.to_dict()) == finite(checked.to_dict())
    assert not x._backward_hooks
    assert x.grad is None


def stack_of(joined):
    """A stack of three connections whose forward is `joined(x, branch)`."""

    class Odd(Wiring):
        def __init__(self, branch, site):
            super().__init__(branch, site)
            self.reset_parameters()

        def forward(self, stream, context):
            return joined(stream, lambda x: self.branch(x, context))

    Odd.name, Odd.stream_law = "odd", "geometric"
    contract._CATALOGUE["odd"] = Odd
    torch.manual_seed(0)
    return Stack([nn.Linear(4, 4) for _ in range(3)], "odd", dim=4)


def in_place(x, branch):
    update = branch(x)
    update += x
    return update


@pytest.mark.parametrize(
    ("joined", "update"),
    [
        (lambda x, f: x + f(x), lambda x, f: f(x)),
        (lambda x, f: f(x) + x, lambda x, f: f(x)),
        (in_place, lambda x, f: f(x)),
        (lambda x, f: torch.add(x, f(x), alpha=0.1), lambda x, f: 0.1 * f(x)),
        (lambda x, f: x + 0.5 * f(x) * 3, lambda x, f: 1.5 * f(x)),
        (lambda x, f: x + torch.cat(f(x).split(2, 1), 1), lambda x, f: f(x)),
    ],
    ids=["skip first", "branch first", "in place", "alpha", "scaled", "through a list"],
)
def test_the_addition_is_seen_however_it_is_spelled(joined, update):
    model, x = stack_of(joined), torch.randn(5, 4)
    share = xray(model, x).connections[0].branch_share
    assert share == pytest.approx(
        rms(update(x, model.connections[0].branch.module)) / rms(x), rel=1e-5
    )


def test_the_gradient_of_a_carried_tensor_is_that_at_this_depth():
    """A stream of two tensors whose first is only carried: earlier readers do not count here."""

    @register
    class Carry(Wiring):
        name = "carry-test"
        equation = paper = at_start = "x <- x + F(x) + x0 / 2"
        year, stream_law, gradient_law = 2026, "geometric", "geometric"

        def __init__(self, branch, site):
            super().__init__(branch, site)
            self.reset_parameters()

        def open(self, x):
            return (x, x)

        def forward(self, stream, context):
            first, x = stream
            return (first, x + self.branch(x, context) + 0.5 * first)

        def close(self, stream):
            return stream[1]

    torch.manual_seed(0)
    model, x = Stack([nn.Linear(4, 4) for _ in range(3)], "carry-test", dim=4), torch.randn(6, 4)
    trace = xray(model, x, loss=lambda out, _: out.square().sum())
    found = [c.gradient_before for c in trace.connections]
    wanted = []
    for cut in range(3):
        stream = (x, x)
        for connection in list(model)[:cut]:
            stream = connection(stream, None_context())
        leaves = [t.detach().requires_grad_() for t in stream]
        stream = tuple(leaves)
        for connection in list(model)[cut:]:
            stream = connection(stream, None_context())
        gradients = torch.autograd.grad(stream[1].square().sum(), leaves)
        wanted.append(torch.cat(gradients).square().mean().sqrt().item())
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_dict_with_a_loss_is_read_like_an_object_with_one():
    class Answer:
        def __init__(self, **fields):
            self.__dict__.update(fields)

    class Model(nn.Module):
        def __init__(self, kind):
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
            self.kind = kind

        def forward(self, x):
            for block in self.blocks:
                x = x + block(x)
            return self.kind(loss=x.square().mean(), logits=x)

    x = torch.randn(3, 4)
    one, two = xray(Model(dict), x), xray(Model(Answer), x)
    assert one.loss_kind == two.loss_kind == "the model's own loss"
    assert finite(one.to_dict()) == finite(two.to_dict())


# -- what goes beyond sizes --------------------------------------------------------------------


class Residual(nn.Module):
    """Two connections with a branch that is not symmetric; one sample of one position."""

    def __init__(self, skip=1.0, dim=4):
        super().__init__()
        torch.manual_seed(0)
        self.skip = skip
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim)) for _ in range(2)
        )

    def forward(self, x):
        for block in self.blocks:
            x = self.skip * x + block(x)
        return x


@pytest.mark.parametrize("skip", [1.0, 0.5])
def test_gains_estimate_the_full_jacobian(skip):
    """The mean over seeds of the one probe is the trace and the norm of the whole Jacobian."""
    model, x = Residual(skip), torch.randn(1, 4)
    seeds = range(400)
    rows = [xray(model, x, seed=s).connections[1] for s in seeds]
    middle = skip * x + model.blocks[0](x)
    jacobian = torch.autograd.functional.jacobian(
        lambda h: skip * h + model.blocks[1](h), middle
    ).reshape(4, 4)
    spread = jacobian.norm().item() / 2  # of one probe with 4 entries, generously
    gains = torch.tensor([c.identity_gain for c in rows])
    assert gains.mean().item() == pytest.approx(
        jacobian.trace().item() / 4, abs=4 * spread / len(seeds) ** 0.5
    )
    squares = torch.tensor([c.gain_backward**2 for c in rows])
    wanted = jacobian.square().sum().item() / 4
    assert squares.mean().item() == pytest.approx(wanted, rel=0.15)
    assert [c.gain_forward for c in rows] == pytest.approx([c.gain_backward for c in rows])


def test_one_probe_is_the_vector_jacobian_product():
    model, x = Residual(), torch.randn(3, 4)
    found = xray(model, x, seed=5).connections[0]
    v = torch.randn(3, 4, generator=torch.Generator().manual_seed(5 * 1_000_003))
    leaf = x.clone().requires_grad_()
    (pulled,) = torch.autograd.grad(leaf + model.blocks[0](leaf), leaf, v)
    assert found.identity_gain == pytest.approx(((pulled * v).sum() / v.square().sum()).item())
    assert found.gain_backward == pytest.approx((pulled.norm() / v.norm()).item())


def test_a_lost_skip_has_no_identity_gain():
    """Where the sum is of the branch with itself there is no connection, and the block says so."""
    torch.manual_seed(0)

    class Lost(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64)) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
                x = x + x
            return x

    trace = xray(Lost(), torch.randn(8, 64))
    assert [c.kind for c in trace.connections] == ["block"] * 3
    assert all(abs(c.identity_gain) < 0.1 for c in trace.connections)
    assert "taken whole (no residual addition was seen in it)" in str(trace.coverage)


def test_rank_cosines_and_dead_units():
    rank_one = torch.outer(torch.randn(6), torch.randn(5))
    assert float(effective_rank(rank_one)) == pytest.approx(1.0)
    assert float(effective_rank(torch.eye(5))) == pytest.approx(5.0)
    x = torch.randn(2, 50, 9)
    s = torch.linalg.svdvals(x.reshape(100, 9)) ** 2
    assert float(effective_rank(x)) == pytest.approx((s.sum() ** 2 / (s**2).sum()).item(), rel=1e-5)

    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.f(x) * torch.tensor([1.0, 0.0, 0.0, 1.0])

    torch.manual_seed(0)
    model, x = Dead(), torch.randn(7, 4)
    found = xray(model, x).connections[0]
    update = model.f(x) * torch.tensor([1.0, 0.0, 0.0, 1.0])
    flat = torch.cosine_similarity(x.flatten(), update.flatten(), dim=0)
    assert found.dead_units == 0.5
    assert found.branch_cosine == pytest.approx(flat.item(), abs=1e-6)
    assert found.stream_cosine == pytest.approx(
        torch.cosine_similarity(x, x + update, dim=-1).mean().item(), abs=1e-6
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_foreign_gradients_equal_autograd(frozen):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 8)
    trace = xray(model.requires_grad_(not frozen), x, loss=lambda out, _: out.square().sum())
    h = x.clone().requires_grad_()
    streams, updates = [h], []
    for block in model.layers:
        for f in (
            lambda y, b=block: b._sa_block(b.norm1(y), None, None),
            lambda y, b=block: b._ff_block(b.norm2(y)),
        ):
            updates.append(f(streams[-1]))
            streams.append(streams[-1] + updates[-1])
    gradients = torch.autograd.grad(streams[-1].square().sum(), streams)
    c = trace.connections
    assert [r.stream_before for r in c] == pytest.approx([rms(s) for s in streams[:-1]], rel=1e-5)
    assert [r.branch_share for r in c] == pytest.approx(
        [rms(u) / rms(s) for u, s in zip(updates, streams, strict=False)], rel=1e-5
    )
    assert [r.gradient_before for r in c] == pytest.approx(
        [rms(g) for g in gradients[:-1]], rel=1e-4
    )
    assert [r.gradient_after for r in c] == pytest.approx([rms(g) for g in gradients[1:]], rel=1e-4)


def test_half_precision_is_summed_in_float32():
    """60,000 squares of 300 overflow float16; the RMS does not."""
    torch.manual_seed(0)
    model = Residual(dim=8).half()
    x = torch.full((8, 8), 300.0, dtype=torch.float16)
    first = xray(model, x, loss=lambda out, _: out.float().mean()).connections[0]
    assert first.stream_before == pytest.approx(300)
    assert math.isfinite(first.gradient_before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(xray(Residual(), torch.randn(3, 4)).connections) == 2


def test_float64_is_summed_in_float64():
    """A layer passes back a hundredth of a gradient: 1e-80 after 40, which float32 loses."""
    model = MLP(MLPConfig(4, 4, 1, depth=40, wiring="plain", activation="relu")).double()
    for connection in model.stack:
        connection.branch.linear.weight.data = torch.eye(4, dtype=torch.float64) / 100
    x = torch.ones(3, 4, dtype=torch.float64)
    c = xray(model, x, loss=lambda out, _: out.sum()).connections
    assert c[0].gradient_before / c[-1].gradient_after == pytest.approx(1e-80)
    assert c[-1].stream_after == pytest.approx(1e-80)


def test_several_streams_are_measured_over_all():
    torch.manual_seed(0)
    model, x = gpt("frac"), batch()
    model = gpt("mhc")
    found = xray(model, *x).connections
    assert all(-1 <= c.streams_cosine <= 1 for c in found)
    assert all(c.identity_gain > 0.5 for c in found)


def test_every_part_is_told_and_an_unknown_look_is_answered():
    told = []
    xray(Residual(), torch.randn(2, 4), progress=lambda done, total: told.append((done, total)))
    assert told == [(100, 200), (200, 200)]
    told.clear()
    model = gpt("prenorm")
    xray(model, *batch(), deep=("lens",), progress=lambda *at: told.append(at))
    assert told == sorted(told)
    assert told[-1] == (300, 300)
    assert len(told) > 5  # every depth of the lens is told
    with pytest.raises(ValueError, match="unknown deeper look 'leson'"):
        xray(Residual(), torch.randn(2, 4), deep=("leson",))


def test_pandas_is_asked_for_by_name(monkeypatch):
    trace = xray(Residual(), torch.randn(2, 4))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match="needs pandas: pip install pandas"):
        trace.to_pandas()


# -- wrapped models, in two processes ----------------------------------------------------------


def hold_wrapped(kind):
    """The X-ray of a wrapped model is that of the plain one, and the model trains on."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, dropout=0.0)
    foreign = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    own = gpt("prenorm")
    fields = ["stream_before", "stream_after", "gradient_before", "gradient_after", "branch_share"]
    fields += ["identity_gain"] if kind == "ddp" else []
    for model, parts, x in (
        (foreign, list(foreign.layers), torch.randn(2, 5, 8)),
        (own, list(own.stack), batch()[0]),
    ):
        plain = xray(model, x)
        if kind == "ddp":
            model = DistributedDataParallel(model)
        else:
            for part in (*parts, model):
                fully_shard(part)
        found = xray(model, x)
        for a, b in zip(plain.connections, found.connections, strict=True):
            for field in fields:
                assert getattr(a, field) == pytest.approx(getattr(b, field), rel=1e-4), field
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_wrapped_models_in_two_processes(kind, tmp_path):
    two_processes(__file__, tmp_path, kind)


if __name__ == "__main__":
    with joined(int(sys.argv[1]), sys.argv[2]):
        hold_wrapped(sys.argv[3])
