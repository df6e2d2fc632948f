"""The babygpt ladder on Song lyrics: v6 to v9, three seeds each, as the originals were trained.

    python runs/ladder.py          # needs npm once for the corpus; about 6 minutes on 2 cores

Prints a Markdown table of validation losses after 5,000 steps, and what v9 writes.
"""

from __future__ import annotations

import statistics

import joblib
import torch

from addnorm import TrainConfig, build, load_text, sample, train
from addnorm.training.config import RECIPES, Runtime
from addnorm.training.tune import Choice

NAMES = ("babygpt-v6", "babygpt-v7", "babygpt-v8", "babygpt-v9")
SEEDS = (0, 1, 2)
PROMPTS = ("春江", "往事")


def trained(name: str, seed: int) -> tuple[str, float, float, dict[str, str]]:
    data = load_text("songci", 8)
    config = TrainConfig(**RECIPES["babygpt"], eval_batches=200, seed=seed)
    torch.manual_seed(seed)
    model = build(name, vocab_size=data.vocab_size)
    choice = Choice(precision="float32", threads=1)
    run = train(model, data, config, Runtime(device="cpu"), choice=choice)
    texts = {prompt: sample(run, prompt, tokens=60, seed=seed) for prompt in PROMPTS}
    return name, run.validation, run.seconds, texts


def main() -> None:
    load_text("songci", 8)  # built once, here
    cells = [joblib.delayed(trained)(name, seed) for name in NAMES for seed in SEEDS]
    results = joblib.Parallel(n_jobs=joblib.cpu_count())(cells)
    print("| preset | validation loss by seed | mean | seconds |\n|---|---|---|---|")
    for name in NAMES:
        rows = [r for r in results if r[0] == name]
        losses = [r[1] for r in rows]
        shown = ", ".join(f"{v:.3f}" for v in losses)
        seconds = statistics.median(r[2] for r in rows)
        print(f"| {name} | {shown} | {statistics.fmean(losses):.3f} | {seconds:.0f} |")
    for prompt, text in results[-1][3].items():
        print(f"\nv9, {prompt}:\n{text}")


if __name__ == "__main__":
    main()
