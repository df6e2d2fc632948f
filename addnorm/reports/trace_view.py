"""What terminal, page and charts share about a trace: vitals, order, coverage, folding; no torch.

A trace is here what `Trace.to_dict()` returns, or the same read back from JSON.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from addnorm.reports.trace_words import chinese

Row = Mapping[str, Any]
SEVERITIES = {"sick": "病态", "warning": "警告", "note": "提示"}  # worst first
ROWS = 60  # of the table of connections, unless all are asked for
NAMED = 9  # rows in the middle of a long table that a finding names
SHOWN = 3  # findings of one code that are shown in full


@dataclass(frozen=True)
class Vital:
    """One column of the table and, where `panel` is set, one panel of the chart."""

    key: str
    en: str
    zh: str
    short: str  # the head of the column in a terminal
    short_zh: str
    panel: bool = False
    log: bool = False  # whether factors matter, not differences
    span: tuple[float, float] | None = None  # what a linear axis shows at least
    mark: float | None = None  # the value of an intact connection
    form: str = ".3g"

    def name(self, zh: bool) -> str:
        """Return the full name."""
        return self.zh if zh else self.en


VITALS = (
    Vital("stream_before", "stream RMS before", "残差流 RMS（前）", "before", "流前"),
    Vital("stream_after", "stream RMS", "残差流 RMS", "stream", "残差流", True, log=True),
    Vital("branch_share", "branch share", "分支占比", "share", "占比", True, log=True),
    Vital("branch_cosine", "branch cosine", "分支余弦", "cosine", "余弦", form=".3f"),
    Vital("stream_cosine", "stream cosine", "流余弦", "kept", "保持", form=".3f"),
    Vital("gradient_before", "gradient RMS before", "梯度 RMS（前）", "before", "梯度前"),
    Vital("gradient_after", "gradient RMS", "梯度 RMS", "gradient", "梯度", True, log=True),
    Vital("identity_gain", "identity gain", "恒等增益", "identity", "恒等", True,
          span=(0.0, 1.1), mark=1.0),
    Vital("gain_forward", "forward gain", "前向增益", "forward", "前向"),
    Vital("gain_backward", "backward gain", "反向增益", "backward", "反向", True, log=True,
          mark=1.0),
    Vital("token_similarity", "token similarity", "位置相似度", "similar", "相似", True,
          span=(0.0, 1.0), form=".3f"),
    Vital("effective_rank", "effective rank", "有效秩", "rank", "秩", True, span=(0.0, 1.0)),
    Vital("dead_units", "dead units", "死亡单元", "dead", "死亡", True, span=(0.0, 0.05),
          form=".1%"),
    Vital("streams_cosine", "cosine between streams", "流间余弦", "streams", "流间", form=".3f"),
)  # fmt: skip
OVERALL = (  # of a comparison: key, names, form
    ("connections", "connections", "连接数", ".0f"),
    ("loss", "loss", "损失", ".4g"),
    ("gradient_slope", "gradient slope", "梯度斜率", "+.2f"),
    ("stream_growth", "stream growth", "残差流增长", ".3g"),
    ("token_similarity", "token similarity at the end", "末端位置相似度", ".3f"),
)
MEANINGS = {  # what the page says under the table
    "branch_share": (
        "RMS of what a connection adds / RMS of what it adds it to; – where nothing is added",
        "连接所加入部分的 RMS 与被加部分的 RMS 之比；没有相加时为 –",
    ),
    "branch_cosine": (
        "cosine between what is added and what it is added to",
        "所加入部分与被加部分之间的余弦",
    ),
    "stream_cosine": (
        "mean cosine between the stream before and after, per position",
        "残差流在连接前后之间的余弦，按位置取均值",
    ),
    "identity_gain": (
        "E[v·Jv] / E[v·v], J the Jacobian of the connection: 1 for an intact identity path, 0 for "
        "a lost one",
        "E[v·Jv] / E[v·v]，J 为连接的雅可比矩阵：恒等通路完好时为 1，丢失时为 0",
    ),
    "gain_backward": (
        "by how much the connection stretches a random gradient on its way back",
        "随机梯度回传经过该连接时被放大的倍数",
    ),
    "gain_forward": (
        "by how much the connection stretches a small random change of the stream",
        "残差流的微小随机变化经过该连接时被放大的倍数",
    ),
    "token_similarity": (
        "mean cosine between positions; 1: all are alike",
        "各位置之间的平均余弦；1 表示全部相同",
    ),
    "effective_rank": (
        "(sum s²)² / sum s⁴ over the singular values s of the stream as positions x width",
        "(Σs²)² / Σs⁴，s 为残差流（位置 × 宽度）的奇异值",
    ),
    "dead_units": (
        "share of the branch's features that are 0 in the whole batch",
        "分支特征中在整个批次内恒为 0 的比例",
    ),
}
BY_KEY = {vital.key: vital for vital in VITALS}
PANELS = tuple(vital for vital in VITALS if vital.panel)


def value_of(row: Row, key: str) -> float:
    """Return a number of a connection; NaN where it is not known, as JSON has null for it."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def measured(connections: Sequence[Row], vitals: Iterable[Vital]) -> list[Vital]:
    """Return the vitals that at least one connection has a value of."""
    return [v for v in vitals if any(not math.isnan(value_of(c, v.key)) for c in connections)]


