"""The glossary and the reading path as Markdown pages; no torch.

Entries and steps are what `addnorm.studies.texts` loads, plain values.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

INTRODUCTION = {
    "en": """\
# Glossary

[中文](glossary.zh-CN.md)

*This page is generated; what it says stands in `addnorm/studies/glossary.toml`.*

The terms of the field in both languages, by topic, as this package uses them. Where a Chinese
rendering is met that misleads, it is named as such. `addnorm study NAME` runs the study beside a
term, `addnorm wirings NAME` shows a wiring.
""",
    "zh": """\
# 术语表

[English](glossary.md)

*本页是生成的；要改内容请改 `addnorm/studies/glossary.toml`。*

本领域的术语，中英对照，按主题排列，含义以本软件包的用法为准。容易误导的译名另行注明。
`addnorm study 名称` 运行术语旁所列的实验，`addnorm wirings 名称` 显示一种接法。
""",
}
READING = {
    "en": """\
# A reading path

[中文](reading.zh-CN.md)

*This page is generated; what it says stands in `addnorm/studies/reading.toml`.*

For readers who know the five documents and nothing else: steps through the studies, from what the
connection is to which wiring to choose. Each says what to look at and what to notice; the verdict
is the study's, not this page's. Terms are in the [glossary](glossary.md), the documents' errors in
the [errata](errata.md).
""",
    "zh": """\
# 阅读路线

[English](reading.md)

*本页是生成的；要改内容请改 `addnorm/studies/reading.toml`。*

写给只读过这五份文档的读者：沿着各项实验一步步走，从“连接是什么”到“选哪种接法”。每步说明看什么、注意什么；
结论由实验给出，不在本页。术语见[术语表](glossary.zh-CN.md)，文档中的错误见[勘误](errata.zh-CN.md)。
""",
}
HEADS = {"en": ("term", "Chinese", "meaning", "see"), "zh": ("术语", "英文", "含义", "另见")}


def glossary_markdown(entries: Sequence[Mapping[str, Any]], lang: str) -> str:
    """Return the glossary as a Markdown page, a table for each topic; ends with a newline."""
    parts = [INTRODUCTION[lang]]
    for topic, members in itertools.groupby(entries, lambda entry: entry["topic"][lang]):
        parts.append(f"\n## {topic}\n\n| {' | '.join(HEADS[lang])} |\n|---|---|---|---|\n")
        parts += [_row(entry, lang) for entry in members]
    return "".join(parts)


def _row(entry: Mapping[str, Any], lang: str) -> str:
    """Return one entry as a row: the term, its other language, what it means, what shows it."""
    chinese = _chinese(entry, lang)
    terms = [f"**{entry['en']}**", chinese] if lang == "en" else [chinese, entry["en"]]
    see = (", " if lang == "en" else "、").join(_link(place, lang) for place in entry["see"])
    cells = [*terms, entry["defined"][lang], see]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _chinese(entry: Mapping[str, Any], lang: str) -> str:
    """Return the renderings, the usual one bold on the Chinese page, and those to avoid."""
    usual, *others = entry["zh"]
    shown = "、".join([f"**{usual}**" if lang == "zh" else usual, *others])
    if not entry["wrong"]:
        return shown
    wrong = "、".join(entry["wrong"])
    return f"{shown} (not {wrong})" if lang == "en" else f"{shown}（不作“{wrong}”）"


def _link(place: str, lang: str) -> str:
    """Return "study NAME" as a command and "wiring NAME" as a link into the catalogue."""
    kind, name = place.split(" ")
    if kind == "study":
        return f"`addnorm study {name}`"
    return f"[`{name}`](catalogue{'' if lang == 'en' else '.zh-CN'}.md#{name})"


def reading_markdown(steps: Sequence[Mapping[str, Any]], lang: str) -> str:
    """Return the reading path as a Markdown page, a numbered section for each step."""
    parts = [READING[lang]]
    for number, step in enumerate(steps, 1):
        command = f"addnorm study {' '.join(step['studies'])}"
        parts.append(
            f"\n## {number}. {step['title'][lang]}\n\n{step['text'][lang]}\n\n"
            f"```sh\n{command}\n```\n"
        )
    return "".join(parts)
