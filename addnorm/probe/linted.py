"""The linter's part in the X-ray: one block of those that repeat, as the model calls it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from addnorm.contract import Wiring
from addnorm.probe.discover import repeated_blocks
from addnorm.probe.lint import lint
from addnorm.probe.purity import sharded
from addnorm.probe.structure import Structure
from addnorm.probe.trace import Finding

# What neither the vitals nor a block of its own kind can show. Whether entries of the batch mix is
# left to `lint`: a model does not say which axis of a block's input is the batch.
ASKED = ("mutated-input", "stream-dropout", "unbiased-norm")


class Called:
    """The first of the blocks that repeat, and what the model called it with."""

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        group = {} if structure.wiring or sharded(model) else repeated_blocks(model) or {}
        self.name: str = next(iter(group), "")
        self.block: nn.Module | None = group.get(self.name)
        if self.block is not None and any(isinstance(m, Wiring) for m in self.block.modules()):
            self.block = None  # ours: its formula is tested
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Keep a copy of the arguments of the block's first call."""
        if self.block is None:
            yield
            return

        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.arguments is None:
                self.arguments = pytree.tree_map(_copied, (args, kwargs))

        handle = self.block.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def example(self) -> Any:
        """Return the arguments as `lint` takes them, without objects that may be None: a cache.

        Raises `TypeError` where they cannot be given by name.
        """
        assert self.block is not None
        assert self.arguments is not None
        args, kwargs = self.arguments
        if not kwargs and _plain(args):
            return args
        signature = inspect.signature(self.block.forward)
        found: dict[str, Any] = {}
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            parameter = signature.parameters[name]
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
                raise TypeError("it is called with arguments that have no name")
            if parameter.kind is parameter.VAR_KEYWORD:
                found |= value
            elif _plain(value) or parameter.default is not None:
                found[name] = value
        if not _plain(found):
            raise TypeError("it is called with objects that hold more than tensors")
        return found


def lint_called(called: Called, seed: int) -> tuple[list[Finding], tuple[str, ...]]:
    """Lint the block that was called for `ASKED`; return the findings and a note why not.

    The first block of the outermost blocks that repeat, where the model is not ours: the others are
    of its class. It costs about ten forward passes of this one block, on a copy. What the vitals
    show of every block (a broken skip), what a block of a running model cannot fail (to be called),
    and what needs the batch axis (mixed entries) is not asked here; `lint` asks it.
    """
    if called.block is None or called.arguments is None:
        return [], ()
    try:
        found = lint(called.block, called.example(), seed=seed, rules=ASKED)
    except (TypeError, ValueError) as error:
        return [], (f"{called.name} was not linted: {error}",)
    if raised := [f.value for f in found if f.code == "raises"]:
        return [], (f"{called.name} was not linted: alone it {raised[0]}",)
    kind = type(called.block).__name__
    here = [
        replace(f, where=called.name if f.where == kind else f"{called.name}.{f.where}")
        for f in found
    ]
    return here, ()


def _plain(value: Any) -> bool:
    """Whether there are only tensors, numbers, words and containers of them in a value."""
    leaves = pytree.tree_leaves(value)
    return all(isinstance(leaf, Tensor | bool | int | float | str | None) for leaf in leaves)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
