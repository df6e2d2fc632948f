"""`addnorm wirings`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from addnorm.cli.parsing import Lang, emit_json, results
from addnorm.facts import all_facts, facts_of
from addnorm.files import write_text
from addnorm.reports.catalogue import markdown, print_list, print_one


@dataclass(frozen=True)
class Options:
    """The options of `addnorm wirings`."""

    name: Annotated[str, tyro.conf.Positional] = ""
    """one wiring, with options where they should differ: "mhc(n=2)" """
    bibtex: bool = False
    """print the BibTeX entry of its source, or of all sources"""
    markdown: str = ""
    """write the whole catalogue as a Markdown page to this file"""
    lang: Lang = "en"
    """language of what is printed: en or zh"""
    plugins: tuple[str, ...] = ()
    """modules or .py files that define wirings of your own"""
    json: str = ""
    """write the facts as a JSON list to this file instead; - is stdout"""


def run(options: Options) -> int:
    """Print the catalogue, or all that is known of one wiring."""
    if options.markdown and options.name:
        raise ValueError("--markdown writes the whole catalogue; leave the name out")
    brief = not (options.json or options.markdown)
    rows = [facts_of(options.name)] if options.name else all_facts(brief=brief)
    if options.json:
        emit_json(rows, options.json)
    elif options.markdown:
        write_text(Path(options.markdown), markdown(rows, options.lang))
    elif options.bibtex:
        entries = dict.fromkeys(row["bibtex"] for row in rows if row["bibtex"])
        if not entries:
            raise ValueError(f"no BibTeX entry is known for {rows[0]['paper']!r}")
        print("\n\n".join(entries))
    elif options.name:
        print_one(results(""), rows[0], options.lang)
    else:
        print_list(results(""), rows, options.lang)
    return 0
