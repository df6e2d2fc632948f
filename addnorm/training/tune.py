"""Choose precision, compiler, threads and the model's own variants by a short measurement."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from addnorm.training.config import Runtime, TrainConfig

Loss = Callable[[Tensor, Tensor], Tensor]
WARM, TIMED, ROUNDS = 2, 3, 3
PARITY = 0.02  # a candidate whose loss after the measured steps differs by more is not taken
GAIN = 0.97  # a candidate must be at least 3 % faster: less is noise
WORTH_COMPILING = 120.0  # seconds that an eager run must last before compiling is tried


@runtime_checkable
class Tunable(Protocol):
    """A model that can compute something in several ways."""

    def choices(self) -> dict[str, tuple[str, ...]]:
        """Return the ways by name."""

    def choose(self, name: str, value: str) -> None:
        """Compute `name` by way of `value` from now on."""


@dataclass(frozen=True)
class Choice:
    """How a run is computed; recorded, and taken over when it resumes."""

    precision: str = "float32"
    compiled: bool = False
    threads: int = 0
    variants: dict[str, str] = field(default_factory=dict)
    measured: list[dict[str, Any]] = field(default_factory=list)

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the autocast context of this precision."""
        on = self.precision == "bfloat16"
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=on)

    def apply(self, model: nn.Module, loss_of: Loss) -> Loss:
        """Set threads and variants and return the loss function, compiled where chosen."""
        if self.threads:
            torch.set_num_threads(self.threads)
        self.choose(model)
        return torch.compile(loss_of, dynamic=False) if self.compiled else loss_of

    def choose(self, model: nn.Module) -> None:
        """Set the variants of a model that has some."""
        if isinstance(model, Tunable):
            for name, value in self.variants.items():
                model.choose(name, value)

    def __str__(self) -> str:
        words = [self.precision, "compiled" if self.compiled else "eager"]
        words += [f"{name} {value}" for name, value in self.variants.items()]
        words += [f"{self.threads} thread{'s' * (self.threads != 1)}"] if self.threads else []
        return ", ".join(words)


