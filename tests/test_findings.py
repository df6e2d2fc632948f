"""The findings: each sick model gives its own and no other sick one, no healthy model gives any."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from test_discover_zoo import HF, load
from torch import nn

from addnorm import GPT, GPTConfig, ResNet, ResNetConfig, lint, twins, xray
from addnorm.contract import catalogue
from addnorm.probe import findings
from addnorm.probe.bands import Evidence
from addnorm.probe.discover import discover
from addnorm.probe.findings import FINDINGS, judge
from addnorm.probe.linted import ASKED
from addnorm.probe.structure import Coverage, Join, Structure
from addnorm.probe.trace import Connection

V, T, D = 20, 16, 32  # vocabulary, positions, width
LESSON = torch.randperm(V, generator=torch.Generator().manual_seed(9))  # each token's successor


def tokens(seed=1, rows=4):
    x = torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(seed))
    return x, LESSON[x]


def vectors(*shape):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(2)),)


def gpt(wiring="prenorm", depth=12, **settings):
    return GPT(
        GPTConfig(depth=depth, dim=D, heads=2, context=T, vocab_size=V, wiring=wiring, **settings)
    )


def trained(model, rate, steps):
    """Train with AdamW, without warm-up, on a lesson that a network learns quickly."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(steps):
        x, y = tokens(seed=100 + step, rows=8)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


