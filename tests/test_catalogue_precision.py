"""The catalogue in 16 and 32 bits and under autocast."""

import copy

import pytest
import torch
from catalogue_cases import each_wiring, one, small
from test_wirings import randomised, stack, stream
from torch import nn

from addnorm.branches import Context, Site
from addnorm.models.layers import FeedForward
from addnorm.norms import NORMS
from addnorm.wirings.memory import DepthAttention


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
def test_float32_is_near_float64(name):
    """With and without autocast around what is not: only rounding differs."""
    model = randomised(stack(name, 3), 0.3).eval()
    x = stream(2, 3).detach()
    low = copy.deepcopy(model).float()(x.float())
    assert low.dtype == torch.float32
    assert (low - model(x)).norm() < 1e-4 * model(x).norm()


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize(
    "spec",
    ["mhc", "mhc-v4", "mhc-lite", "ihc", "krom", "hyper", "hyper(dynamic=false)", "frac"],
)
def test_mixing_coefficients_are_those_of_float32(spec, bits):
    """Bit by bit, inside autocast and outside, also in a model of bfloat16."""
    wiring = randomised(one(spec, dim=16, index=2, count=5).float())
    wiring = wiring.bfloat16().float() if bits == 16 else wiring
    low = copy.deepcopy(wiring).bfloat16() if bits == 16 else wiring
    X = torch.randn(3, 4, 4 if spec == "frac" else 16)
    X = X.bfloat16() if bits == 16 else X
    results = []
    for model, x, inside in ((wiring, X.float(), False), (low, X, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            if hasattr(model, "maps"):
                maps = model.maps(x)
            else:
                maps = model.generate(x)
                if spec == "mhc-lite":
                    maps = (*maps, model.permute(maps[2].softmax(-1)))
        results.append(maps)
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["mhc", "mhc-v4", "mhc-lite", "ihc", "krom", "hyper"])
def test_streams_are_mixed_outside_autocast(name):
    """Distinct streams under random maps and a branch of 0: bit by bit what is outside."""
    wiring = randomised(one(name, FeedForward(16), dim=16, index=2, count=5).float())
    for parameter in wiring.branch.parameters():
        nn.init.zeros_(parameter)
    X = torch.randn(3, 4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = wiring(X, Context())
    assert torch.equal(low, wiring(X, Context()))


def test_attention_over_depth_scores_16_bits_in_float32():
    """Its weights and those of the same numbers in float32 differ by the rounding of the result."""
    read = randomised(DepthAttention(Site(64)), 0.5).bfloat16()
    sources = tuple(torch.randn(4, 64).bfloat16() for _ in range(6))
    wide = copy.deepcopy(read).float()(tuple(v.float() for v in sources))
    torch.testing.assert_close(read(sources).float(), wide, rtol=1e-2, atol=1e-2)
    w = torch.randn(64)
    for v in sources:
        exact = DepthAttention.score(v.double(), w.double()).float()
        torch.testing.assert_close(DepthAttention.score(v, w), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mhc", "mhc-v4", "mhc-lite", "ihc", "krom"])
def test_a_token_of_zeros_has_a_finite_gradient(name):
    """In float32, with eps 1e-20 under the root and random maps."""
    wiring = randomised(one(name, FeedForward(8), dim=8, norm=nn.LayerNorm).float())
    X = torch.randn(3, 4, 8)
    X[1] = 0
    X.requires_grad_()
    wiring(X, Context()).square().sum().backward()
    assert X.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in wiring.parameters())
