"""What the tests of the catalogue share: small connections and stacks, and how they are held."""

import math

import pytest
import torch
from test_wirings import OURS
from torch import nn

from addnorm.branches import Branch, Matrix, Site
from addnorm.contract import Stack, parse_spec
from addnorm.models.layers import Attention, FeedForward

each_wiring = pytest.mark.parametrize("name", OURS)

STOCHASTIC = ("droppath", "dropout-shortcut")


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


def small(name, depth=2, dim=16, **options):
    """Return a small Transformer stack at its real start."""
    branches = [b for _ in range(depth) for b in (Attention(dim, 2), FeedForward(dim, 24))]
    return Stack(branches, name, dim=dim, parts=2, **options)


def kept(model, x):
    """Return the bytes that a forward pass keeps for the backward one, parameters left out."""
    own, total = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            total[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = model(x)
    assert y.requires_grad
    return sum(total.values())
