"""`addnorm train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console

from addnorm import runs
from addnorm.cli.data import reading
from addnorm.cli.networks import Asked, asked, named, word
from addnorm.cli.parsing import Lang, emit_json, messages, options_in
from addnorm.data.sets import DataConfig, Dataset, load_data
from addnorm.models.zoo import KINDS
from addnorm.reports.progress import TrainProgress
from addnorm.training.config import Runtime, TrainConfig
from addnorm.training.loop import Observer
from addnorm.training.run import Run

Network = TypeVar("Network")


@dataclass(frozen=True)
class Options(Generic[Network]):
    """The options of `addnorm train`."""

    network: Network
    training: TrainConfig
    data: DataConfig
    runtime: Runtime
    model: str = ""
    """gpt (the default), ngpt, resnet, mlp, a known network such as resnet20, or
    pkg.module:function or file.py:function returning your own"""
    preset: str = ""
    """a known network trained as its authors did, such as babygpt-v9"""
    recipe: str = ""
    """a published way to train: he2015, he2015-warm, babygpt, babygpt-v12; options override it"""
    out: Path = Path("run")
    """folder of the run; must not hold one yet"""
    resume: Path | None = None
    """go on with the run in this folder to the steps it was given, with its recorded settings; a
    run cannot be lengthened, as the schedule of its rate was laid out for them"""
    plugins: tuple[str, ...] = ()
    """modules or .py files that define wirings of your own"""
    json: str = ""
    """also write the summary as JSON to this file; - is stdout"""
    lang: Lang = "en"
    """language of what is printed, and the page's first language"""


def defaults(argv: Sequence[str]) -> tuple[Any, Options[Any]]:
    """Return the options that the network of this command line has, and where they begin."""
    if word(argv, "--resume"):
        _refuse_settings(argv)
    given = asked(argv)
    images = {"batch": 64} if given.reads == "images" else {}
    training = TrainConfig(**(images | given.recipe))
    kind: Any = Options
    return kind[type(given.config)], Options(given.config, training, DataConfig(), Runtime())


def _refuse_settings(argv: Sequence[str]) -> None:
    """Raise `ValueError` for an option beside --resume, be it set to what it is by default."""
    for option in options_in(argv):
        if option not in ("--resume", "--json", "--lang", "--help"):
            longer = ", and a longer training is a new run" if option == "--steps" else ""
            raise ValueError(f"--resume keeps the recorded settings{longer}; leave {option} out")


class _Progress(TrainProgress, Observer):
    """The progress display as the trainer's observer."""


def run(options: Options[Any]) -> int:
    """Train or resume, write the page, print the outcome."""
    console, folder = messages(), options.resume or options.out
    if options.resume is not None:
        with _Progress(console) as progress:
            trained = runs.resume(folder, progress)
    else:
        trained = _train(options, console)
    page = runs.write_report(folder, options.lang)
    console.print(runs.describe_outcome(trained, options.lang), highlight=False, soft_wrap=True)
    emit_json(trained.summary() | {"folder": str(folder)}, options.json)
    console.print(f"run: {folder}, report: {page}", highlight=False, soft_wrap=True)
    return 0


def _train(options: Options[Any], console: Console) -> Run:
    given, network = named(options.model, options.preset, options.recipe), options.network
    reads = KINDS[given.kind].reads if given.kind else network.reads
    with reading(console) as bar:
        data = load_data(options.data, reads, getattr(network, "context", 0), progress=bar)
    if given.kind:
        check_fit(given, network, data)
        description = {"kind": given.kind, **asdict(network)}
        description |= {ours: data.shape[theirs] for ours, theirs in KINDS[given.kind].fit.items()}
    else:
        description = {"function": given.model}
    torch.manual_seed(options.training.seed)
    model = runs.build_model(description, data)
    with _Progress(console) as progress:
        progress.lines(data.unit, data.unigram, data.uniform)
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


def check_fit(given: Asked, network: Any, data: Dataset) -> None:
    """Raise `ValueError` where an option that the data decide was set to something else."""
    for ours, theirs in KINDS[given.kind].fit.items():
        value = getattr(network, ours)
        if value not in (getattr(given.config, ours), data.shape[theirs]):
            raise ValueError(
                f"{ours} {value} is not that of {data.source!r}, {data.shape[theirs]}; leave "
                f"--{ours.replace('_', '-')} out"
            )
