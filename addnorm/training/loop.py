"""The training loop: optimizer, warm-up, decay, clipping, evaluation, checkpoints, resume.

It knows no model and no wiring by name. A model maps tokens `(B, T)` to logits `(B, T, V)` or
images `(B, C, H, W)` to logits `(B, V)`; where it has `parameter_groups`, `choices` and
`after_step` the loop asks them.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addnorm.files import json_line, read_lines, write_json, write_text
from addnorm.training.checkpoint import TrainState, save_file, weights
from addnorm.training.config import Runtime, TrainConfig
from addnorm.training.tune import Choice, tune


class Data(Protocol):
    """What the loop asks of a data set: reproducible batches of inputs and targets."""

    def training_batch(self, seed: int, step: int, size: int) -> tuple[Any, Any]:
        """Return the inputs and targets of one step; nothing but seed and step decide them."""

    def validation_batches(self, size: int, batches: int) -> Iterator[tuple[Any, Any]]:
        """Yield the same validation batches at every call."""

    @property
    def unit(self) -> str:
        """What an example is: `tokens`, or `images`, of which an evaluation takes all."""


@runtime_checkable
class Grouped(Protocol):
    """A model that says how the optimiser treats its parameters."""

    def parameter_groups(self, weight_decay: float, every: bool = False) -> list[dict[str, Any]]:
        """Return optimiser groups with `params`, `weight_decay` and `lr_scale`.

        Matrices decay, with `every` vectors too, unless the model says otherwise of a parameter.
        """


@runtime_checkable
class Constrained(Protocol):
    """A model whose parameters are put back in place after every step, such as on a sphere."""

    def after_step(self) -> None:
        """Put the parameters in place; called before the first step too."""


class Observer:
    """Hears what a run does. The base class is silent."""

    def say(self, message: str) -> None:
        """Hear a sentence about a choice or an event."""

    def step(self, step: int, steps: int, loss: float, rate: float, left: float) -> None:
        """Hear the loss at a step, tokens per second and seconds left."""

    def evaluation(self, step: int, loss: float, accuracy: float) -> None:
        """Hear validation loss and, of images, accuracy (else NaN) after `step` steps."""


class Watcher(Protocol):
    """What looks on at the steps from outside, such as `addnorm.watch` returns."""

    def begin(self, step: int) -> None:
        """Begin after so many steps; what was seen before is of no account."""

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at the gradients as the optimizer gets them."""

    def after_update(self, loss: Tensor) -> None:
        """Look at what the optimizer changed, and end the step."""

    def flush(self) -> None:
        """Write down what was seen."""


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


def cross_entropy(output: Any, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of logits `(..., V)`, or of `output.logits`."""
    logits = logits_of(output)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1))


def logits_of(output: Any) -> Tensor:
    """Return the logits `(..., V)`: the output itself, or its `logits`."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def to_device(batch: tuple[Any, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a numpy batch as tensors on `device`."""
    inputs, targets = (torch.from_numpy(np.ascontiguousarray(a)) for a in batch)
    return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer over the model's own groups, or over matrices and the rest."""
    every = config.decay == "all"
    if isinstance(model, Grouped):
        groups = model.parameter_groups(config.weight_decay, every)
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        decayed = [p for p in trained if every or p.dim() >= 2]
        rest = [p for p in trained if not every and p.dim() < 2]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay, "lr_scale": 1.0},
            {"params": rest, "weight_decay": 0.0, "lr_scale": 1.0},
        ]
    groups = [g for g in groups if g["params"]]
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient")
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.betas[0], fused=True)
    groups = [{**g, "eps": 1e-8 * g.get("eps_scale", 1.0)} for g in groups]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


@torch.no_grad()
def evaluate(run: Run) -> Evaluation:
    """Return the mean loss over the validation batches, in evaluation mode; of images over all."""
    model, config = run.model, run.config
    device = next(model.parameters()).device
    images = run.data.unit == "images"
    batches = sys.maxsize if images else config.eval_batches
    total, right, among, count = 0.0, 0, 0, 0
    training = model.training
    model.eval()
    with run.choice.autocast(device):
        for batch in run.data.validation_batches(config.batch, batches):
            inputs, targets = to_device(batch, device)
            output = model(inputs)
            total += cross_entropy(output, targets).item() * targets.numel()
            count += targets.numel()
            if images:
                logits = logits_of(output)
                best = logits.topk(min(5, logits.shape[-1])).indices == targets[:, None]  # (B, 5)
                right += int(best[:, 0].sum())
                among += int(best.sum())
    model.train(training)
    shares = (right / count, among / count) if images else ()
    return Evaluation(run.step, total / count, run.seconds, *shares)


