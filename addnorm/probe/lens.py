"""The logit lens: what the model would answer if its later connections added nothing.

nostalgebraist 2020, "interpreting GPT: the logit lens". At depth j the branches of all connections
from the j-th on are switched off and the rest of the forward pass stays as it is: projected
shortcuts, final norm, pooling, head. In a pre-norm network the stream then goes straight from depth
j into the model's own final norm and head, which is the lens as it was proposed, and the same works
for a ResNet, whose later stages still have to change the width.

The estimate is biased: the head was trained to read the last stream and no earlier one, whose
directions may differ (Belrose et al. 2023, arXiv:2303.08112), so that an early depth knows at least
what the lens shows, not at most.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addnorm.contract import Wiring
from addnorm.probe.discover import discover
from addnorm.probe.losses import Loss, Progress, call_model, fields_of, floats_in, loss_of
from addnorm.probe.purity import untouched, unwrap
from addnorm.probe.structure import Structure
from addnorm.probe.tap import Point, Tap, tapped


@dataclass(frozen=True)
class Lens:
    """What the model answers by depth. Entry i belongs to the stream after `depths[i]` connections.

    Depth 0 is what enters the first connection, the greatest depth the whole model. A biased
    estimate: the head was trained on the last stream only. `complete` is False where the budget
    ended before every depth was read; those that were read lie evenly.
    """

    depths: tuple[int, ...]  # connections that still add, ascending
    names: tuple[str, ...]  # the last of them, "" at depth 0
    loss: tuple[float, ...]  # NaN without targets and without a loss
    agreement: tuple[float, ...]  # share of answers whose greatest logit is the model's own
    divergence: tuple[float, ...]  # KL(model || lens) in nats, mean over the answers
    loss_kind: str  # which loss it is, "" where there is none
    answers: int  # rows of logits
    complete: bool
    seed: int
    seconds: float
    notes: tuple[str, ...] = ()
    label: str = "biased estimate: the head was trained on the last stream only"
    label_zh: str = "有偏估计：输出头只在最后的残差流上训练过"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def lens(
    model: nn.Module,
    inputs: Any,
    targets: Any = None,
    *,
    loss: Loss | None = None,
    structure: Structure | None = None,
    blocks: str | None = None,
    budget: float = 60.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Lens:
    """Read the stream at every depth through the model's own final norm and head.

    `inputs`, `targets`, `loss` and `blocks` as in `xray`; `structure` is what `discover` found, if
    that is at hand. The output, or its `logits`, is read as logits along the last axis. One forward
    pass a depth, each from the same random state `seed`, in the mode the model is in; the whole
    model first, then ever finer between the ends, until `budget` seconds are over. Nothing in the
    model changes.

    Norms that stand between connections, as in post-norm networks, stay. A wiring of ours that
    adds nothing to its stream, such as one without a skip, hands a stream of one tensor on as it
    is; a connection that changes the shape without a skip always works, and the notes say so.

    Raises `ValueError` when no connection is found, or the output holds no logits.
    """
    started = time.monotonic()
    model = unwrap(model)
    found = discover(model, inputs, blocks) if structure is None else structure
    count = len(found)
    rows: dict[int, tuple[float, float, float]] = {}
    kind, answers, kept = "", 0, set[int]()
    order = _refining(count)
    with untouched(model), torch.no_grad():
        own: Tensor | None = None
        for done, depth in enumerate(order):
            if rows and len(rows) > 1 and time.monotonic() - started > budget:
                break
            torch.manual_seed(seed)
            cut = _Cut(model, found, depth)
            with tapped(model, found, cut) as tap:
                cut.tap = tap
                output = call_model(model, inputs)
            kept |= cut.kept
            logits = _logits(output)
            own = logits if own is None else own
            answers = len(own)
            value, kind = _loss(output, targets, loss)
            agree = (logits.argmax(-1) == own.argmax(-1)).float().mean()
            apart = F.kl_div(
                logits.log_softmax(-1), own.log_softmax(-1), log_target=True, reduction="none"
            )
            rows[depth] = (value, float(agree), max(0.0, float(apart.sum(-1).mean())))
            if progress is not None:
                progress(done + 1, count + 1)
    depths = tuple(sorted(rows))
    notes = tuple(f"{found.joins[k].name} changes the shape and always works" for k in sorted(kept))
    return Lens(
        depths=depths,
        names=tuple(found.joins[depth - 1].name if depth else "" for depth in depths),
        loss=tuple(rows[depth][0] for depth in depths),
        agreement=tuple(rows[depth][1] for depth in depths),
        divergence=tuple(rows[depth][2] for depth in depths),
        loss_kind=kind,
        answers=answers,
        complete=len(depths) == count + 1,
        seed=seed,
        seconds=time.monotonic() - started,
        notes=notes,
    )


class _Cut:
    """A visitor that switches off the connections from one depth on."""

    def __init__(self, model: nn.Module, structure: Structure, depth: int) -> None:
        self.modules = dict(model.named_modules())
        self.joins = structure.joins
        self.depth = depth
        self.kept: set[int] = set()  # connections that cannot be switched off
        self.tap: Tap | None = None

    def __call__(self, k: int, point: Point) -> Tensor | None:
        """Return what the connection adds: nothing, from the depth on."""
        if k < self.depth:
            return None
        join = self.joins[k]
        if point.skip is None:
            self.kept.add(k)
            return None
        alone = isinstance(point.stream, Tensor) and point.skip.shape == point.update.shape
        if isinstance(self.modules.get(join.module), Wiring) and join.place is None and alone:
            return point.skip  # the wiring adds nothing: its output is its branch's
        return torch.zeros_like(point.update)


def _refining(count: int) -> list[int]:
    """Return 0..count: the ends first, then the middle of the widest gap, again and again."""
    order = [count, 0] if count else [0]
    gaps = [(0, count)]
    while gaps:
        following = []
        for low, high in gaps:
            if high - low > 1:
                middle = (low + high) // 2
                order.append(middle)
                following += [(low, middle), (middle, high)]
        gaps = following
    return order


def _logits(output: Any) -> Tensor:
    """Return the logits as rows, in float32."""
    found = floats_in(fields_of(output).get("logits", output))
    if not found or found[0].dim() < 1 or found[0].shape[-1] < 2:
        raise ValueError("the logit lens needs a model that returns logits along the last axis")
    return found[0].reshape(-1, found[0].shape[-1]).float()


def _loss(output: Any, targets: Any, loss: Loss | None) -> tuple[float, str]:
    """Return the loss and what it is; NaN where nothing says what is right."""
    own = isinstance(fields_of(output).get("loss"), Tensor)
    if targets is None and loss is None and not own:
        return math.nan, ""
    value, kind = loss_of(output, targets, loss)
    return float(value), kind
