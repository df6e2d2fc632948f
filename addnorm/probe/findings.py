"""The findings of the X-ray: what the vitals mean beside what this wiring should do at this depth.

One function a code, entered in `FINDINGS`; the bands that it judges by stand in `bands.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from addnorm.probe.bands import (
    ALIKE,
    DROWNED,
    LEAST,
    POWER,
    ROUNDED,
    SLACK,
    Ends,
    Evidence,
    middle,
)
from addnorm.probe.trace import Finding

SEVERITIES = ("sick", "warning", "note")
LOST = 0.1  # identity gain below which nothing of a plain skip is left
ERRORS = 4  # standard errors that the estimate of it may be off
WARM = 12  # layers of post-norm that still train without warm-up (Xiong et al. 2020, section 4)
SIMILAR = 0.9  # token similarity at which a post-norm stack at its start loses its input


class Seen(NamedTuple):
    """What a rule saw: the part of a finding that its code does not fix."""

    where: str
    value: str
    expected: str
    why: str
    remedy: str
    why_zh: str
    remedy_zh: str


Look = Callable[[Evidence], Iterator[Seen]]


class Rule(NamedTuple):
    """A code, how bad it is, where it comes from, and the function that looks for it."""

    severity: str
    source: str
    look: Look


FINDINGS: dict[str, Rule] = {}  # in the order in which findings of one severity are listed


def rule(code: str, severity: str, source: str) -> Callable[[Look], Look]:
    """Enter a function in `FINDINGS`, as a decorator."""

    def enter(look: Look) -> Look:
        FINDINGS[code] = Rule(severity, source, look)
        return look

    return enter


def judge(evidence: Evidence) -> list[Finding]:
    """Return all findings, the worst first, each code's in the order of depth."""
    found = [
        Finding(code=code, severity=entry.severity, source=entry.source, **seen._asdict())
        for code, entry in FINDINGS.items()
        for seen in entry.look(evidence)
    ]
    return worst_first(found)


