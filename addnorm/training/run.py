"""A run and its folder: what is trained on what, what happened, and what is kept of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from addnorm.files import json_line, read_lines, write_json, write_text
from addnorm.training.checkpoint import TrainState, save_file, weights
from addnorm.training.config import TrainConfig
from addnorm.training.objective import Objective, cross_entropy
from addnorm.training.tune import Choice


class Data(Protocol):
    """What the loop asks of a data set: reproducible batches of inputs and targets."""

    def training_batch(self, seed: int, step: int, size: int) -> tuple[Any, Any]:
        """Return the inputs and targets of one step; nothing but seed and step decide them."""

    def validation_batches(self, size: int, batches: int) -> Iterator[tuple[Any, Any]]:
        """Yield the same validation batches at every call."""

    @property
    def unit(self) -> str:
        """What an example is: `tokens`, or `images`, of which an evaluation takes all."""


class Evaluation(NamedTuple):
    """A validation: loss in nats, and for images the shares that were right, else NaN."""

    step: int
    loss: float
    seconds: float
    accuracy: float = math.nan  # the label has the largest logit
    top5: float = math.nan  # the label is among the five largest

    def row(self) -> dict[str, Any]:
        """Return the line of `metrics.jsonl`."""
        row = {"step": self.step, "validation": self.loss, "seconds": self.seconds}
        if math.isfinite(self.accuracy):
            row |= {"accuracy": self.accuracy, "top5": self.top5}
        return row


@dataclass
class Run:
    """A training: the model, its data and what happened."""

    model: nn.Module
    data: Data
    config: TrainConfig
    choice: Choice
    folder: Path | None = None
    objective: Objective = cross_entropy
    status: str = "running"  # running, finished, interrupted, diverged
    step: int = 0
    seconds: float = 0.0  # spent in steps, without evaluations and checkpoints
    losses: list[float] = field(default_factory=list)  # by step
    evaluations: list[Evaluation] = field(default_factory=list)
    tokens: int = 0  # or images
    failed_batch: tuple[Tensor, Tensor] | None = None  # what made the loss non-finite

    @property
    def validation(self) -> float:
        """The last validation loss in nats; NaN when the run diverged."""
        return (
            self.evaluations[-1].loss
            if self.evaluations and self.status != "diverged"
            else math.nan
        )

    @property
    def training_loss(self) -> float:
        """The mean loss of the last tenth of the steps; NaN before the first one."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last) if last else math.nan

    def summary(self) -> dict[str, Any]:
        """Return the facts that stand at the end of a run."""
        return {
            "status": self.status,
            "step": self.step,
            "validation": self.validation,
            "training": self.training_loss,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0,
            **(
                {k: v for k, v in self.evaluations[-1].row().items() if k in ("accuracy", "top5")}
                if self.evaluations
                else {}
            ),
        }


class Writer:
    """Keeps a run's folder; does nothing but remember the losses where there is none."""

    def __init__(self, run: Run, optimizer: torch.optim.Optimizer) -> None:
        self.run = run
        self.state = TrainState(run.model, optimizer)
        self.pending: list[str] = []
        self.written = 0  # evaluations in the file
        self.flushed = time.perf_counter()

    def log(self, loss: float, norm: float, rate: float) -> None:
        """Remember the loss, gradient norm and rate of the next step."""
        self.run.losses.append(loss)
        row = {"step": len(self.run.losses), "loss": loss, "gradient_norm": norm, "lr": rate}
        self.pending.append(json_line(row | {"seconds": round(self.run.seconds, 4)}))
        if time.perf_counter() - self.flushed > 1:  # someone may be reading along
            self.flush()

    def flush(self) -> None:
        """Append what is pending to `metrics.jsonl`."""
        folder, run = self.run.folder, self.run
        self.pending += [json_line(found.row()) for found in run.evaluations[self.written :]]
        self.written = len(run.evaluations)
        if folder is not None:
            with open(folder / "metrics.jsonl", "ab", buffering=0) as file:
                file.write("".join(self.pending).encode())
        self.pending.clear()
        self.flushed = time.perf_counter()

    def checkpoint(self) -> None:
        """Write metrics, weights and state; a kill at any moment leaves the older files whole."""
        run = self.run
        self.flush()
        if run.folder is None:
            return
        facts = {
            "step": run.step,
            "seconds": run.seconds,
            "tokens": run.tokens,
            "status": run.status,
        }
        save_file(run.folder / "model.safetensors", weights(run.model), {"step": run.step})
        self.state.save(run.folder / "checkpoint.safetensors", facts)
        write_json(run.folder / "summary.json", run.summary())

    def stop(self) -> None:
        """Write how the run failed and leave the last good checkpoint alone."""
        self.flush()
        if self.run.folder is not None:
            write_json(self.run.folder / "summary.json", self.run.summary())

    def restore(self) -> None:
        """Go back to the checkpoint: state, counters, and what was logged up to its step."""
        run = self.run
        assert run.folder is not None
        facts = self.state.load(run.folder / "checkpoint.safetensors")
        run.step, run.seconds, run.tokens = facts["step"], facts["seconds"], facts["tokens"]
        run.status = "finished" if run.step == run.config.steps else "running"
        kept = _cut(run.folder / "metrics.jsonl", run.step)
        _cut(run.folder / "watch.jsonl", run.step)
        run.losses = [r["loss"] for r in kept if "loss" in r]
        run.evaluations = [
            Evaluation(
                r["step"],
                r["validation"],
                r["seconds"],
                *(r[k] for k in ("accuracy", "top5") if k in r),
            )
            for r in kept
            if "validation" in r
        ]
        self.written = len(run.evaluations)


def _cut(path: Path, step: int) -> list[dict[str, Any]]:
    """Leave the rows up to `step` in a JSON Lines file, where there is one, and return them."""
    kept = [row for row in read_lines(path) if row["step"] <= step]
    if path.exists():
        write_text(path, "".join(map(json_line, kept)))
    return kept
