"""A wiring of a user's own: what it does wrong is said in one line, and a right one passes."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from addnorm import GPT, GPTConfig, Stack, xray
from addnorm.branches import Branch, Matrix
from addnorm.checking import checked
from addnorm.cli import main
from addnorm.contract import _CATALOGUE
from addnorm.facts import facts_of
from addnorm.plugins import load_plugins

DUO = '''
import torch
from torch import nn
from addnorm import Wiring, register


@register
class Duo(Wiring):
    """(x, m) <- (x + f + s m, d m + f): a momentum stream beside x."""

    name = "duo"
    equation = "x <- x + f + s m, m <- d m + f,  f = F(N(x))"
    paper = "mine"
    year = 2026
    at_start = "x + F(N(x))"
    final_norm = True
    stream_law = "sqrt"
    gradient_law = "constant"

    def __init__(self, branch, site, *, decay=0.9):
        super().__init__(branch, site)
        self.decay = decay
        self.norm_in = self.new_norm()
        self.mix = self.new_parameter(site.dim)

    def open(self, x):
        return x, torch.zeros_like(x)

    def close(self, stream):
        return stream[0]

    def forward(self, stream, context):
        x, m = stream
        f = self.branch(self.norm_in(x), context)
        return x + f + self.mix * m, self.decay * m + f

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.zeros_(self.mix)
'''
RETURN = "return x + f + self.mix * m, self.decay * m + f"
CALL = "f = self.branch(self.norm_in(x), context)"
OPEN = "    def open(self, x):\n        return x, torch.zeros_like(x)\n"
CLOSE = "    def close(self, stream):\n        return stream[0]\n"
PAIR = "a tuple of (2, 3, 8) and (2, 3, 8)"


@pytest.fixture(autouse=True)
def _catalogue_as_it_was():
    before = dict(_CATALOGUE)
    yield
    for name in _CATALOGUE.keys() - before.keys():
        del _CATALOGUE[name]


def define(*changes):
    """Run the text of a plug-in with some of it replaced."""
    text = DUO
    for old, new in changes:
        assert text.count(old) >= 1, old
        text = text.replace(old, new)
    exec(compile(text, "duo.py", "exec"), {"__name__": "duo"})


class Scaled(Branch):
    """w x, whose matrix has a role."""

    def __init__(self, width=8):
        super().__init__()
        self.w = nn.Parameter(torch.empty(width, width))

    def forward(self, x, context):
        return x @ self.w

    def matrices(self):
        return [Matrix("out", self.w)]


def stack(branches=None):
    return Stack(branches or [Scaled() for _ in range(3)], "duo", dim=8)


def run(model, x=None):
    with checked(model):
        return model(torch.randn(2, 3, 8) if x is None else x)


def said(call, *given):
    with pytest.raises(ValueError, match=" ") as caught:
        call(*given)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- facts and options -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('    stream_law = "sqrt"\n', "", "the wiring Duo does not state stream_law"),
        ('"sqrt"', '"sqr"', "unknown stream_law 'sqr' of the wiring Duo; did you mean 'sqrt'?"),
        ("year = 2026", 'year = "2026"', "year='2026' of the wiring Duo must be a whole number"),
        ("year = 2026", "year = True", "year=True of the wiring Duo must be a whole number"),
        ('"mine"', "3", "paper=3 of the wiring Duo must be a word"),
        ('"duo"', '"Duo Stream"', "the name 'Duo Stream' of the wiring Duo must be letters"),
        ('"duo"', '"prenorm"', "the wiring 'prenorm' exists already; choose another name"),
        (
            "year = 2026",
            'year = 2026; expected = frozenset({"vanishes"})',
            "unknown finding 'vanishes' in expected of the wiring Duo",
        ),
        ("year = 2026", 'year = 2026; expected = "exploding"', "must be a set of findings"),
        ("year = 2026", 'year = 2026; start = "gpt"', "unknown start 'gpt' of the wiring Duo"),
        ("year = 2026", 'year = 2026; drawing = "x"', "drawing='x' of the wiring Duo must be a"),
        ("year = 2026", 'year = 2026; limits = {"dec": (0, 1)}', "did you mean 'decay'?"),
        ("decay=0.9", "decay", "the option decay of Duo has no default; write decay=default"),
        ("decay=0.9", "decay=None", "the option decay=None of Duo must be a number, true, false"),
        ("decay=0.9", "decay=[0.9]", "the option decay=[0.9] of Duo must be a number, true"),
        ("decay=0.9", "decay: list = 1", "the option decay=1 of Duo must be a number, true"),
        ("*, decay", "decay", "its options behind the star; it takes self, branch, site, decay"),
        (
            "*, decay=0.9",
            "**options",
            "Duo.__init__ must be (self, branch, site, *, option=default)",
        ),
        ("decay=0.9", "decay: 'Size' = 1", "the annotations of Duo.__init__ cannot be read"),
        ("def forward(", "def forwards(", "does not define forward(self, stream, context)"),
        ("(self, stream, context)", "(self, s)", "Duo.forward must be forward(self, stream, con"),
        ("(self, stream):", "(self):", "Duo.close must be close(self, stream)"),
        ("(Wiring)", "(nn.Module)", "Duo is no subclass of Wiring"),
    ],
)
def test_a_wrong_fact_is_refused(old, new, message):
    assert message in said(define, (old, new))
    assert "duo" not in _CATALOGUE


def test_a_wiring_may_be_defined_again_and_expect_a_finding():
    define()
    define(("0.9", "0.8"), ("year = 2026", "year = 2026; expected = {'dead-branch'}"))
    assert facts_of("duo", brief=True)["options"]["decay"]["default"] == "0.8"


def test_a_name_of_ours_is_refused_before_ours_are_loaded(tmp_path):
    """Whatever the load order: the plug-in asks for the catalogue first."""
    path = tmp_path / "taken.py"
    path.write_text(DUO.replace('"duo"', '"prenorm"'), encoding="utf-8")
    code = "import sys; from addnorm.plugins import load_plugins; load_plugins([sys.argv[1]])"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stderr.endswith(
        "ValueError: the wiring 'prenorm' exists already; choose another name\n"
    )


# -- the start -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "        nn.init.zeros_(self.mix)\n",
            "",
            "the parameter mix of the wiring duo has no finite start; reset_parameters must call "
            "super().reset_parameters(), then fill what is its own",
        ),
        (
            "        super().reset_parameters()\n",
            "",
            "reset_parameters of the wiring duo does not start its branch; call "
            "super().reset_parameters() in it",
        ),
        ("super().__init__(branch, site)", "pass", "the wiring duo failed: AttributeError: "),
    ],
)
def test_a_start_that_is_forgotten_is_refused(old, new, message):
    define((old, new))
    assert message in said(stack)


def test_on_the_meta_device_a_start_is_not_looked_at():
    define()
    with torch.device("meta"):
        assert all(p.is_meta for p in stack().parameters())


# -- a forward pass --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (CALL, f"{CALL} + self.branch(x, context)", "must call self.branch once; it did so 2 t"),
        (CALL, "f = self.norm_in(x)", "must call self.branch once; it did so 0 times"),
        (
            RETURN,
            "x += f\n        return x, m",
            "forward of the wiring duo at connection 0 ch",
        ),
        (CALL, f"x.mul_(0.5)\n        {CALL}", "changes the stream in place; make a new tensor"),
        (RETURN, "m", "must return a tensor (..., 8) or a tuple of them; it returned NoneType"),
        (RETURN, "return x + f", f"must return the stream as it took it, {PAIR}; it returned a te"),
        (RETURN, "return x.mean(1), m", "it returned a tuple of (2, 8) and (2, 3, 8)"),
        (RETURN, "return x[..., :-1], m", "it returned a tuple of (2, 3, 7) and (2, 3, 8)"),
        (CLOSE, "", "duo has several streams and must define close(stream)"),
        (CLOSE, CLOSE.replace("[0]", ""), "close of the wiring duo at connection 2 must turn"),
        (CLOSE, CLOSE.replace("[0]", "[0][0]"), "into a tensor (2, 3, 8); it returned a tensor (3"),
        (OPEN, OPEN.replace("torch.zeros_like(x)", "None"), "open of the wiring duo at connection"),
        (OPEN, "", "must call self.branch(x, context) with a tensor like (2, 3, 8); x was"),
        (", context)\n", ")\n", "must call self.branch(x, context) with the context; it was None"),
        ("self.decay = decay", "self.dec = decay", "failed: AttributeError: 'Duo' object has no"),
    ],
)
def test_a_wrong_pass_is_refused(old, new, message):
    define((old, new))
    model = stack()
    x = torch.randn(2, 3, 8)
    assert message in said(run, model, x)
    assert not [m for m in model.modules() if {"open", "forward", "close"} & vars(m).keys()]


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (nn.Linear(8, 4), "Linear returns (2, 3, 4) for (2, 3, 8); a branch of a stack must"),
        (nn.LSTM(8, 8), "LSTM returns tuple for (2, 3, 8); a branch of a stack must return one"),
    ],
)
@pytest.mark.parametrize("wiring", ["duo", "prenorm"])
def test_a_branch_of_another_shape_is_refused(branch, message, wiring):
    """Under every wiring, ours too."""
    define()
    assert message in said(Stack([branch], wiring, dim=8), torch.randn(2, 3, 8))


def test_a_branch_of_the_users_own_is_held_to_its_shape():
    define()
    branch = Scaled()
    branch.forward = lambda x, context: x[..., :4]
    message = said(run, stack([branch]))
    assert "the branch of the wiring duo at connection 0 must return a tensor (2, 3, 8)" in message
    branch.forward = lambda x, context: x.mul_(2)
    assert "changes the input" in said(run, stack([branch]))


def test_an_error_of_the_users_names_the_place(tmp_path):
    """The last line of the user's own file, not of ours or torch's."""
    path = tmp_path / "duo.py"
    path.write_text(DUO.replace(RETURN, "return self.norm_in(x[..., :3]), m"), encoding="utf-8")
    load_plugins([str(path)])
    message = said(run, stack())
    assert message.startswith(f"forward of the wiring duo at connection 0 on {PAIR} failed: Runt")
    line = 1 + path.read_text(encoding="utf-8").splitlines().index(
        "        return self.norm_in(x[..., :3]), m"
    )
    assert message.endswith(f"({path} line {line})")


def test_a_right_wiring_passes_bitwise_and_is_left_as_it_was():
    define()
    model, x = stack(), torch.randn(2, 3, 8)
    plain = model(x)
    with checked(model):
        assert torch.equal(model(x), plain)
        assert torch.equal(model(x), plain)  # counted anew in every pass
    assert not [m for m in model.modules() if {"open", "forward", "close"} & vars(m).keys()]
    ours = Stack([Scaled()], "prenorm", dim=8)
    with checked(ours):
        assert "forward" not in vars(ours.connections[0])  # ours cost nothing


# -- where it is said ------------------------------------------------------------------------------


def test_xray_training_and_the_catalogue_say_it(capsys, tmp_path, monkeypatch):
    """Every entry says the same; the X-ray takes plug-ins too, for a function that needs them."""
    monkeypatch.chdir(tmp_path)
    twice = DUO.replace(CALL, f"{CALL} + self.branch(x, context)")
    (tmp_path / "twice.py").write_text(twice, encoding="utf-8")
    (tmp_path / "net.py").write_text(
        textwrap.dedent("""
        import torch
        from torch import nn
        from addnorm import Stack

        def model():
            return Stack([nn.Linear(8, 8) for _ in range(3)], "duo", dim=8), torch.randn(4, 8)
        """),
        encoding="utf-8",
    )
    small = ["--wiring", "duo", "--depth", "2", "--dim", "8", "--heads", "2", "--steps", "2"]
    wanted = "forward of the wiring duo at connection 0 must call self.branch once; it did so 2"
    for argv in (["xray", "net.py:model"], ["wirings", "duo"], ["train", *small, "--out", "r"]):
        assert main([*argv, "--plugins", "twice.py"]) == 2
        error = capsys.readouterr().err
        assert wanted in error
        assert "defect" not in error


def test_xray_of_a_right_wiring_is_not_changed_by_the_look():
    define()
    model = GPT(GPTConfig(depth=2, dim=8, heads=2, context=8, vocab_size=11, wiring="duo"))
    ids = torch.randint(11, (2, 8))
    first, again = xray(model, ids), xray(model, ids)
    assert first.to_dict() == again.to_dict()
    assert len(first.connections) == 4


def test_no_diagram_and_no_verdict_that_nobody_stated():
    define()
    facts = facts_of("duo")
    assert (facts["diagram"], facts["verified"]) == ("", None)
    drawn = 'from addnorm.contract import Drawing; drawing = Drawing("N")'
    define(("year = 2026", f"year = 2026; {drawn}"))
    assert "N ── F" in facts_of("duo")["diagram"]
    assert facts_of("prenorm", brief=True)["verified"] is True


def test_a_plug_in_that_does_not_import_says_where(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import torch\nimport nonsense\n", encoding="utf-8")
    assert said(load_plugins, [str(path)]).endswith(
        f"broken.py failed: ModuleNotFoundError: No module named 'nonsense' ({path} line 2)"
    )
