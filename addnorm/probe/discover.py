"""Find the residual connections of any module in one eager forward pass.

Every call that the forward pass makes becomes a node of a graph, with the calls that it got its
tensors from. An addition is a connection when one operand, the skip, leads back through views,
casts, dropout, scaling, norms and earlier additions, but through no parameterised map, to a place
that the other operand, the update, comes from as well, and the update passes a parameterised map on
the way that the skip does not. Where both sides pass maps of their own, the one without an
activation, or with fewer maps, is a projected shortcut, unless the sum lies inside the branch of
another connection.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from addnorm.contract import Stack, Wiring
from addnorm.probe.losses import call_model
from addnorm.probe.purity import eager, untouched, unwrap
from addnorm.probe.spelling import STACKED, function_name, in_place, operands
from addnorm.probe.structure import Coverage, Join, Place, Structure
from addnorm.probe.tap import Chain, Frames, Key, first_tensor, is_float

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
            shapes = first.shape, _together(*_outer(base, second))
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


def _together(*shapes: torch.Size) -> torch.Size:
    return torch.Size(np.broadcast_shapes(*shapes))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def bits(mask: int) -> Iterator[int]:
    """Yield the positions of the ones."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


@dataclass(frozen=True)
class Found:
    """An addition that is a connection, by its nodes."""

    node: int
    stream: int  # what both come from
    skip: int
    update: int
    which: int  # operand of the addition that is the skip
    projected: bool
    shape: tuple[int, ...]  # of the sum


class Graph:
    """Applies the rule to what was recorded."""

    def __init__(self, record: Recorder) -> None:
        self.record = record
        self.ancestors = record.ancestors

    def private(self, node: int, other: int) -> int:
        """Return what `node` is made of and `other` is not."""
        return self.ancestors[node] & ~self.ancestors[other]

    def maps_of(self, node: int, other: int) -> int:
        """Return the parameterised maps that `node` passes and `other` does not."""
        return self.private(node, other) & self.record.maps

    def within(self, node: int, outer: Found) -> bool:
        """Whether a node is made inside the branch of a connection."""
        made = self.private(outer.update, outer.skip) >> node & 1
        return bool(made and self.ancestors[node] >> outer.stream & 1)  # no other input's work

    def candidate(self, total: Sum) -> Found | None:
        """Read one addition by the rule, without a look at the others."""
        identity = [
            found
            for which in total.skips
            if total.shapes[which] == _together(*total.shapes)
            and (found := self._identity(total, which)) is not None
        ]
        if identity:  # both sides may be streams: the one that parted later, with fewer maps
            return max(
                identity,
                key=lambda f: (f.stream, -self.maps_of(f.skip, f.update).bit_count(), -f.which),
            )
        return self._projected(total)

    def _projected(self, total: Sum) -> Found | None:
        """Read an addition of two sides that both pass maps: the plainer one is the shortcut."""
        pair = total.pair
        maps = [self.maps_of(pair[i], pair[1 - i]) for i in (0, 1)]
        common = self._above(maps[0]) & self._above(maps[1])
        if not common or total.shapes[0] != total.shapes[1]:
            return None
        # A low-rank adapter, or experts of one size, are two sides that nothing tells apart.
        bent = [bool(self.private(pair[i], pair[1 - i]) & self.record.bends) for i in (0, 1)]
        counts = [m.bit_count() for m in maps]
        if not any(bent) or (all(bent) and counts[0] == counts[1]):
            return None
        which = min((0, 1), key=lambda i: (bent[i], counts[i]))
        if which not in total.skips:
            return None
        stream = common.bit_length() - 1
        shape = tuple(total.shapes[0])
        return Found(total.node, stream, pair[which], pair[1 - which], which, True, shape)

    def _above(self, nodes: int) -> int:
        """Return all that the nodes are made of."""
        above = 0
        for node in bits(nodes):
            above |= self.ancestors[node]
        return above

    def _identity(self, total: Sum, which: int) -> Found | None:
        skip, update = total.pair[which], total.pair[1 - which]
        above = self._above(self.maps_of(update, skip))
        shared = self.record.reach[skip] & above & self.ancestors[update]
        if not shared:
            return None
        shape = tuple(_together(*total.shapes))
        return Found(total.node, shared.bit_length() - 1, skip, update, which, False, shape)

    def connections(self, sums: list[Sum], ignored: Counter[str]) -> list[Found]:
        """Return the connections among the additions in order; count why others are none."""
        accepted: list[Found] = []
        for total in reversed(sums):  # outer ones end later
            first, second = total.pair
            if first == second or not self.ancestors[first] & self.ancestors[second]:
                ignored["of one tensor with itself or of strangers"] += 1
                continue
            found = self.candidate(total)
            if found is None:
                ignored["without a parameterised map on one side"] += 1
            elif any(self._part_of(found, outer, accepted) for outer in accepted):
                ignored["inside a branch"] += 1
            else:
                accepted.append(found)
        return accepted[::-1]

    def _part_of(self, found: Found, outer: Found, accepted: list[Found]) -> bool:
        """Whether an addition is part of the branch of an outer connection."""
        if not self.within(found.node, outer):
            return False
        if not self.ancestors[found.stream] >> outer.stream & 1:
            return True  # it adds what comes from outside the branch: a mask, earlier values
        chains = self.record.chains
        if _block_call(chains[outer.node]) == _block_call(chains[found.node]) is not None:
            return (
                True  # of one block: no stream of its own, such as a scan's D x or pooled queries
            )
        inner = (j for j in accepted if self.within(j.node, outer))
        return found.projected and not any(
            self.record.reach[j.skip] >> found.node & 1 for j in inner
        )


