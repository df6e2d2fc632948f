"""What the tables, charts and pages of studies say in words; no torch.

A result is what `addnorm.studies.running.conclude_study` returns: plain values, each text as
`{"en": ..., "zh": ...}`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

VERDICTS = {
    "SUPPORTED": ("supported", "支持"),
    "REFUTED": ("refuted", "否定"),
    "INCONCLUSIVE": ("inconclusive", "不能断定"),
    "": ("not run yet", "尚未运行"),
}
FACTORS = {
    "net": ("network", "网络"),
    "wiring": ("wiring", "接法"),
    "depth": ("layers", "层数"),
    "rate": ("learning rate", "学习率"),
    "length": ("length", "训练长度"),
    "layer": ("layer", "层"),
    "chain": ("chain", "连乘"),
    "spread": ("spread", "大小"),
    "change": ("change", "改动"),
    "variant": ("variant", "变体"),
    "norm": ("norm", "归一化"),
    "warmup": ("warm-up", "预热"),
    "embedding": ("embedding", "词嵌入"),
    "target": ("target", "目标"),
    "part": ("part", "部件"),
    "width": ("width", "宽度"),
    "branch": ("branch", "分支"),
    "twin": ("printed block", "所印的块"),
    "side": ("side", "版本"),
    "formula": ("formula", "公式"),
    "optimizer": ("optimiser", "优化器"),
    "law": ("law", "规律"),
    "task": ("task", "任务"),
}
LOGARITHMS = {"powers of ten": 10, "doublings": 2}  # units, by how they begin
MODES = {"quick": ("quick", "快速"), "default": ("default", "默认"), "long": ("long", "加长")}


class Both(NamedTuple):
    """A text in English and Chinese."""

    en: str
    zh: str


def text_in(words: Mapping[str, str], lang: str) -> str:
    """Return the text of a pair of languages."""
    return words["zh" if lang == "zh" else "en"]


def verdict_in(verdict: str, lang: str) -> str:
    """Return a verdict as a word."""
    return VERDICTS[verdict][lang == "zh"]


def factor_in(name: str, lang: str) -> str:
    """Return the name of a factor as a word; as it stands where it has none."""
    return FACTORS.get(name, (name, name))[lang == "zh"]


def mode_in(row: Mapping[str, Any], lang: str) -> str:
    """Return the mode of a result as a word; a dash where it was never run."""
    return MODES[row["mode"]][lang == "zh"] if row["verdict"] else "–"


def counted(verdicts: Iterable[str], lang: str) -> str:
    """Count verdicts: "3 supported, 1 refuted"."""
    found = Counter(verdicts)
    parts = [f"{found[v]} {words[0]}" for v, words in VERDICTS.items() if found[v]]
    parts_zh = [f"{words[1]} {found[v]}" for v, words in VERDICTS.items() if found[v]]
    return "，".join(parts_zh) if lang == "zh" else ", ".join(parts)


# -- numbers -----------------------------------------------------------------------------------


def known(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def amount(value: Any, digits: int = 3) -> str:
    """Write a number with so many digits; a dash where it is not known."""
    if not known(value):
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    else:
        text = f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"
    return text.replace("-", "−")


def probability(p: Any) -> str:
    """Write a p-value; a dash where there is none."""
    if not known(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


def duration(seconds: float, lang: str) -> str:
    """Write a time, as "4.2 min" or "38 s"."""
    minute, second = ("分钟", "秒") if lang == "zh" else ("min", "s")
    return f"{seconds / 60:.1f} {minute}" if seconds >= 60 else f"{seconds:.0f} {second}"


def with_unit(value: Any, unit: Mapping[str, str], lang: str) -> str:
    """Write a number with its unit, and a logarithm with the factor that it stands for."""
    word = text_in(unit, lang)
    if not (word and known(value)):
        return amount(value)
    base = next((b for start, b in LOGARITHMS.items() if unit["en"].startswith(start)), 0)
    factor = amount(base**value) if base and abs(value) < 300 else ""
    brackets = f"（{factor} 倍）" if lang == "zh" else f" (a factor of {factor})"
    return f"{amount(value)} {word}{brackets if factor else ''}"


def effect_in(row: Mapping[str, Any], lang: str) -> str:
    """Write an effect with its 95 % interval and its unit."""
    if not known(row["effect"]):
        return "–"
    low, high = map(amount, row["interval"])
    unit = text_in(row["unit"], lang)
    span = "" if low == high else f" [{low}, {high}]"
    return f"{amount(row['effect'])}{span}{' ' if unit else ''}{unit}"


# -- how a verdict comes about -----------------------------------------------------------------


def demand(contrast: Mapping[str, Any], lang: str) -> str:
    """Write what a statement asks of its effect, such as "> 1 powers of ten"."""
    limit = with_unit(contrast["limit"], contrast["unit"], lang)
    sign = {"above": ">", "below": "<", "within": "|·| <", "exact": "|·| ≤"}
    return f"{sign[contrast['rule']]} {limit}".replace(" ", "\N{NO-BREAK SPACE}", 2)


def effect_line(contrast: Mapping[str, Any], count: int) -> Both:
    """Say effect, interval, limit and p of a contrast over so many seeds."""
    if not known(contrast["effect"]):
        return Both(
            "No effect: a seed is missing, or a training failed in which nothing stands for it.",
            "没有效应值：缺少种子，或有训练失败且没有可代替的数值。",
        )
    here = {lang: with_unit(contrast["effect"], contrast["unit"], lang) for lang in ("en", "zh")}
    limit = {lang: demand(contrast, lang) for lang in ("en", "zh")}
    p, p_zh = "", ""
    if known(contrast["p"]):
        chance = probability(contrast["p"])
        sign = "" if chance.startswith("<") else "= "
        told = f"p {sign}{chance}".replace(" ", "\N{NO-BREAK SPACE}")
        p, p_zh = f", {told}", f"，{told}"
    if contrast["interval"][0] == contrast["interval"][1] and count > 1:
        return Both(
            f"Effect, the same in all {count} seeds: {here['en']}; the statement asks for "
            f"{limit['en']}{p}.",
            f"效应（{count} 个种子都相同）：{here['zh']}；命题要求 {limit['zh']}{p_zh}。",
        )
    if count == 1:
        return Both(
            f"Effect: {here['en']}; the statement asks for {limit['en']}{p}.",
            f"效应：{here['zh']}；命题要求 {limit['zh']}{p_zh}。",
        )
    low, high = map(amount, contrast["interval"])
    return Both(
        f"Median effect over {count} seeds: {here['en']}, 95 % interval [{low}, {high}]; the "
        f"statement asks for {limit['en']}{p}.",
        f"{count} 个种子的效应中位数：{here['zh']}，95% 区间 [{low}, {high}]；"
        f"命题要求 {limit['zh']}{p_zh}。",
    )


def rule_lines(contrast: Mapping[str, Any], planned: int) -> list[tuple[str, Both]]:
    """Say for each verdict what would have led to it, given the rule and the limit."""
    limit = {lang: with_unit(contrast["limit"], contrast["unit"], lang) for lang in ("en", "zh")}
    over = {lang: with_unit(-contrast["limit"], contrast["unit"], lang) for lang in ("en", "zh")}
    low_p, low_p_zh = "p is at most 0.05", "p 不超过 0.05"
    side = {"above": ("above", "高于"), "below": ("below", "低于")}
    other = {"above": ("below", "低于"), "below": ("above", "高于")}
    rule = contrast["rule"]
    if rule == "exact":
        return [
            ("SUPPORTED", Both(
                f"the absolute effect of every seed is at most {limit['en']}",
                f"每个种子的效应绝对值都不超过 {limit['zh']}",
            )),
            ("REFUTED", Both("that of a single seed is larger", "只要有一个种子超过")),
            ("INCONCLUSIVE", Both("an effect could not be computed", "有效应值算不出来")),
        ]  # fmt: skip
    if rule == "within":
        return [
            ("SUPPORTED", Both(
                f"both one-sided tests, against {over['en']} and against {limit['en']}, have a p of "
                "at most 0.05: the effect lies between them",
                f"分别对 {over['zh']} 与 {limit['zh']} 做的两个单侧检验，p 都不超过 0.05：效应位于两者之间",
            )),
            ("REFUTED", Both(
                "the mean effect lies beyond one of the two, and the two-sided p there is at most 0.05",
                "效应均值超出其中一侧，且该处双侧检验的 p 不超过 0.05",
            )),
            ("INCONCLUSIVE", Both(
                f"neither holds, as with an effect that spreads across a limit or with too few of "
                f"the {planned} planned seeds",
                f"两者都不成立，例如效应分布跨过界限，或计划的 {planned} 个种子完成得太少",
            )),
        ]  # fmt: skip
    return [
        ("SUPPORTED", Both(
            f"{low_p} and the mean effect lies {side[rule][0]} {limit['en']}",
            f"{low_p_zh}，且效应均值{side[rule][1]} {limit['zh']}",
        )),
        ("REFUTED", Both(
            f"{low_p} and the mean effect lies {other[rule][0]} {limit['en']}",
            f"{low_p_zh}，且效应均值{other[rule][1]} {limit['zh']}",
        )),
        ("INCONCLUSIVE", Both(
            f"p is above 0.05, as with effects on both sides of the limit or with too few of the "
            f"{planned} planned seeds",
            f"p 大于 0.05，例如效应落在界限两侧，或计划的 {planned} 个种子完成得太少",
        )),
    ]  # fmt: skip


def test_line(contrast: Mapping[str, Any], count: int) -> Both:
    """Say in words what p is, for the rule of the contrast and so many seeds."""
    if contrast["rule"] == "exact":
        return Both(
            "Nothing here is left to chance: it is a computation, repeated for every seed, so there "
            "is no p.",
            "这里没有随机性：对每个种子都做同样的计算，因此没有 p 值。",
        )
    flips, flips_zh = (
        (f"all {2**count:,} ways to flip", f"全部 {2**count:,} 种翻转方式")
        if count <= 13
        else ("9,999 random ways to flip", "9,999 种随机翻转方式")
    )
    if contrast["rule"] == "within":
        return Both(
            "Each seed gives one effect. That there is no difference beyond the limit is shown by two "
            "one-sided sign-flip tests (TOST), one for each end; p is the larger of both (where "
            "the statement is refuted, that of the two-sided test at the limit passed). A test "
            f"takes {flips} the signs of the distances to its end and counts those whose mean is as "
            "extreme as the one seen.",
            "每个种子给出一个效应。“没有超出界限的差别”由两个单侧符号翻转检验（TOST）证明，两端各一个，"
            f"p 取较大者。每个检验取{flips_zh}，改变各效应与该端之差的正负号，数出均值与实测同样极端的比例。",
        )
    return Both(
        "Each seed gives one effect, of conditions that share its start and its data order. p is the "
        f"two-sided sign-flip test: of {flips} the signs of (effect − limit), the share whose mean "
        "lies at least as far from 0 as the one seen. Where a statement speaks of several networks, the "
        "effect is that of the one that speaks least for it. The interval is of the median, the test of "
        "the mean: near the limit they can differ.",
        "每个种子给出一个效应，被比较的各条件共用该种子的初始值与数据次序。p 来自双侧符号翻转检验："
        f"取{flips_zh}，改变（效应 − 界限）的正负号，其中均值与 0 的距离不小于实测值的，所占比例即为 p。"
        "命题涉及几个网络时，效应取其中最不利于命题的一个。区间属于中位数，检验针对均值；靠近界限时二者可能不一致。",
    )


def failures(result: Mapping[str, Any]) -> list[tuple[dict[str, Any], list[int]]]:
    """Return the levels of each condition in which a training failed, with the seeds that did."""
    varied = [name for name, levels in result["factors"].items() if len(levels) > 1]
    found: list[tuple[dict[str, Any], list[int]]] = []
    for row in result["rows"]:
        if row["failed"]:
            levels = {name: row[name] for name in varied}
            for known_levels, seeds in found:
                if known_levels == levels:
                    seeds.append(row["seed"])
                    break
            else:
                found.append((levels, [row["seed"]]))
    return found


def level_text(value: Any) -> str:
    """Write a level of a factor."""
    match value:
        case None:
            return "–"
        case bool():
            return str(value).lower()
        case int() | str():
            return str(value)
        case float():
            return f"{value:g}".replace("-", "−")
        case Sequence():
            return ", ".join(map(level_text, value))
        case Mapping():
            return ", ".join(f"{k} = {level_text(v)}" for k, v in value.items())
        case _:
            return str(value)
