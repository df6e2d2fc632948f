"""The 2-D loss landscape: few points and a polynomial against the dense grid, and the peer package.

    python benchmarks/landscape.py

Every network is trained for some steps on the digits. Each gets the dense 51 x 51 picture (2601
passes) and, by the same filter-normalised directions, the picture from at most an eighth and a
twelfth of the passes. Its error is the difference from the dense one over all its points as a share
of the range, beside what it said itself from its held-out points.

The package `loss-landscapes` (`pip install '.[bench]'`) computes as many points as it can in the
time that ours took; its picture is interpolated bilinearly to 51 x 51 and held against its own
dense one, since its directions are others. It shifts every second row of its grid by one step
(3.0.6, `random_plane`: `add_` before each point one way, `sub_` the other), and a coarse grid by
more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    ROUNDS,
    Interval,
    Neighbours,
    describe,
    interleave,
    machine,
    measure_roofline,
    speedup,
    table,
    timed,
    write,
)
from sklearn.datasets import load_digits
from torch import Tensor, nn

from addnorm import MLP, MLPConfig, ResNet, ResNetConfig
from addnorm.probe.landscape import filter_normalised, landscape
from addnorm.probe.surface import Landscape, Moved
from addnorm.training.loop import pick_device

POINTS = 51
LIMITS = {"1/8": POINTS**2 // 8, "1/12": POINTS**2 // 12}


def networks() -> dict[str, Callable[[], nn.Module]]:
    """Return what is looked at: shallow and deep, plain and residual, with and without norms."""

    def mlp(depth: int, wiring: str) -> Callable[[], nn.Module]:
        return lambda: MLP(MLPConfig(depth=depth, wiring=wiring))

    def plain(depth: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Linear(64, 64), nn.ReLU()]
        for _ in range(depth):
            layers += [nn.Linear(64, 64), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(64, 10))

    return {
        "ReLU MLP 4": lambda: plain(4),
        "ReLU MLP 12": lambda: plain(12),
        "MLP 12 prenorm": mlp(12, "prenorm"),
        "MLP 24 postnorm": mlp(24, "postnorm"),
        "ResNet 8": lambda: nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), ResNet(ResNetConfig(depth=8, width=8, channels=1))
        ),
    }


def trained(make: Callable[[], nn.Module], x: Tensor, y: Tensor, steps: int) -> nn.Module:
    """Return a network after some steps of Adam on the digits."""
    torch.manual_seed(0)
    model = make().to(x.device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


def exact(model: nn.Module, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Return the dense picture, by the same directions."""
    generator = torch.Generator().manual_seed(0)
    directions = [filter_normalised(model, generator) for _ in range(2)]
    axis = torch.linspace(-radius, radius, POINTS).tolist()
    with Moved(model, (x, y, None), directions, None) as at:
        return torch.tensor([[at.at([a, b]) for a in axis] for b in axis])


def theirs(model: nn.Module, x: Tensor, y: Tensor, radius: float, steps: int) -> np.ndarray:
    """Return the picture of the package, `steps` x `steps`."""
    import loss_landscapes
    import loss_landscapes.metrics

    metric = loss_landscapes.metrics.Loss(F.cross_entropy, x, y)
    torch.manual_seed(0)
    # Its `distance` divides: the plane reaches 1 / (2 distance) of the weights' norm each way.
    found: np.ndarray = loss_landscapes.random_plane(
        model, metric, 1 / (2 * radius), steps, normalization="filter", deepcopy_model=True
    )
    return found


def bilinear(grid: np.ndarray) -> Tensor:
    """Return a grid of cells interpolated to 51 x 51."""
    cells = torch.tensor(grid)[None, None].float()
    return F.interpolate(cells, (POINTS, POINTS), mode="bilinear", align_corners=False)[0, 0]


def difference(guess: Tensor, truth: Tensor) -> tuple[float, float]:
    """Return the largest and the root-mean-square difference / range."""
    share = (guess - truth).abs() / (truth.max() - truth.min())
    return share.max().item(), share.square().mean().sqrt().item()


