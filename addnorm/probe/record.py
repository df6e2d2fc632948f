"""What a forward pass does, as a graph: a node for every call, with those its tensors come from.

Every addition of two tensors is noted as a `Sum`; whether it is a connection, `graph` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from addnorm.probe.spelling import STACKED, function_name, in_place, operands
from addnorm.probe.structure import Place
from addnorm.probe.tap import Chain, Frames, Key, is_float

# What a tensor is that is no node of the graph.
CONSTANT, WEIGHT, SIDE = -1, -2, -3  # SIDE: made of the input's integers only, such as a mask

NORMS = frozenset(
    {
        "layer_norm",
        "rms_norm",
        "batch_norm",
        "group_norm",
        "instance_norm",
        "local_response_norm",
        "normalize",
        "native_layer_norm",
        "native_batch_norm",
        "rsqrt",
        "std",
        "var",
        "std_mean",
        "var_mean",
        "norm",
        "vector_norm",
        "linalg_norm",
        "linalg_vector_norm",
    }
)

# Functions that scale, shift, select or arrange: with a parameter among their arguments they are
# still no map, so the skip may pass them and the update gains nothing by them.
PLAIN = NORMS | frozenset(
    {
        "add",
        "sub",
        "mul",
        "div",
        "true_divide",
        "divide",
        "multiply",
        "floor_divide",
        "lerp",
        "addcmul",
        "addcdiv",
        "where",
        "pow",
        "maximum",
        "minimum",
        "max",
        "min",
        "clamp",
        "clip",
        "copy_",
        "fill_",
        "masked_fill",
        "prelu",
        "cat",
        "concat",
        "concatenate",
        "stack",
        "hstack",
        "vstack",
        "index_put",
        "index_copy",
        "index_add",
        "index_fill",
        "scatter",
        "scatter_add",
        "scatter_reduce",
        "gather",
        "index_select",
        "take_along_dim",
        "select",
        "slice",
        "narrow",
        "getitem",
        "setitem",
        "expand",
        "expand_as",
        "view",
        "view_as",
        "reshape",
        "reshape_as",
        "type_as",
        "to",
        "pad",
        "roll",
        "repeat",
        "repeat_interleave",
        "tile",
        "broadcast_tensors",
        "broadcast_to",
        "masked_scatter",
        "masked_select",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "allclose",
        "equal",
        "isclose",
        "sum",
        "mean",
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "dropout",
        "rsub",
        "rdiv",
        "rtruediv",
        "rpow",
        "iadd",
        "isub",
        "imul",
        "idiv",
        "itruediv",
        "sigmoid",
        "tanh",
        "softmax",
        "exp",
    }
)


# What bends: an activation, an attention. A projected shortcut does not, its branch does.
BENDS = frozenset(
    {
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "sigmoid",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "tanh",
        "softplus",
        "softsign",
        "logsigmoid",
        "softmax",
        "log_softmax",
        "prelu",
        "rrelu",
        "glu",
        "threshold",
        "exp",
        "erf",
        "abs",
        "clamp",
        "clip",
        "maximum",
        "minimum",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "scaled_dot_product_attention",
        "multi_head_attention_forward",
        "lstm",
        "gru",
    }
)
PRODUCTS = frozenset({"mul", "matmul", "bmm", "einsum"})  # of two tensors that are no weights


class Sum(NamedTuple):
    """One addition that was seen: its node, its operands, and which of them may be the skip."""

    node: int
    pair: tuple[int, int]
    shapes: tuple[torch.Size, torch.Size]
    skips: tuple[int, ...]


@dataclass
class Call:
    """One call of a module that is watched: a wiring, or one that may be taken whole."""

    path: str
    call: int
    before: int  # nodes so far, when it was entered and when it was left
    after: int = 0
    entered: torch.Size | None = None
    left: torch.Size | None = None
    branch: int | None = None  # node that the branch of a wiring returned
    returned: tuple[int, ...] = ()  # nodes that left it


class Recorder(TorchFunctionMode):
    """Writes down the graph of a forward pass, as ancestor sets in the bits of integers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.frames = Frames(model)
        self.ancestors: list[int] = []  # bits: itself and all that it is made of
        self.reach: list[int] = []  # bits: itself and what it comes from through no map
        self.places: list[Place | None] = []
        self.chains: list[Chain] = []
        self.maps = 0  # bits: the parameterised maps
        self.norms = 0
        self.bends = 0  # bits: what is not linear in the input
        self.mutated: set[int] = set()
        self.sums: list[Sum] = []
        self.opaque: Counter[str] = Counter()
        self._nodes: Any = WeakTensorKeyDictionary()  # tensor -> (node, version)
        self._changed: Any = (
            WeakTensorKeyDictionary()
        )  # base of a view -> node of its latest change
        self._stacks: dict[int, tuple[tuple[int, int], torch.Size, int]] = {}
        self._makers: dict[Any, int] = {}  # grad_fn -> node, for what runs out of sight
        self._chain: Chain = ()

    def take_inputs(self, args: Any) -> None:
        """Enter the tensors among the model's arguments as the first nodes."""
        for index, leaf in enumerate(pytree.tree_leaves(args)):
            if isinstance(leaf, Tensor):
                node = SIDE
                if is_float(leaf):
                    node = self._node((), False, False, Place("", 0, "input", index))
                self._bind(leaf, node)

    def node_of(self, tensor: Tensor) -> int:
        """Return the node of a tensor, or what it is instead."""
        known = self._nodes.get(tensor)
        if known is None:
            if isinstance(tensor, nn.Parameter):
                return WEIGHT
            if tensor.grad_fn is None or not is_float(tensor):
                return CONSTANT
            return self._out_of_sight(tensor)
        node, version = known
        if _version(tensor) != version:  # changed through another view of the same memory
            base = tensor if tensor._base is None else tensor._base
            other = self._changed.get(base)
            if other is not None and other >= 0:
                node = self._node(tuple(n for n in (node, other) if n >= 0), False, False, None)
            self._bind(tensor, node)
        return int(node)

    def _out_of_sight(self, tensor: Tensor) -> int:
        """Enter a tensor that scripted code or a custom function made, by its autograd graph."""
        parents, weights, seen = [], False, set()
        ahead = [tensor.grad_fn]
        while ahead:
            maker = ahead.pop()
            if maker is None or maker in seen:
                continue
            seen.add(maker)
            known = self._makers.get(maker)
            if known is not None:
                parents.append(known)
                continue
            variable = getattr(maker, "variable", None)
            if isinstance(variable, nn.Parameter):
                weights = True
            elif isinstance(variable, Tensor):
                known = self._nodes.get(variable)
                parents += [known[0]] if known and known[0] >= 0 else []
            ahead += [following for following, _ in maker.next_functions]
        if not parents and not weights:
            return CONSTANT
        self.opaque[type(tensor.grad_fn).__name__.removesuffix("Backward")] += 1
        node = self._node(tuple(parents), weights, False, None)
        self.bends |= 1 << node  # for all that is known
        self._bind(tensor, node)
        return node

    def _bind(self, tensor: Tensor, node: int) -> None:
        self._nodes[tensor] = (node, _version(tensor))
        if node >= 0 and tensor.grad_fn is not None:
            self._makers[tensor.grad_fn] = node

    def _node(self, parents: tuple[int, ...], maps: bool, norm: bool, place: Place | None) -> int:
        node = len(self.ancestors)
        bit = 1 << node
        ancestors = reach = bit
        for parent in set(parents):
            ancestors |= self.ancestors[parent]
            if not maps:
                reach |= self.reach[parent]
        self.ancestors.append(ancestors)
        self.reach.append(reach)
        self.places.append(place)
        self.chains.append(self.frames.stack[-1].chain if self.frames.stack else ())
        self.maps |= bit if maps else 0
        self.norms |= bit if norm else 0
        return node

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function and enter what it returns."""
        kwargs = kwargs or {}
        name = function_name(func) if self.frames.stack else None
        if name is None:
            return func(*args, **kwargs)
        key = self.frames.place(name)
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        found = [self.node_of(t) for t in tensors]
        out = func(*args, **kwargs)
        self._enter(name, key, args, kwargs, tensors, found, out)
        return out

    def _enter(
        self,
        name: str,
        key: Key,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        found: list[int],
        out: Any,
    ) -> None:
        parents = tuple(node for node in found if node >= 0)
        plain = name.strip("_") in PLAIN
        changes = in_place(name) and bool(tensors)
        outputs = [tensors[0]] if changes else pytree.tree_leaves(out)
        if changes:
            self.mutated.update(node for node in found[:1] if node >= 0)
        pair = self._pair(name, args, kwargs, found, tensors) if parents else None
        if pair is not None:
            parents = (*parents, *(node for node in pair[0] if node >= 0))
        for index, tensor in enumerate(outputs):
            if not isinstance(tensor, Tensor):
                continue
            node = CONSTANT
            if not is_float(tensor):
                node = SIDE if parents or SIDE in found else CONSTANT
            elif parents or (WEIGHT in found and SIDE in found):
                maps = WEIGHT in found and (not plain or not parents)
                norm = name.strip("_") in NORMS
                node = self._node(parents, maps, norm, Place(*key, index))
                if name.strip("_") in BENDS or (name in PRODUCTS and len(set(parents)) > 1):
                    self.bends |= 1 << node
                if pair is not None and tensor.dim() > 1:
                    self.sums.append(Sum(node, *pair))
                if name == "stack":
                    self._remember(node, args, kwargs, tensor)
            elif SIDE in found or WEIGHT in found:
                node = SIDE if SIDE in found else WEIGHT
            self._bind(tensor, node)
            if changes and tensor._base is not None:
                self._changed[tensor._base] = node
            elif changes:
                self._changed[tensor] = node

    def _pair(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: list[int],
        tensors: list[Tensor],
    ) -> tuple[tuple[int, int], tuple[torch.Size, torch.Size], tuple[int, ...]] | None:
        """Return the nodes of the two operands, their shapes and which may be the skip."""
        if name in STACKED and found and found[0] in self._stacks:
            pair, shape, axis = self._stacks[found[0]]
            given = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
            given = given[0] if isinstance(given, tuple | list) and len(given) == 1 else given
            keep = kwargs.get("keepdim", len(args) > 2 and args[2])
            if isinstance(given, int) and not keep and given % (len(shape) + 1) == axis:
                return pair, (shape, shape), (0, 1)
            return None
        both = operands(name, args, kwargs)
        if both is None:
            return None
        first, second = both
        nodes = {id(t): node for t, node in zip(tensors, found, strict=True)}
        base = name.rstrip("_")
        if isinstance(second, Tensor):
            pair = nodes[id(first)], nodes[id(second)]
            shapes = first.shape, second.shape
        else:
            factors = [nodes[id(factor)] for factor in second]
            made = tuple(node for node in factors if node >= 0)
            if not made:
                return None
            product = base in ("addmm", "baddbmm") and WEIGHT in factors
            pair = nodes[id(first)], self._node(made, product, False, None)
            shapes = first.shape, together(*_outer(base, second))
        return pair, shapes, (0,) if base == "sub" else (0, 1)

    def _remember(
        self, node: int, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
    ) -> None:
        """Note a stack of two tensors, whose sum would be an addition."""
        parts = args[0] if args else kwargs.get("tensors", ())
        axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        if len(parts) == 2:
            first, second = (self.node_of(part) for part in parts)
            self._stacks[node] = (first, second), parts[0].shape, axis % out.dim()


def _outer(base: str, factors: tuple[Tensor, Tensor]) -> tuple[torch.Size, ...]:
    one, two = factors
    if base in ("addmm", "baddbmm"):
        return (torch.Size((*one.shape[:-1], two.shape[-1])),)
    return one.shape, two.shape


def together(*shapes: torch.Size) -> torch.Size:
    """Return the shape that shapes are broadcast to."""
    return torch.Size(np.broadcast_shapes(*shapes))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def bits(mask: int) -> Iterator[int]:
    """Yield the positions of the ones."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
