"""Lesions: against hooks that zero a branch in whole forward passes, and nothing left behind."""

import copy
import dataclasses
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from addnorm import GPT, MLP, GPTConfig, MLPConfig, ResNet, ResNetConfig
from addnorm.files import finite
from addnorm.models.layers import AttentionConfig
from addnorm.probe import lesion
from addnorm.probe.discover import discover
from addnorm.probe.lesion import first_order, lesions
from addnorm.probe.losses import loss_of
from addnorm.probe.structure import Join

VOCABULARY = 11


def gpt(wiring, depth=3, **changes):
    torch.manual_seed(0)
    settings = {"dim": 16, "heads": 2, "context": 8} | changes
    model = GPT(GPTConfig(depth=depth, wiring=wiring, vocab_size=VOCABULARY, **settings))
    shake(model)
    return model, torch.randint(VOCABULARY, (2, 8)), torch.randint(VOCABULARY, (2, 8))


def shake(model):
    """Move the weights away from their start, where branches may be silent."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))


def branches(model):
    """The modules whose output is a branch, in our stacks."""
    return [m.branch for m in model.modules() if hasattr(m, "branch") and hasattr(m, "site")]


class Zeroed:
    """Zeroes what some calls return: `(module, call)`, or a module for its first call."""

    def __init__(self, places):
        self.places = [p if isinstance(p, tuple) else (p, 0) for p in places]
        self.calls = {}

    def __call__(self, module, _args, out):
        call = self.calls.get(module, 0)
        self.calls[module] = call + 1
        if (module, call) not in self.places:
            return None
        if isinstance(out, tuple):
            return (torch.zeros_like(out[0]), *out[1:])
        return torch.zeros_like(out)

    def __enter__(self):
        modules = dict.fromkeys(module for module, _ in self.places)
        self.handles = [m.register_forward_hook(self) for m in modules]

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def naive(model, inputs, measure, places):
    """The loss with the outputs of these calls replaced by zeros, by a whole forward pass."""
    model.eval()
    with torch.no_grad(), Zeroed(places):
        return measure(model(**inputs) if isinstance(inputs, dict) else model(inputs)).item()


def check(model, inputs, measure, places, way="resumed", **options):
    """Hold singles, pairs and runs of two against whole forward passes."""
    n = len(places)
    structure = discover(model, inputs)
    assert len(structure) == n
    found = lesions(
        model,
        inputs,
        loss=lambda out, _: measure(out),
        pairs=True,
        runs=(2, n),
        structure=structure,
        **options,
    )
    assert found.way == way, found.note
    clean = naive(model, inputs, measure, [])
    assert found.clean == pytest.approx(clean, rel=1e-6)
    assert len({round(x, 9) for x in found.singles}) == n  # no two are mixed up unseen
    for i in range(n):
        expected = naive(model, inputs, measure, places[i : i + 1]) - clean
        assert found.singles[i] == found.pairs[i][i] == pytest.approx(expected, abs=1e-5)
    for i, j in itertools.combinations(range(n), 2):
        expected = naive(model, inputs, measure, [places[i], places[j]]) - clean
        assert found.pairs[i][j] == found.pairs[j][i] == pytest.approx(expected, abs=1e-5)
    assert found.runs[2] == [found.pairs[i][i + 1] for i in range(n - 1)]
    assert found.runs[n][0] == pytest.approx(
        naive(model, inputs, measure, places) - clean, abs=1e-5
    )
    assert found.complete and found.note == "" if way == "resumed" else found.note
    return found


def cross_entropy_to(targets):
    return lambda out: F.cross_entropy(out.reshape(-1, out.shape[-1]), targets.reshape(-1))


@pytest.mark.parametrize(
    "wiring",
    ["prenorm", "postnorm", "sandwich", "rezero", "unet", "attnres", "mhc", "reversible"],
)
def test_a_gpt_equals_the_loop(wiring):
    """Also where the stream is a history or several, and the last wiring owns its loop."""
    model, inputs, targets = gpt(wiring, depth=2)
    check(model, inputs, cross_entropy_to(targets), branches(model))


def test_what_a_branch_leaves_for_later_ones_is_not_lost():
    """The values of the first attention are read by the others, also when it is not run again."""
    model, inputs, targets = gpt("prenorm", depth=3, attention=AttentionConfig(value_residual=True))
    check(model, inputs, cross_entropy_to(targets), branches(model))


@pytest.mark.parametrize("wiring", ["postact", "residual"])
def test_a_resnet_equals_the_loop(wiring):
    """With batch norms, which must not see the lesions, and projected shortcuts, which stay."""
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(depth=14, width=4, wiring=wiring, shortcut="B"))
    shake(model)
    images = torch.randn(2, 3, 8, 8)
    targets = torch.tensor([1, 2])
    check(model, images, cross_entropy_to(targets), branches(model))


def test_an_mlp_equals_the_loop():
    torch.manual_seed(0)
    model = MLP(MLPConfig(in_dim=6, dim=6, out_dim=4, depth=5))
    check(model, torch.randn(3, 6), cross_entropy_to(torch.tensor([0, 1, 3])), branches(model))


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_torch_encoder_equals_the_loop(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    shake(model)
    places = [m for block in model.layers for m in (block.dropout1, block.dropout2)]
    direction = torch.randn(2, 5, 8)
    check(model, torch.randn(2, 5, 8), lambda out: (out * direction).mean(), places)


def test_a_model_of_transformers_equals_the_loop():
    """Keyword arguments, a mask of the batch, tuples inside, and the model's own loss."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, n_positions=8, vocab_size=11, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    shake(model)
    tokens = torch.randint(11, (2, 8))
    mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": tokens}
    places = [m for block in model.transformer.h for m in (block.attn, block.mlp)]
    check(model, inputs, lambda out: out.loss, places)
    own = lesions(model, inputs, estimate=False)
    assert own.loss_kind == "the model's own loss"


