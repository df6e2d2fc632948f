"""What the X-ray costs: the full report, its memory, lesions and the path spectrum, with peers.

    python benchmarks/xray.py                                       # all; --quick for a first look
    python benchmarks/xray.py --only report memory --network gpt
    python benchmarks/xray.py --threads 1 --clock cpu --patience 0  # where others use the cores

Everything is a ratio within a round: the report to one forward and backward pass, lesions to the
loop over whole forward passes, the spectrum to (n + 1) / 2 backward passes. Beside the report stand
two ways to see what a network does without it: torchlens 2 (`pip install '.[bench]'`), which keeps
all outputs of one forward pass, and the hooks that people write themselves, the RMS of what every
module returns and of its gradient. Memory is the peak of a process of its own above what model and
batch take. The loss landscape has a benchmark of its own, landscape.py.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    ROUNDS,
    Interval,
    Neighbours,
    describe,
    interleave,
    interval,
    machine,
    measure_roofline,
    speedup,
    synchronize,
    table,
    timed,
    write,
)
from torch import Tensor, nn

from addnorm import GPT, GPTConfig, ResNet, ResNetConfig, xray
from addnorm.probe.discover import discover
from addnorm.probe.lesion import lesions
from addnorm.probe.paths import spectrum
from addnorm.training.loop import pick_device

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PARTS = ("report", "memory", "lesions", "paths")
MEMORY = ("forward + backward", "xray", "torchlens")


def networks() -> dict[str, Callable[[int], tuple[nn.Module, Tensor, Tensor]]]:
    """Return what is looked at: the network and a batch of so many, with targets."""

    def gpt(batch: int) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(0)
        model = GPT(GPTConfig(depth=6, heads=6, dim=384, context=256, vocab_size=65))
        return model, torch.randint(65, (batch, 256)), torch.randint(65, (batch, 256))

    def resnet(batch: int) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(0)
        model = ResNet(ResNetConfig(depth=56))
        return model, torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))

    return {"gpt": gpt, "resnet56": resnet}


BATCH = {"gpt": 8, "resnet56": 64}  # of a training step; the deeper looks take an eighth


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """One plain forward and backward pass."""
    model.zero_grad()
    loss_of(model, x, y).backward()  # type: ignore[no-untyped-call]


# -- the report and what stands beside it ----------------------------------------------------------


def hooked(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, list[float]]:
    """Return the RMS of every module's output and of its gradient, as one writes it by hand."""
    found: dict[str, list[float]] = {}
    handles = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_module: nn.Module, _args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                rms = found.setdefault(name, [])
                rms.append(out.detach().float().square().mean().sqrt().item())
                out.register_hook(lambda g: rms.append(g.float().square().mean().sqrt().item()))

        return note

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(hook(name)))
    step(model, x, y)
    for handle in handles:
        handle.remove()
    return found


def has_torchlens() -> bool:
    try:
        import torchlens  # noqa: F401
    except ImportError:
        return False
    return True


def lensed(model: nn.Module, x: Tensor) -> None:
    """Log a forward pass by torchlens with what it does by default."""
    import torchlens

    torchlens.trace(model, x)


def report(
    name: str, options: argparse.Namespace, device: torch.device, neighbours: Neighbours
) -> dict[str, Any]:
    """Time the full report against one forward and backward pass (C5)."""
    model, x, y = (v.to(device) for v in networks()[name](BATCH[name]))
    calls: dict[str, Callable[[], object]] = {
        "forward + backward": lambda: step(model, x, y),
        "xray": lambda: xray(model, x, y),
        "hooks": lambda: hooked(model, x, y),
    }
    if has_torchlens():
        calls["torchlens"] = lambda: lensed(model, x)
    clock = CLOCKS[options.clock]
    contenders = {k: timed(call, device, clock=clock) for k, call in calls.items()}
    seconds = interleave(contenders, options.rounds, neighbours=neighbours)
    plain = seconds["forward + backward"]
    ratios = {k: vars(speedup(s, plain)) for k, s in seconds.items() if k != "forward + backward"}
    print(f"\n{name}, batch {BATCH[name]}: a report / one forward + backward (goal 3, stretch 2)")
    rows = [[k, str(Interval(**r))] for k, r in ratios.items()]
    print(table(["what", "forward + backward passes"], rows), flush=True)
    return {"seconds": seconds, "ratios": ratios}


