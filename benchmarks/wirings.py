"""Step time of every wiring relative to pre-norm, what it keeps for the way back, and its peers.

    python benchmarks/wirings.py                                  # all, eager
    python benchmarks/wirings.py --compile --only deepnorm,hyper,mhc,attnres-block
    python benchmarks/wirings.py --peers                          # needs pip install '.[bench]'

Forward and backward of a GPT (width 384, 6 layers, 256 positions) on the same batch, each wiring in
turn with pre-norm: the median of the ratios within the rounds. `kept` is what a forward pass keeps
for the backward one, parameters left out; on a GPU `peak` is its most allocated memory. `FLOPs` is
the ratio of the matrix products. The peers are timed against pre-norm in the same network, ours for
the package hyper-connections, which wraps our branches, and their own for x-transformers.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from addnorm import GPT, GPTConfig
from addnorm.branches import Context
from addnorm.contract import Wiring, catalogue, split_specs
from addnorm.training.loop import pick_device
from addnorm.training.objective import cross_entropy

VOCABULARY, HEADS = 65, 6
TURN = 0.5  # seconds, so that the 10 ms ticks by which neighbours are known weigh little


@dataclass(frozen=True)
class Shape:
    """The network and the batch of all rows."""

    depth: int
    dim: int
    context: int
    batch: int
    precision: str
    compiled: bool


def batch_of(shape: Shape, device: torch.device) -> Tensor:
    """Return tokens `(B, T)`, the same for all."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.context)
    return torch.randint(VOCABULARY, size, generator=generator).to(device)


def ours(spec: str, shape: Shape) -> nn.Module:
    """Return our GPT under one wiring."""
    torch.manual_seed(0)
    return GPT(
        GPTConfig(
            depth=shape.depth,
            dim=shape.dim,
            heads=HEADS,
            context=shape.context,
            wiring=spec,
            vocab_size=VOCABULARY,
        )
    )


def hyper_connections(shape: Shape, kind: str) -> nn.Module:
    """Return our GPT whose branches are wired by the package hyper-connections, four streams."""
    import hyper_connections as package

    prefix = "mc_" if kind == "mhc" else ""
    make = getattr(package, f"{prefix}get_init_and_expand_reduce_stream_functions")
    init, expand, reduce = make(4)

    class PreNormBranch(nn.Module):
        def __init__(self, connection: Wiring) -> None:
            super().__init__()
            self.norm, self.branch = connection.norm_in, connection.branch

        def forward(self, x: Tensor) -> Tensor:
            return self.branch(self.norm(x), Context())

    class Wired(nn.Module):
        final_norm = True

        def __init__(self, stack: Any) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                init(dim=shape.dim, branch=PreNormBranch(connection)) for connection in stack
            )

        def forward(self, x: Tensor, context: object = None) -> Tensor:
            x = expand(x)
            for layer in self.layers:
                x = layer(x)
            return reduce(x)

    model = ours("prenorm", shape)
    model.stack = Wired(model.stack)
    return model


def x_transformers(shape: Shape, **options: Any) -> nn.Module:
    """Return a decoder of x-transformers of the same size."""
    from x_transformers import Decoder, TransformerWrapper

    torch.manual_seed(0)
    decoder = Decoder(
        dim=shape.dim,
        depth=shape.depth,
        heads=HEADS,
        attn_dim_head=shape.dim // HEADS,
        attn_flash=True,
        **options,
    )
    return TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=shape.context, attn_layers=decoder)


X_TRANSFORMERS: dict[str, dict[str, Any]] = {  # ours: their options
    "postnorm": {"pre_norm": False},
    "sandwich": {"sandwich_norm": True},
    "gtrxl": {"gate_residual": True},
    "layerscale": {"use_layerscale": True},
}


