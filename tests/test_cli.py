"""The command line: results, exit codes, and one clear line for bad input."""

import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from addnorm.cli import main

TEXT = "the quick brown fox jumps over the lazy dog. " * 200
TINY = ["--depth", "1", "--dim", "8", "--heads", "2", "--context", "8", "--precision", "float32"]
FAST = ["--compile", "off", "--threads", "1", "--batch", "4", "--warmup", "2"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    assert main(["train", "--data", "text.txt", "--out", "run", "--steps", "12", *TINY, *FAST]) == 0
    return tmp_path / "run"


def pictures(folder, size=8):
    """Two classes of three gray pictures each."""
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (size, size), 80 * i).save(folder / name / f"{i}.png")


def refused(capsys, *argv):
    """Return the one line that bad input gets."""
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("addnorm: ")]
    assert out == ""
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0].removeprefix("addnorm: ")


REFUSED = [
    (["compar"], "unknown command 'compar'; did you mean 'compare'? (known: "),
    (
        ["compare", "--wirings", "prenrm"],
        "unknown wiring 'prenrm'; did you mean 'prenorm'? (addnorm wirings lists the ",
    ),
    (
        ["compare", "--wirings", "layerscale(int=1)"],
        "unknown option of layerscale 'int'; did you mean 'init'? (known: init)",
    ),
    (
        ["compare", "--wirings", "layerscale:init=big"],
        "init=big of layerscale must be a number",
    ),
    (["compare", "--depths", "3,0"], "depth 0 must be at least 1"),
    (["compare", "--depths", "-2"], "depth -2 must be at least 1"),
    (["compare", "--depths", "x"], "--depths: 'x' is not a whole number"),
    (["compare", "--heads", "5"], "heads 5 does not divide dim 48 (allowed: 1, 2, 3, 4, 6, 8, "),
    (["compare", "--warmups", "900"], "a warm-up of 900 steps does not fit into 200 steps"),
    (["compare", "--rates", "0"], "lr 0.0 must be a positive number, for instance 1e-3"),
    (["compare", "--seeds", "0"], "seeds 0 must be at least 1"),
    (["compare", "--start", "xavir"], "unknown start 'xavir'; did you mean 'xavier'? (known: "),
    (
        ["compare", "--stepz", "3"],
        "unknown option '--stepz'; did you mean --steps? (addnorm compare",
    ),
    (
        ["compare", "--steps", "many"],
        "--steps: 'many' is not a whole number (addnorm compare --help",
    ),
    (["compare", "--plugins", "nowhere.py"], "no file 'nowhere.py'"),
    (["compare", "--plugins", "no.where"], "no module 'no.where', neither installed nor in "),
    (
        ["compare", "--data", "nowhere.txt"],
        "no text at 'nowhere.txt'; give a UTF-8 file, a folder, ",
    ),
    (["compare", "--device", "nonsense"], "device 'nonsense' cannot be used here: "),
    (["train", "--data", "empty.txt"], "the text 'empty.txt' is empty; "),
    (["train", "--data", "latin.txt"], "latin.txt is not UTF-8 (byte 3 is 0xe9); convert it, "),
    (["train", "--data", "short.txt"], "the text 'short.txt' has 5 characters, too short for "),
    (["train", "--depth", "0"], "depth 0 must be at least 1"),
    (["train", "--heads", "3"], "heads 3 does not divide dim 128 (allowed: "),
    (["train", "--dropout", "1"], "dropout 1.0 must be at least 0 and less than 1"),
    (["train", "--wiring", "post-norm"], "unknown wiring 'post-norm'; did you mean 'postnorm'? "),
    (
        ["train", "--precision", "half"],
        "invalid choice 'half' for argument '--precision'. Expected",
    ),
    (["train", "--vocab-size", "7"], "vocab_size 7 is not that of 'pydoc', "),
    (["train", "--resume", "nowhere"], "no run folder 'nowhere'"),
    (["train", "--resume", "."], ". is not a run folder: it has no config.json"),
    (
        ["train", "--resume", "x", "--lr", "1"],
        "--resume keeps the recorded settings; leave --lr out",
    ),
    (
        ["train", "--model", "a:b", "--depth", "9"],
        "unknown option '--depth' (addnorm train --help lists the options)",
    ),
    (["train", "--model", "nothing"], "unknown model 'nothing' (known: gpt, ngpt, resnet, "),
    (["train", "--model", "resnt"], "unknown model 'resnt'; did you mean 'resnet'? (known: "),
    (["train", "--model", "a:"], "'a:' names no function; write pkg.module:function or file.py:"),
    (
        ["train", "--resume", "x", "--steps", "2000"],
        "--resume keeps the recorded settings, and a lon",
    ),
    (
        ["train", "--eval_every=250", "--resume=x"],
        "--resume keeps the recorded settings; leave --ev",
    ),
    (
        ["train", "--model", "resnet21"],
        "unknown model 'resnet21'; did you mean 'resnet20'? (known: ",
    ),
    (
        ["train", "--model", "resnet60"],
        "unknown model 'resnet60'; did you mean 'resnet56'? (known: ",
    ),
    (
        ["train", "--preset", "babygpt-v10"],
        "unknown preset 'babygpt-v10'; did you mean 'babygpt-v9'",
    ),
    (
        ["train", "--model", "mine.py"],
        "'mine.py' names no function; write mine.py:FUNCTION, which ",
    ),
    (["train", "--model", "encoder"], "encoder reads vectors and cannot be trained from the com"),
    (["train", "--preset", "resnet"], "unknown preset 'resnet'; did you mean 'resnet"),
    (["train", "--preset", "gpt2", "--model", "gpt"], "--preset names a network and how it is "),
    (["train", "--recipe", "he"], "unknown recipe 'he' (known: he2015, he2015-warm, babygpt, "),
    (["train", "--model", "resnet20", "--data", "pydoc"], "no images at 'pydoc'; give digits, "),
    (["train", "--data", "digits"], "digits is a set of images; give a network that reads them"),
    (["train", "--model", "resnet20", "--classes", "7"], "classes 7 is not that of 'digits', 10"),
    (["train", "--betas", "1"], "betas (1.0,) must be two numbers from 0 up to 1"),
    (["train", "--data", "pictures"], "pictures is a set of images; give a network that reads the"),
    (
        ["compare", "--data", "pictures"],
        "pictures is a set of images; give a network that reads th",
    ),
    (
        ["compare", "--model", "ngpt"],
        "ngpt takes no wiring and cannot be compared; compare takes gp",
    ),
    (
        ["compare", "--model", "a.py:b"],
        "a.py:b is a model of your own, and these are for train and ",
    ),
    (
        ["compare", "--threads", "1"],
        "a comparison runs each training on one thread; --jobs says ho",
    ),
    (["compare", "--lr", "1"], "a comparison takes several; use --rates in place of --lr"),
    (
        ["compare", "--eval-every", "9"],
        "--eval-every is an option of addnorm train; a comparison h",
    ),
    (
        ["compare", "--preset", "gpt2"],
        "a comparison has its own training; name the network alone, ",
    ),
    (
        ["compare", "--recipe", "he2015"],
        "--recipe is an option of addnorm train; a comparison has ",
    ),
    (["compare", "--resume", "x"], "a comparison goes on by itself; give the same --out again"),
    (["compare", "--depth", "3"], "a comparison takes several; use --depths in place of --depth"),
    (["compare", "--model", "resnet", "--depths", "9"], "depth 9 is not 6n + 2 (basic) or 9n + 2"),
    (["train", "--model", "json:nope"], "json has no function 'nope'"),
    (["sample", "nowhere"], "no run folder 'nowhere'"),
    (["sample"], "PATH is missing: folder of the run (addnorm sample --help lists the options)"),
    (["xray", "."], ". is not a run folder: it has no config.json"),
    (["xray", "json:dumps"], "json:dumps must need no arguments: "),
    (
        ["wirings", "prenor"],
        "unknown wiring 'prenor'; did you mean 'prenorm'? (addnorm wirings lists the ",
    ),
    (
        ["wirings", "mhc(m=2)"],
        "unknown option of mhc 'm' (known: n, iterations)",
    ),
    (["wirings", "mhc(n=1)"], "n=1 of mhc must be from 2 to 16"),
    (["wirings", "mhc", "--markdown", "x.md"], "--markdown writes the whole catalogue; leave the"),
    (["wirings", "mhc", "--lang", "de"], "invalid choice 'de' for argument '--lang'. Expected one"),
    (["report", "nowhere"], "no file or folder 'nowhere'"),
    (["report", "."], "comparison.json is missing"),
    (
        ["data", "get", "pictures", "--out", "x"],
        "--out writes text, and pictures is a set of image",
    ),
    (["data", "get", "nowhere"], "no text at 'nowhere'; give a UTF-8 file, "),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_bad_input_gets_one_line_and_exit_code_2(capsys, tmp_path, argv, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    pictures(tmp_path / "pictures")
    assert refused(capsys, *argv).startswith(message)


def test_every_command_has_help(capsys):
    for command in ("compare", "train", "sample", "xray", "wirings", "report", "data"):
        assert main([command, "--help"]) == 0
        assert f"usage: addnorm {command}" in capsys.readouterr().out
    assert main([]) == 0
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.endswith("addnorm 0.1.0\n")


def test_train_sample_xray_and_report_work_on_a_run(capsys, run):
    assert {p.name for p in run.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "checkpoint.safetensors",
        "summary.json",
        "tokenizer.json",
        "report.html",
    }
    capsys.readouterr()
    assert main(["sample", "run", "--prompt", "the ", "--tokens", "20", "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("the ")
    assert len(first) == 25
    assert main(["sample", "run", "--prompt", "the ", "--tokens", "20", "--seed", "3"]) == 0
    assert capsys.readouterr().out == first
    assert main(["xray", "run", "--json", "-"]) == 0
    trace = json.loads(capsys.readouterr().out)
    assert trace["wiring"] == "prenorm"
    assert len(trace["connections"]) == 2
    assert main(["xray", "run", "--html", "trace.html"]) == 0
    assert "gradient slope" in capsys.readouterr().out
    assert "<html" in Path("trace.html").read_text(encoding="utf-8")
    assert main(["report", "run", "--out", "again.html"]) == 0
    assert "<html" in Path("again.html").read_text(encoding="utf-8")


def test_bad_prompts_and_spoilt_weights_are_refused(capsys, run):
    assert "the character '€'" in refused(capsys, "sample", "run", "--prompt", "€")
    assert "the prompt is empty" in refused(capsys, "sample", "run", "--prompt", "")
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "is not a whole safetensors file" in refused(capsys, "sample", "run")
    assert "is not a whole safetensors file" in refused(capsys, "xray", "run")


def test_a_finished_run_resumes_to_nothing_and_a_second_run_is_refused(capsys, run):
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["train", "--resume", "run"]) == 0
    assert (run / "metrics.jsonl").read_bytes() == before
    capsys.readouterr()
    message = refused(capsys, "train", "--data", "text.txt", "--out", "run", *TINY)
    assert message == "run holds a run already; go on with --resume run, or choose another --out"


OWN_WIRING = '''
from addnorm import Wiring, register

@register
class Halved(Wiring):
    """x <- x / 2 + F(x)."""

    name = "halved"
    equation = "x <- x / 2 + F(x)"
    paper = "none"
    year = 2026
    at_start = "x / 2 + F(x)"
    stream_law = "vanishing"
    gradient_law = "vanishing"

    def __init__(self, branch, site):
        super().__init__(branch, site)
        self.reset_parameters()

    def forward(self, stream, context):
        return stream / 2 + self.branch(stream, context)
'''
GRID = ["--depths", "1,2", "--warmups", "0", "--steps", "8", "--dim", "8", "--heads", "2"]
GRID += ["--context", "8", "--batch", "4", "--data", "text.txt"]


def test_a_users_wiring_is_compared_and_a_second_call_trains_nothing(capsys, tmp_path):
    (tmp_path / "mine.py").write_text(OWN_WIRING, encoding="utf-8")
    argv = ["compare", "--wirings", "halved,prenorm", "--plugins", "mine.py", *GRID, "--out", "c"]
    assert main([*argv, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert [c["wiring"] for c in result["cells"]] == ["halved"] * 4 + ["prenorm"] * 4
    assert "[8/8]" in err
    assert "halved" in (tmp_path / "c" / "report.html").read_text(encoding="utf-8")
    assert main(argv) == 0
    assert "8 of 8 cells are finished already" in capsys.readouterr().err
    assert main([*argv, "--seeds", "3"]) == 0
    assert "[12/12]" in capsys.readouterr().err
    assert main(["report", "c", "--lang", "zh"]) == 0
    assert 'lang="zh' in (tmp_path / "c" / "report.html").read_text(encoding="utf-8")


def test_a_comparison_on_another_text_is_refused(capsys, tmp_path):
    assert main(["compare", "--wirings", "prenorm", *GRID, "--out", "c"]) == 0
    (tmp_path / "text.txt").write_text(TEXT + "more", encoding="utf-8")
    capsys.readouterr()
    message = refused(capsys, "compare", "--wirings", "prenorm", *GRID, "--out", "c")
    assert message.startswith("c holds a comparison on other data (sha256 ")
    assert main(["compare", "--wirings", "prenorm", *GRID, "--out", "d"]) == 0
    capsys.readouterr()
    assert refused(capsys, "report", "c", "d").startswith("these comparisons cannot be joined")


@pytest.mark.skipif(os.getuid() == 0, reason="root writes to read-only folders")
def test_a_read_only_folder_is_refused(capsys, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    message = refused(capsys, "train", "--data", "text.txt", "--out", "locked/run", *TINY, *FAST)
    assert "permission denied" in message


def test_an_out_path_that_cannot_be_made_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(capsys, "train", "--data", "text.txt", "--out", "file/run", *TINY, *FAST)
    assert message == "cannot read or write file/run: not a directory"


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(capsys, run, monkeypatch):
    before = {p.name: p.read_bytes() for p in run.iterdir()}

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = refused(capsys, "train", "--data", "text.txt", "--out", "other", *TINY, *FAST)
    assert message == "cannot read or write: no space left on device"
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


BROKEN = [
    ("syntax.py", "def make(:\n", ["train", "--model", "syntax.py:make"], "SyntaxError"),
    ("raises.py", "def make():\n    raise RuntimeError('no')\n", None, "RuntimeError: no"),
    (
        "forward.py",
        "import torch\nclass make(torch.nn.Module):\n    pass\n",
        None,
        "NotImplemented",
    ),
    (
        "plugin.py",
        "from addnorm import nothing\n",
        ["compare", "--plugins", "plugin.py"],
        "ImportError",
    ),
]


@pytest.mark.parametrize(("name", "code", "argv", "message"), BROKEN, ids=[b[0] for b in BROKEN])
def test_an_error_in_the_users_code_names_their_file(capsys, tmp_path, name, code, argv, message):
    (tmp_path / name).write_text(code, encoding="utf-8")
    line = refused(capsys, *(argv or ["train", "--model", f"{name}:make", "--data", "text.txt"]))
    assert "failed: " in line
    assert message in line
    assert " line " in line


FACTS = {
    "name", "family", "equation", "paper", "year", "options", "starts_as", "final_norm", "cost",
    "verified", "ships", "asks", "start", "stream_law", "gradient_law", "about", "diagram",
}  # fmt: skip


def test_the_catalogue_as_json_is_a_list_of_facts(capsys):
    assert main(["wirings", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) >= 50
    assert all(set(row) >= FACTS for row in rows)
    assert main(["wirings", "mhc(n=2)", "--json", "one.json"]) == 0
    assert capsys.readouterr().out == ""
    (row,) = json.loads(Path("one.json").read_text(encoding="utf-8"))
    assert (row["name"], row["family"]) == ("mhc", "streams")
    assert row["cost"]["traffic"]["formula"] == "6 D"


def test_the_catalogue_is_printed_by_family(capsys):
    assert main(["wirings"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line.split(":")[0] for line in lines if line and line[0] != " " and ": " in line[:20]]
    assert heads == ["norm", "scale", "memory", "streams"]
    row = next(line for line in lines if line.startswith("prenorm "))
    assert re.split(r"\s{2,}", row.strip()) == ["prenorm", "2020", "x <- x + F(N(x))", "2 D"]
    at = lines.index(next(line for line in lines if line.startswith("mhc ")))
    assert "n=4 iterations=20" in lines[at + 1]
    assert "starts as X + h_post" in lines[at + 1]
    assert main(["wirings", "--lang", "zh"]) == 0
    out = capsys.readouterr().out
    assert "norm：归一化放在哪里" in out
    assert "起始为" in out
    assert "starts as" not in out


def test_one_wiring_is_printed_whole(capsys):
    assert main(["wirings", "layerscale:init=0.5"]) == 0
    out = capsys.readouterr().out
    for part in (
        "layerscale(init=0.5)   scale: ",
        "x <- x + gamma * F(N(x))",
        "x ──┬── N ── F ── gamma ──(+)── x\n    └──────────────────────┘\n",
        "Touvron et al. 2021, CaiT (arXiv:2103.17239), equation 4.",
        "init=0.5 (default 0.0001)",
        "[touvron2021going]",
        "final norm           needed",
        "used by              CaiT",
    ):
        assert part in out
    costs = [line.split() for line in out.splitlines()[-3:]]
    assert costs[0] == ["parameters", "3", "D", "2,304"]
    assert costs[2] == ["memory", "traffic", "4", "D", "3,072"]
    assert main(["wirings", "layerscale", "--lang", "zh"]) == 0
    out = capsys.readouterr().out
    assert "前置归一化，分支输出逐通道乘以可学习的向量 gamma" in out
    assert re.search("最终归一化 +需要", out)
    assert "Touvron et al. 2021, CaiT" not in out


def test_bibtex_of_one_wiring_and_of_all(capsys, tmp_path):
    assert main(["wirings", "unet", "--bibtex"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("@software{jordan2024moddednanogpt,\n")
    assert out.endswith("}\n")
    assert main(["wirings", "--bibtex"]) == 0
    out = capsys.readouterr().out
    assert out.count("{he2016identity,") == 1
    assert out.count("\n@") > 35
    (tmp_path / "mine.py").write_text(OWN_WIRING, encoding="utf-8")
    message = refused(capsys, "wirings", "halved", "--plugins", "mine.py", "--bibtex")
    assert message == "no BibTeX entry is known for 'none'"
    assert main(["wirings", "--plugins", "mine.py", "--markdown", "all.md"]) == 0
    assert "own: wirings of your own" in Path("all.md").read_text(encoding="utf-8")


def test_json_goes_to_stdout_and_messages_to_stderr(capsys):
    assert main(["wirings", "prenorm", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert [row["name"] for row in json.loads(out)] == ["prenorm"]
    assert err == ""
    assert main(["data", "get", "text.txt", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == len(TEXT)


def test_data_get_describes_images(capsys, tmp_path):
    """A folder of images, sized and mended as `train` does; as bytes any folder is a text."""
    pictures(tmp_path / "p", size=9)
    (tmp_path / "p" / "a" / "notes.txt").write_text("no picture")
    (tmp_path / "p" / "b" / "torn.png").write_bytes(b"\x89PNG")
    assert "leave such pictures out: --corrupt skip" in refused(capsys, "data", "get", "p")
    assert main(["data", "get", "p", "--corrupt", "skip", "--size", "6", "--json", "-"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["unit"], facts["classes"], facts["size"]) == ("images", 2, 6)
    assert (facts["skipped"], facts["ignored"]) == (1, 1)
    assert main(["data", "get", "p", "--tokenizer", "byte", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["tokenizer"] == "byte"
    assert main(["data", "get", "digits", "--tokenizer", "byte", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["unit"] == "images"


def test_a_known_network_that_cannot_be_trained_is_not_listed(capsys):
    line = refused(capsys, "train", "--model", "nothing")
    assert "(known: gpt, ngpt, resnet, mlp, babygpt-v6" in line
    assert "encoder" not in line


def test_ctrl_c_ends_with_130_and_the_run_resumes(tmp_path):
    argv = ["train", "--data", "text.txt", "--out", "run", "--steps", "100000", *TINY, *FAST]
    process = subprocess.Popen(
        [sys.executable, "-m", "addnorm", *argv], stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "run" / "summary.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(2)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "addnorm: interrupted" in errors
    assert "Traceback" not in errors
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"


SICK = """
import torch
from addnorm import GPT, GPTConfig

def make():
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth=1, dim=8, heads=2, context=8, vocab_size=5))
    tokens = torch.randint(5, (2, 8))
    return model, tokens, tokens

def sick():
    model, *rest = make()
    model.head.weight.data.fill_(float("nan"))
    return model, *rest

def alone():
    return make()[0]
"""


def test_xray_of_a_function_and_exit_code_1_when_sick(capsys, tmp_path):
    (tmp_path / "own.py").write_text(SICK, encoding="utf-8")
    assert main(["xray", "own.py:make"]) == 0
    assert main(["xray", "own.py:sick"]) == 1
    assert "sick: non-finite" in capsys.readouterr().out
    assert main(["xray", "own.py:alone"]) == 0
