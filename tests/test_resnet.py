"""ResNet: published counts, equality with other implementations, every wiring, every refusal."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from addnorm.branches import DropPath, Site
from addnorm.contract import Stack, Wiring, catalogue
from addnorm.models.layers import FeedForward
from addnorm.models.resnet import (
    Change,
    Convolution,
    Projection,
    ResNet,
    ResNetConfig,
    Subsample,
    Unit,
    load_torchvision,
    to_torchvision,
    torchvision_names,
    unit_of,
)
from addnorm.norms import BATCH_NORMS

NEEDS_ATTENTION = {"hybridnorm"}
ON_IMAGES = [name for name in catalogue() if name not in NEEDS_ATTENTION]


def resnet(**changes):
    return ResNet(ResNetConfig(**{"channels": 1, "width": 8, **changes}))


def imagenet(depth, **changes):
    return ResNet(ResNetConfig(depth=depth, stem="imagenet", classes=7, **changes))


def count(model):
    return sum(p.numel() for p in model.parameters())


def randomised(model):
    """Move every tensor of the model away from its start; gains stay near 1."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn_like(tensor)
                fan = tensor[0].numel() if tensor.dim() > 1 else 25
                spread = noise.abs() if "var" in name else noise
                tensor.add_(spread, alpha=fan**-0.5)
    return model


def digits(batch=6, channels=1, size=8):
    return torch.randn(batch, channels, size, size), torch.arange(batch)


# -- published numbers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        # He et al. 2015, table 6, in millions
        ({"depth": 20}, "0.27"),
        ({"depth": 32}, "0.46"),
        ({"depth": 44}, "0.66"),
        ({"depth": 56}, "0.85"),
        ({"depth": 110}, "1.7"),
        ({"depth": 1202}, "19.4"),
        # He et al. 2016: ResNet-164 of 1.7 million
        ({"depth": 164, "wiring": "residual"}, "1.7"),
        # torchvision's documentation
        ({"depth": 18, "stem": "imagenet", "classes": 1000}, "11.69"),
        ({"depth": 34, "stem": "imagenet", "classes": 1000}, "21.80"),
        ({"depth": 50, "stem": "imagenet", "classes": 1000}, "25.56"),
        ({"depth": 101, "stem": "imagenet", "classes": 1000}, "44.55"),
        ({"depth": 152, "stem": "imagenet", "classes": 1000}, "60.19"),
    ],
)
def test_parameters_as_published(shape, published):
    """The number of parameters in millions is the published one, to its last digit."""
    with torch.device("meta"):
        model = ResNet(ResNetConfig(**shape))
    assert f"{count(model) / 1e6:.{len(published.partition('.')[2])}f}" == published
    assert sum(model.parameters_by_part().values()) == count(model)


@pytest.mark.parametrize(
    ("depth", "published"), [(18, 1.8), (34, 3.6), (50, 3.8), (101, 7.6), (152, 11.3)]
)
def test_multiply_adds_as_published(depth, published):
    """He et al. 2015, table 1: 1e9 multiply-adds at 224 pixels, the stride in the first 1x1."""
    with torch.device("meta"):
        config = ResNetConfig(depth=depth, stem="imagenet", classes=1000, stride_in="1x1")
        model = ResNet(config)
    assert model.flops(224) / 1e9 == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {"wiring": "linear-shortcut"},
        {"depth": 11, "block": "bottleneck", "stride_in": "1x1"},
        {"stem": "imagenet", "depth": 50, "shortcut": "B"},
        {"wiring": "residual", "shortcut": "C"},
    ],
    ids=str,
)
def test_multiply_adds_are_those_that_run(changes):
    """The count is what hooks on every convolution and linear layer see, at an odd size."""
    model = resnet(**changes).eval()
    seen = 0

    def see(module, inputs, output):
        nonlocal seen
        pixels = output[..., 0].numel()
        seen += module.weight.numel() * pixels

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(see)
    model(torch.randn(1, 1, 37, 37))
    assert model.flops(37) == seen


