"""`watch`: its numbers against hooks of our own, and that the training does not notice it."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from addnorm import GPT, GPTConfig, watch
from addnorm.branches import Branch
from addnorm.contract import Stack, catalogue
from addnorm.probe.trace import UNDERFLOW
from addnorm.probe.watch_sample import GROWTH, Sample, Vital, judge_sample

VOCABULARY, CONTEXT = 11, 8


def gpt(wiring="prenorm", **changes):
    torch.manual_seed(0)
    sizes = {"depth": 2, "dim": 16, "heads": 2, "context": CONTEXT, "vocab_size": VOCABULARY}
    return GPT(GPTConfig(**sizes | {"wiring": wiring} | changes))


def tokens(step=0, batch=3):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(VOCABULARY, (batch, CONTEXT), generator=generator)


def loss_of(model, inputs):
    output = model(inputs)
    return nn.functional.cross_entropy(output.flatten(0, -2), inputs.flatten())


class Block(nn.Module):
    """A foreign residual block, not one of our wirings."""

    def __init__(self, dim, in_place=False):
        super().__init__()
        self.norm, self.lin = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.in_place = in_place

    def forward(self, x):
        if self.in_place:
            x += self.lin(self.norm(x.clone())).relu()
            return x
        return x + self.lin(self.norm(x)).relu()


class Net(nn.Module):
    """Token embedding, blocks in a list, head; `order` says which block is called when."""

    def __init__(self, order=(0, 1, 2), dim=8, checkpointed=None, in_place=False, tied=False):
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(VOCABULARY, dim)
        self.blocks = nn.ModuleList(Block(dim, in_place) for _ in range(max(order) + 1))
        self.head = nn.Linear(dim, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.order = order
        self.checkpointed = checkpointed  # None, "reentrant" or "not reentrant"

    def forward(self, inputs):
        x = self.embed(inputs)
        for i in self.order:
            if self.checkpointed is None:
                x = self.blocks[i](x)
            else:
                again = self.checkpointed == "reentrant"
                x = checkpoint(self.blocks[i], x, use_reentrant=again)
        return self.head(x)


def train(model, steps, watched=None, compiled=None, lr=0.1, batches=1):
    """A plain loop; return the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    call = model if compiled is None else compiled
    losses = []
    for step in range(steps):
        for part in range(batches):
            loss = loss_of(call, tokens(step * batches + part))
            loss.backward()
        losses.append(loss.item())
        if watched is not None:
            watched.step(loss)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def rms(x):
    return x.detach().double().square().mean().sqrt().item()


def naive(model, blocks, inputs, branches=None):
    """One pass by `retain_grad`: the RMS of what enters and leaves every call of a block."""
    seen, handles = [], []

    def note(module, args, kwargs, out):
        x = args[0] if args else kwargs["stream"]
        x.retain_grad()
        out.retain_grad()
        seen.append((x, out, inner.get(module)))

    inner = {}
    for module, branch in zip(blocks, branches or [None] * len(blocks), strict=True):
        handles.append(module.register_forward_hook(note, with_kwargs=True))
        if branch is not None:

            def keep(_branch, _args, out, module=module):
                inner[module] = out

            handles.append(branch.register_forward_hook(keep))
    loss = loss_of(model, inputs)
    loss.backward()
    for handle in handles:
        handle.remove()
    return [
        {
            "before": rms(x),
            "after": rms(out),
            "share": rms(out - x if branch is None else branch) / rms(x),
            "gradient_before": rms(x.grad),
            "gradient_after": rms(out.grad),
        }
        for x, out, branch in seen
    ], loss.item()


NAMES = {
    "before": "stream/{}/rms_before",
    "after": "stream/{}/rms_after",
    "share": "branch/{}/share",
    "gradient_before": "gradient/{}/rms_before",
    "gradient_after": "gradient/{}/rms_after",
}


def hold(row, label, expected, but=()):
    for key, name in NAMES.items():
        if key not in but:
            found = row[name.format(label)]
            assert found == pytest.approx(expected[key], rel=1e-5), (label, key)