class Net(nn.Module):
    """Blocks in a row, from a lift and to a head."""

    def __init__(self, blocks, head=None, lift=None):
        super().__init__()
        self.lift = lift or nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.head = head or nn.Identity()

    def forward(self, x):
        x = self.lift(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    """x + F(N(x)) as `joined` says, F two linear layers."""

    def __init__(self, act=nn.ReLU, joined=lambda x, f: x + f(x), zero=False, norm=True):
        super().__init__()
        self.norm = nn.LayerNorm(D) if norm else nn.Identity()
        self.inner = nn.Sequential(nn.Linear(D, 2 * D), act(), nn.Linear(2 * D, D))
        self.joined = joined
        if zero:
            nn.init.zeros_(self.inner[2].weight)
            nn.init.zeros_(self.inner[2].bias)

    def forward(self, x):
        return self.joined(x, lambda y: self.inner(self.norm(y)))


def head(norm=True):
    return nn.Sequential(nn.LayerNorm(D) if norm else nn.Identity(), nn.Linear(D, 10))


def blocks(count=12, **settings):
    return [Block(**settings) for _ in range(count)]


def plain(act):
    made = [nn.Sequential(nn.Linear(64, 64), act()) for _ in range(56)]
    return Net(made, nn.Linear(64, 10))


class UnitGain(nn.Module):
    """x + W x, W of unit gain, without a norm."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D, bias=False)
        nn.init.normal_(self.linear.weight, std=D**-0.5)

    def forward(self, x):
        return x + self.linear(x)


class Attends(nn.Module):
    """Attention(N(x)), without a skip."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.attention = nn.MultiheadAttention(D, 4, batch_first=True)

    def forward(self, x):
        x = self.norm(x)
        return self.attention(x, x, x, need_weights=False)[0]


def doubled():
    return Net([twins.DoubledLayer(D, 64, heads=2) for _ in range(6)])


def idle(by):
    model = gpt()
    for connection in list(model.stack)[16:]:
        connection.branch.out.weight.data.mul_(by)
    return model


def dead(model=None):
    """Turn all units of block 5 off."""
    model = model or Net(blocks(), head())
    model.blocks[5].inner[0].bias.data.fill_(-100.0)
    return model


def dead_and_zero():
    model = dead()
    model.blocks[5].inner[2].bias.data.zero_()
    return model


def cut(block, joined):
    made = blocks()
    made[block] = Block(joined=joined)
    return Net(made, head())


def dominated():
    model = Net(blocks(), head())
    model.blocks[5].inner[2].weight.data.mul_(200)
    return model


def poisoned():
    model = gpt()
    list(model.stack)[7].branch.out.weight.data[0, 0] = math.nan
    return model


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def torch_encoder(depth=12, **settings):
    layer = nn.TransformerEncoderLayer(D, 2, 64, batch_first=True, **settings)
    norm = nn.LayerNorm(D) if settings.get("norm_first") else None
    return nn.TransformerEncoder(layer, depth, norm=norm, enable_nested_tensor=False)


SEQUENCE, ROWS = vectors(4, T, D), vectors(32, 64)

# name -> how to make it, what it is called with, the one code that must be found.
SICK = {
    "plain sigmoid": (lambda: plain(nn.Sigmoid), ROWS, "vanishing-gradient"),
    "plain gelu": (lambda: plain(nn.GELU), ROWS, "vanishing-gradient"),
    "plain tanh": (lambda: plain(nn.Tanh), ROWS, "vanishing-gradient"),
    "un-normalised, 100 deep": (
        lambda: Net([UnitGain() for _ in range(100)], nn.Linear(D, 10)),
        vectors(32, D),
        "exploding-gradient",
    ),
    "doubled layers": (doubled, SEQUENCE, "broken-skip"),
    "one block without its skip": (
        lambda: cut(5, lambda x, f: f(x)),
        SEQUENCE,
        "broken-skip",
    ),
    "a skip that is detached": (
        lambda: cut(5, lambda x, f: x.detach() + f(x)),
        SEQUENCE,
        "broken-skip",
    ),
    "trained at a rate of 0.1": (lambda: trained(gpt(), 0.1, 20), tokens(), "stream-blow-up"),
    "trained at a rate of 1": (lambda: trained(gpt(), 1.0, 20), tokens(), "stream-blow-up"),
    "idle last third": (lambda: idle(1e-3), tokens(), "idle-depth"),
    "dead units": (dead, SEQUENCE, "dead-branch"),
    "dead units that add 0": (dead_and_zero, SEQUENCE, "dead-branch"),
    "a branch that is detached": (
        lambda: cut(5, lambda x, f: x + f(x).detach()),
        SEQUENCE,
        "dead-branch",
    ),
    "attention without skips": (
        lambda: Net([Attends() for _ in range(12)]),
        SEQUENCE,
        "rank-collapse",
    ),
    "post-norm, Xavier, 24 layers": (
        lambda: gpt("postnorm", 24, start="xavier"),
        tokens(),
        "rank-collapse",
    ),
    "one branch 200 times too large": (dominated, SEQUENCE, "dominated-skip"),
    "no final norm": (lambda: Net(blocks(), head(norm=False)), SEQUENCE, "no-final-norm"),
    "one NaN": (poisoned, tokens(), "non-finite"),
    "post-norm, 13 layers": (lambda: gpt("postnorm", 13), tokens(), "post-norm-needs-warmup"),
    "post-norm of torch, 24 layers": (
        lambda: torch_encoder(24),
        SEQUENCE,
        "post-norm-needs-warmup",
    ),
}


def resnet(wiring):
    return ResNet(ResNetConfig(depth=56, width=8, wiring=wiring))


def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3)), torch.arange(4)


