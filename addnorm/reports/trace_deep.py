"""What the deeper looks of a trace say in a few lines, in English or Chinese; no torch.

Each function reads what the look's `to_dict()` gave, also after JSON, which has null for NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from addnorm.reports.trace_words import chinese

Look = Mapping[str, Any]
WORST = 3  # connections that a line names


def number(value: Any) -> float:
    """Return a number; NaN where it is not known."""
    return float(value) if isinstance(value, int | float) else math.nan


def numbers(values: Sequence[Any]) -> list[float]:
    """Return the numbers of a list; NaN where one is not known."""
    return [number(v) for v in values]


def deep_lines(deep: Mapping[str, Any], zh: bool) -> list[str]:
    """Return what the deeper looks of a trace say, in the order of the looks."""
    return [line for name, look in deep.items() if name in LINES for line in LINES[name](look, zh)]


def both_lines(name: str, look: Look) -> list[tuple[str, str]]:
    """Return what one look says in English and Chinese, a pair a line."""
    if name not in LINES:
        return []
    return list(zip(LINES[name](look, False), LINES[name](look, True), strict=True))


def lesion_lines(look: Look, zh: bool) -> list[str]:
    """Return which connections are missed most when their branches are removed."""
    singles = numbers(look["singles"])
    known = [i for i, v in enumerate(singles) if math.isfinite(v)]
    if not known:
        return []
    worst = sorted(known, key=lambda i: -abs(singles[i]))[:WORST]
    idle = sum(abs(singles[i]) < 1e-3 for i in known)
    names = "，" if zh else ", "
    listed = names.join(f"{look['names'][i]} {singles[i]:+.3g}" for i in worst)
    r = number(look["correlation"])
    if zh:
        line = f"去除单个分支后损失变化最大的连接：{listed}；{idle}/{len(known)} 个变化小于 0.001"
        line += "" if math.isnan(r) else f"；与一阶估计的相关系数 {r:.2f}"
    else:
        line = (
            f"lesion: the loss changes most without the branch of {listed}; by less than 0.001 at "
            f"{idle} of {len(known)} connections"
        )
        line += "" if math.isnan(r) else f"; correlation with the first-order estimate {r:.2f}"
    return [line, *noted(look, "lesion", "去除分支", zh)]


def paths_lines(look: Look, zh: bool) -> list[str]:
    """Return how long the paths are that carry the gradient, in both readings."""
    mean, other = number(look["mean_length"]), number(look["mean_length_incoherent"])
    first, last = look["range_90"]
    count = len(look["names"])
    if zh:
        line = (
            f"路径：平均长度 {mean:.2f}（共 {count} 个连接，相干），90% 的能量在长度 {first} 至 "
            f"{last}"
        )
        line += "" if math.isnan(other) else f"；非相干平均长度 {other:.2f}"
    else:
        line = (
            f"paths: mean length {mean:.2f} of {count} connections (coherent), 90 % of the energy "
            f"at lengths {first} to {last}"
        )
        line += "" if math.isnan(other) else f"; mean length {other:.2f} (incoherent)"
    return [line, *noted(look, "paths", "路径", zh)]


def landscape_lines(look: Look, zh: bool) -> list[str]:
    """Return the range of the losses, what it cost, and how far the picture can be trusted."""
    error, center = number(look["error"]), number(look["center"])
    low, high, calls = number(look["low"]), number(look["high"]), look["evaluations"]
    if zh:
        line = (
            f"损失曲面：原点 {center:.4g}，范围 {low:.4g} 至 {high:.4g}，{calls} 次前向计算，"
            f"留出点误差为范围的 {error:.2%}"
        )
    else:
        line = (
            f"landscape: loss {center:.4g} at the origin, from {low:.4g} to {high:.4g}, "
            f"{calls} forward passes, error at held-out points {error:.2%} of the range"
        )
    return [line, *noted(look, "landscape", "损失曲面", zh)]


def lens_lines(look: Look, zh: bool) -> list[str]:
    """Return from which depth on the model answers as it does at the end, and that it is biased."""
    depths, agreement = look["depths"], numbers(look["agreement"])
    off = [i for i, a in enumerate(agreement) if not a >= 0.5]
    settled = depths[off[-1] + 1] if off else depths[0]  # the whole model agrees with itself
    half, last = agreement[len(depths) // 2], depths[-1]
    if zh:
        lines = [
            f"透镜：从第 {settled} 个连接之后起，至少一半的回答与完整模型相同（共 {last} 个连接）；"
            f"在一半深度处为 {half:.0%}；{look['label_zh']}"
        ]
    else:
        lines = [
            f"lens: after {settled} of {last} connections at least half of the answers are those "
            f"of the whole model, at half depth {half:.0%}; {look['label']}"
        ]
    if not look["complete"]:
        left = last + 1 - len(depths)
        lines.append(
            f"透镜：预算用完，{left} 个深度未读"
            if zh
            else f"lens: the budget left out {left} depths"
        )
    names = [chinese(n) if zh else str(n) for n in look.get("notes", ())]
    return [*lines, *(f"透镜：{n}" if zh else f"lens: {n}" for n in names)]


def whiteness_lines(look: Look, zh: bool) -> list[str]:
    """Return how far the input gradient is from white noise along a line."""
    first, top = number(look["autocorrelation"][1]), number(look["white_high"][1])
    if math.isnan(first):
        return [
            "输入梯度沿直线不变" if zh else "whiteness: the gradient is constant along the line"
        ]
    brown, turns = number(look["brownness"]), number(look["reversals"])
    white = first <= top
    if zh:
        says = "如同白噪声（已破碎）" if white else "并非白噪声"
        return [
            f"输入梯度{says}：滞后 1 的自相关 {first:.2f}（白噪声不超过 {top:.2f}），"
            f"棕度 {brown:.2f}，反向比例 {turns:.1%}"
        ]
    says = "is like white noise (shattered)" if white else "is no white noise"
    return [
        f"whiteness: the input gradient {says}: autocorrelation {first:.2f} at lag 1 (white noise: "
        f"up to {top:.2f}), brownness {brown:.2f}, {turns:.1%} of neighbours turn back"
    ]


def noted(look: Look, en: str, zh_name: str, zh: bool) -> list[str]:
    """Return the note of a look, where it has one."""
    note = look.get("note", "")
    return [f"{zh_name}：{chinese(note)}" if zh else f"{en}: {note}"] if note else []


LINES: dict[str, Callable[[Look, bool], list[str]]] = {
    "lesion": lesion_lines,
    "paths": paths_lines,
    "landscape": landscape_lines,
    "lens": lens_lines,
    "whiteness": whiteness_lines,
}
