"""The frame of the studies: statistics against brute force, cells kept by content, kills."""

import importlib.util
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from study_cases import made_up, result_of, words

from addnorm.studies import all_studies, find_studies, running
from addnorm.studies.frame import Claim, Contrast, Metric, Mode, Plot, Study
from addnorm.studies.keys import code_of, keys_of
from addnorm.studies.running import (
    StudyObserver,
    claim_verdicts,
    conclude_study,
    last_verdicts,
    run_studies,
    summary,
)
from addnorm.studies.verdict import holm, judge, judge_all, median_interval, sign_flip

# -- statistics --------------------------------------------------------------------------------


def brute_flips(values, alternative):
    """p of the sign-flip test, every flip written out; a mean equal but for rounding counts."""
    seen, slack = sum(values), 1e-9 * sum(map(abs, values))
    means = [
        sum(s * v for s, v in zip(signs, values, strict=True))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    counts = {
        "greater": sum(m >= seen - slack for m in means),
        "less": sum(m <= seen + slack for m in means),
        "two-sided": sum(abs(m) >= abs(seen) - slack for m in means),
    }
    return counts[alternative] / len(means)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
@pytest.mark.parametrize("count", [2, 5, 6, 9])
def test_sign_flips_are_counted_exactly(count, alternative):
    rng = np.random.default_rng(count)
    for values in (rng.normal(0.7, 1, count), rng.normal(0, 1, count), np.ones(count)):
        assert sign_flip(values, alternative) == pytest.approx(brute_flips(values, alternative))


def test_sign_flips_with_ties_and_zeros():
    for values in ([1.0, 1.0, -1.0, 0.0, 2.0, 2.0], [0.0] * 6, [3.0, -3.0, 1.0, -1.0]):
        found = sign_flip(np.array(values), "two-sided")
        assert found == pytest.approx(brute_flips(values, "two-sided"))


def test_many_seeds_are_flipped_at_random_but_alike_each_time():
    values = np.random.default_rng(0).normal(0.4, 1, 14)
    p = sign_flip(values, "two-sided")
    assert p == sign_flip(values, "two-sided")
    assert p == pytest.approx(brute_flips(values, "two-sided"), abs=0.015)


@pytest.mark.parametrize(
    "ps",
    [
        [0.01, 0.04, 0.03, 0.005],
        [0.02, 0.02, 0.02],
        [0.9, 0.001],
        [0.6, 0.7, 0.5],
        [0.05],
        [],
    ],
)
def test_holm_rejects_what_the_stepwise_procedure_rejects(ps):
    """Holm 1979: from the smallest p on, reject while p_(k) <= alpha / (m - k + 1)."""
    corrected = holm(ps)
    for alpha in (0.001, 0.0199, 0.02, 0.0301, 0.05, 0.061, 0.1, 0.5, 0.99):
        rejected = set()
        for k, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
            if ps[i] * (len(ps) - k) > alpha:
                break
            rejected.add(i)
        assert {i for i, p in enumerate(corrected) if p <= alpha} == rejected


def test_holm_leaves_nan_out_of_the_count():
    assert holm([0.02, math.nan, 0.03])[::2] == [0.04, 0.04]
    assert math.isnan(holm([0.02, math.nan])[1])


HIGH, LOW = [2.0, 2.1, 1.9, 2.2, 2.05, 1.8], [0.1, 0.2, -0.1, 0.15, 0.05, 0.0]
BOTH = [0.0, 2.0, 0.4, 1.6, 0.9, 1.1]  # on both sides of 1


@pytest.mark.parametrize(
    ("effects", "rule", "limit", "verdict"),
    [
        (HIGH, "above", 1.0, "SUPPORTED"),
        (LOW, "above", 1.0, "REFUTED"),
        (BOTH, "above", 1.0, "INCONCLUSIVE"),
        (HIGH, "below", 1.0, "REFUTED"),
        (LOW, "below", 1.0, "SUPPORTED"),
        (LOW, "within", 1.0, "SUPPORTED"),
        (HIGH, "within", 1.0, "REFUTED"),
        ([-v for v in HIGH], "within", 1.0, "REFUTED"),
        (BOTH, "within", 1.0, "INCONCLUSIVE"),
        (LOW, "exact", 0.2, "SUPPORTED"),
        ([-v for v in LOW], "exact", 0.2, "SUPPORTED"),
        (LOW, "exact", 0.19, "REFUTED"),
        (HIGH[:5], "above", 1.0, "INCONCLUSIVE"),  # 2 / 2^5 > 0.05
        (HIGH[:1], "above", 1.0, "INCONCLUSIVE"),
        (LOW[:1], "within", 1.0, "INCONCLUSIVE"),
        ([*HIGH, math.nan], "above", 1.0, "INCONCLUSIVE"),
        ([*HIGH, math.inf], "above", 1.0, "INCONCLUSIVE"),
        ([*LOW, math.nan], "exact", 0.2, "INCONCLUSIVE"),
        ([], "above", 1.0, "INCONCLUSIVE"),
        ([], "exact", 1.0, "INCONCLUSIVE"),
    ],
)
def test_verdicts(effects, rule, limit, verdict):
    assert judge(effects, rule, limit).verdict == verdict


def test_p_of_each_rule():
    above = judge(HIGH, "above", 1.0)
    assert above.p == pytest.approx(brute_flips([v - 1 for v in HIGH], "two-sided")) == 2 / 64
    assert above.effect == pytest.approx(2.025)
    within = judge(BOTH, "within", 1.0)
    ends = brute_flips([v + 1 for v in BOTH], "greater"), brute_flips([v - 1 for v in BOTH], "less")
    assert within.p == pytest.approx(max(ends))
    beyond = judge(HIGH, "within", 1.0)
    assert beyond.p == pytest.approx(brute_flips([v - 1 for v in HIGH], "two-sided"))
    assert math.isnan(judge(LOW, "exact", 1.0).p)


def test_interval_of_the_median():
    values = np.array(HIGH)
    low, high = median_interval(values)
    assert values.min() <= low <= np.median(values) <= high <= values.max()
    rng = np.random.default_rng(1)
    medians = np.median(rng.choice(values, (20_000, len(values))), axis=1)
    assert (low, high) == pytest.approx(tuple(np.quantile(medians, [0.025, 0.975])), abs=0.03)
    assert median_interval(np.ones(6)) == (1.0, 1.0)
    assert judge([3.0], "exact", 5).interval == (3.0, 3.0)


def test_secondary_verdicts_are_corrected():
    one = (HIGH, "above", 1.0)
    assert [j.verdict for j, _ in judge_all([one])] == ["SUPPORTED"]
    (first, p), (second, _) = judge_all([one, one])
    assert first.p == second.p == 2 / 64
    assert p == 4 / 64
    assert first.verdict == second.verdict == "INCONCLUSIVE"
    exact = (LOW, "exact", 0.2)
    assert [j.verdict for j, _ in judge_all([one, exact])] == ["SUPPORTED", "SUPPORTED"]


# -- what a study is ---------------------------------------------------------------------------


def test_a_claim_that_does_not_stand_is_refuted_by_a_supported_statement_and_by_nothing_supported():
    says = words("so")
    stands, denied = Claim("1", "000", 1, says), Claim("1", "000", 1, says, stands=False)
    for verdict, contrary in (
        ("SUPPORTED", "REFUTED"),
        ("REFUTED", "INCONCLUSIVE"),
        ("INCONCLUSIVE", "INCONCLUSIVE"),
    ):
        assert stands.answer(verdict) == verdict
        assert denied.answer(verdict) == contrary


@pytest.mark.parametrize(
    "changes",
    [
        {"claims": (Claim("1", "000", 1, words("so"), by="nothing"),)},
        {"secondary": (made_up().primary,)},
        {"modes": {"default": Mode(6, 1)}},
        {"modes": {"default": Mode(6, 1), "quick": Mode(6, 1), "slow": Mode(6, 1)}},
        {"plots": (Plot("lines", words("x"), x="depth", y="nothing"),)},
        {"plots": (Plot("lines", words("x"), x="nothing", y="loss"),)},
    ],
)
def test_a_study_that_is_not_whole_is_refused(changes):
    with pytest.raises(AssertionError):
        made_up(**changes)


def test_cells_come_seed_by_seed_and_without_those_that_are_skipped():
    study = made_up(skip=lambda cell: cell["net"] == "plain" and cell["width"] == 128)
    cells = list(study.cells("default"))
    assert len(cells) == 8 * (2 * 3 * 2 - 3)
    assert [c["seed"] for c in cells] == sorted(c["seed"] for c in cells)
    assert all(c["steps"] == 20 for c in cells)
    assert list(study.cells("long")) == cells  # where there is no long mode
    assert len(list(study.cells("quick"))) == 6 * 9
    assert not any(c["net"] == "plain" and c["width"] == 128 for c in cells)


def test_studies_are_found_by_name_and_number():
    wanted = ("plus-one", "3", "ST-02", "st03", "Degradation")
    assert [study.id for study in find_studies(wanted)] == ["ST-02", "ST-03"]
    with pytest.raises(ValueError, match="unknown study 'degredation'; did you mean 'degradation'"):
        find_studies(["degredation"])
    with pytest.raises(ValueError, match="unknown study '99'"):
        find_studies(["99"])


def test_every_study_has_both_languages_its_own_number_and_name():
    studies = all_studies()
    for key in ("id", "name"):
        assert len({getattr(study, key) for study in studies}) == len(studies)
    for study in studies:
        pairs = [study.title, study.question, study.design, study.controls]
        pairs += [c.statement for c in study.contrasts] + [c.says for c in study.claims]
        pairs += [plot.title for plot in study.plots] + [m.title for m in study.metrics.values()]
        assert all(pair.en and pair.zh for pair in pairs), study.id
        assert all("\u4e00" <= c <= "\u9fff" or c for c in study.title.zh), study.id


@pytest.mark.parametrize("mode", ["quick", "default", "long"])
def test_every_mode_has_the_seeds_for_a_verdict_on_every_contrast(mode):
    """The least p of n seeds, 2 / 2^n, times the secondary contrasts among which Holm divides."""
    for study in all_studies():
        drawn = [c.rule != "exact" for c in study.contrasts]
        least = 2 * 0.5 ** study.mode(mode).seeds
        assert not drawn[0] or least <= 0.05, study.id
        assert least * sum(drawn[1:]) <= 0.05, study.id


# -- running -----------------------------------------------------------------------------------


def counting(folder, *, seconds=0.0, **changes):
    """A study of two nets whose measure notes each call in a file of the folder."""
    given = {
        "factors": {"net": ("plain", "residual"), "note": (str(folder / "calls"),)},
        "measure": noted,
        "metrics": {"loss": Metric(words("loss"), failed=9.0)},
        "primary": Contrast(
            words("Plain loses more."),
            lambda rows: rows.value("loss", net="plain") - rows.value("loss", net="residual"),
            limit=0.5,
        ),
        "secondary": (),
        "claims": (),
        "plots": (Plot("dots", words("Loss"), x="net", y="loss"),),
        "modes": {"quick": Mode(6, 0), "default": Mode(8, 0, settings={"sleep": seconds})},
    }
    return made_up(**(given | changes))


def noted(cell):
    """Note the call, sleep, and return a loss that the seed decides."""
    with open(cell["note"], "a") as file:
        file.write(f"{cell['net']} {cell['seed']}\n")
    time.sleep(cell.get("sleep", 0.0))
    return {"loss": (1.0 if cell["net"] == "plain" else 0.0) + torch.rand(()).item() / 10}


def calls(folder):
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


class Heard(StudyObserver):
    def __init__(self):
        self.counts, self.rows, self.results = [], [], []

    def begin(self, studies, mode, cells):
        self.counts = list(cells)

    def cell(self, study, row):
        self.rows.append(row)

    def concluded(self, study, result):
        self.results.append(result)


@pytest.mark.parametrize("jobs", [1, 2])
def test_no_cell_is_computed_twice(tmp_path, jobs):
    study, out = counting(tmp_path), tmp_path / "out"
    first, again = Heard(), Heard()
    (result,) = run_studies([study], out=out, jobs=jobs, observer=first)
    assert sorted(calls(tmp_path)) == sorted(f"{c['net']} {c['seed']}" for c in study.cells("long"))
    assert first.counts == [(16, 0)]
    assert len(first.rows) == 16
    (same,) = run_studies([study], out=out, jobs=jobs, observer=again)
    assert len(calls(tmp_path)) == 16
    assert again.counts == [(16, 16)]
    assert len(again.rows) == 16
    assert same == result == json.loads((out / "made-up.json").read_text())
    assert result["verdict"] == "SUPPORTED"
    assert first.results == [result]
    run_studies([study], "quick", out=out, jobs=1)  # other settings: cells of its own
    assert len(calls(tmp_path)) == 16 + 12


def test_two_runs_are_equal(tmp_path):
    """The same rows in the same order, whatever the number of processes, but for the time."""
    study = counting(tmp_path)
    results = [
        run_studies([study], out=tmp_path / name, jobs=jobs)[0]
        for name, jobs in (("a", 1), ("b", 2))
    ]
    for result in results:
        result.pop("seconds")
        for row in result["rows"]:
            row.pop("seconds")
    assert results[0] == results[1]


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "{}", '{"seconds": 1}', "\x00"])
def test_a_damaged_cell_is_measured_again(tmp_path, text):
    study = counting(tmp_path)
    (first,) = run_studies([study], "quick", out=tmp_path, jobs=1)
    path = next((tmp_path / "cells").iterdir())
    whole = json.loads(path.read_text())
    path.write_text(text)
    (second,) = run_studies([study], "quick", out=tmp_path, jobs=1)
    assert len(calls(tmp_path)) == 12 + 1
    assert json.loads(path.read_text()) | {"seconds": 0} == whole | {"seconds": 0}
    assert second["contrasts"] == first["contrasts"]