def tune(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module, TrainConfig], torch.optim.Optimizer],
    loss_of: Loss,
    batch: tuple[Tensor, Tensor],
    config: TrainConfig,
    runtime: Runtime,
    say: Callable[[str], None],
) -> tuple[Choice, Loss]:
    """Measure a few steps each way and return the fastest that passes parity, with its loss.

    First the threads, then precision and the model's variants together, then the compiler where
    the run is long enough. What the user set is not measured. The weights, the random state
    and the gradients are as before afterwards.
    """
    device = batch[0].device
    trial = _Trial(model, make_optimizer, loss_of, batch, config)
    cores = runtime.threads or torch.get_num_threads()
    best = Choice(
        precision="float32" if runtime.precision == "auto" else runtime.precision,
        threads=cores if device.type == "cpu" else 0,
        variants={k: v[0] for k, v in model.choices().items()}
        if isinstance(model, Tunable)
        else {},
    )
    measured: list[dict[str, Any]] = []
    seconds = 0.0
    several = device.type == "cpu" and not runtime.threads and cores > 1
    if several:
        best, seconds = trial.fastest([best, replace(best, threads=1)], measured)
    # Precision and variants together: bfloat16 pays only with the variant that suits it.
    precisions = ("float32", "bfloat16") if runtime.precision == "auto" else (runtime.precision,)
    choices = model.choices() if isinstance(model, Tunable) else {}
    joint = [
        replace(best, precision=precision, variants=dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
        for precision in precisions
    ]
    if len(joint) > 1 or (runtime.compile == "auto" and not several):
        best, seconds = trial.fastest(joint, measured)
    chosen_loss = best.apply(model, loss_of)
    estimate = seconds * config.steps
    if runtime.compile == "on" or (runtime.compile == "auto" and estimate > WORTH_COMPILING):
        best, chosen_loss = _compiled(trial, best, seconds, runtime, say, measured)
    best = replace(best, measured=measured)
    rows = ", ".join(f"{row['choice']}: {1000 * row['seconds']:.1f} ms" for row in measured)
    say(f"computing in {best}" + (f" (a step measured at {rows})" if measured else ""))
    return best, chosen_loss


def _compiled(
    trial: _Trial,
    best: Choice,
    eager: float,
    runtime: Runtime,
    say: Callable[[str], None],
    measured: list[dict[str, Any]],
) -> tuple[Choice, Loss]:
    """Compile and keep it where it is faster, or where the user asked for it."""
    say(
        "compiling, which takes a while"
        + (f"; eager takes {1000 * eager:.1f} ms a step" if eager else "")
    )
    candidate = replace(best, compiled=True)
    eager_loss = best.apply(trial.model, trial.loss_of)
    loss = candidate.apply(trial.model, trial.loss_of)
    if runtime.compile == "on":
        return candidate, loss
    try:
        _, value = trial.time(candidate, loss)  # this one compiles
    except Exception as error:  # noqa: BLE001  # the compiler raises many kinds; eager still works
        say(f"compiling failed, going on eager: {str(error).splitlines()[0][:200]}")
        torch._dynamo.reset()
        return best, eager_loss
    pairs = [
        (trial.time(best, eager_loss)[0], trial.time(candidate, loss)[0]) for _ in range(ROUNDS)
    ]
    eager, seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
    measured.append({"choice": str(candidate), "seconds": seconds, "loss": value})
    if seconds < GAIN * eager and abs(value - trial.reference) <= PARITY * abs(trial.reference):
        return candidate, loss
    return best, eager_loss


class _Trial:
    """Takes a few real steps from the same start, time after time, and puts everything back."""

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[nn.Module, TrainConfig], torch.optim.Optimizer],
        loss_of: Loss,
        batch: tuple[Tensor, Tensor],
        config: TrainConfig,
    ) -> None:
        self.model = model
        self.make_optimizer = make_optimizer
        self.loss_of = loss_of
        self.batch = batch
        self.config = config
        self.reference = float("nan")  # loss of the first candidate, in float32 unless set

    def fastest(
        self, candidates: list[Choice], measured: list[dict[str, Any]]
    ) -> tuple[Choice, float]:
        """Return the fastest candidate and its seconds a step, timed in turn over the rounds."""
        times: list[list[float]] = [[] for _ in candidates]
        values = [0.0] * len(candidates)
        for _ in range(ROUNDS):
            for i, candidate in enumerate(candidates):
                seconds, values[i] = self.time(candidate, candidate.apply(self.model, self.loss_of))
                times[i].append(seconds)
        medians = [statistics.median(t) for t in times]
        if self.reference != self.reference:
            self.reference = values[0]
        best = 0
        for i, (seconds, value) in enumerate(zip(medians, values, strict=True)):
            row = {"choice": str(candidates[i]), "seconds": seconds, "loss": value}
            if not any(row["choice"] == known["choice"] for known in measured):
                measured.append(row)
            close = abs(value - self.reference) <= PARITY * abs(self.reference)
            if close and seconds < GAIN * medians[best]:
                best = i
        return candidates[best], medians[best]

    def time(self, choice: Choice, loss_of: Loss) -> tuple[float, float]:
        """Return median seconds a step and the loss of the last step, and restore the model."""
        device = self.batch[0].device
        kept = [*self.model.parameters(), *self.model.buffers()]  # non-persistent ones too
        before = [tensor.detach().clone() for tensor in kept]
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            optimizer = self.make_optimizer(self.model, self.config)
            times = []
            value = torch.zeros(())
            for _ in range(WARM + TIMED):
                began = time.perf_counter()
                with choice.autocast(device):
                    value = loss_of(*self.batch)
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if cuda:
                    torch.cuda.synchronize(device)
                times.append(time.perf_counter() - began)
        with torch.no_grad():
            for tensor, value_before in zip(kept, before, strict=True):
                tensor.copy_(value_before)
        return statistics.median(times[WARM:]), value.item()


def choice_from(facts: dict[str, Any]) -> Choice:
    """Return the choice that a run's `config.json` recorded."""
    return Choice(**{k: facts[k] for k in asdict(Choice()) if k in facts})
