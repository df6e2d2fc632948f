"""The linter for blocks: every sick block gives its finding, and no healthy one a sick one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addnorm import Attention, Context, FeedForward, Stack, Wiring, register, twins
from addnorm.contract import catalogue
from addnorm.models.residual_layer import LayerNorm, ResidualBlock, ResidualLayer
from addnorm.probe.lint import lint

TOKENS = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(2))


def codes(block, example, severity="sick", **settings):
    return [f.code for f in lint(block, example, **settings) if f.severity == severity]


class Block(nn.Module):
    """Two matrices, a norm, dropout, and a forward given as a function of them."""

    def __init__(self, forward, dropout=0.1, bias=True):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.inner, self.outer = nn.Linear(16, 32, bias=bias), nn.Linear(32, 16, bias=bias)
        self.gamma = nn.Parameter(torch.ones(16))
        self.drop = nn.Dropout(dropout)
        self.act = nn.ReLU()
        self.how = forward

    def branch(self, x):
        return self.outer(self.act(self.inner(x)))

    def forward(self, x):
        return self.how(self, x)


def overwritten(b, x):
    x = b.branch(b.norm(x))
    return x + x


def added_in_place(b, x):
    x += b.branch(b.norm(x))
    return x


def overwritten_after_use(b, x):
    h = b.inner(x).relu()
    h2 = b.outer(h)
    h.zero_()  # what the backward pass needs
    return x + h2


SICK = {
    "skip overwritten": (overwritten, {"broken-skip"}),
    "no skip": (lambda b, x: b.branch(b.norm(x)), {"broken-skip"}),
    "skip of a constant": (lambda b, x: torch.ones_like(x) + b.branch(x), {"broken-skip"}),
    "dropout after the addition": (
        lambda b, x: b.drop(x + b.branch(b.norm(x))),
        {"stream-dropout"},
    ),
    "dropout on the skip": (lambda b, x: b.drop(x) + b.branch(b.norm(x)), {"stream-dropout"}),
    "functional dropout": (
        lambda b, x: F.dropout(x, 0.2, b.training) + b.branch(x),
        {"stream-dropout"},
    ),
    "addition in place": (added_in_place, {"mutated-input", "unstackable"}),
    "relu in place on the input": (
        lambda b, x: x + b.branch(F.relu(x, inplace=True)),
        {"mutated-input", "unstackable"},
    ),
    "needed tensor overwritten": (overwritten_after_use, {"unstackable"}),
    "cut off": (lambda b, x: (x + b.branch(x)).detach(), {"unstackable"}),
    "mean over the batch": (lambda b, x: x + b.branch(x - x.mean(0)), {"mixed-batch"}),
    "cumulated over the batch": (lambda b, x: x + b.branch(x.flip(0)), {"mixed-batch"}),
    "unknown argument": (lambda b, x: x + b.norm(x, mask=None), {"raises"}),
    "wrong width": (lambda b, x: x + b.outer(x), {"raises"}),
    "no tensor": (lambda b, x: None, {"raises"}),
}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_block_gives_its_findings_and_no_other_sick_one(name):
    forward, expected = SICK[name]
    assert set(codes(Block(forward), TOKENS)) == expected


HEALTHY = {
    "pre-norm": (lambda b, x: x + b.drop(b.branch(b.norm(x))), None),
    "residual": (lambda b, x: x + b.branch(x), None),
    "layer scale": (lambda b, x: x + b.gamma * b.branch(b.norm(x)), None),
    "norm on the branch's output": (lambda b, x: x + b.norm(b.branch(x)), None),
    "subtracted": (lambda b, x: x - b.branch(x), None),
    "post-norm": (lambda b, x: b.norm(x + b.drop(b.branch(x))), "N(x), a layer norm"),
    "post-activation": (lambda b, x: F.relu(x + b.branch(x)), "relu(x)"),
    "gelu": (lambda b, x: F.gelu(x + b.branch(x)), "gelu(x)"),
    "norm and activation": (lambda b, x: F.relu(b.norm(x + b.branch(x))), "relu(N(x)"),
    "alpha": (lambda b, x: 0.5 * x + b.branch(x), "c x: the input times 0.5"),
    "alpha and norm": (lambda b, x: b.norm(3 * x + b.branch(x)), "N(x), a layer norm"),
    "half of it": (lambda b, x: F.relu(0.5 * x + b.branch(x)), "relu(c x)"),
    "channels": (lambda b, x: x * b.gamma.cumsum(0) + b.branch(x), "a * x + b"),
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_block_gives_a_note_at_most(name, trained):
    """The note says what stands on the stream; gains and biases away from their start too."""
    forward, form = HEALTHY[name]
    block = Block(forward)
    if trained:
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    found = lint(block, TOKENS)
    if form is None:
        assert found == []
        return
    (finding,) = found
    assert (finding.code, finding.severity) == ("changed-skip", "note")
    if not (trained and name == "channels"):
        assert form in finding.value


def test_an_unknown_thing_on_the_stream_is_a_warning():
    found = lint(Block(lambda b, x: x * torch.sigmoid(x) ** 2 + b.branch(x)), TOKENS)
    assert [(f.code, f.severity) for f in found] == [("changed-skip", "warning")]
    assert "something of x" in found[0].value


def test_two_parts_in_a_block():
    """Post-norm twice is a norm; a skip that one of two parts loses is lost."""

    class Layer(nn.Module):
        def __init__(self, keep):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
            self.keep = keep

        def forward(self, x):
            x = self.first(x + self.attention(x, x, x)[0])
            update = self.down(self.up(x).relu())
            return self.second(x + update if self.keep else update)

    (note,) = lint(Layer(True), TOKENS)
    assert note.code == "changed-skip"
    assert "N(x), a layer norm" in note.value
    assert codes(Layer(False), TOKENS) == ["broken-skip"]


# -- the printed blocks and their corrected forms

TWINS = [
    ("inplace", (8, 8), {}, IMAGES, {"mutated-input", "unstackable"}),
    ("inplace", (8, 12), {}, IMAGES, {"mutated-input", "unstackable"}),
    ("doubled", (16, 32), {"heads": 2}, TOKENS, {"broken-skip"}),
    ("stream-dropout", (16,), {}, TOKENS, {"stream-dropout"}),
    ("batch-mixer", (16, 2), {}, TOKENS, {"mixed-batch"}),
    ("mask-keyword", (16, 2), {}, TOKENS, {"raises"}),
    ("unbiased", (1,), {}, torch.randn(4, 5, 1), {"unbiased-norm"}),
]


@pytest.mark.parametrize(
    ("name", "args", "options", "example", "expected"), TWINS, ids=[t[0] for t in TWINS]
)
def test_printed_blocks_fail_and_corrected_ones_pass(name, args, options, example, expected):
    twin = twins.TWINS[name]
    assert set(codes(twin.sick(*args, **options), example)) == expected
    healthy = lint(twin.healthy(*args, **options), example)
    assert {f.severity for f in healthy} <= {"note"}


def test_one_skip_over_all_is_named():
    (note,) = lint(twins.OneSkip(16, 2), TOKENS)
    assert "relu(x)" in note.value
    assert lint(twins.TwoSkips(16, 2), TOKENS) == []


def annotated(width):
    """The norm of a well-known tutorial: unbiased, and eps beside the deviation."""

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.a_2, self.b_2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

        def forward(self, x):
            return self.a_2 * (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-6) + self.b_2

    return Norm()


@pytest.mark.parametrize("width", [2, 8, 64, 512, 1024])
@pytest.mark.parametrize("make", [twins.UnbiasedLayerNorm, annotated])
def test_unbiased_variance_is_seen_at_any_width(make, width):
    norm = make(width)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.5 * torch.rand(width))  # gains of its own
    block = nn.Sequential(nn.Linear(width, width), norm)
    (finding,) = [f for f in lint(block, torch.randn(4, 3, width)) if f.code == "unbiased-norm"]
    assert finding.severity == "warning"
    assert finding.where == "1"
    value = float(finding.value.split()[0])
    assert value == pytest.approx(((width - 1) / width) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("width", [1, 2, 64, 1024])
@pytest.mark.parametrize(
    "make",
    [LayerNorm, nn.LayerNorm, nn.RMSNorm, lambda w: nn.LayerNorm(w, eps=1e-3), nn.BatchNorm1d],
)
def test_correct_norms_are_not_taken_for_unbiased(make, width):
    norm = make(width)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.5 * torch.rand(width))
    assert (
        lint(norm, torch.randn(6, width) if make is nn.BatchNorm1d else torch.randn(4, 3, width))
        == []
    )


# -- other people's blocks


class Basic(nn.Module):
    """conv-BN-ReLU-conv-BN, a shortcut, in-place ReLU on its own tensors, as libraries have it."""

    def __init__(self, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(8, planes, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or planes != 8:
            self.downsample = nn.Sequential(
                nn.Conv2d(8, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("planes", "stride", "form"), [(8, 1, "relu(x)"), (12, 1, "S(x)"), (8, 2, "S(x)")]
)
def test_basic_blocks(planes, stride, form, trained):
    block = Basic(planes, stride)
    if trained:
        with torch.no_grad():
            for tensor in block.state_dict().values():
                tensor.add_(torch.rand(tensor.shape).to(tensor))
    (note,) = lint(block, IMAGES)
    assert (note.code, note.severity) == ("changed-skip", "note")
    assert form in note.value


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_encoder_layer_of_torch(norm_first):
    def layer(**options):
        return nn.TransformerEncoderLayer(16, 2, 32, norm_first=norm_first, **options)

    expected = [] if norm_first else ["changed-skip"]
    assert codes(layer(batch_first=True), TOKENS, "note") == expected
    assert codes(layer(batch_first=True), TOKENS) == []
    assert codes(layer(), TOKENS) == ["mixed-batch"]  # (B, T, D) into (T, B, D)
    assert codes(layer(), TOKENS, batch_dim=1) == []


def test_blocks_of_timm():
    from timm.layers import BatchNormAct2d
    from timm.models.convnext import ConvNeXtBlock
    from timm.models.mlp_mixer import MixerBlock
    from timm.models.resnet import BasicBlock, Bottleneck
    from timm.models.resnetv2 import PreActBottleneck
    from timm.models.vision_transformer import Block as VisionBlock

    assert lint(VisionBlock(16, 2), TOKENS) == []
    assert lint(VisionBlock(16, 2, init_values=1e-5, drop_path=0.1), TOKENS) == []
    assert lint(ConvNeXtBlock(8), IMAGES) == []
    assert lint(MixerBlock(16, 5), TOKENS) == []
    assert codes(BasicBlock(8, 8), IMAGES, "note") == ["changed-skip"]
    assert codes(Bottleneck(8, 2), IMAGES, "note") == ["changed-skip"]
    assert codes(PreActBottleneck(8, 8, norm_layer=BatchNormAct2d), IMAGES) == []


# -- our wirings

BY_DESIGN = {"plain": ["broken-skip"], "dropout-shortcut": ["changed-skip", "stream-dropout"]}


@pytest.mark.parametrize("name", catalogue())
def test_a_stack_of_every_wiring_gives_notes_at_most(name):
    for branch in (FeedForward(16), Attention(16, 2)):
        stack = Stack([branch], name, dim=16)
        found = lint(stack, TOKENS)
        assert {f.severity for f in found} <= {"note"}
        if name in BY_DESIGN:
            assert sorted(f.code for f in found) == BY_DESIGN[name]
        else:
            assert {f.code for f in found} <= {"changed-skip"}


def test_wirings_that_leave_the_stream_alone_say_nothing():
    for name in ("residual", "prenorm", "sandwich", "rezero", "layerscale", "stable", "droppath"):
        assert lint(Stack([FeedForward(16)], name, dim=16), TOKENS) == []


def test_a_wiring_that_loses_the_skip_it_draws_is_sick():
    @register
    class Lost(Wiring):
        """x <- F(x), drawn as if it had a skip."""

        name, equation, paper, year, at_start = "lost", "x <- x + F(x)", "none", 2026, "x"
        stream_law = gradient_law = "constant"

        def forward(self, stream, context):
            return 2 * self.branch(stream, context)

    assert codes(Stack([FeedForward(16)], "lost", dim=16), TOKENS) == ["broken-skip"]


def test_a_silent_start_does_not_hide_what_mixes():
    class Silent(twins.BatchMixer):
        def __init__(self):
            super().__init__(16, 2)
            nn.init.zeros_(self.attention.out_proj.weight)

    assert codes(Silent(), TOKENS) == ["mixed-batch"]


# -- arguments, purity


class Keywords(nn.Module):
    """Keyword arguments and a tuple out."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, *, mask: Tensor | None = None, hidden: Tensor) -> tuple[Tensor, None]:
        return hidden + self.attention(hidden, hidden, hidden, attn_mask=mask)[0], None


