"""Import directions, quick imports, and the public names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import addnorm

PACKAGE = Path(addnorm.__file__).parent

# Who may import whom, inside addnorm. A folder stands for its files.
ALLOWED = {
    "branches": set(),
    "contract": {"branches", "plugins"},
    "checking": {"branches", "contract", "plugins"},
    "groups": {"contract"},
    "cost": {"branches", "checking", "contract"},
    "facts": {"contract", "cost"},
    "files": set(),
    "plugins": set(),
    "wirings": {"branches", "contract"},
    "models": {"branches", "contract", "groups", "norms"},
    "interop": {"contract", "files", "models"},
    "generation": {"branches", "models"},
    "twins": {"branches", "contract", "models"},
    "callbacks": {"probe"},
    "norms": set(),
    "data": {"files"},
    "training": {"files"},
    "probe": {"branches", "checking", "contract", "files"},
    "reports": {"files", "probe.trace"},
    "rewiring": {"contract"},
    "runs": {
        "branches", "checking", "data", "files", "generation", "models", "plugins", "probe",
        "reports", "training",
    },
    "comparison": {
        "contract", "norms", "data", "files", "models", "plugins", "probe", "reports", "training",
    },
    "targets": {"data", "files", "interop", "plugins", "probe", "runs", "training"},
    "studies": {
        "branches", "contract", "cost", "data", "files", "models", "norms", "probe", "training",
        "twins",
    },
    "cli": {
        "comparison", "contract", "data", "facts", "files", "models", "plugins", "probe", "reports",
        "runs", "studies", "targets", "training",
    },
}  # fmt: skip
# Imports inside a function that go against the arrows, each with its reason.
EXCEPTIONS = {
    ("contract", "checking"),  # what a user registers or builds is held to the contract
    ("checking", "probe"),  # the findings that a wiring expects are those of the X-ray
    ("contract", "wirings"),  # a spec string finds its class in the catalogue
    ("probe", "reports"),  # Trace.save writes a page where the name ends in .html
}
TORCH_FREE = ("data", "files", "reports", "training.config", "probe.trace", "cli", "plugins")


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(p for p in parts if p != "__init__")
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module == "addnorm" or not node.module.startswith("addnorm")
            yield from (f"{node.module}.{a.name}" if whole else node.module for a in node.names)


def test_arrows_point_the_way_they_should():
    wrong = []
    for name, tree in modules():
        home = name.split(".")[0]
        if home in ("", "__main__"):
            continue
        for target in imported(tree):
            if not target.startswith("addnorm.") or target == "addnorm.__version__":
                continue
            inside = target.removeprefix("addnorm.")
            other = inside.split(".")[0]
            allowed = other == home or other in ALLOWED[home] or inside in ALLOWED[home]
            if not allowed and (home, other) not in EXCEPTIONS:
                wrong.append(f"{name} imports {inside}")
    assert not wrong


def test_training_and_probe_know_no_model_and_no_wiring_by_name():
    names = {"prenorm", "postnorm", "deepnorm", "rezero", "GPT"}
    for name, tree in modules():
        if name.split(".")[0] in ("training", "probe"):
            constants = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
            used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
            assert not names & ({c for c in constants if isinstance(c, str)} | used), name


@pytest.mark.parametrize("name", ["", *TORCH_FREE])
def test_imports_without_torch(name):
    module = f"addnorm.{name}".rstrip(".")
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_and_version_do_not_import_torch():
    for flag in ("--help", "--version"):
        code = (
            "import sys; from addnorm.cli import main; main([sys.argv[1]]); "
            "sys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code, flag]).returncode == 0


def test_public_names_are_sorted_and_all_there():
    constants = [n for n in addnorm.__all__ if n.isupper()]
    classes = [n for n in addnorm.__all__ if n[0].isupper() and not n.isupper()]
    functions = [n for n in addnorm.__all__ if n.islower()]
    assert addnorm.__all__ == sorted(constants) + sorted(classes) + sorted(functions)
    for name in addnorm.__all__:
        assert getattr(addnorm, name).__name__ == name
    assert set(addnorm.__all__) == {n for names in addnorm._HOMES.values() for n in names}
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = addnorm.nothing
