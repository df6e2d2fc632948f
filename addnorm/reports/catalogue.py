"""The catalogue of wirings in the terminal and as a Markdown page, in English and Chinese.

It reads the facts that `addnorm.facts` collects, plain values. No torch here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 768  # D at which costs are shown as numbers
_TEMPLATES = Path(__file__).parent / "templates"
WORDS = {
    "norm": {"en": "norm: where the norm sits", "zh": "norm：归一化放在哪里"},
    "scale": {
        "en": "scale: how much of the branch and of the skip is let in",
        "zh": "scale：分支与捷径各放行多少",
    },
    "memory": {"en": "memory: what else is read", "zh": "memory：还读取哪些更早的状态"},
    "streams": {"en": "streams: more than one stream", "zh": "streams：多流"},
    "own": {"en": "own: wirings of your own", "zh": "own：你自己的接法"},
    "legend": {
        "en": "x the stream, F the branch, N a norm, D the width. Last column: learned numbers per "
        "connection beside the branch,\nthe mean of 12 layers of two. `addnorm wirings NAME` "
        "shows one wiring whole.",
        "zh": "x 为残差流，F 为分支，N 为归一化，D 为宽度。末列是分支之外每个连接的参数量"
        "（12 层、每层两个连接的平均值）。\n`addnorm wirings 名称` 显示一种接法的全部内容。",
    },
    "source": {"en": "source", "zh": "出处"},
    "options": {"en": "options", "zh": "选项"},
    "starts as": {"en": "starts as", "zh": "初始形式"},
    "begins": {"en": "starts as", "zh": "起始为"},
    "start": {"en": "start of the branch", "zh": "分支的初始化"},
    "final norm": {"en": "final norm", "zh": "最终归一化"},
    "stream": {"en": "stream RMS", "zh": "残差流 RMS"},
    "gradient": {"en": "gradient RMS", "zh": "梯度 RMS"},
    "asks": {"en": "asks of the branches", "zh": "对分支的要求"},
    "parameters": {"en": "parameters", "zh": "参数量"},
    "flops": {"en": "FLOPs", "zh": "FLOPs"},
    "traffic": {"en": "memory traffic", "zh": "访存量"},
    "ships": {"en": "used by", "zh": "使用者"},
    "verified": {"en": "verified", "zh": "是否核实"},
    "needed": {"en": "needed", "zh": "需要"},
    "not needed": {"en": "not needed", "zh": "不需要"},
    "yes": {"en": "yes", "zh": "是"},
    "no": {
        "en": "no: the source leaves something open that had to be chosen",
        "zh": "否：出处有未写明之处，由我们补定",
    },
    "default": {"en": "default", "zh": "默认"},
    "constant": {"en": "level over depth", "zh": "不随深度变化"},
    "sqrt": {"en": "as the square root of the depth", "zh": "与深度的平方根成正比"},
    "linear": {"en": "as the depth", "zh": "与深度成正比"},
    "geometric": {"en": "grows by a factor at each connection", "zh": "每过一个连接按倍数增大"},
    "vanishing": {"en": "falls by a factor at each connection", "zh": "每过一个连接按倍数减小"},
    "per token": {
        "en": "cost per connection, mean of 24; FLOPs forward and elements moved are per token",
        "zh": "每个连接的开销（24 个连接的平均值；前向 FLOPs 与访存元素数按每个词元计）",
    },
}
COSTS = ("parameters", "flops", "traffic")
LAWS = {  # in a cell of the overview
    "constant": {"en": "level", "zh": "不变"},
    "sqrt": {"en": "sqrt", "zh": "平方根"},
    "linear": {"en": "linear", "zh": "线性"},
    "geometric": {"en": "grows", "zh": "倍增"},
    "vanishing": {"en": "falls", "zh": "倍减"},
}


def print_list(console: Console, rows: Sequence[Mapping[str, Any]], lang: str) -> None:
    """Print the catalogue family by family: name and options, equation and start, year, cost."""
    for family, members in _families(rows):
        console.print(Text(_word(family, lang), style="bold"))
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(width=27, overflow="fold")
        table.add_column(width=4)
        table.add_column(width=max(30, min(98, console.width - 60)), overflow="fold")
        table.add_column(overflow="fold")
        for row in members:
            options = " ".join(f"{k}={o['value']}" for k, o in row["options"].items())
            starts = text_of(row, "starts_as", lang)
            equation = Text(text_of(row, "equation", lang))
            name = Text(row["name"], style="cyan")
            if options:
                name.append(f"\n  {options}", style="dim")
            if f"x <- {starts}" != equation.plain:
                equation.append(f"\n  {_word('begins', lang)} {starts}", style="dim")
            cost = row["cost"]["parameters"]["formula"]
            table.add_row(name, str(row["year"]), equation, cost)
        console.print(table, markup=False, highlight=False)
        console.print()
    console.print(_word("legend", lang), markup=False, highlight=False)


def print_one(console: Console, row: Mapping[str, Any], lang: str) -> None:
    """Print all that is known of one wiring."""
    family = _word(row["family"], lang)
    console.print(Text.assemble((row["spec"], "bold"), "   ", (family, "dim")))
    console.print(f"\n{text_of(row, 'equation', lang)}\n", markup=False, highlight=False)
    if row["diagram"]:
        console.print(row["diagram"], markup=False, highlight=False, no_wrap=True, soft_wrap=True)
        console.print()
    if row["about"]:
        console.print(f"{text_of(row, 'about', lang)}\n", markup=False, highlight=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts_in_words(row, lang):
        table.add_row(name, value)
    console.print(table, markup=False, highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_column(f"D = {WIDTH}", justify="right", header_style="dim")
    for name in COSTS:
        cost = row["cost"][name]
        table.add_row(_word(name, lang), cost["formula"], _number(cost[f"at_{WIDTH}"]))
    console.print(f"\n{_word('per token', lang)}", style="dim", markup=False, highlight=False)
    console.print(table, markup=False, highlight=False)


def text_of(row: Mapping[str, Any], fact: str, lang: str) -> str:
    """Return a fact in the language; the Chinese text where there is one."""
    return str(row["chinese"].get(fact, row[fact]) if lang == "zh" else row[fact])


def facts_in_words(row: Mapping[str, Any], lang: str) -> list[tuple[str, str]]:
    """Return the facts of a wiring that say something, each with its name; costs aside."""
    cited = f" [{row['cite']}]" if row["cite"] else ""
    options = (_option(name, option, lang) for name, option in row["options"].items())
    own = row["verified"] is None
    facts = {
        "source": f"{row['paper']}{cited}",
        "options": ("; " if lang == "en" else "；").join(options),
        "starts as": text_of(row, "starts_as", lang),
        "start": row["start"],
        "final norm": _word("needed" if row["final_norm"] else "not needed", lang),
        "stream": _word(row["stream_law"], lang),
        "gradient": _word(row["gradient_law"], lang),
        "asks": ", ".join(f"{name}={value}" for name, value in row["asks"].items()),
        "ships": text_of(row, "ships", lang),
        "verified": "" if own else _word("yes" if row["verified"] else "no", lang),
    }
    return [(_word(name, lang), value) for name, value in facts.items() if value]


def markdown(rows: Sequence[Mapping[str, Any]], lang: str) -> str:
    """Return the catalogue as a Markdown page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=False,  # Markdown, and all of it is ours
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = _code
    template = environment.get_template(f"catalogue.{lang}.md.j2")
    return template.render(
        rows=rows,
        families=[(_word(family, lang), members) for family, members in _families(rows)],
        facts=lambda row: facts_in_words(row, lang),
        law=lambda name: LAWS[name][lang],
        text=lambda row, fact: text_of(row, fact, lang),
        costs=lambda row: [
            (_word(name, lang), _in_words(row["cost"][name], lang)) for name in COSTS
        ],
    )


