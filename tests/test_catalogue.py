"""The catalogue against published numbers, exact equivalences, and what a trainer does to it."""

import copy
import functools
import itertools
import math

import naive_wirings as oracle
import pytest
import torch
import torch.nn.functional as F
from test_wirings import OURS, connections, randomised, stack, stream
from torch import nn
from torch.utils.checkpoint import checkpoint

from addnorm.branches import Branch, Context, Matrix, Site, Wrapped, keep_mask
from addnorm.contract import Stack, Wiring, options_of, parameter_groups, parse_spec, register
from addnorm.models.layers import Attention, FeedForward
from addnorm.norms import NORMS
from addnorm.wirings import streams
from addnorm.wirings.memory import DepthAttention

each_wiring = pytest.mark.parametrize("name", OURS)
STOCHASTIC = ("droppath", "dropout-shortcut")
DROPPED = 0.4  # a drop rate


def fill(shape, k, a=1.0):
    """Return a sin(k + [0, 1, 2, ...]) in row-major order: the rule of the published numbers."""
    values = a * torch.sin(k + torch.arange(math.prod(shape), dtype=torch.float64))
    return values.float().double().reshape(shape)


class Tanh(Branch):
    """tanh(x * [1, 2, -1]): the branch of the published numbers, and a matrix without a use."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1))

    def matrices(self):
        return [Matrix("out", self.weight)]

    def forward(self, x, context):
        return torch.tanh(x * torch.tensor([1.0, 2.0, -1.0], dtype=x.dtype))


class Same(nn.Identity):
    """In place of a norm: x as it is."""

    def __init__(self, width):
        super().__init__()

    def reset_parameters(self):
        """There are none."""


class Fixed(Branch):
    """A branch that returns what it was given to return."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, context):
        return self.value


def one(spec, branch=None, *, dim=3, index=1, count=3, parts=1, norm=Same):
    """Return one connection in float64."""
    site = Site(dim, index, count, parts, norm, dtype=torch.float64)
    return parse_spec(spec).build(branch or Tanh(), site)


def exact_rms(dim, device=None, dtype=None):
    """An RMSNorm whose eps is as good as 0."""
    return nn.RMSNorm(dim, eps=1e-30)


def exact_layernorm(dim, device=None, dtype=None):
    """A LayerNorm whose eps is as good as 0."""
    return nn.LayerNorm(dim, eps=1e-30)


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def published(ours, rows, digits=6):
    """Hold numbers against a table that was printed with so many digits."""
    theirs = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=0.51 * 10**-digits)


X = fill((4, 3), 1)


# -- numbers that reference implementations produced -------------------------------------------


def test_hyper_connections_reproduce_their_reference():
    """The code of LIMe and lucidrains' package agree on one connection at the start, index 1."""
    wiring = one("hyper")
    published(streams.read(wiring.maps(X)[0], X), [-0.756802, -0.958924, -0.279415])
    published(
        wiring(X, Context()),
        [
            [0.202281, -0.048442, 0.413484],
            [-1.395992, -1.916664, -0.007051],
            [0.017797, 0.031619, 0.684483],
            [-1.183211, -1.957730, -0.264209],
        ],
    )


def test_mhc_lite_reproduces_its_reference():
    """One connection of mHC-lite at its start, index 1."""
    wiring = one("mhc-lite")
    pre = torch.sigmoid(wiring.generate(X)[0])
    published(streams.read(pre, X), [-0.296579, -0.459341, -0.199787])
    published(
        wiring(X, Context()),
        [
            [0.680136, 0.511800, 0.245522],
            [-1.171713, -2.011819, 0.010579],
            [0.497126, 0.591221, 0.514356],
            [-0.694287, -1.382234, -0.426756],
        ],
    )


def test_gated_residual_reproduces_its_reference():
    """One connection with all of its matrices away from 0."""
    wiring = one("gated-residual(rank=2)")
    with torch.no_grad():
        wiring.read.gain.copy_(fill((4, 3), 2, 0.1))
        wiring.read.down.weight.copy_(fill((2, 12), 5))
        wiring.read.up.weight.copy_(fill((12, 2), 7))
        wiring.write.weight.copy_(fill((4, 12), 9))
    h, z = wiring.read(X)
    published(h, [0.059416, 0.029941, -0.069460])
    published(2 * torch.sigmoid(wiring.write(z / 4)), [0.819051, 1.397195, 1.712543, 1.795296])
    published(
        wiring(X, Context()),
        [
            [0.890078, 0.958285, 0.197920],
            [-0.673885, -0.875358, -0.182521],
            [0.758619, 1.091785, 0.530882],
            [-0.437478, -0.892614, -0.412071],
        ],
    )


def test_attention_over_depth_reproduces_its_reference():
    """flash-linear-attention's naive form: three sources of width 4, query [.5, -.25, .125, 1]."""
    read = DepthAttention(Site(4, dtype=torch.float64))
    with torch.no_grad():
        read.query.copy_(torch.tensor([0.5, -0.25, 0.125, 1.0]))
    sources = tuple(fill((3, 4), 1))
    published(read(sources), [-0.464879, -0.163291, 0.288426, 0.474965])
    values = tuple(torch.eye(3, dtype=torch.float64))  # what they are weighted by
    scores = [(v * read.query).sum() / (v.square().mean() + 1e-6).sqrt() for v in sources]
    p = torch.stack(scores).softmax(0)
    published(sum(a * b for a, b in zip(p, values, strict=True)), [0.137662, 0.682767, 0.179571])


def test_denseformer_reproduces_its_reference():
    """Dilation 2, four blocks tanh(x) + x: the state after each, and the sizes of the weights."""
    model = Stack(
        [Wrapped(nn.Tanh()) for _ in range(4)],
        "denseformer(dilation=2)", dim=3, norm=Same, dtype=torch.float64,
    )  # fmt: skip
    with torch.no_grad():
        for i, connection in enumerate(model):
            connection.alpha.copy_(fill(connection.alpha.shape, 2 + i, 0.5))
    assert [len(connection.alpha) for connection in model] == [1, 2, 2, 3]
    state, trace = next(iter(model)).open(fill((1, 3), 1)), []
    for connection in model:
        state = connection(state, Context())
        trace.append(state[0][0])
    published(
        torch.stack(trace),
        [
            [0.694730, 0.741119, 0.127898],
            [-0.430936, -0.454605, -0.086574],
            [-0.176890, -0.194767, -0.023534],
            [-0.700095, -0.754667, -0.118762],
        ],
    )


LOGITS = fill((4, 4), 1)
SINKHORN = [
    [0.324606, 0.365755, 0.212726, 0.096912],
    [0.049805, 0.103455, 0.330879, 0.515860],
    [0.435166, 0.176111, 0.139961, 0.248761],
    [0.190423, 0.354678, 0.316432, 0.138467],
]


def test_sinkhorn_reproduces_its_reference():
    """20 iterations of the DeepSeek form; the paper's form is its transpose of the transpose."""
    ours = streams.MHCV4.normalise(LOGITS)
    published(ours, SINKHORN)
    torch.testing.assert_close(streams.sinkhorn(LOGITS.mT, 20).mT, ours, rtol=0, atol=2e-6)