def test_a_metric_may_have_the_name_of_a_setting(tmp_path):
    """ST-06 sets `steps` and measures how many were needed; its cells are known all the same."""
    study = counting(
        tmp_path,
        measure=stopped,
        metrics={"loss": Metric(words("loss")), "sleep": Metric(words("steps"))},
    )
    first = run_studies([study], out=tmp_path, jobs=1)
    assert run_studies([study], out=tmp_path, jobs=1) == first
    assert len(calls(tmp_path)) == 16


def stopped(cell):
    return noted(cell) | {"sleep": 3.5}


def test_a_result_of_another_mode_is_replaced_and_said(tmp_path):
    class Said(Heard):
        told = ()

        def say(self, message):
            self.told += (message,)

    study, heard = counting(tmp_path), Said()
    run_studies([study], "quick", out=tmp_path, jobs=1, observer=heard)
    run_studies([study], "quick", out=tmp_path, jobs=1, observer=heard)
    assert heard.told == ()
    run_studies([study], out=tmp_path, jobs=1, observer=heard)
    (message,) = heard.told
    assert message.startswith("made-up: replaces the result of quick mode of 20")


def test_a_budget_that_cannot_give_a_verdict_is_refused(tmp_path):
    modes = {"quick": Mode(6, 4), "default": Mode(12, 20)}
    studies = [counting(tmp_path, modes=modes)]
    with pytest.raises(ValueError, match="budget") as refused:  # 6 of 12 seeds take 10 minutes
        run_studies(studies, out=tmp_path, jobs=1, budget=9)
    assert str(refused.value) == (
        "a budget of 9 minutes is too small for a verdict on made-up: the fewest seeds that can "
        "decide need about 10 on 2 cores, those of --quick about 4"
    )
    with pytest.raises(ValueError, match="on made-up, made-up, made-up and 1 more: the fewest"):
        run_studies(studies * 4, out=tmp_path, jobs=1, budget=9)
    assert not calls(tmp_path)


