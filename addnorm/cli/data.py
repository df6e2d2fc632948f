"""`addnorm data`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from addnorm.cli.parsing import emit_json
from addnorm.data.text import BUILT_IN, load_corpus, load_text
from addnorm.files import write_text


@dataclass(frozen=True)
class Options:
    """The options of `addnorm data`."""

    action: Annotated[Literal["list", "get"], tyro.conf.Positional] = "list"
    """list the corpora, or get one"""
    name: Annotated[str, tyro.conf.Positional] = "pydoc"
    """the corpus to get, or a file, folder or glob to describe"""
    out: str = ""
    """file that get writes the text to"""
    json: str = ""
    """write the facts as JSON to this file instead; - is stdout"""


def run(options: Options) -> int:
    """List the corpora, or describe one and write its text."""
    if options.action == "list":
        facts: dict[str, object] = dict(BUILT_IN)
    else:
        facts = load_text(options.name, 64).describe()
        if options.out:
            write_text(Path(options.out), load_corpus(options.name).text)
    if options.json:
        emit_json(facts, options.json)
    else:
        for key, value in facts.items():
            print(f"{key:12} {value}")
    return 0