def test_sinkhorn_is_not_there_yet_for_large_logits():
    """With logits 8 times as large the sums of the columns are off by a percent after 20."""
    rows, columns = (streams.sinkhorn(8 * LOGITS.mT, 20).sum(axis) for axis in (-1, -2))
    close(rows, torch.ones_like(rows), 1e-12)
    assert (columns - 1).abs().max().item() == pytest.approx(1.16e-2, rel=0.02)


def test_gtrxl_reproduces_its_reference():
    """DI-engine's gate with b = 2 and all six matrices away from 0; it gets y after the ReLU."""
    y = fill((1, 3), 4)
    wiring = one("gtrxl")
    layers = (
        wiring.reset_y, wiring.reset_x, wiring.update_y, wiring.update_x, wiring.new_y, wiring.new_x
    )  # fmt: skip
    with torch.no_grad():
        for k, layer in enumerate(layers, 1):
            layer.weight.copy_(fill((3, 3), k, 0.7))
    p, x = dict(wiring.named_parameters()), fill((1, 3), 1)[0]
    r = oracle.sigma(layers[0].weight @ y[0] + layers[1].weight @ x)
    z = oracle.sigma(layers[2].weight @ y[0] + layers[3].weight @ x - p["bias"])
    h = torch.tanh(layers[4].weight @ y[0] + layers[5].weight @ (r * x))
    published((1 - z) * x + z * h, [0.827554, 0.599462, 0.178268])  # the gate itself
    wiring.branch = Fixed(y)
    got = wiring(x[None], Context())  # and with the ReLU, which the reference has before it
    positive = y[0].clamp(min=0)
    r = oracle.sigma(layers[0].weight @ positive + layers[1].weight @ x)
    z = oracle.sigma(layers[2].weight @ positive + layers[3].weight @ x - p["bias"])
    h = torch.tanh(layers[4].weight @ positive + layers[5].weight @ (r * x))
    close(got[0], (1 - z) * x + z * h)


def test_gtrxl_with_matrices_of_zero_lets_little_in():
    """z = sigma(-2) = 0.119203, h = 0."""
    wiring = one("gtrxl")
    with torch.no_grad():
        for name, parameter in wiring.named_parameters():
            if name != "bias":
                parameter.zero_()
    x = stream(2, dim=3)
    torch.testing.assert_close(wiring(x, Context()), (1 - 0.119203) * x, rtol=1e-6, atol=1e-6)


# -- constants by depth ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "alpha", "beta", "omega", "root"),
    [
        (6, 1.861210, 0.379918, 2.017009, 0.288675),
        (12, 2.213364, 0.319472, 2.601286, 0.204124),
        (24, 2.632148, 0.268642, 3.404484, 0.144338),
        (48, 3.130169, 0.225901, 4.494833, 0.102062),
        (100, 3.760603, 0.188030, 6.074611, 0.070711),
    ],
)
def test_constants_by_depth(layers, alpha, beta, omega, root):
    """DeepNorm's alpha and beta, Admin's omega, KEEL's alpha and 1/sqrt(2L) of L layers of two."""
    place = {"index": 3, "count": 2 * layers, "parts": 2, "norm": nn.LayerNorm}
    deepnorm = one("deepnorm", FeedForward(3).double(), **place)
    assert deepnorm.alpha == pytest.approx(alpha, abs=5.1e-7)
    assert deepnorm.gains() == pytest.approx(dict.fromkeys(("value", "in", "out"), beta), abs=6e-7)
    assert one("admin", **place).omega.tolist() == pytest.approx([omega] * 3, abs=5.1e-7)
    assert one("keel", **place).alpha == 2 * layers
    assert one("stable", **place).scale == pytest.approx(root, abs=5.1e-7)


@pytest.mark.parametrize(("count", "omega"), [(2, 1.315567), (36, 3.040839)])
def test_omega_of_other_depths(count, omega):
    wiring = one("admin", count=count, norm=nn.LayerNorm)
    assert wiring.omega.tolist() == pytest.approx([omega] * 3, abs=5.1e-7)


@pytest.mark.parametrize(
    ("layers", "of_x0", "kept"),
    [(12, 5.825391, 3.123128), (20, 13.970345, 6.676450), (24, 21.065371, 9.761588)],
)
def test_injected_embedding_by_depth(layers, of_x0, kept):
    """With branches of 0 the end holds x0 times nanochat's coefficient; r alone multiplies to."""
    silent = [Fixed(torch.zeros(2, dtype=torch.float64)) for _ in range(2 * layers)]
    model = Stack(silent, "inject", dim=2, parts=2, norm=Same, dtype=torch.float64)
    x = stream(1, dim=2)
    torch.testing.assert_close(model(x), of_x0 * x, rtol=1e-6, atol=1e-6)
    r = math.prod(c.keep.item() for c in model if c.mixes)
    assert r == pytest.approx(kept, abs=1e-6)


# -- exact equivalences, end to end ------------------------------------------------------------


def twins(spec, other, count=6, norm=None, **options):
    """Return two stacks whose branches are the same modules."""
    options = {"norm": norm or nn.LayerNorm, "parts": 2, **options}
    first = randomised(stack(spec, count, **options))
    second = stack(other, count, **options)
    for ours, theirs in zip(first, second, strict=True):
        ours.branch = theirs.branch
    return first, second


def restart(model, among=lambda name: "branch" not in name):
    """Bring what belongs to the scheme back to its start; the branches stay random."""
    started = stack(str(model.spec), len(model), parts=next(iter(model)).site.parts)
    with torch.no_grad():
        own = dict(started.named_parameters())
        for name, parameter in model.named_parameters():
            if among(name):
                parameter.copy_(own[name])
    return model


def normalised(model, x):
    """Return what a head would read: with a final norm where the scheme wants one."""
    y = model(x)
    return F.rms_norm(y, y.shape[-1:], eps=1e-30) if model.final_norm else y


@pytest.mark.parametrize(
    ("spec", "other", "tolerance"),
    [
        ("attnres", "prenorm", 3e-11),
        ("attnres-block(size=2)", "prenorm", 1e-11),
        ("attnres-block(size=4)", "prenorm", 1e-11),
        ("hyper", "prenorm", 5e-13),
        ("hyper(n=3, dynamic=false)", "prenorm", 5e-13),
        ("mhc", "prenorm", 7e-13),
        ("denseformer", "prenorm", 1e-15),
        ("denseformer(dilation=3, period=2)", "prenorm", 1e-15),
        ("frac", "prenorm", 1e-14),
        ("laurel", "prenorm", 1e-15),
        ("gpas", "prenorm", 1e-15),
        ("droppath", "prenorm", 1e-15),
        ("completep(base_depth=3)", "prenorm", 1e-15),
        ("mixln(fraction=0.0)", "prenorm", 1e-15),
        ("mixln(fraction=1.0)", "postnorm", 1e-15),
        ("admin(change=linear)", "postnorm", 1e-15),
    ],
)
def test_scheme_starts_as_another(spec, other, tolerance):
    """With the scheme's own start and the same branches, a head reads the same.

    mHC with phi = b = 0 stands for the start that the paper leaves open.
    """
    model, base = twins(spec, other, norm=exact_rms)
    restart(model)
    restart(base)
    if spec == "mhc":
        with torch.no_grad():
            for connection in model:
                connection.generate.bias.zero_()
    x = stream(3, 2)
    ours, theirs = normalised(model.eval(), x), normalised(base.eval(), x)
    if other == "postnorm":
        theirs = F.rms_norm(theirs, theirs.shape[-1:], eps=1e-30) if model.final_norm else theirs
    close(ours, theirs, tolerance * theirs.abs().max().item())


