"""The path spectrum: the gradient split by how many branches it came through, exactly.

A network of n connections is a sum over 2^n paths: each goes around every branch or through it
(Veit et al. 2016, arXiv:1605.06431, section 3). With every branch linearised at the operating point
the gradient at the start is the sum of `g_k`, what all paths through exactly k branches carry. One
recursion on the way back gives them all at once: `v_k <- S^T v_k + A^T v_(k-1)`, S the Jacobian of
the skip and of all that lies between connections, A that of the branch: n(n+1)/2 products.

Two questions, two readings. Coherent, `|g_k|^2`: the length of the sum. Incoherent: the sum over
the paths of `|g_p|^2`, as if each path were alone; what cancels between paths still counts.

Letters: n connections, K vectors at once, one for each length or path.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from addnorm.contract import unknown
from addnorm.probe.discover import discover
from addnorm.probe.losses import Loss, Progress, call_model, loss_of
from addnorm.probe.pieces import Cut, Network, floats, merged, once
from addnorm.probe.purity import untouched, unwrap
from addnorm.probe.structure import Structure
from addnorm.probe.tap import Point, tapped

Incoherent = Literal["auto", "exact", "sample", "off"]
WAYS = ("auto", "exact", "sample", "off")
EXACT = 12  # connections up to which paths are enumerated
PASSED_BY = 1e-3  # share of the gradient, far above rounding, that the lengths may not explain
LEAST = 8  # samples, however long they take


@dataclass(frozen=True)
class Spectrum:
    """The gradient at the first point of the stream by path length k = 0 ... n, in plain numbers.

    `norm[k]` is `|g_k|`; `share[k]` is `<g_k, g> / |g|^2`, with a sign, and sums to 1.
    `incoherent[k]` is the sum over the paths of length k of `|g_p|^2`; `incoherent_error` its
    standard error, 0 where all paths were enumerated; both are empty when that was left out.
    """

    names: list[str]  # of the connections, in order
    gradient: float  # |g|
    loss: float
    loss_kind: str
    norm: list[float]
    share: list[float]
    check: float  # |sum_k g_k - g| / |g|, g by an ordinary backward pass
    incoherent: list[float]
    incoherent_error: list[float]
    incoherent_kind: str  # exact, sampled or off
    samples: int
    products: int  # vector-Jacobian products with a branch for the coherent reading, n(n+1)/2
    memory: int  # bytes of the vectors that were held at once, at most
    note: str
    seed: int
    seconds: float

    @property
    def mean_length(self) -> float:
        """The mean path length by coherent energy, `sum k |g_k|^2 / sum |g_k|^2`."""
        return _mean([x * x for x in self.norm])

    @property
    def mean_length_incoherent(self) -> float:
        """The mean path length by incoherent energy; NaN when that was left out."""
        return _mean(self.incoherent)

    def range(self, part: float = 0.9, *, incoherent: bool = False) -> tuple[int, int]:
        """Return the fewest lengths in a row that hold this part of the energy: first and last.

        `part` between 0 and 1, 1 included. Raises `ValueError` for another, or when the incoherent
        reading was left out.
        """
        if not 0 < part <= 1:
            raise ValueError(f"part {part} must be above 0 and at most 1")
        energy = self.incoherent if incoherent else [x * x for x in self.norm]
        if not energy:
            raise ValueError("the incoherent reading was left out; ask for incoherent='sample'")
        return _range(energy, part)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the derived ones included."""
        derived: dict[str, Any] = {
            "mean_length": self.mean_length,
            "mean_length_incoherent": self.mean_length_incoherent,
            "range_90": list(self.range(0.9)),
            "range_95": list(self.range(0.95)),
        }
        if self.incoherent:
            derived["incoherent_range_90"] = list(self.range(0.9, incoherent=True))
            derived["incoherent_range_95"] = list(self.range(0.95, incoherent=True))
        return asdict(self) | derived


def _mean(energy: list[float]) -> float:
    total = sum(energy)
    return sum(k * e for k, e in enumerate(energy)) / total if total > 0 else math.nan


def _range(energy: list[float], part: float) -> tuple[int, int]:
    """Return the shortest interval with this part of the energy; of equal ones the fullest."""
    total = sum(energy)
    for width in range(1, len(energy) + 1):
        starts = range(len(energy) - width + 1)
        best = max(starts, key=lambda i: sum(energy[i : i + width]))
        if sum(energy[best : best + width]) >= part * total * (1 - 1e-12):
            return best, best + width - 1
    return 0, len(energy) - 1


