"""Exact equivalences of the catalogue, end to end, and what the optimiser is told."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from catalogue_cases import Fixed, Same, close, exact_layernorm, exact_rms, fill, one
from test_wirings import randomised, stack, stream
from torch import nn

from addnorm.branches import Context, keep_mask
from addnorm.groups import parameter_groups
from addnorm.models.layers import FeedForward

DROPPED = 0.4  # a drop rate


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