def test_known_cells_make_a_budget_enough(tmp_path):
    study = counting(tmp_path, modes={"quick": Mode(6, 0), "default": Mode(6, 20)})
    run_studies([study], "quick", out=tmp_path, jobs=1)
    (result,) = run_studies([study], out=tmp_path, jobs=1, budget=0.5)
    assert result["verdict"] == "SUPPORTED"
    assert len(calls(tmp_path)) == 12


def test_a_budget_that_ends_leaves_whole_seeds_and_no_verdict(tmp_path):
    factors = {"net": ("plain", "residual", "other"), "note": (str(tmp_path / "calls"),)}
    study = counting(tmp_path, seconds=0.1, factors=factors)
    (result,) = run_studies([study], out=tmp_path, jobs=1, budget=0.5 / 60)
    done = calls(tmp_path)
    assert 0 < len(done) < 18  # 6 seeds would take 1.8 s
    counts = {s: sum(line.endswith(f" {s}") for line in done) for s in range(8)}
    assert result["seeds"] == [s for s, count in counts.items() if count == 3]
    assert len(result["rows"]) == len(done)
    assert (result["verdict"], result["planned"]) == ("INCONCLUSIVE", 8)
    assert len(result["contrasts"][0]["effects"]) == len(result["seeds"])
    (whole,) = run_studies([study], out=tmp_path, jobs=1)
    assert whole["verdict"] == "SUPPORTED"
    assert len(calls(tmp_path)) == 24  # what the budget left is computed, nothing else