def discover(model: nn.Module, inputs: Any, blocks: str | None = None) -> Structure:
    """Find the residual connections of any module in one eager forward pass.

    `inputs`: a tensor, a tuple of arguments, or a mapping of keyword arguments. `blocks`: a glob
    over module names; each call of a module that matches, at the least depth, is then taken whole
    in place of the search. The connections of our own stacks are their wirings; elsewhere they are
    additions. Where no addition is seen in a repeated block, it is taken whole, and the coverage
    says so. Nothing in the model changes. `x + attention(x) + feedforward(x)` is two connections
    that branch off at one point; `x + (attention(x) + feedforward(x))` is one.

    Raises `ValueError` when nothing is found, or no module has a name that matches `blocks`.
    """
    model = unwrap(model)
    watched = _chosen(model, blocks)
    record = Recorder(model)
    calls: list[Call] = []
    with untouched(model), eager(model), torch.enable_grad():
        for parameter in model.parameters():  # what is frozen would leave no autograd graph
            if is_float(parameter) and not parameter.is_inference():
                parameter.requires_grad_()
        with _watched(model, watched, record, calls), record.frames.followed(), record:
            call_model(model, inputs)
    if blocks is not None:
        joins = tuple(_whole(call, watched) for call in calls)
        if not joins:
            raise ValueError(f"no module named {blocks!r} was called in the forward pass")
        coverage = Coverage(len(joins), len(record.sums), {}, {}, dict(record.opaque))
        return Structure(_unique(joins), coverage, f"{len(joins)} modules named {blocks}")
    return _structure(model, record, calls, watched)


def _chosen(model: nn.Module, blocks: str | None) -> dict[str, nn.Module]:
    """Return the modules whose calls are watched: the blocks asked for, wirings, or repetition."""
    named = dict(model.named_modules())
    if blocks is None:
        wirings = {n: m for n, m in named.items() if isinstance(m, Wiring)}
        return wirings | (repeated_blocks(model) or {})
    chosen = {name: m for name, m in named.items() if fnmatch.fnmatchcase(name, blocks)}
    depth = min((name.count(".") for name in chosen), default=0)
    chosen = {name: m for name, m in chosen.items() if name.count(".") == depth}
    if not chosen:
        repeated = repeated_blocks(model)
        hint = f"; the repeated block here is {_pattern(repeated)!r}" if repeated else ""
        raise ValueError(f"no module of {type(model).__name__} is named {blocks!r}{hint}")
    return chosen