# -- the numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("wiring", ["prenorm", "postnorm", "rezero"])
def test_the_rows_equal_what_hooks_of_our_own_see(wiring):
    model = gpt(wiring)
    if wiring == "rezero":  # away from its start, where all branches are silent
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 0 or parameter.numel() == 1:
                    parameter.fill_(0.3)
                assert name
    twin = copy.deepcopy(model)
    with watch(model, every=1, flush=1) as watched:
        loss = loss_of(model, tokens())
        loss.backward()
        watched.step(loss)
    connections = list(twin.stack)
    expected, naive_loss = naive(twin, connections, tokens(), [c.branch for c in connections])
    row = watched.row()
    for i, vitals in enumerate(expected):
        hold(row, f"layer_{i // 2}.{i % 2}", vitals)
    assert row["loss"] == pytest.approx(naive_loss)
    assert row["stream/growth"] == pytest.approx(expected[-1]["after"] / expected[0]["before"])
    logs = torch.tensor([e["gradient_after"] for e in expected]).double().log10()
    depth = torch.arange(len(logs)).double()
    slope = ((depth - depth.mean()) * (logs - logs.mean())).sum() / depth.var() / (len(logs) - 1)
    assert row["gradient/slope"] == pytest.approx(10 * slope.item(), abs=1e-4)
    assert row["non_finite"] == 0
    assert row["step"] == 1
    norms = [p.grad.double().norm().item() for p in connections[2].parameters()]
    assert row["parameters/layer_1.0/gradient_norm"] == pytest.approx(math.hypot(*norms))
    norms = [p.grad.double().norm().item() for p in twin.parameters()]
    assert row["parameters/gradient_norm"] == pytest.approx(math.hypot(*norms))
    inside = {p for c in connections for p in c.parameters()}
    norms = [p.grad.double().norm().item() for p in twin.parameters() if p not in inside]
    assert row["parameters/rest/gradient_norm"] == pytest.approx(math.hypot(*norms))


@pytest.mark.parametrize("checkpointed", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 1, 0, 1, 1)])
def test_blocks_of_a_foreign_model_called_once_or_more_with_and_without_checkpoints(
    order, checkpointed
):
    model = Net(order, checkpointed=checkpointed, tied=True)
    twin = Net(order, tied=True)
    with watch(model, every=1, flush=1) as watched:
        loss = loss_of(model, tokens())
        loss.backward()
        watched.step(loss)
    expected, _ = naive(twin, list(twin.blocks), tokens())
    seen = {}
    for block, vitals in zip(order, expected, strict=True):
        seen[block] = seen.get(block, 0) + 1
        label = f"layer_{block}" + (f"#{seen[block]}" if seen[block] > 1 else "")
        hold(watched.row(), label, vitals)


class Linear(Branch):
    """A branch of its own kind, which a stack takes as it is."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x, context):
        return self.lin(x)


def test_a_branch_that_several_connections_share_is_heard_by_the_one_that_calls_it():
    torch.manual_seed(0)
    branch = Linear()
    stack = Stack([branch, Linear(), branch], "prenorm", dim=8, shared=True)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 8), stack, nn.Linear(8, VOCABULARY))
    with watch(model, every=1, flush=1) as watched:
        loss_of(model, tokens()).backward()
        watched.step()
    with torch.no_grad():
        x = model[0](tokens())
        for i, connection in enumerate(stack):
            out = connection.branch.lin(nn.functional.layer_norm(x, (8,)))
            assert watched.row()[f"branch/layer_{i}/share"] == pytest.approx(rms(out) / rms(x))
            x = x + out


class Twice(nn.Module):
    """Calls the module around its blocks twice in a pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.body = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, inputs):
        return self.head(self.body(self.body(self.embed(inputs))))


def test_a_row_of_blocks_called_twice_in_a_pass_is_told_apart_and_alone_it_begins_one():
    model, twin = Twice(), Twice()
    with watch(model, every=1, flush=1) as watched:
        loss_of(model, tokens()).backward()
        watched.step()
        expected, _ = naive(twin, list(twin.body), tokens())
        for label, vitals in zip(("0", "1", "0#2", "1#2"), expected, strict=True):
            hold(watched.row(), f"layer_{label}", vitals)
        for _ in range(2):  # as in a loop that never calls the model itself
            loss = model.head(model.body(model.embed(tokens()))).square().mean()
            loss.backward()
        watched.step()
    assert not [name for name in watched.row() if "#2" in name]


