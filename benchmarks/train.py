"""Training speed: addnorm's trainer against the plain reference loop, with a loss-parity gate.

    python benchmarks/train.py                       # 4 layers, 4 heads, width 128, T=64, B=12
    python benchmarks/train.py --config medium --rounds 7 --steps 4 --skip-parity

Every contender is a process of its own that takes so many steps when it is told to, so that they
run in turn, nothing is measured while it compiles, and threads and compiler state are not shared.
addnorm is driven through its public `train`, with its observer as the only hook.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    ROUNDS,
    Neighbours,
    describe,
    interleave,
    interval,
    machine,
    measure_roofline,
    speedup,
    standard_error,
    table,
    tensors,
    write,
)
from reference import ReferenceGPT, sample_batch
from reference import train as train_reference
from torch import nn

from addnorm.data.corpora import Corpus, load_corpus
from addnorm.data.text import TextData
from addnorm.models.gpt import GPT, GPTConfig
from addnorm.runs import train
from addnorm.training.config import Runtime, TrainConfig
from addnorm.training.loop import Observer, pick_device
from addnorm.training.tune import Choice, choice_from

LONG = 1_000_000  # steps of a run that is never finished: long enough to be worth compiling
VOCABULARY = 65  # as many as the Shakespeare text has
PARITY_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Shape:
    """The size of a model and of its batch."""

    depth: int
    heads: int
    dim: int
    context: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.batch * self.context

    def gpt(self) -> GPT:
        return GPT(GPTConfig(self.depth, self.dim, self.heads, self.context, vocab_size=VOCABULARY))

    def reference(self) -> ReferenceGPT:
        return ReferenceGPT(VOCABULARY, self.depth, self.heads, self.dim, self.context)


SHAPES = {"small": Shape(4, 4, 128, 64, 12), "medium": Shape(6, 6, 384, 256, 8)}
CONTENDERS = {
    "reference": "plain loop, eager float32",
    "addnorm": "addnorm, as it chooses for a long run",
    "addnorm-float32": "addnorm, eager float32",
    "reference-compiled": "plain loop, compiled float32",
    "reference-bfloat16": "plain loop, eager bfloat16 autocast",
}


def text_of_65(context: int) -> TextData:
    """Return CPython's language reference with all but its 64 commonest characters as one."""
    text = load_corpus("pydoc").text
    kept = {character for character, _ in Counter(text).most_common(VOCABULARY - 1)}
    text = "".join(c if c in kept else "\x00" for c in text)
    data = TextData(Corpus.of("pydoc65", text), context)
    assert data.vocab_size == VOCABULARY, data.vocab_size
    return data


# -- one contender in its process --------------------------------------------------------------


class Stopped(Exception):  # noqa: N818  # an order, not an error
    pass


class Baton(Observer):
    """Lets `steps` steps pass at a time, then reports their seconds and waits for its turn."""

    def __init__(self, connection: Connection, steps: int) -> None:
        self.connection = connection
        self.steps = steps
        self.facts: Callable[[], dict[str, Any]] = dict
        self.heard: list[str] = []
        self.until = -1  # the first step heard is warm-up, compiling included
        self.began = 0.0

    def say(self, message: str) -> None:
        self.heard.append(message)

    def step(self, step: int, steps: int, loss: float, rate: float, left: float) -> None:
        if step < self.until:
            return
        if self.until < 0:
            self.connection.send(self.facts() | {"heard": self.heard})
        else:
            self.connection.send(time.perf_counter() - self.began)
        if self.connection.recv() == "stop":
            raise Stopped
        self.until, self.began = step + self.steps, time.perf_counter()


def contend(connection: Connection, name: str, options: argparse.Namespace) -> None:
    """Train as `name` says, at the parent's pace, until it says stop."""
    if options.threads:
        torch.set_num_threads(options.threads)
    shape, device = SHAPES[options.config], pick_device(options.device)
    baton = Baton(connection, options.steps)
    data = text_of_65(shape.context)
    torch.manual_seed(0)
    began = time.perf_counter()
    try:
        if name.startswith("reference"):
            _contend_reference(baton, name, shape, data, device)
        else:
            _contend_addnorm(baton, name, shape, data, options, began)
    except Stopped:
        connection.close()


def _contend_reference(
    baton: Baton, name: str, shape: Shape, data: TextData, device: torch.device
) -> None:
    model = shape.reference().to(device)
    config = TrainConfig(steps=LONG)
    text = torch.from_numpy(data.tokens.astype("int64"))
    baton.facts = lambda: {
        "parameters": sum(p.numel() for p in model.parameters()),
        "precision": "bfloat16" if name == "reference-bfloat16" else "float32",
        "choice": CONTENDERS[name],
    }
    train_reference(
        model,
        lambda _step: sample_batch(text, shape.batch, shape.context, device),
        LONG,
        lambda step: config.lr * config.rate(step),
        lambda step, loss: baton.step(step, LONG, loss, 0.0, 0.0),
        bfloat16=name == "reference-bfloat16",
        compiled=name == "reference-compiled",
    )