@contextlib.contextmanager
def _watched(
    model: nn.Module, watched: dict[str, nn.Module], record: Recorder, calls: list[Call]
) -> Iterator[None]:
    """Note the calls of the watched modules, what the branches return, and the model's inputs."""
    running: list[Call] = []

    def begin(_module: nn.Module, args: Any, kwargs: Any) -> None:
        record.take_inputs((args, kwargs))

    def entering(_module: nn.Module, args: Any, kwargs: Any) -> None:
        frame = record.frames.stack[-1]
        tensor = first_tensor((args, kwargs))
        call = Call(frame.path, frame.call, len(record.ancestors))
        call.entered = None if tensor is None else tensor.shape
        running.append(call)
        calls.append(call)

    def leaving(_module: nn.Module, _args: Any, out: Any) -> None:
        call, tensor = running.pop(), first_tensor(out)
        call.after = len(record.ancestors)
        call.left = None if tensor is None else tensor.shape
        nodes = [record.node_of(leaf) for leaf in pytree.tree_leaves(out) if is_float(leaf)]
        call.returned = tuple(node for node in nodes if node >= 0)

    def branch_returned(_module: nn.Module, _args: Any, out: Any) -> None:
        if running and isinstance(out, Tensor):
            running[-1].branch = record.node_of(out)

    with contextlib.ExitStack() as exits:

        def hook(handle: Any) -> None:
            exits.callback(handle.remove)

        hook(model.register_forward_pre_hook(begin, with_kwargs=True))
        for module in watched.values():
            hook(module.register_forward_pre_hook(entering, with_kwargs=True))
            hook(module.register_forward_hook(leaving))
            if isinstance(module, Wiring):
                hook(module.branch.register_forward_hook(branch_returned))
        yield


def _structure(
    model: nn.Module, record: Recorder, calls: list[Call], watched: dict[str, nn.Module]
) -> Structure:
    graph = Graph(record)
    modules = dict(model.named_modules())
    ours = {n for n, m in modules.items() if isinstance(m, Stack | Wiring)}
    ignored: Counter[str] = Counter()
    inside: list[Sum] = []
    free: list[Sum] = []
    related = [s for s in record.sums if min(s.pair) >= 0]
    for total in related:
        (inside if any(p in ours for p, _ in record.chains[total.node]) else free).append(total)
    found = graph.connections(free, ignored)
    joins = [(f.node, _join(graph, f)) for f in found]
    wirings = [call for call in calls if isinstance(watched[call.path], Wiring)]
    for call in wirings:
        joins.append((call.after, _wiring(graph, call, inside)))
    for call in calls:
        if isinstance(watched[call.path], Wiring) or (joins and call.entered != call.left):
            continue
        if not _covered(graph, call, found, wirings):
            joins.append((call.after, _whole(call, watched)))
    if not joins:
        raise ValueError(
            f"{type(model).__name__} has no residual addition and no repeated block that holds "
            "modules; name the blocks by a glob, for instance blocks='layers.*', or --blocks "
            "'layers.*' on the command line"
        )
    joins.sort(key=lambda pair: pair[0])
    *others, last = _unique(tuple(_named(graph, found, joins)))
    left = {(c.path, c.call): c.returned for c in calls}
    at_end = (joins[-1][0],) if last.kind == "add" else left[last.module, last.call]
    named = (*others, _ending(record, last, at_end))
    specs = list(dict.fromkeys(str(m.spec) for m in modules.values() if isinstance(m, Stack)))
    coverage = Coverage(
        connections=len(named),
        additions=len(related),
        ignored=dict(ignored),
        fallbacks={
            j.name: "no residual addition was seen in it" for j in named if j.kind == "block"
        },
        opaque=dict(record.opaque),
        doubled=tuple(
            dict.fromkeys(
                _block(record.chains[s.node])
                for s in free
                if s.pair[0] == s.pair[1] and record.ancestors[s.pair[0]] & record.maps
            )
        ),
    )
    return Structure(named, coverage, _how(named, watched), ", ".join(specs))


def _ending(record: Recorder, join: Join, nodes: tuple[int, ...]) -> Join:
    """Say of the last connection whether a norm, and whether a map, follows it up to the end."""
    later = -1 << (max(nodes, default=0) + 1)
    left = sum(1 << node for node in set(nodes))
    norms, maps = record.norms & later, record.maps & later
    return replace(
        join,
        norm_after=any(record.reach[n] & left for n in bits(norms)),
        read_out=any(record.ancestors[n] & left for n in bits(maps)),
    )


