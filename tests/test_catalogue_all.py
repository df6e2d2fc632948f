"""What holds for every wiring of the catalogue: what it reaches, keeps apart, saves and learns."""

import pytest
import torch
import torch.nn.functional as F
from catalogue_cases import close, each_wiring, small
from test_wirings import randomised, stream
from torch import nn

from addnorm.contract import Stack, Wiring, register
from addnorm.models.layers import FeedForward


@each_wiring
def test_every_parameter_is_reached_from_its_real_start(name):
    """Within three steps of training every parameter of the scheme has had a gradient."""
    model = small(name, 3, dtype=torch.float64)
    seen = dict.fromkeys((key for key, _ in model.named_parameters()), 0.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    x, target = stream(4, 5, dim=16).detach(), torch.randn(4, 5, 16, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        y = model(x)
        y = F.layer_norm(y, (16,)) if model.final_norm else y
        (y - target).square().mean().backward()
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                seen[key] += parameter.grad.abs().max().item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    # A key's bias does not matter to softmax: its gradient is rounding.
    assert not [key for key, most in seen.items() if most < 1e-14 and "qkv.bias" not in key]


@each_wiring
def test_examples_do_not_influence_each_other(name):
    """What another example of the batch holds changes nothing."""
    model = randomised(small(name, dtype=torch.float64)).eval()
    x = stream(3, 4, dim=16).detach()
    other = x.clone()
    other[1:] = 5 * torch.randn_like(x[1:])
    close(model(x)[0], model(other)[0], 1e-10)


@each_wiring
def test_the_future_does_not_influence_the_past(name):
    """With causal attention a position depends on those before it only."""
    model = randomised(small(name, dtype=torch.float64), 0.3).eval()
    x = stream(2, 6, dim=16)
    (gradient,) = torch.autograd.grad(model(x)[:, 2].square().sum(), x)
    assert not gradient[:, 3:].any()
    assert gradient[:, :3].any(-1).all()


@each_wiring
def test_state_dict_makes_the_round_trip(name):
    """It holds the parameters, and of mhc-lite its table of permutations, nothing else."""
    model, other = randomised(small(name)).eval(), small(name).eval()
    known = {key for key, _ in (*model.named_parameters(), *model.named_buffers())}
    assert set(model.state_dict()) == known
    assert all("permutations" in key for key, _ in model.named_buffers())
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 16)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("assign", [False, True])
@each_wiring
def test_state_dict_fills_a_model_made_on_the_meta_device(name, assign):
    """What a state dict does not fill stays garbage."""
    model = small(name).eval()
    with torch.device("meta"):
        late = small(name).eval()
    if not assign:
        late = late.to_empty(device="cpu")
        for tensor in (*late.parameters(), *late.buffers()):
            tensor.detach().fill_(float("nan"))
    late.load_state_dict(model.state_dict(), assign=assign)
    x = torch.randn(2, 3, 16)
    assert torch.equal(late(x), model(x))


@each_wiring
def test_short_training_lowers_the_loss(name):
    """A small stack learns to turn its tokens by one position."""
    model, head = small(name), nn.Linear(16, 16)
    x = torch.randn(8, 6, 16)
    target = x.roll(1, 1)
    target[:, 0] = 0
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, 3e-3, weight_decay=0.0)
    losses = []
    for _ in range(60):
        y = model(x)
        y = F.layer_norm(y, (16,)) if model.final_norm else y
        loss = (head(y) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@each_wiring
def test_shapes_without_values(name):
    """On the meta device a forward pass gives shapes; a batch may be empty."""
    with torch.device("meta"):
        assert small(name)(torch.empty(2, 3, 16)).shape == (2, 3, 16)
    assert small(name)(torch.empty(0, 3, 16)).shape == (0, 3, 16)


def test_a_wiring_that_forgets_its_start_gets_it():
    """The stack starts what it makes; modules without a start of their own are left alone."""

    class Forgetful(Wiring):
        name, equation, paper, year, at_start = "forgetful", "x <- x + a F(x)", "none", 2026, "x"
        stream_law = gradient_law = "constant"

        def __init__(self, branch, site, *, size=2.0):
            super().__init__(branch, site)
            self.drop = nn.Dropout(0.0)
            self.parts = nn.ModuleList([self.new_norm()])
            self.a = self.new_parameter(1)

        def forward(self, stream, context):
            return stream + self.a * self.branch(self.drop(stream), context)

        def reset_parameters(self):
            super().reset_parameters()
            nn.init.constant_(self.a, 0.25)

    register(Forgetful)
    model = Stack([FeedForward(8)], "forgetful", dim=8, start="zero")
    assert model.connections[0].a.item() == 0.25
    assert not model.connections[0].branch.out.weight.any()
    assert model.connections[0].extra_repr() == "size=2.0"