def _contend_addnorm(
    baton: Baton,
    name: str,
    shape: Shape,
    data: TextData,
    options: argparse.Namespace,
    began: float,
) -> None:
    model = shape.gpt()
    config = TrainConfig(steps=LONG, batch=shape.batch, eval_every=LONG, eval_batches=1)
    runtime = Runtime(device=options.device, threads=options.threads)
    eager = Choice(threads=torch.get_num_threads(), variants={"attention": "sdpa"})
    with tempfile.TemporaryDirectory() as folder:

        def facts() -> dict[str, Any]:
            chosen = json.loads((Path(folder) / "run" / "config.json").read_text())["choice"]
            return {
                "parameters": sum(p.numel() for p in model.parameters()),
                "precision": chosen["precision"],
                "choice": str(choice_from(chosen)),
                "facts": chosen,
                "seconds_to_first_step": time.perf_counter() - began,
            }

        baton.facts = facts
        choice = eager if name == "addnorm-float32" else None
        train(
            model,
            data,
            config,
            runtime,
            out=Path(folder) / "run",
            observer=baton,
            choice=choice,
        )


def start_quietly(
    name: str, options: argparse.Namespace, neighbours: Neighbours
) -> tuple[Callable[[], float], dict[str, Any], Callable[[], None]]:
    """Start a contender, and again where others used the cores while it chose how to compute.

    What it chose does not matter here, only whether it could measure; every try is printed.
    """
    for number in range(1, options.tries + 1):
        neighbours.wait()
        began: list[tuple[Callable[[], float], dict[str, Any], Callable[[], None]]] = []

        def attempt(into: list[Any] = began) -> float:
            into.append(start(name, options))
            return 0.0

        _, share = neighbours.foreign(attempt)
        turn, facts, stop = began[0]
        facts["foreign_share_at_start"] = share
        for sentence in facts["heard"]:
            print(f"  {name}: {sentence}")
        print(f"  {name}, try {number}: {facts['choice']} (others: {100 * share:.0f} % of a core)")
        sys.stdout.flush()
        if share <= neighbours.ALLOWED or name != "addnorm" or number == options.tries:
            break
        stop()
    return turn, facts, stop


def start(
    name: str, options: argparse.Namespace
) -> tuple[Callable[[], float], dict[str, Any], Callable[[], None]]:
    """Start a contender; return what takes its round, its facts, and what ends it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=contend, args=(there, name, options))
    process.start()
    there.close()
    facts: dict[str, Any] = here.recv()  # EOFError here: the child's traceback is above

    def turn() -> float:
        here.send("go")
        seconds: float = here.recv()
        return seconds

    def stop() -> None:
        here.send("stop")
        process.join()

    return turn, facts, stop


# -- the parity gate ---------------------------------------------------------------------------


def copy_start(source: GPT, target: ReferenceGPT) -> None:
    """Give the reference the same start as addnorm's model."""
    names = {"token": "token", "position": "position", "norm": "norm", "head": "head"}
    for i in range(len(target.blocks)):
        attention, mlp = f"stack.connections.{2 * i}", f"stack.connections.{2 * i + 1}"
        names |= {f"blocks.{i}.norm1": f"{attention}.norm", f"blocks.{i}.norm2": f"{mlp}.norm"}
        names |= {f"blocks.{i}.qkv": f"{attention}.branch.qkv"}
        names |= {f"blocks.{i}.proj": f"{attention}.branch.out"}
        names |= {f"blocks.{i}.up": f"{mlp}.branch.lift", f"blocks.{i}.down": f"{mlp}.branch.out"}
    for mine, theirs in names.items():
        target.get_submodule(mine).load_state_dict(source.get_submodule(theirs).state_dict())


@torch.no_grad()
def validation_loss(model: nn.Module, data: TextData, device: torch.device) -> float:
    """Return the loss in float32 over all validation windows, whatever the training ran in."""
    total, count = 0.0, 0
    for batch in data.validation_batches(32, 20):
        inputs, targets = tensors(batch, device)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
        total, count = total + loss.item(), count + targets.numel()
    return total / count


