"""The errata in the terminal and as a Markdown page, and the texts for learners; no torch.

Rows are what `addnorm.studies.errata.check_errata` returns, plain values.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from addnorm.files import write_text
from addnorm.reports.glossary import glossary_markdown, reading_markdown

SEVERITIES = {
    "A": ("a conceptual error that a reader would act on", "概念错误，读者会照着做"),
    "B": (
        "code that fails, or does something else than it says",
        "代码会报错，或做的并非所说的事",
    ),
    "C": ("a wrong number, label or attribution", "数字、标注或出处有误"),
    "D": (
        "wording, or one place that contradicts another",
        "措辞不准，或前后矛盾",
    ),
}
DOCUMENTS = {
    "000": ("the residual connection in babygpt", "babygpt 中的残差连接"),
    "001": ("what a residual connection is", "残差连接是什么"),
    "002": ("the residual connection in the Transformer", "Transformer 中的残差连接"),
    "003": ("shortcut connections, a chapter of a book", "快捷连接，一本书中的一节"),
    "004": ("questions and answers", "面试问答"),
}
STATUS = {
    "holds": ("holds", "成立", "green"),
    "fails": ("fails", "不成立", "red"),
    "inconclusive": ("inconclusive", "不能断定", "yellow"),
    "not run": ("not run yet", "尚未运行", "dim"),
}
KINDS = {
    "run": ("run", "即时检查"),
    "study": ("study", "实验"),
    "citation": ("citation", "文献"),
    "text": ("text", "原文"),
}
WORDS = {
    "id": ("erratum", "勘误"),
    "severity": ("severity", "级别"),
    "where": ("where", "位置"),
    "line": ("line", "行"),
    "proof": ("proof", "证明"),
    "status": ("status", "状态"),
    "right": ("what is right", "正确的说法"),
    "also": ("also", "另见"),
    "says": ("It says:", "文中说："),
    "is": ("Right:", "正确："),
    "sources": ("Sources:", "文献："),
    "document": ("Document", "文档"),
    "whole": (
        "addnorm study errata E21 shows one whole: what is said, the evidence, the sources.",
        "addnorm study errata E21 显示其中一条的全部：原来怎么说、证据、文献。",
    ),
}
INTRODUCTION = {
    "en": """\
# Errata of the five documents

[中文](errata.zh-CN.md)

*This page is generated; what it says stands in `addnorm/studies/errata.toml`.*

addnorm began with five documents about residual connections. They are named 000 to 004 here. This
page lists what is wrong in them, by document and line, paraphrased: what the document says, what is
right, and what proves it. An erratum is itself a claim, so each carries its proof, and the proof
may fail.

```sh
addnorm study errata      # runs every check, in a second, and reads the verdicts of the studies
```

The proofs are of four kinds. **run**: a check that computes for a moment and trains nothing; it was
also tried on the healthy counterpart, where it must not hold. **study**: training decides, and the
erratum holds where the study refutes the document's claim. **citation**: the source cited says so;
a study beside it is further evidence, which its small networks need not show. **text**: the
document shows it. What a study has not decided is marked as such.

Severities:

""",
    "zh": """\
# 五份文档的勘误

[English](errata.md)

*本页是生成的；要改内容请改 `addnorm/studies/errata.toml`。*

addnorm 起源于五份讲残差连接的文档，这里以 000 至 004 称呼。本页按文档和行号列出其中的错误，
均为转述：文档怎么说、正确的说法是什么、由什么证明。勘误本身也是论断，所以每条都附有证明，
而证明也可能不成立。

```sh
addnorm study errata --lang zh      # 一秒内运行全部检查，并读取各实验的结论
```

证明分四种。**即时检查**：当场计算，不涉及训练；对应的正确写法也试过，那时它必须不成立。
**实验**：由训练决定，实验否定了文档的论断，勘误即成立。**文献**：所引文献如此记载；
另附的实验只是旁证，规模小，未必测得出。
**原文**：文档自身即可看出。实验尚未决定的，会如实标明。

级别：