def spectrum(
    model: nn.Module,
    inputs: Any,
    targets: Any = None,
    *,
    loss: Loss | None = None,
    incoherent: Incoherent = "auto",
    samples: int = 64,
    budget: float = 60.0,
    seed: int = 0,
    progress: Progress | None = None,
    structure: Structure | None = None,
) -> Spectrum:
    """Return how much of the gradient each path length carries, coherently and incoherently.

    `inputs`, `targets` and `loss` as in `xray`. The branches are those of `structure`, or of what
    `discover` finds; a connection inside another's branch belongs to that branch. What lies between
    connections (a norm behind the addition, a ReLU, a projected shortcut) belongs to the skip. A
    stream of several tensors, or a history of them, counts as one vector.

    `incoherent`: "exact" enumerates the paths, up to 12 connections; "sample" puts a random sign
    on every branch, `samples` times: over the signs the paths are uncorrelated, so `|g_k|^2` is
    then the sum over the paths in expectation; "auto" enumerates where that is possible and fits
    in `budget` seconds. Samples end with the budget, 8 are always taken.

    Runs in evaluation mode, two forward passes; memory is that of the activations and of `memory`.
    Nothing in the model changes.

    Raises `ValueError` where the sum over the lengths is not the gradient, where the gradient is 0
    or not finite, and for settings out of their range.
    """
    began = time.monotonic()
    if incoherent not in WAYS:
        raise ValueError(unknown("incoherent", incoherent, WAYS))
    if samples < 2:
        raise ValueError(f"samples {samples} must be at least 2, or there is no error estimate")
    model = unwrap(model)
    structure = structure or discover(model, inputs)
    outer = _outer(structure, incoherent)
    n = len(outer)
    told = progress or (lambda _done, _total: None)
    with untouched(model), torch.enable_grad():
        model.eval()
        cut = Cut(outer)
        with tapped(model, structure, cut):
            value, kind = loss_of(call_model(model, inputs), targets, loss)
        net = Network(cut, value)
        whole = _ordinary(model, structure, inputs, targets, loss, outer[0])
        by_length = _by_length(net, whole, structure.names[outer[0]])
        if incoherent == "auto":
            incoherent = _affordable(n, time.monotonic() - began, budget)
        energy, error, taken = [], [], 0
        if incoherent == "exact":
            told(1, 2)
            energy, error = net.enumerate(), [0.0] * (n + 1)
            told(2, 2)
        elif incoherent == "sample":
            energy, error, taken = _sampled(net, samples, seed, began + budget, told)
        else:
            told(1, 1)
    note = ""
    if 0 < taken < samples:
        note = f"the budget of {budget:g} s ended after {taken} of {samples} samples"
    return Spectrum(
        names=[structure.names[k] for k in outer],
        gradient=float(_norm(whole)),
        loss=float(value.detach()),
        loss_kind=kind,
        **by_length,
        incoherent=energy,
        incoherent_error=error,
        incoherent_kind="sampled" if incoherent == "sample" else incoherent,
        samples=taken,
        memory=net.most,
        note=note,
        seed=seed,
        seconds=time.monotonic() - began,
    )


def _outer(structure: Structure, incoherent: Incoherent) -> list[int]:
    """Return the connections that lie inside no other's branch."""
    outer = [k for k, join in enumerate(structure.joins) if join.inside is None]
    if not outer:
        raise ValueError("no connection was found: there is only one path")
    if incoherent == "exact" and len(outer) > EXACT:
        raise ValueError(
            f"incoherent='exact' enumerates 2^{len(outer)} paths; above {EXACT} connections say "
            "'sample'"
        )
    return outer


def _affordable(n: int, spent: float, budget: float) -> Incoherent:
    """Return "exact" where all paths are likely to fit in the budget, else "sample"."""
    ahead = spent * (2**n - 1) / (n * (n + 1) // 2)  # by the products that took what was spent
    return "exact" if n <= EXACT and ahead < max(budget - spent, 1.0) else "sample"


def _by_length(net: Network, whole: Tensor, first: str) -> dict[str, Any]:
    """Return `|g_k|`, the signed shares, and how far the g_k are from summing to the gradient."""
    size = float(_norm(whole))
    if not 0 < size < math.inf:
        raise ValueError(f"the gradient at {first} is {size:g}: no spectrum")
    rows = net.lengths()
    by_length = [_flat(rows, k) for k in range(len(net.pieces) + 1)]
    check = float(_norm(sum(by_length) - whole)) / size
    eps = max(torch.finfo(t.dtype).eps for t in net.points[0])
    if not check <= min(0.1, PASSED_BY * max(1.0, eps / torch.finfo(torch.float32).eps)):
        raise ValueError(
            f"the path lengths sum to the gradient only up to {check:.1e}: the gradient passes "
            "the connections by, or a second pass gives another; give "
            "structure=discover(model, inputs, blocks=...)"
        )
    return {
        "norm": [float(_norm(g)) for g in by_length],
        "share": [float(torch.dot(g, whole)) / size**2 for g in by_length],
        "check": check,
        "products": net.products,
    }


def _sampled(
    net: Network, samples: int, seed: int, deadline: float, told: Progress
) -> tuple[list[float], list[float], int]:
    """Return the incoherent energy from random signs on the branches, its error, how many."""
    n, drawn = len(net.pieces), []
    draw = torch.Generator().manual_seed(seed)
    told(1, 1 + samples)
    for taken in range(1, samples + 1):
        signs = (torch.randint(0, 2, (n,), generator=draw) * 2 - 1).tolist()
        rows = net.lengths(signs)
        drawn.append([float(_norm(_flat(rows, k))) ** 2 for k in range(n + 1)])
        told(1 + taken, 1 + samples)
        if taken >= min(LEAST, samples) and time.monotonic() > deadline:
            break
    table = torch.tensor(drawn, dtype=torch.float64)
    return table.mean(0).tolist(), (table.std(0) / math.sqrt(len(table))).tolist(), len(table)


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm


def _flat(rows: list[Tensor], k: int) -> Tensor:
    """Return the k-th vector of a stream of several tensors, in float64."""
    return torch.cat([t[k].flatten().double() for t in rows])


def _ordinary(
    model: nn.Module, structure: Structure, inputs: Any, targets: Any, loss: Loss | None, first: int
) -> Tensor:
    """Return the gradient at the first point of the stream by one ordinary backward pass."""
    entered: list[Tensor] = []

    def note(k: int, point: Point) -> None:
        if k == first:
            entered.extend(once(floats(point.stream)))

    with tapped(model, structure, note):
        value, _ = loss_of(call_model(model, inputs), targets, loss)
    if not value.requires_grad:
        return torch.zeros(1, dtype=torch.float64)
    found = torch.autograd.grad(value, entered, allow_unused=True)
    parts = [torch.zeros_like(t) if g is None else g for g, t in zip(found, entered, strict=True)]
    return torch.cat([p.flatten().double() for p in merged(parts, entered)])
