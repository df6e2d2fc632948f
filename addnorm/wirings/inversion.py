"""The loop of the reversible wiring: forward keeps the last pair, backward computes the others.

It is no wiring; `streams.Reversible` is, and says what it is good for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from addnorm.branches import Context
from addnorm.contract import Wiring

Pair = tuple[Tensor, Tensor]


class Inverted(torch.autograd.Function):
    """The reversible loop: forward keeps the last pair, backward computes the others back.

    `names` are those of the parameters that follow the pair, by connection. They are saved like
    any tensor, so that autograd sees when one is changed before the way back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        connections: list[Wiring],
        names: list[list[str]],
        context: Context,
        a: Tensor,
        b: Tensor,
        *parameters: Tensor,
    ) -> Pair:
        """Run all connections and keep the last pair, the parameters and the random states."""
        pair, device = (a, b), a.device.type
        ctx.connections, ctx.names, ctx.context = connections, names, context
        ctx.autocast = None
        if torch.amp.is_autocast_available(device):
            ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.random = []
        for connection in connections:
            states = (torch.get_rng_state(), *get_device_states(a))
            if ctx.random and _equal(states, ctx.random[-1]):
                states = ctx.random[-1]  # where nothing is drawn, one copy for all
            ctx.random.append(states)
            pair = connection(pair, context)
        ctx.save_for_backward(*pair, *parameters)
        return pair

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Go back connection by connection: compute what entered, then its gradient."""
        (a, b, *parameters), (grad_a, grad_b) = ctx.saved_tensors, gradients
        found: list[Tensor | None] = []
        steps = zip(ctx.connections, ctx.names, ctx.random, strict=True)
        # (a, b) is what a connection returned, (b - F(N(a)), a) what it got.
        for connection, names, random in reversed(list(steps)):
            a = a.detach().requires_grad_()
            count = len(parameters) - len(names)
            own = [p.detach().requires_grad_() for p in parameters[count:]]
            del parameters[count:]
            with torch.enable_grad(), _as_before(a, random, ctx.autocast):
                swapped = dict(zip(names, own, strict=True))
                pair = (torch.zeros_like(b), a)
                _, f = torch.func.functional_call(connection, swapped, (pair, ctx.context))
            through: Tensor | None = None
            of_own: Sequence[Tensor | None] = [None] * len(own)
            if f.requires_grad:
                through, *of_own = torch.autograd.grad(f, [a, *own], grad_b, allow_unused=True)
            found[:0] = of_own
            grad_a, grad_b = grad_b, grad_a if through is None else grad_a + through
            a, b = b - f.detach(), a.detach()
        return None, None, None, grad_a, grad_b, *found


def _equal(states: Any, others: Any) -> bool:
    """Whether two states of the generators, (CPU, devices, of each device), are the same."""
    return all(map(torch.equal, (states[0], *states[2]), (others[0], *others[2])))


@contextlib.contextmanager
def _as_before(x: Tensor, random: Any, autocast: tuple[bool, torch.dtype] | None) -> Iterator[None]:
    """Draw the same random numbers again, so that dropout falls on the same places, in autocast."""
    cpu, devices, states = random
    kind = x.device.type
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices, device_type=kind if devices else "cuda"))
        torch.set_rng_state(cpu)
        set_device_states(devices, states, device_type=kind)
        if autocast is not None:
            stack.enter_context(torch.autocast(kind, dtype=autocast[1], enabled=autocast[0]))
        yield
