"""Several streams: doubly stochastic mixing, and streams that stay apart."""

import copy
import dataclasses
import functools
import itertools

import naive
import naive_wirings as oracle
import pytest
import torch
from catalogue_cases import Fixed, close, fill, one, published
from test_wirings import SPECS, connections, randomised, stack, stream

from addnorm.branches import Context
from addnorm.contract import parse_spec
from addnorm.models.layers import FeedForward
from addnorm.wirings import streams


@pytest.mark.parametrize("name", ["mhc", "mhc-lite", "krom"])
def test_mixing_is_doubly_stochastic(name):
    """Rows and columns sum to 1, also those of a product; the mean of the streams is kept."""
    wiring = one(name, Fixed(torch.ones(8, dtype=torch.float64)), dim=8)
    randomised(wiring, 0.3)
    X = torch.randn(5, 4, 8, dtype=torch.float64)
    raw = wiring.generate(X)[2]
    H = {
        "mhc": lambda: streams.sinkhorn(raw.view(5, 4, 4), 20),
        "mhc-lite": lambda: wiring.permute(raw.softmax(-1)),
        "krom": lambda: wiring.kronecker(raw.view(5, 2, 2).softmax(-1)),
    }[name]()
    tolerance = 1e-5 if name == "mhc" else 1e-14
    H = torch.cat([H, functools.reduce(torch.matmul, H)[None]])
    assert (H >= 0).all()
    close(H.sum(-1), torch.ones(6, 4, dtype=torch.float64), 1e-14 if name != "mhc" else 1e-13)
    close(H.sum(-2), torch.ones(6, 4, dtype=torch.float64), tolerance)
    post = 2 * torch.sigmoid(wiring.generate(X)[1]).sum(-1, keepdim=True)  # F = 1
    close(wiring(X, Context()).sum(-2), X.sum(-2) + post, 10 * tolerance)


def test_streams_of_mhc_are_interchangeable():
    """Permuting the streams and the maps that belong to them permutes what comes out."""
    n, D = 4, 3
    wiring = randomised(one("mhc"), 0.3)
    order = torch.tensor([2, 0, 3, 1])
    other = copy.deepcopy(wiring)
    with torch.no_grad():
        phi = wiring.generate.phi.view(-1, n, D)[:, order].flatten(1)
        rows = torch.cat([order, n + order, 2 * n + (n * order[:, None] + order[None]).flatten()])
        other.generate.phi.copy_(phi[rows])
        other.generate.bias.copy_(wiring.generate.bias[rows])
    X = torch.randn(5, n, D, dtype=torch.float64)
    close(other(X[:, order], Context()), wiring(X, Context())[:, order], 1e-12)


def several(spec):
    """Return the number of streams that a wiring opens, of equal standing in one tensor; 0: one."""
    X = stack(spec).connections[0].open(stream(2, 3))
    return X.shape[-2] if isinstance(X, torch.Tensor) and X.dim() == 4 else 0


SEVERAL = [spec for spec in SPECS if several(spec) > 1]


def test_all_wirings_of_several_streams_are_found():
    names = {parse_spec(spec).name for spec in SEVERAL}
    assert names == {"hyper", "mhc", "mhc-v4", "ihc", "mhc-lite", "krom", "gated-residual"}


