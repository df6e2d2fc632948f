"""The whole catalogue under FSDP2: two real processes, gloo, against the unsharded model."""

import sys

import pytest
import torch
from ranks import joined, two_processes
from test_wirings import OURS, randomised

from addnorm.contract import Stack
from addnorm.models.layers import Attention, FeedForward

DIM = 16


def make(name):
    """Return the same stack and input in every process."""
    torch.manual_seed(0)
    branches = [b for _ in range(3) for b in (Attention(DIM, 2), FeedForward(DIM, 24))]
    model = randomised(Stack(branches, name, dim=DIM, parts=2), 0.3).eval()
    return model, torch.randn(4, 5, DIM)


def sharded(model):
    """Shard each connection, then the stack, as the docstring of `Wiring` says."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for connection in model:
        fully_shard(connection)
        for method in ("open", "close"):
            register_fsdp_forward_method(connection, method)
    return fully_shard(model)


def outcome(model, x):
    """Return the output and the gradients of input and parameters by name, whole."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    found = {"output": y.detach(), "input": x.grad}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name] = None if grad is None else getattr(grad, "full_tensor", lambda g=grad: g)()
    return found


def hold(name):
    """Both processes see one batch, so that the mean of their gradients is that of one."""
    model, x = make(name)
    expected = outcome(model, x)
    found = outcome(sharded(make(name)[0]), x)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if value is None:
            assert found[key] is None or not found[key].any(), key
            continue
        torch.testing.assert_close(
            found[key], value, rtol=1e-4, atol=1e-5 * (1 + value.abs().max().item()),
            msg=lambda message, key=key: f"{key}: {message}",
        )  # fmt: skip


@pytest.mark.slow
def test_every_wiring_sharded_is_the_unsharded_one(tmp_path):
    two_processes(__file__, tmp_path)


if __name__ == "__main__":
    with joined(int(sys.argv[1]), sys.argv[2]):
        for name in OURS:
            print(f"wiring {name}", file=sys.stderr, flush=True)
            hold(name)
