"""Write the tables of findings into docs/xray.md and docs/xray.zh-CN.md, out of the registry.

python runs/findings_table.py          # part of `make docs`
"""

from __future__ import annotations

import re
from pathlib import Path

from addnorm.files import write_text
from addnorm.probe.findings import FINDINGS
from addnorm.probe.lint import RULES
from addnorm.reports.trace_view import SEVERITIES

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {"en": DOCS / "xray.md", "zh": DOCS / "xray.zh-CN.md"}
MARKS = re.compile(r"(<!-- findings -->\n).*?(<!-- /findings -->)", re.S)
HEADS = {
    "en": ("code", "severity", "what is seen", "source"),
    "zh": ("代码", "程度", "看到了什么", "出处"),
}
# What each code says, in English and Chinese.
SAYS = {
    "non-finite": (
        "NaN or infinity; the first block that has one is named",
        "出现 NaN 或无穷；指出最先出现的块",
    ),
    "broken-skip": (
        "a residual block has lost its skip: the branch overwrites the stream, or no gradient "
        "passes",
        "残差块失去了跳跃连接：分支覆盖了残差流，或梯度无法通过",
    ),
    "vanishing-gradient": (
        "the gradient near the input is smaller than a power of depth explains",
        "靠近输入的梯度小于深度的幂所能解释的范围",
    ),
    "exploding-gradient": (
        "the gradient near the input is larger than a power of depth explains",
        "靠近输入的梯度大于深度的幂所能解释的范围",
    ),
    "stream-blow-up": (
        "the stream is far above the law of its depth",
        "残差流远大于其深度应有的大小",
    ),
    "idle-depth": (
        "the last third of the connections adds next to nothing",
        "最后三分之一的连接几乎不加入任何东西",
    ),
    "dead-branch": (
        "a branch adds nothing and no gradient can change that",
        "分支不起作用，梯度也无法改变它",
    ),
    "rank-collapse": (
        "all positions carry the same vector",
        "所有位置携带同一个向量",
    ),
    "dominated-skip": (
        "one branch drowns the stream, far out of line with its neighbours",
        "某个分支淹没了残差流，与相邻连接相差悬殊",
    ),
    "no-final-norm": (
        "the head reads a pre-norm stream without a norm",
        "输出头不经归一化直接读取前置归一化的残差流",
    ),
    "post-norm-needs-warmup": (
        "deep post-norm whose positions are alike at the start",
        "很深的后置归一化，且初始时各位置已十分相似",
    ),
    "raises": ("the block cannot be called so", "不能这样调用该块"),
    "changed-skip": (
        "with its branches silent a block returns something else than its input",
        "分支静默时，块返回的不是其输入",
    ),
    "stream-dropout": (
        "with its branches silent a block is random in training",
        "分支静默时，块在训练中仍是随机的",
    ),
    "mutated-input": (
        "a block changes the tensor that it is given",
        "块改动了传入的张量",
    ),
    "unstackable": (
        "no gradient arrives at a block's input, or two in a row cannot train",
        "梯度到不了块的输入，或两个这样的块相接后无法训练",
    ),
    "mixed-batch": (
        "an entry of the batch changes the output of another",
        "批次中的一个样本会改变另一个样本的输出",
    ),
    "unbiased-norm": (
        "an inner layer norm divides the variance by D - 1",
        "内部的层归一化用 D - 1 去除方差",
    ),
}


def codes() -> list[str]:
    """Return every code there is: those of the X-ray first, then those of the linter."""
    linted = [code for group in RULES for code in sorted(group)]
    return list(dict.fromkeys([*FINDINGS, *linted, "raises"]))


def table(lang: str) -> str:
    """Return the findings as a Markdown table."""
    zh = lang == "zh"
    rows = [HEADS[lang], ("---",) * 4]
    for code in codes():
        entry = FINDINGS.get(code)
        if entry is None:
            severity, source = "视情形" if zh else "by case", "`addnorm.lint`"
        else:
            severity = SEVERITIES[entry.severity] if zh else entry.severity
            source = entry.source
        rows.append((f"`{code}`", severity, SAYS[code][zh], source))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def filled(page: str, lang: str) -> str:
    """Return a page with the table between its marks."""
    new, count = MARKS.subn(lambda found: found[1] + table(lang) + found[2], page)
    assert count == 1, "the page has no place for the table"
    return new


def main() -> None:
    for lang, path in PAGES.items():
        write_text(path, filled(path.read_text(encoding="utf-8"), lang))


if __name__ == "__main__":
    main()