def parity(shape: Shape, choice: Choice, steps: int, device: torch.device) -> dict[str, Any]:
    """Train both from the same start on the same batches; compare the validation losses."""
    data = text_of_65(shape.context)
    losses: dict[str, list[float]] = {"reference": [], "addnorm": []}
    for seed in PARITY_SEEDS:
        config = TrainConfig(
            steps, shape.batch, warmup=steps // 10, eval_every=steps, eval_batches=1, seed=seed
        )
        torch.manual_seed(seed)
        model, plain = shape.gpt(), shape.reference()
        copy_start(model, plain)
        plain.to(device)

        def next_batch(step: int, seed: int = seed) -> tuple[torch.Tensor, torch.Tensor]:
            return tensors(data.training_batch(seed, step, shape.batch), device)

        def rate(step: int, config: TrainConfig = config) -> float:
            return config.lr * config.rate(step)

        decay = config.weight_decay
        train_reference(plain, next_batch, steps, rate, betas=(0.9, 0.98), weight_decay=decay)
        train(model, data, config, Runtime(device=str(device)), choice=choice)
        losses["reference"].append(validation_loss(plain, data, device))
        losses["addnorm"].append(validation_loss(model, data, device))
    a, b = losses["reference"], losses["addnorm"]
    paired = [y - x for x, y in zip(a, b, strict=True)]
    error = (standard_error(a) ** 2 + standard_error(b) ** 2) ** 0.5
    difference = statistics.mean(paired)
    return {
        "steps": steps,
        "losses": losses,
        "difference": difference,
        "standard_error": error,
        "paired_standard_error": standard_error(paired),
        "passed": abs(difference) <= 2 * error,
    }


# -- the whole ---------------------------------------------------------------------------------


def main() -> int:
    options = arguments()
    shape, device = SHAPES[options.config], pick_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = machine(device)
    print(describe(facts))
    neighbours = Neighbours()
    roofline = measure_roofline(device, neighbours=neighbours)
    print(roofline)
    model = shape.gpt()
    flops, size = model.flops_per_token(), sum(p.numel() for p in model.parameters())
    print(f"{shape}: {size:,} parameters, {flops / 1e6:.2f} MFLOP a token, {options.rounds} rounds")
    turns, about, stops = {}, {}, []
    for name in options.contenders:
        turns[name], about[name], stop = start_quietly(name, options, neighbours)
        stops.append(stop)
        assert about[name]["parameters"] == size, (name, about[name]["parameters"], size)
    seconds = interleave(turns, options.rounds, neighbours=neighbours)
    print(f"  {neighbours}")
    for stop in stops:
        stop()
    result: dict[str, Any] = {
        "machine": facts,
        "roofline": asdict(roofline),
        "config": options.config,
        "shape": asdict(shape),
        "flops_per_token": flops,
        "parameters": size,
        "steps": options.steps,
        "neighbours": str(neighbours),
        "contenders": {},
    }
    rows = []
    base = options.contenders[0]
    for name in options.contenders:
        rate = interval([options.steps * shape.tokens / s for s in seconds[name]])
        gain = speedup(seconds[base], seconds[name])
        fraction = rate.median * flops / roofline.flops(about[name]["precision"])
        milliseconds = 1000 * statistics.median(seconds[name]) / options.steps
        result["contenders"][name] = {
            "tokens_per_second": asdict(rate),
            "speedup": asdict(gain),
            "fraction_of_roofline": fraction,
            "seconds": seconds[name],
            **about[name],
        }
        spread = f"{rate.median:,.0f} [{rate.low:,.0f}, {rate.high:,.0f}]"
        limit = f"{100 * fraction:.0f} % of {about[name]['precision']}"
        choice = about[name]["choice"]
        rows.append([name, choice, spread, f"{milliseconds:.1f}", f"**{gain}**", limit])
    print()
    header = ["contender", "computed in", "tokens/s", "ms a step", f"times {base}", "roofline"]
    print(table(header, rows))
    passed = True
    if not options.skip_parity and "addnorm" in about:
        print(f"\nparity over seeds {PARITY_SEEDS}, {options.parity_steps} steps:", flush=True)
        choice = choice_from(about["addnorm"]["facts"])
        gate = result["parity"] = parity(shape, choice, options.parity_steps, device)
        passed = gate["passed"]
        for name, values in gate["losses"].items():
            print(f"  {name}: " + ", ".join(f"{value:.4f}" for value in values))
        print(
            f"  difference {gate['difference']:+.4f}, 2 standard errors "
            f"{2 * gate['standard_error']:.4f} (of the paired differences: "
            f"{2 * gate['paired_standard_error']:.4f}): {'PASS' if passed else 'FAIL'}"
        )
    write(options.json, result)
    return 0 if passed else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=SHAPES, default="small")
    parser.add_argument("--rounds", type=int, default=ROUNDS + 2)
    parser.add_argument("--steps", type=int, default=40, help="steps of one contender in a round")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS][:3])
    parser.add_argument("--skip-parity", action="store_true")
    parser.add_argument("--parity-steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=0, help="0: what torch chose")
    parser.add_argument("--tries", type=int, default=5, help="starts of a disturbed tuning")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