""",
}


def errata_markdown(rows: Sequence[Mapping[str, Any]], lang: str) -> str:
    """Return the errata as a Markdown page, document by document; ends with a newline."""
    parts = [INTRODUCTION[lang]]
    severities = Counter(row["severity"] for row in rows)
    parts += [
        f"- **{name}**: {_of(words, lang)} ({severities[name]})\n"
        if lang == "en"
        else f"- **{name}**：{_of(words, lang)}（{severities[name]} 条）\n"
        for name, words in SEVERITIES.items()
    ]
    parts.append(f"\n{_summary(rows, lang)}\n")
    for document, group in itertools.groupby(rows, lambda row: row["document"]):
        members = list(group)
        named = _word("document", lang)
        colon = ": " if lang == "en" else "："
        parts.append(f"\n## {named} {document}{colon}{_of(DOCUMENTS[document], lang)}\n\n")
        parts.append(_overview(members, lang))
        parts += [_section(row, lang) for row in members]
    return "".join(parts)


def _summary(rows: Sequence[Mapping[str, Any]], lang: str) -> str:
    """Say how many errata came out how."""
    counts = Counter(row["status"] for row in rows)
    listed = [f"{_of(STATUS[s], lang)} {counts[s]}" for s in STATUS if counts[s]]
    if lang == "en":
        return f"{len(rows)} errata: {', '.join(listed)}."
    return f"共 {len(rows)} 条：{'，'.join(listed)}。"


def _overview(rows: Sequence[Mapping[str, Any]], lang: str) -> str:
    """Return the table in front of a document's errata."""
    heads = [_word(name, lang) for name in ("id", "severity", "line", "proof", "status")]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        cells = [
            f"[{row['id']}](#{row['id'].lower()})",
            row["severity"],
            ", ".join(row["lines"]),
            _of(KINDS[row["proof"]], lang),
            _of(STATUS[row["status"]], lang),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _section(row: Mapping[str, Any], lang: str) -> str:
    """Return one erratum: what is said, what is right, the proof and its outcome, the sources."""
    how, status = _how(row, lang), _of(STATUS[row["status"]], lang)
    evidence, places = row["evidence"][lang], _places(row, lang)
    if lang == "en":
        lead = f"*severity {row['severity']}, {places}*"
        proved = f"**Proof** ({how}): **{status}.** {evidence}"
    else:
        lead = f"*{row['severity']} 级，{places}*"
        proved = f"**证明**（{how}）：**{status}。**{evidence}"
    lines = [
        f"### {row['id']}",
        lead,
        f"**{_word('says', lang)}** {row['says'][lang]}",
        f"**{_word('is', lang)}** {row['right'][lang]}",
        proved,
    ]
    if row["sources"]:
        before, joint, stop = (" ", "; ", ".") if lang == "en" else ("", "；", "。")
        lines.append(f"{_word('sources', lang)}{before}{joint.join(row['sources'])}{stop}")
    return "\n" + "\n\n".join(lines) + "\n"


def _how(row: Mapping[str, Any], lang: str) -> str:
    """Say what the proof is: the check, the study that decides, one that says more."""
    kind = _of(KINDS[row["proof"]], lang)
    command = f"`addnorm study {row['study'].lower()}`"
    if row["proof"] == "study":
        return f"{kind} {command}"
    if row["proof"] == "run":
        kind = f"{kind} `{row['check']}`"
    if row["study"]:
        kind += f"; more: {command}" if lang == "en" else f"；另见 {command}"
    return kind


def _places(row: Mapping[str, Any], lang: str) -> str:
    """Return document and lines, and where else the same error stands."""
    main = f"{row['document']}:{', '.join(row['lines'])}"
    if not row["also"]:
        return main
    joint = "; " if lang == "en" else "；"
    return f"{main}{joint}{_word('also', lang)} {', '.join(row['also'])}"


def print_errata(console: Console, rows: Sequence[Mapping[str, Any]], lang: str) -> None:
    """Print one line per erratum, in the order of documents and lines, and what came out."""
    table = Table(box=None, pad_edge=False)
    for name in ("id", "severity", "where", "proof", "status"):
        table.add_column(_word(name, lang), no_wrap=True)
    table.add_column(_word("right", lang), overflow="fold")
    for row in sorted(rows, key=lambda r: (r["document"], r["line"], r["id"])):
        table.add_row(
            row["id"],
            row["severity"],
            f"{row['document']}:{row['lines'][0]}",
            _of(KINDS[row["proof"]], lang),
            Text(_of(STATUS[row["status"]], lang), style=STATUS[row["status"]][2]),
            Text(row["right"][lang]),
        )
    console.print(table)
    console.print(_summary(rows, lang), markup=False, highlight=False)
    console.print(Text(_word("whole", lang), style="dim"))


def print_erratum(console: Console, row: Mapping[str, Any], lang: str) -> None:
    """Print one erratum whole: what is said and where, what is right, the proof, the sources."""
    severity = _of(SEVERITIES[row["severity"]], lang)
    head = Text.assemble((row["id"], "bold"), f"  {_places(row, lang)}  {severity}")
    outcome = Text(f"{_of(KINDS[row['proof']], lang)}: ")
    outcome.append(_of(STATUS[row["status"]], lang), style=STATUS[row["status"]][2])
    for line in (
        head,
        Text(f"{_word('says', lang)} {row['says'][lang]}"),
        Text(f"{_word('is', lang)} {row['right'][lang]}"),
        outcome.append(f" {row['evidence'][lang]}"),
        *(Text(source, style="dim") for source in row["sources"]),
        Text(),
    ):
        console.print(line)


def write_docs(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    entries: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
) -> list[Path]:
    """Write the pages of errata, glossary and reading path in both languages; return their paths.

    `entries` and `steps`: what `addnorm.studies.texts` loads.
    """
    written = []
    for lang, suffix in (("en", ".md"), ("zh", ".zh-CN.md")):
        pages = {
            "errata": errata_markdown(rows, lang),
            "glossary": glossary_markdown(entries, lang),
            "reading": reading_markdown(steps, lang),
        }
        for name, text in pages.items():
            path = folder / f"{name}{suffix}"
            write_text(path, text)
            written.append(path)
    return written


def _of(words: Sequence[str], lang: str) -> str:
    return words[lang == "zh"]


def _word(name: str, lang: str) -> str:
    return _of(WORDS[name], lang)