def worst_first(findings: list[Finding]) -> list[Finding]:
    """Sort by severity; what is equally bad keeps its order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


@rule("non-finite", "sick", "IEEE 754: a value that is not finite spreads through every sum")
def _non_finite(e: Evidence) -> Iterator[Seen]:
    """Name the block with the first NaN or infinity: forward first, then on the way back."""
    forward = next((c for c in e.connections if c.non_finite - c.non_finite_gradient), None)
    back = next((c for c in reversed(e.connections) if c.non_finite_gradient), None)
    if e.entered_non_finite:
        where = f"the input of {e.connections[0].name}"
        way, zh = "already in the input or the embedding", "输入或嵌入中已经出现"
    elif forward is not None:
        where, way = forward.name, "in the forward pass; every block after it inherits it"
        zh = "前向传播中出现，其后的每个块都会继承"
    elif back is not None:
        where, way = back.name, "in the backward pass; every block before it inherits it"
        zh = "反向传播中出现，其前的每个块都会继承"
    elif not math.isfinite(e.loss):
        where, way, zh = "the head or the loss", "after the last connection", "最后一个连接之后出现"
    else:
        return
    yield Seen(
        where=where,
        value="NaN or infinity",
        expected="finite values",
        why=f"The first value that is not finite appears {way}.",
        remedy="Lower the learning rate, clip the gradient, or take a wiring with a norm: "
        "wiring='prenorm'.",
        why_zh=f"第一个非有限值：{zh}。",
        remedy_zh="降低学习率、裁剪梯度，或改用带归一化的接法：wiring='prenorm'。",
    )


@rule("broken-skip", "sick", "He et al. 2015, arXiv:1512.03385, equation 1: y = F(x) + x")
def _broken_skip(e: Evidence) -> Iterator[Seen]:
    """Find sums that add a branch to itself, blocks without the skip of their like, cut skips."""
    remedy = "y = f(norm(x)); x = x + y: keep x until the addition."
    remedy_zh = "y = f(norm(x)); x = x + y：相加之前不要覆盖 x。"
    for block in e.structure.coverage.doubled:
        yield Seen(
            where=block,
            value="x + x of what the branch returned",
            expected="the block's input + what the branch returns",
            why="The branch has overwritten the stream before the addition, which doubles the "
            "branch: there is no path around it.",
            remedy=remedy,
            why_zh="相加之前，分支的输出已覆盖了流；这个加法只是把分支加倍，没有绕过它的通路。",
            remedy_zh=remedy_zh,
        )
    residual = any(j.kind != "block" for j in e.structure.joins)
    for k, (c, join) in enumerate(zip(e.connections, e.structure.joins, strict=True)):
        if join.block in e.structure.coverage.doubled:
            continue
        alone = join.kind == "block" and residual
        # With N values the estimate of the gain errs by about gain / sqrt(N).
        error = c.gain_backward / math.sqrt(max(math.prod(join.shape), 1))
        lost = abs(c.identity_gain) + ERRORS * error < LOST
        if lost and (alone or e.plain_skip(k)):
            yield Seen(
                where=c.name,
                value=f"identity gain {c.identity_gain:.2g}",
                expected="about 1, the stream as it is",
                why="The other blocks add to the stream, this one replaces it."
                if alone
                else "No gradient passes the skip: something on it is detached or multiplied by 0.",
                remedy=remedy if alone else "x = x + f(x), without detach() or no_grad() on x.",
                why_zh="其他块都把输出加到流上，而这个块替换了流。"
                if alone
                else "梯度不经过跳跃连接：其上有 detach 或被乘以 0。",
                remedy_zh=remedy_zh
                if alone
                else "x = x + f(x)，x 上不要用 detach() 或 no_grad()。",
            )


GRADIENT_SOURCE = "Yang and Schoenholz 2017, arXiv:1712.08969: powers of depth with skips, else not"


@rule("vanishing-gradient", "sick", GRADIENT_SOURCE)
def _vanishing_gradient(e: Evidence) -> Iterator[Seen]:
    """Compare the gradient after the first connection of a stream with that after its last."""
    found = (g for g in e.gradients() if g.low * e.gradient_band(g, growing=False) < g.high)
    if (ends := next(found, None)) is None:
        return
    kept = any(e.plain_skip(k) for k in range(len(e)))
    yield Seen(
        where=e.connections[ends.first].name,
        value=_ends(e, ends),
        expected=_ratio_band(e.gradient_band(ends, growing=False)),
        why="On its way back the gradient shrinks from connection to connection, so the first "
        "ones do not learn.",
        remedy="Let the identity pass undamped: wiring='prenorm', or wiring='rezero'."
        if kept
        else "Add an identity path: x = x + f(norm(x)), which is wiring='prenorm'.",
        why_zh="梯度在反向传播中逐个连接缩小，最前面的连接学不到东西。",
        remedy_zh="让恒等通路不衰减：wiring='prenorm' 或 wiring='rezero'。"
        if kept
        else "加上恒等通路：x = x + f(norm(x))，即 wiring='prenorm'。",
    )


@rule("exploding-gradient", "sick", GRADIENT_SOURCE)
def _exploding_gradient(e: Evidence) -> Iterator[Seen]:
    """Compare the gradient after the last connection of a stream with that after its first."""
    found = (g for g in e.gradients() if g.low > e.gradient_band(g, growing=True) * g.high)
    if (ends := next(found, None)) is None:
        return
    yield Seen(
        where=e.connections[ends.first].name,
        value=_ends(e, ends),
        expected=_ratio_band(e.gradient_band(ends, growing=True)),
        why="On its way back the gradient grows from connection to connection, so no learning "
        "rate suits both ends.",
        remedy="Bound the branches: wiring='prenorm', or start='fixup', or wiring='rezero'.",
        why_zh="梯度在反向传播中逐个连接增大，没有一个学习率适合两端。",
        remedy_zh="约束分支：wiring='prenorm'，或 start='fixup'，或 wiring='rezero'。",
    )


def _ends(e: Evidence, ends: Ends) -> str:
    after = e.connections[ends.last].name
    return f"gradient RMS {ends.low:.2g}, against {ends.high:.2g} after {after}"


def _ratio_band(band: float) -> str:
    return f"a factor below {band:.3g} (the larger of {LEAST:.0f} and K^{POWER}) between them"


@rule("stream-blow-up", "sick", "Ding et al. 2021, arXiv:2105.13290, section 2.4")
def _stream_blow_up(e: Evidence) -> Iterator[Seen]:
    """Compare the stream with sqrt(start^2 + l): each branch of unit gain adds 1."""
    for k, c in enumerate(e.connections):
        if c.stream_after > e.stream_band(k):
            yield Seen(
                where=c.name,
                value=f"stream RMS {c.stream_after:.3g}, {e.connections[-1].stream_after:.3g} at "
                "the end",
                expected=f"below {e.stream_band(k):.3g}, {SLACK:.0f} times the law of depth",
                why="The branches write far more into the stream than branches of unit gain "
                "would, and later ones drown in it.",
                remedy="Lower the learning rate or lengthen the warm-up; wiring='sandwich' bounds "
                "what a branch adds.",
                why_zh="分支写入流的量远超单位增益的分支，后面的分支被淹没。",
                remedy_zh="降低学习率或延长预热；wiring='sandwich' 可限制分支写入的量。",
            )
            return


@rule("idle-depth", "sick", "Sun et al. 2025, The Curse of Depth, arXiv:2502.05795")
def _idle_depth(e: Evidence) -> Iterator[Seen]:
    """Compare the shares of the last third with those before, and with what rounding leaves.

    To first order a branch changes the loss by at most |gradient| |update|, so a share near 0 on a
    stream whose gradient is level is a lesion near 0. By the law of pre-norm a share falls as
    1/sqrt(l) at most; a wiring that starts silent is so everywhere. A branch that adds exactly 0 is
    not open yet, dropped in this pass, or dead: that is for `dead-branch` to say.
    """
    third = len(e) // 3
    if third < 2:
        return
    shares = [c.branch_share for c in e.connections]
    before, last = middle(shares[:-third]), [s for s in shares[-third:] if s != 0]
    band = min(ROUNDED, before / (SLACK * math.sqrt(len(e))))
    if not before > 0 or 2 * len(last) <= third or not all(s < band for s in last):
        return
    most = max(last)
    yield Seen(
        where=e.connections[-third].name,
        value=f"the last {third} branches add at most {most:.1e} of the stream",
        expected=f"at least {band:.1e}: median before {before:.1e}, law 1/sqrt(depth)",
        why="What they add is below the rounding of bfloat16 and far below what depth alone "
        "explains: the last third could be cut off.",
        remedy="wiring='lns' damps the stream's growth; else take fewer layers.",
        why_zh="它们加上的量低于 bfloat16 的舍入误差，也远低于深度规律：最后三分之一可以删去。",
        remedy_zh="wiring='lns' 抑制流的增长；否则减少层数。",
    )


@rule("dead-branch", "sick", "Lu et al. 2019, Dying ReLU, arXiv:1903.06733")
def _dead_branch(e: Evidence) -> Iterator[Seen]:
    """List the branches that do nothing and learn nothing."""
    zh = {
        "it adds 0": "输出恒为 0",
        "it adds the same at every position": "各位置输出相同",
        "no gradient reaches its parameters": "梯度到不了它的参数",
    }
    for k, how in sorted(e.dead.items()):
        yield Seen(
            where=e.connections[k].name,
            value=how,
            expected="an output that depends on the stream, or a gradient that opens it",
            why="The branch does nothing with the stream and no step can change that: all its "
            "units are off, or it is cut off.",
            remedy="Start the branch anew with a smaller learning rate, with GELU in place of "
            "ReLU; take away detach() and no_grad().",
            why_zh=f"{zh[how]}：分支对流不起作用，任何更新都改变不了。",
            remedy_zh="重新初始化该分支，降低学习率，用 GELU 代替 ReLU；去掉 detach()、no_grad()。",
        )


@rule("rank-collapse", "sick", "Dong et al. 2021, arXiv:2103.03404; Noci et al. 2022, 2206.03126")
def _rank_collapse(e: Evidence) -> Iterator[Seen]:
    """Find where all positions of a sequence have become alike, which they were not at first."""
    first, last = e.connections[0].token_similarity, e.connections[-1].token_similarity
    if 1 - first < 10 * ALIKE or not 1 - last < ALIKE or not _lost(e):
        return
    where = next(
        (c for k, c in enumerate(e.connections) if e.tokens(k) and 1 - c.token_similarity < ALIKE),
        None,
    )
    if where is not None:
        yield Seen(
            where=where.name,
            value=f"token similarity {where.token_similarity:.4f}, {last:.4f} at the end",
            expected=f"below {1 - ALIKE:g}; {first:.3f} after the first connection",
            why="All positions carry the same vector, so the head cannot tell them apart.",
            remedy="Keep each position's own path: wiring='prenorm', or a smaller start of the "
            "branches, wiring='deepnorm'.",
            why_zh="所有位置携带同一个向量，输出头无法区分它们。",
            remedy_zh="保留每个位置自己的通路：wiring='prenorm'；或减小分支初值：wiring='deepnorm'。",
        )


def _lost(e: Evidence) -> bool:
    """Whether what tells positions apart is gone, not only covered by a vector that all share.

    A pre-norm stream keeps all that is written, and a trained one often holds a large common part.
    """
    apart = [
        c.stream_after * math.sqrt(max(0.0, 1 - c.token_similarity))
        for c in e.connections
        if not math.isnan(c.token_similarity)
    ]
    return e.law != "sqrt" or SLACK * apart[-1] < max(apart)


@rule("dominated-skip", "sick", "De and Smith 2020, arXiv:2002.10444: the skip must dominate")
def _dominated_skip(e: Evidence) -> Iterator[Seen]:
    """Find single branches that drown the stream, far out of line with their neighbours."""
    for k, times in e.drowning().items():
        beside = f"{times:.3g} times its neighbours" if times < math.inf else "its neighbours 0"
        yield Seen(
            where=e.connections[k].name,
            value=f"branch / stream {e.connections[k].branch_share:.3g}, {beside}",
            expected=f"below {DROWNED:.0f}, or like its neighbours",
            why="This one branch leaves less than 1 % of the variance to all that came before.",
            remedy="Start it like the others, or wiring='layerscale(init=1e-5)', which lets a "
            "branch in slowly.",
            why_zh="仅这一个分支就使之前的全部内容只剩不到 1% 的方差。",
            remedy_zh="与其他分支同样初始化，或用 wiring='layerscale(init=1e-5)' 缓慢引入分支。",
        )


@rule("no-final-norm", "sick", "Xiong et al. 2020, arXiv:2002.04745, section 3.3: the final norm")
def _no_final_norm(e: Evidence) -> Iterator[Seen]:
    """Find a pre-norm stream that a map reads without a norm between."""
    last, own = e.structure.joins[-1], e.wirings[-1]
    needs = e.law == "sqrt" if own is None else own.final_norm
    if not needs or last.norm_after or not last.read_out:
        return
    c = e.connections[-1]
    yield Seen(
        where=f"after {c.name}",
        value=f"the head reads the stream at RMS {c.stream_after:.3g}",
        expected="a norm between the last connection and the head",
        why="Nothing bounds a pre-norm stream: the head's input grows with depth and training.",
        remedy="logits = head(norm(x)), with norm = nn.LayerNorm(dim) made beside the head.",
        why_zh="前置归一化的流没有上界：输出头的输入随深度和训练增长。",
        remedy_zh="logits = head(norm(x))，其中 norm = nn.LayerNorm(dim)，与输出头一同创建。",
    )


@rule("post-norm-needs-warmup", "warning", "Xiong et al. 2020, arXiv:2002.04745, section 4")
def _post_norm_needs_warmup(e: Evidence) -> Iterator[Seen]:
    """Warn of deep post-norm whose positions are alike; the gradient shows nothing at the start."""
    alike = e.connections[-1].token_similarity
    if not e.post_norm or e.layers <= WARM or not alike >= SIMILAR:
        return
    yield Seen(
        where=e.connections[0].name,
        value=f"{e.layers} layers of post-norm, token similarity {alike:.3f}",
        expected=f"at most {WARM} layers, or token similarity below {SIMILAR:g}",
        why="Each norm takes away a part of the stream that entered; at this depth little of the "
        "input is left, and the first full steps of Adam break what is.",
        remedy="Warm the learning rate up over some thousand steps, or wiring='deepnorm', or "
        "wiring='prenorm'.",
        why_zh="每个归一化都削弱进入的流；在这个深度输入所剩无几，Adam 最初的大步会把它毁掉。",
        remedy_zh="学习率预热数千步，或改用 wiring='deepnorm' 或 wiring='prenorm'。",
    )
