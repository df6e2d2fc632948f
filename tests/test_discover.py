"""Discovery: what is a connection and what is not, one row each; names, places and coverage."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from addnorm import GPT, GPTConfig, Stack
from addnorm.contract import catalogue
from addnorm.models.resnet import ResNet, ResNetConfig
from addnorm.probe.discover import discover

D = 8


class Block(nn.Module):
    """Modules to write a step with."""

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(D, D), nn.ReLU(inplace=True), nn.Linear(D, D))
        self.g, self.h, self.k = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.low, self.high = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)
        self.ln, self.scale = nn.LayerNorm(D), nn.Parameter(torch.rand(D))


class Net(nn.Module):
    """Three blocks whose step is a function `(x, block, net) -> x` in the model itself."""

    def __init__(self, step):
        super().__init__()
        torch.manual_seed(0)
        self.step = step
        self.lift, self.place = nn.Linear(5, D), nn.Parameter(torch.randn(4, D))
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.first = None
        self.head = nn.Linear(D, 3)

    def forward(self, x):
        x = self.lift(x) + self.place
        self.start, self.first = x, None
        for block in self.blocks:
            x = self.step(x, block, self)
        return self.head(x)


def in_place(x, b, net):
    out = b.f(x)
    out += x
    return torch.relu_(out)


def gelu(x, b, net):
    h = b.g(x)
    h = 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.044715 * h**3)))
    x = x + b.h(h)
    return x * torch.sigmoid(1.7 * (x + 0.04 * x**3))  # and on the stream itself


def rotary(x, b, net):
    def turn(q):
        one, two = q.chunk(2, -1)
        return q * 0.6 + torch.cat([-two, one], -1) * 0.8

    scores = turn(b.g(x)) @ turn(b.h(x)).mT
    scores = scores + torch.zeros(4, 4) + b.g(x) @ b.k(x).mT  # a mask, and a sum of scores
    return x + scores.softmax(-1) @ b.k(x)


def value_residual(x, b, net):
    value = b.k(x)
    net.first = value if net.first is None else net.first
    return x + b.h(torch.tanh(0.5 * value + 0.5 * net.first))


def adapters(x, b, net):
    return x + F.gelu(b.f(x) + b.high(b.low(x)))  # LoRA


def experts(x, b, net):
    gate = torch.softmax(b.low(x), -1)
    routed = gate[..., :1] * b.g(x) + gate[..., 1:] * b.h(x)
    return x + (routed + b.f(x))


def indexed(x, b, net):
    out = torch.zeros_like(x)
    chosen = torch.tensor([0, 1])
    out.index_add_(1, chosen, b.f(x[:, chosen]))
    return x + out


def gated(x, b, net):
    gate = torch.sigmoid(b.g(x))
    return gate * b.f(x) + (1 - gate) * x


def through_a_view(x, b, net):
    out = b.f(x)
    out.view(len(x), -1).add_(
        x.reshape(len(x), -1)
    )  # the sum is made through another view of `out`
    return out


F_ = [f"blocks.{i}.f" for i in range(3)]
G_ = [f"blocks.{i}.g" for i in range(3)]
H_ = [f"blocks.{i}.h" for i in range(3)]

# step -> names of the connections; * marks a projected shortcut
STEPS = {
    "x + f": (lambda x, b, net: x + b.f(x), F_),
    "f + x": (lambda x, b, net: b.f(x) + x, F_),
    "pre-norm": (lambda x, b, net: x + b.f(b.ln(x)), F_),
    "post-norm": (lambda x, b, net: b.ln(x + b.f(x)), F_),
    "learned scale": (lambda x, b, net: x * b.scale + b.scale * b.f(x), F_),
    "in place": (in_place, F_),
    "through a view": (through_a_view, F_),
    "sub": (lambda x, b, net: x - b.f(x), F_),
    "lerp": (lambda x, b, net: torch.lerp(x, b.f(x), 0.3), F_),
    "addcmul": (lambda x, b, net: torch.addcmul(x, b.scale, b.f(x)), F_),
    "addcdiv": (lambda x, b, net: torch.addcdiv(x, b.f(x), torch.full((D,), 2.0)), F_),
    "baddbmm": (lambda x, b, net: torch.baddbmm(x, b.f(x), torch.eye(D).expand(len(x), D, D)), F_),
    "stack": (lambda x, b, net: torch.stack([x, b.f(x)]).sum(0), F_),
    "stack, mean": (lambda x, b, net: torch.stack([x, b.f(x)], -1).mean(dim=-1), F_),
    "sum of a list": (lambda x, b, net: sum([x, b.f(x)]), F_),
    "dropout": (lambda x, b, net: F.dropout(x, 0.1) + F.dropout(b.f(x), 0.1), F_),
    "cast": (lambda x, b, net: (x.double() + b.f(x).double()).float(), F_),
    "gate": (gated, F_),
    "projected": (lambda x, b, net: b.g(x) + b.f(x), [f"{name}*" for name in F_]),
    "parallel": (lambda x, b, net: x + (b.f(x) + b.g(x)), None),
    "two": (
        lambda x, b, net: (lambda y: y + b.g(y))(x + b.f(x)),
        [name for pair in zip(F_, G_, strict=True) for name in pair],
    ),
    "GELU": (gelu, None),
    "rotary": (rotary, None),
    "value residual": (value_residual, None),
    "LoRA": (adapters, None),
    "experts": (experts, None),
    "index_add": (indexed, F_),
    "checkpoint": (lambda x, b, net: checkpoint(lambda y: y + b.f(y), x, use_reentrant=False), F_),
    "reentrant": (lambda x, b, net: checkpoint(lambda y: y + b.f(y), x, use_reentrant=True), F_),
}

NO_SKIP = {
    "no skip": lambda x, b, net: b.f(x),
    "twice the branch": lambda x, b, net: (lambda y: y + y)(b.f(x)),
    "product": lambda x, b, net: x * b.f(x),
    "concatenated": lambda x, b, net: b.g(torch.cat([x, b.f(x)], -1)[..., :D]),
}


@pytest.mark.parametrize("name", NO_SKIP)
def test_what_is_none(name):
    with pytest.raises(ValueError, match="Net has no residual addition and no repeated block"):
        discover(Net(NO_SKIP[name]), torch.randn(2, 4, 5))


@pytest.mark.parametrize("name", STEPS)
def test_what_is_a_connection(name):
    """One row, three connections; None: three whatever their names."""
    step, wanted = STEPS[name]
    model, x = Net(step), torch.randn(2, 4, 5)
    structure = discover(model, x)
    adds = [j for j in structure.joins if j.kind == "add"]
    names = [j.name + "*" * j.projected for j in adds]
    assert len(names) == 3 if wanted is None else names == wanted, str(structure.coverage)
    coverage = structure.coverage
    assert coverage.additions == len(adds) + sum(coverage.ignored.values())
    assert not coverage.fallbacks


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_parameters_change_nothing_in_what_is_found(frozen):
    model = Net(STEPS["GELU"][0]).requires_grad_(not frozen)
    assert len(discover(model, torch.randn(2, 4, 5))) == 3


def test_a_long_skip_holds_the_connections_inside():
    class Long(Net):
        def forward(self, x):
            start = x = self.lift(x)
            for block in self.blocks:
                x = x + block.f(x)
            return self.head(start + self.blocks[0].g(x))

    joins = discover(Long(None), torch.randn(2, 4, 5)).joins
    assert [j.name for j in joins] == [*F_, "blocks.0.g"]
    assert [j.inside for j in joins] == [3, 3, 3, None]
    assert [j.root for j in joins] == [True, False, False, True]


@pytest.mark.parametrize(
    ("norm_first", "before", "after"), [(True, True, False), (False, False, True)]
)
def test_torch_encoder_layers_in_both_orders(norm_first, before, after):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    for training in (True, False):
        structure = discover(model.train(training), torch.randn(2, 5, 8))
        assert list(structure.names) == [
            f"layers.{i}.{part}" for i in range(3) for part in ("self_attn", "linear2")
        ]
        assert [j.block for j in structure.joins] == [f"layers.{i // 2}" for i in range(6)]
        assert all(j.norm_before is before for j in structure.joins)
        assert all(j.norm_after is after for j in structure.joins)
        assert not structure.coverage.fallbacks


def test_a_decoder_adds_three_times_a_layer():
    layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerDecoder(layer, 2)
    structure = discover(model, (torch.randn(2, 5, 8), torch.randn(2, 4, 8)))
    assert len(structure) == 6


class ConvBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.down, self.stride, self.grow = None, stride, outputs - inputs
        if stride > 1 and outputs % 16:
            self.down = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        identity = x
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.down is not None:
            identity = self.down(x)
        elif self.stride > 1:  # option A of He et al. 2015: no parameters
            identity = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.grow))
        out += identity
        return F.relu(out, inplace=True)


def test_a_resnet_with_post_activation_and_both_kinds_of_shortcut():
    torch.manual_seed(0)
    layers = [(4, 4, 1), (4, 8, 2), (8, 8, 1), (8, 16, 2)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *(ConvBlock(*layer) for layer in layers))
    joins = discover(model, torch.randn(2, 3, 18, 18)).joins
    assert [j.name for j in joins] == ["1", "2", "3", "4"]
    assert [j.projected for j in joins] == [False, True, False, False]
    assert all(j.features == 1 for j in joins)


@pytest.mark.parametrize("wiring", catalogue())
def test_every_wiring_of_ours_gives_its_connections(wiring):
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth=3, wiring=wiring, vocab_size=7, dim=16, heads=2, context=8))
    structure = discover(model, torch.randint(7, (2, 8)))
    assert structure.names == tuple(f"stack.connections.{i}" for i in range(6))
    assert {j.kind for j in structure.joins} == {"wiring"}
    assert not structure.coverage.fallbacks
    assert structure.wiring == wiring


def test_several_stacks_of_ours():
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(depth=20))
    structure = discover(model, torch.randn(2, 3, 32, 32))
    count = sum(len(m) for m in model.modules() if isinstance(m, Stack))
    assert sum(j.kind == "wiring" for j in structure.joins) == count
    assert not structure.coverage.fallbacks


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_scripted_code_runs_out_of_sight_and_is_said_so():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(D, D), nn.Tanh()))

    class Mixed(Net):
        def __init__(self):
            super().__init__(None)
            self.scripted = scripted

        def forward(self, x):
            x = self.lift(x)
            return x + self.scripted(x)

    structure = discover(Mixed(), torch.randn(2, 4, 5))
    assert len(structure) == 1
    assert sum(structure.coverage.opaque.values()) == 1


def test_a_block_whose_addition_cannot_be_seen_is_taken_whole():
    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, f):
            return torch.from_numpy(x.detach().numpy() + f.detach().numpy())

        @staticmethod
        def backward(ctx, gradient):
            return gradient, gradient

    class Block(nn.Module):
        def __init__(self, fused):
            super().__init__()
            self.f, self.fused = nn.Linear(D, D), fused

        def forward(self, x):
            return Fused.apply(x, self.f(x)) if self.fused else x + self.f(x)

    model = nn.Sequential(*(Block(i == 1) for i in range(3)))
    structure = discover(model, torch.randn(2, D))
    assert [(j.name, j.kind) for j in structure.joins] == [
        ("0.f", "add"),
        ("1", "block"),
        ("2.f", "add"),
    ]
    assert list(structure.coverage.fallbacks) == ["1"]
    assert "1 blocks taken whole (no residual addition was seen in it)" in str(structure.coverage)


def test_blocks_are_taken_whole_when_named():
    structure = discover(Net(STEPS["x + f"][0]), torch.randn(2, 4, 5), "blocks.*.f")
    assert [(j.name, j.kind) for j in structure.joins] == [(name, "block") for name in F_]
    with pytest.raises(ValueError, match=r"no module named 'blocks\.\*' was called"):
        discover(Net(STEPS["x + f"][0]), torch.randn(2, 4, 5), "blocks.*")
    with pytest.raises(ValueError, match=r"is named 'layers\.\*'; the repeated block here is"):
        discover(Net(STEPS["x + f"][0]), torch.randn(2, 4, 5), "layers.*")


def test_a_model_without_connections_is_answered():
    with pytest.raises(ValueError, match="Linear has no residual addition and no repeated block"):
        discover(nn.Linear(2, 2), torch.randn(1, 2))


def test_losses_inside_the_model_are_no_connections():
    class Losing(Net):
        def forward(self, x):
            logits = super().forward(x)
            return {"loss": logits.square().mean() + 0.1 * logits.abs().mean(), "logits": logits}

    assert len(discover(Losing(STEPS["x + f"][0]), {"x": torch.randn(2, 4, 5)})) == 3


def test_the_structure_is_plain_data():
    structure = discover(Net(STEPS["x + f"][0]), torch.randn(2, 4, 5))
    facts = structure.to_dict()
    assert facts["joins"][0]["place"]["function"] == "add"
    assert "3 connections among 3 additions" in str(structure.coverage)
    assert math.prod(len(j.name) for j in structure.joins)
