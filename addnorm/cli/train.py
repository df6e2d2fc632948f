"""`addnorm train`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from addnorm import runs
from addnorm.cli.parsing import Lang, emit_json, messages, refuse_changes
from addnorm.data.text import load_text
from addnorm.models.gpt import GPTConfig
from addnorm.reports.progress import TrainProgress
from addnorm.training.config import Runtime, TrainConfig
from addnorm.training.loop import Observer, Run


@dataclass(frozen=True)
class Options:
    """The options of `addnorm train`."""

    gpt: GPTConfig
    training: TrainConfig
    runtime: Runtime
    data: str = "pydoc"
    """pydoc, a UTF-8 file, a folder, or a glob in quotes"""
    out: Path = Path("run")
    """folder of the run; must not hold one yet"""
    resume: Path | None = None
    """go on with the run in this folder, with its recorded settings"""
    model: str = ""
    """pkg.module:function or file.py:function returning your own model, (B, T) to (B, T, V)"""
    plugins: tuple[str, ...] = ()
    """modules or .py files that define wirings of your own"""
    json: str = ""
    """also write the summary as JSON to this file; - is stdout"""
    lang: Lang = "en"
    """language of what is printed, and the page's first language"""


class _Progress(TrainProgress, Observer):
    """The progress display as the trainer's observer."""


def run(options: Options) -> int:
    """Train or resume, write the page, print the outcome."""
    console = messages()
    with _Progress(console) as progress:
        if options.resume is not None:
            folder = options.resume
            default = Options(GPTConfig(), TrainConfig(), Runtime())
            why = "--resume keeps the recorded settings"
            refuse_changes(options, default, ("resume", "json", "lang"), why)
            trained = runs.resume(folder, progress)
        else:
            folder = options.out
            trained = _train(options, progress)
    page = runs.write_report(folder, options.lang)
    console.print(runs.describe_outcome(trained, options.lang), highlight=False, soft_wrap=True)
    emit_json(trained.summary() | {"folder": str(folder)}, options.json)
    console.print(f"run: {folder}, report: {page}", highlight=False, soft_wrap=True)
    return 0


def _train(options: Options, progress: _Progress) -> Run:
    description = asdict(options.gpt)
    if options.model:
        default = GPTConfig(context=options.gpt.context)
        refuse_changes(options.gpt, default, (), "--model brings its own shape")
        description = {"function": options.model}
    data = load_text(options.data, options.gpt.context)
    if options.gpt.vocab_size not in (0, data.vocab_size):
        raise ValueError(
            f"vocab_size {options.gpt.vocab_size} is not that of {options.data!r}, "
            f"{data.vocab_size}; leave --vocab-size out"
        )
    progress.lines(data.unigram, data.uniform)
    torch.manual_seed(options.training.seed)
    model = runs.build_model(description, data)
    if not options.model:
        description = {"kind": "gpt", **asdict(replace(options.gpt, vocab_size=data.vocab_size))}
    return runs.train(
        model,
        data,
        options.training,
        options.runtime,
        out=options.out,
        observer=progress,
        description=description,
        plugins=options.plugins,
    )