def _how(joins: tuple[Join, ...], watched: dict[str, nn.Module]) -> str:
    """Say in one line what was found."""
    kinds = Counter(join.kind for join in joins)
    parts = []
    if kinds["wiring"]:
        parts.append(f"{kinds['wiring']} connections of our stacks")
    if kinds["add"]:
        parts.append(f"{kinds['add']} connections found by their additions")
    if kinds["block"]:
        names = {n: watched[n] for j in joins if j.kind == "block" for n in [j.module]}
        kind = type(next(iter(names.values()))).__name__
        parts.append(f"{kinds['block']} blocks of class {kind} ({_pattern(names)})")
    return ", ".join(parts)


def _covered(graph: Graph, call: Call, found: list[Found], wirings: list[Call]) -> bool:
    """Whether a connection lies in the call of a block, or the call in a connection."""
    record = graph.record
    own = [n for n in range(call.before, call.after) if (call.path, call.call) in record.chains[n]]
    if not own:
        return True
    if any(w.before >= call.before and w.after <= call.after for w in wirings):
        return True
    if any(w.before <= call.before and w.after >= call.after for w in wirings):
        return True
    for f in found:
        if (call.path, call.call) in record.chains[f.node]:
            return True
        if any(graph.within(n, f) for n in own):
            return True
        if f.projected and any(graph.private(f.skip, f.update) >> n & 1 for n in own):
            return True
    return False


def _place(record: Recorder, node: int) -> Place | None:
    place = record.places[node]
    return None if place is None else replace(place, mutated=node in record.mutated)


def _wiring(graph: Graph, call: Call, sums: list[Sum]) -> Join:
    """Return the connection of a wiring, with the addition that joins its branch, if it adds."""
    record, place, skip, shape = graph.record, None, 0, call.left or ()
    if call.branch is not None and call.branch >= 0:
        for total in sums:
            if (call.path, call.call) not in record.chains[total.node]:
                continue
            follows = [record.ancestors[node] >> call.branch & 1 for node in total.pair]
            if sum(follows) == 1 and total.shapes[0] == total.shapes[1]:
                place, skip = _place(record, total.node), follows.index(0)
                break
    return Join(
        name=call.path,
        block=_block((*_chain_of(call), (call.path, call.call))),
        kind="wiring",
        module=call.path,
        call=call.call,
        place=place,
        skip=skip,
        shape=tuple(shape),
    )


def _chain_of(call: Call) -> Chain:
    parts = call.path.split(".")
    return tuple((".".join(parts[:i]), 0) for i in range(1, len(parts)))


def _whole(call: Call, watched: dict[str, nn.Module]) -> Join:
    wiring = isinstance(watched[call.path], Wiring)
    return Join(
        name=call.path,
        block=call.path,
        kind="wiring" if wiring else "block",
        module=call.path,
        call=call.call,
        shape=tuple(call.left or ()),
    )


def _join(graph: Graph, found: Found) -> Join:
    record = graph.record
    place = _place(record, found.node)
    assert place is not None
    private = graph.private(found.update, found.skip)
    return Join(
        name="",
        block=_block(record.chains[found.node]),
        kind="add",
        module=place.module,
        call=place.call,
        place=place,
        stream=_place(record, found.stream),
        skip=found.which,
        projected=found.projected,
        shape=found.shape,
        features=1 if _convolves(graph, found) else -1,
        norm_before=any(record.reach[n] >> found.stream & 1 for n in bits(private & record.norms)),
    )


def _convolves(graph: Graph, found: Found) -> bool:
    """Whether the branch begins with a convolution, so that axis 1 holds the features."""
    first = next(bits(graph.maps_of(found.update, found.skip)), None)
    place = None if first is None else graph.record.places[first]
    return place is not None and place.function.startswith("conv")


def _block_call(chain: Chain) -> tuple[str, int] | None:
    """Return the innermost module call that is one of a list."""
    calls = (call for call in reversed(chain) if call[0].rpartition(".")[2].isdigit())
    return next(calls, None)