def test_what_is_not_finite_is_a_failed_training():
    """The metric's stand-in counts; where there is none, nothing is known."""
    result = result_of(made_up())
    lost = [row for row in result["rows"] if row["failed"]]
    assert result["failed"] == len(lost) == 2
    assert {(r["net"], r["depth"], r["seed"]) for r in lost} == {("plain", 64, 3)}
    assert all(r["loss"] == 2.3 and r["steps"] is None for r in lost)
    effects = result["contrasts"][0]["effects"]
    assert effects[3] == pytest.approx(2.3 - rows_at(result, "plain", 4, 3)["loss"])
    free = made_up(metrics={**made_up().metrics, "loss": Metric(words("loss"))})
    result = result_of(free)
    assert result["verdict"] == "INCONCLUSIVE"
    assert math.isnan(result["effect"])


def rows_at(result, net, depth, seed, width=32):
    (row,) = [
        r
        for r in result["rows"]
        if (r["net"], r["depth"], r["seed"], r["width"]) == (net, depth, seed, width)
    ]
    return row


def test_a_summary_has_what_the_list_shows():
    result = result_of(made_up())
    row = summary(result)
    wanted = {"id", "title", "verdict", "claims", "effect", "interval", "p", "seeds", "seconds"}
    assert wanted <= row.keys()
    assert "rows" not in row
    assert row["limit"] == 0.5


