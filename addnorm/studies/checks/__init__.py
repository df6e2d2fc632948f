"""The checks of the errata that a computation of a second can decide, by document.

Each takes the thing that is wrong as its default argument, and says with measured numbers whether
the erratum holds for it. Given the healthy counterpart it does not hold; the tests try both. The
sick layers are those of `addnorm.twins`; nothing is trained. Shapes: tokens `(B, T, D)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from addnorm.studies.checks import doc000, doc001, doc002, doc003, doc004
from addnorm.studies.checks.parts import Proof

CHECKS: Mapping[str, Callable[..., Proof]] = {
    name: check
    for document in (doc000, doc001, doc002, doc003, doc004)
    for name, check in vars(document).items()
    if getattr(check, "__module__", "") == document.__name__ and not name.startswith("_")
}


def prove(name: str) -> Proof:
    """Return the proof of a check on what the document has, with a seed of its own.

    Raises `KeyError` for an unknown name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CHECKS[name]()
