"""Where `watch` measures: the connections of a model at module level, without running it."""

from __future__ import annotations

import fnmatch
import itertools
from dataclasses import dataclass, replace

from torch import nn

from addnorm.contract import Stack, Wiring
from addnorm.probe.discover import repeated_blocks


@dataclass(frozen=True)
class Place:
    """A connection at module level: one of our wirings, or a block of anyone's model."""

    path: str
    label: str  # layer_3, or with several connections in a layer layer_3.1
    module: nn.Module
    wiring: Wiring | None
    following: int | None  # the connection whose stream in is this one's stream out


def find_places(model: nn.Module, blocks: str | None) -> list[Place]:
    """Return the connections in order. Raises `ValueError` where there are none."""
    named = dict(model.named_modules())
    if blocks is not None:
        chosen = {n: m for n, m in named.items() if fnmatch.fnmatchcase(n, blocks)}
        depth = min((n.count(".") for n in chosen), default=0)
        chosen = {n: m for n, m in chosen.items() if n.count(".") == depth}
    else:
        chosen = {n: m for n, m in named.items() if isinstance(m, Wiring)}
        chosen = chosen or repeated_blocks(model) or {}
    if not chosen:
        what = f"named {blocks!r}" if blocks is not None else "that is a wiring or repeats"
        raise ValueError(
            f"{type(model).__name__} has no module {what}; name its blocks by a glob over module "
            "names, for instance watch(model, blocks='layers.*')"
        )
    after = _following(model, list(chosen.values()))
    places = []
    for i, (path, module) in enumerate(chosen.items()):
        wiring = module if isinstance(module, Wiring) else None
        label = f"layer_{i}"
        if wiring is not None and wiring.site.parts > 1:
            label = f"layer_{wiring.site.layer}.{wiring.site.part}"
        places.append(Place(path, label, module, wiring, after.get(i)))
    if len({p.label for p in places}) < len(places):  # several networks beside each other
        places = [replace(p, label=f"layer_{i}") for i, p in enumerate(places)]
    return places


def _following(model: nn.Module, chosen: list[nn.Module]) -> dict[int, int]:
    """Return by connection of our stacks the next one of its stack."""
    order = {module: i for i, module in enumerate(chosen)}
    after: dict[int, int] = {}
    for stack in (m for m in model.modules() if isinstance(m, Stack)):
        row = [order[c] for c in stack if c in order]
        if len(row) == len(stack):
            after |= dict(itertools.pairwise(row))
    return after


def modules_around(model: nn.Module, places: list[Place]) -> list[nn.Module]:
    """Return the modules that hold all connections, the outermost first."""
    parents = [place.path.split(".")[:-1] for place in places]
    common = [names[0] for names in zip(*parents, strict=False)]
    for i, names in enumerate(zip(*parents, strict=False)):
        if len(set(names)) > 1:
            common = common[:i]
            break
    paths = [".".join(common[:i]) for i in range(len(common) + 1)]
    lists = (nn.ModuleList, nn.ModuleDict)  # never called
    return [m for path in paths if not isinstance(m := model.get_submodule(path), lists)]