@pytest.mark.parametrize(("name", "constant"), [("deepnorm", "alpha"), ("stable", "scale")])
def test_constant_of_one_is_the_plain_scheme(name, constant):
    """DeepNorm with alpha = 1 is post-norm; a constant scale of 1 is pre-norm."""
    model, base = twins(name, "postnorm" if name == "deepnorm" else "prenorm")
    for connection in model:
        setattr(connection, constant, 1.0)
    base.load_state_dict(model.state_dict())
    x = stream(2, 3)
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("name", ["rezero", "skipinit"])
def test_scheme_starts_as_the_identity(name):
    """At first only alpha gets a gradient."""
    model, x = stack(name), stream(2, 3)
    y = model(x)
    assert torch.equal(y, x)
    (y * torch.randn_like(y)).sum().backward()
    for key, parameter in model.named_parameters():
        assert bool(parameter.grad.any()) == ("alpha" in key), key


def test_layernorm_scaling_is_prenorm_with_folded_gains():
    model, folded = twins("lns", "prenorm")
    folded.load_state_dict(model.state_dict())
    with torch.no_grad():
        for connection in folded:
            for parameter in connection.norm_in.parameters():
                parameter /= math.sqrt(connection.site.layer + 1)
    x = stream(2, 3)
    close(model(x), folded(x), 1e-14)


def test_layerscale_folds_into_the_output_matrix():
    model, folded = twins("layerscale", "prenorm")
    own = {k: v for k, v in model.state_dict().items() if "gamma" not in k}
    folded = copy.deepcopy(folded)
    folded.load_state_dict(own)
    with torch.no_grad():
        for scaled, connection in zip(model, folded, strict=True):
            connection.branch.out.weight *= scaled.gamma[:, None]
            connection.branch.out.bias *= scaled.gamma
    x = stream(2, 3)
    close(model(x), folded(x), 1e-13)


def test_stable_is_the_start_of_gpt2():
    """1/sqrt(K) on the update equals 1/sqrt(K) on the output matrix."""
    model, base = twins("stable", "prenorm")
    base = copy.deepcopy(base)
    base.load_state_dict(model.state_dict())
    with torch.no_grad():
        for connection in base:
            connection.branch.out.weight /= math.sqrt(6)
            connection.branch.out.bias /= math.sqrt(6)
    x = stream(2, 3)
    close(model(x), base(x), 1e-13)


def test_keel_after_a_norm_is_deepnorm_with_its_alpha():
    """With gains of 1, on a normed stream, N_in changes nothing."""
    keel, deepnorm = (stack(s, 6, parts=2, norm=exact_layernorm) for s in ("keel", "deepnorm"))
    x = F.layer_norm(stream(2, 3), (8,), eps=1e-30)
    y = x
    for ours, theirs in list(zip(keel, deepnorm, strict=True))[2:]:
        theirs.branch, theirs.alpha = ours.branch, 6
        x, y = ours(x, Context()), theirs(y, Context())
    close(x, y, 1e-13)


def test_gated_residual_without_generators_is_prenorm_with_its_final_norm():
    """G = 1/2, s = 1 and a gain of 2: the same to the last bit, head included."""
    model, base = twins("gated-residual", "prenorm", norm=lambda d: nn.RMSNorm(d, eps=1e-6))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "branch" not in name:
                parameter.fill_(1.0 if "gain" in name else 0.0)
    restart(base)
    x = stream(3, 2)
    y = base(x)
    assert torch.equal(model(x), F.rms_norm(y, (8,), eps=1e-6))


def test_resi_dual_without_its_second_stream_is_postnorm():
    model, base = twins("resi-dual", "postnorm")
    base.load_state_dict({k: v for k, v in model.state_dict().items() if "close" not in k})
    x = stream(2, 3)
    close(model(x) - model.connections[-1].norm_close(second_stream(model, x)), base(x), 1e-12)


def second_stream(model, x):
    """Return r of a ResiDual stack."""
    state = model.connections[0].open(x)
    for connection in model:
        state = connection(state, Context())
    return state[1]


def test_attention_residuals_with_blocks_of_one_are_the_full_form():
    full = randomised(stack("attnres", 6))
    blocks = stack("attnres-block(size=1)", 6)
    blocks.load_state_dict(full.state_dict())
    x = stream(2, 3)
    assert torch.equal(full(x), blocks(x))


@pytest.mark.parametrize(("name", "gain"), [("sandwich", "norm_out"), ("reordered", "norm_out")])
def test_gain_of_zero_behind_the_branch_is_the_identity(name, gain):
    model, x = randomised(stack(name)), stream(2, 3)
    for connection in model:
        getattr(connection, gain).reset_parameters()
        nn.init.zeros_(getattr(connection, gain).weight)
    assert torch.equal(model(x), x)


def test_norm_behind_the_branch_sets_its_size():
    """The update has the RMS of the gain whatever the weights are; a factor on them is lost."""
    wiring = one("sandwich", FeedForward(8).double(), dim=8, norm=exact_rms)
    nn.init.constant_(wiring.norm_out.weight, 0.7)
    x = stream(4, dim=8)
    update = wiring(x, Context()) - x
    close(update.square().mean(-1).sqrt(), torch.full((4,), 0.7, dtype=torch.float64), 1e-9)
    with torch.no_grad():
        wiring.branch.out.weight *= 3
        wiring.branch.out.bias *= 3
    close(wiring(x, Context()) - x, update, 1e-12)


def test_unit_with_a_last_layer_of_zero_passes_what_it_should():
    """With F = 0 ResNet v2 is the identity and its Jacobian too, ResNet v1 a ReLU."""
    x = stream(2, 3)
    for name, expected in (("residual", x), ("postact", torch.relu(x))):
        model = stack(name)
        for connection in model:
            nn.init.zeros_(connection.branch.out.weight)
            nn.init.zeros_(connection.branch.out.bias)
        y = model(x)
        assert torch.equal(y, expected)
        if name == "residual":
            assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(x))


def test_gate_that_is_shut_is_the_identity():
    model, x = stack("highway(bias=-800.0)"), stream(2, 3)
    close(model(x), x, 1e-15)


