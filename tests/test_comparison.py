"""The comparison: what a cell is, fairness between cells, resume, divergence."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from addnorm import CompareConfig, DataConfig, GPTConfig, ResNetConfig, compare, load_text, runs
from addnorm.comparison import Cell, CompareObserver, join_comparisons, load_comparison, started
from addnorm.models.zoo import fitted
from addnorm.reports.statements import statements
from addnorm.reports.summary import summarise
from addnorm.training.tune import Choice, choice_from

SMALL = {
    "network": GPTConfig(dim=8, heads=2, context=8),
    "batch": 4,
    "steps": 12,
    "jobs": 1,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    path = folder / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    return str(path)


def grid(text, **changes):
    settings = {"wirings": ("plain", "prenorm"), "depths": (1, 2), "warmups": (0, 4), "seeds": 2}
    settings |= {"rates": (1e-3,)}
    return CompareConfig(data=DataConfig(text), **(SMALL | settings | changes))


def plain_values(result):
    """Return the cells without what the clock decides."""
    clock = ("seconds", "tokens_per_second", "curve")
    cells = [{k: v for k, v in c.items() if k not in clock} for c in result["cells"]]
    for cell, whole in zip(cells, result["cells"], strict=True):
        cell["curve"] = [row[:2] for row in whole["curve"]]
    return json.loads(json.dumps(cells))


@pytest.fixture(scope="module")
def result(text):
    return compare(grid(text))


def test_every_cell_of_the_grid_is_there_once_and_in_order(result):
    keys = [(c["wiring"], c["depth"], c["lr"], c["warmup"], c["seed"]) for c in result["cells"]]
    wanted = [
        (w, d, 1e-3, u, s)
        for w in ("plain", "prenorm")
        for d in (1, 2)
        for u in (0, 4)
        for s in (0, 1)
    ]
    assert keys == wanted
    assert len({c["key"] for c in result["cells"]}) == len(wanted)


def test_a_cell_is_the_training_that_anyone_can_run_alone(text, result):
    """The same GPT, seed and settings through `addnorm.train` give bitwise the same losses."""
    config, data = grid(text), load_text(text, 8)
    cell = next(c for c in result["cells"] if (c["wiring"], c["depth"]) == ("prenorm", 2))
    shape = fitted("gpt", config.cell("prenorm", 2), data.shape)
    model = started("gpt", shape, cell["seed"])
    training = config.training(cell["lr"], cell["warmup"], cell["seed"])
    run = runs.train(model, data, training, choice=choice_from(result["choice"]))
    assert [loss for _, loss in cell["losses"]] == run.losses
    assert cell["validation"] == run.validation
    assert [row[:2] for row in cell["curve"]] == [[e.step, e.loss] for e in run.evaluations]
    assert cell["parameters"] == sum(p.numel() for p in model.parameters())
    assert cell["tokens"] == 12 * 4 * 8


@pytest.mark.parametrize("other", ["plain", "deepnorm", "rezero", "sandwich"])
def test_cells_of_one_seed_start_from_the_same_embedding_and_head(text, other):
    """Paired seeds: what lies outside the stack starts alike under every wiring."""
    config = grid(text)
    shapes = [replace(config.cell(w, 2), vocab_size=9) for w in ("prenorm", other)]
    one, two = (started("gpt", shape, 1) for shape in shapes)
    for part in ("token", "position", "head"):
        assert torch.equal(getattr(one, part).weight, getattr(two, part).weight)
    assert not torch.equal(one.token.weight, started("gpt", shapes[0], 2).token.weight)


def test_the_result_does_not_depend_on_how_many_jobs_train(text, result):
    assert plain_values(compare(grid(text, jobs=2))) == plain_values(result)


class Counter(CompareObserver):
    def __init__(self):
        self.trained = []

    def finished(self, cell):
        self.trained.append(cell["key"])


def test_finished_cells_are_kept_and_a_larger_grid_trains_only_what_is_new(text, tmp_path):
    first, again, larger = Counter(), Counter(), Counter()
    small = grid(text, wirings=("prenorm",), depths=(1,))
    one = compare(small, out=tmp_path / "c", observer=first)
    two = compare(small, out=tmp_path / "c", observer=again)
    assert len(first.trained) == 4
    assert again.trained == []
    assert plain_values(one) == plain_values(two)
    compare(replace(small, depths=(1, 2)), out=tmp_path / "c", observer=larger)
    assert len(larger.trained) == 4
    assert not set(larger.trained) & set(first.trained)


def test_a_cell_is_named_by_what_decides_its_outcome(text):
    config = grid(text)
    data = {"source": text, "sha256": "sha", "context": 8}
    base = Cell("gpt", config.cell("prenorm", 2), config.training(1e-3, 0, 0), data, Choice())
    other = [
        replace(base, model=config.cell("postnorm", 2)),
        replace(base, model=config.cell("prenorm", 3)),
        replace(base, training=config.training(2e-3, 0, 0)),
        replace(base, training=config.training(1e-3, 4, 0)),
        replace(base, training=config.training(1e-3, 0, 1)),
        replace(base, data=data | {"sha256": "other"}),
        replace(base, choice=Choice(precision="bfloat16")),
    ]
    assert len({c.key for c in [base, *other]}) == 8
    assert replace(base, choice=Choice(threads=7)).key == base.key
    assert replace(base, data=data | {"source": "elsewhere"}).key == base.key


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_a_rate_that_blows_up_counts_as_diverged_and_the_page_says_so(text):
    config = grid(text, wirings=("residual",), depths=(2,), rates=(1e4,), warmups=(0,))
    result = compare(config)
    assert {c["status"] for c in result["cells"]} == {"diverged"}
    summary = summarise(json.loads(json.dumps(result)))
    assert summary.rows()[0]["status"] == "diverged"
    first = statements(summary)[0]
    assert first.code == "take-none"


def test_a_killed_comparison_goes_on_where_it_stopped(text, tmp_path):
    """SIGKILL after the first finished cell; the second call keeps it and trains the rest."""
    code = (
        "import sys; from addnorm import CompareConfig, DataConfig, GPTConfig, compare\n"
        "compare(CompareConfig(GPTConfig(dim=8, heads=2, context=8), DataConfig(sys.argv[1]),"
        "wirings=('prenorm',), depths=(1, 2), warmups=(0,), seeds=2, batch=4, steps=12, jobs=1),"
        "out=sys.argv[2])"
    )
    folder = tmp_path / "c"
    process = subprocess.Popen([sys.executable, "-c", code, text, str(folder)], env=os.environ)
    while process.poll() is None and not list((folder / "cells").glob("*.json")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p.stem for p in (folder / "cells").glob("*.json")}
    assert kept
    counter = Counter()
    config = grid(text, wirings=("prenorm",), warmups=(0,))
    result = compare(config, out=folder, observer=counter)
    assert len(result["cells"]) == 4
    assert kept.isdisjoint(counter.trained)
    assert plain_values(result) == plain_values(compare(config))


def test_comparisons_are_joined_when_text_and_settings_agree(text, tmp_path):
    compare(grid(text, wirings=("prenorm",)), out=tmp_path / "a")
    compare(grid(text, wirings=("plain",), depths=(1,)), out=tmp_path / "b")
    compare(grid(text, wirings=("plain",), depths=(1,), steps=6), out=tmp_path / "c")
    joined = join_comparisons([tmp_path / "a", tmp_path / "b"])
    assert len(joined["cells"]) == 8 + 4
    assert summarise(joined).wirings == ["prenorm", "plain"]
    with pytest.raises(ValueError, match=r"cannot be joined: .*'steps': 12.*'steps': 6"):
        join_comparisons([tmp_path / "a", tmp_path / "c"])
    with pytest.raises(ValueError, match="is missing"):
        load_comparison(tmp_path)
    (Path(tmp_path) / "no.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no comparison"):
        load_comparison(tmp_path / "no.json")


def test_image_networks_are_compared_as_text_networks_are(tmp_path):
    """Digits, two depths, two wirings: accuracy and training loss stand in every cell."""
    config = CompareConfig(
        ResNetConfig(width=4),
        wirings=("plain", "postact"),
        depths=(8, 14),
        rates=(0.05,),
        warmups=(0,),
        seeds=1,
        steps=6,
        batch=16,
        optimizer="sgd",
        jobs=1,
    )
    result = compare(config, out=tmp_path)
    assert [(c["wiring"], c["depth"]) for c in result["cells"]] == [
        (w, d) for w in ("plain", "postact") for d in (8, 14)
    ]
    for cell in result["cells"]:
        assert 0 <= cell["accuracy"] <= 1
        assert cell["training"] > 0
        assert cell["tokens"] == 6 * 16
        assert len(cell["start"]["connections"]) >= 1
    again = compare(config, out=tmp_path)["cells"]
    assert [c["losses"] for c in again] == [c["losses"] for c in result["cells"]]


WIRING = """
from addnorm import Wiring, register