class Basic(nn.Module):
    """A block as in torchvision: in place wherever possible."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1 if inputs == outputs else 2, 1)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down = nn.Conv2d(inputs, outputs, 1, 2) if inputs != outputs else None

    def forward(self, x):
        identity = x if self.down is None else self.down(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.layers = nn.Sequential(Basic(4, 4), Basic(4, 4), Basic(4, 6), Basic(6, 6))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.layers(self.stem(x)).mean((-2, -1)))


def test_in_place_blocks_equal_the_loop():
    torch.manual_seed(0)
    model = Images()
    shake(model)
    places = [block.bn2 for block in model.layers]
    check(model, torch.randn(2, 3, 8, 8), cross_entropy_to(torch.tensor([1, 3])), places)


class Careless(nn.Module):
    """Changes what its blocks returned with functions that no module shows."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            f = block(x)
            x = x + f
            f.zero_()
        return x


def test_outputs_that_change_later_are_copied():
    torch.manual_seed(0)
    model = Careless()
    found = check(model, torch.randn(2, 4), lambda out: out.square().mean(), list(model.blocks))
    assert found.way == "resumed"


class Shared(nn.Module):
    """One block in a row with itself, another inside it; each call at a scale of its own."""

    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh())
        self.block = Adds(self.inner)
        self.read = nn.Linear(4, 3)

    def forward(self, x):
        x = self.lift(x)
        for i in range(4):
            x = self.block(x * (1 + i / 4))
        return self.read(x)