def test_the_last_verdict_is_that_of_the_folder_or_else_the_shipped_one(tmp_path, monkeypatch):
    """A study that is in neither has none."""
    monkeypatch.setattr(running, "__file__", str(tmp_path / "running.py"))
    assert {row["verdict"] for row in last_verdicts(tmp_path / "out")} == {""}
    (study,) = find_studies(["plus-one"])
    rows = [{**c, **dict.fromkeys(study.metrics, 0.9), "seconds": 1} for c in study.cells("quick")]
    result = conclude_study(study, "quick", rows)
    shipped = [
        summary(result) | {"verdict": "REFUTED"},
        summary(result) | {"name": "degradation", "verdict": "INCONCLUSIVE"},
    ]
    (tmp_path / "verdicts.json").write_text(json.dumps(shipped))
    found = {row["name"]: row["verdict"] for row in last_verdicts(tmp_path / "out")}
    assert (found["plus-one"], found["degradation"]) == ("REFUTED", "INCONCLUSIVE")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plus-one.json").write_text(json.dumps(result))
    found = {row["name"]: row["verdict"] for row in last_verdicts(tmp_path / "out")}
    assert (found.pop("plus-one"), found.pop("degradation")) == ("SUPPORTED", "INCONCLUSIVE")
    assert set(found.values()) == {""}
    shipped = {row["name"]: row["shipped"] for row in last_verdicts(tmp_path / "out")}
    assert [shipped[n] for n in ("plus-one", "degradation", "vanishing")] == [False, True, False]
    unknown = [row for row in last_verdicts(tmp_path / "none") if not row["verdict"]]
    assert {claim["verdict"] for row in unknown for claim in row["claims"]} == {""}