def test_units_of_a_depth():
    """6n + 2 layers are n basic units in each stage, 9n + 2 are n bottlenecks; so is 164."""
    for depth, block, units in [
        (20, "basic", 3),
        (56, "basic", 9),
        (164, "bottleneck", 18),
        (1001, "bottleneck", 111),
        (1202, "basic", 200),
    ]:
        with torch.device("meta"):
            model = resnet(depth=depth)
        assert (model.plan.block, model.plan.units) == (block, (units,) * 3)
        weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        shortcuts = [m for m in model.modules() if isinstance(m, Projection)]
        assert len(weighted) - len(shortcuts) == depth  # what names the network


# -- equal to the implementations of others ----------------------------------------------------


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


@pytest.mark.parametrize("depth", [18, 34, 50, 101, pytest.param(152, marks=pytest.mark.slow)])
def test_equal_to_timm(timm, depth):
    """Random weights of timm's network give its logits here, and ours give ours there."""
    theirs = randomised(timm.create_model(f"resnet{depth}", num_classes=7)).double()
    ours = imagenet(depth).double()
    load_torchvision(ours, theirs.state_dict())
    images = torch.randn(2, 3, 40, 33, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-9, atol=1e-9)
        randomised(ours)
        theirs.load_state_dict(to_torchvision(ours))
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-9, atol=1e-9)


def test_gradients_equal_to_timm(timm):
    """In training the gradients of input and weights and the running statistics are timm's."""
    theirs = randomised(timm.create_model("resnet18", num_classes=7)).double()
    ours = imagenet(18).double()
    load_torchvision(ours, theirs.state_dict())
    names = torchvision_names(ours)
    images = torch.randn(3, 3, 33, 33, dtype=torch.float64)
    one, other = (images.clone().requires_grad_() for _ in range(2))
    ours(one).square().sum().backward()
    theirs(other).square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-7, atol=1e-9)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[names[name]].grad, rtol=1e-7, atol=1e-7)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[names[name]])


@pytest.mark.parametrize("stride_in", ["1x1", "3x3"])
@pytest.mark.parametrize("depth", [18, 50])
def test_equal_to_transformers(depth, stride_in):
    """Random weights give the logits of transformers' ResNet, whichever convolution halves."""
    hf = pytest.importorskip("transformers")
    bottleneck = depth == 50
    config = hf.ResNetConfig(
        layer_type="bottleneck" if bottleneck else "basic",
        depths=[3, 4, 6, 3] if bottleneck else [2, 2, 2, 2],
        hidden_sizes=[256, 512, 1024, 2048] if bottleneck else [64, 128, 256, 512],
        downsample_in_bottleneck=stride_in == "1x1",
        num_labels=7,
    )
    theirs = hf.ResNetForImageClassification(config).double().eval()
    ours = randomised(imagenet(depth, stride_in=stride_in)).double().eval()
    renamed = {}
    for name, tensor in to_torchvision(ours).items():
        tensor_name = name.rpartition(".")[2]
        stem = {"conv1": "convolution", "bn1": "normalization"}.get(name.partition(".")[0])
        inner = re.match(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)", name)
        if stem:
            key = f"resnet.embedder.embedder.{stem}.{tensor_name}"
        elif inner is None:
            key = f"classifier.1.{tensor_name}"
        else:
            stage, unit, what, i = inner.groups()
            second = what == "bn" or (what == "downsample." and i == "1")
            part = "shortcut" if what == "downsample." else f"layer.{int(i) - 1}"
            kind = "normalization" if second else "convolution"
            key = (
                f"resnet.encoder.stages.{int(stage) - 1}.layers.{unit}.{part}.{kind}.{tensor_name}"
            )
        renamed[key] = tensor
    theirs.load_state_dict(renamed)
    images = torch.randn(2, 3, 40, 33, dtype=torch.float64)
    with torch.no_grad():
        want = theirs(images).logits
        torch.testing.assert_close(ours(images), want, rtol=1e-9, atol=1e-9)


