"""The documents' blocks and drawings as edge lists, and a module that computes what they say.

Nodes: "x" is the input and "output" the end; "add ..." sums what arrives; the rest are parts such
as "attention", "norm 1", and computes on one input. Shapes: tokens `(B, T, D)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter

from torch import Tensor, nn

from addnorm.branches import Branch, Context

Edges = Sequence[tuple[str, str]]

# 000:29-32 and 001:224 without norms: two sublayers, a skip around each.
TWO_SKIPS: Edges = (
    ("x", "attention"), ("attention", "add 1"), ("x", "add 1"),
    ("add 1", "ffn"), ("ffn", "add 2"), ("add 1", "add 2"), ("add 2", "output"),
)  # fmt: skip
# 000:93-94 and 001:198-222: the same with a norm in front of each sublayer.
PRE_NORM: Edges = (
    ("x", "norm 1"), ("norm 1", "attention"), ("attention", "add 1"), ("x", "add 1"),
    ("add 1", "norm 2"), ("norm 2", "ffn"), ("ffn", "add 2"), ("add 1", "add 2"),
    ("add 2", "output"),
)  # fmt: skip
# 000:101-112: one edge twice, and none from the first addition to the second.
DRAWN: Edges = (
    ("x", "norm 1"), ("norm 1", "attention"), ("attention", "add 1"), ("add 1", "norm 2"),
    ("norm 2", "ffn"), ("ffn", "add 2"), ("add 2", "output"), ("x", "add 1"),
    ("add 1", "norm 2"),
)  # fmt: skip
# 001:86-104: a plain row, and the residual block without its skip; 001:110-118 with it.
PLAIN_ROW: Edges = (
    ("x", "weights 1"), ("weights 1", "act 1"), ("act 1", "weights 2"), ("weights 2", "act 2"),
    ("act 2", "output"),
)  # fmt: skip
ROW_WITHOUT_SKIP: Edges = (
    ("x", "weights 1"), ("weights 1", "act 1"), ("act 1", "weights 2"), ("weights 2", "output"),
)  # fmt: skip
RESIDUAL_ROW: Edges = (
    ("x", "weights 1"), ("weights 1", "act 1"), ("act 1", "weights 2"), ("weights 2", "add 1"),
    ("x", "add 1"), ("add 1", "output"),
)  # fmt: skip
# 001:230-243: the two boxes side by side.
PRE_BOX: Edges = (
    ("x", "norm 1"), ("norm 1", "attention"), ("attention", "add 1"), ("x", "add 1"),
    ("add 1", "output"),
)  # fmt: skip
POST_BOX: Edges = (
    ("x", "attention"), ("attention", "add 1"), ("x", "add 1"), ("add 1", "norm 1"),
    ("norm 1", "output"),
)  # fmt: skip
# Document 002, one block in the words and formulas of four places; its code is PRE_NORM.
LINE_34: Edges = (
    ("x", "norm 1"), ("norm 1", "attention"), ("attention", "ffn"), ("ffn", "add 1"),
    ("x", "add 1"), ("add 1", "output"),
)  # fmt: skip
LINES_38_39: Edges = (
    ("x", "attention"), ("attention", "add 1"), ("x", "add 1"), ("add 1", "norm 1"),
    ("norm 1", "ffn"), ("ffn", "add 2"), ("norm 1", "add 2"), ("add 2", "norm 2"),
    ("norm 2", "output"),
)  # fmt: skip
LINE_77: Edges = (
    ("x", "norm 1"), ("norm 1", "attention"), ("attention", "ffn"), ("ffn", "norm 2"),
    ("norm 2", "add 1"), ("x", "add 1"), ("add 1", "output"),
)  # fmt: skip
LINE_80: Edges = (
    ("x", "norm 1"), ("norm 1", "attention"), ("attention", "ffn"), ("ffn", "add 1"),
    ("x", "add 1"), ("add 1", "norm 2"), ("norm 2", "output"),
)  # fmt: skip


def doubled(edges: Edges) -> list[tuple[str, str]]:
    """Return the edges that are drawn more than once."""
    return [edge for edge in dict.fromkeys(edges) if list(edges).count(edge) > 1]


def lonely(edges: Edges) -> list[str]:
    """Return the additions with a single input, which add nothing."""
    adds = dict.fromkeys(end for _, end in edges if end.startswith("add"))
    return [add for add in adds if len({start for start, end in edges if end == add}) < 2]


class Drawn(nn.Module):
    """A network that computes what its edges say: `(B, T, D) -> (B, T, D)`.

    An edge that is drawn twice counts once. `parts` by the names of the nodes; those that the
    edges do not name are left out. Raises `ValueError` for a part with several inputs and for a
    node without its part.
    """

    def __init__(self, edges: Edges, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.inputs: dict[str, list[str]] = {}
        for start, end in dict.fromkeys(edges):
            self.inputs.setdefault(end, []).append(start)
        self.order = [n for n in TopologicalSorter(self.inputs).static_order() if n != "x"]
        self.parts = nn.ModuleDict()
        for node in self.order:
            if node == "output" or node.startswith("add"):
                continue
            if node not in parts:
                raise ValueError(f"the node {node!r} has no part")
            if len(self.inputs[node]) > 1:
                raise ValueError(f"the part {node!r} has several inputs: {self.inputs[node]}")
            self.parts[node] = parts[node]

    def forward(self, x: Tensor) -> Tensor:
        """Return the value of the node "output"."""
        values, parts = {"x": x}, dict(self.parts.items())
        for node in self.order:
            first, *others = (values[start] for start in self.inputs[node])
            for other in others:
                first = first + other
            part = parts.get(node)
            if isinstance(part, Branch):
                first = part(first, Context())
            elif part is not None:
                first = part(first)
            values[node] = first
        return values["output"]
