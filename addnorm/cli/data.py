"""`addnorm data`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from addnorm.cli.parsing import emit_json, messages, results
from addnorm.data.corpora import (
    BUILT_IN,
    ON_REQUEST,
    Progress,
    cached_corpus,
    load_corpus,
)
from addnorm.data.images import IMAGE_SETS, load_images
from addnorm.data.sets import is_images
from addnorm.data.text import load_text
from addnorm.data.tokenizers import parse_tokenizer
from addnorm.files import cache_folder, write_atomic


@dataclass(frozen=True)
class Options:
    """The options of `addnorm data`."""

    action: Annotated[Literal["list", "get"], tyro.conf.Positional] = "list"
    """list the corpora and image sets, or get one: build it if need be, and describe it"""
    name: Annotated[str, tyro.conf.Positional] = "pydoc"
    """the corpus or image set to get, or a file, folder or glob to describe"""
    tokenizer: str = "char"
    """what a text is cut into: char, byte, bpe or bpe:VOCABULARY"""
    size: int = 0
    """height and width that images are resized to; 0: they must all have one size"""
    corrupt: Literal["refuse", "skip"] = "refuse"
    """what to do with a picture that cannot be read"""
    out: str = ""
    """file that get writes the text to"""
    json: str = ""
    """write the facts as JSON to this file instead; - is stdout"""


def run(options: Options) -> int:
    """List what there is, or describe one and write its text."""
    if options.action == "list":
        listed = catalogue()
        emit_json(listed, options.json)
        if not options.json:
            _print_list(listed)
        return 0
    with reading(messages()) as progress:
        facts = _get(options, progress)
    emit_json(facts, options.json)
    if not options.json:
        for key, value in facts.items():
            print(f"{key:22} {value}")
    return 0


def catalogue() -> dict[str, dict[str, object]]:
    """Return the built-in data by name: what each is, text or images, and whether it is here."""
    listed: dict[str, dict[str, object]] = {}
    for reads, names in (("text", BUILT_IN), ("images", IMAGE_SETS)):
        for name, about in names.items():
            path = cached_corpus(name)
            listed[name] = {
                "about": about,
                "reads": reads,
                "ready": name not in ON_REQUEST or path is not None,
                "path": str(path) if path else None,
            }
    return listed


def _print_list(listed: dict[str, dict[str, object]]) -> None:
    console = results("")
    for name, facts in listed.items():
        state = facts["path"] or ("ready" if facts["ready"] else f"addnorm data get {name}")
        console.print(f"{name:8} {facts['about']}: {state}", highlight=False, soft_wrap=True)
    size = 0
    for folder, _, names in os.walk(cache_folder()):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                size += os.stat(os.path.join(folder, name)).st_size
    line = f"cache    {cache_folder()} holds {size / 1e6:,.1f} MB; it can be removed at any time"
    console.print(line, highlight=False, soft_wrap=True)


def _get(options: Options, progress: Progress) -> dict[str, object]:
    if is_images(options.name, options.tokenizer):
        if options.out:
            raise ValueError(f"--out writes text, and {options.name} is a set of images")
        return load_images(options.name, size=options.size, corrupt=options.corrupt).describe()
    if options.name in ON_REQUEST and not cached_corpus(options.name):
        messages().print(ON_REQUEST[options.name], highlight=False, soft_wrap=True)
    facts = load_text(options.name, 64, options.tokenizer, progress).describe()
    if options.out:
        binary = parse_tokenizer(options.tokenizer)[0] == "byte"
        corpus = load_corpus(options.name, binary=binary, progress=progress)
        with write_atomic(Path(options.out)) as file:
            for block in corpus.blocks(progress):
                file.write(block)
    return facts


@contextlib.contextmanager
def reading(console: Console) -> Iterator[Progress]:
    """Show a bar, on a terminal, of the bytes that are read and encoded."""
    with Bar(
        TextColumn("reading"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
