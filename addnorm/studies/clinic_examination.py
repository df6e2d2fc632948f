"""The examination of a block or drawing in the clinic (ST-20): what it passes, what it fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from addnorm.probe.lint import lint
from addnorm.probe.trace import Finding
from addnorm.studies import drawings
from addnorm.studies.clinic_cases import RATE, Case, D, same

CLOSE = 1e-4  # relative: two computations of the same are closer than this
# What is looked at, by name; a check that does not apply is passed.
CHECKS = (
    "built",  # it can be built and called
    "skip",  # with silent branches the stream comes out, and the linter says no other
    "jacobian",  # with silent branches the Jacobian is that of the stream: I, unless post-norm
    "input",  # the caller's tensor is not changed
    "steady",  # with silent branches nothing is random in training
    "trains",  # a gradient comes back from two in a row
    "apart",  # entries that must not see one another do not
    "norm",  # a norm divides by the variance, and not by D - 1
    "dropout",  # dropout falls on what is added
    "repeat",  # asked twice, it answers the same
    "edges",  # no edge twice, and no addition with one input
    "agree",  # what describes the same thing computes the same
    "lines",  # the cited lines hold what they are cited for
)


def examined(case: Case) -> dict[str, Any]:
    """Return for each check whether it is passed, and `errors`, `left` and `parameters`."""
    found: dict[str, Any] = dict.fromkeys(CHECKS, True)
    found |= {"errors": "", "left": 0.0, "parameters": 0}
    found["repeat"] = case.listing is None or _repeats(case.listing)
    found["edges"] = not drawings.doubled(case.edges) and not drawings.lonely(case.edges)
    found["lines"] = all(a <= c and d <= b for (a, b), (c, d) in case.cited)
    if case.make is None:
        return found
    x = torch.randn(2, 4, 6, 6) if case.images else torch.randn(3, 5, D)
    try:
        block = case.make().eval()
        block(x.clone())
    except (AssertionError, NameError, TypeError) as error:
        return found | {"built": False, "errors": str(error)}
    found["parameters"] = sum(p.numel() for p in block.parameters())
    findings = [f for axis in case.axes for f in lint(block, x, batch_dim=axis)]
    for check, code in LINTED.items():
        found[check] = not any(f.code == code for f in findings)
    found["errors"] = _errors(block, x)
    if case.stream is not None:
        silenced = silent(block)
        found["left"] = _distance(silenced(x.double()), case.stream(x.double()))
        found["skip"] = found["left"] < CLOSE and not _objections(findings, case.stream is same)
        small = x[:1, :2, :2, :2] if case.images else x[:1, :2]
        if case.images:
            small = torch.randn(1, 4, 2, 2)
        found["jacobian"] = (
            _distance(_jacobian(silenced, small), _jacobian(case.stream, small)) < CLOSE
        )
    with torch.no_grad():
        found["agree"] = all(_distance(other(x), block(x.clone())) < CLOSE for other in case.others)
    if case.drops:
        lost = (block.train()(x) == x).double().mean()
        found["dropout"] = abs(float(lost) - RATE) < RATE / 2
    return found  # fmt: skip


LINTED = {
    "input": "mutated-input",
    "steady": "stream-dropout",
    "trains": "unstackable",
    "apart": "mixed-batch",
    "norm": "unbiased-norm",
}


def _objections(findings: Sequence[Finding], alone: bool) -> list[Finding]:
    """Return what the linter says against the skip; a note is none where the stream is normed."""
    return [
        f
        for f in findings
        if f.code in ("broken-skip", "changed-skip") and (alone or f.severity != "note")
    ]


def silent(block: nn.Module) -> nn.Module:
    """Return a float64 copy in evaluation whose matrices and kernels, and their biases, are 0."""
    made = copy.deepcopy(block).double().eval()
    for module in made.modules():
        own = list(module.parameters(recurse=False))
        if any(p.dim() > 1 for p in own):
            for parameter in own:
                nn.init.zeros_(parameter)
    return made.requires_grad_(False)


def _distance(one: Tensor, other: Tensor) -> float:
    """Return |one - other| over |other|."""
    return float(((one - other).norm() / other.norm()).detach())


def _jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the Jacobian at x by central differences, which an operation in place cannot stop."""
    x, step = x.double(), 1e-5
    columns = []
    for direction in torch.eye(x.numel(), dtype=torch.float64).view(-1, *x.shape):
        ahead, behind = function(x + step * direction), function(x - step * direction)
        columns.append((ahead - behind).flatten() / (2 * step))
    return torch.stack(columns, -1)


def _errors(block: nn.Module, x: Tensor) -> str:
    """Return what goes wrong on a leaf that asks for a gradient, and through two in a row."""

    def leaf() -> None:
        """Call it on a leaf."""
        block(x.clone().requires_grad_())

    def twice() -> None:
        """Send a gradient through two."""
        start = x * torch.ones((), requires_grad=True)
        total: Tensor = block(block(start)).square().sum()
        total.backward()  # type: ignore[no-untyped-call]

    said = []
    for tried in (leaf, twice):
        try:
            tried()
        except RuntimeError as error:
            said.append(str(error))
    return "; ".join(said)


def _repeats(listing: Callable[[nn.Module, Callable[[], Tensor]], dict[str, float]]) -> bool:
    """Whether the gradients of one network are listed alike twice."""
    model, x = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 1)), torch.randn(4, 3)
    first, second = (listing(model, lambda: model(x).square().mean()) for _ in range(2))
    return all(abs(second[name] / value - 1) < CLOSE for name, value in first.items())