def step_of(model: nn.Module, tokens: Tensor, shape: Shape) -> Callable[[], None]:
    """Return one forward and backward pass."""

    def loss_of(tokens: Tensor) -> Tensor:
        return cross_entropy(model(tokens), tokens)

    function = torch.compile(loss_of, dynamic=False) if shape.compiled else loss_of
    on = shape.precision == "bfloat16"

    def step() -> None:
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=on):
            loss = function(tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    return step


def kept(model: nn.Module, tokens: Tensor) -> float:
    """Return the MB that an eager forward pass keeps for the backward one."""
    own, sizes = {p.data_ptr() for p in model.parameters()}, {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = cross_entropy(model(tokens), tokens)
    del loss
    return sum(sizes.values()) / 1e6


def peak(step: Callable[[], None], device: torch.device) -> float:
    """Return the most MB that one step allocates on a GPU; NaN on a CPU."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) / 1e6


def flops(model: nn.Module, tokens: Tensor) -> int:
    """Return the FLOPs of the matrix products of a forward pass; a backward one takes twice that.

    Forward alone, because the counter's hooks break a backward pass that computes gradients of its
    own, as `reversible` does; what it computes again is not in this figure.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        cross_entropy(model(tokens), tokens)
    return counter.get_total_flops()


def measure(
    makers: dict[str, Callable[[], nn.Module]],
    shape: Shape,
    device: torch.device,
    rounds: int,
    neighbours: Neighbours,
) -> dict[str, dict[str, Any]]:
    """Time models in turn; the first is what the others are measured against."""
    tokens = batch_of(shape, device)
    result: dict[str, dict[str, Any]] = {}
    contenders = {}
    for name, make in makers.items():
        model = make().to(device).train()
        began = time.perf_counter()
        step = step_of(model, tokens, shape)
        step()  # compiles
        result[name] = {
            "first_seconds": time.perf_counter() - began,
            "kept_mb": kept(model, tokens),
            "peak_mb": peak(step, device),
            "flops": flops(model, tokens),
        }
        contenders[name] = timed(step, device, repeats_for(step, device, TURN))
    seconds = interleave(contenders, rounds, neighbours=neighbours)
    base = next(iter(makers))
    for name in makers:
        result[name]["seconds"] = interval(seconds[name])
        result[name]["ratio"] = speedup(seconds[name], seconds[base])
        result[name]["flops_ratio"] = result[name]["flops"] / result[base]["flops"]
    torch._dynamo.reset()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="wirings, separated by commas; all by default")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--peers", action="store_true", help="the packages beside ours")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--patience", type=float, default=Neighbours.PATIENCE, help="seconds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    shape = Shape(args.depth, args.dim, args.context, args.batch, args.precision, args.compile)
    specs = split_specs(args.only) or [name for name in catalogue() if name != "prenorm"]
    neighbours = Neighbours(args.patience)
    facts = machine(device)
    print(describe(facts))
    print(measure_roofline(device, neighbours=neighbours))
    print(f"{shape}\n", flush=True)
    header = ["wiring", "step / pre-norm", "FLOPs", "kept MB", "peak MB", "first step s"]
    print(table(header, []), flush=True)
    rows: dict[str, Any] = {}

    def group(makers: dict[str, Callable[[], nn.Module]]) -> None:
        found = measure(makers, shape, device, args.rounds, neighbours)
        for name, row in list(found.items())[1:]:
            rows[name] = row | {k: vars(row[k]) for k in ("seconds", "ratio")}
            cells = [name, row["ratio"], f"{row['flops_ratio']:.3f}", f"{row['kept_mb']:.0f}"]
            cells += [f"{row['peak_mb']:.0f}", f"{row['first_seconds']:.1f}"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)

    base = {"prenorm": functools.partial(ours, "prenorm", shape)}
    for spec in specs:
        group(base | {spec: functools.partial(ours, spec, shape)})
    if args.peers:
        for name in ("hyper", "mhc"):
            peer = functools.partial(hyper_connections, shape, name)
            group(base | {name: functools.partial(ours, name, shape), f"package {name}": peer})
        theirs = {"x-transformers prenorm": functools.partial(x_transformers, shape)}
        for name, options in X_TRANSFORMERS.items():
            peer = functools.partial(x_transformers, shape, **options)
            group(theirs | {f"x-transformers {name}": peer})
            group(base | {name: functools.partial(ours, name, shape)})
    print(f"\n{neighbours}")
    write(args.json, {"machine": facts, "shape": vars(shape), "rows": rows})


if __name__ == "__main__":
    main()
