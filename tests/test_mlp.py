"""MLPs with one and two layers in a branch, norms inside and images: formulas, counts, refusals.

The network of document 003 and what an MLP has beside its branches stand in test_models.py.
"""

import pytest
import torch
import torch.nn.functional as F
from test_models import agree, randomised

from addnorm.branches import Context, Site, start
from addnorm.contract import catalogue
from addnorm.models.mlp import MLP, Dense, MLPConfig
from addnorm.models.resnet import ResNet, ResNetConfig


def mlp(**changes):
    return MLP(MLPConfig(**{"in_dim": 4, "dim": 3, "out_dim": 2, "depth": 3, **changes}))


def normed(kind, x, p, name):
    """Return x `(N, D)` through the norm, column by column (batch) or row by row (layer)."""
    if kind == "none":
        return x
    axis = 0 if kind == "batchnorm" else 1
    mean = x.mean(axis, keepdim=True)
    variance = ((x - mean) ** 2).mean(axis, keepdim=True)
    return (x - mean) / (variance + 1e-5) ** 0.5 * p[f"{name}.weight"] + p[f"{name}.bias"]


@pytest.mark.parametrize("kind", ["none", "batchnorm", "layernorm"])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("hidden", [0, 5])
def test_a_branch_is_its_formula(hidden, before, kind):
    """Linear layers with norm and activation behind, or in front of, each of them."""
    norm = None if kind == "none" else kind
    branch = randomised(Dense(3, "relu", hidden=hidden, norm=norm, before=before).double())
    p = dict(branch.named_parameters())
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    if before:
        want = linear(F.relu(normed(kind, x, p, "norms.0")), "linear")
        if hidden:
            want = linear(F.relu(normed(kind, want, p, "norms.1")), "out")
    else:
        want = F.relu(normed(kind, linear(x, "linear"), p, "norms.0"))
        if hidden:
            want = normed(kind, linear(want, "out"), p, "norms.1")
    got = branch(x, Context())
    if kind == "batchnorm" and (not before or hidden):  # the bias in front of batch norm: rounding
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        weights = torch.randn_like(want)
        ours = torch.autograd.grad((got * weights).sum(), [x, *p.values()], retain_graph=True)
        theirs = torch.autograd.grad((want * weights).sum(), [x, *p.values()])
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    else:
        agree(got, want, x, branch)


@pytest.mark.parametrize(
    ("changes", "branch", "extra"),
    [
        ({}, 12, 0),
        ({"branch_layers": 2}, 24, 0),
        ({"branch_layers": 2, "hidden_ratio": 4.0}, 12 * 4 + 13 * 3, 0),
        ({"inner_norm": "batchnorm"}, 12 + 6, 0),
        ({"branch_layers": 2, "inner_norm": "layernorm"}, 24 + 12, 0),
        # N-act-linear twice, and N-act behind the stack
        ({"branch_layers": 2, "inner_norm": "batchnorm", "preactivation": True}, 24 + 12, 6),
        ({"preactivation": True}, 12, 6),
        ({"wiring": "prenorm", "branch_layers": 2}, 24 + 6, 6),
    ],
    ids=str,
)
def test_parameters(changes, branch, extra):
    """Three branches, an input layer of 15 and a head of 8 parameters, and a final norm."""
    model = mlp(**changes)
    assert sum(p.numel() for p in model.parameters()) == 15 + 3 * branch + extra + 8


@pytest.mark.parametrize(("wiring", "before"), [("postact", False), ("residual", True)])
def test_a_resnet_without_convolutions(wiring, before):
    """One stage of a ResNet on images of one pixel is the MLP with the same weights."""
    changes = {"branch_layers": 2, "activation": "relu", "inner_norm": "batchnorm"}
    model = MLP(MLPConfig(8, 8, 2, depth=3, wiring=wiring, preactivation=before, **changes))
    net = ResNet(ResNetConfig(depth=20, width=8, wiring=wiring))
    model, stage = randomised(model).double(), net.double().stages[0][0]
    for ours, theirs in zip(model.stack, stage, strict=True):
        unit = theirs.branch
        with torch.no_grad():
            for linear, conv in zip((ours.branch.linear, ours.branch.out), unit.convs, strict=True):
                conv.weight.zero_()
                conv.weight[:, :, 1, 1] = linear.weight
                linear.bias.zero_()
        norms = list(ours.branch.norms)
        if before and unit.lead is None:  # the stem of a ResNet has the first norm and ReLU
            unit.lead, unit.relu_first = type(norms[0])(8).double(), True
        targets = [*([unit.lead] if before else []), *unit.norms]
        for norm, target in zip(norms, targets, strict=True):
            target.load_state_dict(norm.state_dict())
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(model.stack(x), stage(x[:, None, None])[:, 0, 0])