def test_deep_delta_replaces_and_reflects():
    """beta = 1: the part along k becomes v. beta = 2, v = 0: x keeps its length."""
    wiring = randomised(one("deep-delta", FeedForward(3).double(), norm=nn.LayerNorm))
    x = stream(5, dim=3)
    nn.init.zeros_(wiring.step.weight)
    nn.init.zeros_(wiring.step.bias)  # beta = 1
    k = F.normalize(wiring.branch(wiring.norm_in(x), Context()), dim=-1)
    v = 4 * torch.sigmoid(wiring.value(x))[:, 0]
    close((k * wiring(x, Context())).sum(-1), v, 1e-9)  # |k| is 1 but for the 1e-10 in |f|
    nn.init.constant_(wiring.step.bias, 800.0)  # beta = 2
    nn.init.zeros_(wiring.value.weight)
    nn.init.constant_(wiring.value.bias, -800.0)  # v = 0
    close(wiring(x, Context()).norm(dim=-1), x.norm(dim=-1), 1e-9)


def test_orthogonal_update_is_orthogonal():
    wiring = randomised(one("orthogonal", FeedForward(8).double(), dim=8, norm=nn.LayerNorm))
    x = stream(5, dim=8)
    update = wiring(x, Context()) - x
    along = (update * x).sum(-1) / (update.norm(dim=-1) * x.norm(dim=-1))
    assert along.abs().max() < 1e-6


@pytest.mark.parametrize("name", ["mhc", "mhc-lite", "krom"])
def test_mixing_is_doubly_stochastic(name):
    """Rows and columns sum to 1, also those of a product; the mean of the streams is kept."""
    wiring = one(name, Fixed(torch.ones(8, dtype=torch.float64)), dim=8)
    randomised(wiring, 0.3)
    X = torch.randn(5, 4, 8, dtype=torch.float64)
    raw = wiring.generate(X)[2]
    H = {
        "mhc": lambda: streams.sinkhorn(raw.view(5, 4, 4), 20),
        "mhc-lite": lambda: wiring.permute(raw.softmax(-1)),
        "krom": lambda: wiring.kronecker(raw.view(5, 2, 2).softmax(-1)),
    }[name]()
    tolerance = 1e-5 if name == "mhc" else 1e-14
    H = torch.cat([H, functools.reduce(torch.matmul, H)[None]])
    assert (H >= 0).all()
    close(H.sum(-1), torch.ones(6, 4, dtype=torch.float64), 1e-14 if name != "mhc" else 1e-13)
    close(H.sum(-2), torch.ones(6, 4, dtype=torch.float64), tolerance)
    post = 2 * torch.sigmoid(wiring.generate(X)[1]).sum(-1, keepdim=True)  # F = 1
    close(wiring(X, Context()).sum(-2), X.sum(-2) + post, 10 * tolerance)


def test_streams_of_mhc_are_interchangeable():
    """Permuting the streams and the maps that belong to them permutes what comes out."""
    n, D = 4, 3
    wiring = randomised(one("mhc"), 0.3)
    order = torch.tensor([2, 0, 3, 1])
    other = copy.deepcopy(wiring)
    with torch.no_grad():
        phi = wiring.generate.phi.view(-1, n, D)[:, order].flatten(1)
        rows = torch.cat([order, n + order, 2 * n + (n * order[:, None] + order[None]).flatten()])
        other.generate.phi.copy_(phi[rows])
        other.generate.bias.copy_(wiring.generate.bias[rows])
    X = torch.randn(5, n, D, dtype=torch.float64)
    close(other(X[:, order], Context()), wiring(X, Context())[:, order], 1e-12)


