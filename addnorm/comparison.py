"""The main job: train the same network in every cell of wiring x depth x rate x warm-up x seed.

Cells with one seed see the same data in the same order; all cells are computed in one precision.
Each is X-rayed at the start and at the end. A finished cell is a file in `OUT/cells`, so a second
call goes on where the first one stopped, and a larger grid trains only what is new.
"""

from __future__ import annotations

import datetime
import hashlib
import inspect
import itertools
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

import joblib
import torch

from addnorm import __version__
from addnorm.contract import parse_spec, unknown
from addnorm.data.sets import DataConfig, Dataset, load_data, reload_data
from addnorm.files import finite, locked, read_json, write_json
from addnorm.models.gpt import GPTConfig
from addnorm.models.mlp import MLPConfig
from addnorm.models.resnet import ResNetConfig
from addnorm.models.zoo import KINDS, fitted, start_of, training_flops
from addnorm.plugins import absolute, load_plugins
from addnorm.probe.vitals import xray
from addnorm.reports.summary import merge, status_of
from addnorm.training.config import Runtime, TrainConfig
from addnorm.training.loop import pick_device, to_device, train_loop
from addnorm.training.tune import Choice

SCHEMA = 1
EVALUATIONS = 10  # validation points on a cell's curve
POINTS = 50  # training losses kept of a cell


Network = TypeVar("Network")


