"""The catalogue in 16 and 32 bits and under autocast."""

import copy

import pytest
import torch
from catalogue_cases import each_wiring, small
from test_wirings import randomised, stack, stream
from torch import nn

from addnorm.norms import NORMS


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
