"""Attention forward and backward: `sdpa` against `matmul` in `addnorm.models.layers.Attention`.

    python benchmarks/attention.py

The whole branch is timed, projections included, because that is what a step pays. `fp32` and
`bf16` (autocast), eager and, for the small shapes, compiled; ratios above 1 say matmul is faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    ROUNDS,
    Neighbours,
    describe,
    interleave,
    interval,
    machine,
    measure_roofline,
    repeats_for,
    speedup,
    table,
    timed,
    write,
)
from torch import Tensor

from addnorm.branches import Context
from addnorm.models.layers import ATTENTION_PATHS, Attention, AttentionPath
from addnorm.training.loop import pick_device

SHAPES = [  # (B, H, T, E): batch, heads, positions, width of a head
    (12, 4, 64, 32),
    (32, 4, 64, 32),
    (16, 4, 128, 32),
    (8, 6, 256, 64),
    (4, 12, 512, 64),
    (2, 12, 1024, 64),
]


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    shape: tuple[int, int, int, int]
    precision: str
    compiled: bool
    threads: int


def step_of(case: Case, path: AttentionPath, device: torch.device) -> Callable[[], None]:
    """Return one forward and backward of the branch."""
    B, H, T, E = case.shape
    torch.manual_seed(0)
    branch = Attention(H * E, H, path=path).to(device)
    x = torch.randn(B, T, H * E, device=device, requires_grad=True)
    context = Context()

    def loss_of(x: Tensor) -> Tensor:
        return branch(x, context).float().square().sum()

    function = torch.compile(loss_of, dynamic=False) if case.compiled else loss_of

    def step() -> None:
        on = case.precision == "bf16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on):
            loss = function(x)
        loss.backward()  # type: ignore[no-untyped-call]
        x.grad = None
        branch.zero_grad(set_to_none=True)

    return step


def measure(
    case: Case, device: torch.device, rounds: int, seconds: float, neighbours: Neighbours
) -> dict[str, Any]:
    if device.type == "cpu":
        torch.set_num_threads(case.threads)
    torch._dynamo.reset()
    contenders: dict[str, Callable[[], float]] = {}
    for path in ATTENTION_PATHS:
        step = step_of(case, path, device)
        contenders[path] = timed(step, device, repeats_for(step, device, seconds))
    times = interleave(contenders, rounds, neighbours=neighbours)
    return {
        **asdict(case),
        **{path: asdict(interval(times[path])) for path in times},
        "gain": asdict(speedup(times["sdpa"], times["matmul"])),
    }


def verdict(gain: dict[str, float]) -> str:
    if gain["low"] > 1.02:
        return "matmul"
    return "sdpa" if gain["high"] < 0.98 else "even"


def main() -> int:
    options = arguments()
    device = pick_device(options.device)
    facts = machine(device)
    print(describe(facts))
    neighbours = Neighbours()
    roofline = measure_roofline(device, neighbours=neighbours)
    print(roofline, flush=True)
    threads = options.threads if device.type == "cpu" else [0]
    cases = [
        Case(shape, precision, compiled, number)
        for shape in SHAPES
        for number in threads
        for precision in ("fp32", "bf16")
        for compiled in (False, True)
        if not compiled or (shape in SHAPES[: options.compile] and number == max(threads))
    ]
    results, rows = [], []
    header = ["B, H, T, E", "threads", "precision", "mode", "sdpa ms", "matmul ms"]
    header += ["sdpa / matmul", "faster"]
    for case in cases:
        result = measure(case, device, options.rounds, options.seconds, neighbours)
        results.append(result)
        gain = result["gain"]
        rows.append(
            [
                ", ".join(map(str, case.shape)),
                case.threads,
                case.precision,
                "compiled" if case.compiled else "eager",
                *(f"{1000 * result[path]['median']:.2f}" for path in ATTENTION_PATHS),
                f"{gain['median']:.2f} [{gain['low']:.2f}, {gain['high']:.2f}]",
                verdict(gain),
            ]
        )
        print("  " + "  ".join(map(str, rows[-1])), flush=True)
    print("\n" + table(header, rows))
    print(f"\n{neighbours}")
    write(options.json, {"machine": facts, "roofline": asdict(roofline), "cases": results})
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=0.1, help="of one contender in a round")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--compile", type=int, default=3, help="so many small shapes are compiled")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
