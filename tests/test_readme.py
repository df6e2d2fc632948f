"""The README's code runs, both languages have the same shape, and the wheel is complete."""

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from addnorm.cli import COMMANDS, main
from addnorm.contract import catalogue

ROOT = Path(__file__).parent.parent
LANGUAGES = ("README.md", "README.zh-CN.md")
# What keeps a command of the README short; the rest of it is run as it stands.
SHORT = {
    "compare": "--steps 6 --dim 8 --heads 2 --context 8 --seeds 1 --warmups 0,2 --jobs 2",
    "compare --model": "--steps 2 --width 2 --batch 4 --seeds 1 --jobs 2",
    "train": "--steps 6 --dim 8 --heads 2 --context 8 --warmup 2 --threads 1",
    "train --preset": "--steps 2 --threads 1",
    "train --model": "--steps 2 --width 2 --batch 4 --warmup 0 --threads 1",
}
# Data that a test has not got, and what stands in for them.
INSTEAD = {"songci": "my_text.txt", "cifar-10-batches-bin": "digits"}


def blocks(name, language):
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def shape(name):
    """Return the level of every heading, the size of every table, and every code block."""
    text = (ROOT / name).read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    headings = [len(level) for level in re.findall(r"^(#+) ", prose, re.M)]
    tables = [len(t.splitlines()) for t in re.findall(r"(?:^\|.*\n)+", prose, re.M)]
    columns = [row.count("|") for row in re.findall(r"^\|.*$", prose, re.M)]
    code = re.findall(r"^```\w*\n.*?^```", text, re.M | re.S)
    literals = sorted(set(re.findall(r"`--?[\w-]+`", prose)))
    return headings, tables, columns, code, literals


def test_both_languages_have_the_same_headings_tables_and_code():
    assert shape(LANGUAGES[0]) == shape(LANGUAGES[1])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = "The quick brown fox jumps over the lazy dog. 春江 " * 300
    (tmp_path / "my_text.txt").write_text(text, encoding="utf-8")
    return tmp_path


def test_the_python_blocks_run(here):
    for code in blocks("README.md", "python"):
        torch.manual_seed(0)
        code = code.replace("steps=200", "steps=3").replace('"The "))', '"The ", tokens=5))')
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert (here / "trace.html").exists()


def test_the_shell_blocks_run(here, capsys):
    own = next(b for b in blocks("README.md", "python") if "my_wirings.py" in b)
    (here / "my_wirings.py").write_text(own, encoding="utf-8")
    seen = set()
    for line in "".join(blocks("README.md", "sh")).splitlines():
        words = [INSTEAD.get(word, word) for word in shlex.split(line, comments=True)]
        if words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
            continue
        command = words[1]
        seen.add(command)
        kind = SHORT.get(" ".join(words[1:3]), SHORT.get(command, ""))
        short = [] if "--resume" in words else shlex.split(kind)
        assert main([*words[1:], *short]) == 0, line
    assert seen == {"compare", "train", "sample", "xray", "study"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_wiring_of_ours_stands_in_the_table_of_families(language):
    text = (ROOT / language).read_text(encoding="utf-8")
    section = text[
        text.rindex("\n## ", 0, text.index("`rezero`")) : text.index("`reversible`") + 20
    ]
    rows = [
        re.findall(r"`([\w-]+)`", row)
        for row in re.findall(r"^\| [^|]*\| (`.*) \|$", section, re.M)
    ]
    ours = [n for n, w in catalogue().items() if w.__module__.startswith("addnorm.")]
    assert [name for row in rows for name in row] == ours


def test_every_command_is_in_the_changelog_or_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text += (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert all(
        re.search(rf"`(addnorm )?{command}\b|addnorm {command}", text) for command in COMMANDS
    )


def test_the_wheel_contains_everything_it_needs(tmp_path):
    """Every module, template, the type marker and the licence are in the wheel."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    done = subprocess.run([*build, "-w", tmp_path, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "addnorm"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert {name for name in tracked if (ROOT / name).exists()} <= names
    assert any(name.endswith("LICENSE") for name in names)
