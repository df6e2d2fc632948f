"""The main job: train the same GPT in every cell of wiring x depth x rate x warm-up x seed.

Cells with one seed see the same data in the same order; all cells are computed in one precision.
Each is X-rayed at the start and at the end. A finished cell is a file in `OUT/cells`, so a second
call goes on where the first one stopped, and a larger grid trains only what is new.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import inspect
import itertools
import json
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import joblib
import torch

from addnorm import __version__
from addnorm.contract import parse_spec
from addnorm.data.text import TextData, load_text
from addnorm.files import locked, read_json, write_json
from addnorm.models.gpt import GPT, GPTConfig
from addnorm.plugins import absolute, load_plugins
from addnorm.probe.vitals import xray
from addnorm.reports.summary import merge, status_of
from addnorm.training.config import Runtime, TrainConfig
from addnorm.training.loop import pick_device, to_device, train_loop
from addnorm.training.tune import Choice

SCHEMA = 1
EVALUATIONS = 10  # validation points on a cell's curve
POINTS = 50  # training losses kept of a cell


@dataclass(frozen=True)
class CompareConfig:
    """The grid, the network and the training of a comparison."""

    wirings: tuple[str, ...] = ("plain", "postnorm", "prenorm")
    """wirings, separated by commas; `addnorm wirings` lists them"""
    depths: tuple[int, ...] = (3, 10, 24)
    """layers, each an attention and a feed-forward connection"""
    rates: tuple[float, ...] = (1.5e-3,)
    """peak learning rates; the report shows each wiring at its best"""
    warmups: tuple[int, ...] = (0, 100)
    """warm-up lengths in steps"""
    seeds: int = 2
    """trainings of each cell, with seeds 0, 1, ..."""
    steps: int = 200
    """optimiser steps of each training"""
    batch: int = 16
    """windows in a step"""
    dim: int = 48
    """width of the stream"""
    heads: int = 4
    """attention heads; must divide dim"""
    context: int = 32
    """characters that the model sees at once"""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """the norm wherever a wiring has one"""
    start: str = ""
    """one start for all (normal, gpt2, xavier, fairseq, he, torch) in place of each wiring's own"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """what the rate does after warm-up"""
    data: str = "pydoc"
    """pydoc, a UTF-8 file, a folder, or a glob in quotes"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """one precision for all cells"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    jobs: int = 0
    """trainings at once, one thread each; 0 is one for each CPU core, or 1 on a GPU"""

    def __post_init__(self) -> None:
        canonical = tuple(str(parse_spec(w)) for w in self.wirings)
        object.__setattr__(self, "wirings", tuple(dict.fromkeys(canonical)))
        for name in ("depths", "rates", "warmups"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        for name in ("wirings", "depths", "rates", "warmups"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one")
        for name in ("seeds", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.jobs < 0:
            raise ValueError(f"jobs {self.jobs} must be at least 0")
        for depth in self.depths:
            self.model(self.wirings[0], depth)
        for rate, warmup in itertools.product(self.rates, self.warmups):
            self.training(rate, warmup, 0)
            if warmup >= self.steps:
                raise ValueError(
                    f"a warm-up of {warmup} steps does not fit into {self.steps} steps; use "
                    f"--warmups 0 or at least --steps {warmup + 1}"
                )

    def model(self, wiring: str, depth: int) -> GPTConfig:
        """Return the network of one cell, without its vocabulary."""
        return GPTConfig(
            depth=depth,
            dim=self.dim,
            heads=self.heads,
            context=self.context,
            wiring=wiring,
            norm=self.norm,
            start=self.start,
        )

    def training(self, rate: float, warmup: int, seed: int) -> TrainConfig:
        """Return the training of one cell."""
        return TrainConfig(
            steps=self.steps,
            batch=self.batch,
            lr=rate,
            warmup=warmup,
            schedule=self.schedule,
            eval_every=max(1, self.steps // EVALUATIONS),
            eval_batches=max(1, 128 // self.batch),
            seed=seed,
        )


@dataclass(frozen=True)
class Cell:
    """One training of the grid: all that decides its outcome."""

    model: GPTConfig
    training: TrainConfig
    source: str
    sha256: str
    choice: Choice

    @property
    def key(self) -> str:
        """The name of the cell's file, a hash of what decides the outcome (not of how fast)."""
        facts = {
            "addnorm": __version__,
            "wiring": _source(self.model.wiring),
            "model": asdict(self.model),
            "training": asdict(self.training),
            "text": self.sha256,
            "precision": self.choice.precision,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _source(spec: str) -> str:
    """Return the code of a wiring: a cell trained by other code is another cell."""
    wiring = parse_spec(spec).wiring
    try:
        return inspect.getsource(wiring)
    except (OSError, TypeError):  # typed at a prompt
        return wiring.__qualname__


class CompareObserver:
    """Hears how a comparison goes. The base class is silent."""

    def say(self, message: str) -> None:
        """Hear a sentence."""

    def begin(self, result: dict[str, Any], cells: Sequence[Cell]) -> None:
        """Hear the cells that are finished already, and all cells of the grid."""

    def finished(self, cell: dict[str, Any]) -> None:
        """Hear the result of one cell."""


def compare(
    config: CompareConfig | None = None,
    *,
    out: str | Path | None = None,
    observer: CompareObserver | None = None,
    plugins: Sequence[str] = (),
) -> dict[str, Any]:
    """Train every cell of the grid and return the comparison as plain values.

    With `out`, finished cells are kept in that folder and `comparison.json` is written there.
    `plugins`: modules or files that define the user's wirings, imported in every process. Raises
    `ValueError` for a grid that cannot be built and for a folder that holds another text.
    """
    load_plugins(plugins)
    plugins = absolute(plugins)
    config, observer = config or CompareConfig(), observer or CompareObserver()
    data = load_text(config.data, config.context)
    device = pick_device(config.device)
    if out is None:
        return _compare(config, data, device, None, observer, plugins)
    with locked(Path(out)):
        return _compare(config, data, device, Path(out), observer, plugins)


def _compare(
    config: CompareConfig,
    data: TextData,
    device: torch.device,
    folder: Path | None,
    observer: CompareObserver,
    plugins: Sequence[str],
) -> dict[str, Any]:
    _refuse_other_text(folder, data)
    # Nothing is measured here: one way for all cells and machines, so that results repeat bitwise.
    choice = Choice(precision=config.precision, threads=1 if device.type == "cpu" else 0)
    observer.say(f"computing in {choice}")
    cells = list(_cells(config, data, choice))
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "addnorm": __version__,
        "torch": torch.__version__,
        "machine": f"{joblib.cpu_count()} cores, {platform.machine()}, {device}",
        "date": datetime.date.today().isoformat(),
        "settings": asdict(config),
        "choice": asdict(choice),
        "data": data.describe(),
        "grid": [cell.key for cell in cells],
        "cells": [c for cell in cells if (c := _finished(folder, cell)) is not None],
    }
    if folder is not None:
        write_json(folder / "comparison.json", result)
    stored = len(list((folder / "cells").glob("*.json"))) if folder else 0
    others = stored - len(result["cells"])
    if folder is not None and others > 0:
        observer.say(
            f"{others} cells of other settings stay in {folder / 'cells'}, not in the report"
        )
    observer.begin(result, cells)
    done = {c["key"] for c in result["cells"]}
    waiting = sorted((c for c in cells if c.key not in done), key=lambda c: -c.model.depth)
    jobs = config.jobs or (1 if device.type == "cuda" else joblib.cpu_count())
    parallel = joblib.Parallel(n_jobs=min(jobs, len(waiting)) or 1, return_as="generator_unordered")
    run = joblib.delayed(_train_cell)
    for cell in parallel(run(c, str(device), folder, tuple(plugins)) for c in waiting):
        result["cells"].append(cell)
        observer.finished(cell)
    order = {cell.key: i for i, cell in enumerate(cells)}
    result["cells"].sort(key=lambda c: order[c["key"]])
    if folder is not None:
        write_json(folder / "comparison.json", result)
    return result


def _cells(config: CompareConfig, data: TextData, choice: Choice) -> Iterator[Cell]:
    grid = itertools.product(config.wirings, config.depths, config.rates, config.warmups)
    for wiring, depth, rate, warmup in grid:
        for seed in range(config.seeds):
            model = replace(config.model(wiring, depth), vocab_size=data.vocab_size)
            training = config.training(rate, warmup, seed)
            yield Cell(model, training, data.location, data.sha256, choice)


def _refuse_other_text(folder: Path | None, data: TextData) -> None:
    """Raise `ValueError` where the folder holds a comparison of another text."""
    if folder is None or not (folder / "comparison.json").exists():
        return
    before = load_comparison(folder)
    if before["data"]["sha256"] != data.sha256:
        raise ValueError(
            f"{folder} holds a comparison on another text (sha256 {before['data']['sha256'][:12]}, "
            f"this one {data.sha256[:12]}); choose another --out"
        )


def _finished(folder: Path | None, cell: Cell) -> dict[str, Any] | None:
    path = folder / "cells" / f"{cell.key}.json" if folder else None
    return dict(read_json(path)) if path is not None and path.exists() else None


@functools.lru_cache(maxsize=1)
def _data(source: str, context: int, sha256: str) -> TextData:
    """Return the data of a cell, read once in each worker. The text must be what it was."""
    data = load_text(source, context)
    if data.sha256 != sha256:
        raise ValueError(f"the text {source!r} changed while the comparison was running")
    return data


def _train_cell(
    cell: Cell, device_name: str, folder: Path | None, plugins: tuple[str, ...]
) -> dict[str, Any]:
    """Train one cell, X-ray it at both ends, and keep the result; runs in a worker process."""
    load_plugins(plugins)
    device = torch.device(device_name)
    data = _data(cell.source, cell.model.context, cell.sha256)
    model = started(cell.model, cell.training.seed).to(device)
    batch = to_device(next(data.validation_batches(cell.training.batch, 1)), device)
    start = xray(model, *batch)
    run = train_loop(model, data, cell.training, Runtime(device=device_name), choice=cell.choice)
    end = xray(model, *(run.failed_batch or batch))
    every = max(1, len(run.losses) // POINTS)
    result = {
        "key": cell.key,
        "wiring": cell.model.wiring,
        "depth": cell.model.depth,
        "lr": cell.training.lr,
        "warmup": cell.training.warmup,
        "seed": cell.training.seed,
        "status": status_of(run.validation, run.status == "finished", data.unigram, data.uniform),
        "validation": run.validation if math.isfinite(run.validation) else None,
        "parameters": sum(model.parameters_by_part().values()),
        "flops_per_token": model.flops_per_token(),
        "tokens": run.tokens,
        "steps": run.step,
        "seconds": run.seconds,
        "tokens_per_second": run.tokens / run.seconds if run.seconds else 0.0,
        "start_rule": cell.model.start or model.stack.spec.wiring.start,
        "curve": [list(row) for row in run.evaluations],
        "losses": [[i + 1, run.losses[i]] for i in range(0, len(run.losses), every)],
        "start": start.to_dict(),
        "end": end.to_dict(),
    }
    if folder is not None:
        write_json(folder / "cells" / f"{cell.key}.json", result)
    return result


def started(config: GPTConfig, seed: int) -> GPT:
    """Return a GPT whose embedding and head start alike under every wiring with one seed."""
    model = GPT(config)
    torch.manual_seed(seed)  # after building, which draws numbers of its own
    model.reset_parameters()
    return model


def load_comparison(folder: str | Path) -> dict[str, Any]:
    """Return the comparison in `folder`, with every finished cell of its grid.

    Raises `ValueError` where there is none, or one of another schema.
    """
    path = Path(folder) / "comparison.json" if Path(folder).is_dir() else Path(folder)
    result = read_json(path)
    if not isinstance(result, dict) or "cells" not in result or "settings" not in result:
        raise ValueError(f"{path} holds no comparison")
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {result.get('schema')}; this version reads {SCHEMA}")
    if (path.parent / "cells").is_dir():
        # A comparison that was cut off has finished cells that its summary does not list yet.
        files = [path.parent / "cells" / f"{key}.json" for key in result["grid"]]
        result["cells"] = [read_json(file) for file in files if file.exists()]
    return result


def join_comparisons(folders: Sequence[str | Path]) -> dict[str, Any]:
    """Return one comparison out of several. Raises `ValueError` when text or settings differ."""
    shape = [f.name for f in fields(CompareConfig)]
    free = ("wirings", "depths", "rates", "warmups", "seeds", "jobs", "device", "data")
    fixed = [name for name in shape if name not in free]

    def same(result: dict[str, Any]) -> dict[str, Any]:
        settings = {name: result["settings"][name] for name in fixed}
        return {"text": result["data"]["sha256"][:12], **settings}

    return merge([load_comparison(folder) for folder in folders], same)