def test_the_shipped_verdicts_are_of_the_claims_as_they_stand(tmp_path):
    declared = {s.name: [(c.id, c.says._asdict()) for c in s.claims] for s in all_studies()}
    shipped = [row for row in last_verdicts(tmp_path) if row["shipped"]]
    assert {row["name"] for row in shipped} == declared.keys()
    for row in shipped:
        assert [(c["id"], c["says"]) for c in row["claims"]] == declared[row["name"]], row["name"]


def test_claims_of_what_was_never_run_have_no_verdict():
    rows = [summary(result_of(made_up()))]
    assert claim_verdicts(rows) == {("ST-90", "1.3"): "SUPPORTED", ("ST-90", "0.13"): "REFUTED"}
    assert claim_verdicts([rows[0] | {"verdict": ""}]) == {}


# -- killed ------------------------------------------------------------------------------------

TINY = """
import os, sys, time
from pathlib import Path
from study_cases import made_up, words
from addnorm.studies.frame import Contrast, Metric, Mode, Plot
from addnorm.studies.running import run_studies

def measure(cell):
    with open("calls", "a") as file:
        file.write(f"{cell['net']} {cell['seed']}\\n")
    if "STOP" in os.environ and len(open("calls").readlines()) > 5:
        time.sleep(60)
    return {"loss": float(cell["net"] == "plain")}

STUDY = made_up(
    factors={"net": ("plain", "residual")},
    measure=measure,
    metrics={"loss": Metric(words("loss"))},
    primary=Contrast(
        words("so"), lambda r: r.value("loss", net="plain") - r.value("loss", net="residual"), 0.5
    ),
    secondary=(), claims=(), plots=(Plot("dots", words("Loss"), x="net", y="loss"),),
    modes={"quick": Mode(6, 0), "default": Mode(8, 0)},
)

if __name__ == "__main__":
    (result,) = run_studies([STUDY], out=Path("out"), jobs=1)
    print(result["verdict"], len(result["seeds"]))
"""


