"""Options from typed dataclasses: tyro's parser, comma lists, and one line for an error."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
from rich.console import Console

from addnorm.contract import split_specs
from addnorm.files import finite, write_json

Lang = Literal["en", "zh"]
Options = TypeVar("Options")
TITLES = (
    "Value error",
    "Invalid choice",
    "Unrecognized options",
    "Missing argument",
    "Required options",
)
LISTS = (int, float, str)  # what a comma list may hold


def parse(
    kind: type[Options], command: str, what: str, argv: list[str], default: Options | None = None
) -> Options:
    """Read the options of a command into its dataclass; one line where tyro prints a box."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def comma_list(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        item, *rest = typing.get_args(info.type) or (None,)
        same = rest == [...] or all(other is item for other in rest)
        if typing.get_origin(info.type) is not tuple or not same or item not in LISTS:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar=f"{item.__name__.upper()},...",
            instance_from_str=lambda words: tuple(map(item, split_specs(",".join(words)))),
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda value: [
                ",".join(f"{v:g}" if item is float else str(v) for v in value)
            ],
        )

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _unwrapped({"-h", "--help"}.isdisjoint(argv)):
            return tyro.cli(
                kind,
                prog=f"addnorm {command}",
                description=what,
                args=argv,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
                registry=registry,
            )
    except SystemExit as ended:
        if not ended.code:
            raise
        raise ValueError(_unboxed(errors.getvalue(), command)) from None


@contextlib.contextmanager
def _unwrapped(on: bool) -> Iterator[None]:
    """Keep tyro from wrapping its errors to the terminal's width; the help stays as it is."""
    before = os.environ.get("COLUMNS")
    if on:
        os.environ["COLUMNS"] = "4000"
    try:
        yield
    finally:
        if on:
            os.environ.pop("COLUMNS")
            if before is not None:
                os.environ["COLUMNS"] = before


def _unboxed(text: str, command: str) -> str:
    """Take one line out of tyro's box, drawn in lines or, on a plain terminal, in ASCII."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    rows = [line.strip("│| ") for line in plain.splitlines() if not re.match(r"[╭╰+]", line)]
    sections = [part.strip() for part in re.split(r"(?:^|\n)[─-]{4,}\n", "\n".join(rows))]
    sections = [part for part in sections if part not in ("", *TITLES)] or [""]
    message = " ".join(sections[0].split())
    message = re.sub(r"^Error parsing [\w.]+: ", "", message)  # our own errors, as they are
    if message.startswith("Unrecognized options: "):
        words = message.removeprefix("Unrecognized options: ").split(", ")
        message = f"unknown option {next((w for w in words if w.startswith('-')), words[0])!r}"
        near = re.search(r"Perhaps you meant:\s+(-[-\w]+)", "\n".join(sections))
        message += f"; did you mean {near[1]}?" if near else ""
    elif message.startswith("Missing from"):
        needed = re.match(r"Missing from [^:]*: (\S+)\s+(.*?)(?: \(required\).*)?$", message)
        message = f"{needed[1]} is missing: {needed[2]}" if needed else message
    elif message.startswith("Error parsing "):
        message = message.removeprefix("Error parsing ")
        message = re.sub(r"invalid literal for int.*: ('.*')", r"\1 is not a whole number", message)
        message = re.sub(r"could not convert .* float: ('.*')", r"\1 is not a number", message)
    elif message.startswith("invalid choice"):
        message = message.rstrip(".")
    else:
        return message
    return f"{message} (addnorm {command} --help lists the options)"


def messages() -> Console:
    """Return the console of messages: stderr."""
    return Console(stderr=True)


def emit_json(value: object, target: str) -> None:
    """Write JSON to a file, or to stdout for `-`."""
    if target == "-":
        print(json.dumps(finite(value), ensure_ascii=False))
    elif target:
        write_json(Path(target), value)


def results(json_target: str, width: int = 150) -> Console:
    """Return the console of results: stdout, or stderr where JSON goes to stdout."""
    to_stderr = json_target == "-"
    terminal = (sys.stderr if to_stderr else sys.stdout).isatty()
    return Console(stderr=to_stderr, width=None if terminal else width)


def plugins_of(argv: Sequence[str]) -> list[str]:
    """Return the words of `--plugins`."""
    found: list[str] = []
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == "--plugins" and equals:
            found.append(value)
        elif name == "--plugins":
            for following in argv[i + 1 :]:
                if following.startswith("-"):
                    break
                found.append(following)
    return [part for words in found for part in words.split(",") if part]


def options_in(argv: Sequence[str]) -> list[str]:
    """Return the options that the words of a command line set, as `--eval-every`."""
    found = (word.partition("=")[0] for word in argv if word.startswith("--"))
    return [name.replace("_", "-") for name in found]


def options_of(kind: Any) -> set[str]:
    """Return the options that the fields of a dataclass, or of those in it, stand for."""
    found: set[str] = set()
    for field in fields(kind):
        value = getattr(kind, field.name, None)
        inside = hasattr(value, "__dataclass_fields__")
        found |= options_of(value) if inside else {f"--{field.name.replace('_', '-')}"}
    return found