def _families(
    rows: Iterable[Mapping[str, Any]],
) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Group the rows, which come family by family."""
    return [(f, list(members)) for f, members in itertools.groupby(rows, lambda r: r["family"])]


def _word(name: str, lang: str) -> str:
    return WORDS[name][lang]


def _option(name: str, option: Mapping[str, Any], lang: str) -> str:
    """Say what an option is set to, what it is otherwise, and what it may be."""
    least, most, choices = option["least"], option["most"], option["choices"]
    notes = []
    if option["value"] != option["default"]:
        notes.append(f"{_word('default', lang)} {option['default']}")
    if choices:
        joined = f"{', '.join(choices[:-1])} or {choices[-1]}"
        notes.append(joined if lang == "en" else "、".join(choices))
    elif least is not None and most is not None:
        notes.append(f"{least:g} {'to' if lang == 'en' else '到'} {most:g}")
    elif least is not None:
        notes.append(f"{'at least' if lang == 'en' else '不小于'} {least:g}")
    elif most is not None:
        notes.append(f"{'at most' if lang == 'en' else '不大于'} {most:g}")
    if not notes:
        return f"{name}={option['value']}"
    shown = f" ({'; '.join(notes)})" if lang == "en" else f"（{'；'.join(notes)}）"
    return f"{name}={option['value']}{shown}"


def _in_words(cost: Mapping[str, Any], lang: str) -> str:
    """Write a cost as a formula and, where D is in it, as a number."""
    number, formula = _number(cost[f"at_{WIDTH}"]), str(cost["formula"])
    if "D" not in formula:
        return formula
    at = f"; {number} at D = {WIDTH}" if lang == "en" else f"；D = {WIDTH} 时为 {number}"
    return formula + at


def _number(value: float) -> str:
    """Write a count; a small mean that is not whole has one digit after the point."""
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:,.1f}"


def _code(text: str) -> str:
    """Put text into a cell of a Markdown table as code."""
    return "`" + re.sub(r"\|", r"\\|", text) + "`"
