"""The blocks and drawings of the documents for the clinic (ST-20): as printed, and corrected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addnorm import twins
from addnorm.branches import Context
from addnorm.contract import Stack
from addnorm.models.babygpt import LADDER
from addnorm.models.gpt import GPT, GPTConfig
from addnorm.models.layers import Attention, AttentionConfig, FeedForward, FeedForwardConfig
from addnorm.models.residual_layer import LayerNorm, ResidualBlock, ResidualLayer
from addnorm.norms import NORMS
from addnorm.studies import drawings
from addnorm.studies.drawings import Drawn, Edges

D, HEADS, HIDDEN, RATE = 16, 2, 32, 0.5  # widths; RATE is that of every dropout


def same(x: Tensor) -> Tensor:
    """Return x: the stream of a block that leaves it alone."""
    return x


def normed(x: Tensor) -> Tensor:
    """Return N(x): the stream of a post-norm block."""
    return F.layer_norm(x, x.shape[-1:])


@dataclass
class Case:
    """One side of a twin: what is examined, and what should come out."""

    make: Callable[[], nn.Module] | None = None  # the block, on x (B, ..., D)
    stream: Callable[[Tensor], Tensor] | None = same  # of silent branches; None: it has no skip
    others: Sequence[Callable[[Tensor], Tensor]] = ()  # which must agree with it in evaluation
    images: bool = False
    axes: Sequence[int] = (0,)  # along which no entry may see another
    drops: bool = False  # whether it has dropout of RATE on one branch
    listing: Callable[[nn.Module, Callable[[], Tensor]], dict[str, float]] | None = None
    edges: Edges = ()
    cited: Sequence[tuple[tuple[int, int], tuple[int, int]]] = ()  # lines cited, lines meant
    network: Callable[[], nn.Module] | None = None  # the network that it is a block of


@dataclass
class Pair:
    """What a document prints and what is right, and what must tell them apart."""

    printed: Case
    corrected: Case
    fails: Sequence[str] = ()  # checks that name the defect; none: it is sound as printed
    errors: Sequence[str] = field(default_factory=tuple)  # what its exceptions say


def pairs() -> dict[str, Callable[[], Pair]]:
    """Return by name what builds each printed block or drawing with its corrected form."""
    layer = Case(lambda: ResidualLayer(D, HIDDEN, heads=HEADS))
    dropped = Case(lambda: twins.BranchDropout(D, RATE), drops=True)
    norm = Case(lambda: LayerNorm(D), None, [normed], axes=(0, 1))
    return {
        "000 v7-block": lambda: _known(_stack("residual"), drawings.TWO_SKIPS, "babygpt-v7"),
        "000 v9-block": lambda: _known(_stack("prenorm"), drawings.PRE_NORM, "babygpt-v9"),
        "000 v9-drawing": _drawing,
        "000 source-lines": lambda: Pair(
            Case(cited=CITED), Case(cited=[(meant, meant) for _, meant in CITED]), ("lines",)
        ),
        "001 rows": _rows,
        "001 residual-block": lambda: _known(_row("residual"), drawings.RESIDUAL_ROW),
        "001 prenorm-drawing": lambda: _known(_stack("prenorm", "rmsnorm"), drawings.PRE_NORM),
        "001 prenorm-box": lambda: _known(_box("prenorm", "rmsnorm"), drawings.PRE_BOX),
        "001 postnorm-box": lambda: _known(_box("postnorm"), drawings.POST_BOX, stream=normed),
        "002 one-skip": lambda: Pair(
            Case(lambda: twins.OneSkip(D, HEADS)),
            Case(lambda: twins.TwoSkips(D, HEADS)),
            ("skip", "jacobian"),
        ),
        "002 placements": lambda: _readings(
            drawings.LINE_34,
            drawings.LINES_38_39,
            drawings.LINE_77,
            drawings.LINE_80,
            drawings.PRE_NORM,
        ),
        "002 words-formula": lambda: _readings(drawings.LINE_77, drawings.LINE_80),
        "002 sequence-norm": lambda: Pair(
            Case(lambda: twins.SequenceNorm(D), None, [normed], axes=(0, 1)),
            norm,
            ("apart", "agree"),
        ),
        "002 attention-formula": _attention,
        "002 ffn-formula": _feedforward,
        "002 batch-mixer": lambda: Pair(
            Case(lambda: twins.BatchMixer(D, HEADS)),
            Case(lambda: twins.Mixer(D, HEADS)),
            ("apart",),
        ),
        "002 mask-keyword": lambda: Pair(
            Case(lambda: twins.MaskKeyword(D, HEADS)),
            Case(lambda: twins.AttnMaskKeyword(D, HEADS)),
            ("built",),
            ("unexpected keyword argument 'mask'",),
        ),
        "002 stream-dropout": lambda: Pair(
            Case(lambda: twins.StreamDropout(D, RATE)), dropped, ("steady",)
        ),
        "002 input-dropout": lambda: Pair(
            Case(lambda: twins.InputDropout(D, RATE), drops=True), dropped, ("dropout",)
        ),
        "003 accumulated": lambda: Pair(
            Case(listing=twins.accumulated_gradients), Case(listing=twins.gradients), ("repeat",)
        ),
        "004 inplace": lambda: Pair(
            Case(lambda: twins.InplaceBlock(4, 4), F.relu, images=True),
            Case(lambda: ResidualBlock(4, 4), F.relu, images=True),
            ("input", "trains"),
            ("modified by an inplace operation", "a leaf Variable that requires grad"),
        ),
        "004 unbiased": lambda: Pair(
            Case(lambda: twins.UnbiasedLayerNorm(D), None, axes=(0, 1)), norm, ("norm",)
        ),
        "004 doubled": lambda: Pair(
            Case(lambda: twins.DoubledLayer(D, HIDDEN, heads=HEADS)), layer, ("skip", "jacobian")
        ),
        "004 undefined": lambda: Pair(
            Case(lambda: twins.UndefinedParts(D, HIDDEN)),
            layer,
            ("built",),
            ("name 'MultiHeadAttention' is not defined",),
        ),
        "004 inner-width": lambda: Pair(
            Case(lambda: twins.InnerWidth(D, HIDDEN)),
            layer,
            ("built",),
            ("multiple values for argument 'num_heads'",),
        ),
    }


# 000:55, 85 and 115: cited lines, and where commit 278aa76 of simpx/buildyourownllm has it: the
# additions of v7, its n_layer, the additions of v9.
CITED = (((45, 46), (49, 50)), ((15, 16), (20, 20)), ((45, 46), (51, 52)))
# The residual row of 001 with the activation behind the addition, as He et al. 2015 have it.
RECTIFIED: Edges = (
    *drawings.RESIDUAL_ROW[:-1], ("add 1", "act 2"), ("act 2", "output"),
)  # fmt: skip


def _stack(wiring: str, norm: str = "layernorm") -> Stack:
    """Return one Transformer layer of two connections."""
    relu = FeedForwardConfig(activation="relu")
    layer = [Attention(D, HEADS, causal=False), FeedForward(D, HIDDEN, config=relu)]
    return Stack(layer, wiring, dim=D, parts=2, norm=NORMS[norm])


def _row(wiring: str) -> Stack:
    """Return one residual block of two weight layers with a ReLU between them."""
    row = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))
    return Stack([row], wiring, dim=D, start="torch")


def _drawn(stack: Stack, edges: Edges) -> Callable[[], Drawn]:
    """Return what builds a drawing from the parts of a stack, whose weights it shares."""
    parts: dict[str, nn.Module] = {"act 1": nn.ReLU(), "act 2": nn.ReLU()}
    for index, connection in enumerate(stack, 1):
        branch = connection.branch
        if isinstance(branch, Attention | FeedForward):
            parts["attention" if isinstance(branch, Attention) else "ffn"] = branch
        else:
            linear = [m for m in branch.modules() if isinstance(m, nn.Linear)]
            parts |= {f"weights {i}": m for i, m in enumerate(linear, 1)}
        for name in ("norm", "norm_in"):
            found = dict(connection.named_children()).get(name)
            parts |= {f"norm {index}": found} if found is not None else {}
    return lambda: Drawn(edges, parts)


def _box(wiring: str, norm: str = "layernorm") -> Stack:
    """Return one connection around attention."""
    return Stack([Attention(D, HEADS, causal=False)], wiring, dim=D, norm=NORMS[norm])


def _known(
    stack: Stack, edges: Edges, network: str = "", stream: Callable[[Tensor], Tensor] = same
) -> Pair:
    """Return a sound drawing beside the wiring of the catalogue that it must equal."""
    whole = (lambda: GPT(GPTConfig(**LADDER[network], vocab_size=64))) if network else None
    return Pair(
        Case(_drawn(stack, edges), stream, [stack], edges=edges),
        Case(lambda: stack, stream, network=whole),
    )


def _drawing() -> Pair:
    """000:101-112: the flow chart as drawn, and with its missing edge."""
    pre = _stack("prenorm")
    return Pair(
        Case(_drawn(pre, drawings.DRAWN), edges=drawings.DRAWN),
        Case(_drawn(pre, drawings.PRE_NORM), same, [pre], edges=drawings.PRE_NORM),
        ("edges", "skip", "jacobian"),
    )


def _rows() -> Pair:
    """001:86-104: without its skip the residual row should be the plain row, but lacks a ReLU."""
    row = _row("postact")
    return Pair(
        Case(_drawn(row, drawings.ROW_WITHOUT_SKIP), None, [_drawn(row, drawings.PLAIN_ROW)()]),
        Case(lambda: row, F.relu, [_drawn(row, RECTIFIED)()]),
        ("agree",),
    )


def _readings(first: Edges, *others: Edges) -> Pair:
    """002:34-118: several descriptions of one block, and the one that is right."""
    pre = _stack("prenorm")
    return Pair(
        Case(_drawn(pre, first), same, [_drawn(pre, edges)() for edges in others]),
        Case(_drawn(pre, drawings.PRE_NORM), same, [pre]),
        ("agree",),
    )


class Written(nn.Module):
    """A formula written out over the weights of a branch; it has no skip."""

    def __init__(self, branch: nn.Module, formula: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.branch = branch
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        """Return the formula of `x (B, T, D)`."""
        return self.formula(self.branch, x)


def _attention() -> Pair:
    """002:60: softmax(Q K' / sqrt(d)) V of one head, tokens in rows, beside torch's own."""
    bare = AttentionConfig(attention_projection=False)
    branch = Attention(D, 1, causal=False, config=bare)

    def written(module: Attention, x: Tensor) -> Tensor:
        q, k, v = (x @ w.T + b for w, b in zip(*_thirds(module), strict=True))
        weights = torch.softmax(q @ k.transpose(-2, -1) / D**0.5, -1)
        return weights @ v

    def torchs(x: Tensor) -> Tensor:
        q, k, v = (x @ w.T + b for w, b in zip(*_thirds(branch), strict=True))
        return F.scaled_dot_product_attention(q, k, v)

    def ours(x: Tensor) -> Tensor:
        return branch(x, Context())

    return Pair(
        Case(lambda: Written(branch, written), None, [torchs, ours]),
        Case(lambda: Written(branch, lambda module, x: module(x, Context())), None, [torchs]),
    )


def _thirds(module: Attention) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return weights and biases of query, key and value."""
    return module.qkv.weight.chunk(3), module.qkv.bias.chunk(3)


def _feedforward() -> Pair:
    """002:70: max(0, a W_1 + b_1) W_2 + b_2, beside the branch of the Transformer."""
    branch = FeedForward(D, HIDDEN, config=FeedForwardConfig(activation="relu"))

    def written(module: FeedForward, a: Tensor) -> Tensor:
        assert module.out is not None
        hidden = (a @ module.lift.weight.T + module.lift.bias).clamp(min=0)
        return hidden @ module.out.weight.T + module.out.bias

    def ours(x: Tensor) -> Tensor:
        return branch(x, Context())

    return Pair(
        Case(lambda: Written(branch, written), None, [ours]),
        Case(lambda: Written(branch, lambda module, x: module(x, Context())), None, [ours]),
    )