def test_nothing_is_half_loaded():
    """Every fault of a state dict is in one message, and the model stays as it was."""
    ours, state = imagenet(18), to_torchvision(imagenet(18))
    before = copy.deepcopy(ours.state_dict())
    state["fc.weight"] = torch.zeros(5, 512)
    state["layer9.weight"] = torch.zeros(1)
    del state["layer1.0.conv1.weight"], state["bn1.running_var"], state["bn1.num_batches_tracked"]
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole text is compared
        load_torchvision(ours, state)
    assert str(caught.value) == (
        "these weights are not those of the model: missing: bn1.running_var, "
        "layer1.0.conv1.weight; unknown: layer9.weight; of another shape: fc.weight (5, 512) in "
        "place of (7, 512)"
    )
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_old_files_without_counts_load():
    """Files from before batches were counted load."""
    ours, other = imagenet(18), imagenet(18)
    state = {n: t for n, t in to_torchvision(other).items() if "num_batches" not in n}
    load_torchvision(ours, state)
    assert all(map(torch.equal, ours.parameters(), other.parameters()))


def test_torchvision_has_no_other_units():
    """Names of torchvision's are refused for what its network cannot hold."""
    with pytest.raises(ValueError, match="wiring postact and batchnorm, not residual and batchnor"):
        torchvision_names(resnet(wiring="residual"))


# -- the units, written out on (B, C, H, W) ----------------------------------------------------


