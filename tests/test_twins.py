"""The sick twins: each has the symptom of its defect, and its healthy counterpart has not."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from addnorm import twins
from addnorm.models.layers import Attention, FeedForward
from addnorm.twins import TWINS


@pytest.fixture(params=["sick", "healthy"])
def health(request):
    return request.param


def make(name, health, *args, **kwargs):
    return getattr(TWINS[name], health)(*args, **kwargs)


def silenced(module):
    """Set the last matrix of every branch to 0, so that the branches give nothing."""
    with torch.no_grad():
        for part in module.modules():
            last = None
            if isinstance(part, Attention | FeedForward):
                last = part.out
            elif isinstance(part, nn.MultiheadAttention):
                last = part.out_proj
            if last is not None:
                last.weight.zero_()
                last.bias.zero_()
    return module


@pytest.mark.parametrize("name", TWINS)
def test_every_twin_says_where_it_is_printed(name):
    """Its docstring begins with document, lines and erratum, and names the counterpart."""
    twin = TWINS[name]
    text = twin.sick.__doc__
    assert text.startswith(twin.document + (f", {twin.erratum}: " if twin.erratum else ": "))
    assert twin.healthy.__name__ in text
    assert re.fullmatch(r"00[0-4]:\d+(-\d+)?", twin.document)


# -- 004, the residual block -------------------------------------------------------------------


def test_inplace_changes_the_callers_tensor(health):
    """The sick block leaves relu(x) in the caller's hands."""
    x = torch.randn(2, 4, 5, 5)
    before = x.clone()
    make("inplace", health, 4, 4)(x)
    assert torch.equal(x, before) == (health == "healthy")
    assert health == "healthy" or torch.equal(x, F.relu(before))


def test_inplace_skips_what_is_left_of_x(health):
    """With a silent branch and no ReLU at the end in sight the negative part of x is gone."""
    block = make("inplace", health, 4, 4)
    seen = []
    relu = F.relu
    for part in block.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.zeros_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    x = torch.randn(2, 4, 5, 5)
    before = x.clone()

    def watch(h, inplace=False):
        seen.append(h.detach().clone())
        return relu(h, inplace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "relu", watch)
        block(x)
    added = seen[-1] if health == "sick" else None  # x + 0, in front of the last ReLU
    if health == "sick":
        assert torch.equal(added, relu(before))
        assert not torch.equal(added, before)
    else:
        want = before.movedim(1, -1)
        update = block.unit.branch(want, None)
        assert not update.any()
        assert torch.equal(block.unit.shortcut(want) + update, want)


def test_inplace_blocks_in_a_row_cannot_train(health):
    """Two sick blocks behind one another fail on the way back, and a leaf fails at once."""
    net = nn.Sequential(make("inplace", health, 3, 3), make("inplace", health, 3, 3))
    x = torch.randn(2, 3, 5, 5)
    leaf = x.clone().requires_grad_()
    if health == "sick":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            net(x).sum().backward()
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            net(leaf)
    else:
        net(leaf).square().sum().backward()
        assert torch.isfinite(leaf.grad).all()
        assert leaf.grad.any()


# -- 004, the residual layer -------------------------------------------------------------------


def test_doubled_has_no_skip(health):
    """With silent branches the sick layer gives 0, the healthy one x."""
    layer = silenced(make("doubled", health, 8, 16, heads=2))
    x = torch.randn(2, 3, 8)
    assert torch.equal(layer(x), x if health == "healthy" else torch.zeros_like(x))


def test_doubled_has_no_identity_in_its_jacobian(health):
    """The mean diagonal of dy/dx is near 0 with the sick layer and near 1 with the healthy one."""
    layer = make("doubled", health, 32, 64, heads=2, dropout=0.0).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.3)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: layer(x[None, None])[0, 0], torch.randn(32)
    )
    assert jacobian.diagonal().mean().item() == pytest.approx(float(health == "healthy"), abs=0.2)


def test_doubled_forgets_its_input(health):
    """Scaling x by 3 changes what a healthy layer gives and not what a sick one does."""
    layer, x = make("doubled", health, 8, 16, heads=2).eval(), torch.randn(2, 3, 8)
    same = torch.allclose(layer(3 * x), layer(x), atol=1e-3)
    assert same == (health == "sick")


# -- 004, LayerNorm ----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 8, 64, 512])
def test_unbiased_is_too_small(width, health):
    """The sick output is sqrt((D-1)/D) of torch's: 0.7071 at D = 2, 0.9354 at 8."""
    x = 100 * torch.randn(3, width)  # so large that eps does not matter
    ratio = make("unbiased", health, width)(x) / nn.LayerNorm(width)(x)
    want = 1.0 if health == "healthy" else math.sqrt((width - 1) / width)
    torch.testing.assert_close(ratio, torch.full_like(ratio, want), rtol=1e-4, atol=0)


def test_unbiased_is_nan_at_one(health):
    """One feature has no unbiased variance."""
    y = make("unbiased", health, 1)(torch.randn(4, 1))
    assert torch.isnan(y).all() == (health == "sick")


