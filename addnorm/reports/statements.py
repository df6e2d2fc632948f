"""What a comparison says in plain words: every sentence is computed from its cells. No torch here."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass

from addnorm.reports.summary import MARGIN, STATUS, Group, Summary, interval

STEEP = 1.0  # decades of gradient per 10 connections that count as a steep slope
ALIKE = 0.9  # mean cosine between positions that counts as collapsed


@dataclass(frozen=True)
class Statement:
    """One thing that the numbers say, in English and Chinese."""

    code: str
    en: str
    zh: str


def statements(summary: Summary) -> list[Statement]:
    """Return what was found and which wiring to take, every sentence computed from the cells."""
    found = [_advice(summary), *_best_of_all(summary)]
    for wiring in summary.wirings:
        for rule in (_trains, _degrades, _warmup, _why, _deeper):
            found += rule(summary, wiring)
    found += _start(summary)
    return found


def _advice(s: Summary) -> Statement:
    depth = s.depths[-1]
    ranked = [g for g in s.best_at(depth) if g.status == "trained"]
    if not ranked:
        partly = [g for g in s.best_at(depth) if g.trained]
        shallower = [d for d in s.depths if any(g.status == "trained" for g in s.best_at(d))]
        if partly:
            g = partly[0]
            return Statement(
                "take-none",
                f"Take none of these at depth {depth} yet: the best, {g.wiring}, trained with only "
                f"{g.trained} of {len(g.cells)} seeds.",
                f"深度 {depth} 时暂不建议采用其中任何一种：最好的 {g.wiring} 在 {len(g.cells)} 个随机种子中"
                f"只有 {g.trained} 个训练成功。",
            )
        en = (
            f" At depth {shallower[-1]}, take {_names(s, shallower[-1], 'and')}."
            if shallower
            else ""
        )
        zh = f"深度 {shallower[-1]} 时可用 {_names(s, shallower[-1], '和')}。" if shallower else ""
        return Statement(
            "take-none",
            f"Take none of these at depth {depth}: no wiring trained there. Try other rates, a "
            f"longer warm-up or more steps.{en}",
            f"深度 {depth} 时没有一种接法训练成功，都不建议采用。可以换学习率、延长预热或增加步数再试。{zh}",
        )
    best = ranked[0]
    ties = [g for g in ranked[1:] if not _apart(best, g)]
    seeds = len(best.cells)
    if ties and seeds == 1:
        return Statement(
            "take-one-seed",
            f"At depth {depth} {best.wiring} has the lowest validation loss, {best.loss:.3f}, but "
            "one seed cannot tell it from the others that trained; use --seeds 3.",
            f"深度 {depth} 时 {best.wiring} 的验证损失最低（{best.loss:.3f}），但只有一个随机种子，"
            "无法与其他训练成功的接法分出高下；请用 --seeds 3。",
        )
    warm = f" with {best.warmup} warm-up steps" if best.warmup else ""
    warm_zh = f"（预热 {best.warmup} 步）" if best.warmup else ""
    if ties:
        names = ", ".join(g.wiring for g in ties)
        return Statement(
            "take-tie",
            f"At depth {depth} take {best.wiring}{warm} (validation loss {best.loss:.3f}) or {names}: "
            f"with {len(best.cells)} seeds the difference cannot be told from chance.",
            f"深度 {depth} 时可选 {best.wiring}{warm_zh}（验证损失 {best.loss:.3f}），也可选 {names}："
            f"仅凭 {len(best.cells)} 个随机种子分不出高下。",
        )
    rest = s.best_at(depth)[1:]
    if not rest:
        en, zh = "; no other wiring was tried.", "；没有比较其他接法。"
    else:
        second = rest[0]
        en = f"; the next, {second.wiring}, is at {_number(second.loss)} ({_status(second, 'en')})."
        zh = f"；其次是 {second.wiring}，{_number(second.loss)}（{_status(second, 'zh')}）。"
    return Statement(
        "take",
        f"At depth {depth} take {best.wiring}{warm}: validation loss {best.loss:.3f}{en}",
        f"深度 {depth} 时建议采用 {best.wiring}{warm_zh}：验证损失 {best.loss:.3f}{zh}",
    )


def _best_of_all(s: Summary) -> list[Statement]:
    """Say where the lowest loss of all cells is, when that is not at the greatest depth."""
    trained = [g for d in s.depths for g in s.best_at(d) if g.status == "trained"]
    best = min(trained, key=lambda g: g.loss, default=None)
    deepest = [g for g in trained if g.depth == s.depths[-1]]
    if best is None or best in deepest or not all(_apart(best, g) for g in deepest):
        return []
    return [
        Statement(
            "best-of-all",
            f"Best of all cells: {best.wiring} at depth {best.depth}, validation loss {best.loss:.3f}.",
            f"全部单元中最好的是深度 {best.depth} 的 {best.wiring}，验证损失 {best.loss:.3f}。",
        )
    ]


def _trains(s: Summary, wiring: str) -> list[Statement]:
    """Say at which depths a wiring trained, was stuck or diverged, at its best rate and warm-up."""
    by_status: dict[str, list[int]] = defaultdict(list)
    for depth in s.depths:
        group = s.best(wiring, depth)
        if group is not None:
            by_status[group.status].append(depth)
    en, zh = [], []
    line, (name, name_zh) = f"{s.unigram:.3f}", s.words["line"]
    for status, depths in by_status.items():
        losses = [g.loss for d in depths if (g := s.best(wiring, d)) is not None]
        values = " / ".join(map(_number, losses))
        d = ", ".join(map(str, depths))
        match status:
            case "trained":
                en.append(f"trained at depth {d} (validation loss {values})")
                zh.append(f"深度 {d} 训练成功（验证损失 {values}）")
            case "stuck":
                en.append(f"stuck at depth {d} ({values}; the {name} is {line})")
                zh.append(f"深度 {d} 停滞（{values}；{name_zh}为 {line}）")
            case "diverged":
                en.append(f"diverged at depth {d}")
                zh.append(f"深度 {d} 发散")
            case _:
                en.append(f"trained with some seeds only at depth {d} (mean {values})")
                zh.append(f"深度 {d} 只有部分随机种子训练成功（均值 {values}）")
    return [Statement("trains", f"{wiring}: {'; '.join(en)}.", f"{wiring}：{'；'.join(zh)}。")]


def _degrades(s: Summary, wiring: str) -> list[Statement]:
    """Say where the *training* loss rises with depth: degradation, which is no overfitting."""
    groups = [g for d in s.depths if (g := s.best(wiring, d)) is not None and len(g.whole) > 1]
    if len(groups) < 2:
        return []
    best, deepest = min(groups, key=lambda g: g.training), groups[-1]
    low = [v for v in best.training_losses if v is not None]
    high = [v for v in deepest.training_losses if v is not None]
    rise = statistics.fmean(high) - statistics.fmean(low)
    if rise < MARGIN or interval(high)[0] <= interval(low)[1]:
        return []
    values = " / ".join(_number(g.training) for g in groups)
    depths = ", ".join(str(g.depth) for g in groups)
    return [
        Statement(
            "degrades",
            f"{wiring} degrades: at depths {depths} the training loss is {values}. A deeper net "
            "that fits its own training data worse is not overfitting.",
            f"{wiring} 出现退化：深度 {depths} 的训练损失依次为 {values}。更深的网络连训练数据都拟合得更差，这不是过拟合。",
        )
    ]


def _warmup(s: Summary, wiring: str) -> list[Statement]:
    """Say at which depths warm-up decides whether a wiring trains."""
    if len(s.warmups) < 2:
        return []
    needs, harms = [], []
    for depth in s.depths:
        least = s.best(wiring, depth, s.warmups[0])
        longest = s.best(wiring, depth, s.warmups[-1])
        if least is None or longest is None:
            continue
        if longest.status == "trained" and not least.trained:
            needs.append((depth, least, longest))
        if least.status == "trained" and not longest.trained:
            harms.append((depth, least, longest))
    found = []
    for code, rows in (("needs-warmup", needs), ("warmup-harms", harms)):
        for depth, least, longest in rows:
            steps = f"{longest.warmup} warm-up steps"
            few = f"{least.warmup} steps" if least.warmup else "none"
            few_zh = f"预热 {least.warmup} 步" if least.warmup else "不预热"
            verb = "needs warm-up" if code == "needs-warmup" else "is worse off with warm-up"
            verb_zh = "需要预热" if code == "needs-warmup" else "预热反而有害"
            found.append(
                Statement(
                    code,
                    f"{wiring} {verb} at depth {depth}: with {steps} the validation loss is "
                    f"{_number(longest.loss)} ({_status(longest, 'en')}), with {few} it is "
                    f"{_number(least.loss)} ({_status(least, 'en')}).",
                    f"{wiring} 在深度 {depth} 时{verb_zh}：预热 {longest.warmup} 步的验证损失为 "
                    f"{_number(longest.loss)}（{_status(longest, 'zh')}），{few_zh}时为 "
                    f"{_number(least.loss)}（{_status(least, 'zh')}）。",
                )
            )
    return found


def _why(s: Summary, wiring: str) -> list[Statement]:
    """Say what the X-ray saw at the start of the deepest net that did not train."""
    failed = [g for d in s.depths if (g := s.best(wiring, d)) is not None and not g.trained]
    if not failed:
        return []
    group = failed[-1]
    if group.falling:
        steps = int(group.median("steps"))
        return [
            Statement(
                "too-short",
                f"{wiring} at depth {group.depth}: the loss was still falling at step {steps:,}, so "
                f"the training may be too short to judge; try --steps {10 * steps}.",
                f"{wiring}，深度 {group.depth}：第 {steps:,} 步时损失仍在下降，训练可能太短，无法判断；请试 --steps {10 * steps}。",
            )
        ]
    slope = group.median("start", "gradient_slope")
    similarity = group.median("start", "token_similarity")
    count = len(group.cells[0]["start"]["connections"])
    decades = slope * (count - 1) / 10
    if not math.isfinite(slope) or not math.isfinite(similarity):
        return []  # not measured: say nothing rather than guess
    where, where_zh = f"{wiring} at depth {group.depth}", f"{wiring}，深度 {group.depth}"
    if slope >= STEEP:
        return [
            Statement(
                "why-vanishing",
                f"Why, {where}: at the start the gradient shrinks by {slope:.1f} decades per 10 "
                f"connections on its way back, about {decades:.1f} decades over all {count}; the "
                "first layers get almost no gradient.",
                f"原因（{where_zh}）：训练开始时，梯度在回传途中每经过 10 个连接缩小 {slope:.1f} 个数量级，"
                f"{count} 个连接合计约 {decades:.1f} 个数量级；靠近输入的层几乎收不到信号。",
            )
        ]
    if slope <= -STEEP:
        return [
            Statement(
                "why-exploding",
                f"Why, {where}: at the start the gradient grows by {-slope:.1f} decades per 10 "
                f"connections on its way back, about {-decades:.0f} decades over all {count}.",
                f"原因（{where_zh}）：训练开始时，梯度在回传途中每经过 10 个连接放大 {-slope:.1f} 个数量级，"
                f"{count} 个连接合计约 {-decades:.0f} 个数量级。",
            )
        ]
    if similarity >= ALIKE:
        return [
            Statement(
                "why-collapse",
                f"Why, {where}: the gradient is not the reason (slope {slope:+.2f} decades per 10 "
                f"connections), but after the last connection all positions look alike at the start "
                f"(mean cosine {similarity:.3f}): rank collapse.",
                f"原因（{where_zh}）：问题不在梯度（每 10 个连接 {slope:+.2f} 个数量级），而是训练开始时各位置在"
                f"最后一个连接之后已几乎相同（平均余弦 {similarity:.3f}）：秩坍缩。",
            )
        ]
    return [
        Statement(
            "why-unseen",
            f"Why, {where}: the X-ray at the start shows neither a steep gradient (slope "
            f"{slope:+.2f} decades per 10 connections) nor positions that look alike (mean cosine "
            f"{similarity:.3f}); it does not show the cause.",
            f"原因（{where_zh}）：训练开始时的透视既没有发现陡峭的梯度（每 10 个连接 {slope:+.2f} 个数量级），"
            f"也没有发现位置趋同（平均余弦 {similarity:.3f}）；初始透视未能显示原因。",
        )
    ]


def _deeper(s: Summary, wiring: str) -> list[Statement]:
    """Say whether more depth helped a wiring that trains."""
    trained = [
        g for d in s.depths if (g := s.best(wiring, d)) is not None and g.status == "trained"
    ]
    if len(trained) < 2:
        return []
    shallow, deep = trained[0], trained[-1]
    gain = shallow.loss - deep.loss
    if len(shallow.cells) < 2 or len(deep.cells) < 2:
        worse, worse_zh = ("higher", "高") if gain < 0 else ("lower", "低")
        return [
            Statement(
                "depth-one-seed",
                f"{wiring}: the loss at depth {deep.depth} is {abs(gain):.3f} {worse} than at depth "
                f"{shallow.depth}, from one seed; use --seeds 3 to know.",
                f"{wiring}：深度 {deep.depth} 的损失比深度 {shallow.depth} {worse_zh} {abs(gain):.3f}，但只有一个随机种子；请用 --seeds 3 确认。",
            )
        ]
    if not _apart(shallow, deep):
        en, zh = "makes no difference beyond the seeds' spread", "没有超出随机种子波动的差别"
        code = "depth-equal"
    elif gain > 0:
        en, zh, code = f"lowers the loss by {gain:.3f}", f"使损失降低 {gain:.3f}", "depth-helps"
    else:
        en, zh, code = f"raises the loss by {-gain:.3f}", f"使损失升高 {-gain:.3f}", "depth-hurts"
    steps = int(shallow.median("steps"))
    return [
        Statement(
            code,
            f"{wiring}: going from depth {shallow.depth} to {deep.depth} {en}, at {steps:,} steps each.",
            f"{wiring}：深度从 {shallow.depth} 增至 {deep.depth}，同为 {steps:,} 步，{zh}。",
        )
    ]


def _start(s: Summary) -> list[Statement]:
    """Say that each wiring was started as its own scheme asks, unless the user set one start."""
    starts = {c["wiring"]: c["start_rule"] for g in s.groups for c in g.cells}
    if len(set(starts.values())) < 2:
        return []
    listed = ", ".join(f"{w}: {r}" for w, r in starts.items())
    return [
        Statement(
            "own-start",
            f"Each wiring started as its own scheme asks ({listed}); part of a difference can come "
            "from the start. --start NAME gives all the same.",
            f"每种接法都按各自方案要求初始化（{listed}），差别可能部分来自初始化。用 --start 指定一种初始化即可统一。",
        )
    ]


def _apart(a: Group, b: Group) -> bool:
    """Whether the intervals of two groups do not overlap; one seed never tells."""
    if len(a.cells) < 2 or len(b.cells) < 2:
        return False
    return a.interval[1] < b.interval[0] or b.interval[1] < a.interval[0]


def _names(s: Summary, depth: int, joiner: str) -> str:
    names = [g.wiring for g in s.best_at(depth) if g.status == "trained"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {joiner} {names[-1]}"


def _status(group: Group, lang: str) -> str:
    return STATUS[group.status][lang]


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "∞"
