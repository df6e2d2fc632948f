"""How an addition is spelled in torch: names of functions, and what is added to what."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

# The attributes of a tensor that are tensors made of it; all others are facts such as its shape.
VIEWS = frozenset({"T", "mT", "H", "mH", "real", "imag", "data"})


def function_name(function: Any) -> str | None:
    """Return the bare name of a torch function, None for an attribute that is no tensor."""
    name: str = getattr(function, "__name__", "") or type(function).__name__
    if name == "__get__":
        attribute: str = getattr(function.__self__, "__name__", "")
        return attribute if attribute in VIEWS else None
    if name in ("__set__", "__delete__"):
        return None
    return _NAMES.get(name) or name


_NAMES = {
    "__add__": "add",
    "__radd__": "add",
    "__iadd__": "add_",
    "__sub__": "sub",
    "__isub__": "sub_",
    "subtract": "sub",
    "subtract_": "sub_",
    "__mul__": "mul",
    "__rmul__": "mul",
    "__matmul__": "matmul",
}


def in_place(name: str) -> bool:
    """Whether a function changes its first argument."""
    if name.startswith("__"):
        return name == "__setitem__" or (name[2:3] == "i" and name[3:-2] in _IN_PLACE)
    return name.endswith("_")


_IN_PLACE = {"add", "sub", "mul", "div", "truediv", "floordiv", "pow", "and", "or", "xor", "mod"}

# Functions that can be a sum of a skip and an update, besides sum and mean of a stack.
ADDITIONS = frozenset({"add", "sub", "lerp", "addcmul", "addcdiv", "addmm", "baddbmm"})
STACKED = frozenset({"sum", "mean"})


def arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]
) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    return dict(zip(names, args, strict=False)) | {
        _ALIASES.get(name, name): value for name, value in kwargs.items()
    }


_ALIASES = {"input": "self", "tensor1": "one", "tensor2": "two", "mat1": "one", "mat2": "two"} | {
    "batch1": "one",
    "batch2": "two",
    "end": "other",
}


def operands(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Return the two operands of an addition as they are given, the second without its factor.

    For a product that is added (`addmm`, `addcmul`) the second is the tuple of its factors. None
    where the call adds no two tensors.
    """
    base = name.rstrip("_")
    if base not in ADDITIONS or "out" in kwargs:
        return None
    if base in ("add", "sub", "lerp"):
        given = arguments(args, kwargs, ("self", "other", "weight"))
        pair = given.get("self"), given.get("other")
        return pair if all(isinstance(t, Tensor) for t in pair) else None
    given = arguments(args, kwargs, ("self", "one", "two"))
    factors = given.get("one"), given.get("two")
    if isinstance(given.get("self"), Tensor) and all(isinstance(t, Tensor) for t in factors):
        return given["self"], factors
    return None


def sides(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the two tensors whose sum the call of an addition returns."""
    base = name.rstrip("_")
    if base in STACKED:
        stacked: Tensor = args[0] if args else kwargs["input"]
        one, two = stacked.unbind(_axis(args, kwargs))
        return (one, two) if base == "sum" else (one / 2, two / 2)
    if base in ("add", "sub"):
        given = arguments(args, kwargs, ("self", "other"))
        factor = given.get("alpha", 1) * (-1 if base == "sub" else 1)
        other = given["other"]
        return given["self"], other if factor == 1 else factor * other
    if base == "lerp":
        given = arguments(args, kwargs, ("self", "other", "weight"))
        weight = given["weight"]
        return (1 - weight) * given["self"], weight * given["other"]
    given = arguments(args, kwargs, ("self", "one", "two"))
    scale = given.get("value", given.get("alpha", 1))
    combine = {"addcmul": operator.mul, "addcdiv": operator.truediv}.get(base, torch.matmul)
    product = combine(given["one"], given["two"])
    skip, beta = given["self"], given.get("beta", 1)
    return skip if beta == 1 else beta * skip, product if scale == 1 else scale * product


def _axis(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    axis = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
    if isinstance(axis, tuple | list):
        (axis,) = axis
    assert isinstance(axis, int)
    return axis
