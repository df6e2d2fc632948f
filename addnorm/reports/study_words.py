"""What tables and pages of studies say: verdicts, effects, rules in words; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

VERDICTS = {
    "SUPPORTED": ("supported", "支持"),
    "REFUTED": ("refuted", "否定"),
    "INCONCLUSIVE": ("inconclusive", "不能断定"),
    "": ("not run yet", "尚未运行"),
}
MODES = {"quick": ("quick", "快速"), "default": ("default", "默认"), "long": ("long", "完整")}


def text_in(words: Mapping[str, str], lang: str) -> str:
    """Return the text of a pair of languages."""
    return words["zh" if lang == "zh" else "en"]


def verdict_in(verdict: str, lang: str) -> str:
    """Return a verdict as a word."""
    return VERDICTS[verdict][lang == "zh"]


def amount(value: Any, digits: int = 3) -> str:
    """Write a number with so many digits; a dash where it is not known."""
    if not isinstance(value, int | float) or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    text = f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"
    return text.replace("-", "−")


def probability(p: Any) -> str:
    """Write a p-value; a dash where there is none."""
    if not isinstance(p, int | float) or math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


def effect_in(row: Mapping[str, Any], lang: str) -> str:
    """Write an effect with its 95 % interval and its unit."""
    if row["effect"] is None or math.isnan(row["effect"]):
        return "–"
    low, high = row["interval"]
    unit = text_in(row["unit"], lang)
    return f"{amount(row['effect'])} [{amount(low)}, {amount(high)}]{' ' if unit else ''}{unit}"
