"""The catalogue through the compiler, export, checkpoints and wrappers: the same function."""

import functools

import pytest
import torch
from catalogue_cases import STOCHASTIC, close, each_wiring, small
from test_wirings import randomised, stack, stream
from torch.utils.checkpoint import checkpoint

from addnorm.branches import Context


@each_wiring
def test_compiled_equals_eager(name):
    """One graph, without a break, forward and backward; stochastic schemes in evaluation."""
    torch._dynamo.reset()
    model = randomised(stack(name, 3), 0.3)
    model.train(name not in STOCHASTIC)
    x = stream(2, 3)
    weights = torch.randn_like(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, model):
        y = run(x)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [x, *model.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepnorm", "gtrxl", "attnres-block", "mhc"])
def test_inductor_equals_eager(name):
    """One of each family through the real compiler, in float32."""
    torch._dynamo.reset()
    model = randomised(small(name), 0.2)
    x = torch.randn(2, 3, 16, requires_grad=True)
    results = []
    for run in (torch.compile(model, fullgraph=True), model):
        y = run(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)


@each_wiring
def test_exported_program_gives_the_same(name):
    model = randomised(stack(name, 3), 0.3).eval()
    x = stream(2, 3).detach()
    program = torch.export.export(model, (x,))
    close(program.module()(x), model(x), 1e-10)


@each_wiring
def test_checkpointed_gradients_are_the_same(name):
    """Each connection under activation checkpointing, whatever its stream is made of."""
    model = randomised(small(name, dtype=torch.float64), 0.3).eval()
    x = stream(2, 3, dim=16)
    results = []
    for checkpointed in (False, True):
        state = model.connections[0].open(x)
        for connection in model:
            run = functools.partial(checkpoint, use_reentrant=False) if checkpointed else None
            state = run(connection, state, Context()) if run else connection(state, Context())
        y = model.connections[-1].close(state)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@each_wiring
def test_observed_stack_gives_the_same(name):
    """The plain loop, in which hooks see every connection, is the same function."""
    model = randomised(small(name, dtype=torch.float64), 0.3).eval()
    x = stream(2, 3, dim=16)
    results = []
    for model.observed in (False, True):
        y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
