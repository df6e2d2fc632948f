"""Looking changes nothing: what is put back, and what must run eagerly meanwhile."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from addnorm.contract import Stack


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`, DataParallel and DDP; FSDP2 wraps nothing."""
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(compiled, nn.Module):
            model = compiled
        elif isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def sharded(model: nn.Module) -> bool:
    """Whether parts of the model are wrapped by FSDP2."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in model.modules())


def _called(function: Any, _preserve: Any, *args: Any) -> Any:
    """Stand in for the reentrant checkpoint: call the function."""
    return function(*args)


def _once(*_args: Any, **_kwargs: Any) -> Iterator[None]:
    """Stand in for the set-up and the end of the other checkpoint: do neither."""
    yield


@contextlib.contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Run the model's calls one by one: no compiled parts, no checkpoints, no fused stack loops.

    An activation checkpoint would call its part again on the way back, out of sight of what
    watches the first call, and a reentrant one keeps no graph that could be read.
    """
    stacks = {m: m.observed for m in model.modules() if isinstance(m, Stack)}
    with contextlib.ExitStack() as exits:
        if "torch._dynamo" in sys.modules:  # else nothing can be compiled
            exits.enter_context(torch.compiler.set_stance("force_eager"))
        checkpoint = torch.utils.checkpoint
        exits.enter_context(mock.patch.object(checkpoint.CheckpointFunction, "apply", _called))
        exits.enter_context(
            mock.patch.object(checkpoint, "_checkpoint_without_reentrant_generator", _once)
        )
        for stack in stacks:
            stack.observed = True  # a wiring that owns the loop would hide its connections
        try:
            yield
        finally:
            for stack, observed in stacks.items():
                stack.observed = observed


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put buffers, `.grad`, modes, `requires_grad` and random states back, also after an error."""
    buffers = {name: (b, b.detach().clone()) for name, b in model.named_buffers()}
    modes = [(m, m.training) for m in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        for module, training in modes:
            module.training = training
        for parameter, requires, gradient in parameters:
            parameter.requires_grad_(requires)
            parameter.grad = gradient
        with torch.no_grad():
            for name, (buffer, old) in buffers.items():
                if model.get_buffer(name) is not buffer:  # replaced, not changed in place
                    parent, _, leaf = name.rpartition(".")
                    setattr(model.get_submodule(parent), leaf, buffer)
                buffer.copy_(old)