# -- 004, parts that do not exist ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("undefined", NameError, "name 'MultiHeadAttention' is not defined"),
        ("inner-width", TypeError, "got multiple values for argument 'num_heads'"),
    ],
)
def test_parts_that_cannot_be_built(name, error, message, health):
    """The sick layers fail when they are built."""
    if health == "sick":
        with pytest.raises(error, match=message):
            make(name, health, 16, 32)
        return
    x = torch.randn(2, 3, 16)
    assert make(name, health, 16, 32)(x).shape == x.shape


# -- 002 ---------------------------------------------------------------------------------------


def test_stream_dropout_fades_the_skip(health):
    """With silent branches 0.9^12 = 28 % of x is left after 12 sick layers, all of it else."""
    layers = [silenced(make("stream-dropout", health, 64, 0.1)) for _ in range(12)]
    x = torch.ones(8, 32, 64)
    kept = (nn.Sequential(*layers)(x) != 0).double().mean().item()
    assert kept == pytest.approx(0.9**12 if health == "sick" else 1.0, abs=0.02)


def test_stream_dropout_is_silent_in_evaluation(health):
    """In evaluation both pass x on."""
    x = torch.randn(2, 3, 8)
    assert torch.equal(silenced(make("stream-dropout", health, 8)).eval()(x), x)


def test_input_dropout_keeps_every_update(health):
    """In training half of the healthy updates are 0 at a rate of a half, and no sick one is."""
    layer, x = make("input-dropout", health, 64, 0.5), torch.randn(4, 16, 64)
    lost = (layer(x) == x).double().mean().item()
    assert lost == pytest.approx(0.0 if health == "sick" else 0.5, abs=0.03)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_sequence_norm_joins_the_tokens(health):
    """Another last token changes the first one's output; the sick norm levels every channel."""
    norm, x = make("sequence-norm", health, 8), torch.randn(2, 5, 8) + 3
    other = x.clone()
    other[:, 4] = torch.randn(2, 8)
    leaks = not torch.allclose(norm(x)[:, 0], norm(other)[:, 0])
    assert leaks == (health == "sick")
    axis = 1 if health == "sick" else 2
    torch.testing.assert_close(
        norm(x).mean(axis), torch.zeros_like(x.mean(axis)), atol=1e-6, rtol=0
    )


def test_batch_mixer_mixes_examples(health):
    """Another second example changes the first one's output, and positions do not see others."""
    layer, x = make("batch-mixer", health, 8, 2), torch.randn(3, 5, 8)
    other = x.clone()
    other[1] = torch.randn(5, 8)
    leaks = not torch.allclose(layer(x)[0], layer(other)[0], atol=1e-6)
    later = x.clone()
    later[:, 4] = torch.randn(3, 8)
    looks = not torch.allclose(layer(x)[:, 0], layer(later)[:, 0], atol=1e-6)
    assert (leaks, looks) == ((True, False) if health == "sick" else (False, True))


@pytest.mark.parametrize("mask", [None, torch.ones(4, 4, dtype=torch.bool).triu(1)])
def test_mask_keyword_is_a_type_error(mask, health):
    """Every call of the sick layer fails, with and without a mask; the healthy one is causal."""
    layer, x = make("mask-keyword", health, 8, 2), torch.randn(2, 4, 8)
    if health == "sick":
        with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
            layer(x, mask)
        return
    later = x.clone()
    later[:, 3] = 0
    same = torch.allclose(layer(x, mask)[:, 0], layer(later, mask)[:, 0], atol=1e-6)
    assert same == (mask is not None)


def test_one_skip_cannot_pass_negative_numbers(health):
    """With silent branches the sick layer gives relu(x), the healthy one x."""
    layer = silenced(make("one-skip", health, 8, 2))
    x = torch.randn(2, 3, 8)
    assert torch.equal(layer(x), x if health == "healthy" else F.relu(x))


def test_one_skip_has_one_skip(health):
    """With a silent attention the healthy feed-forward still reads x, the sick one nothing."""
    layer = make("one-skip", health, 8, 2)
    for part in layer.modules():
        if isinstance(part, Attention):
            silenced(part)
    seen = []
    for part in layer.modules():
        if isinstance(part, FeedForward):
            part.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    layer(torch.randn(2, 3, 8))
    assert bool(seen[0].any()) == (health == "healthy")


# -- 003 ---------------------------------------------------------------------------------------


def test_accumulated_doubles(health):
    """The second listing of the sick function is twice the first; the healthy one repeats it."""
    model, x = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 1)), torch.randn(4, 3)
    list_them = getattr(TWINS["accumulated"], health)
    first, second = (list_them(model, lambda: model(x).square().mean()) for _ in range(2))
    assert list(first) == ["0.weight", "2.weight"]
    factor = 2 if health == "sick" else 1
    assert second == pytest.approx({name: factor * value for name, value in first.items()})
    fresh = copy.deepcopy(model)
    fresh.zero_grad()
    assert twins.gradients(fresh, lambda: fresh(x).square().mean()) == pytest.approx(first)


def test_gradients_leave_nothing_behind():
    """The healthy listing leaves `.grad` as it was."""
    model = nn.Linear(2, 1)
    twins.gradients(model, lambda: model(torch.ones(1, 2)).sum())
    assert model.weight.grad is None