class Adds(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


def test_a_shared_block_loses_one_of_its_calls():
    torch.manual_seed(0)
    model = Shared()
    places = [(model.inner, call) for call in range(4)]
    check(model, torch.randn(2, 4), cross_entropy_to(torch.tensor([0, 2])), places)


class Remembers(Shared):
    """The head reads a list that the blocks fill: a call that is left out is missing there."""

    def forward(self, x):
        self.seen = []
        x = self.lift(x)
        for i in range(4):
            x = self.block(x * (1 + i / 4))
        return self.read(x + torch.stack(self.seen).mean(0))


class Notes(Adds):
    def __init__(self, inner, owner):
        super().__init__(inner)
        self.owner = [owner]

    def forward(self, x):
        x = x + self.inner(x)
        self.owner[0].seen.append(x)
        return x


def test_what_cannot_be_left_out_is_run_and_said():
    torch.manual_seed(0)
    model = Remembers()
    model.block = Notes(model.inner, model)
    places = [(model.inner, call) for call in range(4)]
    found = check(
        model, torch.randn(2, 4), cross_entropy_to(torch.tensor([0, 2])), places, way="loop"
    )
    assert "runs the whole network" in found.note
    assert found.memory > 0


def test_blocks_taken_whole():
    """A block by name: its lesion returns its input."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *[Adds(nn.Sequential(nn.Linear(4, 4), Adds(nn.Tanh()))) for _ in range(3)]
    )
    x = torch.randn(2, 4)
    structure = dataclasses.replace(
        discover(model, x),
        joins=tuple(
            Join(name=str(i), block=str(i), kind="block", module=str(i), call=0) for i in range(3)
        ),
    )
    taken = lesions(model, x, structure=structure, estimate=False)
    for i in range(3):
        less = nn.Sequential(*(block for k, block in enumerate(model) if k != i))
        found, kind = loss_of(less(x), None, None)
        assert taken.singles[i] == pytest.approx(found.item() - taken.clean, abs=1e-6)
        assert taken.loss_kind == kind


# -- cost, budget, purity --------------------------------------------------------------------------


def test_half_and_a_third_of_the_work():
    """n + 1 passes take n/2 + 1, and all pairs of 12 connections less than 0.4 of theirs."""
    model, inputs, targets = gpt("prenorm", depth=6)
    n, ran = 12, 0

    def count(*_):
        nonlocal ran
        ran += 1

    for branch in branches(model):
        branch.branch.register_forward_hook(count) if hasattr(branch, "branch") else None
        next(m for m in branch.modules() if isinstance(m, nn.Linear)).register_forward_hook(count)
    structure = discover(model, inputs)
    ran = 0
    one = lesions(model, inputs, targets, estimate=False, structure=structure)
    assert ran <= n * (n + 1) // 2
    assert one.forwards <= n / 2 + 2
    assert one.evaluations == n + 2
    ran = 0
    both = lesions(model, inputs, targets, pairs=True, estimate=False, structure=structure)
    assert ran <= 0.37 * n * (1 + n + n * (n - 1) / 2)
    assert both.evaluations == 2 + n + n * (n - 1) // 2


def test_the_budget_ends_it_after_the_first():
    model, inputs, targets = gpt("prenorm")
    found = lesions(model, inputs, targets, pairs=True, budget=0.0)
    assert [math.isnan(x) for x in found.singles] == [True] * 5 + [False]
    assert not found.complete
    assert "1 of 21 evaluations" in found.note
    assert found.evaluations == 3
    assert len(found.first_order) == 6
    assert math.isnan(found.correlation)


def test_progress_counts_every_evaluation():
    model, inputs, targets = gpt("prenorm", depth=2)
    told = []
    lesions(
        model,
        inputs,
        targets,
        pairs=True,
        runs=(3,),
        order="swap",
        progress=lambda *p: told.append(p),
    )
    total = 4 + 6 + 2 + 1
    assert told == [(i, total) for i in range(1, total + 1)]


def state(model):
    return (
        copy.deepcopy(model.state_dict()),
        [m.training for m in model.modules()],
        [list(m.__dict__) for m in model.modules()],
        [list(m._modules) for m in model.modules()],
        [id(m) for m in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        torch.get_rng_state(),
        torch.overrides._len_torch_function_stack(),
    )


def same(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, tuple | list):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_changes(fails):
    """Also when the loss raises in a late pass, and where the model was in training mode."""
    torch.manual_seed(0)
    model = Images().train()
    model.layers[1].eval()
    model.layers[0].forward = model.layers[0].forward  # an own forward, as some libraries set
    calls = 0

    def loss(out, _):
        nonlocal calls
        calls += 1
        if fails and calls > 6:
            raise KeyError("in the middle")
        torch.rand(1)
        return out.square().mean()

    before = state(model)
    images = torch.randn(2, 3, 8, 8)
    before = (*before[:-2], torch.get_rng_state(), before[-1])
    if fails:
        with pytest.raises(KeyError, match="in the middle"):
            lesions(model, images, loss=loss, order="swap")
    else:
        lesions(model, images, loss=loss, order="swap")
    assert same(before, state(model))


# -- the first-order map ---------------------------------------------------------------------------


@pytest.mark.parametrize("wiring", ["prenorm", "postnorm", "mhc"])
def test_first_order_is_the_slope_of_a_gate(wiring):
    """Against central differences of a gate on the branch, in float64."""
    model, inputs, targets = gpt(wiring, depth=2)
    model = model.double().eval()
    found = first_order(model, inputs, targets)
    measure = cross_entropy_to(targets)
    for k, branch in enumerate(branches(model)):

        def gated(gate, branch=branch):
            handle = branch.register_forward_hook(lambda _m, _a, out: gate * out)
            with torch.no_grad():
                value = measure(model(inputs)).item()
            handle.remove()
            return value

        slope = (gated(1 - 1e-4) - gated(1 + 1e-4)) / 2e-4
        assert found[k] == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_first_order_agrees_with_small_lesions():
    """Small branches have small lesions, which are then linear."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth=4, dim=16, heads=2, context=8, vocab_size=VOCABULARY))
    inputs = torch.randint(VOCABULARY, (2, 8))
    found = lesions(model, inputs, inputs)
    assert found.correlation > 0.99
    assert found.first_order == pytest.approx(found.singles, rel=0.2, abs=1e-5)


# -- order -----------------------------------------------------------------------------------------


def test_swapped_layers_equal_a_model_that_was_built_so():
    model, inputs, targets = gpt("prenorm", depth=3)
    measure = cross_entropy_to(targets)
    found = lesions(model, inputs, targets, order="swap", singles=False, estimate=False)
    assert found.singles == []
    assert found.way == "resumed"
    clean = naive(model, inputs, measure, [])
    expected = []
    for layer in (1, 0):  # from the last to the first
        other = copy.deepcopy(model)
        c = other.stack.connections
        for part in range(2):
            i, j = 2 * layer + part, 2 * layer + 2 + part
            c[i], c[j] = c[j], c[i]
        expected.append(naive(other, inputs, measure, []) - clean)
    assert [o.delta for o in found.order] == pytest.approx(expected, abs=1e-6)
    assert found.order[0].blocks == ["stack.connections.4", "stack.connections.2"]
    assert all(abs(o.delta) > 1e-4 for o in found.order)


def test_swapped_blocks_of_a_sequential():
    """Only equal blocks change places: not the one that projects."""
    torch.manual_seed(0)
    model = Images()
    shake(model)
    images, measure = torch.randn(2, 3, 8, 8), cross_entropy_to(torch.tensor([1, 3]))
    found = lesions(model, images, loss=lambda out, _: measure(out), order="swap")
    other = copy.deepcopy(model)
    other.layers[0], other.layers[1] = other.layers[1], other.layers[0]
    expected = naive(other, images, measure, []) - naive(model, images, measure, [])
    (only,) = found.order
    assert only.blocks == ["layers.1", "layers.0"]
    assert only.delta == pytest.approx(expected, abs=1e-6)


def test_shuffles_have_the_distance_they_say_and_follow_the_seed():
    model, inputs, targets = gpt("prenorm", depth=4)
    options = {"order": "shuffle", "singles": False, "estimate": False}
    found = lesions(model, inputs, targets, seed=3, **options)
    assert len(found.order) == lesion.SHUFFLES
    assert found.order == lesions(model, inputs, targets, seed=3, **options).order
    assert found.order != lesions(model, inputs, targets, seed=4, **options).order
    for one in found.order:
        places = [int(name.rpartition(".")[2]) for name in one.blocks]
        later = [(a, b) for a, b in itertools.combinations(places, 2) if a > b]
        assert len(later) == one.swaps
        assert math.isfinite(one.delta)
    assert found.order[-1].swaps == 6  # reversed


class Numbered(nn.Module):
    """Blocks that refuse another place than their own."""

    class Block(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.number = number
            self.branch = nn.Linear(4, 4)

        def forward(self, x, number):
            if number != self.number:
                raise ValueError("not my place")
            return x + self.branch(x), number + 1

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block(i) for i in range(3))

    def forward(self, x):
        number = 0
        for block in self.blocks:
            x, number = block(x, number)
        return x


def test_orders_that_are_not_possible_are_said():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x + self.one(x)
            return x + self.two(x)

    found = lesions(Two(), torch.randn(2, 4), order="swap")
    assert found.order == []
    assert found.note == "no two neighbouring blocks are interchangeable"
    found = lesions(Numbered(), torch.randn(2, 4), order="swap")
    assert [math.isnan(o.delta) for o in found.order] == [True, True]
    assert "did not run in 2 of 2 orders" in found.note
    assert found.way == "resumed"


# -- settings --------------------------------------------------------------------------------------


def test_settings_out_of_range():
    model, inputs, _ = gpt("prenorm", depth=1)
    with pytest.raises(ValueError, match=r"unknown order 'swop'.*did you mean 'swap'"):
        lesions(model, inputs, order="swop")
    with pytest.raises(ValueError, match="runs holds 3; it must be from 1 to 2"):
        lesions(model, inputs, runs=(1, 3))


def test_plain_values_and_interactions():
    model, inputs, targets = gpt("prenorm", depth=2)
    found = lesions(model, inputs, targets, pairs=True, runs=(2,), order="swap")
    plain = found.to_dict()
    assert json.loads(json.dumps(finite(plain)))["runs"]["2"] == found.runs[2]
    table = found.interaction()
    assert table[0][0] == 0
    assert table[0][2] == found.pairs[0][2] - found.singles[0] - found.singles[2]
