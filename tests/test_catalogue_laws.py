"""How RMS goes over 24 layers at the start: what each class states, against what is measured.

With 48 connections sqrt(l) grows by 4 at most from the third on, where the branches are large; most
are small at their start (GPT-2's), so that a sum of them is level within 20 % at this width.
"""

import torch
import torch.nn.functional as F
from catalogue_cases import each_wiring
from test_wirings import OURS, stream

from addnorm.contract import Stack
from addnorm.models.layers import Attention, FeedForward

LAYERS, DIM = 24, 32
# law: the least and most factor from the third connection to the last but two, and over the second
# half of these alone
STREAM = {
    "constant": ((0.4, 2), (0.5, 2)),  # attnres-block goes up and down with its blocks
    "sqrt": ((0.95, 6), (0.95, 1.6)),
    "linear": ((8, 48), (4, 48)),
    "geometric": ((7, float("inf")), (2, float("inf"))),
    "vanishing": ((0, 0.02), (0, 0.2)),
}
# On the way back the second half are the first layers, where 1/sqrt(l) is steepest.
GRADIENT = STREAM | {"constant": ((0.4, 3.5), (0.4, 2.5)), "sqrt": ((0.95, 12), (0.95, 5))}


def rms(x):
    return x.detach().square().mean().sqrt().item()


def over_depth(name):
    """Return the RMS after each connection, and of the gradient of an x added in front of each."""
    branches = [b for _ in range(LAYERS) for b in (Attention(DIM, 4), FeedForward(DIM))]
    model = Stack(branches, name, dim=DIM, parts=2, dtype=torch.float64)
    model.observed, added, seen = True, [], []

    def add(connection, args):
        state, context = args
        added.append(torch.zeros(2, 8, DIM, dtype=torch.float64, requires_grad=True))
        if isinstance(state, torch.Tensor):
            return state + (added[-1] if state.dim() == 3 else added[-1].unsqueeze(-2)), context
        newest = connection.present(state)
        return tuple(s + added[-1] if s is newest else s for s in state), context

    for connection in model:
        connection.register_forward_pre_hook(add)
        connection.register_forward_hook(lambda c, _, state: seen.append(rms(c.present(state))))
    y = model(0.1 * stream(2, 8, dim=DIM).detach())
    y = F.layer_norm(y, (DIM,)) if model.final_norm else y
    gradients = torch.autograd.grad((y * torch.randn_like(y)).sum(), added)
    return seen, [rms(g) for g in reversed(gradients)]


@each_wiring
def test_rms_over_depth_follows_the_stated_law(name):
    """Forward from connection to connection, and the gradient on the way back."""
    kind = OURS[name]
    forward, back = over_depth(name)
    for laws, law, values in (
        (STREAM, kind.stream_law, forward),
        (GRADIENT, kind.gradient_law, back),
    ):
        whole, half = values[-3] / values[2], values[-3] / values[LAYERS]
        for factor, (least, most) in zip((whole, half), laws[law], strict=True):
            assert least <= factor <= most, (law, whole, half)
