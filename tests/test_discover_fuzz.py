"""200 random networks with known connections: discovery names exactly these, or says why not."""

import math

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from addnorm.probe.discover import discover
from addnorm.probe.tap import tapped

D = 6


class Scaled(torch.autograd.Function):
    """A custom function of autograd."""

    @staticmethod
    def forward(ctx, x):
        return x * 0.5

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 0.5


def cubic_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rotate(x):
    one, two = x.chunk(2, -1)
    return x * 0.8 + torch.cat([-two, one], -1) * 0.6


class Branch(nn.Module):
    """A branch of one of several kinds; all the sums inside are no connections."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = (nn.Linear(D, D) for _ in range(3))
        self.low, self.high = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)
        self.shift = nn.Parameter(torch.randn(D))
        self.mix = nn.Parameter(torch.rand(D))

    def forward(self, x):
        if self.kind == "mlp":
            return self.b(torch.relu_(self.a(x)))
        if self.kind == "gelu":
            return self.b(cubic_gelu(self.a(x) + self.shift))
        if self.kind == "lora":
            return self.b(torch.tanh(self.a(x) + 2 * self.high(self.low(x))))
        if self.kind == "experts":
            gate = torch.sigmoid(self.c(x))
            return gate * self.a(x) + (1 - gate) * self.b(x)
        if self.kind == "shifted":  # RWKV: a position mixed with the one before
            before = F.pad(x, (0, 0, 1, -1))
            return self.a(x * self.mix + before * (1 - self.mix))
        if self.kind == "custom":
            return Scaled.apply(self.b(Scaled.apply(self.a(x))))
        query, key = rotate(self.a(x)), rotate(self.b(x))
        scores = query @ key.mT / D**0.5 + torch.ones(x.shape[1], x.shape[1]).tril().log()
        scores = scores + query.sum(-1, keepdim=True) * key.sum(-1)[:, None]
        return scores.softmax(-1) @ self.c(x)


BRANCHES = ["mlp", "gelu", "lora", "experts", "shifted", "custom", "attention"]


def added_in_place(x, f):
    f = f * 1.0
    f += x
    return f


def post_activation(x, f):
    out = f.clone()
    out.add_(x)
    return F.relu(out, inplace=True)


JOINS = {
    "x + f": lambda x, f: x + f,
    "f + x": lambda x, f: f + x,
    "x - f": lambda x, f: x - f,
    "x + f/2": lambda x, f: torch.add(x, f, alpha=0.5),
    "drop": lambda x, f: x + F.dropout(f, 0.3),
    "sum": lambda x, f: sum([x, f]),
    "stack": lambda x, f: torch.stack([x, f]).sum(0),
    "lerp": lambda x, f: torch.lerp(x, f, 0.3),
    "addcmul": lambda x, f: torch.addcmul(x, f, torch.full((D,), 0.5)),
    "views": lambda x, f: (x.flatten(1) + f.reshape(len(f), -1)).view_as(x),
    "in place": added_in_place,
    "post": post_activation,
    "plain": lambda x, f: f,
    "times": lambda x, f: x * f,
    "twice": lambda x, f: f + f,
}
LINEAR = ("shifted", "custom")
NO_SKIP = ("plain", "times", "twice")


class Block(nn.Module):
    def __init__(self, branch, join, norm, project):
        super().__init__()
        self.branch, self.join, self.place = Branch(branch), JOINS[join], norm
        self.norm = nn.LayerNorm(D)
        self.shortcut = nn.Linear(D, D) if project else nn.Identity()

    def forward(self, x):
        update = self.branch(self.norm(x) if self.place == "pre" else x)
        x = self.join(self.shortcut(x), update)
        return self.norm(x) if self.place == "post" else x


class Net(nn.Module):
    def __init__(self, blocks, order, inline):
        super().__init__()
        self.blocks = nn.ModuleList(Block(*block) for block in blocks)
        self.order, self.inline = order, inline
        self.lift, self.place = nn.Linear(3, D), nn.Parameter(torch.randn(1, 4, D))
        self.head = nn.Linear(D, 2)

    def forward(self, x):
        x = self.lift(x) + self.place
        for i in self.order:
            block = self.blocks[i]
            if self.inline and block.place == "":  # the sum stands in the model itself
                x = block.join(block.shortcut(x), block.branch(x))
            else:
                x = block(x)
        return self.head(x).logsumexp(-1)


@st.composite
def nets(draw):
    count = draw(st.integers(1, 4))
    blocks = []
    for _ in range(count):
        join = draw(st.sampled_from(sorted(JOINS)))
        project = join not in NO_SKIP and draw(st.integers(0, 4)) == 0
        norm = draw(st.sampled_from(["", "pre", "post"]))
        blocks.append((draw(st.sampled_from(BRANCHES)), join, norm, project))
    order = draw(st.permutations(list(range(count)))) + draw(
        st.lists(st.integers(0, count - 1), max_size=2)
    )
    return blocks, order, draw(st.booleans()), draw(st.integers(0, 2**16))


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(nets())
def test_the_connections_of_a_random_network_are_named(drawn):
    """Names, order and call numbers are the true ones; what has no skip is said to fall back."""
    blocks, order, inline, seed = drawn
    torch.manual_seed(seed)
    model, x = Net(blocks, order, inline), torch.randn(2, 4, 3)
    wanted, calls = [], {}
    for i in order:
        calls[i] = calls.get(i, 0) + 1
        branch, join, _, project = blocks[i]
        unknowable = project and branch in LINEAR  # two linear sides: neither is the shortcut
        if join not in NO_SKIP and not unknowable:
            number = f"#{calls[i]}" if calls[i] > 1 else ""
            wanted.append((f"blocks.{i}.branch{number}", project))
    try:
        structure = discover(model, x)
    except ValueError as error:
        assert not wanted, error  # noqa: PT017
        return
    adds = [j for j in structure.joins if j.kind == "add"]
    assert [(j.name, j.projected) for j in adds] == wanted, str(structure.coverage)
    seen = len(wanted) + sum(structure.coverage.ignored.values())
    assert structure.coverage.additions == seen
    whole = [j.name for j in structure.joins if j.kind == "block"]
    assert set(whole) == set(structure.coverage.fallbacks)
    torch.manual_seed(seed)
    plain = model(x)
    met = []
    torch.manual_seed(seed)
    with tapped(model, structure, lambda k, point: met.append(k)):
        tapped_out = model(x)
    assert met == list(range(len(structure)))
    assert torch.allclose(plain, tapped_out, atol=1e-6)
