"""The norms: each against its formula written out, its start, and its place in the models."""

from typing import get_args

import naive
import pytest
import torch
from test_models import agree, gpt, randomised
from torch import nn

from addnorm.models.mlp import MLP, MLPConfig
from addnorm.norms import NORMS, NormName

WIDTH = 5
each_norm = pytest.mark.parametrize("name", NORMS)

# -- the formulas, one token at a time ---------------------------------------------------------


def scalenorm(x, weight):
    return weight[0] * x / sum(value**2 for value in x) ** 0.5


def dyt(x, weight, bias, alpha):
    inner = [alpha[0] * v for v in x]
    return torch.stack([w * torch.tanh(i) + b for i, w, b in zip(inner, weight, bias, strict=True)])


def derf(x, weight, bias, alpha, shift):
    inner = [alpha[0] * v + shift[0] for v in x]
    return torch.stack([w * torch.erf(i) + b for i, w, b in zip(inner, weight, bias, strict=True)])


FORMULAS = {
    "layernorm": naive.layernorm,
    "rmsnorm": naive.rmsnorm,
    "scalenorm": scalenorm,
    "dyt": dyt,
    "derf": derf,
}


@each_norm
def test_a_norm_is_its_formula(name):
    """Outputs and gradients of input and parameters are those of the formula, token by token."""
    norm = randomised(NORMS[name](WIDTH).double())
    x = (2 * torch.randn(2, 3, WIDTH, dtype=torch.float64) + 0.5).requires_grad_()
    p = list(norm.parameters())
    want = naive.by_token(lambda token: FORMULAS[name](token, *p), x)
    agree(norm(x), want, x, norm)


@pytest.mark.parametrize(
    ("name", "start", "golden"),
    [
        # x = (3, 4): mean square 12.5, length 5, mean 3.5, variance 1/4
        ("layernorm", {"weight": 1, "bias": 0}, [-0.99998000, 0.99998000]),
        ("rmsnorm", {"weight": 1}, [0.84852811, 1.13137081]),
        ("scalenorm", {"weight": 2**0.5}, [0.84852814, 1.13137085]),
        ("dyt", {"weight": 1, "bias": 0, "alpha": 0.5}, [0.90514825, 0.96402758]),
        ("derf", {"weight": 1, "bias": 0, "alpha": 0.5, "shift": 0}, [0.96610515, 0.99532227]),
    ],
)
def test_a_norm_starts_where_its_paper_says(name, start, golden):
    """The start of every parameter, and what (3, 4) becomes then: tanh and erf of 1.5 and 2."""
    norm = randomised(NORMS[name](2, dtype=torch.float64))
    norm.reset_parameters()
    assert {n: p.flatten().tolist() for n, p in norm.named_parameters()} == {
        n: [value] * (1 if n in ("alpha", "shift") or name == "scalenorm" else 2)
        for n, value in start.items()
    }
    x = torch.tensor([3.0, 4], dtype=torch.float64)
    torch.testing.assert_close(
        norm(x), torch.tensor(golden, dtype=torch.float64), rtol=0, atol=1e-8
    )


@each_norm
def test_a_norm_lies_where_it_is_asked_to(name):
    """`device` and `dtype` are those of every parameter."""
    norm = NORMS[name](3, device="meta", dtype=torch.bfloat16)
    for parameter in norm.parameters():
        assert parameter.device.type == "meta"
        assert parameter.dtype == torch.bfloat16


@each_norm
def test_a_norm_of_zero_is_finite(name):
    """0 becomes a finite vector with finite gradients."""
    norm, x = NORMS[name](3), torch.zeros(2, 3, requires_grad=True)
    y = norm(x)
    assert torch.equal(y, torch.zeros(2, 3))
    (y * torch.randn(2, 3)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in (x, *norm.parameters()))


@each_norm
def test_a_norm_runs_in_bfloat16(name):
    """Under autocast a norm of bfloat16 is near the float32 one, without a warning."""
    norm, x = NORMS[name](64), torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        low = norm(x.bfloat16())
    torch.testing.assert_close(low.float(), norm(x), rtol=0.05, atol=0.02)


def test_rmsnorm_under_autocast_is_computed_in_float32():
    """What the gain's dtype can hold is not rounded to bfloat16."""
    norm, x = NORMS["rmsnorm"](64), torch.randn(4, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), norm(x.float()))
    assert norm.bfloat16()(x).dtype == torch.bfloat16


def test_scalenorm_is_rmsnorm_at_its_start():
    """g x / |x| with g = sqrt(D) is x / RMS(x)."""
    x = torch.randn(3, 7, dtype=torch.float64)
    ours, theirs = (NORMS[name](7, dtype=torch.float64)(x) for name in ("scalenorm", "rmsnorm"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_every_norm_has_a_name_on_the_command_line():
    """The names that a configuration may hold are those of the table."""
    assert get_args(NormName) == tuple(NORMS)


@each_norm
def test_models_take_every_norm(name):
    """GPT and MLP put the named norm wherever the wiring has one, and it gets a gradient."""
    made = nn.LayerNorm if name == "layernorm" else type(NORMS[name](1))
    model = gpt(norm=name)
    norms = [module for module in model.modules() if type(module) is made]
    assert len(norms) == 5  # in front of 4 branches, and the final one
    model(torch.arange(6)[None]).square().sum().backward()
    assert all(p.grad.any() for module in norms for p in module.parameters())
    mlp = MLP(MLPConfig(4, 3, 2, depth=3, wiring="prenorm", norm=name))
    assert sum(type(module) is made for module in mlp.modules()) == 4
    mlp.reset_parameters()