def channels_first(model, images):
    """The network restated with torch's functions on `(B, C, H, W)`: v1, v2, plain, A, B and C."""
    p = dict(model.named_parameters())
    original = model.plan.original

    def norm(name, x):
        return F.batch_norm(x, None, None, p[f"{name}.weight"], p[f"{name}.bias"], training=True)

    def conv(name, x, stride=1):
        weight = p[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def branch(name, x, stride):
        n = sum(f"{name}.convs.{i}.weight" in p for i in range(3))
        halves = 0 if n == 2 or model.config.stride_in == "1x1" else 1
        for i in range(n):
            if i:
                x = F.relu(norm(f"{name}.norms.{i - 1}", x))
            x = conv(f"{name}.convs.{i}", x, stride if i == halves else 1)
        return norm(f"{name}.norms.{n - 1}", x) if original else x

    x = F.relu(norm("stem_norm", conv("stem", images)))
    for s, units in enumerate(model.plan.units):
        stage = f"stages.{s}"
        changes = [
            f"{stage}.{i}" for i in range(units) if f"{stage}.{i}.branch.convs.0.weight" in p
        ]
        stack = f"{stage}.{len(changes)}.connections"
        names = changes + [f"{stack}.{i}" for i in range(units - len(changes))]
        for i, name in enumerate(names):
            stride = 2 if s and not i else 1
            skip = x
            if not original:
                lead = f"{name}.lead" if name in changes else f"{name}.branch.lead"
                active = x if s == i == 0 else F.relu(norm(lead, x))
                skip = active if name in changes else x
            else:
                active = x
            update = branch(f"{name}.branch", active, stride)
            if name in changes and f"{name}.shortcut.conv.weight" in p:
                skip = conv(f"{name}.shortcut.conv", skip, stride)
                skip = norm(f"{name}.shortcut.norm", skip) if original else skip
            elif name in changes:
                skip = skip[:, :, ::stride, ::stride]
                more = update.shape[1] - skip.shape[1]
                skip = torch.cat((skip, torch.zeros_like(update[:, :more])), 1)
            x = update if model.config.wiring.startswith("plain") else skip + update
            x = F.relu(x) if original else x
    x = x if original else F.relu(norm("norm", x))
    return F.linear(x.mean((2, 3)), p["head.weight"], p["head.bias"])


@pytest.mark.parametrize(
    "changes",
    [
        {"wiring": "postact"},
        {"wiring": "postact", "shortcut": "B"},
        {"wiring": "postact", "shortcut": "C"},
        {"wiring": "residual"},
        {"wiring": "residual", "shortcut": "B"},
        {"wiring": "residual", "shortcut": "C"},
        {"wiring": "plain"},
        {"wiring": "plain(act=relu)"},
        {"wiring": "postact", "block": "bottleneck", "depth": 20},
        {"wiring": "residual", "block": "bottleneck", "depth": 20},
        {"wiring": "residual", "block": "bottleneck", "depth": 20, "stride_in": "1x1"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_the_network_is_its_formula(changes):
    """Outputs and gradients are those of the network restated on (B, C, H, W)."""
    model = randomised(resnet(**{"depth": 20, "width": 4, **changes})).double()
    images = torch.randn(4, 1, 9, 7, dtype=torch.float64, requires_grad=True)
    got, want = model(images), channels_first(model, images)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    named = {"images": images, **dict(model.named_parameters())}
    weights = torch.randn_like(want)
    ours = torch.autograd.grad((got * weights).sum(), list(named.values()))
    theirs = torch.autograd.grad((want * weights).sum(), list(named.values()))
    for name, one, other in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_prenorm_is_v2():
    """`prenorm` around a unit without its own first norm is `residual` around one with it."""
    v2, pre = resnet(wiring="residual").double(), resnet(wiring="prenorm").double()
    state = {}
    for name in pre.state_dict():
        state[name] = v2.state_dict().get(name.replace("norm_in", "branch.lead"))
    first = "stages.0.0.connections.0.norm_in"
    state |= {n: t for n, t in pre.state_dict().items() if n.startswith(first)}
    pre.load_state_dict(state)
    images, _ = digits()
    stream = torch.randn(4, 8, 8, 8, dtype=torch.float64)
    for one, other in zip(list(v2.joints())[1:3], list(pre.joints())[1:3], strict=True):
        torch.testing.assert_close(one(stream, None), other(stream, None))
    assert torch.isfinite(pre(images.double())).all()


def test_plain_twins_have_the_same_units():
    """Without its shortcuts a network of option A has the same parameters."""
    for residual, plain in [("postact", "plain(act=relu)"), ("residual", "plain")]:
        one, other = (resnet(wiring=w).state_dict() for w in (residual, plain))
        assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in other.items()}


# -- every wiring ------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [8, 14, 20])
@pytest.mark.parametrize("wiring", ON_IMAGES)
def test_every_wiring_runs_on_images(wiring, depth):
    """Forward and backward are finite, and away from the start every parameter has a gradient."""
    model = randomised(resnet(depth=depth, wiring=wiring))
    images, labels = digits()
    F.cross_entropy(model(images), labels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name
    logits = model.eval()(images)
    assert logits.shape == (6, 10)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("wiring", NEEDS_ATTENTION)
def test_wirings_that_need_attention_are_refused(wiring):
    """What asks an option of the attention has no meaning here."""
    with pytest.raises(ValueError, match="hybridnorm asks qkv_norm of an attention, which a ResNe"):
        ResNetConfig(wiring=wiring)


@pytest.mark.parametrize("norm", BATCH_NORMS)
@pytest.mark.parametrize("wiring", ["postact", "residual", "sandwich"])
def test_every_norm(norm, wiring):
    """The units and the wiring take every norm, and all of it learns."""
    model = resnet(norm=norm, wiring=wiring, depth=8)
    images, labels = digits()
    F.cross_entropy(model(images), labels).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    kinds = {type(m) for m in model.modules() if "orm" in type(m).__name__}
    assert kinds <= {type(BATCH_NORMS[norm](1))}


def test_one_norm_in_front_of_a_branch():
    """A wiring's norm in front of the branch takes the place of the unit's, not a place beside."""
    for connection in (j for j in resnet(wiring="sandwich").joints() if isinstance(j, Wiring)):
        assert unit_of(connection).lead is None
    leads = [unit_of(j).lead for j in resnet(wiring="rezero").joints() if isinstance(j, Wiring)]
    assert leads[0] is None  # the stem has it
    assert all(lead is not None for lead in leads[1:])


def test_streams_are_channels_last_without_copies():
    """What goes through units, stages and wirings is contiguous with the channels last."""
    for shape in ({"wiring": "postact", "width": 16}, {"wiring": "prenorm", "shortcut": "B"}):
        model = resnet(channels=3, **shape)
        seen = []

        def see(module, inputs, output, seen=seen):
            seen += [t for t in (inputs[0], output) if isinstance(t, torch.Tensor)]

        kinds = (Convolution, Unit, Change, Stack, Wiring, type(BATCH_NORMS["batchnorm"](1)))
        for module in model.modules():
            if isinstance(module, kinds):
                module.register_forward_hook(see)
        model(torch.randn(2, 3, 16, 16))
        images = [x for x in seen if x.dim() == 4]
        assert len(images) > 60
        assert all(x.is_contiguous() for x in images)


# -- depth of the whole network ----------------------------------------------------------------


def test_constants_count_the_whole_network():
    """Constants by depth follow the network; what opens and closes a stream follows the stack."""
    model = resnet(depth=20, wiring="deepnorm")
    connections = [j for j in model.joints() if isinstance(j, Wiring)]
    assert {c.alpha for c in connections} == {9**0.25}
    sites = [c.site for c in connections]
    assert [(s.index, s.count) for s in sites] == [(0, 3), (1, 3), (2, 3)] + [(0, 2), (1, 2)] * 2
    assert [s.layer for s in sites] == [0, 1, 2, 4, 5, 7, 8]  # 3 and 6 change the width
    assert {(s.layers, s.connections) for s in sites} == {(9, 9)}
    scales = [c.scale for c in resnet(depth=20, wiring="lns").joints() if isinstance(c, Wiring)]
    assert scales == [(layer + 1) ** -0.5 for layer in (0, 1, 2, 4, 5, 7, 8)]
    keel = [c for c in resnet(depth=20, wiring="keel").joints() if isinstance(c, Wiring)]
    assert [c.alpha for c in keel] == [1] + [9] * 6
    assert [c.norm is None for c in keel] == [True] + [False] * 6


def test_a_site_alone_is_a_whole_network():
    """Without `before` and `total` a site's network is its stack."""
    site = Site(8, 5, 12, 2)
    assert (site.layer, site.layers, site.connections, site.part) == (2, 6, 12, 1)
    site = Site(8, 5, 12, 2, before=4, total=20)
    assert (site.layer, site.layers, site.connections, site.part) == (4, 10, 20, 1)
    assert not Site(8, 0, 12, before=4, total=20).last
    assert Site(8, 0, 12, before=4, total=20).first


def test_two_stacks_are_one_network():
    """A stack cut in two is the whole one, where the scheme opens and closes with nothing."""
    for wiring in ("deepnorm", "lns", "stable", "completep", "mixln(fraction=0.5)", "keel"):
        for start in ("gpt2", "depth-scaled", "tfixup", "subln", "fixup"):

            def build(count, wiring=wiring, start=start, **place):
                branches = [FeedForward(4) for _ in range(count)]
                return Stack(branches, wiring, dim=4, parts=2, start=start, **place)

            torch.manual_seed(3)
            whole = build(8)
            torch.manual_seed(3)
            parts = build(2, total=8), build(6, before=2, total=8)
            torch.manual_seed(5)
            whole.reset_parameters()
            torch.manual_seed(5)
            for part in parts:
                part.reset_parameters()
            x = torch.randn(3, 4)
            assert torch.equal(whole(x), parts[1](parts[0](x))), (wiring, start)


@pytest.mark.parametrize(
    "place", [{"before": 1}, {"before": -1}, {"total": 1}, {"before": 3, "total": 4}]
)
def test_a_stack_outside_its_network_is_refused(place):
    """A place that the network does not have is refused."""
    branches = [FeedForward(4) for _ in range(2)]
    with pytest.raises(
        ValueError, match=r"a stack of 2 connections after .* does not fit in a net"
    ):
        Stack(branches, dim=4, **place)


def test_stochastic_depth_rises_over_the_network():
    """Rates go linearly from 0 to `drop_path` over all units, also those that change the width."""
    model = resnet(depth=20, drop_path=0.4)
    rates = [m.rate for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.05 * i for i in range(9)])
    images, labels = digits()
    F.cross_entropy(model(images), labels).backward()
    same = resnet(depth=20)
    same.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(images), same.eval()(images))


# -- starts ------------------------------------------------------------------------------------


def test_convolutions_start_by_their_outputs():
    """Stem, units and projections start with N(0, 2 / fan_out), as the published code does."""
    model = ResNet(ResNetConfig(depth=50, stem="imagenet"))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name


def test_a_start_by_name_reaches_all_units():
    """`start` replaces he-out in all units; empty asks the wiring."""
    for unit in resnet(start="zero", wiring="residual").units():
        assert not unit.convs[-1].weight.any()
    asked = [u.convs[-1].weight.std() for u in resnet(start="", wiring="prenorm").units()]
    named = [u.convs[-1].weight.std() for u in resnet(start="gpt2", wiring="prenorm").units()]
    for joint, one, other in zip(resnet().joints(), asked, named, strict=True):
        if isinstance(joint, Wiring):
            assert one.item() == pytest.approx(other.item(), rel=0.15)


@pytest.mark.parametrize("wiring", ["postact", "residual", "prenorm", "deepnorm"])
def test_zero_last_starts_every_unit_at_zero(wiring):
    """With `zero_last` every branch starts at 0: stages of v1 are relu, of v2 the identity."""
    model = resnet(depth=14, wiring=wiring, zero_last=True)
    x = torch.randn(2, 8, 8, 8)
    for unit in model.units():
        width = unit.chain[0].in_channels
        assert not unit(torch.randn(2, 4, 4, width)).any()
    if wiring in ("postact", "residual"):
        want = F.relu(x) if wiring == "postact" else x
        assert torch.equal(model.stages[0](x), want)


@pytest.mark.parametrize("wiring", ["postact", "residual", "prenorm", "mhc", "plain"])
def test_works_after_the_meta_device(wiring):
    """A ResNet made on the meta device and reset is the one made in memory and reset."""
    config = ResNetConfig(depth=14, width=8, channels=1, wiring=wiring, zero_last=wiring != "plain")
    made = ResNet(config)
    with torch.device("meta"):
        late = ResNet(config)
    late = late.to_empty(device="cpu")
    for model in (made, late):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(-1 if tensor.dtype == torch.int64 else float("nan"))
        torch.manual_seed(1)
        model.reset_parameters()
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, late.state_dict()[name]), name


def test_a_new_model_is_one_that_was_reset():
    """Making a model and resetting it from one seed give the same."""
    torch.manual_seed(1)
    one = resnet()
    torch.manual_seed(2)
    other = resnet()
    torch.manual_seed(1)
    resnet()
    again = resnet()
    assert not torch.equal(one.stem.weight, other.stem.weight)
    assert not torch.equal(one.stem.weight, again.stem.weight)
    for model in (one, other):
        torch.manual_seed(4)
        model.reset_parameters()
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_optimiser_groups_hold_every_parameter_once():
    """Kernels decay, gains and biases do not, and nothing is left out."""
    model = resnet(wiring="hyper")
    groups = model.parameter_groups(0.1)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert all(p.dim() >= 2 for p in model.parameters() if id(p) in decayed)


# -- shortcuts ---------------------------------------------------------------------------------


def test_shortcut_a_has_no_parameters():
    """Option A takes every second pixel and pads with zeros."""
    x = torch.randn(2, 5, 6, 3)
    y = Subsample(3, 5, 2)(x)
    assert torch.equal(y[..., :3], x[:, ::2, ::2])
    assert not y[..., 3:].any()
    A, B, C = (resnet(shortcut=s).parameters_by_part()["shortcuts"] for s in "ABC")
    # B: 8 to 16, 16 to 32 channels and batch norms; C: also 3 of 8, 2 of 16 and 2 of 32 channels
    assert (A, B) == (0, 8 * 16 + 16 * 32 + 2 * 48)
    assert B + 3 * (64 + 16) + 2 * (256 + 32) + 2 * (1024 + 64) == C


# -- the deepest -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"depth": 1001, "wiring": "residual"}, {"depth": 1202}])
def test_a_thousand_layers(shape):
    """The deepest published networks run forward and backward, every gradient finite."""
    model = ResNet(ResNetConfig(**shape))
    F.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([1, 2])).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"depth": 21},
            "depth 21 is not 6n + 2 (basic) or 9n + 2 (bottleneck); the nearest: 20, 26",
        ),
        (
            {"depth": 21, "block": "bottleneck"},
            "depth 21 is not 9n + 2 (bottleneck); the nearest: 20, 29",
        ),
        ({"depth": 2}, "depth 2 is not 6n + 2 (basic) or 9n + 2 (bottleneck); the nearest: 8"),
        ({"depth": -4}, "depth -4 is not 6n + 2 (basic) or 9n + 2 (bottleneck); the nearest: 8"),
        (
            {"depth": 20, "stem": "imagenet"},
            "depth 20 with the imagenet stem is not one of 18, 34, 50, 101, 152",
        ),
        (
            {"depth": 50, "stem": "imagenet", "block": "basic"},
            "depth 50 with the imagenet stem has bottleneck blocks",
        ),
        (
            {"stem": "imagnet"},
            "unknown stem 'imagnet'; did you mean 'imagenet'? (known: cifar, imagenet)",
        ),
        ({"shortcut": "D"}, "unknown shortcut 'D' (known: A, B, C)"),
        (
            {"block": "bottle"},
            "unknown block 'bottle'; did you mean 'bottleneck'? (known: basic, bottleneck)",
        ),
        ({"stride_in": "2x2"}, "unknown stride_in '2x2' (known: 1x1, 3x3)"),
        (
            {"norm": "batch"},
            "unknown norm 'batch'; did you mean 'batchnorm'? "
            "(known: batchnorm, layernorm, rmsnorm, scalenorm, dyt, derf)",
        ),
        ({"width": -1}, "width -1 must be at least 1, or 0 for the usual one"),
        ({"classes": 0}, "classes 0 must be at least 1"),
        ({"channels": 0}, "channels 0 must be at least 1"),
        ({"drop_path": 1.0}, "drop_path 1.0 must be at least 0 and less than 1"),
        (
            {"wiring": "prenorm", "shortcut": "C"},
            "shortcut C puts a projection in place of the stream in every unit, which leaves "
            "nothing to prenorm; use it with postact or residual",
        ),
        (
            {"wiring": "plain(act=relu)", "zero_last": True},
            "zero_last needs a shortcut: every unit of a plain network would give 0",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_resnet_refuses(changes, message):
    """A configuration that does not fit is refused with the value and what would fit."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole text is compared
        ResNetConfig(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 8), (2, 8, 8, 1)])
def test_images_of_another_shape_are_refused(shape):
    """Images with other channels or axes are named with their shape."""
    with pytest.raises(ValueError, match=re.escape(f"images of shape {shape}, but the model read")):
        resnet()(torch.randn(shape))


def test_batch_norm_of_one_value_is_refused():
    """One image whose last stage is one pixel cannot train batch norm."""
    with pytest.raises(ValueError, match="batch norm has one value in each channel to train on"):
        resnet(depth=8)(torch.randn(1, 1, 4, 4))