def test_several_stacks_in_a_model_have_names_of_their_own():
    model = nn.ModuleDict({"a": gpt(), "b": gpt()})
    with watch(model, every=1, flush=1) as watched:
        (loss_of(model["a"], tokens()) + loss_of(model["b"], tokens(1))).backward()
        watched.step()
    names = [f"stream/layer_{i}/rms_before" for i in range(8)]
    assert [name for name in watched.row() if name.endswith("rms_before")][::2] == names


def test_sums_of_half_precision_are_taken_in_float32():
    model = Net(dim=64).bfloat16()
    twin = copy.deepcopy(model)
    with watch(model, every=1, flush=1) as watched:
        loss_of(model, tokens(batch=64)).backward()
        watched.step()
    expected, _ = naive(twin, list(twin.blocks), tokens(batch=64))
    hold(watched.row(), "layer_1", expected[1])


def test_a_block_that_writes_into_its_input_shows_no_share_rather_than_a_wrong_one():
    model = Net(in_place=True)
    with watch(model, every=1, flush=1) as watched:
        loss_of(model, tokens()).backward()
        watched.step()
    assert not [name for name in watched.row() if name.startswith("branch/")]
    assert watched.row()["stream/layer_2/rms_after"] > 0


def test_several_passes_before_a_step_count_as_their_mean():
    model, twin = Net(), Net()
    with watch(model, every=1, flush=1) as watched:
        train(model, 1, watched, batches=3)
    passes = [naive(twin, list(twin.blocks), tokens(part))[0] for part in range(3)]
    for key in ("before", "after", "gradient_before", "gradient_after"):
        mean = sum(p[1][key] for p in passes) / 3
        assert watched.row()[NAMES[key].format("layer_1")] == pytest.approx(mean), key


@pytest.mark.parametrize("kept", ["bfloat16", "float32"])
def test_numbers_are_summed_in_float32_under_autocast(kept):
    model = Net(dim=64)
    twin = copy.deepcopy(model)
    with (
        watch(model, every=1, flush=1) as watched,
        torch.autocast("cpu", torch.bfloat16, enabled=kept == "bfloat16"),
    ):
        loss_of(model, tokens(batch=64)).backward()
        watched.step()
    with torch.autocast("cpu", torch.bfloat16, enabled=kept == "bfloat16"):
        expected, _ = naive(twin, list(twin.blocks), tokens(batch=64))
    hold(watched.row(), "layer_1", expected[1])


# -- steps, transfers, resume ------------------------------------------------------------------


def test_every_nth_step_from_the_first_on_is_a_sample_and_rows_come_with_the_transfer():
    rows, seen, model = [], [], Net()
    with watch(model, every=3, flush=2, log=lambda row, step: rows.append(step)) as watched:
        for _ in range(10):
            train(model, 1, watched)
            seen.append(list(rows))
    assert seen == [[]] * 3 + [[1, 4]] * 6 + [[1, 4, 7, 10]]


def test_parameters_are_read_in_the_first_sample_and_every_flushth_after_it():
    rows, model = {}, Net()
    with watch(model, every=2, flush=3, log=lambda row, step: rows.update({step: row})) as watched:
        train(model, 4, watched)
        watched.flush()  # as a checkpoint does
        train(model, 10, watched)
    read = [step for step, row in rows.items() if "parameters/gradient_norm" in row]
    assert list(rows) == [1, 3, 5, 7, 9, 11, 13]
    assert read == [1, 7, 13]


def test_a_resumed_watch_goes_on_counting_and_judges_beside_the_first_row():
    whole, model = [], Net()
    with watch(model, every=2, log=lambda row, step: whole.append((step, row))) as watched:
        train(model, 4, watched)
        state = copy.deepcopy(model.state_dict())
        assert watched.count == 4
        for step in (4, 5):
            resume_step(model, watched, step)
    again, model = [], Net()
    model.load_state_dict(state)
    with watch(model, every=2, log=lambda row, step: again.append((step, row))) as watched:
        watched.begin(4)
        watched.first = whole[0][1]
        for step in (4, 5):
            resume_step(model, watched, step)
        assert watched.first is whole[0][1]
    assert [step for step, _ in whole] == [1, 3, 5]
    assert again == whole[2:]