@dataclass(frozen=True)
class CompareConfig(Generic[Network]):
    """The grid, the network and the training of a comparison."""

    network: Network = field(default_factory=lambda: COMPARED["gpt"]["network"])
    """the network; its depth and wiring are the grid's"""
    data: DataConfig = field(default_factory=DataConfig)
    """text, or images for a network that reads them"""
    wirings: tuple[str, ...] = ("plain", "postnorm", "prenorm")
    """wirings, separated by commas; `addnorm wirings` lists them"""
    depths: tuple[int, ...] = (3, 10, 24)
    """layers; of a ResNet the depth that names it, such as 20"""
    rates: tuple[float, ...] = (1.5e-3,)
    """peak learning rates; the report shows each wiring at its best"""
    warmups: tuple[int, ...] = (0, 100)
    """warm-up lengths in steps"""
    seeds: int = 2
    """trainings of each cell, with seeds 0, 1, ..."""
    steps: int = 200
    """optimiser steps of each training"""
    batch: int = 16
    """windows or images in a step"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum 0.9"""
    weight_decay: float = 0.1
    """decay of weights"""
    clip: float = 1.0
    """gradient norm above which the gradient is scaled down; 0 for never"""
    schedule: Literal["cosine", "linear", "step", "constant"] = "cosine"
    """what the rate does after warm-up"""
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
        for depth, wiring in itertools.product(self.depths, self.wirings):
            self.cell(wiring, depth)
        for rate, warmup in itertools.product(self.rates, self.warmups):
            self.training(rate, warmup, 0)
            if warmup >= self.steps:
                raise ValueError(
                    f"a warm-up of {warmup} steps does not fit into {self.steps} steps; use "
                    f"--warmups 0 or at least --steps {warmup + 1}"
                )

    @property
    def kind(self) -> str:
        """The kind of the network, a name of `models.zoo.KINDS`."""
        return next(name for name, kind in KINDS.items() if type(self.network) is kind.config)

    def cell(self, wiring: str, depth: int) -> Network:
        """Return the network of one cell, not yet fitted to the data."""
        network: Network = replace(cast(Any, self.network), wiring=wiring, depth=depth)
        return network

    def training(self, rate: float, warmup: int, seed: int) -> TrainConfig:
        """Return the training of one cell."""
        return TrainConfig(
            steps=self.steps,
            batch=self.batch,
            optimizer=self.optimizer,
            lr=rate,
            betas=(0.9, 0.98),
            warmup=warmup,
            schedule=self.schedule,
            weight_decay=self.weight_decay,
            clip=self.clip,
            eval_every=max(1, self.steps // EVALUATIONS),
            eval_batches=max(1, 128 // self.batch),
            seed=seed,
        )


# How a kind is compared unless said otherwise: minutes on 2 cores.
COMPARED: Mapping[str, Mapping[str, Any]] = {
    "gpt": {"network": GPTConfig(dim=48, heads=4, context=32)},
    "resnet": {
        "network": ResNetConfig(),
        "wirings": ("plain", "postact", "residual"),
        "depths": (8, 20, 56),
        "rates": (0.02,),
        "warmups": (0,),
        "steps": 400,
        "batch": 64,
        "optimizer": "sgd",
        "weight_decay": 1e-4,
        "clip": 0.0,
    },
    "mlp": {
        "network": MLPConfig(flatten=True),
        "wirings": ("plain", "residual", "prenorm"),
        "depths": (4, 16, 48),
        "warmups": (0,),
        "batch": 64,
        "weight_decay": 0.0,
    },
}


def compared(kind: str) -> CompareConfig[Any]:
    """Return the comparison of a kind with its defaults. Raises `ValueError` for other kinds."""
    if kind not in COMPARED:
        raise ValueError(unknown("network to compare", kind, COMPARED))
    return CompareConfig(**COMPARED[kind])


@dataclass(frozen=True)
class Cell:
    """One training of the grid: all that decides its outcome."""

    kind: str
    model: Any  # a config of this kind
    training: TrainConfig
    data: Mapping[str, Any]  # what finds them again
    choice: Choice

    @property
    def key(self) -> str:
        """The name of the cell's file, a hash of what decides the outcome (not of how fast)."""
        facts = {
            "addnorm": __version__,
            "wiring": _source(self.model.wiring),
            "kind": self.kind,
            "model": asdict(self.model),
            "training": asdict(self.training),
            "data": {k: v for k, v in self.data.items() if k != "source"},
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
    config: CompareConfig[Any] | None = None,
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
    config, observer = config or compared("gpt"), observer or CompareObserver()
    reads = KINDS[config.kind].reads
    data = load_data(config.data, reads, getattr(config.network, "context", 0))
    device = pick_device(config.device)
    if out is None:
        return _compare(config, data, device, None, observer, plugins)
    with locked(Path(out)):
        return _compare(config, data, device, Path(out), observer, plugins)


def _compare(
    config: CompareConfig[Any],
    data: Dataset,
    device: torch.device,
    folder: Path | None,
    observer: CompareObserver,
    plugins: Sequence[str],
) -> dict[str, Any]:
    _refuse_other_data(folder, data)
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
    place = folder and folder.absolute()  # a worker that is used again may stand elsewhere
    for cell in parallel(run(c, str(device), place, tuple(plugins)) for c in waiting):
        result["cells"].append(cell)
        observer.finished(cell)
    order = {cell.key: i for i, cell in enumerate(cells)}
    result["cells"].sort(key=lambda c: order[c["key"]])
    if folder is not None:
        write_json(folder / "comparison.json", result)
    return result


def _cells(config: CompareConfig[Any], data: Dataset, choice: Choice) -> Iterator[Cell]:
    grid = itertools.product(config.wirings, config.depths, config.rates, config.warmups)
    for wiring, depth, rate, warmup in grid:
        for seed in range(config.seeds):
            model = fitted(config.kind, config.cell(wiring, depth), data.shape)
            training = config.training(rate, warmup, seed)
            yield Cell(config.kind, model, training, data.describe(), choice)


def _refuse_other_data(folder: Path | None, data: Dataset) -> None:
    """Raise `ValueError` where the folder holds a comparison on other data."""
    if folder is None or not (folder / "comparison.json").exists():
        return
    before = load_comparison(folder)
    if before["data"]["sha256"] != data.sha256:
        raise ValueError(
            f"{folder} holds a comparison on other data (sha256 {before['data']['sha256'][:12]}, "
            f"this one {data.sha256[:12]}); choose another --out"
        )


def _finished(folder: Path | None, cell: Cell) -> dict[str, Any] | None:
    path = folder / "cells" / f"{cell.key}.json" if folder else None
    return dict(read_json(path)) if path is not None and path.exists() else None


_LOADED: dict[str, Dataset] = {}


def _data(described: Mapping[str, Any]) -> Dataset:
    """Return the data of a cell, read once in each worker."""
    sha256 = described["sha256"]
    if sha256 not in _LOADED:
        _LOADED.clear()
        _LOADED[sha256] = reload_data(described)
    return _LOADED[sha256]


def _train_cell(
    cell: Cell, device_name: str, folder: Path | None, plugins: tuple[str, ...]
) -> dict[str, Any]:
    """Train one cell, X-ray it at both ends, and keep the result; runs in a worker process."""
    load_plugins(plugins)
    device = torch.device(device_name)
    data = _data(cell.data)
    model = started(cell.kind, cell.model, cell.training.seed).to(device)
    batch = to_device(next(iter(data.validation_batches(cell.training.batch, 1))), device)
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
        "training": run.training_loss if run.status == "finished" else None,
        "accuracy": run.evaluations[-1].accuracy if data.unit == "images" else None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_token": training_flops(model, data.shape),
        "tokens": run.tokens,
        "steps": run.step,
        "seconds": run.seconds,
        "tokens_per_second": run.tokens / run.seconds if run.seconds else 0.0,
        "start_rule": start_of(cell.model),
        "curve": [[row.step, row.loss, row.seconds] for row in run.evaluations],
        "losses": [[i + 1, run.losses[i]] for i in range(0, len(run.losses), every)],
        "start": finite(start.to_dict()),  # the same whether kept or read again
        "end": finite(end.to_dict()),
    }
    if folder is not None:
        write_json(folder / "cells" / f"{cell.key}.json", result)
    return result


def started(kind: str, config: Any, seed: int) -> Any:
    """Return a network whose ends start alike under every wiring with one seed."""
    model: Any = KINDS[kind].model(config)
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
        return {"data": result["data"]["sha256"][:12], **settings}

    return merge([load_comparison(folder) for folder in folders], same)