@pytest.mark.parametrize("name", ["mhc", "mhc-v4", "ihc", "mhc-lite", "krom", "hyper"])
def test_streams_do_not_stay_equal(name):
    """The start tells the streams apart: after training steps no two of them are the same."""
    model = stack(name, 4)
    with torch.no_grad():
        for connection in model:
            randomised(connection.branch)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x, target = stream(4, 3).detach(), torch.randn(4, 3, 8, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    X = model.connections[0].open(x)
    for connection in model:
        X = connection(X, Context())
    for i, j in itertools.combinations(range(4), 2):
        assert (X[..., i, :] - X[..., j, :]).abs().max() > 1e-9, (i, j)


def test_reversible_connection_is_inverted():
    wiring = randomised(one("reversible", FeedForward(8).double(), dim=8, norm=nn.LayerNorm))
    a, b = stream(5, dim=8), stream(5, dim=8)
    c, d = wiring((a, b), Context())
    close(d - wiring.branch(wiring.norm_in(c), Context()), a, 1e-15)
    assert torch.equal(c, b)


def test_droppath_averages_to_what_evaluation_gives():
    """Both forms: training averages to evaluation, per sample or for the whole batch."""
    for per, count, size in (("sample", 1, 40_000), ("batch", 4_000, 1)):
        wiring = one(f"droppath(rate={DROPPED}, per={per})", norm=Same)
        f = torch.tanh(fill((3,), 1) * torch.tensor([1.0, 2.0, -1.0]))
        x = fill((3,), 1).expand(size, 2, 3)
        outs = torch.cat([wiring.train()(x, Context()) - x for _ in range(count)])
        kept = outs[:, 0, 0] != 0
        # The middle layer of three: timm's line from 0 to 0.4 gives 0.2, the paper's 0.4 * 2 / 3.
        keep = 0.8 if per == "sample" else 1 - DROPPED * 2 / 3
        divided = keep if per == "sample" else 1.0
        rate = kept.double().mean().item()
        assert rate == pytest.approx(keep, abs=4 * (keep * (1 - keep) / len(kept)) ** 0.5)
        close(outs[kept], (f / divided).expand_as(outs[kept]), 1e-12)
        expected = f if per == "sample" else keep * f
        close(wiring.eval()(x, Context()) - x, expected.expand(size, 2, 3), 1e-12)


def test_droppath_of_a_batch_is_one_for_all():
    mask = keep_mask(torch.ones(64, 3), 0.5, per_sample=False)
    assert mask.shape == (1, 1)
    assert keep_mask(torch.ones(64, 3, 2), 0.5).shape == (64, 1, 1)


def test_shortcut_dropout_keeps_the_expectation():
    """In training the skip is 0 or x, element by element, not rescaled."""
    wiring = one("dropout-shortcut(rate=0.3)", Fixed(torch.zeros(3, dtype=torch.float64)))
    x = torch.ones(20_000, 3, dtype=torch.float64)
    y = wiring.train()(x, Context())
    assert set(y.unique().tolist()) == {0.0, 1.0}
    assert y.mean().item() == pytest.approx(0.7, abs=4 * (0.21 / y.numel()) ** 0.5)
    columns = y[:, 0] * y[:, 1]  # independent within a row
    assert columns.mean().item() == pytest.approx(0.49, abs=4 * (0.25 / len(y)) ** 0.5)


# -- what the optimiser is told ----------------------------------------------------------------


def test_completep_scales_rate_and_epsilon_with_depth():
    """Exponent 1: only epsilon, by 1/m. Exponent 1/2: rate and epsilon by m^(-1/2)."""
    for exponent, lr, eps in ((1.0, 1.0, 0.25), (0.5, 0.5, 0.5)):
        model = stack(f"completep(exponent={exponent})", 8)
        for group in parameter_groups(model, 0.1):
            assert group["lr_scale"] == pytest.approx(lr)
            assert group["eps_scale"] == pytest.approx(eps)
            decayed = {parameter.dim() >= 2 for parameter in group["params"]}
            assert decayed == {group["weight_decay"] > 0}


def test_static_parts_of_hyper_connections_do_not_decay():
    for name, static in (("hyper", {"read", "mix", "write", "scale"}), ("frac", {"read", "mix"})):
        model = stack(name)
        groups = {id(p): g for g in parameter_groups(model, 0.1) for p in g["params"]}
        for key, parameter in model.named_parameters():
            last = key.split(".")[-1]
            if "branch" not in key and last in static:
                assert groups[id(parameter)]["weight_decay"] == 0.0, key
            if "generate" in key:
                assert groups[id(parameter)]["weight_decay"] == 0.1, key


def test_gains_of_gated_residual_do_not_decay():
    model = stack("gated-residual")
    groups = {id(p): g for g in parameter_groups(model, 0.1) for p in g["params"]}
    own = {k: p for k, p in model.named_parameters() if "branch" not in k}
    still = {k for k, p in own.items() if groups[id(p)]["weight_decay"] == 0.0}
    assert still == {k for k in own if "gain" in k}
    assert any("read_close.gain" in k for k in still)


# -- what holds for all ------------------------------------------------------------------------


def small(name, depth=2, dim=16, **options):
    """Return a small Transformer stack at its real start."""
    branches = [b for _ in range(depth) for b in (Attention(dim, 2), FeedForward(dim, 24))]
    return Stack(branches, name, dim=dim, parts=2, **options)


@each_wiring
def test_every_parameter_is_reached_from_its_real_start(name):
    """Within three steps of training every parameter of the scheme has had a gradient."""
    model = small(name, 3, dtype=torch.float64)
    seen = dict.fromkeys((key for key, _ in model.named_parameters()), 0.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    x, target = stream(4, 5, dim=16).detach(), torch.randn(4, 5, 16, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        y = model(x)
        y = F.layer_norm(y, (16,)) if model.final_norm else y
        (y - target).square().mean().backward()
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                seen[key] += parameter.grad.abs().max().item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    # A key's bias does not matter to softmax: its gradient is rounding.
    assert not [key for key, most in seen.items() if most < 1e-14 and "qkv.bias" not in key]


@each_wiring
def test_examples_do_not_influence_each_other(name):
    """What another example of the batch holds changes nothing."""
    model = randomised(small(name, dtype=torch.float64)).eval()
    x = stream(3, 4, dim=16).detach()
    other = x.clone()
    other[1:] = 5 * torch.randn_like(x[1:])
    close(model(x)[0], model(other)[0], 1e-10)


@each_wiring
def test_the_future_does_not_influence_the_past(name):
    """With causal attention a position depends on those before it only."""
    model = randomised(small(name, dtype=torch.float64), 0.3).eval()
    x = stream(2, 6, dim=16)
    (gradient,) = torch.autograd.grad(model(x)[:, 2].square().sum(), x)
    assert not gradient[:, 3:].any()
    assert gradient[:, :3].any(-1).all()


@each_wiring
def test_state_dict_makes_the_round_trip(name):
    """It holds the parameters, nothing else."""
    model, other = randomised(small(name)).eval(), small(name).eval()
    assert set(model.state_dict()) == {key for key, _ in model.named_parameters()}
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 16)
    assert torch.equal(model(x), other(x))


@each_wiring
def test_autocast_keeps_the_stream_in_float32(name):
    """Under bfloat16 autocast the stream stays float32 and the result is near.

    With branches of 0 what the scheme carries is the same but for gates that are matrices.
    """
    if name in ("plain", "linear-shortcut"):
        pytest.skip("nothing is carried: the stream is what a matrix product returned")
    torch.manual_seed(1)
    model = small(name).eval()
    x = torch.randn(2, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    high = model(x)
    assert low.dtype == torch.float32
    assert (low - high).norm() < 0.05 * high.norm()
    for connection in model:
        for parameter in connection.branch.parameters():
            nn.init.zeros_(parameter)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    high = model(x)
    gates = {"highway", "gtrxl", "exclusive-gating", "shortcut-gating", "linear-shortcut"}
    gates |= {"laurel", "gated-residual", "deep-delta"}
    assert (low - high).norm() <= (0.02 if name in gates else 1e-6) * high.norm()


@each_wiring
def test_compiled_equals_eager(name):
    """One graph, without a break, forward and backward; stochastic schemes in evaluation."""
    torch._dynamo.reset()
    model = randomised(stack(name, 3), 0.3)
    model.train(name not in STOCHASTIC)
    x = stream(2, 3)
    weights = torch.randn_like(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, model):
        y = run(x)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [x, *model.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepnorm", "gtrxl", "attnres-block", "mhc"])
def test_inductor_equals_eager(name):
    """One of each family through the real compiler, in float32."""
    torch._dynamo.reset()
    model = randomised(small(name), 0.2)
    x = torch.randn(2, 3, 16, requires_grad=True)
    results = []
    for run in (torch.compile(model, fullgraph=True), model):
        y = run(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)


@each_wiring
def test_exported_program_gives_the_same(name):
    model = randomised(stack(name, 3), 0.3).eval()
    x = stream(2, 3).detach()
    program = torch.export.export(model, (x,))
    close(program.module()(x), model(x), 1e-10)


@each_wiring
def test_checkpointed_gradients_are_the_same(name):
    """Each connection under activation checkpointing, whatever its stream is made of."""
    model = randomised(small(name, dtype=torch.float64), 0.3).eval()
    x = stream(2, 3, dim=16)
    results = []
    for checkpointed in (False, True):
        state = model.connections[0].open(x)
        for connection in model:
            run = functools.partial(checkpoint, use_reentrant=False) if checkpointed else None
            state = run(connection, state, Context()) if run else connection(state, Context())
        y = model.connections[-1].close(state)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@each_wiring
def test_short_training_lowers_the_loss(name):
    """A small stack learns to turn its tokens by one position."""
    model, head = small(name), nn.Linear(16, 16)
    x = torch.randn(8, 6, 16)
    target = x.roll(1, 1)
    target[:, 0] = 0
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, 3e-3, weight_decay=0.0)
    losses = []
    for _ in range(60):
        y = model(x)
        y = F.layer_norm(y, (16,)) if model.final_norm else y
        loss = (head(y) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@each_wiring
def test_observed_stack_gives_the_same(name):
    """The plain loop, in which hooks see every connection, is the same function."""
    model = randomised(small(name, dtype=torch.float64), 0.3).eval()
    x = stream(2, 3, dim=16)
    results = []
    for model.observed in (False, True):
        y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_wiring
def test_stack_of_16_bits_runs(name, dtype):
    """Forward and backward from the real start, with finite gradients."""
    model = small(name, dtype=dtype, norm=NORMS["rmsnorm"])
    x = torch.randn(2, 3, 16, dtype=dtype, requires_grad=True)
    y = model(x)
    assert y.dtype == dtype
    y.float().square().mean().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@each_wiring
def test_shapes_without_values(name):
    """On the meta device a forward pass gives shapes; a batch may be empty."""
    with torch.device("meta"):
        assert small(name)(torch.empty(2, 3, 16)).shape == (2, 3, 16)
    assert small(name)(torch.empty(0, 3, 16)).shape == (0, 3, 16)


def test_a_wiring_that_forgets_its_start_gets_it():
    """The stack starts what it makes; modules without a start of their own are left alone."""

    class Forgetful(Wiring):
        name, equation, paper, year, at_start = "forgetful", "x <- x + a F(x)", "none", 2026, "x"
        stream_law = gradient_law = "constant"

        def __init__(self, branch, site, *, size=2.0):
            super().__init__(branch, site)
            self.drop = nn.Dropout(0.0)
            self.parts = nn.ModuleList([self.new_norm()])
            self.a = self.new_parameter(1)

        def forward(self, stream, context):
            return stream + self.a * self.branch(self.drop(stream), context)

        def reset_parameters(self):
            super().reset_parameters()
            nn.init.constant_(self.a, 0.25)

    register(Forgetful)
    model = Stack([FeedForward(8)], "forgetful", dim=8, start="zero")
    assert model.connections[0].a.item() == 0.25
    assert not model.connections[0].branch.out.weight.any()
    assert model.connections[0].extra_repr() == "size=2.0"


# -- reversible --------------------------------------------------------------------------------


def kept(model, x):
    """Return the bytes that a forward pass keeps for the backward one, parameters left out."""
    own, total = {p.data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        if tensor.data_ptr() not in own:
            total[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = model(x)
    assert y.requires_grad
    return sum(total.values())


def test_reversible_memory_does_not_grow_with_depth():
    """What is kept for the way back is the same for 2 layers and for 16."""
    x = torch.randn(4, 32, 16)
    few, many = kept(small("reversible", 2), x), kept(small("reversible", 16), x)
    assert few == many == 2 * x.numel() * 4
    assert kept(small("prenorm", 16), x) > 6 * kept(small("prenorm", 2), x)


def test_reversible_gradients_are_the_plain_ones():
    """In float32 too, and with dropout, whose places are drawn again."""
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        branches = [b for _ in range(6) for b in (Attention(16, 2), FeedForward(16, dropout=0.2))]
        model = Stack(branches, "reversible", dim=16, parts=2, dtype=dtype).train()
        x = torch.randn(2, 5, 16, dtype=dtype, requires_grad=True)
        results = []
        for model.observed in (False, True):
            torch.manual_seed(3)
            y = model(x)
            results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])])
            results[-1].append(torch.rand(1, dtype=dtype))  # the random stream goes on as it should
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_reversible_under_autocast():
    """The way back computes what the way there computed, in bfloat16 too."""
    model = small("reversible", 4)
    x = torch.randn(2, 5, 16, requires_grad=True)
    results = []
    for model.observed in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3)


def test_reversible_with_frozen_parameters():
    model = small("reversible")
    for connection in list(model)[:2]:
        connection.requires_grad_(False)
    model(torch.randn(2, 3, 16)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def both_ways(model, run):
    """Return what `run` gives in the loop without activations and in the plain one."""
    results = []
    for model.observed in (False, True):
        torch.manual_seed(3)
        results.append(run())
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_reversible_with_parameters_put_in_from_outside():
    """torch.func.functional_call: the way back sees the parameters of the way there."""
    model = randomised(stack("reversible"))
    x = stream(2, 3)
    given = {n: torch.randn_like(p).requires_grad_() for n, p in model.named_parameters()}

    def run():
        y = torch.func.functional_call(model, given, (x,))
        return torch.autograd.grad(y.sin().sum(), [x, *given.values()])

    both_ways(model, run)


def test_reversible_after_a_change_of_its_parameters():
    """A parameter that was changed before the way back is noticed, as autograd does elsewhere."""
    model = stack("reversible")
    y = model(stream(2, 3)).sum()
    with torch.no_grad():
        model.connections[1].branch.out.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_reversible_draws_again_in_evaluation_too():
    """Dropout that was left on inside a model in evaluation mode."""
    branches = [FeedForward(8, 5, dropout=0.5) for _ in range(4)]
    model = Stack(branches, "reversible", dim=8, dtype=torch.float64).eval()
    for module in model.modules():
        module.train(isinstance(module, nn.Dropout))
    x = stream(2, 3)
    both_ways(model, lambda: torch.autograd.grad(model(x).sin().sum(), [x, *model.parameters()]))


def test_reversible_with_shared_branches_and_checkpoint():
    branch = FeedForward(8, 5)
    model = Stack([branch] * 3, "reversible", dim=8, shared=True, dtype=torch.float64)
    randomised(model)
    x = stream(2, 3)

    def run():
        y = checkpoint(model, x, use_reentrant=False)
        return torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])

    both_ways(model, run)


