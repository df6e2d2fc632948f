"""The path spectrum: against every path by itself, however many tensors the stream is made of.

The oracle knows no stream. With gates b on what comes back through the branches the gradient G(b)
is linear in each of them, so the path through the branches S alone carries, by inclusion and
exclusion, `sum over T in S of (-1)^(|S| - |T|) G(T)`.
"""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from addnorm import GPT, MLP, GPTConfig, MLPConfig, ResNet, ResNetConfig
from addnorm.files import finite
from addnorm.models.layers import AttentionConfig
from addnorm.probe import paths, pieces
from addnorm.probe.discover import discover
from addnorm.probe.paths import Spectrum, spectrum

VOCABULARY = 11


def shaken(model):
    """Move the weights away from their start, where branches may be silent."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def gpt(wiring, depth=2, **changes):
    torch.manual_seed(0)
    settings = {"dim": 8, "heads": 2, "context": 4} | changes
    model = GPT(GPTConfig(depth=depth, wiring=wiring, vocab_size=VOCABULARY, **settings))
    return shaken(model), torch.randint(VOCABULARY, (2, 4)), torch.randint(VOCABULARY, (2, 4))


def branches(model):
    """The modules whose output is a branch, in our stacks."""
    return [m.branch for m in model.modules() if hasattr(m, "branch") and hasattr(m, "site")]


def cross_entropy(out, targets):
    return F.cross_entropy(out.reshape(-1, out.shape[-1]), targets.reshape(-1))


def brute_force(model, inputs, targets, places, entry, measure=cross_entropy):
    """Return g, and by length |g_k|, <g_k, g> / |g|^2 and the sum of |g_p|^2; in float64.

    `places` are the modules that return the updates, `entry` the module whose first argument, or
    whose output where it is `(module, "out")`, is the first point of the stream.
    """
    model = copy.deepcopy(model).double().eval()
    named = dict(model.named_modules())
    gates, entered = [1.0] * len(places), []
    for module in model.modules():
        if hasattr(module, "observed"):  # a stack that owns its loop lets no hook see it
            module.observed = True

    def gated(k):
        def hook(_module, _args, out):
            new = out * 1
            new.register_hook(lambda g: gates[k] * g)
            return new.clone()

        return hook

    for k, name in enumerate(places):
        named[name].register_forward_hook(gated(k))

    def keep(value):
        if not entered:
            leaves = [t for t in pytree.tree_leaves(value) if torch.is_floating_point(t)]
            entered.extend({id(t): t for t in leaves}.values())

    if isinstance(entry, tuple):
        named[entry[0]].register_forward_hook(lambda _m, _a, out: keep(out))
    else:
        named[entry].register_forward_pre_hook(lambda _m, args: keep(args[0]))
    given = inputs.double() if inputs.is_floating_point() else inputs
    given = given.requires_grad_() if given.is_floating_point() else given
    value = measure(model(given), targets)

    def gradient(bits):
        gates[:] = [float(bits >> k & 1) for k in range(len(places))]
        found = torch.autograd.grad(value, entered, retain_graph=True, allow_unused=True)
        pairs = zip(found, entered, strict=True)
        return torch.cat([(torch.zeros_like(t) if g is None else g).flatten() for g, t in pairs])

    n = len(places)
    table = torch.stack([gradient(bits) for bits in range(2**n)])
    whole = table[-1].clone()
    for k in range(n):  # inclusion and exclusion, one branch at a time
        split = table.view(-1, 2, 2**k, table.shape[-1])
        split[:, 1] -= split[:, 0]
    lengths = torch.tensor([bits.bit_count() for bits in range(2**n)])
    by_length = torch.stack([table[lengths == k].sum(0) for k in range(n + 1)])
    energy = [table[lengths == k].square().sum().item() for k in range(n + 1)]
    shares = (by_length @ whole / whole.square().sum()).tolist()
    return whole.norm().item(), by_length.norm(dim=1).tolist(), shares, energy


def names_of(model, modules):
    names = {m: name for name, m in model.named_modules()}
    return [names[m] for m in modules]


def close(found, expected, rel, floor):
    """Relative up to `rel`, but no nearer to 0 than `floor` of the largest."""
    assert found == pytest.approx(expected, rel=rel, abs=floor * max(map(abs, expected)))


def check(model, inputs, targets, places, entry, rel=1e-5, floor=1e-6, measure=cross_entropy):
    """Hold both readings against all the paths."""
    size, norms, shares, energy = brute_force(model, inputs, targets, places, entry, measure)
    found = spectrum(model, inputs, targets, incoherent="exact", loss=measure)
    assert len(found.names) == len(places)
    assert found.check <= 1e-5
    assert found.gradient == pytest.approx(size, rel=rel)
    close(found.norm, norms, rel, floor)
    close(found.share, shares, rel, floor)
    close(found.incoherent, energy, 2 * rel, floor)
    assert sum(found.share) == pytest.approx(1, abs=1e-5)
    assert found.incoherent_kind == "exact"
    assert found.incoherent_error == [0.0] * (len(places) + 1)
    return found


def of_ours(model, **options):
    """The places and the entry of our stacks: the branches, and what the first connection gets."""
    connections = [m for m in model.modules() if hasattr(m, "branch") and hasattr(m, "site")]
    (entry,) = names_of(model, connections[:1])
    return names_of(model, [c.branch for c in connections]), entry


# -- against all the paths -------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_ten_connections_equal_all_1024_paths(norm):
    model, inputs, targets = gpt("prenorm", depth=5, norm=norm)
    check(model.double(), inputs, targets, *of_ours(model), rel=1e-8, floor=1e-12)
    found = check(model.float(), inputs, targets, *of_ours(model))
    assert found.products == 10 * 11 // 2
    assert found.samples == 0
    assert found.memory > 0
    assert found.loss == pytest.approx(cross_entropy(model.eval()(inputs), targets).item())


@pytest.mark.parametrize(
    "wiring",
    [
        "postnorm",
        "sandwich",
        "highway",
        "rezero",
        "hyper",
        "mhc",
        "attnres",
        "attnres-block",
        "denseformer",
        "unet",
        "b2t",
        "resi-dual",
        "siamese",
        "reversible",
        "plain",
    ],
)
def test_wirings_equal_all_paths(wiring):
    """Norms and gates in the skip, several streams, histories, skips past connections, none."""
    model, inputs, targets = gpt(wiring)
    check(model, inputs, targets, *of_ours(model))


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("wiring", ["postact", "residual"])
def test_a_resnet_equals_all_paths(wiring, shortcut):
    """Shortcuts that project belong to the skip, and so does the ReLU behind the sum."""
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(depth=14, width=4, wiring=wiring, shortcut=shortcut))
    shaken(model)
    images, targets = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    places, _ = of_ours(model)
    size, norms, _, energy = brute_force(
        model, images, targets, places, names_of(model, [first_connection(model)])[0]
    )
    found = spectrum(model, images, targets, incoherent="exact")
    assert found.gradient == pytest.approx(size, rel=1e-4)
    close(found.norm, norms, 1e-4, 1e-5)
    close(found.incoherent, energy, 2e-4, 1e-5)


def first_connection(model):
    return next(m for m in model.modules() if hasattr(m, "branch") and hasattr(m, "site"))


def test_values_that_pass_from_branch_to_branch_equal_all_paths():
    """The first attention's values are read by the others: a way past connections."""
    model, inputs, targets = gpt("prenorm", attention=AttentionConfig(value_residual=True))
    check(model, inputs, targets, *of_ours(model))


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_torch_encoder_equals_all_paths(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model = shaken(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    places = [m for block in model.layers for m in (block.dropout1, block.dropout2)]
    direction = torch.randn(2, 5, 8)

    def inner(out, _):
        return (out * direction).sum()

    check(model, torch.randn(2, 5, 8), None, names_of(model, places), "layers.0", measure=inner)


class Basic(nn.Module):
    """As torchvision writes it: the sum in place, ReLU behind it, a projection where it must be."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1 if inputs == outputs else 2, 1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down = nn.Conv2d(inputs, outputs, 1, 2) if inputs != outputs else None

    def forward(self, x):
        identity = x if self.down is None else self.down(x)
        out = self.bn2(self.conv2(self.relu(self.conv1(x))))
        out += identity
        return self.relu(out)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.layers = nn.Sequential(Basic(4, 4), Basic(4, 6), Basic(6, 6))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.layers(self.stem(x)).mean((-2, -1)))


def test_in_place_sums_and_projections_equal_all_paths():
    torch.manual_seed(0)
    model = shaken(Images())
    places = [f"layers.{i}.bn2" for i in range(3)]
    images, targets = torch.randn(2, 3, 8, 8), torch.tensor([1, 3])
    check(model, images, targets, places, ("stem", "out"))


class Inner(nn.Module):
    """A branch with a residual connection inside it."""

    def __init__(self):
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = torch.tanh(self.one(self.norm(x)))
        return y + torch.tanh(self.two(y))


class Nested(nn.Module):
    def __init__(self, count=3):
        super().__init__()
        self.lift = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Inner() for _ in range(count))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.lift(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_a_connection_inside_a_branch_belongs_to_it():
    torch.manual_seed(0)
    model = Nested()
    x, targets = torch.randn(2, 4), torch.tensor([0, 2])
    assert len(discover(model, x)) > 3
    check(model, x, targets, [f"blocks.{i}" for i in range(3)], ("lift", "out"))


def test_the_sum_is_the_gradient_of_autograd():
    """Of a stack too deep to enumerate; norms and shares by length belong together."""
    torch.manual_seed(0)
    model = shaken(MLP(MLPConfig(in_dim=6, dim=6, out_dim=4, depth=20)))
    x, targets = torch.randn(5, 6, requires_grad=True), torch.tensor([0, 1, 3, 2, 0])
    found = spectrum(model, x, targets, incoherent="off")
    entered = []
    first_connection(model).register_forward_pre_hook(lambda _m, args: entered.append(args[0]))
    (g,) = torch.autograd.grad(cross_entropy(model.eval()(x), targets), entered)
    assert found.gradient == pytest.approx(g.norm().item(), rel=1e-6)
    assert found.check <= 1e-5
    assert found.products == 20 * 21 // 2
    assert sum(found.share) == pytest.approx(1, abs=1e-6)
    assert all(
        abs(s) * found.gradient <= n * (1 + 1e-6)
        for s, n in zip(found.share, found.norm, strict=True)
    )
    assert found.incoherent == found.incoherent_error == []
    assert found.incoherent_kind == "off"


# -- samples ---------------------------------------------------------------------------------------


def test_samples_are_unbiased_within_their_stated_error():
    """Over 40 seeds the mean is that of all paths, and the stated error is that of the spread."""
    model, inputs, targets = gpt("prenorm", depth=3)
    truth = torch.tensor(spectrum(model, inputs, targets, incoherent="exact").incoherent).double()
    runs = [
        spectrum(model, inputs, targets, incoherent="sample", samples=16, seed=s) for s in range(40)
    ]
    means = torch.tensor([r.incoherent for r in runs]).double()
    errors = torch.tensor([r.incoherent_error for r in runs]).double()
    assert all(r.samples == 16 and r.incoherent_kind == "sampled" for r in runs)
    # one path is without branches, one through all of them: nothing to draw
    torch.testing.assert_close(means[:, [0, -1]], truth[[0, -1]].expand(40, 2), rtol=1e-5, atol=0)
    assert errors[:, [0, -1]].max() <= 1e-5 * truth.max()
    middle = slice(1, -1)
    spread = means[:, middle].std(0)
    assert ((means[:, middle].mean(0) - truth[middle]).abs() <= 4 * spread / 40**0.5).all()
    ratio = errors[:, middle].square().mean(0).sqrt() / spread
    assert ((ratio > 0.7) & (ratio < 1.4)).all()


def test_samples_follow_the_seed_and_the_budget():
    model, inputs, targets = gpt("prenorm")
    options = {"incoherent": "sample", "samples": 30}
    one = spectrum(model, inputs, targets, seed=1, **options)
    assert one.incoherent == spectrum(model, inputs, targets, seed=1, **options).incoherent
    assert one.incoherent != spectrum(model, inputs, targets, seed=2, **options).incoherent
    told = []
    short = spectrum(
        model, inputs, targets, budget=0.0, progress=lambda *p: told.append(p), **options
    )
    assert short.samples == paths.LEAST
    assert short.note == "the budget of 0 s ended after 8 of 30 samples"
    assert told == [(i, 31) for i in range(1, 10)]
    assert short.check <= 1e-5  # the coherent reading is whole


def test_auto_enumerates_where_it_can():
    model, inputs, targets = gpt("prenorm")
    told = []
    found = spectrum(model, inputs, targets, progress=lambda *p: told.append(p))
    assert found.incoherent_kind == "exact"
    assert told == [(1, 2), (2, 2)]
    deep, inputs, targets = gpt("prenorm", depth=7)
    assert spectrum(deep, inputs, targets, samples=2).incoherent_kind == "sampled"


# -- how the products are taken --------------------------------------------------------------------


class Square(torch.autograd.Function):
    """An operation that cannot be vectorised."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient.clone()


class Custom(Nested):
    def forward(self, x):
        x = self.lift(x)
        for block in self.blocks:
            x = x + Square.apply(block(x))
        return self.head(x)


def test_operations_that_cannot_be_vectorised_go_one_by_one():
    torch.manual_seed(0)
    model, x, targets = Custom(2), torch.randn(2, 4), torch.tensor([0, 2])
    found = spectrum(model, x, targets)
    assert found.check <= 1e-5
    assert found.products == 3
    assert len(found.norm) == 3


def test_small_products_equal_large_ones(monkeypatch):
    model, inputs, targets = gpt("mhc")
    whole = spectrum(model, inputs, targets, incoherent="exact")
    monkeypatch.setattr(pieces, "AT_ONCE", 1)
    parts = spectrum(model, inputs, targets, incoherent="exact")
    assert parts.norm == pytest.approx(whole.norm, rel=1e-5)
    assert parts.incoherent == pytest.approx(whole.incoherent, rel=1e-5)


# -- means, ranges, messages -----------------------------------------------------------------------


def made(norm, incoherent=()):
    empty = [0.0] * len(norm)
    return Spectrum(
        [], 1.0, 1.0, "", list(norm), empty, 0.0, list(incoherent), [], "off", 0, 0, 0, "", 0, 0.0
    )


def test_mean_length_and_range():
    found = made([1.0, 2.0, 3.0, 1.0], [0.0, 1.0, 1.0, 2.0])
    assert found.mean_length == pytest.approx((4 + 2 * 9 + 3) / 15)
    assert found.mean_length_incoherent == pytest.approx(9 / 4)
    assert found.range(0.5) == (2, 2)
    assert found.range(0.8) == (1, 2)
    assert found.range(1.0) == (0, 3)
    assert found.range(0.75, incoherent=True) == (2, 3)
    assert math.isnan(made([1.0]).mean_length_incoherent)
    with pytest.raises(ValueError, match=r"part 1.5 must be above 0 and at most 1"):
        found.range(1.5)
    with pytest.raises(ValueError, match="ask for incoherent='sample'"):
        made([1.0]).range(incoherent=True)


def test_plain_values():
    model, inputs, targets = gpt("prenorm")
    found = spectrum(model, inputs, targets)
    plain = json.loads(json.dumps(finite(found.to_dict())))
    assert plain["norm"] == found.norm
    assert plain["mean_length"] == found.mean_length
    assert plain["range_90"] == list(found.range(0.9))
    assert plain["incoherent_range_95"] == list(found.range(0.95, incoherent=True))
    assert plain["loss_kind"] == "cross-entropy"


def test_settings_that_are_not_possible_are_said():
    model, inputs, targets = gpt("prenorm", depth=7)
    with pytest.raises(ValueError, match=r"unknown incoherent 'exakt'.*did you mean 'exact'"):
        spectrum(model, inputs, targets, incoherent="exakt")
    with pytest.raises(ValueError, match=r"samples 1 must be at least 2"):
        spectrum(model, inputs, targets, samples=1)
    with pytest.raises(ValueError, match=r"2\^14 paths; above 12 connections say 'sample'"):
        spectrum(model, inputs, targets, incoherent="exact")
    with pytest.raises(ValueError, match=r"the gradient at .* is 0: no spectrum"):
        spectrum(model, inputs, loss=lambda out, _: 0 * out.sum())


def test_a_gradient_that_passes_the_connections_by_is_said():
    """Here the loss of the second pass is another one."""
    model, inputs, targets = gpt("prenorm")
    factors = iter([1.0, 2.0])
    with pytest.raises(ValueError, match=r"sum to the gradient only up to 5\.0e-01"):
        spectrum(model, inputs, loss=lambda out, _: next(factors) * cross_entropy(out, targets))