def test_examples_of_every_kind():
    mask = torch.ones(5, 5).triu(1).bool()
    assert lint(Keywords(), {"mask": mask, "hidden": TOKENS}) == []
    block = Stack([FeedForward(16)], "prenorm", dim=16)
    assert lint(block, (TOKENS, Context())) == []
    wiring = next(iter(block))
    assert lint(wiring, (TOKENS, Context())) == []


@pytest.mark.parametrize("name", ["pre-norm", "post-norm"])
def test_nothing_changes(name):
    block = nn.Sequential(Block(HEALTHY[name][0]), nn.BatchNorm1d(5), nn.ReLU(inplace=True))
    block[1].eval()
    block[0].inner.weight.grad = torch.ones(32, 16)
    block[0].outer.weight.requires_grad_(False)
    before, example = copy.deepcopy(block.state_dict()), TOKENS.clone()
    modes, rng = [m.training for m in block.modules()], torch.get_rng_state()
    lint(block, example)
    assert all(torch.equal(before[n], t) for n, t in block.state_dict().items())
    assert torch.equal(example, TOKENS)
    assert [m.training for m in block.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(block[0].inner.weight.grad, torch.ones(32, 16))
    assert block[0].outer.weight.grad is None
    assert not block[0].outer.weight.requires_grad
    assert all(not m._forward_hooks for m in block.modules())


def test_sick_blocks_leave_the_example_alone():
    example = TOKENS.clone()
    lint(Block(added_in_place), example)
    assert torch.equal(example, TOKENS)


def test_the_same_findings_twice_and_the_worst_first():
    block = Block(lambda b, x: b.drop(F.relu(x + b.branch(x))))
    one, two = lint(block, TOKENS), lint(block, TOKENS)
    assert one == two
    assert [f.severity for f in one] == ["sick", "note"]
    assert all(f.where == "Block" and f.remedy and f.why and f.source for f in one)


def test_what_cannot_be_linted_is_refused():
    with pytest.raises(ValueError, match="the example must hold a floating-point tensor"):
        lint(nn.Linear(3, 3), torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match=r"batch_dim 2 must be an axis of \(2, 3\)"):
        lint(nn.Linear(3, 3), torch.zeros(2, 3), batch_dim=2)
    model = nn.Linear(3, 3)
    model.extra = model.weight * 2
    with pytest.raises(ValueError, match="Linear cannot be copied"):
        lint(model, torch.zeros(2, 3))


def test_corrected_blocks_that_change_the_width():
    assert codes(ResidualBlock(8, 12), IMAGES) == []
    assert codes(ResidualBlock(8, 8, stride=2), IMAGES) == []
    assert lint(ResidualLayer(16, 32, heads=2), TOKENS) == []
