"""The X-ray: vitals against plain autograd, any module, and nothing changed by looking."""

import copy
import math

import pytest
import torch
from torch import nn

from addnorm import GPT, MLP, GPTConfig, MLPConfig, Stack, Trace, Wiring, contract, xray
from addnorm.files import finite
from addnorm.probe.trace import Connection
from addnorm.probe.vitals import _similarity

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
            skip, update = x, c.branch(c.norm(x), None_context())
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
            skip, update = x, c.gamma * c.branch(c.norm(x), None_context())
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
    assert _similarity(x) == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-6)
    assert _similarity(torch.ones(2, 4, 3)) == pytest.approx(1.0)


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
    assert trace.blocks == "4 blocks of class Block (blocks.*)"
    assert [c.name for c in trace.connections] == [f"blocks.{i}" for i in range(4)]
    h = model.lift(x)
    update = model.blocks[0].inner(model.blocks[0].norm(h))
    assert trace.connections[0].branch_share == pytest.approx(rms(update) / rms(h), rel=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3),
        nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))),
        torch.compile(
            nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))), backend="eager"
        ),
    ],
    ids=["encoder", "plain", "compiled"],
)
def test_common_modules_work_as_they_are(model):
    trace = xray(model, torch.randn(2, 5, 8))
    assert len(trace.connections) == 3
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
        ValueError, match="Linear has no repeated block that holds modules; name the blocks"
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
        ("stack.connections.5.norm.weight", "stack.connections.5"),
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
    (tmp_path / "u.json").write_text('{"connections": [], "schema": 99}')
    with pytest.raises(ValueError, match="trace of schema 99; this version reads 1"):
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

    Odd.name = "odd"
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
        (lambda x, f: x + torch.cat([f(x)[:, :2], f(x)[:, 2:]], 1), lambda x, f: f(x)),
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