def test_reversible_takes_the_plain_path_where_it_must():
    """With a cache, and under a transform of torch.func."""
    model = randomised(small("reversible", dtype=torch.float64))
    x = stream(2, 3, dim=16)
    cache = {}
    model(x, Context(cache=cache)).sum().backward()
    assert {keys.shape[2] for keys, *_ in cache.values()} == {3}
    slope = torch.func.grad(lambda t: model(t).sin().sum())(x.detach())
    close(slope, torch.autograd.grad(model(x).sin().sum(), x)[0], 1e-10)


def test_reversible_with_a_constant_branch():
    value = torch.randn(2, 8, dtype=torch.float64)
    model = Stack([Fixed(value) for _ in range(3)], "reversible", dim=8, dtype=torch.float64)
    x = stream(2)
    both_ways(model, lambda: torch.autograd.grad(model(x).sin().sum(), x))


def test_reversible_refuses_branches_that_leave_values():
    class Leaves(Branch):
        def forward(self, x, context):
            context.values["value"] = x
            return x

    model = Stack([Leaves(), Leaves()], "reversible", dim=4)
    with pytest.raises(ValueError, match="a branch that leaves value for later ones cannot be"):
        model(torch.randn(2, 4, requires_grad=True))


# -- numbers and corners that the formulas hide ------------------------------------------------


FACTS = {  # name: the start of its branch, whether the model must normalise what it returns
    "plain": ("fairseq", False), "residual": ("fairseq", False), "postact": ("he", False),
    "postnorm": ("fairseq", False), "prenorm": ("gpt2", True), "sandwich": ("gpt2", True),
    "peri": ("gpt2", True), "reordered": ("normal", True), "mixln": ("normal", True),
    "deepnorm": ("xavier", False), "admin": ("fairseq", False), "b2t": ("fairseq", False),
    "resi-dual": ("fairseq", False), "lns": ("normal", True), "gpas": ("gpt2", True),
    "keel": ("normal", False), "siamese": ("normal", False), "hybridnorm": ("normal", True),
    "rezero": ("fairseq", False), "skipinit": ("he", False), "layerscale": ("normal", True),
    "stable": ("normal", True), "completep": ("normal", True), "droppath": ("gpt2", True),
    "highway": ("fairseq", False), "gtrxl": ("gpt2", False), "deep-delta": ("gpt2", True),
    "orthogonal": ("gpt2", True), "constant-scaling": ("he", False),
    "exclusive-gating": ("he", False), "shortcut-gating": ("he", False),
    "linear-shortcut": ("he", False), "dropout-shortcut": ("he", False),
    "norm-after-addition": ("he", False), "relu-before-addition": ("he", False),
    "inject": ("gpt2", True), "unet": ("gpt2", True), "denseformer": ("gpt2", True),
    "laurel": ("gpt2", True), "attnres": ("gpt2", True), "attnres-block": ("gpt2", True),
    "hyper": ("gpt2", True), "frac": ("gpt2", True), "mhc": ("gpt2", True),
    "mhc-v4": ("gpt2", True), "ihc": ("gpt2", True), "mhc-lite": ("gpt2", True),
    "krom": ("gpt2", True), "gated-residual": ("gpt2", False), "reversible": ("gpt2", True),
}  # fmt: skip


