"""The catalogue through the compiler, export, checkpoints and wrappers: the same function."""

import functools

import pytest
import torch
from catalogue_cases import STOCHASTIC, close, each_wiring, small
from test_wirings import OURS, randomised, stack, stream
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
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


WRAPPED = ["prenorm", "resi-dual", "inject", "attnres", "mhc-v4", "gated-residual", "reversible"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, under compile
@pytest.mark.parametrize("wrapper", ["checkpoint", "compile"])
@pytest.mark.parametrize("name", WRAPPED)
def test_stack_runs_wrapped_connections(name, wrapper):
    """`stack.connections[i] = checkpoint_wrapper(c)` or `torch.compile(c)` is the same function."""
    torch._dynamo.reset()
    model = randomised(small(name, dtype=torch.float64), 0.3).eval()
    x = stream(2, 3, dim=16)
    results = []
    for wrapped in (False, True):
        if wrapped:
            for i, connection in enumerate(list(model)):
                model.connections[i] = (
                    checkpoint_wrapper(connection)
                    if wrapper == "checkpoint"
                    else torch.compile(connection, backend="eager")
                )
        y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    assert model.final_norm == OURS[name].final_norm
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own
@pytest.mark.parametrize("name", WRAPPED)
def test_stack_under_torch_func(name):
    """vmap over a batch, a forward derivative and a gradient, all of torch.func."""
    model = randomised(stack(name), 0.3).eval()
    x, t = stream(2, 3).detach(), stream(2, 3).detach()
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x), rtol=1e-9, atol=1e-10)
    y, slope = torch.func.jvp(model, (x,), (t,))
    torch.testing.assert_close(y, model(x), rtol=1e-9, atol=1e-10)
    weights = torch.randn_like(y)
    gradient = torch.func.grad(lambda x: (model(x) * weights).sum())(x)
    torch.testing.assert_close((slope * weights).sum(), (gradient * t).sum())
