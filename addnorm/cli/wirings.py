"""`addnorm wirings`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from addnorm.cli.parsing import emit_json, results
from addnorm.contract import catalogue, facts_of, parse_spec
from addnorm.reports.terminal import print_catalogue


@dataclass(frozen=True)
class Options:
    """The options of `addnorm wirings`."""

    name: Annotated[str, tyro.conf.Positional] = ""
    """one wiring, with its docstring"""
    plugins: tuple[str, ...] = ()
    """modules or .py files that define wirings of your own"""
    json: str = ""
    """write the facts as JSON to this file instead; - is stdout"""


def run(options: Options) -> int:
    """Print the catalogue, or all the facts of one wiring."""
    names = [parse_spec(options.name).name] if options.name else list(catalogue())
    rows = [facts_of(name) for name in names]
    if options.json:
        emit_json(rows[0] if options.name else rows, options.json)
    elif options.name:
        for key, value in rows[0].items():
            print(f"{key.replace('_', ' '):14} {value}")
    else:
        print_catalogue(results(""), rows)
    return 0