def resume_step(model, watched, step):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = loss_of(model, tokens(step))
    loss.backward()
    watched.step(loss)
    optimizer.step()
    optimizer.zero_grad()


def test_begin_forgets_what_was_tried_out_before():
    model, twin = Net(), Net()
    with watch(model, every=1, flush=1) as watched:
        loss_of(model, tokens(7)).backward()
        model.zero_grad()
        watched.begin()
        loss_of(model, tokens()).backward()
        watched.step()
    expected, _ = naive(twin, list(twin.blocks), tokens())
    hold(watched.row(), "layer_0", expected[0])


def test_begin_drops_rows_that_wait_and_a_closed_watch_measures_nothing():
    model, rows = Net(), []
    watched = watch(model, every=1, flush=5, log=lambda row, step: rows.append(step))
    train(model, 2, watched)
    watched.begin(7)
    train(model, 2, watched)
    watched.close()
    train(model, 6, watched)
    watched.close()
    assert rows == [8, 9]


def test_passes_without_a_graph_and_steps_in_between_are_not_measured():
    model, twin = Net(), Net()
    with watch(model, every=2, flush=1) as watched:
        with torch.no_grad():
            model(tokens(9))
        loss_of(model, tokens()).backward()
        with torch.no_grad():
            model(tokens(9))
        watched.step()
        first = watched.row()
        loss_of(model, tokens(5)).backward()
        watched.step()
        assert watched.row() == first
    expected, _ = naive(twin, list(twin.blocks), tokens())
    hold(first, "layer_2", expected[2])


def test_a_given_optimizer_counts_its_steps_and_shows_how_far_they_go():
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with watch(model, every=1, flush=1, optimizer=optimizer) as watched:
        with pytest.raises(ValueError, match="counts the optimizer's steps by itself; leave step"):
            watched.step()
        loss = loss_of(model, tokens())
        loss.backward()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        watched.note_loss(loss)
        optimizer.step()
        assert watched.count == 1
    row = watched.row()
    assert row["loss"] == pytest.approx(loss.item())
    for label, prefixes in {"layer_1": ("blocks.1.",), "rest": ("embed.", "head.")}.items():
        names = [n for n in before if n.startswith(prefixes)]
        now = dict(model.named_parameters())
        moved = math.hypot(*((now[n] - before[n]).double().norm().item() for n in names))
        size = math.hypot(*(before[n].double().norm().item() for n in names))
        ratio = row[f"parameters/{label}/update_ratio"]
        assert ratio == pytest.approx(moved / size, rel=1e-4)


def test_the_scale_of_a_grad_scaler_is_divided_out():
    class Scaler:
        """What watch asks of a GradScaler, whose own scale a CPU lacks."""

        def scale(self, x):
            return x * 65536.0

    model, twin = Net(), Net()
    with watch(model, every=1, flush=1, scaler=Scaler()) as watched:
        (65536.0 * loss_of(model, tokens())).backward()
        watched.step()
    expected, _ = naive(twin, list(twin.blocks), tokens())
    hold(watched.row(), "layer_1", expected[1])


def test_a_real_grad_scaler_and_its_skipped_step():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    with watch(model, every=1, flush=1, optimizer=optimizer, scaler=scaler) as watched:
        for step in range(12):
            scaler.scale(loss_of(model, tokens(step))).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert 0 < watched.count <= 12
    assert not watched.findings  # an overflow under a scale is the scaler's business


# -- the training does not notice --------------------------------------------------------------


def hooks_of(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(m, name)) for m in model.modules() for name in names]