def peak_of(name: str, what: str) -> None:
    """Print the peak of memory above the start, in MB; runs in a process of its own."""
    model, x, y = networks()[name](BATCH[name])
    small = [t[:1] for t in (x, y)]
    model.eval()  # a first pass of one entry through all the code
    for _ in range(2):
        if what == "xray":
            xray(model, *small)
        elif what == "torchlens":
            lensed(model, small[0])
        step(model, *small)
    before = _now_resident()
    if what == "xray":
        xray(model, x, y)
    elif what == "torchlens":
        lensed(model, x)
    else:
        step(model, x, y)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before)


def _now_resident() -> float:
    """Return the resident memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def memory(
    name: str, options: argparse.Namespace, _device: torch.device, _neighbours: Neighbours
) -> dict[str, Any]:
    """Measure peaks of memory in processes of their own; on Linux."""
    found: dict[str, list[float]] = {}
    for _ in range(1 if options.quick else 3):
        for what in MEMORY if has_torchlens() else MEMORY[:2]:
            command = [sys.executable, __file__, "--peak", name, what]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.setdefault(what, []).append(float(done.stdout.split()[-1]))
    print(f"\n{name}, batch {BATCH[name]}: peak of memory above model and batch, MB")
    plain = found[MEMORY[0]]
    ratios = {k: vars(speedup(v, plain)) for k, v in found.items()}
    rows = [[k, str(interval(v)), str(Interval(**ratios[k]))] for k, v in found.items()]
    print(table(["what", "MB", "forward + backward = 1"], rows), flush=True)
    return {"megabytes": found, "ratios": ratios}


# -- lesions ---------------------------------------------------------------------------------------


@contextmanager
def zeroed(modules: list[nn.Module]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(lambda _m, _a, out: torch.zeros_like(out))
        for module in modules
    ]
    yield
    for handle in handles:
        handle.remove()


def looped(model: nn.Module, x: Tensor, y: Tensor, pairs: bool) -> dict[tuple[int, ...], float]:
    """Return the loss without one, or two, of the branches, by whole forward passes."""
    branches = [m.branch for m in model.modules() if hasattr(m, "branch") and hasattr(m, "site")]
    which: list[tuple[int, ...]] = [(), *((i,) for i in range(len(branches)))]
    which += combinations(range(len(branches)), 2) if pairs else ()
    losses = {}
    with torch.no_grad():
        for gone in which:
            with zeroed([branches[i] for i in gone]):
                losses[gone] = loss_of(model, x, y).item()
    return {gone: value - losses[()] for gone, value in losses.items()}


def lesion_gains(
    name: str, options: argparse.Namespace, device: torch.device, neighbours: Neighbours
) -> dict[str, Any]:
    """Time all single lesions, and all pairs, against the loop (C6)."""
    batch = options.lesion_batch or max(1, BATCH[name] // 8)
    model, x, y = (v.to(device) for v in networks()[name](batch))
    model.eval()
    structure = discover(model, x)
    n = len(structure)
    result: dict[str, Any] = {}
    rows = []
    for label, pairs, goal in (("singles", False, "1.8, 1.95"), ("pairs", True, "2.6, 2.9")):
        if options.quick and pairs:
            continue

        def ours(pairs: bool = pairs) -> Any:
            return lesions(
                model, x, y, structure=structure, pairs=pairs, estimate=False, budget=1e9
            )

        made, slow = ours(), looped(model, x, y, pairs)
        apart = max(abs(made.singles[i] - slow[(i,)]) for i in range(n))
        if pairs:
            apart = max(
                apart, *(abs(made.pairs[i][j] - slow[i, j]) for i, j in combinations(range(n), 2))
            )
        clock = CLOCKS[options.clock]
        contenders = {
            "loop": timed(lambda pairs=pairs: looped(model, x, y, pairs), device, clock=clock),
            "ours": timed(ours, device, clock=clock),
        }
        seconds = interleave(contenders, options.rounds, neighbours=neighbours)
        gain = speedup(seconds["loop"], seconds["ours"])
        result[label] = {"seconds": seconds, "gain": vars(gain), "apart": apart, "way": made.way}
        rows.append([label, goal, str(gain), f"{apart:.1e}", made.way])
    print(f"\n{name}, batch {batch}: lesions of {n} connections, the loop / ours")
    header = ["which", "goal, stretch", "gain", "largest difference", "way"]
    print(table(header, rows), flush=True)
    return result


# -- paths -----------------------------------------------------------------------------------------


def path_costs(
    name: str, options: argparse.Namespace, device: torch.device, neighbours: Neighbours
) -> dict[str, Any]:
    """Time the exact coherent spectrum against (n + 1) / 2 backward passes (C7)."""
    batch = max(1, BATCH[name] // 8)
    model, x, y = (v.to(device) for v in networks()[name](batch))
    model.eval()
    structure = discover(model, x)
    n, clock = len(structure), CLOCKS[options.clock]

    def ours() -> Any:
        return spectrum(model, x, y, structure=structure, incoherent="off")

    def backward() -> float:
        """Return the seconds of a backward pass alone, of some."""
        model.zero_grad()
        taken = 0.0
        for _ in range(5):
            value = loss_of(model, x, y)
            synchronize(device)
            began = clock()
            value.backward()  # type: ignore[no-untyped-call]
            synchronize(device)
            taken += clock() - began
        return taken / 5

    made = ours()
    contenders = {"backward": backward, "ours": timed(ours, device, clock=clock)}
    seconds = interleave(contenders, options.rounds, neighbours=neighbours)
    cost = interval(
        [
            one / (back * (n + 1) / 2)
            for one, back in zip(seconds["ours"], seconds["backward"], strict=True)
        ]
    )
    print(f"\n{name}, batch {batch}: spectrum of {n} connections / (n + 1) / 2 backward passes")
    row = ["1.25, 1.1", str(cost), f"{made.check:.1e}", made.products, f"{made.memory / 2**20:.1f}"]
    header = ["goal, stretch", "cost", "|sum - gradient| / |gradient|", "products", "vectors, MB"]
    print(table(header, [row]), flush=True)
    return {"seconds": seconds, "cost": vars(cost), "check": made.check, "products": made.products}


RUN = {"report": report, "memory": memory, "lesions": lesion_gains, "paths": path_costs}


def main() -> int:
    options = arguments()
    if options.peak:
        peak_of(*options.peak)
        return 0
    torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    neighbours = Neighbours(options.patience)
    facts = machine(device) | {"clock": options.clock}
    print(describe(facts))
    print(measure_roofline(device, neighbours=neighbours))
    if not has_torchlens():
        print("torchlens is not installed: pip install -c constraints.txt '.[bench]'")
    results: dict[str, Any] = {}
    for part in options.only or PARTS:
        for name in options.network or networks():
            results[f"{part} {name}"] = RUN[part](name, options, device, neighbours)
    print(f"\n{neighbours}")
    write(options.json, {"machine": facts, "results": results})
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=None)
    parser.add_argument("--network", nargs="+", choices=list(networks()), default=None)
    parser.add_argument("--lesion-batch", type=int, default=0, help="0: an eighth of the report's")
    parser.add_argument("--quick", action="store_true", help="3 rounds, no pairs")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds to wait for quiet")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--peak", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.quick else ROUNDS)
    return options


if __name__ == "__main__":
    sys.exit(main())