# name -> how to make it, what it is called with, the codes that it comes near to.
HEALTHY = {
    "pre-norm, 48 layers": (lambda: gpt(depth=48), tokens(), {"vanishing-gradient"}),
    "pre-norm, wide start": (lambda: gpt(depth=24, start="xavier"), tokens(), {"rank-collapse"}),
    "pre-norm, trained": (lambda: trained(gpt(depth=24), 1e-3, 20), tokens(), {"idle-depth"}),
    "small pre-norm, shares up to 4": (
        lambda: trained(gpt(depth=4), 1e-2, 100),
        tokens(),
        {"dominated-skip", "stream-blow-up"},
    ),
    "ResNet-56 v1": (lambda: resnet("postact"), images(), {"exploding-gradient"}),
    "ResNet-56 v2": (lambda: resnet("residual"), images(), {"exploding-gradient"}),
    "nn.TransformerEncoder, norm first": (
        lambda: torch_encoder(24, norm_first=True),
        SEQUENCE,
        {"no-final-norm", "broken-skip"},
    ),
    "nn.TransformerEncoder, 6 layers": (
        lambda: torch_encoder(6),
        SEQUENCE,
        {"post-norm-needs-warmup"},
    ),
    "branches that start at 0": (
        lambda: Net(blocks(zero=True), head()),
        SEQUENCE,
        {"dead-branch", "idle-depth"},
    ),
    "factors that start at 0": (lambda: gpt("rezero"), tokens(), {"dead-branch"}),
    "a branch that is dropped": (
        lambda: gpt("droppath(rate=0.9)", start="normal").train(),
        tokens(rows=1),
        {"dead-branch"},
    ),
    "a small embedding": (
        lambda: Net(blocks(), head(), lift=Scale(1e-2)),
        SEQUENCE,
        {"dominated-skip"},
    ),
    "a stream without a head": (lambda: Net(blocks()), SEQUENCE, {"no-final-norm"}),
    "values near the end of float32": (
        lambda: Net(blocks(4), head(), lift=Scale(1e15)),
        SEQUENCE,
        {"non-finite"},
    ),
}


def looked_at(make, inputs):
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(1)
    return xray(model, *inputs)


def sick(trace):
    return {f.code for f in trace.findings if f.severity == "sick"}


def codes(trace):
    return {f.code for f in trace.findings}


@pytest.fixture(scope="module")
def sick_traces():
    return {}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_model_gives_its_finding_and_no_other_sick_one(name, sick_traces):
    make, inputs, code = SICK[name]
    trace = sick_traces[name] = looked_at(make, inputs)
    warned = FINDINGS[code].severity != "sick"
    assert code in codes(trace)
    assert sick(trace) == (set() if warned else {code})
    assert trace.ok == warned
    for finding in trace.findings:  # each in words, in both languages
        assert all((finding.where, finding.value, finding.expected, finding.source))
        assert finding.why.endswith(".")
        assert finding.remedy.endswith(".")
        for text in (finding.why_zh, finding.remedy_zh):
            assert re.search(r"[\u4e00-\u9fff]", text)
            assert text.endswith("。")


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_model_gives_nothing_sick(name):
    make, inputs, _ = HEALTHY[name]
    trace = looked_at(make, inputs)
    assert sick(trace) == set()
    assert trace.ok


def test_registered_means_tested():
    """Every code has a sick model that gives it, and a healthy one that comes near to it."""
    assert {code for _, _, code in SICK.values()} == set(FINDINGS)
    assert set().union(*(near for _, _, near in HEALTHY.values())) == set(FINDINGS)
    for code, entry in FINDINGS.items():
        assert entry.severity in findings.SEVERITIES
        assert re.search(r"arXiv:\d{4}\.\d{5}|IEEE", entry.source), code


@pytest.mark.parametrize("name", list(catalogue()))
def test_a_wiring_gives_exactly_what_its_class_expects(name):
    """24 layers at the start, whatever the severity."""
    assert codes(looked_at(lambda: gpt(name, 24), tokens())) == catalogue()[name].expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "t5 encoder"])
def test_transformers_with_random_weights_are_not_sick(name):
    make, inputs, _ = HF[name]
    torch.manual_seed(0)
    trace = xray(make(), inputs())
    assert sick(trace) == set()
    assert not [note for note in trace.coverage.notes if "was not linted" in note]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet50", {}),
        ("resnetv2_50", {}),
        ("vit_small_patch16_224", {"img_size": 32}),
        ("convnext_tiny", {}),
        ("mixer_b16_224", {"img_size": 32}),
    ],
)
def test_timm_with_random_weights_is_not_sick(name, options):
    torch.manual_seed(0)
    model = load("timm").create_model(name, **options)
    side = options.get("img_size", 64)
    assert sick(xray(model, torch.randn(2, 3, side, side))) == set()