@pytest.mark.parametrize("make", [gpt, Net], ids=["ours", "foreign"])
@pytest.mark.parametrize("every", [1, 3])
def test_training_is_bitwise_the_same_watched_or_not_and_no_hook_stays(make, every):
    plain, model = make(), make()
    before = hooks_of(model)
    names = list(model.state_dict())
    with watch(model, every=every) as watched:
        assert list(model.state_dict()) == names
        assert len(list(model.parameters())) == len(list(plain.parameters()))
        losses = train(model, 7, watched)
    assert losses == train(plain, 7)
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert hooks_of(model) == before
    output, expected = model(tokens(3)), plain(tokens(3))
    assert torch.equal(output, expected)
    output.sum().backward()
    expected.sum().backward()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_after_an_error_in_the_loop_the_hooks_are_gone_and_nothing_is_fetched():
    model, rows = Net(), []
    before = hooks_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop():
        with watch(model, 1, lambda row, step: rows.append(row), optimizer=optimizer, flush=9):
            loss_of(model, tokens()).backward()
            optimizer.step()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        loop()
    assert hooks_of(model) == before
    assert not rows
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


class NoTransfer(TorchDispatchMode):
    """Refuses what would wait for a device."""

    REFUSED = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name.removeprefix("aten::") not in self.REFUSED, func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("make", [gpt, Net], ids=["ours", "foreign"])
def test_nothing_waits_for_the_device_between_transfers(make):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    with watch(model, every=1, flush=100, optimizer=optimizer) as watched:
        with NoTransfer():
            for step in range(3):
                loss = loss_of(model, tokens(step))
                loss.backward()
                watched.note_loss(loss)
                optimizer.step()
                optimizer.zero_grad()
        assert len(watched._rows) == 3
    with pytest.raises(AssertionError), NoTransfer():
        torch.ones(1).item()


def graphs_and_breaks(model, backend, watched, steps=4):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend=backend)
    losses = train(model, steps, watched, compiled)
    counters = torch._dynamo.utils.counters
    return losses, counters["stats"]["unique_graphs"], dict(counters["graph_break"])


