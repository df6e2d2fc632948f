"""What all benchmarks share: the measured roofline, interleaved timing, intervals, tables.

Machines are shared and noisy, so nothing here compares numbers of two runs: callables are timed in
turn, A B C A B C ..., and what is reported is the median of the ratios within a round.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import addnorm

ROUNDS = 7  # fewer rounds make an interval that says nothing


@dataclass(frozen=True)
class Interval:
    """A median with its bootstrap 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


def interval(values: Sequence[float], *, resamples: int = 10_000) -> Interval:
    """Return the median of `values` and its bootstrap 95 % interval (percentiles, seed 0)."""
    array = np.asarray(values, dtype=float)
    draws = np.random.default_rng(0).integers(len(array), size=(resamples, len(array)))
    low, high = np.percentile(np.median(array[draws], axis=1), [2.5, 97.5])
    return Interval(float(np.median(array)), float(low), float(high))


def speedup(slow: Sequence[float], fast: Sequence[float]) -> Interval:
    """Return how many times faster `fast` is: the median over the rounds of slow / fast seconds."""
    return interval([s / f for s, f in zip(slow, fast, strict=True)])


class Neighbours:
    """What other programs took of the cores, from /proc: a busy core spoils a parallel turn.

    With two threads and one foreign process on two cores a step takes ten times as long, because
    threads wait for each other at every operation. Such turns say nothing and are taken again.
    """

    ALLOWED = 0.05  # foreign CPU seconds by second of wall time in a turn that counts
    PATIENCE = 600.0  # seconds that a benchmark waits for quiet, all in all

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = patience
        self.waited = 0.0
        self.repeated = 0
        self.spoiled = 0  # turns that were taken as they were, because patience had ended

    def foreign(self, function: Callable[[], float]) -> tuple[float, float]:
        """Return what `function` returns, and the foreign CPU seconds by second meanwhile."""
        began, before = time.perf_counter(), _cpu_seconds()
        value = function()
        taken, after = time.perf_counter() - began, _cpu_seconds()
        others = (after[0] - before[0]) - (after[1] - before[1])
        # The clock ticks are 10 ms on either side, so a short turn is known only that well.
        return value, max(0.0, others - 0.02) / max(taken, 1e-9)

    def wait(self) -> None:
        """Wait until others leave the cores alone for a quarter of a second."""
        while self.waited < self.patience:
            _, share = self.foreign(_quarter)
            if share <= self.ALLOWED:
                return
            self.waited += 0.25

    def undisturbed(self, contender: Callable[[], float]) -> float:
        """Return the seconds of a turn during which others left the cores alone."""
        while True:
            self.wait()
            began = time.perf_counter()
            seconds, share = self.foreign(contender)
            if share <= self.ALLOWED:
                return seconds
            self.waited += time.perf_counter() - began
            if self.waited >= self.patience:
                self.spoiled += 1
                return seconds
            self.repeated += 1

    def __str__(self) -> str:
        return (
            f"{self.repeated} turns taken again because others used the cores, {self.spoiled} "
            f"spoiled turns counted, {self.waited:.0f} s waited"
        )


def _quarter() -> float:
    time.sleep(0.25)
    return 0.25


def _cpu_seconds() -> tuple[float, float]:
    """Return CPU seconds used since boot: of all (steal too), and of this process group."""
    try:
        ticks = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
        own, group = 0, os.getpgrp()
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended
                fields = path.read_text().rsplit(")", 1)[1].split()
                if int(fields[2]) == group:
                    own += sum(map(int, fields[11:15]))  # with its ended children
    except OSError:  # not Linux
        return 0.0, 0.0
    per_second = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - ticks[3] - ticks[4]) / per_second, own / per_second


def interleave(
    contenders: Mapping[str, Callable[[], float]],
    rounds: int = ROUNDS,
    *,
    warm: int = 1,
    neighbours: Neighbours | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of each contender by round; each times itself, the first are left out."""
    neighbours = neighbours or Neighbours()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warm + rounds):
        for name, contender in contenders.items():
            if number < warm:
                contender()
            else:
                seconds[name].append(neighbours.undisturbed(contender))
    return seconds


def timed(
    function: Callable[[], object],
    device: torch.device,
    repeats: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Callable[[], float]:
    """Return a contender for `interleave`: the seconds of one call, averaged over `repeats`.

    `clock=time.process_time` counts the CPU seconds of this process, where others use the cores.
    """

    def contender() -> float:
        synchronize(device)
        began = clock()
        for _ in range(repeats):
            function()
        synchronize(device)
        return (clock() - began) / repeats

    return contender


def repeats_for(function: Callable[[], object], device: torch.device, seconds: float) -> int:
    """Return how often `function` must be called for a round of about so many seconds."""
    once = timed(function, device)
    once()
    return max(1, round(seconds / max(1e-7, min(once() for _ in range(3)))))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Roofline:
    """The best this machine did just now: FLOP/s of 2048^3 products, bytes/s of a 256 MB copy."""

    float32: float
    bfloat16: float
    copy: float  # bytes read plus bytes written

    def __str__(self) -> str:
        return (
            f"roofline: {self.float32 / 1e9:.0f} GFLOP/s float32, {self.bfloat16 / 1e9:.0f} "
            f"GFLOP/s bfloat16 (2048^3 products), {self.copy / 1e9:.1f} GB/s copy (256 MB)"
        )

    def flops(self, precision: str) -> float:
        return self.bfloat16 if precision == "bfloat16" else self.float32


def measure_roofline(
    device: torch.device, tries: int = 8, neighbours: Neighbours | None = None
) -> Roofline:
    """Measure the machine's limits; the best of some tries, for a limit is what noise lowers."""
    n = 2048

    neighbours = neighbours or Neighbours()

    def best(function: Callable[[], object]) -> float:
        call = timed(function, device)
        call()
        return min(neighbours.undisturbed(call) for _ in range(tries))

    def product(dtype: torch.dtype) -> float:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return 2 * n**3 / best(lambda: a @ b)

    source = torch.ones(256 * 10**6 // 4, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    copy = moved / best(lambda: target.copy_(source))
    return Roofline(product(torch.float32), product(torch.bfloat16), copy)


def machine(device: torch.device) -> dict[str, Any]:
    """Describe where and when the figures were taken."""
    facts = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 2),  # what others did in the last minute
        "python": platform.python_version(),
        "torch": torch.__version__,
        "addnorm": _revision(),
        "device": str(device),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _revision() -> str:
    """Return the commit of the measured code, with `-dirty` where it has been changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    folder = Path(addnorm.__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"not in git: {folder}"
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "?")


def describe(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items())


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write the result as JSON where a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"\nwritten: {path}")


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def tensors(batch: tuple[Any, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a numpy batch of inputs and targets as tensors."""
    inputs, targets = (torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in batch)
    return inputs, targets