@each_wiring
def test_start_and_final_norm_are_those_of_the_sources(name):
    """Layer-norm scaling and 1/sqrt(K) must not meet the start that scales by depth too."""
    assert (OURS[name].start, OURS[name].final_norm) == FACTS[name]
    assert OURS[name].verified == (name not in ("keel", "laurel"))


def test_a_fraction_of_layers_is_not_lost_to_rounding():
    """0.58 of 50 layers are 29, although 0.58 * 50 is less in floating point."""
    places = {"count": 100, "parts": 2, "norm": nn.LayerNorm}
    assert one("mixln(fraction=0.58)", index=2 * 28, **places).post
    assert not one("mixln(fraction=0.58)", index=2 * 29, **places).post


def test_keel_of_one_connection_needs_a_final_norm():
    assert stack("keel", 1).final_norm
    assert not stack("keel", 2).final_norm


@pytest.mark.parametrize(
    ("spec", "dim", "names", "std"),
    [
        ("highway", 128, ["gate.weight"], 0.0884),  # Xavier-normal: 1 / sqrt(D)
        ("exclusive-gating", 128, ["gate.weight"], 0.0884),
        ("shortcut-gating", 128, ["gate.weight"], 0.0884),
        ("linear-shortcut", 128, ["shortcut.weight"], 0.125),  # He: sqrt(2 / D)
        ("gtrxl", 128, ["reset_y.weight", "update_x.weight", "new_y.weight"], 0.0510),
        ("deep-delta", 16384, ["step.weight", "value.weight"], 0.00391),  # 1 / (2 sqrt(D))
        ("laurel", 1024, ["down.weight"], 0.03125),  # 1 / sqrt(D)
        ("mhc-v4", 1024, ["generate.phi", "generate_close.phi"], 0.02),
        (
            "gated-residual",
            128,
            ["read.down.weight", "read.up.weight", "write.weight", "read_close.up.weight"],
            0.02,
        ),
    ],
)
def test_matrices_of_a_scheme_start_with_their_spread(spec, dim, names, std):
    """What a scheme draws for itself has the spread that its source gives."""
    torch.manual_seed(0)
    wiring = one(spec, Wrapped(nn.Identity()), dim=dim, index=2)
    own = dict(wiring.named_parameters())
    for name in names:
        assert own[name].std().item() == pytest.approx(std, rel=0.05), name
        assert own[name].mean().abs() < 0.1 * std, name


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("plain", {"norm": False, "act": "none"}),
        ("postact", {"act": "relu"}),
        ("mixln", {"fraction": 0.25}),
        ("admin", {"change": "log"}),
        ("layerscale", {"init": 1e-4}),
        ("completep", {"base_depth": 2, "exponent": 1.0}),
        ("droppath", {"rate": 0.1, "per": "sample"}),
        ("highway", {"bias": -1.0}),
        ("constant-scaling", {"skip": 0.5, "scale": 0.5}),
        ("exclusive-gating", {"bias": -6.0}),
        ("shortcut-gating", {"bias": -6.0}),
        ("dropout-shortcut", {"rate": 0.5}),
        ("denseformer", {"dilation": 1, "period": 1}),
        ("laurel", {"rank": 16}),
        ("attnres-block", {"size": 4}),
        ("hyper", {"n": 4, "dynamic": True}),
        ("frac", {"m": 4}),
        ("mhc", {"n": 4, "iterations": 20}),
        ("mhc-v4", {"n": 4}),
        ("ihc", {"n": 4}),
        ("mhc-lite", {"n": 4}),
        ("krom", {"n": 4}),
        ("gated-residual", {"n": 4, "rank": 0}),
    ],
)
def test_options_have_the_defaults_of_their_papers(name, defaults):
    """The numbers once more, so that a slip in one of them is seen."""
    assert {k: p.default for k, p in options_of(OURS[name]).items()} == defaults


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("hyper", (2, 4, 8), lambda X: X.sum(-2) / 4),
        ("mhc", (2, 4, 8), lambda X: X.sum(-2) / 4),
        ("gated-residual", (2, 4, 8), lambda X: X.sum(-2) / 4),
        ("attnres", (3, 2, 8), lambda v: v[2]),
        ("attnres-block", (3, 2, 8), lambda v: v[2]),
        ("reversible", (2, 2, 8), lambda pair: pair[1]),
        ("inject", (2, 2, 8), lambda pair: pair[0]),
    ],
)
def test_present_is_what_the_x_ray_shall_see(name, shape, expected):
    """Of several streams the mean, of a history the newest, of a pair the one written last."""
    X = torch.randn(shape, dtype=torch.float64)
    state = X if name in ("hyper", "mhc", "gated-residual") else tuple(X)
    torch.testing.assert_close(one(name, dim=8).present(state), expected(X))


def test_droppath_per_batch_drops_all_samples_or_none():
    wiring = one("droppath(rate=0.5, per=batch)").train()
    x = fill((3,), 1).expand(64, 2, 3)
    seen = set()
    for _ in range(20):
        kept = (wiring(x, Context()) != x).flatten(1).all(-1)
        assert kept.all() or not kept.any()
        seen.add(bool(kept.any()))
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("layers", "layer", "kept", "r", "m"),
    [(1, 0, 1.0, 1.15, 0.2), (2, 0, 1.0, 1.15, 0.2), (2, 1, 0.9, 1.05, 0.05)],
)
def test_lines_over_few_layers(layers, layer, kept, r, m):
    """droppath's rate and inject's r and m go from the first layer to the last."""
    assert one("droppath", index=layer, count=layers).keep == pytest.approx(kept)
    inject = one("inject", index=layer, count=layers)
    assert (inject.keep.item(), inject.inject.item()) == pytest.approx((r, m))


def test_b2t_closes_with_x():
    """Of (x, x0), which differ within a layer."""
    x, bottom = stream(2, dim=3), stream(2, dim=3)
    assert one("b2t", norm=nn.LayerNorm).close((x, bottom)) is x


@each_wiring
def test_float32_is_near_float64(name):
    """With and without autocast around what is not: only rounding differs."""
    model = randomised(stack(name, 3), 0.3).eval()
    x = stream(2, 3).detach()
    low = copy.deepcopy(model).float()(x.float())
    assert low.dtype == torch.float32
    assert (low - model(x)).norm() < 1e-4 * model(x).norm()


