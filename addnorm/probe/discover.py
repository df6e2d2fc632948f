"""Find the residual connections of any module in one eager forward pass.

The pass is recorded (`record`), its additions are read (`graph`), and what was found gets names.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from addnorm.contract import Stack, Wiring
from addnorm.probe.graph import Found, Graph, block_of
from addnorm.probe.losses import call_model
from addnorm.probe.purity import eager, untouched, unwrap
from addnorm.probe.record import Call, Recorder, Sum, bits
from addnorm.probe.structure import Coverage, Join, Place, Structure
from addnorm.probe.tap import Chain, first_tensor, is_float


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
                block_of(record.chains[s.node])
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
        block=block_of((*_chain_of(call), (call.path, call.call))),
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
        block=block_of(record.chains[found.node]),
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
