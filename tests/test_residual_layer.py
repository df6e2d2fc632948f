"""Document 004's examples, corrected: equal to torch's own, and healthy in a row."""

import pytest
import torch
import torch.nn.functional as F
from test_models import randomised
from torch import nn

from addnorm.models.residual_layer import LayerNorm, ResidualBlock, ResidualLayer


@pytest.mark.parametrize("width", [1, 2, 3, 64])
def test_layernorm_is_torchs(width):
    """Outputs and gradients are those of nn.LayerNorm, also at a width of 1."""
    ours, theirs = randomised(LayerNorm(width)), nn.LayerNorm(width)
    theirs.load_state_dict(ours.state_dict())
    x = (3 * torch.randn(2, 5, width) + 1).requires_grad_()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    ours, theirs, x = ours.double(), theirs.double(), x.detach().double().requires_grad_()
    weights = torch.randn(2, 5, width, dtype=torch.float64)
    grads = [
        torch.autograd.grad((m(x) * weights).sum(), [x, *m.parameters()]) for m in (ours, theirs)
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_layernorm_of_one_number_is_beta():
    """At a width of 1 the output is beta, finite with its gradients."""
    norm = LayerNorm(1)
    x = torch.randn(4, 1, requires_grad=True)
    assert not norm(x).any()
    with torch.no_grad():
        norm.bias.fill_(0.5)
    y = norm(x)
    assert torch.equal(y, torch.full((4, 1), 0.5))
    y.sum().backward()
    assert not x.grad.any()


def naive_block(block, x, stride):
    """relu(S(x) + F(x)) with torch's functions on (B, C, H, W)."""
    p = dict(block.named_parameters())

    def norm(name, h):
        return F.batch_norm(h, None, None, p[f"{name}.weight"], p[f"{name}.bias"], training=True)

    h = F.conv2d(x, p["unit.branch.convs.0.weight"], stride=stride, padding=1)
    h = F.conv2d(F.relu(norm("unit.branch.norms.0", h)), p["unit.branch.convs.1.weight"], padding=1)
    if "unit.shortcut.conv.weight" in p:
        x = norm("unit.shortcut.norm", F.conv2d(x, p["unit.shortcut.conv.weight"], stride=stride))
    return F.relu(x + norm("unit.branch.norms.1", h))


@pytest.mark.parametrize(("out", "stride"), [(3, 1), (5, 1), (3, 2), (5, 2)])
def test_block_is_its_formula(out, stride):
    """Identity, projection and strided projection; outputs and gradients."""
    block = randomised(ResidualBlock(3, out, stride)).double()
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    got, want = block(x), naive_block(block, x, stride)
    assert got.shape == (2, out, -(-7 // stride), -(-6 // stride))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(want)
    tensors = [x, *block.parameters()]
    ours = torch.autograd.grad((got * weights).sum(), tensors)
    theirs = torch.autograd.grad((want * weights).sum(), tensors)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_an_identity_shortcut_has_no_parameters():
    """Only a projection adds parameters: C D and a batch norm."""
    same, wider = ResidualBlock(3, 3), ResidualBlock(3, 5)
    assert not list(same.unit.shortcut.parameters())
    assert sum(p.numel() for p in wider.unit.shortcut.parameters()) == 3 * 5 + 2 * 5


def test_blocks_in_a_row_train():
    """Three blocks behind a stem learn to tell random images apart."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), ResidualBlock(4, 4), ResidualBlock(4, 8, 2),
        ResidualBlock(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8) % 4
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("name", ["in_channels", "out_channels", "stride"])
def test_block_refuses(name):
    """Numbers below 1 are refused by name."""
    given = {"in_channels": 2, "out_channels": 2, "stride": 1, name: 0}
    with pytest.raises(ValueError, match=f"^{name} 0 must be at least 1$"):
        ResidualBlock(**given)


@pytest.mark.parametrize("masked", [False, True])
def test_layer_is_torchs_encoder_layer(masked):
    """With the same weights it is nn.TransformerEncoderLayer with the norm first, any mask."""
    ours = ResidualLayer(16, 24, heads=4, dropout=0.3).eval()
    theirs = nn.TransformerEncoderLayer(16, 4, 24, 0.3, batch_first=True, norm_first=True).eval()
    attention, feedforward = ours.stack
    pairs = [
        (attention.norm_in, theirs.norm1),
        (attention.branch.out, theirs.self_attn.out_proj),
        (feedforward.norm_in, theirs.norm2),
        (feedforward.branch.lift, theirs.linear1),
        (feedforward.branch.out, theirs.linear2),
    ]
    randomised(theirs, 0.3)
    for one, other in pairs:
        one.load_state_dict(other.state_dict())
    with torch.no_grad():
        attention.branch.qkv.weight.copy_(theirs.self_attn.in_proj_weight)
        attention.branch.qkv.bias.copy_(theirs.self_attn.in_proj_bias)
    x = torch.randn(2, 5, 16, requires_grad=True)
    look = (torch.rand(5, 5) < 0.6) | torch.eye(5, dtype=torch.bool) if masked else None
    got, want = ours(x, look), theirs(x, None if look is None else ~look)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(want)
    (one,), (other,) = (torch.autograd.grad((y * weights).sum(), x) for y in (got, want))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_layer_without_branches_is_the_identity():
    """Where both branches give 0 the layer passes x on, also in training."""
    layer = ResidualLayer(16, 24)
    with torch.no_grad():
        for connection in layer.stack:
            for parameter in connection.branch.out.parameters():
                parameter.zero_()
    x = torch.randn(2, 5, 16)
    assert torch.equal(layer(x), x)


def test_layer_refuses_heads_that_do_not_fit():
    """Heads must divide the width."""
    with pytest.raises(ValueError, match="heads 8 does not divide dim 12"):
        ResidualLayer(12, 24)
