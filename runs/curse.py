"""Make docs/images/curse.png: what each connection is worth, by depth, in pre-norm and post-norm.

    python runs/curse.py [FOLDER [STEPS]]          # about 6 minutes on 2 cores

Trains a 12-layer character GPT on the built-in text under both wirings, three seeds each, X-rays it
with lesions on 64 validation windows, and prints the table behind the picture. FOLDER, by default
`curse`, keeps a trace of each network; those that are there are not trained again. The picture is
that of 500 steps; with another number only the table is printed.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import altair as alt
import joblib
import torch
from scipy.stats import spearmanr

from addnorm import GPT, GPTConfig, TrainConfig, load_text, train, xray
from addnorm.files import read_json, write_json
from addnorm.probe.lesion import lesions
from addnorm.reports.chart_style import PALETTE
from addnorm.training.config import Runtime
from addnorm.training.tune import Choice

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "curse.png"
WIRINGS = {"prenorm": "pre-norm", "postnorm": "post-norm"}
SEEDS = (0, 1, 2)
DEPTH, CONTEXT = 12, 64
STEPS = 500
CONFIG = TrainConfig(batch=16, lr=1e-3)
WINDOWS = 64  # of the validation text that the lesions are measured on


def cell(wiring: str, seed: int, folder: Path, steps: int) -> dict[str, Any]:
    """Train and X-ray one network, or read what is in `folder` of it; a fifth is warm-up."""
    path = folder / f"{wiring}-{seed}.json"
    if path.exists():
        known: dict[str, Any] = read_json(path)
        return known
    data = load_text("pydoc", CONTEXT)
    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(
            depth=DEPTH,
            dim=64,
            heads=4,
            context=CONTEXT,
            wiring=wiring,
            vocab_size=data.vocab_size,
        )
    )
    choice = Choice(precision="float32", threads=1)
    config = replace(CONFIG, seed=seed, steps=steps, warmup=steps // 5, eval_every=steps)
    run = train(model, data, config, Runtime(device="cpu"), choice=choice)
    batch = tuple(map(torch.as_tensor, next(data.validation_batches(WINDOWS, 1))))
    trace = xray(model.eval(), *batch, deep=("lesion",), budget=600)
    layers = lesions(model, *batch, singles=False, runs=(2,), estimate=False, budget=600)
    facts = {
        "wiring": wiring,
        "seed": seed,
        "status": run.status,
        "validation": run.validation,
        "unigram": data.unigram,
        "seconds": run.seconds,
        "layers": layers.runs[2][::2],
        "trace": trace.to_dict(),
    }
    write_json(path, facts)
    return facts


def picture(cells: list[dict[str, Any]]) -> alt.HConcatChart:
    """Return both panels: a line per seed, the mean in full colour."""
    rows = [
        {
            "wiring": c["wiring"],
            "seed": c["seed"],
            "layer": i // 2 + 1,
            "branch": ("attention", "feed-forward")[i % 2],
            "effect": effect,
        }
        for c in cells
        for i, effect in enumerate(c["trace"]["deep"]["lesion"]["singles"])
    ]
    panels = []
    for wiring, title in WIRINGS.items():
        base = alt.Chart(alt.InlineData([r for r in rows if r["wiring"] == wiring])).encode(
            alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
            alt.Color(
                "branch:N",
                scale=alt.Scale(range=[PALETTE[0], PALETTE[1]]),
                legend=alt.Legend(title="branch removed", orient="bottom", symbolOpacity=1),
            ),
        )
        y = alt.Y(
            "effect:Q",
            title="rise of the validation loss (nats)",
            scale=alt.Scale(type="symlog", constant=0.01),
            axis=alt.Axis(values=[0, 0.01, 0.03, 0.1, 0.3, 1, 3], format="~g"),
        )
        seeds = base.mark_circle(opacity=0.45, size=30).encode(y, detail="seed:N")
        mean = base.mark_line(strokeWidth=2.5).encode(y.copy(), detail="branch:N")
        mean["encoding"]["y"]["aggregate"] = "mean"
        losses = [c["validation"] for c in cells if c["wiring"] == wiring]
        under = f"validation loss {min(losses):.2f} to {max(losses):.2f}, {len(losses)} seeds"
        panels.append(
            (mean + seeds).properties(
                title=alt.TitleParams(title, subtitle=under, anchor="start"), width=380, height=280
            )
        )
    return alt.hconcat(*panels).resolve_scale(y="shared").configure(background="white")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "curse")
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else STEPS
    folder = folder / f"{steps}"
    folder.mkdir(parents=True, exist_ok=True)
    grid = [(wiring, seed, folder, steps) for seed in SEEDS for wiring in WIRINGS]
    jobs = [joblib.delayed(cell)(*each) for each in grid]
    cells = joblib.Parallel(n_jobs=joblib.cpu_count())(jobs)
    print(f"unigram loss {cells[0]['unigram']:.3f}; rise of the loss without a layer, in nats")
    print("| wiring | seed | loss | " + " | ".join(map(str, range(1, DEPTH + 1))) + " | Spearman |")
    print("|---|---|---|" + "---|" * (DEPTH + 1))
    for c in sorted(cells, key=lambda c: (list(WIRINGS).index(c["wiring"]), c["seed"])):
        rho = spearmanr(range(DEPTH), c["layers"]).statistic
        values = " | ".join(f"{v:.3f}" for v in c["layers"])
        print(f"| {c['wiring']} | {c['seed']} | {c['validation']:.3f} | {values} | {rho:+.2f} |")
    if steps == STEPS:
        picture(cells).save(PICTURE, ppi=150)


if __name__ == "__main__":
    main()
