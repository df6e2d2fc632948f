"""The script behind `make mutants`, on a toy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mutants
import pytest

from addnorm.contract import catalogue

HERE = Path(__file__).parent
TOY = '''
class Toy:
    """x <- x - 2 F(x)."""

    name = "toy"

    def forward(self, x: int = -3, *, factor: float = 2.0):
        """Return 1 + 1."""
        assert x > 0, "1 + 1"
        if x < 0:
            raise ValueError(x + 1)
        return x - factor * x + 0 * x
'''
ROWS = """
import pytest
import toy

@pytest.mark.parametrize("spec", ["toy(n=1)"])
def test_formula(spec):
    assert toy.Toy().forward(3) == -3

@pytest.mark.parametrize("spec", ["other"])
def test_of_another_wiring(spec):
    raise AssertionError
"""
RUN = """
import json, pathlib, mutants
made = list(mutants.mutants_of(pathlib.Path("toy.py")))
judge = mutants.judged(made, [pathlib.Path("toy.py")], ["test_toy.py"])
print(json.dumps([[m.after, judge.killers[m]] for m in made]))
"""


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "test_toy.py").write_text(ROWS)
    return tmp_path


def test_mutants_follow_from_the_tree(toy):
    """Operators, constants, conditions and defaults; no text, type, assert, raise or message."""
    found = [m for m in mutants.mutants_of(toy / "toy.py") if not m.before.startswith("def")]
    assert {m.place for m in found} == {"Toy.forward"}
    assert [(m.operator, m.after) for m in found] == [
        ("compare", "if x <= 0"),
        ("compare", "if x >= 0"),
        ("constant", "if x < 1"),
        ("operator", "return x - factor * x - 0 * x"),
        ("operator", "return x + factor * x + 0 * x"),
        ("swap", "return factor * x - x + 0 * x"),
        ("operator", "return x - factor / x + 0 * x"),
        ("operator", "return x - factor * x + 0 / x"),
        ("constant", "return x - factor * x + 1 * x"),
    ]


def test_a_wrong_sign_is_killed_and_an_equivalent_change_survives(toy):
    """The rows that name the wiring judge the changed code, in a process for each mutant."""
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=toy, env={**os.environ, "PYTHONPATH": str(HERE)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killers = dict(json.loads(done.stdout.splitlines()[-1]))
    row = "test_toy.py::test_formula[toy(n=1)]"
    assert killers["return x + factor * x + 0 * x"] == row
    assert killers["return factor * x - x + 0 * x"] == row
    assert killers["return x - factor * x - 0 * x"] is None
    assert killers["def forward(self, x: int=-3, *, factor: float=-2.0)"] == row


def test_a_statement_of_super_may_be_deleted(toy):
    """What closes over its class stays alive without its only use."""
    base = "class Base:\n    def reset(self):\n        self.done = True\n"
    text = base + "class Toy(Base):\n    def reset(self):\n        super().reset()\n"
    (toy / "toy.py").write_text(text)
    made = {m.operator: m for m in mutants.mutants_of(toy / "toy.py") if m.place == "Toy.reset"}
    space = {}
    exec(compile(text, toy / "toy.py", "exec"), space)
    mutants.install(made["delete"], mutants.live_functions([toy / "toy.py"]))
    thing = space["Toy"]()
    thing.reset()
    assert not hasattr(thing, "done")


def test_every_wiring_has_mutants():
    """No class of the catalogue is passed over."""
    folder = HERE.parent / "addnorm" / "wirings"
    made = {m.place for path in folder.glob("*.py") for m in mutants.mutants_of(path)}
    ours = [c for c in catalogue().values() if c.__module__.startswith("addnorm.")]
    assert not [c.__name__ for c in ours if f"{c.__name__}.forward" not in made]
