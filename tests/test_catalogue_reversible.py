"""The reversible pair: its loop without activations is the plain one."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from catalogue_cases import Fixed, close, one, small
from test_wirings import randomised, stack, stream
from torch import nn
from torch.utils.checkpoint import checkpoint

from addnorm.branches import Branch, Context
from addnorm.contract import Stack, Wiring
from addnorm.models.layers import Attention, FeedForward
from addnorm.wirings import streams


def test_reversible_connection_is_inverted():
    wiring = randomised(one("reversible", FeedForward(8).double(), dim=8, norm=nn.LayerNorm))
    a, b = stream(5, dim=8), stream(5, dim=8)
    c, d = wiring((a, b), Context())
    close(d - wiring.branch(wiring.norm_in(c), Context()), a, 1e-15)
    assert torch.equal(c, b)


def test_reversible_loop_tells_its_streams_apart():
    """On a pair of two tensors the loop without activations is the plain one."""
    model = randomised(stack("reversible", 3))
    pair, results = (stream(2), stream(2)), []
    for run in (streams.Reversible.run, Wiring.run):
        a, b = run(iter(model), pair, Context())  # any iterable
        gradients = torch.autograd.grad((a.sin() + b.cos()).sum(), [*pair, *model.parameters()])
        results.append([a, b, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_reversible_with_a_parameter_that_is_not_used():
    """Its gradient is none, as in the plain loop."""
    model = stack("reversible", 2)
    for connection in model:
        connection.branch.spare = nn.Parameter(torch.ones(1, dtype=torch.float64))
    model(stream(2)).sum().backward()
    assert all(connection.branch.spare.grad is None for connection in model)


def test_reversible_gradients_are_the_plain_ones():
    """In float32 too, and with dropout, whose places are drawn again."""
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        branches = [b for _ in range(6) for b in (Attention(16, 2), FeedForward(16, dropout=0.2))]
        model = Stack(branches, "reversible", dim=16, parts=2, dtype=dtype).train()
        x = torch.randn(2, 5, 16, dtype=dtype, requires_grad=True)
        results = []
        for model.observed in (False, True):
            torch.manual_seed(3)
            y = model(x)
            results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])])
            results[-1].append(torch.rand(1, dtype=dtype))  # the random stream goes on as it should
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_reversible_under_autocast():
    """The way back computes what the way there computed, in bfloat16 too."""
    model = small("reversible", 4)
    x = torch.randn(2, 5, 16, requires_grad=True)
    results = []
    for model.observed in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3)


def test_reversible_with_frozen_parameters():
    model = small("reversible")
    for connection in list(model)[:2]:
        connection.requires_grad_(False)
    model(torch.randn(2, 3, 16)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def both_ways(model, run):
    """Return what `run` gives in the loop without activations and in the plain one."""
    results = []
    for model.observed in (False, True):
        torch.manual_seed(3)
        results.append(run())
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_reversible_with_parameters_put_in_from_outside():
    """torch.func.functional_call: the way back sees the parameters of the way there."""
    model = randomised(stack("reversible"))
    x = stream(2, 3)
    given = {n: torch.randn_like(p).requires_grad_() for n, p in model.named_parameters()}

    def run():
        y = torch.func.functional_call(model, given, (x,))
        return torch.autograd.grad(y.sin().sum(), [x, *given.values()])

    both_ways(model, run)


def test_reversible_after_a_change_of_its_parameters():
    """A parameter that was changed before the way back is noticed, as autograd does elsewhere."""
    model = stack("reversible")
    y = model(stream(2, 3)).sum()
    with torch.no_grad():
        model.connections[1].branch.out.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_reversible_draws_again_in_evaluation_too():
    """Dropout that was left on inside a model in evaluation mode."""
    branches = [FeedForward(8, 5, dropout=0.5) for _ in range(4)]
    model = Stack(branches, "reversible", dim=8, dtype=torch.float64).eval()
    for module in model.modules():
        module.train(isinstance(module, nn.Dropout))
    x = stream(2, 3)
    both_ways(model, lambda: torch.autograd.grad(model(x).sin().sum(), [x, *model.parameters()]))


def test_reversible_with_shared_branches_and_checkpoint():
    branch = FeedForward(8, 5)
    model = Stack([branch] * 3, "reversible", dim=8, shared=True, dtype=torch.float64)
    randomised(model)
    x = stream(2, 3)

    def run():
        y = checkpoint(model, x, use_reentrant=False)
        return torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])

    both_ways(model, run)


def test_reversible_takes_the_plain_path_where_it_must():
    """With a cache, and under a transform of torch.func."""
    model = randomised(small("reversible", dtype=torch.float64))
    x = stream(2, 3, dim=16)
    cache = {}
    model(x, Context(cache=cache)).sum().backward()
    assert {keys.shape[2] for keys, *_ in cache.values()} == {3}
    slope = torch.func.grad(lambda t: model(t).sin().sum())(x.detach())
    close(slope, torch.autograd.grad(model(x).sin().sum(), x)[0], 1e-10)


def test_reversible_with_a_constant_branch():
    value = torch.randn(2, 8, dtype=torch.float64)
    model = Stack([Fixed(value) for _ in range(3)], "reversible", dim=8, dtype=torch.float64)
    x = stream(2)
    both_ways(model, lambda: torch.autograd.grad(model(x).sin().sum(), x))


def test_reversible_refuses_branches_that_leave_values():
    class Leaves(Branch):
        def forward(self, x, context):
            context.values["value"] = x
            return x

    model = Stack([Leaves(), Leaves()], "reversible", dim=4)
    with pytest.raises(ValueError, match="a branch that leaves value for later ones cannot be"):
        model(torch.randn(2, 4, requires_grad=True))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own
def test_reversible_refuses_a_second_derivative_and_the_plain_loop_has_it():
    """`stack.observed = True` helps, as its docstring says."""
    model, x = randomised(stack("reversible")), stream(2)
    (slope,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
    with fwAD.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        model(fwAD.make_dual(x, torch.ones_like(x)))
    model.observed = True
    (slope,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), x)
    with fwAD.dual_level():
        tangent = fwAD.unpack_dual(model(fwAD.make_dual(x, torch.ones_like(x)))).tangent
    assert second.any()
    assert tangent.any()