@pytest.mark.parametrize("layers", [1, 2])
def test_starts_find_the_matrices(layers):
    """The last matrix is `out`, the one in front of it `in`, and biases start at 0."""
    branch = Dense(16, "relu", hidden=32 if layers == 2 else 0)
    start(branch, "fixup", Site(16, count=4), {})
    *first, last = branch.matrices()
    assert [m.role for m in first] == ["in"] * (layers - 1)
    assert not last.weight.any()
    assert all(m.weight.std().item() == pytest.approx(0.25 / 2, rel=0.1) for m in first)
    assert not any(p.any() for n, p in branch.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("wiring", [n for n in catalogue() if n != "frac"] + ["frac(m=2)"])
def test_every_wiring_trains(wiring, before):
    """With two layers and batch norm the gradients of all parameters are finite."""
    model = MLP(
        MLPConfig(
            16, 8, 10, depth=4, wiring=wiring, branch_layers=2, inner_norm="batchnorm",
            activation="relu", preactivation=before, flatten=True,
        )
    )  # fmt: skip
    F.cross_entropy(model(torch.randn(6, 1, 4, 4)), torch.arange(6)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_images_are_rows():
    """With `flatten` images are read as rows; without it rows keep any number of axes."""
    model, flat = mlp(), mlp(flatten=True)
    flat.load_state_dict(model.state_dict())
    images = torch.randn(5, 1, 2, 2)
    assert torch.equal(flat(images), model(images.reshape(5, 4)))
    assert torch.equal(flat(images.reshape(5, 4)), model(images.reshape(5, 4)))
    assert model(torch.randn(5, 6, 4)).shape == (5, 6, 2)


def test_works_after_the_meta_device():
    """Norms inside, and their running statistics, start again after the meta device."""
    config = MLPConfig(
        4, 3, 2, depth=2, branch_layers=2, inner_norm="batchnorm", preactivation=True
    )
    made = MLP(config)
    with torch.device("meta"):
        late = MLP(config)
    late = late.to_empty(device="cpu")
    for model in (made, late):
        for tensor in model.state_dict().values():
            tensor.fill_(-1 if tensor.dtype == torch.int64 else float("nan"))
        torch.manual_seed(1)
        model.reset_parameters()
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, late.state_dict()[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch_layers": 3}, "branch_layers 3 must be 1 or 2"),
        (
            {"hidden_ratio": 4.0},
            "hidden_ratio 4 needs branch_layers 2: one layer has no width inside",
        ),
        ({"hidden_ratio": 0.0, "branch_layers": 2}, "hidden_ratio 0 gives no width at dim 64"),
        ({"hidden_ratio": -2.0, "branch_layers": 2}, "hidden_ratio -2 gives no width at dim 64"),
        (
            {"inner_norm": "batch"},
            "unknown inner_norm 'batch'; did you mean 'batchnorm'? "
            "(known: none, batchnorm, layernorm)",
        ),
        (
            {"hidden_ratio": float("nan"), "branch_layers": 2},
            "hidden_ratio nan gives no width at dim 64",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_mlp_refuses(changes, message):
    """A configuration that does not fit is refused with the value and what would fit."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole text is compared
        MLPConfig(**changes)
    assert str(caught.value) == message


def test_mlp_refuses_another_width():
    """An input of another width is named with its shape, and images with what to say."""
    with pytest.raises(ValueError, match=r"an input of shape \(2, 5\), but .* rows of 4$"):
        mlp()(torch.randn(2, 5))
    with pytest.raises(ValueError, match="rows of 4; say flatten=True for images"):
        mlp()(torch.randn(2, 1, 2, 2))
