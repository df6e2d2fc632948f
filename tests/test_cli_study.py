"""`addnorm study`: the list, runs, the errata, JSON, bad input and exit codes."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from study_cases import made_up, result_of
from test_cli import refused

import addnorm.cli.study as command
from addnorm.cli import main
from addnorm.files import locked
from addnorm.reports.studies import LiveStudies, one_line, print_claims, print_studies
from addnorm.studies import all_studies, running
from addnorm.studies.running import summary

KEYS = {"id", "title", "verdict", "claims", "effect", "interval", "p", "seeds", "seconds"}
RUN = ["study", "plus-one", "--quick", "--jobs", "1"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of one run of a small study, with what the command printed and returned."""
    folder = tmp_path_factory.mktemp("ran")
    code = [sys.executable, "-m", "addnorm", *RUN, "--json", "verdicts.json"]
    done = subprocess.run(
        code, cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return folder, done


def test_the_list_has_every_study(capsys):
    assert main(["study"]) == 0
    out, err = capsys.readouterr()
    for study in all_studies():
        assert re.search(rf"^{study.id} {study.name}( \*)? ", out, re.M), study.name
        assert (f"{study.name} * " in out) == study.heavy
    assert err == ""
    assert main(["study", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in rows] == [study.id for study in all_studies()]
    assert all(row.keys() >= KEYS for row in rows)


def test_the_list_in_chinese(capsys):
    assert main(["study", "--lang", "zh"]) == 0
    out = capsys.readouterr().out
    assert "退化现象" in out
    assert "° 随 addnorm 附带，未在此文件夹运行" in out
    assert "not run" not in out


def test_a_study_that_was_never_run_is_listed_as_that(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(running, "__file__", str(tmp_path / "running.py"))  # nothing is shipped
    assert main(["study", "--lang", "zh"]) == 0
    out = capsys.readouterr().out
    assert out.count("尚未运行") == len(all_studies()) + 1
    assert "附带" not in out


def test_a_run_says_its_verdict_claims_and_page(ran):
    folder, done = ran
    assert done.returncode == 0, done.stderr
    assert re.search(r"ST-02 plus-one +The “\+1” of the +supported +0\.", done.stdout)
    assert re.search(r"001:149 +The bracket .* refuted", done.stdout)
    assert done.stderr.splitlines()[0] == "32 cells, 0 of them known; about 6 s to go"
    assert re.match(
        r"ST-02 plus-one: supported: 0\..*, p 0\.008, 8 seeds, ", done.stderr.split("\n")[1]
    )
    assert done.stderr.splitlines()[2] == "report: studies/plus-one.html"
    written = {path.name for path in (folder / "studies").iterdir()}
    assert written == {"cells", ".lock", "plus-one.json", "plus-one.html", "index.html"}
    (row,) = json.loads((folder / "verdicts.json").read_text())
    assert row.keys() >= KEYS
    assert (row["verdict"], len(row["seeds"]), row["mode"]) == ("SUPPORTED", 8, "quick")
    assert {c["id"]: c["verdict"] for c in row["claims"]}["1.23"] == "REFUTED"


def test_a_second_run_reads_what_is_there(ran, monkeypatch, capsys):
    folder, _ = ran
    monkeypatch.chdir(folder)
    assert main([*RUN, "--json", "-", "--lang", "zh"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["name"] == "plus-one"
    assert "共 32 个单元，已有 32 个" in err
    assert "支持" in err
    assert (folder / "studies" / "plus-one.html").read_text().startswith("<!DOCTYPE html>")
    assert '<html lang="zh-CN">' in (folder / "studies" / "plus-one.html").read_text()
    assert main(["study", "--json", "-"]) == 0  # the list knows it now
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["verdict"] for row in rows}["plus-one"] == "SUPPORTED"


def test_the_errata_are_checked_with_the_last_verdicts(ran, monkeypatch, capsys):
    folder, _ = ran
    monkeypatch.chdir(folder)
    assert main(["study", "errata", "--json", "errata.json"]) == 0
    out = capsys.readouterr().out
    rows = json.loads((folder / "errata.json").read_text())
    assert len(rows) == 47
    assert all(row["id"] in out for row in rows)
    told = {row["id"]: row["evidence"]["en"] for row in rows}
    assert "Study ST-02 (plus-one), the claim at 001:149: refuted." in told["E02"]
    assert main(["study", "errata", "--lang", "zh"]) == 0
    assert "共 47 条" in capsys.readouterr().out


def test_one_erratum_is_shown_whole(capsys):
    assert main(["study", "errata", "e03", "E29", "--json", "two.json"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    rows = json.loads(Path("two.json").read_text())
    assert [row["id"] for row in rows] == ["E03", "E29"]
    for row in rows:
        parts = [row["says"]["en"], row["right"]["en"], row["evidence"]["en"], *row["sources"]]
        assert all(" ".join(part.split()) in shown for part in parts), row["id"]
    assert main(["study", "errata", "E03", "--lang", "zh"]) == 0
    assert "雅可比" in capsys.readouterr().out


def test_an_erratum_that_fails_is_exit_code_1(monkeypatch, capsys):
    rows = command.check_errata({})
    rows[0] |= {"status": "fails"}
    monkeypatch.setattr(command, "check_errata", lambda verdicts: rows)
    assert main(["study", "errata"]) == 1


@pytest.mark.parametrize(
    ("relied", "verdict", "code"),
    [
        (True, "REFUTED", 1),
        (False, "REFUTED", 0),
        (True, "INCONCLUSIVE", 0),
        (True, "SUPPORTED", 0),
    ],
)
def test_the_exit_code_is_1_where_the_docs_rely_on_what_is_refuted(
    tmp_path, monkeypatch, capsys, relied, verdict, code
):
    result = result_of(made_up(relied=relied)) | {"verdict": verdict}
    monkeypatch.setattr(command, "find_studies", lambda names: [made_up(relied=relied)])
    monkeypatch.setattr(command, "run_studies", lambda studies, mode, **given: [result])
    assert main(["study", "made-up"]) == code


def test_all_leaves_the_heavy_ones_to_long(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        command, "run_studies", lambda s, mode, **given: asked.append((s, mode)) or []
    )
    for words in (["--all"], ["--all", "--quick"], ["--all", "--long"]):
        assert main(["study", *words]) == 0
    light = [study.id for study in all_studies() if not study.heavy]
    every = [study.id for study in all_studies()]
    found = [([study.id for study in studies], mode) for studies, mode in asked]
    assert found == [(light, "default"), (light, "quick"), (every, "long")]
    assert main(["study", "streams"]) == 0  # by its name a heavy one runs too
    assert [study.id for study in asked[-1][0]] == ["ST-31"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["degredation"], "unknown study 'degredation'; did you mean 'degradation'? (known: "),
        (["99"], "unknown study '99' (known: "),
        (["erata"], "unknown study 'erata'; did you mean 'errata'? (known: "),
        (["plus-one", "--quick", "--long"], "--quick and --long exclude each other"),
        (["plus-one", "--all"], "--all runs every study; leave the names out"),
        (
            ["errata", "plus-one"],
            "unknown erratum 'PLUS-ONE': errata takes numbers from E01 to E47",
        ),
        (["plus-one", "--jobs", "-1"], "jobs -1 must be at least 0"),
        (["plus-one", "--budget", "0"], "budget 0 must be above 0 minutes"),
        (["plus-one", "--budget", "nan"], "budget nan must be above 0 minutes"),
        (["plus-one", "--budget", "soon"], "--budget: 'soon' is not a number"),
        (
            ["degradation", "--budget", "0.01"],
            "a budget of 0.01 minutes is too small for a verdict on degradation: the fewest seeds ",
        ),
        (["plus-one", "--out", "text"], "--out 'text' is not a folder"),
        (["--out", "text"], "--out 'text' is not a folder"),
        (["plus-one", "--out", ""], "--out '' is not a folder"),
        (["plus-one", "--json", "."], "--json '.' is a folder; name a file, or - for stdout"),
        (["--quick"], "--quick needs something to run: name studies, or add --all"),
        (["errata", "--budget", "3"], "--budget needs something to run"),
        (["--lang", "de"], "invalid choice 'de' for argument '--lang'"),
        (["--bugdet", "3"], "unknown option '--bugdet'; did you mean --budget?"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, capsys, words, line):
    (tmp_path / "text").write_text("a file")
    assert refused(capsys, "study", *words).startswith(line)


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    with locked(tmp_path / "studies"):
        assert "another process is writing to studies" in refused(capsys, *RUN)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": 0, "name": "cost"}'])
def test_a_damaged_result_is_named_and_left_out(tmp_path, capsys, text):
    """Neither a call that lists, nor the errata, nor a run of another study trips over it."""
    folder = tmp_path / "studies"
    folder.mkdir()
    (folder / "arithmetic.json").write_text(text)
    for words in (["study"], ["study", "errata"], RUN):
        assert main(words) == 0
        told = "not the result of a study, left out: studies/arithmetic.json"
        assert told in capsys.readouterr().err, words
    assert (folder / "plus-one.html").exists()
    assert main(["study", "arithmetic"]) == 0
    assert json.loads((folder / "arithmetic.json").read_text())["verdict"] == "SUPPORTED"
    capsys.readouterr()
    assert main(["study"]) == 0
    assert capsys.readouterr().err == ""


# -- what is printed ---------------------------------------------------------------------------


def printed(width, draw, *given):
    console = Console(width=width, record=True, file=io.StringIO())
    draw(console, *given)
    return console.export_text()


def rows_of_all():
    """The list with a long effect for each study."""
    unit = {"en": "share of the directions that shrink", "zh": "被缩小的方向所占的比例"}
    shown = {"verdict": "INCONCLUSIVE", "effect": -0.123, "interval": [-1.23e-5, 0.456], "p": 0.123}
    row = summary(result_of(made_up()))
    return [
        {**row, "id": s.id, "name": s.name, "title": s.title._asdict(), "heavy": s.heavy}
        | shown | {"unit": unit}
        for s in all_studies()
    ]  # fmt: skip


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("width", [60, 80, 110, 120, 140])
def test_the_list_fits(width, lang):
    """No line is wider, and no name, verdict or date is torn apart."""
    rows = rows_of_all()
    text = printed(width, print_studies, rows, lang)
    wide = [sum(1 + (c > "\u2e80") for c in line.rstrip()) for line in text.splitlines()]
    assert max(wide) <= width
    for row in rows:
        assert f"{row['id']} {row['name']}" in text
    assert text.count(rows[0]["date"]) == (len(rows) if width >= 80 else 0)
    assert len(re.findall(r" (default|默认)$", text.replace(" \n", "\n"), re.M)) == len(rows)
    assert text.count("不能断定" if lang == "zh" else "inconclusive") == len(rows) + 1
    assert width < 110 or text.count("−0.123 [−1.2e−5, 0.456]") == len(rows)


def test_claims_are_printed_by_document_and_line():
    text = printed(100, print_claims, [result_of(made_up())], "en")
    assert re.search(r"001:9 +Deep plain networks are worse\. +supported", text)
    assert re.search(r"000:80 +Depth alone decides\. +refuted", text)
    assert printed(100, print_claims, [result_of(made_up(claims=()))], "en") == ""


def test_a_result_in_one_line():
    result = result_of(made_up()) | {"seconds": 90.0}
    line = (
        "ST-90 made-up: supported: 1.83 [1.4, 1.91] nats, p 0.008, {} seeds, 2 trainings failed, "
        "1.5 min"
    )
    assert one_line(result, "en") == line.format("8")
    assert one_line(result | {"seeds": [0, 1]}, "en") == line.format("2 of 8")
    assert "2 个种子（计划 8 个），2 次训练失败，1.5 分钟" in one_line(
        result | {"seeds": [0, 1]}, "zh"
    )


class Terminal(Console):
    """A console that is a terminal, and remembers."""

    def __init__(self):
        super().__init__(width=100, height=30, record=True, force_terminal=True, file=io.StringIO())


def test_the_live_table_shows_medians_failures_and_the_time_left():
    study, console = made_up(), Terminal()
    result = result_of(study)
    raw = [r | {n: None for n in study.metrics if r["failed"]} for r in result["rows"]]
    with LiveStudies(console, "en") as live:
        live.begin([study], "default", [(96, 0)])
        for row in raw[:60]:
            live.cell(study, row)
        middle = Console(width=100, record=True, file=io.StringIO())
        middle.print(live._render())
        live.concluded(study, result)
    text = middle.export_text()
    assert re.search(r"ST-90 made-up +60/96 +2 +\d+ s", text)
    assert "0 of 1 studies done, about" in text
    assert "training loss" in text
    assert re.search(r"^plain +64 +1\.\d+ ×1 +1\.\d+ ×1", text, re.M)
    assert "supported" in console.export_text()


def test_the_time_left_follows_the_pace(monkeypatch):
    """Half of the new cells took 3 minutes: so will the other half, known ones aside."""
    study, now = made_up(), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    live = LiveStudies(Terminal(), "en")
    live.begin([study], "default", [(96, 48)])
    for row in result_of(study)["rows"][:48]:
        live.cell(study, row)
    assert live._pace() == 1.0  # nothing is known but what the study declares
    for row in result_of(study)["rows"][48:72]:
        live.cell(study, row)
    now[0] = 180.0
    left = 60 * live._pace() * live._minutes(study, len(live.rows[study.id]))
    assert left == pytest.approx(180.0)


def test_many_studies_fit_the_terminal():
    studies = [replace(made_up(), id=f"ST-{n}", name=f"study-{n}") for n in range(10, 60)]
    live = LiveStudies(Terminal(), "en")
    live.begin(studies, "default", [(96, 0)] * 50)
    console = Console(width=100, height=30, record=True, file=io.StringIO())
    console.print(live._render())
    assert len(console.export_text().splitlines()) <= 30
