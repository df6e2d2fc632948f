"""What `watch` costs a training step: off, attached, every step, every hundredth.

    python benchmarks/watch.py                        # 4 layers, 4 heads, width 128, T=64, B=12
    python benchmarks/watch.py --config medium --steps 1 --threads 1
    python benchmarks/watch.py --compile

A step is forward, backward, clipping and AdamW, as in our trainer. Every contender has a model of
its own from one seed and takes a turn of `--steps` steps; the ratios are those within a round to
the model that was never watched. Where others use
the cores, `--clock cpu --threads 1 --patience 0` counts the CPU seconds of this process instead. A
sample of every hundredth step also reads the parameters and is fetched at once, which is the
contender `sampled`; a step of `every=100` costs (99 attached + sampled) / 100 within the rounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    ROUNDS,
    Interval,
    Neighbours,
    describe,
    interleave,
    interval,
    machine,
    synchronize,
    table,
    write,
)
from torch import nn

from addnorm import GPT, GPTConfig, TrainConfig
from addnorm.probe.watch import Watch, watch
from addnorm.training.loop import make_optimizer, pick_device
from addnorm.training.objective import cross_entropy

VOCABULARY = 65
NEVER = 10**9


@dataclass(frozen=True)
class Shape:
    """The size of the network and of its batch."""

    depth: int
    heads: int
    dim: int
    context: int
    batch: int


SHAPES = {"small": Shape(4, 4, 128, 64, 12), "medium": Shape(6, 6, 384, 256, 8)}
CONTENDERS: dict[str, dict[str, int] | None] = {
    "unwatched": None,
    "closed": {"every": 1},  # watched once, and closed
    "attached": {"every": NEVER},  # hooks that do not measure
    "every step": {"every": 1},
    "sampled": {"every": 1, "flush": 1},  # what the hundredth step of every=100 does
}
GOALS = {"closed": 0.0, "every step": 3.0, "every=100": 0.5}  # percent


def unread(_row: dict[str, float], _step: int) -> None:
    """A logger that costs nothing."""


def stepper(name: str, shape: Shape, options: argparse.Namespace) -> Callable[[], None]:
    """Return what takes the steps of one turn."""
    device = pick_device(options.device)
    torch.manual_seed(0)
    config = GPTConfig(shape.depth, shape.dim, shape.heads, shape.context, vocab_size=VOCABULARY)
    model = GPT(config).to(device)
    optimizer = make_optimizer(model, TrainConfig())
    tokens = torch.randint(VOCABULARY, (shape.batch, shape.context), device=device)
    settings = CONTENDERS[name]
    watched: Watch | None = None
    if settings is not None:
        watched = watch(model, log=unread, **settings)
    if name == "closed" and watched is not None:
        watched.close()
        watched = None
    parameters = list(model.parameters())

    def loss_of() -> torch.Tensor:
        return cross_entropy(model(tokens), tokens)

    loss = torch.compile(loss_of) if options.compile else loss_of

    def turn() -> None:
        for _ in range(options.steps):
            value = loss()
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            if watched is not None:
                watched.before_update(optimizer)
            optimizer.step()
            if watched is not None:
                watched.after_update(value)
            optimizer.zero_grad(set_to_none=True)

    if watched is not None and name == "attached":
        watched.begin(1)  # so that not even the first step is a sample
    return turn


def timed_by(
    clock: Callable[[], float], turn: Callable[[], None], device: torch.device
) -> Callable[[], float]:
    """Return a contender for `interleave`: the seconds of one turn by that clock."""

    def contender() -> float:
        synchronize(device)
        began = clock()
        turn()
        synchronize(device)
        return clock() - began

    return contender


def percent(ratios: list[float]) -> Interval:
    """Return the cost in percent: the median over the rounds and its interval."""
    return interval([100 * (ratio - 1) for ratio in ratios])


def main() -> int:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    shape, device = SHAPES[options.config], pick_device(options.device)
    facts = machine(device)
    print(describe(facts))
    neighbours = Neighbours(options.patience)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    turns = {name: timed_by(clock, stepper(name, shape, options), device) for name in CONTENDERS}
    seconds = interleave(turns, options.rounds, warm=2, neighbours=neighbours)
    print(f"{shape}, {options.rounds} rounds of {options.steps} steps each; {neighbours}")
    base = seconds["unwatched"]
    seconds["every=100"] = [
        (99 * a + s) / 100 for a, s in zip(seconds["attached"], seconds["sampled"], strict=True)
    ]
    costs = {
        name: percent([s / b for s, b in zip(taken, base, strict=True)])
        for name, taken in seconds.items()
    }
    rows = []
    for name, taken in seconds.items():
        milliseconds = 1000 * interval(taken).median / options.steps
        goal = f"{GOALS[name]:g} %" if name in GOALS else ""
        rows.append([name, f"{milliseconds:.2f}", f"{costs[name]} %", goal])
    print(table(["watch", "ms a step", "cost [95 %]", "goal"], rows))
    result: dict[str, Any] = {
        "machine": facts,
        "shape": asdict(shape),
        "compiled": options.compile,
        "steps": options.steps,
        "clock": options.clock,
        "neighbours": str(neighbours),
        "seconds": seconds,
        "percent": {name: asdict(cost) for name, cost in costs.items()},
    }
    write(options.json, result)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=SHAPES, default="small")
    parser.add_argument("--rounds", type=int, default=5 * ROUNDS)
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn; the flush takes 10")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=0, help="0: what torch chose")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to wait for quiet")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