@pytest.mark.parametrize("name", SEVERAL)
def test_streams_do_not_stay_equal(name):
    """The start tells the streams apart: after training steps no two of them are the same."""
    model = stack(name, 4)
    with torch.no_grad():
        for connection in model:
            randomised(connection.branch)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x, target = stream(4, 3).detach(), torch.randn(4, 3, 8, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    X = model.connections[0].open(x)
    for connection in model:
        X = connection(X, Context())
    for i, j in itertools.combinations(range(several(name)), 2):
        assert (X[..., i, :] - X[..., j, :]).abs().max() > 1e-9, (i, j)


@pytest.mark.parametrize(
    ("name", "eps"),
    [("mhc", 1e-20), ("mhc-lite", 1e-20), ("krom", 1e-20), ("ihc", 1e-20), ("mhc-v4", 1e-6)],
)
def test_generator_has_the_eps_of_its_paper(name, eps):
    """Seen on a stream whose mean square is as small."""
    wiring = randomised(one(name, dim=8))
    X = eps**0.5 * stream(4).detach()
    p, sizes = dict(wiring.named_parameters()), wiring.generate.sizes
    for ours, theirs in zip(
        wiring.generate(X), oracle.generated(p, "generate", list(X), sizes, eps), strict=True
    ):
        close(ours, torch.stack(theirs), 1e-9)


@pytest.mark.parametrize("name", ["mhc", "mhc-lite", "krom"])
def test_first_and_last_connection_have_no_mixing_map(name):
    """There it could change nothing, so there are no parameters for it."""
    assert [len(connection.generate.alpha) for connection in stack(name)] == [2, 3, 3, 2]


@pytest.mark.parametrize(
    ("spec", "dim", "rank"),
    [("gated-residual", 64, 8), ("gated-residual", 4, 1), ("gated-residual(rank=3)", 64, 3)],
)
def test_rank_of_gated_residual(spec, dim, rank):
    """Rank 0 stands for D / 8, at least 1."""
    assert one(spec, dim=dim).read.down.out_features == rank


def test_hyper_connections_widen_the_output_matrices_by_the_root_of_n():
    assert one("hyper(n=9)", FeedForward(3).double()).gains() == {"out": 3.0}


LOGITS = fill((4, 4), 1)

SINKHORN = [
    [0.324606, 0.365755, 0.212726, 0.096912],
    [0.049805, 0.103455, 0.330879, 0.515860],
    [0.435166, 0.176111, 0.139961, 0.248761],
    [0.190423, 0.354678, 0.316432, 0.138467],
]


def test_sinkhorn_reproduces_its_reference():
    """20 iterations of the DeepSeek form; the paper's form is its transpose of the transpose."""
    ours = streams.MHCV4.normalise(LOGITS)
    published(ours, SINKHORN)
    torch.testing.assert_close(streams.sinkhorn(LOGITS.mT, 20).mT, ours, rtol=0, atol=2e-6)


def test_sinkhorn_is_not_there_yet_for_large_logits():
    """With logits 8 times as large the sums of the columns are off by a percent after 20."""
    rows, columns = (streams.sinkhorn(8 * LOGITS.mT, 20).sum(axis) for axis in (-1, -2))
    close(rows, torch.ones_like(rows), 1e-12)
    assert (columns - 1).abs().max().item() == pytest.approx(1.16e-2, rel=0.02)


@pytest.mark.parametrize("shift", [-800.0, 800.0])
def test_sinkhorn_does_not_overflow(shift):
    """The largest logit is taken off: what is added to all, or far below, does not matter."""
    ours = streams.sinkhorn(LOGITS + shift, 20)
    close(ours, streams.sinkhorn(LOGITS, 20), 1e-10)
    far = LOGITS - 900 * (1 - torch.eye(4, dtype=torch.float64))
    close(streams.sinkhorn(far, 20), torch.eye(4, dtype=torch.float64), 1e-10)


EVERYWHERE = {  # spec: its formula, the numbers that a mixing matrix is made of, the tolerance
    "mhc": (oracle.mhc, 16, 1e-9),
    "mhc(n=3)": (functools.partial(oracle.mhc, n=3), 9, 1e-9),
    "mhc-v4": (oracle.mhc_v4, 16, 1e-5),
    "mhc-lite": (oracle.mhc_lite, 24, 1e-12),
    "krom": (oracle.krom, 4, 1e-12),
}


def mixing_everywhere(connection, size):
    """Return a connection as the oracle knows it, given random maps where ours has no H_res."""
    p = dict(connection.p)
    if len(p["generate.alpha"]) == 2:
        for name, shape in (("phi", (size, p["generate.phi"].shape[1])), ("bias", (size,))):
            more = 0.5 * torch.randn(shape, dtype=torch.float64)
            p[f"generate.{name}"] = torch.cat([p[f"generate.{name}"], more])
        p["generate.alpha"] = torch.cat([p["generate.alpha"], p["generate.alpha"][:1]])
    return dataclasses.replace(connection, p=p)


@pytest.mark.parametrize("spec", EVERYWHERE)
def test_the_mixing_that_the_ends_leave_out_changes_nothing(spec):
    """The papers have H_res at every connection; whatever it is at the ends, the stack is equal.

    After 20 iterations Sinkhorn's sums are 1 to 1e-9 for logits as small as here, but for the 1e-6
    that mhc-v4 adds to them; those of the others are 1 exactly.
    """
    formula, size, tolerance = EVERYWHERE[spec]
    model = randomised(stack(spec, 4), 0.3)
    known = connections(model, "layernorm")
    whole = [mixing_everywhere(c, size) for c in known]
    assert sum(
        a is not b and len(a.p["generate.bias"]) < len(b.p["generate.bias"])
        for a, b in zip(known, whole, strict=True)
    ) == (1 if spec == "mhc-v4" else 2)
    x = stream(2)
    expected = naive.by_token(lambda token: formula(token, whole, everywhere=True), x)
    y, weights = model(x), torch.randn_like(x)
    close(y, expected, tolerance)
    ours, theirs = (torch.autograd.grad((t * weights).sum(), x)[0] for t in (y, expected))
    close(ours, theirs, 10 * tolerance)