def _block(chain: Chain) -> str:
    """Return the name of the block that a chain of calls ends in, else the innermost module."""
    call = _block_call(chain) or (chain[-1] if chain else ("", 0))
    return call[0]


def _named(graph: Graph, found: list[Found], joins: list[tuple[int, Join]]) -> Iterator[Join]:
    """Give the additions their names, by the module that made the update, and their surroundings.

    That is the outermost module call that holds all maps of the branch but not the addition; where
    there is none, the innermost call that holds both, the one that adds, or the last map, the first
    of these that no other connection lies in.
    """
    by_node = {f.node: f for f in found}
    choices = {f.node: _choices(graph, f) for f in found}
    taken = Counter(call for options in choices.values() for call in set(options[:-1]))
    holds: Counter[tuple[str, int]] = Counter()
    for f in found:
        holds.update(set(graph.record.chains[f.node]) | set(choices[f.node][-1:]))
    order = [node for node, _ in joins]
    for position, (node, join) in enumerate(joins):
        if join.kind != "add":
            yield join
            continue
        f, options = by_node[node], choices[node]
        own = graph.record.chains[node]
        best = options[-1]
        for option in options:
            others = holds[option] - (option in own or option == options[-1])
            if not others and (option in own or taken[option] == 1):
                best = option
                break
        path, call = best
        after = by_node.get(order[position + 1]) if position + 1 < len(order) else None
        yield replace(
            join,
            name=_name(path, call, node, graph),
            norm_after=_norm_after(graph, f, after),
            inside=_inside(graph, f, found, order),
            root=not any(
                graph.ancestors[f.stream] >> g.stream & 1 for g in found if g.stream != f.stream
            ),
        )


def _name(path: str, call: int, node: int, graph: Graph) -> str:
    name = path or f"{graph.record.places[node].function}"  # type: ignore[union-attr]
    return f"{name}#{call + 1}" if call else name


def _choices(graph: Graph, found: Found) -> list[tuple[str, int]]:
    record = graph.record
    own = record.chains[found.node]
    maps = [
        record.chains[n]
        for n in bits(graph.maps_of(found.update, found.skip))
        if record.ancestors[n] >> found.stream & 1
    ]
    common = maps[0]
    for chain in maps[1:]:
        common = _shared(common, chain)
    outside = _shared(common, own)
    inner = common[len(outside) :]
    options = [inner[0]] if inner else []
    options += [*outside[-1:], own[-1], maps[-1][-1]]
    return options


def _shared(one: Chain, two: Chain) -> Chain:
    """Return the calls that two chains begin with together."""
    length = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
    return one[: min(len(one), len(two)) if length is None else length]


def _norm_after(graph: Graph, found: Found, following: Found | None) -> bool:
    """Whether the stream passes a norm before the next connection, or before the end."""
    record = graph.record
    norms = record.norms >> (found.node + 1) << (found.node + 1)
    if following is not None:
        norms &= record.reach[following.stream]
    return any(record.reach[n] >> found.node & 1 for n in bits(norms))


def _inside(graph: Graph, found: Found, all_found: list[Found], order: list[int]) -> int | None:
    outer = [f for f in all_found if f.node > found.node and graph.within(found.node, f)]
    return order.index(outer[0].node) if outer else None


def _unique(joins: tuple[Join, ...]) -> tuple[Join, ...]:
    """Number what has the same name, in order."""
    seen: Counter[str] = Counter()
    out = []
    for join in joins:
        base = join.name.partition("#")[0]
        seen[base] += 1
        out.append(replace(join, name=f"{base}#{seen[base]}" if seen[base] > 1 else base))
    return tuple(out)


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module] | None:
    """Return the outermost repeated block with the most parameters: modules of lists, one class."""
    groups: dict[type, dict[str, nn.Module]] = defaultdict(dict)
    for parent_name, parent in model.named_modules():
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            for name, child in parent.named_children():
                composed = any(True for _ in child.children())
                if composed and not isinstance(child, nn.ModuleList | Wiring):
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


def _pattern(group: Mapping[str, nn.Module] | None) -> str:
    return next(iter(group)).rpartition(".")[0] + ".*" if group else ""
