"""`addnorm sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from addnorm import runs
from addnorm.cli.parsing import emit_json


@dataclass(frozen=True)
class Options:
    """The options of `addnorm sample`."""

    run: Annotated[Path, tyro.conf.Positional]
    """folder of the run"""
    prompt: str = "\n"
    """text that the sample goes on from"""
    tokens: int = 200
    """characters to generate"""
    temperature: float = 0.8
    """0 takes the most likely character"""
    top_k: int = 0
    """draw from so many characters; 0 is all"""
    seed: int = 0
    """seed of the draws"""
    json: str = ""
    """write prompt and text as JSON to this file instead; - is stdout"""


def run(options: Options) -> int:
    """Print the prompt and what the model writes after it, as it is drawn."""
    pieces = runs.stream(
        runs.load_run(options.run),
        options.prompt,
        tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
    )
    if options.json:
        emit_json({"prompt": options.prompt, "text": "".join(pieces)}, options.json)
        return 0
    first = next(pieces)  # bad input is found here, before anything is printed
    print(options.prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