@pytest.mark.parametrize(
    ("name", "starts"),
    [
        ("hyper", {"generate.weight": 0.0, "scale": 0.01, "write": 1.0}),
        ("frac", {"generate.weight": 0.0, "scale": 0.01, "write": 1.0}),
        ("mhc", {"generate.phi": 0.0, "generate.alpha": 0.01}),
        ("mhc-lite", {"generate.phi": 0.0, "generate.alpha": 0.01}),
        ("krom", {"generate.phi": 0.0, "generate.alpha": 0.01}),
        ("ihc", {"generate.phi": 0.0, "generate.alpha": 0.01}),
        ("mhc-v4", {"generate.alpha": 1.0, "generate.bias": 0.0, "generate_close.alpha": 1.0}),
        ("attnres", {"read.query": 0.0, "read.gain": 1.0, "read_close.query": 0.0}),
        ("gated-residual", {"read.gain": 0.0, "read_close.gain": 0.0}),
    ],
)
def test_small_parts_start_at_their_number(name, starts):
    """What does not show in the output at the start: factors of generators that are 0."""
    own = dict(one(name, dim=8, index=2, norm=nn.LayerNorm).named_parameters())
    for key, value in starts.items():
        torch.testing.assert_close(own[key], torch.full_like(own[key], value))


def test_hyper_connections_widen_the_output_matrices_by_the_root_of_n():
    assert one("hyper(n=9)", FeedForward(3).double()).gains() == {"out": 3.0}


def test_reversible_loop_tells_its_streams_apart():
    """On a pair of two tensors the loop without activations is the plain one."""
    model = randomised(stack("reversible", 3))
    pair, results = (stream(2), stream(2)), []
    for run in (streams.Reversible.run, Wiring.run):
        a, b = run(iter(model), pair, Context())  # any iterable
        gradients = torch.autograd.grad((a.sin() + b.cos()).sum(), [*pair, *model.parameters()])
        results.append([a, b, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "eps"),
    [("mhc", 1e-20), ("mhc-lite", 1e-20), ("krom", 1e-20), ("ihc", 1e-20), ("mhc-v4", 1e-6)],
)
def test_generator_has_the_eps_of_its_paper(name, eps):
    """Seen on a stream whose mean square is as small."""
    wiring = randomised(one(name, dim=8))
    X = eps**0.5 * stream(4).detach()
    p, sizes = dict(wiring.named_parameters()), wiring.generate.sizes
    for ours, theirs in zip(
        wiring.generate(X), oracle.generated(p, "generate", list(X), sizes, eps), strict=True
    ):
        close(ours, torch.stack(theirs), 1e-9)


@pytest.mark.parametrize("shift", [-800.0, 800.0])
def test_sinkhorn_does_not_overflow(shift):
    """The largest logit is taken off: what is added to all, or far below, does not matter."""
    ours = streams.sinkhorn(LOGITS + shift, 20)
    close(ours, streams.sinkhorn(LOGITS, 20), 1e-10)
    far = LOGITS - 900 * (1 - torch.eye(4, dtype=torch.float64))
    close(streams.sinkhorn(far, 20), torch.eye(4, dtype=torch.float64), 1e-10)


@pytest.mark.parametrize("name", ["mhc", "mhc-lite", "krom"])
def test_first_and_last_connection_have_no_mixing_map(name):
    """There it could change nothing, so there are no parameters for it."""
    assert [len(connection.generate.alpha) for connection in stack(name)] == [2, 3, 3, 2]


@pytest.mark.parametrize(
    ("spec", "dim", "rank"),
    [("gated-residual", 64, 8), ("gated-residual", 4, 1), ("gated-residual(rank=3)", 64, 3)],
)
def test_rank_of_gated_residual(spec, dim, rank):
    """Rank 0 stands for D / 8, at least 1."""
    assert one(spec, dim=dim).read.down.out_features == rank


def test_reversible_with_a_parameter_that_is_not_used():
    """Its gradient is none, as in the plain loop."""
    model = stack("reversible", 2)
    for connection in model:
        connection.branch.spare = nn.Parameter(torch.ones(1, dtype=torch.float64))
    model(stream(2)).sum().backward()
    assert all(connection.branch.spare.grad is None for connection in model)


@pytest.mark.parametrize(("shape", "mask"), [((64,), (1,)), ((64, 3), (64, 1))])
def test_keep_mask_is_one_for_each_sample(shape, mask):
    """A tensor of one axis is one sample."""
    assert keep_mask(torch.ones(shape), 0.5).shape == mask


# -- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mixln(fraction=1.5)", "fraction=1.5 of mixln must be from 0 to 1"),
        ("mixln(fraction=-0.1)", "fraction=-0.1 of mixln must be from 0 to 1"),
        ("completep(base_depth=0)", "base_depth=0 of completep must be at least 1"),
        ("completep(exponent=2.0)", "exponent=2.0 of completep must be from 0 to 1"),
        ("droppath(rate=1.0)", "rate=1.0 of droppath must be from 0 to 0.99"),
        (
            "droppath(per=token)",
            "unknown value of per in 'droppath(per=token)' 'token' (known: sample, batch)",
        ),
        ("highway(bias=1e999)", "bias=inf of highway must be finite"),
        ("denseformer(dilation=0)", "dilation=0 of denseformer must be at least 1"),
        ("denseformer(period=0)", "period=0 of denseformer must be at least 1"),
        ("laurel(rank=0)", "rank=0 of laurel must be at least 1"),
        ("attnres-block(size=0)", "size=0 of attnres-block must be at least 1"),
        ("hyper(n=1)", "n=1 of hyper must be from 2 to 16"),
        ("mhc(iterations=0)", "iterations=0 of mhc must be from 1 to 1000"),
        ("mhc-lite(n=6)", "n=6 of mhc-lite must be from 2 to 5"),
        ("krom(n=6)", "n=6 of krom must be a power of 2: 2, 4, 8 or 16"),
        ("krom(n=1)", "n=1 of krom must be from 2 to 16"),
        ("gated-residual(rank=-1)", "rank=-1 of gated-residual must be at least 0"),
        ("dropout-shortcut(rate=1.1)", "rate=1.1 of dropout-shortcut must be from 0 to 1"),
        (
            "postact(act=rulu)",
            "unknown value of act in 'postact(act=rulu)' 'rulu'; did you mean 'relu'? "
            "(known: none, relu, gelu, silu, tanh)",
        ),
        (
            "admin(change=square)",
            "unknown value of change in 'admin(change=square)' 'square' "
            "(known: log, constant, linear)",
        ),
    ],
)
def test_bad_option_is_refused_in_one_line(spec, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole text is compared
        parse_spec(spec)
    assert str(caught.value) == message


def test_pieces_must_divide_the_width():
    with pytest.raises(ValueError, match="m=3 of frac must divide the width 16"):
        small("frac(m=3)")


def test_the_oracle_sees_every_connection():
    """The naive formulas get the places that the wirings have."""
    known = connections(stack("prenorm", 6, parts=2), "layernorm")
    assert [c.index for c in known] == list(range(6))
    assert [c.layer for c in known] == [0, 0, 1, 1, 2, 2]
    assert [(c.first_part, c.last_part) for c in known[:2]] == [(True, False), (False, True)]
    assert {(c.K, c.L) for c in known} == {(6, 3)}
