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
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from addnorm.files import write_json
from addnorm.training.config import Runtime, TrainConfig
from addnorm.training.objective import Objective, cross_entropy, logits_of
from addnorm.training.run import Data, Evaluation, Run, Writer
from addnorm.training.tune import Choice, tune


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
            total += run.objective(output, targets).item() * targets.numel()
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
    objective: Objective = cross_entropy,
) -> Run:
    """Train `model` on `data` to a small `objective` and return the run.

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
        return objective(model(inputs), targets)

    if choice is None:
        choice, loss = tune(model, make_optimizer, loss_of, first, config, runtime, observer.say)
    else:
        loss = choice.apply(model, loss_of)
    if folder is not None and facts is not None:
        own = {"train": asdict(config), "runtime": asdict(runtime), "choice": asdict(choice)}
        write_json(folder / "config.json", facts | own)
    run = Run(model, data, config, choice, folder, objective)
    writer = Writer(run, optimizer)
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
    writer: Writer,
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


def _read(run: Run, waiting: list[_Taken], writer: Writer) -> bool:
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
