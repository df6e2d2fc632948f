"""What the catalogue keeps in memory for the way back."""

import pytest
import torch
from catalogue_cases import kept, small
from torch import nn
from torch.profiler import ProfilerActivity, profile

from addnorm.contract import Stack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}


def copies(name, count, how):
    """Return the copies of the stream that are kept for each connection around one matrix."""
    dim, dtype = 256, DTYPES[how]
    model = Stack([nn.Linear(dim, dim) for _ in range(count)], name, dim=dim, dtype=dtype)
    x = torch.randn(2, 4, dim, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast", cache_enabled=False):
        return kept(model, x) / (x.numel() * x.element_size()) / count


@pytest.mark.parametrize("how", DTYPES)
@pytest.mark.parametrize("name", ["denseformer", "attnres", "attnres-block", "unet"])
def test_a_history_is_kept_once(name, how):
    """Beside what pre-norm keeps, at most three copies a connection, whatever the depth.

    Attention over depth keeps a few numbers for each source and token, here 1/256 of a copy each.
    """
    for count in (8, 16, 32):
        assert copies(name, count, how) < copies("prenorm", count, how) + 3, count


def states_of(y):
    """Return the states of the generator that the loop without activations keeps."""
    nodes = [y.grad_fn]
    for node in nodes:
        if hasattr(node, "random"):
            return node.random
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    raise AssertionError("the loop without activations did not run")


def peak(model, x):
    """Return the most bytes at one time, forward and backward, beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        model(x).sum().backward()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_reversible_memory_does_not_grow_with_depth():
    """What is kept for the way back, and the peak, are the same for 2 layers and for 16.

    The parameters are frozen for the peak: their gradients would grow with depth.
    """
    x = torch.randn(4, 32, 16)
    few, many = small("reversible", 2), small("reversible", 16)
    assert kept(few, x) == kept(many, x) == 2 * x.numel() * 4
    assert kept(small("prenorm", 16), x) > 6 * kept(small("prenorm", 2), x)
    assert len({id(states) for states in states_of(many(x))}) == 1
    peaks = [
        peak(small(name, depth).requires_grad_(False), torch.randn(8, 64, 16, requires_grad=True))
        for name in ("reversible", "prenorm")
        for depth in (2, 16)
    ]
    assert peaks[1] <= 1.05 * peaks[0]
    assert peaks[3] > 2 * peaks[2]


@pytest.mark.parametrize(("draws", "states"), [("1111", 4), ("1000", 2), ("0110", 3)])
def test_reversible_keeps_a_state_of_the_generator_where_a_branch_draws(draws, states):
    branches = [nn.Dropout(0.5) if draw == "1" else nn.Tanh() for draw in draws]
    model = Stack(branches, "reversible", dim=8)
    assert len({id(state) for state in states_of(model(torch.randn(2, 8)))}) == states
