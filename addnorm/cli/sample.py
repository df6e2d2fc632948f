"""`addnorm sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

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
    prompts: Path | None = None
    """file with a prompt on each line: one text each, drawn together"""
    tokens: int = 200
    """tokens to generate"""
    temperature: float = 0.8
    """0 takes the most likely character"""
    top_k: int = 0
    """draw from so many tokens; 0 is all"""
    top_p: float = 1.0
    """draw from the most likely tokens that hold this share of the probability"""
    seed: int = 0
    """seed of the draws"""
    json: str = ""
    """write prompt and text as JSON to this file instead; - is stdout"""


def run(options: Options) -> int:
    """Print the prompt and what the model writes after it, as it is drawn."""
    loaded = runs.load_run(options.run)
    settings: dict[str, Any] = {
        name: getattr(options, name) for name in ("tokens", "temperature", "top_k", "top_p", "seed")
    }
    if options.prompts is not None:
        prompts = [line for line in options.prompts.read_text("utf-8").splitlines() if line]
        texts = runs.sample(loaded, prompts, **settings)
        if options.json:
            rows = zip(prompts, texts, strict=True)
            emit_json([{"prompt": p, "text": t.removeprefix(p)} for p, t in rows], options.json)
        else:
            print("\n\n".join(texts))
        return 0
    pieces = runs.stream(loaded, options.prompt, **settings)
    if options.json:
        emit_json({"prompt": options.prompt, "text": "".join(pieces)}, options.json)
        return 0
    first = next(pieces)  # bad input is found here, before anything is printed
    print(options.prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
