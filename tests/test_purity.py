"""Looking changes nothing: gradients, buffers, modes, random states and hooks, errors or not."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.modules import module as nn_module

from addnorm import GPT, GPTConfig, xray
from addnorm.probe.discover import discover
from addnorm.probe.landscape import landscape, line, trajectory
from addnorm.probe.lens import lens
from addnorm.probe.lesion import first_order, lesions
from addnorm.probe.paths import spectrum
from addnorm.probe.purity import eager, untouched, unwrap
from addnorm.probe.tap import tapped
from addnorm.probe.whiteness import whiteness


class Odd(nn.Module):
    """Running statistics, dropout, in-place ReLU, checkpoints, tied and frozen parameters."""

    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(3, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.3)
            )
            for _ in range(3)
        )
        self.blocks[2][0].weight = self.blocks[0][0].weight
        self.blocks[1][0].weight.requires_grad_(False)
        self.blocks[1].eval()
        self.head = nn.Linear(6, 2)
        self.fails_at = None
        self.calls_left = None  # every later one fails

    def forward(self, x):
        x = self.lift(x)
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left < 0:
                self.fails_at = 2
        for i, block in enumerate(self.blocks):
            if self.fails_at == i:
                random.random(), np.random.rand(), torch.rand(3)
                raise KeyError("in the middle")
            if i == 1:
                out = block(x) * 1.0
                out += x
                x = out
            else:
                x = x + torch.utils.checkpoint.checkpoint(block, x, use_reentrant=i == 0)
        return {"logits": self.head(x)}


def state(model):
    return {
        "weights": copy.deepcopy(model.state_dict()),
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "same gradients": [id(p.grad) for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "random": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].copy(),
        "hooks": [
            [len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)]
            for m in model.modules()
        ],
        "hooks of all": (
            len(nn_module._global_forward_hooks),
            len(nn_module._global_forward_pre_hooks),
        ),
        "checkpoint": (
            torch.utils.checkpoint.CheckpointFunction.apply,
            torch.utils.checkpoint._checkpoint_without_reentrant_generator,
        ),
        "modes": torch.overrides._len_torch_function_stack(),
    }


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


LOOKS = {
    "discover": discover,
    "xray": xray,
    "blocks": lambda model, x: xray(model, x, blocks="blocks.*"),
    "a failing loss": lambda model, x: xray(model, x, loss=lambda out, _: out["none"]),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("fails_at", [None, 0, 2])
@pytest.mark.parametrize("look", LOOKS)
def test_nothing_changes(look, fails_at):
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(5, 3)
    model(x)["logits"].sum().backward()
    model.fails_at = fails_at
    before = state(model)
    if fails_at is None and look != "a failing loss":
        LOOKS[look](model, x)
    else:
        with pytest.raises(KeyError):
            LOOKS[look](model, x)
    assert equal(before, state(model))
    assert not x.requires_grad
    assert x.grad_fn is None


DEEP = {
    "lesion": lambda model, x, s: lesions(model, x, pairs=True, runs=(2,), structure=s),
    "first order": lambda model, x, s: first_order(model, x, structure=s),
    "paths": lambda model, x, s: spectrum(model, x, structure=s),
    "lens": lambda model, x, s: lens(model, x, structure=s),
    "landscape": lambda model, x, s: landscape(model, x, evaluations=80),
    "line": lambda model, x, s: line(model, zeros(model), model.state_dict(), x),
    "trajectory": lambda model, x, s: trajectory(
        model, [model.state_dict(), zeros(model), zeros(model, 0.5)], x, evaluations=80
    ),
    "whiteness": lambda model, x, s: whiteness(model, x, points=20, batch=8),
    "whiteness with statistics": lambda model, x, s: whiteness(
        model, x, points=20, batch_statistics=True
    ),
}


def zeros(model, value=0.0):
    return {
        name: torch.full_like(t, value) if i % 2 else t.clone() * (1 - value)
        for i, (name, t) in enumerate(model.state_dict().items())
    }


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("calls", [None, 0, 1, 4])
@pytest.mark.parametrize("look", DEEP)
def test_a_deeper_look_changes_nothing(look, calls):
    """Also when the model raises from some pass on, in the middle of its blocks."""
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(5, 3)
    structure = discover(model, x)
    model(x)["logits"].sum().backward()
    made = {"first order": 1, "paths": 2, "whiteness with statistics": 2, "lens": 4}.get(look, 5)
    before = state(model)
    model.calls_left = calls
    if calls is None or calls >= made:
        DEEP[look](model, x, structure)
    else:
        with pytest.raises(KeyError):
            DEEP[look](model, x, structure)
        assert model.calls_left < 0
    assert equal(before, state(model))
    assert not x.requires_grad
    assert x.grad_fn is None


@pytest.mark.parametrize("wiring", ["reversible", "mhc"])
def test_deeper_looks_leave_our_stacks_as_they_are(wiring):
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth=2, dim=16, heads=2, context=8, vocab_size=7, wiring=wiring))
    tokens = torch.randint(7, (2, 8))
    before, own = state(model), [dict(vars(m)) for m in model.modules()]
    xray(model, tokens, tokens, deep=("lesion", "paths", "lens", "whiteness"), budget=0.0)
    assert equal(before, state(model))
    for module, attributes in zip(model.modules(), own, strict=True):
        assert vars(module).keys() == attributes.keys()
    assert not model.stack.observed


def test_the_next_output_and_gradient_are_those_without_a_look():
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(5, 3)
    twin = copy.deepcopy(model)
    xray(model, x)
    outs = []
    for network in (model, twin):
        torch.manual_seed(1)
        out = network(x)["logits"]
        out.sum().backward()
        outs.append((out, [p.grad for p in network.parameters()]))
    assert torch.equal(outs[0][0], outs[1][0])
    assert all(
        (a is None and b is None) or torch.equal(a, b)
        for a, b in zip(outs[0][1], outs[1][1], strict=True)
    )


def test_a_stack_that_owns_its_loop_gets_it_back():
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth=2, dim=16, heads=2, context=8, vocab_size=7, wiring="reversible"))
    xray(model, torch.randint(7, (2, 8)))
    assert not model.stack.observed
    with eager(model):
        assert model.stack.observed
    assert not model.stack.observed


def test_a_replaced_buffer_and_a_changed_mode_are_put_back():
    model = nn.BatchNorm1d(2)
    old = model.running_mean
    with untouched(model):
        model.running_mean = torch.ones(2)
        model.eval()
        model.weight.requires_grad_(False)
        model.weight.grad = torch.ones(2)
    assert model.running_mean is old
    assert model.training
    assert model.weight.requires_grad
    assert model.weight.grad is None


def test_wrappers_are_taken_off():
    inner = nn.Linear(2, 2)
    assert unwrap(inner) is inner
    assert unwrap(torch.compile(inner, backend="eager")) is inner
    assert unwrap(nn.DataParallel(inner)) is inner


def test_a_pass_that_fails_does_not_spoil_the_next():
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(5, 3)
    structure = discover(model, x)
    met = []
    with tapped(model, structure, lambda k, point: met.append(k)):
        model.fails_at = 1
        with pytest.raises(KeyError):
            model(x)
        model.fails_at = None
        model(x)
    assert met == [0, 0, 1, 2]
