"""What is known of a wiring: the facts that its class states, what is measured, what is drawn.

The catalogue on the command line, the pages under docs/ and the tests read it here.
"""

from __future__ import annotations

import functools
import inspect
import re
import tomllib
import typing
from importlib import resources
from typing import Any, Literal

from addnorm.contract import (
    Drawing,
    Spec,
    Wiring,
    catalogue,
    kinds_of,
    literal,
    options_of,
    parse_spec,
)
from addnorm.cost import Polynomial, cost, parameters

WIDTH = 768  # D at which costs are stated as numbers
KINDS = {int: "whole number", float: "number", bool: "true or false", str: "word"}


def facts_of(wiring: str | Spec, *, brief: bool = False) -> dict[str, Any]:
    """Return the facts of a wiring with its options, as plain values.

    `cost` holds `parameters`, `flops` and `traffic` per connection (see `addnorm.cost.measure`);
    `brief` leaves out the last two, which take longer. Raises `ValueError` for a spec that cannot
    be read or whose options do not fit together.
    """
    spec = parse_spec(wiring) if isinstance(wiring, str) else wiring
    kind = spec.wiring
    costs = {"parameters": parameters(spec)} if brief else vars(cost(spec))
    own, entry = family(kind) == "own", bibtex(kind.paper)
    return {
        "name": spec.name,
        "spec": str(spec),
        "family": family(kind),
        "equation": kind.equation,
        "paper": kind.paper,
        "year": kind.year,
        "bibtex": entry,
        "cite": key_of(entry) if entry else None,
        "options": _options(spec),
        "starts_as": kind.at_start,
        "start": kind.start,
        "asks": {name: literal(value) for name, value in kind.asks.items()},
        "final_norm": kind.final_norm,
        "stream_law": kind.stream_law,
        "gradient_law": kind.gradient_law,
        "expected": sorted(kind.expected),
        "ships": kind.ships,
        "verified": None if own else kind.verified,  # ours are held against their sources
        "cost": {name: _formula(polynomial) for name, polynomial in costs.items()},
        "diagram": "" if own and "drawing" not in vars(kind) else draw(kind.drawing),
        "about": inspect.cleandoc(kind.__doc__ or ""),
        "chinese": {} if own else chinese(spec.name),
    }


def all_facts(*, brief: bool = False) -> list[dict[str, Any]]:
    """Return the facts of every wiring of the catalogue, in its order."""
    return [facts_of(Spec(name), brief=brief) for name in catalogue()]


def family(wiring: type[Wiring]) -> str:
    """Return the name of the family file that a wiring stands in; `own` for a user's."""
    home, _, file = wiring.__module__.rpartition(".")
    return file if home == "addnorm.wirings" else "own"


def bibtex(paper: str) -> str | None:
    """Return the entry of references.bib for what a wiring states as its paper, or None.

    It is found by the arXiv number, or by the address of a repository on GitHub.
    """
    found = re.search(r"arXiv:([\d.]+\d)|(github\.com/[\w-]+/[\w.-]+\w)", paper)
    if found is None:
        return None
    number, address = found.groups()
    wanted = f"= {{{number}}}," if number else f"= {{https://{address}}},"
    return next((entry for entry in references() if wanted in entry), None)


def key_of(entry: str) -> str:
    """Return the key of a BibTeX entry."""
    return entry.partition("{")[2].partition(",")[0]


@functools.cache
def references() -> tuple[str, ...]:
    """Return the entries of references.bib."""
    text = resources.files("addnorm.wirings").joinpath("references.bib").read_text("utf-8")
    return tuple(re.findall(r"^@\w+\{.*?^\}", text, re.M | re.S))


def chinese(name: str) -> dict[str, str]:
    """Return what zh.toml says of a wiring: `about`, and facts that hold English words.

    Raises `KeyError` for a wiring without an entry.
    """
    return _chinese()[name]


@functools.cache
def _chinese() -> dict[str, dict[str, str]]:
    text = resources.files("addnorm.wirings").joinpath("zh.toml").read_text("utf-8")
    return tomllib.loads(text)


def draw(drawing: Drawing) -> str:
    """Draw a connection: the stream through the branch, and below it the path that skips it.

    x ──┬── N ── F ── gamma ──(+)── x
        └──────────────────────┘
    """
    above = [part for part in (drawing.read, "F", drawing.write) if part]
    through = " ── ".join(above)
    after = f"{drawing.after} ── {drawing.stream}" if drawing.after else drawing.stream
    if drawing.skip == "none":
        return f"{drawing.stream} ── {through} ── {after}"
    label = f" {drawing.skip} " if drawing.skip else ""
    # From the corner below ┬ to that below the join there are the signs of "── through ──(".
    inner = max(len(through) + 7, len(label) + 4)
    first = f"{drawing.stream} ──┬── {through} ".ljust(len(drawing.stream) + 4 + inner - 1, "─")
    below = " " * (len(drawing.stream) + 3) + f"└{label.center(inner, '─')}┘"
    return f"{first}({drawing.join})── {after}\n{below}"


def _formula(polynomial: Polynomial) -> dict[str, Any]:
    """Return a cost as text, as coefficients of D^2, D and 1, and as a number."""
    coefficients = [float(c) for c in (polynomial.a, polynomial.b, polynomial.c)]
    at = polynomial.at(WIDTH)
    return {"formula": str(polynomial), "coefficients": coefficients, f"at_{WIDTH}": at}


def _options(spec: Spec) -> dict[str, dict[str, Any]]:
    """Return by option its value, its default, and what it may be."""
    kinds = kinds_of(spec.wiring)
    found = {}
    for name, option in options_of(spec.wiring).items():
        kind = kinds[name]
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        low, high = spec.wiring.limits.get(name, (None, None))
        found[name] = {
            "value": literal(spec.options.get(name, option.default)),
            "default": literal(option.default),
            "kind": "word" if choices else KINDS[kind],
            "choices": list(choices),
            "least": None if low in (None, -float("inf")) else low,
            "most": None if high in (None, float("inf")) else high,
        }
    return found
