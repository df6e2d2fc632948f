"""Comparisons, traces and runs made by formula, for the tests of the reports."""

import math

from addnorm.reports.summary import status_of

UNIGRAM, UNIFORM = 3.269, 4.635
HOSTILE = "</script><img src=x onerror=alert(1)>"


def make_trace(connections, slope=0.0, growth=1.0, similarity=0.2, wiring="prenorm"):
    """A trace whose gradient changes by `slope` decades per 10 connections."""
    last = connections - 1
    rows = [
        {
            "name": f"stack.connections.{i}",
            "stream_before": growth ** (i / connections),
            "stream_after": growth ** ((i + 1) / connections),
            "branch_share": None if wiring == "plain" else 0.5 / (1 + i),
            "gradient_before": 1e-3 * 10 ** (slope * (i - 1 - last) / 10),
            "gradient_after": 1e-3 * 10 ** (slope * (i - last) / 10),
            "token_similarity": similarity,
            "non_finite": 0,
        }
        for i in range(connections)
    ]
    return {
        "model": "GPT",
        "wiring": wiring,
        "blocks": f"{connections} connections of our stacks",
        "loss": 4.7,
        "loss_kind": "cross-entropy",
        "connections": rows,
        "findings": [],
        "schema": 1,
        "ok": True,
        "gradient_slope": slope,
        "stream_growth": growth,
        "token_similarity": similarity,
    }


def make_cell(wiring, depth, seed, loss, *, warmup=0, lr=0.002, slope=0.0, similarity=0.2, slow=1):
    """A cell that ends at `loss`; None says that it diverged after a fifth of its steps."""
    status = status_of(math.nan if loss is None else loss, loss is not None, UNIGRAM, UNIFORM)
    steps = 50 if loss is None else 250
    end = 4.6 if loss is None else loss
    growth = 1.0 if wiring.startswith(("plain", "postnorm")) else 1 + depth / 6
    return {
        "key": f"{wiring}-{depth}-{lr}-{warmup}-{seed}",
        "wiring": wiring,
        "depth": depth,
        "lr": lr,
        "warmup": warmup,
        "seed": seed,
        "status": status,
        "validation": loss,
        "training": None if loss is None else loss - 0.05,
        "accuracy": None,
        "parameters": 10_000 + 28_000 * depth,
        "flops_per_token": 1e5 * depth,
        "tokens": 512 * steps,
        "steps": steps,
        "seconds": slow * depth * steps / 1000,
        "tokens_per_second": 512_000 / depth / slow,
        "start_rule": "xavier" if wiring == "postnorm" else "gpt2",
        "curve": [
            [i, end + (4.7 - end) * math.exp(-i / 60) * (1 - i / 250), slow * depth * i / 1000]
            for i in range(0, steps + 1, 25)
        ],
        "losses": [[i, end + (4.7 - end) * math.exp(-i / 60)] for i in range(1, steps, 5)],
        "start": make_trace(2 * depth, slope, growth, similarity, wiring),
        "end": None if loss is None else make_trace(2 * depth, slope / 4, 2 * growth, 0.3, wiring),
    }


def make_result(cells, **changes):
    """A comparison result out of cells."""
    wirings = list(dict.fromkeys(c["wiring"] for c in cells))
    settings = {
        "wirings": wirings,
        "depths": sorted({c["depth"] for c in cells}),
        "rates": sorted({c["lr"] for c in cells}),
        "warmups": sorted({c["warmup"] for c in cells}),
        "seeds": len({c["seed"] for c in cells}),
        "steps": 250,
        "batch": 16,
        "network": {"dim": 48, "heads": 4, "context": 32, "norm": "layernorm", "start": ""},
        "data": {"data": "pydoc", "tokenizer": "char"},
        "precision": "float32",
    }
    result = {
        "schema": 1,
        "addnorm": "0.1.0",
        "torch": "2.13.0",
        "machine": "2 cores, x86_64, cpu",
        "date": "2026-11-22",
        "settings": settings,
        "choice": {
            "precision": "float32",
            "compiled": False,
            "threads": 1,
            "variants": {"attention": "fused"},
            "measured": [{"choice": "float32, eager", "seconds": 0.0123, "loss": 4.6}],
        },
        "data": {
            "unit": "tokens",
            "source": "pydoc",
            "sha256": "5f" * 32,
            "context": 32,
            "tokens": 465048,
            "vocab_size": 103,
            "unigram": UNIGRAM,
            "uniform": UNIFORM,
        },
        "cells": cells,
    }
    return result | changes


def seeds(wiring, depth, losses, **facts):
    """The cells of one group."""
    return [make_cell(wiring, depth, i, loss, **facts) for i, loss in enumerate(losses)]


def three_wirings():
    """The grid that the pages are looked at with: plain, post-norm and pre-norm."""
    cells = []
    for warmup in (0, 100):
        gain = 0.01 * (warmup > 0)
        cells += seeds("plain", 3, [2.31 - gain, 2.33, 2.35], warmup=warmup, slope=0.9)
        cells += seeds("plain", 12, [3.27, 3.268, 3.271], warmup=warmup, slope=1.6)
        cells += seeds("plain", 24, [3.27, 3.28, 3.272], warmup=warmup, slope=1.7)
        cells += seeds("postnorm", 3, [2.02 - gain, 2.03, 2.04], warmup=warmup, slope=0.1)
        late = [3.2, None, 3.28] if warmup == 0 else [2.0, 2.02, 2.05]
        cells += seeds("postnorm", 12, late, warmup=warmup, slope=0.2)
        lost = [None, None, 3.27] if warmup == 0 else [2.1, 3.2, 2.12]
        cells += seeds("postnorm", 24, lost, warmup=warmup, slope=0.3)
        for depth, loss in ((3, 2.05), (12, 1.96), (24, 1.93)):
            losses = [loss - gain, loss + 0.01, loss + 0.02]
            cells += seeds("prenorm", depth, losses, warmup=warmup, slope=-0.15)
    return make_result(cells)


def many_wirings(count=45):
    """A grid with as many wirings as the catalogue has."""
    cells = []
    for k in range(count):
        name = f"wiring{k}" if k % 3 else f"hyper({k},static={k}.5)"
        for depth in (3, 12, 24):
            loss = 1.9 + 0.01 * (k % 17) - 0.02 * math.log(depth) + (1.3 if k % 9 == 4 else 0)
            losses = [None, None] if k % 11 == 5 and depth == 24 else [loss, loss + 0.02]
            cells += seeds(name, depth, losses, slope=0.05 * (k - 20))
    return make_result(cells)


def make_run(hostile="pydoc"):
    """What the folder of a run of 1,000 steps holds."""
    result = three_wirings()
    config = {
        "addnorm": "0.1.0",
        "torch": "2.13.0",
        "model": {"kind": "gpt", "depth": 12, "dim": 128, "wiring": "prenorm"},
        "data": result["data"] | {"source": hostile},
        "plugins": [],
        "train": {"steps": 1000, "lr": 1e-3, "warmup": 100},
        "runtime": {"device": "auto"},
        "choice": result["choice"],
    }
    metrics = []
    for step in range(1, 1001):
        loss = 1.9 + 2.7 * math.exp(-step / 150)
        metrics.append({"step": step, "loss": loss + 0.1 * math.sin(step * step), "lr": 1e-3})
        if step % 250 == 0:
            metrics.append({"step": step, "validation": loss + 0.05, "seconds": step / 10})
    last = {"status": "finished", "step": 1000, "validation": 1.953, "seconds": 100.0}
    return config, metrics, last | {"tokens_per_second": 12345.6}