@register
class Scaled(Wiring):
    name = "scaled-test"
    equation = "x <- x + GAIN F(x)"
    paper = "none"
    year = 2026
    at_start = "x + GAIN F(x)"
    stream_law = gradient_law = "constant"

    def __init__(self, branch, site):
        super().__init__(branch, site)
        self.reset_parameters()

    def forward(self, stream, context):
        return stream + GAIN * self.branch(stream, context)
"""


def test_a_cell_of_changed_code_is_trained_again(text, tmp_path):
    """The second version of a plug-in, in a process of its own, finds no cell of the first."""
    code = (
        "import json, sys; from addnorm import CompareConfig, DataConfig, GPTConfig, compare\n"
        "from addnorm.plugins import load_plugins; load_plugins([sys.argv[3]])\n"
        "r = compare(CompareConfig(GPTConfig(dim=8, heads=2, context=8), DataConfig(sys.argv[1]),"
        "wirings=('scaled-test',), depths=(1,), warmups=(0,), seeds=1, batch=4, steps=4, jobs=1),"
        "out=sys.argv[2], plugins=[sys.argv[3]])\n"
        "print(json.dumps([c['validation'] for c in r['cells']]))"
    )
    found = []
    for gain in ("0.5", "-5.0"):
        (tmp_path / "mine.py").write_text(WIRING.replace("GAIN", gain), encoding="utf-8")
        argv = [sys.executable, "-c", code, text, tmp_path / "c", tmp_path / "mine.py"]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    assert len(found[0]) == len(found[1]) == 1
    assert found[0] != found[1]