# -- findings ----------------------------------------------------------------------------------


def severity_order(severity: str) -> int:
    """Return 0 for sick, more for what is less bad."""
    names = list(SEVERITIES)
    return names.index(severity) if severity in names else len(names)


@dataclass(frozen=True)
class Group:
    """The findings of one code and severity: some in full, and where the rest lie."""

    findings: tuple[Row, ...]
    more: tuple[str, ...]


def grouped(findings: Sequence[Row], everything: bool = False) -> list[Group]:
    """Return the findings worst first, those of one code together."""
    groups: dict[tuple[int, str, str], list[Row]] = {}
    for f in sorted(findings, key=lambda f: severity_order(str(f["severity"]))):
        key = severity_order(str(f["severity"])), str(f["severity"]), str(f["code"])
        groups.setdefault(key, []).append(f)
    cut = None if everything else SHOWN
    return [
        Group(tuple(rows[:cut]), tuple(str(f["where"]) for f in rows[cut:]) if cut else ())
        for rows in groups.values()
    ]


def verdict(findings: Sequence[Row]) -> tuple[str, str]:
    """Return how many findings of which severity there are, in English and Chinese."""
    if not findings:
        return "none", "无"
    counted = Counter(str(f["severity"]) for f in findings)
    order = sorted(counted, key=severity_order)
    words = {"warning": ("warning", "warnings"), "note": ("note", "notes")}
    en = [f"{counted[s]} {words.get(s, (s, s))[counted[s] > 1]}" for s in order]
    zh = [f"{SEVERITIES.get(s, s)} {counted[s]} 项" for s in order]
    return ", ".join(en), "，".join(zh)


# -- coverage ----------------------------------------------------------------------------------


def coverage_lines(coverage: Row | None, zh: bool) -> list[str]:
    """Return what discovery saw, what it left out and what it did not see, a line each."""
    if coverage is None:
        return []
    seen, additions = coverage["connections"], coverage["additions"]
    ignored, fallbacks = coverage.get("ignored", {}), coverage.get("fallbacks", {})
    opaque, notes = coverage.get("opaque", {}), coverage.get("notes", ())
    kinds = Counter(map(str, fallbacks.values()))
    if zh:
        lines = [f"{additions} 个加法，{seen} 个连接"]
        lines += [f"{n} 个加法不是连接：{chinese(reason)}" for reason, n in ignored.items()]
        lines += [f"{n} 个块按整体测量：{chinese(reason)}" for reason, n in kinds.items()]
        lines += [f"{name} 的 {n} 次调用不可见" for name, n in opaque.items()]
        return [*lines, *map(chinese, notes)]
    lines = [f"{_counted(seen, 'connection')} among {_counted(additions, 'addition')}"]
    lines += [f"{n} ignored: {reason}" for reason, n in ignored.items()]
    lines += [f"{_counted(n, 'block')} taken whole: {reason}" for reason, n in kinds.items()]
    lines += [f"{_counted(n, 'call')} of {name} out of sight" for name, n in opaque.items()]
    return [*lines, *map(str, notes)]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# -- long tables -------------------------------------------------------------------------------


def folded(count: int, named: Iterable[int], rows: int = ROWS) -> list[int | tuple[int, int]]:
    """Return the indices of a table of at most `rows` lines; a pair stands for a range left out.

    The ends stay, and in the middle some of the `named` ones.
    """
    if count <= rows:
        return list(range(count))
    side = (rows - 2 * NAMED - 1) // 2
    middle = [i for i in sorted(set(named)) if side <= i < count - side][:NAMED]
    shown: list[int | tuple[int, int]] = []
    kept = [*range(side), *middle, *range(count - side, count)]
    before = -1
    for i in kept:
        if i > before + 2:
            shown.append((before + 1, i - 1))
        elif i == before + 2:
            shown.append(before + 1)
        shown.append(i)
        before = i
    return shown


def named_rows(trace: Row) -> set[int]:
    """Return the indices of the connections that findings name."""
    names = {str(f["where"]) for f in trace["findings"]}
    return {i for i, c in enumerate(trace["connections"]) if c["name"] in names}
