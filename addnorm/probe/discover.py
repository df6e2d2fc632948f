"""Find the connections of a module: the wirings of a stack, or the repeated block of any model."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from addnorm.contract import Stack, Wiring


@dataclass(frozen=True)
class Found:
    """The modules to watch, by name, and a sentence that says how they were found."""

    modules: dict[str, nn.Module]
    how: str
    wiring: str = ""  # spec, where they are the connections of our stacks


def find_connections(model: nn.Module, blocks: str | None = None) -> Found:
    """Return the connections of `model`, or the modules whose names match the glob `blocks`.

    Without `blocks`: every wiring of a `Stack`; else the children of lists and sequences that
    share a class and hold submodules with parameters, of the class with the most parameters.
    Raises `ValueError` when nothing is found.
    """
    named = dict(model.named_modules())
    if blocks is not None:
        chosen = {name: m for name, m in named.items() if fnmatch.fnmatchcase(name, blocks)}
        depth = min((name.count(".") for name in chosen), default=0)
        chosen = {name: m for name, m in chosen.items() if name.count(".") == depth}
        if not chosen:
            repeated = _repeated(model)
            hint = f"; the repeated block here is {_pattern(repeated)!r}" if repeated else ""
            raise ValueError(f"no module of {type(model).__name__} is named {blocks!r}{hint}")
        return Found(chosen, f"{len(chosen)} modules named {blocks}")
    wirings: dict[str, nn.Module] = {n: m for n, m in named.items() if isinstance(m, Wiring)}
    if wirings:
        specs = list(dict.fromkeys(str(m.spec) for m in named.values() if isinstance(m, Stack)))
        return Found(wirings, f"{len(wirings)} connections of our stacks", ", ".join(specs))
    repeated = _repeated(model)
    if repeated is None:
        raise ValueError(
            f"{type(model).__name__} has no repeated block that holds modules; name the blocks by "
            "a glob, for instance blocks='layers.*', or --blocks 'layers.*' on the command line"
        )
    kind = type(next(iter(repeated.values()))).__name__
    return Found(repeated, f"{len(repeated)} blocks of class {kind} ({_pattern(repeated)})")


def _repeated(model: nn.Module) -> dict[str, nn.Module] | None:
    """Return the outermost repeated block with the most parameters."""
    groups: dict[type, dict[str, nn.Module]] = defaultdict(dict)
    for parent_name, parent in model.named_modules():
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            for name, child in parent.named_children():
                composed = any(True for _ in child.children())
                if composed and not isinstance(child, nn.ModuleList):
                    groups[type(child)][f"{parent_name}.{name}".lstrip(".")] = child
    best = None
    for group in groups.values():
        if len(group) >= 2:
            size = sum(p.numel() for m in group.values() for p in m.parameters())
            if best is None or size > best[0]:
                best = (size, group)
    if best is None:
        return None
    # A block inside a block of the same class is part of the outer one.
    names = set(best[1])
    parents = {n: [n[:i] for i, c in enumerate(n) if c == "."] for n in names}
    return {n: m for n, m in best[1].items() if not names.intersection(parents[n])}


def _pattern(group: dict[str, nn.Module] | None) -> str:
    return next(iter(group)).rpartition(".")[0] + ".*" if group else ""


ADDITIONS = (torch.ops.aten.add, torch.ops.aten.add_)


class Additions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches one wiring at a time for the addition that joins its branch to the stream.

    What descends from the branch's output is followed through every operation; the first addition
    of a descendant to something of the same shape that does not descend from it is the connection:
    `skip + update`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._descendants: dict[int, Tensor] = {}  # held, so that an id is not used again
        self._joined: tuple[Tensor, Tensor] | None = None

    def branch_returned(self, output: Tensor) -> None:
        """Begin to follow the output of the branch."""
        self._descendants = {id(output): output}
        self._joined = None

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Return `(skip, update)` of the addition that was seen, if any, and forget it."""
        joined, self._joined = self._joined, None
        self._descendants = {}
        return joined

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation and note whether it is the addition."""
        if not self._descendants:
            return func(*args, **(kwargs or {}))
        in_place = func.overloadpacket is torch.ops.aten.add_
        before = args[0].detach().clone() if in_place else None
        out = func(*args, **(kwargs or {}))
        tensors = [a for a in pytree.tree_leaves(args) if isinstance(a, Tensor)]
        if any(id(t) in self._descendants for t in tensors):
            if self._joined is None and func.overloadpacket in ADDITIONS and len(tensors) == 2:
                self._joined = self._operands(tensors, (kwargs or {}).get("alpha", 1), before)
            for tensor in pytree.tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self._descendants[id(tensor)] = tensor
        return out

    def _operands(
        self, pair: list[Tensor], alpha: float, before: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Return `(skip, update)`, or None where both or neither descend from the branch."""
        follows = [id(t) in self._descendants for t in pair]
        a, b = pair[0].detach() if before is None else before, pair[1].detach() * alpha
        if a.shape != b.shape or follows[0] == follows[1]:
            return None
        return (a, b) if follows[1] else (b, a)