def train_loop(
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    runtime: Runtime,
    *,
    choice: Choice | None = None,
    folder: Path | None = None,
    facts: dict[str, Any] | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    watcher: Watcher | None = None,
) -> Run:
    """Train `model` on `data` and return the run.

    Without `choice` the precision, the compiler and the model's own choices are measured first.
    With `folder` the run writes `metrics.jsonl`, `model.safetensors` and `checkpoint.safetensors`
    there, and a new one `config.json` from `facts` and its own settings; with `resume` it goes on
    from the checkpoint, bitwise as if it had not stopped (CPU).
    A loss or gradient that is not finite ends the run as `diverged` before the step is taken, and
    the last checkpoint stays. Ctrl-C saves and raises `KeyboardInterrupt`.
    """
    observer = observer or Observer()
    device, threads = pick_device(runtime.device), torch.get_num_threads()
    torch.manual_seed(config.seed)
    model.to(device).train()
    if isinstance(model, Constrained):
        model.after_step()
    optimizer = make_optimizer(model, config)
    first = to_device(data.training_batch(config.seed, 0, config.batch), device)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model(inputs), targets)

    if choice is None:
        choice, loss = tune(model, make_optimizer, loss_of, first, config, runtime, observer.say)
    else:
        loss = choice.apply(model, loss_of)
    if folder is not None and facts is not None:
        own = {"train": asdict(config), "runtime": asdict(runtime), "choice": asdict(choice)}
        write_json(folder / "config.json", facts | own)
    run = Run(model, data, config, choice, folder)
    writer = _Writer(run, optimizer)
    if resume:
        writer.restore()
        observer.say(f"resumed at step {run.step:,} of {config.steps:,}")
    if run.step == 0:
        _evaluate(run, observer)
        writer.checkpoint()
    try:
        if watcher is not None:
            watcher.begin(run.step)
        with _interrupt() as interrupted:
            _steps(run, optimizer, loss, observer, watcher, writer, interrupted, device)
    finally:
        torch.set_num_threads(threads)
    if run.status == "interrupted":
        raise KeyboardInterrupt
    return run


@dataclass(frozen=True)
class _Taken:
    """A step whose loss has not been read yet."""

    loss: Tensor
    norm: Tensor
    rate: float
    batch: tuple[Tensor, Tensor]


def _steps(
    run: Run,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    observer: Observer,
    watcher: Watcher | None,
    writer: _Writer,
    interrupted: Callable[[], bool],
    device: torch.device,
) -> None:
    """Take the steps that are left, and leave `run.status` saying how they ended.

    A GPU is asked for its losses every tenth step and before every checkpoint; until then a
    gradient that is not finite changes nothing, because the fused optimizer skips its step.
    """
    config = run.config
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    log_every = 1 if device.type == "cpu" else 10
    waiting: list[_Taken] = []
    began, spent, done = time.perf_counter(), run.seconds, run.step
    while run.step < config.steps:
        rate = config.lr * config.rate(run.step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        batch = to_device(run.data.training_batch(config.seed, run.step, config.batch), device)
        with run.choice.autocast(device):
            loss = loss_of(*batch)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
        waiting.append(_Taken(loss.detach(), norm, rate, batch))
        bad = ~torch.isfinite(norm + loss.detach())
        setattr(optimizer, "found_inf", bad.float())  # noqa: B010  # what GradScaler sets
        if watcher is not None:
            watcher.before_update(optimizer)
        optimizer.step()
        if isinstance(run.model, Constrained):
            run.model.after_step()
        if watcher is not None:
            watcher.after_update(loss)
        optimizer.zero_grad(set_to_none=True)
        run.step += 1
        run.tokens += batch[1].numel()
        ended, stop = run.step == config.steps, interrupted()
        pause = ended or stop or run.step % config.eval_every == 0
        if not pause and len(waiting) < log_every:
            continue
        run.seconds = spent + time.perf_counter() - began
        if watcher is not None and pause:
            watcher.flush()
        if not _read(run, waiting, writer):
            writer.stop()
            return
        per_step = (time.perf_counter() - began) / (run.step - done)
        left = per_step * (config.steps - run.step)
        speed = batch[1].numel() / per_step
        observer.step(run.step, config.steps, run.losses[-1], speed, left)
        if pause:
            paused = time.perf_counter()
            if ended or not stop:
                _evaluate(run, observer)
            run.status = "finished" if ended else "interrupted" if stop else "running"
            writer.checkpoint()
            began += time.perf_counter() - paused
        if stop:
            return


def _read(run: Run, waiting: list[_Taken], writer: _Writer) -> bool:
    """Log the steps that wait; at the first that is not finite, mark the run as diverged there."""
    rows = torch.stack([torch.stack((taken.loss, taken.norm)) for taken in waiting]).tolist()
    first = run.step - len(waiting)
    for step, ((loss, norm), taken) in enumerate(zip(rows, waiting, strict=True), first):
        if not math.isfinite(loss + norm):
            run.step, run.status, run.failed_batch = step, "diverged", taken.batch
            break
        writer.log(loss, norm, taken.rate)
    waiting.clear()
    return run.status != "diverged"


def _evaluate(run: Run, observer: Observer) -> None:
    found = evaluate(run)
    run.evaluations.append(found)
    observer.evaluation(found.step, found.loss, found.accuracy)


class _Writer:
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


@contextlib.contextmanager
def _interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag that the loop reads between steps; a second one raises."""
    seen = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield seen.is_set
        return

    def handle(_signal: int, _frame: FrameType | None) -> None:
        if seen.is_set():
            raise KeyboardInterrupt
        seen.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def pick_device(name: str) -> torch.device:
    """Return the device; `auto` is the GPU where there is one. Raises `ValueError` when absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from None
    return device