def has_peer() -> bool:
    try:
        import loss_landscapes  # noqa: F401
    except ImportError:
        return False
    return True


def measure(
    name: str, options: argparse.Namespace, device: torch.device, neighbours: Neighbours
) -> dict[str, Any]:
    """Return errors and times of one network."""
    digits = load_digits()
    x = torch.tensor(digits.data / 16).float().to(device)
    y = torch.tensor(digits.target).to(device)
    model = trained(networks()[name], x, y, options.steps)
    x, y = x[: options.batch], y[: options.batch]
    truth = exact(model, x, y, options.radius)

    def ours(limit: int) -> Landscape:
        return landscape(
            model, x, y, points=POINTS, radius=options.radius, evaluations=limit, budget=1e9
        )

    result: dict[str, Any] = {"network": name, "range": (truth.max() - truth.min()).item()}
    for label, limit in LIMITS.items():
        made = ours(limit)
        largest, rms = difference(torch.tensor(made.losses), truth)
        result[label] = {
            "evaluations": made.evaluations,
            "nodes": made.nodes,
            "error": largest,
            "error_rms": rms,
            "said": made.error,
            "said_rms": made.error_rms,
            "converged": made.converged,
        }
    contenders = {
        "dense": timed(lambda: exact(model, x, y, options.radius), device),
        "ours": timed(lambda: ours(LIMITS["1/8"]), device),
    }
    peer = has_peer()
    if peer:
        steps = 12
        contenders["peer"] = timed(lambda: theirs(model, x, y, options.radius, steps), device)
    seconds = interleave(contenders, options.rounds, neighbours=neighbours)
    result["seconds"] = seconds
    result["gain"] = vars(speedup(seconds["dense"], seconds["ours"]))
    if peer:
        a_pass = float(np.median(seconds["peer"])) / steps**2
        side = max(2, int((float(np.median(seconds["ours"])) / a_pass) ** 0.5))
        dense = bilinear(theirs(model, x, y, options.radius, POINTS))
        found = difference(bilinear(theirs(model, x, y, options.radius, side)), dense)
        result["peer"] = {"side": side, "error": found[0], "error_rms": found[1]}
    return result


def row(result: dict[str, Any]) -> list[str]:
    cells = [result["network"], f"{result['range']:.3g}"]
    for label in LIMITS:
        found = result[label]
        cells.append(f"{found['nodes']}^2, {found['evaluations']}")
        cells.append(f"{found['error']:.2%} ({found['said']:.2%})")
        cells.append(f"{found['error_rms']:.2%} ({found['said_rms']:.2%})")
    cells.append(str(Interval(**result["gain"])))
    peer = result.get("peer")
    cells.append(
        f"{peer['side']}^2: {peer['error']:.1%}, {peer['error_rms']:.2%}" if peer else "absent"
    )
    return cells


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    neighbours = Neighbours(options.patience)
    facts = machine(device)
    print(describe(facts))
    print(measure_roofline(device, neighbours=neighbours))
    if not has_peer():
        print("loss-landscapes is not installed: pip install -c constraints.txt '.[bench]'")
    header = ["network", "range"]
    for label in LIMITS:
        header += [f"{label}: nodes, passes", "largest error (said)", "rms (said)"]
    header += ["dense / ours, seconds", "loss-landscapes in our time: largest, rms"]
    print(table(header, []), flush=True)
    results = []
    for name in options.only or networks():
        results.append(measure(name, options, device, neighbours))
        print("| " + " | ".join(row(results[-1])) + " |", flush=True)
    print(f"\n{neighbours}")
    write(options.json, {"machine": facts, "networks": results})
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(networks()), default=None)
    parser.add_argument("--steps", type=int, default=150, help="of training")
    parser.add_argument("--batch", type=int, default=256, help="digits in the common batch")
    parser.add_argument("--radius", type=float, default=1.0)
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds to wait for quiet")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.quick else ROUNDS)
    return options


if __name__ == "__main__":
    sys.exit(main())