def test_a_killed_run_goes_on(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    path = os.pathsep.join([os.path.dirname(__file__), str(tmp_path)])
    command = [sys.executable, "-c", "import runpy; runpy.run_module('tiny', run_name='__main__')"]
    given = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": path}, "text": True}
    stopped = subprocess.Popen(command, **given | {"env": {**given["env"], "STOP": "1"}})
    deadline = time.monotonic() + 60
    while len(calls(tmp_path)) < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    stopped.send_signal(signal.SIGKILL)
    stopped.wait()
    assert len(calls(tmp_path)) == 6
    assert len(list((tmp_path / "out" / "cells").glob("*.json"))) == 5
    done = subprocess.run(command, **given, capture_output=True, timeout=120)
    assert done.stdout == "SUPPORTED 8\n", done.stderr
    assert len(calls(tmp_path)) == 6 + 11  # the torn one again, and the rest
    assert sorted(set(calls(tmp_path))) == sorted(
        f"{n} {s}" for n in ("plain", "residual") for s in range(8)
    )
    left = [p.name for p in (tmp_path / "out" / "cells").iterdir()]
    assert len([name for name in left if not name.startswith(".")]) == 16


# -- what decides a cell's file ----------------------------------------------------------------

SOURCE = {
    "tools": "STEP = 3\n\n\ndef deep(x):\n    return x + STEP\n\n\ndef idle(x):\n    return x\n",
    "main": (
        "import addnorm.studies.tools_VARIANT as tools\n"
        "from addnorm.studies.tools_VARIANT import deep\n\n"
        "RATE = 0.1\nNAMES = ('a', 'b')\nOTHER = 1\n"
        "TABLE = {'double': lambda x: 2 * x, 'deep': deep}\n\n\n"
        "def helper(x):\n    return deep(x) * RATE\n\n\n"
        "def idle(x):\n    return x - OTHER\n\n\n"
        "class Layer:\n    def forward(self, x):\n        return helper(x)\n\n\n"
        "def measure(cell):\n"
        "    layers = [Layer() for _ in NAMES]\n"
        "    return {'loss': layers[0].forward(cell['seed']) + TABLE['double'](tools.STEP)}\n"
    ),
}


def code(variant, changes=(), monkeypatch=None):
    """The code that decides the cells of a measure in modules of their own, after some changes."""
    found = {}
    for name in ("tools", "main"):
        text = SOURCE[name].replace("VARIANT", variant)
        for old, new in changes:
            text = text.replace(old, new)
        path = monkeypatch[0] / f"{name}_{variant}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(f"addnorm.studies.{name}_{variant}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch[1].setitem(sys.modules, spec.name, module)
        monkeypatch[1].setattr(sys.modules["addnorm.studies"], f"{name}_{variant}", module, False)
        spec.loader.exec_module(module)
        found[name] = module
    return code_of(found["main"].measure).replace(variant, "VARIANT")


@pytest.mark.parametrize(
    ("old", "new", "matters"),
    [
        ("cell['seed'])", "cell['seed'] + 1)", True),  # the measure itself
        ("return deep(x) * RATE", "return deep(x) / RATE", True),  # a helper of a class it uses
        ("RATE = 0.1", "RATE = 0.2", True),
        ("NAMES = ('a', 'b')", "NAMES = ('a', 'c')", True),
        ("return x + STEP", "return x - STEP", True),  # a helper in another module
        ("STEP = 3", "STEP = 4", True),
        ("2 * x", "3 * x", True),  # a function in a table
        ("def idle(x):\n    return x - OTHER", "def idle(x):\n    return x + OTHER", False),
        ("OTHER = 1", "OTHER = 2", False),
        ("def idle(x):\n    return x\n", "def idle(x):\n    return -x\n", False),
        ("RATE = 0.1\n", "RATE = 0.1  # of Adam\n", False),
    ],
)
def test_what_decides_a_number_decides_its_file(tmp_path, monkeypatch, old, new, matters):
    place = (tmp_path, monkeypatch)
    assert any(old in text for text in SOURCE.values())
    assert (code("one", monkeypatch=place) != code("two", [(old, new)], place)) == matters


def test_a_file_is_found_again_by_another_process():
    """No address of an object is in the code of a measure."""
    for study in all_studies():
        assert " at 0x" not in code_of(study.measure), study.id


def test_each_cell_has_its_own_file():
    study = made_up()
    cells = list(study.cells("default"))
    keys = set(keys_of(study, cells))
    assert len(keys) == len(cells)
    other = replace(study, id="ST-91")
    assert not keys & set(keys_of(other, cells))
    assert keys_of(study, [cells[0] | {"steps": 21}])[0] not in keys
    assert isinstance(study, Study)
