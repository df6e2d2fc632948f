"""The findings: each sick model gives its own and no other sick one, no healthy model gives any."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from test_discover_zoo import HF, load
from torch import nn

from addnorm import GPT, GPTConfig, ResNet, ResNetConfig, Stack, lint, twins, xray
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


class Dropped(Block):
    """x + F(N(x)) in half of the steps, for the whole batch."""

    def forward(self, x):
        kept = float(torch.rand(()) < 0.5) if self.training else 1.0
        return x + kept * self.inner(self.norm(x))


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
    "layerscale without its final norm": (
        lambda: Net([Stack([nn.Linear(D, D) for _ in range(4)], "layerscale", dim=D)], head(False)),
        SEQUENCE,
        "no-final-norm",
    ),
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
    "branches that are dropped": (
        lambda: Net([Dropped() for _ in range(12)], head()),
        SEQUENCE,
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


# -- the linter inside the X-ray ---------------------------------------------------------------


class UnbiasedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = twins.UnbiasedLayerNorm(D)
        self.inner = nn.Linear(D, D)

    def forward(self, x, cache=None, *, mask=None):
        return x + self.inner(self.norm(x))


class Called(Net):
    """Calls its blocks with what `more` gives besides the stream."""

    def __init__(self, blocks, **more):
        super().__init__(blocks, head())
        self.more = more

    def forward(self, x):
        for block in self.blocks:
            x = block(x, **self.more)
        return self.head(x)


def test_the_first_repeated_block_is_linted():
    """The skip fades by dropout, which no vital shows; a norm divides by D - 1."""
    torch.manual_seed(0)
    dropped = xray(Net([twins.StreamDropout(D) for _ in range(4)], head()), *SEQUENCE)
    assert [(f.code, f.where) for f in dropped.findings] == [("stream-dropout", "blocks.0")]
    assert not dropped.ok
    unbiased = xray(Net([UnbiasedBlock() for _ in range(4)], head()), *SEQUENCE)
    assert [(f.code, f.where) for f in unbiased.findings] == [("unbiased-norm", "blocks.0.norm")]
    assert unbiased.ok  # a warning
    healthy = xray(Net([twins.BranchDropout(D) for _ in range(4)], head()), *SEQUENCE)
    assert not healthy.findings


@pytest.mark.parametrize("cache", [None, object()])
def test_a_block_is_linted_with_the_arguments_it_is_called_with(cache):
    """What may be None, such as a cache, is left out."""
    model = Called([UnbiasedBlock() for _ in range(3)], mask=torch.ones(3), cache=cache)
    trace = xray(model, *SEQUENCE)
    assert codes(trace) == {"unbiased-norm"}
    assert not trace.coverage.notes


class Needs(UnbiasedBlock):
    def forward(self, x, cache):
        assert cache is not None
        return super().forward(x)


def test_what_could_not_be_linted_is_said():
    trace = xray(Called([Needs() for _ in range(3)], cache=object()), *SEQUENCE)
    assert not trace.findings
    (note,) = trace.coverage.notes
    assert note == (
        "blocks.0 was not linted: it is called with objects that hold more than tensors"
    )
    assert str(trace.coverage).endswith(note)


def test_lint_takes_a_choice_of_rules():
    block = twins.StreamDropout(D)
    assert [f.code for f in lint(block, *SEQUENCE, rules=ASKED)] == ["stream-dropout"]
    assert not lint(block, *SEQUENCE, rules=["mixed-batch"])
    with pytest.raises(
        ValueError, match=r"unknown rule 'mixed-bach'; did you mean 'mixed-batch'\?"
    ):
        lint(block, *SEQUENCE, rules=["mixed-bach"])


# -- bands, on numbers written by hand ---------------------------------------------------------


def evidence(rows, *, dead=None, entered=False, loss=1.0, **facts):
    """`rows`: stream before, after, share, gradient, similarity; `facts` of the joins."""
    facts = {"norm_before": True} | facts
    made = [
        Connection(
            name=f"c{k}",
            stream_before=before,
            stream_after=after,
            branch_share=share,
            gradient_before=gradient,
            gradient_after=gradient,
            token_similarity=alike,
            non_finite=0,
            identity_gain=1.0,
            gain_backward=1.0,
        )
        for k, (before, after, share, gradient, alike) in enumerate(rows)
    ]
    joins = [
        Join(
            name=c.name,
            block=c.name,
            kind="add",
            module=c.name,
            call=0,
            shape=(4, T, D),
            root=k == 0,
            **facts,
        )
        for k, c in enumerate(made)
    ]
    structure = Structure(tuple(joins), Coverage(len(joins), len(joins), {}, {}, {}), "")
    return Evidence(tuple(made), structure, (None,) * len(joins), loss, entered, dead or {})


def level(count=12, share=0.5, gradient=1.0):
    return [(1.0, 1.0, share, gradient, 0.1) for _ in range(count)]


def given(e):
    return [f.code for f in judge(e)]


def test_a_level_network_gives_nothing():
    assert given(evidence(level())) == []


@pytest.mark.parametrize(
    ("count", "ratio", "code"),
    [
        (8, 90, None),  # few connections: 100
        (8, 110, "exploding-gradient"),
        (8, 1 / 110, "vanishing-gradient"),
        (40, 1500, None),  # many: K^2 = 1600
        (40, 1700, "exploding-gradient"),
        (40, 1 / 1500, None),
        (40, 1 / 1700, "vanishing-gradient"),
        (8, 0.0, "vanishing-gradient"),
        (8, math.inf, "exploding-gradient"),
        (8, math.nan, None),  # the second has a number, like all after it
        (1, 1.0, None),
    ],
)
def test_the_gradient_may_change_by_a_power_of_depth(count, ratio, code):
    rows = level(count)
    rows[0] = (1.0, 1.0, 0.5, ratio, 0.1)
    assert given(evidence(rows)) == ([code] if code else [])


def test_a_gradient_that_overflows_is_judged_by_what_is_left_of_it():
    rows = [(1.0, 1.0, 0.5, g, 0.1) for g in (math.nan, 1e9, 1e6, 1e3, 1.0)]
    assert given(evidence(rows, norm_before=False)) == ["exploding-gradient"]
    assert given(evidence([(*r[:3], 0.0, 0.1) for r in rows])) == []  # none at all: no verdict


def test_a_growing_stream_behind_norms_explains_a_growing_gradient():
    rows = [(2.0**k, 2.0 ** (k + 1), 1.0, 2.0 ** (8 - k), 0.1) for k in range(8)]
    assert "exploding-gradient" not in given(evidence(rows))
    assert "exploding-gradient" in given(evidence(rows, norm_before=False))


def test_the_gradients_of_an_encoder_and_a_decoder_are_not_compared():
    rows = level(8, gradient=1e-6) + level(8)
    e = evidence(rows)
    assert given(e) == ["vanishing-gradient"]
    joins = list(e.structure.joins)
    joins[8] = Join(**{**vars(joins[8]), "root": True})
    apart = Structure(tuple(joins), e.structure.coverage, "")
    assert given(Evidence(e.connections, apart, e.wirings, 1.0, False, {})) == []


@pytest.mark.parametrize(
    ("share", "idle"),
    [(3e-3, False), (1e-3, True), (1e-5, True), (0.0, False)],  # 2^-9 is 2e-3; 0 is silent
)
def test_idle_is_beside_what_was_before(share, idle):
    assert given(evidence(level(8) + level(4, share=share))) == (["idle-depth"] if idle else [])
    assert given(evidence(level(12, share=share))) == []  # so everywhere: it starts silent


@pytest.mark.parametrize(
    ("share", "others", "found"), [(9.0, 0.5, 0), (50.0, 0.5, 1), (50.0, 6.0, 0), (11.0, 0.0, 1)]
)
def test_one_branch_is_held_against_its_neighbours(share, others, found):
    rows = level(share=others)
    rows[6] = (1.0, share, share, 1.0, 0.1)
    assert given(evidence(rows)).count("dominated-skip") == found


def test_a_branch_that_drowns_the_stream_is_not_reported_twice():
    rows = level()
    rows[6:] = [(100.0, 100.0, 0.005, 1.0, 0.1)] * 6
    assert given(evidence(rows)) == ["stream-blow-up"]
    rows[5] = (1.0, 100.0, 100.0, 1.0, 0.1)
    assert given(evidence(rows)) == ["dominated-skip"]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, ["stream-blow-up"]),
        ({"norm_before": False}, []),  # no law without a norm
        ({"norm_before": False, "norm_after": True}, ["stream-blow-up"]),
    ],
)
def test_a_stream_has_a_band_where_norms_give_it_a_unit(facts, expected):
    within = 10 * math.sqrt(1 + 12)
    grown = level()
    grown[-1] = (1.0, within * 0.99, 1.0, 1.0, 0.1)
    assert given(evidence(grown, **facts)) == []
    grown[-1] = (1.0, within * 1.01, 1.0, 1.0, 0.1)
    assert given(evidence(grown, **facts)) == expected


def test_what_tells_positions_apart_may_be_covered_but_not_lost():
    """Behind norms a large common vector is harmless; positions that shrink to nothing are not."""
    lost = [(1.0, 1.0, 0.5, 1.0, a) for a in (0.1, 0.9, 0.99, 0.9999, 0.99999, 0.99999)]
    covered = [(1.0, 10.0**k, 0.5, 1.0, a) for k, (*_, a) in enumerate(lost)]
    assert "rank-collapse" in given(evidence(lost))
    assert "rank-collapse" not in given(evidence(covered))
    assert "rank-collapse" in given(evidence(covered, norm_before=False))
    alike = [(*r[:4], 0.9999) for r in lost]  # from the start
    assert "rank-collapse" not in given(evidence(alike, norm_before=False))
    assert "rank-collapse" not in given(evidence(lost, features=1))  # images


def test_a_loss_or_an_input_that_is_not_finite_is_named():
    (finding,) = judge(evidence(level(), loss=math.inf))
    assert (finding.code, finding.where) == ("non-finite", "the head or the loss")
    (finding,) = judge(evidence(level(), entered=True))
    assert (finding.code, finding.where) == ("non-finite", "the input of c0")


def test_the_worst_comes_first():
    rows = [(*r[:4], 0.95) for r in level(14)]
    e = evidence(rows, norm_before=False, norm_after=True, dead={3: "it adds 0", 1: "it adds 0"})
    found = judge(e)
    assert [(f.severity, f.code) for f in found] == [
        ("sick", "dead-branch"),
        ("sick", "dead-branch"),
        ("warning", "post-norm-needs-warmup"),
    ]
    assert [f.where for f in found[:2]] == ["c1", "c3"]


@pytest.mark.parametrize(("layers", "alike", "found"), [(12, 0.95, 0), (13, 0.95, 1), (13, 0.8, 0)])
def test_post_norm_is_warned_of_by_depth_and_similarity(layers, alike, found):
    e = evidence([(*r[:4], alike) for r in level(layers)], norm_before=False, norm_after=True)
    assert given(e) == ["post-norm-needs-warmup"] * found


def test_shapes_of_sums_are_known():
    """Discovery states what leaves an addition; the findings need it to tell tokens from rows."""
    torch.manual_seed(0)
    assert {j.shape for j in discover(torch_encoder(2), *SEQUENCE).joins} == {(4, T, D)}