@pytest.mark.parametrize("make", [gpt, Net], ids=["ours", "foreign"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_compiled_after_watch_is_one_graph_with_the_same_rows(make, backend):
    eager, model = make(), make()
    rows, compiled_rows = [], []
    with watch(eager, 2, lambda row, step: rows.append(row)) as watched:
        losses = train(eager, 4, watched)
    with watch(model, 2, lambda row, step: compiled_rows.append(row)) as watched:
        compiled, graphs, breaks = graphs_and_breaks(model, backend, watched)
    assert (graphs, breaks) == (1, {})
    assert compiled == pytest.approx(losses, rel=1e-6)
    assert len(rows) == len(compiled_rows) == 2
    for row, other in zip(rows, compiled_rows, strict=True):
        assert row.keys() == other.keys()
        assert [other[k] for k in row] == pytest.approx(list(row.values()), rel=1e-4, abs=1e-6)
    torch._dynamo.reset()


def test_a_model_that_was_compiled_and_called_before_is_noticed():
    model = Net()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    train(model, 1, compiled=compiled)
    with (
        pytest.warns(UserWarning, match=r"watch saw no call of blocks\.0 and 2 others\. If the"),
        watch(compiled, every=1, flush=1) as watched,
    ):
        train(model, 2, watched, compiled)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("wiring", list(catalogue()))
def test_every_wiring_is_measured_at_every_connection(wiring):
    model, plain = gpt(wiring), gpt(wiring)
    with watch(model, every=1, flush=1, on_finding=lambda *_: None) as watched:
        torch.manual_seed(2)  # one of them drops
        losses = train(model, 2, watched)
    torch.manual_seed(2)
    assert losses == train(plain, 2)
    row = watched.row()
    for label in ("layer_0.0", "layer_0.1", "layer_1.0", "layer_1.1"):
        assert row[f"stream/{label}/rms_before"] > 0
        assert row[f"stream/{label}/rms_after"] > 0
        assert row[f"branch/{label}/share"] >= 0
        assert row[f"gradient/{label}/rms_after"] > 0


# -- verdicts ----------------------------------------------------------------------------------


def sample(before, gradients, loss=1.0, scaled=False):
    vitals = [
        Vital(f"layer_{i}", f"b.{i}", s, s, s, g, g)
        for i, (s, g) in enumerate(zip(before, gradients, strict=True))
    ]
    return Sample(tuple(vitals), {}, loss, scaled)


NAN, INFINITY = math.nan, math.inf
CALM = sample([1.0, 1.0, 1.0], [1e-3, 1e-3, 1e-3])
CASES = [
    ("calm", CALM, []),
    ("forward", sample([1.0, NAN, NAN], [NAN] * 3), [("non-finite", "sick", "b.1")]),
    ("backward", sample([1.0] * 3, [NAN, NAN, 1.0]), [("non-finite", "sick", "b.1")]),
    ("overflow", sample([1.0] * 3, [INFINITY] * 3, scaled=True), []),
    ("loss", sample([1.0] * 3, [1.0] * 3, NAN), [("non-finite", "sick", "the head or the loss")]),
    ("small", sample([1.0] * 3, [1e-9, 1e-6, 2e-3]), [("vanishing-gradient", "sick", "b.0")]),
    ("gone", sample([1.0] * 3, [0.0, 0.0, 1e-3]), [("vanishing-gradient", "sick", "b.0")]),
    ("less", sample([1.0] * 3, [1e-8, 1e-6, 2e-3]), []),
    ("large", sample([1.0] * 3, [1e4, 1.0, 1e-3]), [("exploding-gradient", "sick", "b.0")]),
    ("nothing", sample([1.0] * 3, [0.0] * 3), []),
    ("grown", sample([1.0, 9.0, 299.0], [1.0] * 3), []),
    ("more", sample([1.0, 9.0, 301.0], [1.0] * 3), [("stream-blow-up", "warning", "b.2")]),
    ("blown", sample([1.0, 9.0, 3001.0], [1.0] * 3), [("stream-blow-up", "sick", "b.2")]),
]


@pytest.mark.parametrize(
    ("measured", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_verdicts(measured, expected):
    found = judge_sample(measured, CALM.row())
    assert [(f.code, f.severity, f.where) for f in found] == expected
    for finding in found:
        assert all((finding.value, finding.expected, finding.why, finding.remedy, finding.source))
        assert all((finding.why_zh, finding.remedy_zh))
    assert GROWTH["warning"] < GROWTH["sick"]
    assert UNDERFLOW > 0


def test_a_run_that_turns_sick_says_so_once_with_step_place_value_and_remedy():
    model = Net()
    line = (
        r"step 2: sick: non-finite at blocks\.1: NaN or infinity, expected finite values\. The "
        r"first value that is not finite is on the way forward there\. Lower the learning rate"
    )
    with watch(model, 1, flush=1) as watched:
        train(model, 1, watched)
        with torch.no_grad():
            model.blocks[1].lin.weight.fill_(math.inf)
        with pytest.warns(UserWarning, match=line) as heard:
            train(model, 2, watched)
    assert len(heard) == 1
    assert watched.row()["finding/non-finite"] == 2
    assert [f.code for f in watched.findings] == ["non-finite"]
    told = []
    model = Net()
    with watch(model, 1, flush=1, on_finding=lambda *heard: told.append(heard)) as watched:
        with torch.no_grad():
            model.blocks[1].lin.weight.fill_(math.nan)
        train(model, 2, watched)
    assert [(finding.code, step) for finding, step in told] == [("non-finite", 1)]


def test_a_deep_plain_network_without_skips_is_told_of_its_vanishing_gradient():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.Sigmoid()) for _ in range(16)]
    model = nn.Sequential(nn.Embedding(VOCABULARY, 16), *layers, nn.Linear(16, VOCABULARY))
    with (
        pytest.warns(UserWarning, match="sick: vanishing-gradient at 1: gradient RMS"),
        watch(model, every=1, flush=1) as watched,
    ):
        train(model, 1, watched)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every=0 must be at least 1"),
        ({"flush": 0}, "flush=0 must be at least 1"),
        ({"blocks": "layer.*"}, "Net has no module named 'layer.*'; name its blocks by a glob"),
        ({"log": 3}, "log=3 must have log(dict, step) or add_scalar(name, value, step)"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_hook_is_set(settings, message):
    model = Net()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        watch(model, **settings)
    assert not any(hooks_of(model))
    with pytest.raises(ValueError, match=r"^Linear has no module that is a wiring or repeats"):
        watch(nn.Linear(2, 2))
