"""Facts of a wiring: measured cost, diagram, BibTeX, Chinese; the pages are up to date."""

import re
import typing
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len

from addnorm import Wiring, register
from addnorm.contract import Drawing, Stack, catalogue, literal, options_of, parse_spec
from addnorm.cost import Polynomial, cost, measure, parameters
from addnorm.facts import WIDTH, all_facts, bibtex, chinese, draw, facts_of, references
from addnorm.models.layers import FeedForward
from addnorm.reports import catalogue as pages
from addnorm.reports.catalogue import markdown

ROOT = Path(__file__).parent.parent
OURS = {n: w for n, w in catalogue().items() if w.__module__.startswith("addnorm.")}
each_wiring = pytest.mark.parametrize("name", OURS)

# -- cost ----------------------------------------------------------------------------------------

# Parameters, FLOPs and traffic, counted by hand. A layer norm has 2 D parameters, 7 D FLOPs.
BY_HAND = {
    "plain": ("0", "0", "0"),
    "plain(norm=true)": ("2 D", "7 D", "2 D"),
    "residual": ("0", "D", "3 D"),
    "postnorm": ("2 D", "8 D", "3 D"),
    "prenorm": ("2 D", "8 D", "4 D"),
    "sandwich": ("4 D", "15 D", "4 D"),
    "gpas": ("2 D + 1", "10 D", "4 D"),
    "rezero": ("1", "2 D", "3 D"),
    "layerscale": ("3 D", "9 D", "4 D"),
    "droppath": ("2 D", "10 D", "4 D"),
    # W x + b is 2 D^2 + D; sigmoid, 1 - T, two products and a sum.
    "highway": ("D^2 + D", "2 D^2 + 6 D", "3 D"),
    "linear-shortcut": ("D^2", "2 D^2 + 2 D", "3 D"),
    "laurel(rank=4)": ("10 D", "25 D", "4 D"),  # 2 D + 8 D; 7 D + 16 D + 2 D
    "resi-dual": (None, None, "5 D"),
    # Static hyper-connections, n streams: 2 n D read, 2 n^2 D mix, n D write, n D sum; close n D
    # over 24 connections.
    "hyper(n=3, dynamic=false)": ("2 D + 15", "37.12 D", "8 D"),
}


@pytest.mark.parametrize("spec", BY_HAND)
def test_cost_is_what_one_counts_by_hand(spec):
    measured = cost(parse_spec(spec))
    found = str(measured.parameters), str(measured.flops), str(measured.traffic)
    assert all(e is None or e == f for e, f in zip(BY_HAND[spec], found, strict=True)), found


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("name", ["hyper", "mhc", "mhc-v4", "ihc", "krom", "gated-residual"])
def test_n_streams_move_2n_plus_2(name, n):
    """Each connection reads n streams, writes n, writes the branch's input and reads its output."""
    assert str(cost(parse_spec(f"{name}(n={n})")).traffic) == f"{2 * n + 2} D"


def test_attention_over_depth_moves_its_sources_and_one():
    """(S + 1) D with S = 1 ... 24 sources: 13.5 D on average."""
    assert str(cost(parse_spec("attnres")).traffic) == "13.5 D"


@each_wiring
def test_the_fit_holds_at_a_fourth_width(name):
    """Polynomials through three widths give exactly what is measured at another one."""
    spec = parse_spec(name)
    fitted, measured = cost(spec), measure(spec, 336)
    for polynomial, value in zip(vars(fitted).values(), measured, strict=True):
        assert polynomial.a * 336**2 + polynomial.b * 336 + polynomial.c == value
    assert parameters(spec) == fitted.parameters


@each_wiring
def test_parameters_are_those_of_a_stack(name):
    """The formula gives the parameters of an independently built stack at another width."""

    branches = [FeedForward(192, 8) for _ in range(24)]
    own = sum(p.numel() for b in branches for p in b.parameters())
    stack = Stack(branches, name, dim=192, parts=2)
    whole = sum(p.numel() for p in stack.parameters())
    assert parameters(parse_spec(name)).at(192) * 24 == pytest.approx(whole - own, abs=1e-6)


def test_a_width_fits_every_option():
    """m of frac must divide the width: the widths follow the options."""
    assert str(cost(parse_spec("frac(m=5)")).traffic) == "4 D"
    with pytest.raises(ValueError, match="m=65 of frac must be from 1 to 64"):
        cost(parse_spec("frac(m=65)"))


def test_measuring_leaves_the_random_state_and_the_threads_alone():
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        cost(parse_spec("dropout-shortcut"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_polynomial_goes_through_its_points_and_writes_itself():
    a, b, c = Fraction(3), Fraction(-5, 2), Fraction(7)
    fitted = Polynomial.through({x: a * x * x + b * x + c for x in (48, 96, 200)})
    assert fitted == Polynomial(a, b, c)
    assert fitted.at(10) == 282
    assert str(fitted) == "3 D^2 - 2.5 D + 7"
    written = {
        "0": (0, 0, 0), "D": (0, 1, 0), "1": (0, 0, 1), "-D^2 + 1": (-1, 0, 1),
        "4.08 D": (0, Fraction(98, 24), 0), "24 D^2 + 8 D + 3": (24, 8, 3),
        "0.0417 D^2 + 1299 D": (Fraction(1, 24), 1299, 0),
    }  # fmt: skip
    for text, coefficients in written.items():
        assert str(Polynomial(*map(Fraction, coefficients))) == text


# -- diagram -------------------------------------------------------------------------------------

PICTURES = {
    Drawing(): """
x ──┬── F ──(+)── x
    └────────┘""",
    Drawing(skip="none"): """
x ── F ── x""",
    Drawing(read="N", skip="none", after="act"): """
x ── N ── F ── act ── x""",
    Drawing(read="N", write="gamma"): """
x ──┬── N ── F ── gamma ──(+)── x
    └──────────────────────┘""",
    Drawing(skip="alpha", after="N"): """
x ──┬── F ─────(+)── N ── x
    └── alpha ──┘""",
    Drawing(read="h_pre, N", write="h_post", skip="H_res", stream="X"): """
X ──┬── h_pre, N ── F ── h_post ──(+)── X
    └─────────── H_res ────────────┘""",
    Drawing(after="N", stream="x, r"): """
x, r ──┬── F ──(+)── N ── x, r
       └────────┘""",
}


@pytest.mark.parametrize("drawing", PICTURES)
def test_pictures(drawing):
    assert draw(drawing) == PICTURES[drawing].strip("\n")


@each_wiring
def test_every_picture_fits_and_joins(name):
    """At most 100 columns; the skip path leaves below ┬ and arrives below +, with its label."""
    drawing = OURS[name].drawing
    lines = draw(drawing).splitlines()
    assert all(cell_len(line) <= 100 and line == line.rstrip() for line in lines)
    assert lines[0].startswith(f"{drawing.stream} ──")
    assert lines[0].endswith(f"── {drawing.stream}")
    if drawing.skip == "none":
        assert len(lines) == 1
        return
    above, below = lines
    assert above.index("┬") == below.index("└")
    assert above.index(f"({drawing.join})") + 1 == below.index("┘") == len(below) - 1
    assert drawing.skip in below


# -- facts ---------------------------------------------------------------------------------------


@each_wiring
def test_facts_come_from_the_class(name):
    facts, wiring = facts_of(name, brief=True), OURS[name]
    assert facts["name"] == facts["spec"] == name
    assert facts["family"] == wiring.__module__.split(".")[-1]
    assert facts["equation"] == wiring.equation
    assert facts["starts_as"] == wiring.at_start
    assert list(facts["options"]) == list(options_of(wiring))
    for option, stated in facts["options"].items():
        assert stated["value"] == stated["default"] == literal(options_of(wiring)[option].default)
        hint = typing.get_type_hints(wiring.__init__)[option]
        assert stated["choices"] == list(typing.get_args(hint))
    assert set(facts["cost"]) == {"parameters"}


@each_wiring
def test_the_source_is_in_the_bibliography(name):
    """The entry is that of the paper: the same arXiv number or address, and the year or before."""
    facts = facts_of(name, brief=True)
    number = re.search(r"arXiv:(\S+)|(github\S+)", facts["paper"])
    assert facts["bibtex"] in references()
    assert (number[1] or number[2]) in facts["bibtex"]
    assert facts["bibtex"].startswith("@")
    assert f"{{{facts['cite']}," in facts["bibtex"]


@each_wiring
def test_a_wiring_of_ours_has_a_chinese_text(name):
    """1 to 3 sentences; what else is translated replaces a fact with English words, none else."""
    texts = chinese(name)
    assert 1 <= texts["about"].count("。") <= 3
    assert texts["about"].endswith("。")
    assert set(texts) <= {"about", "equation", "starts_as", "ships"}
    facts = facts_of(name, brief=True)
    for fact in set(texts) - {"about"}:
        assert re.search(r"[\u3001-\u9fff，；：（）]", texts[fact]), fact
        assert texts[fact] != facts[fact]


def test_no_chinese_text_is_left_without_a_wiring():
    from addnorm.facts import _chinese

    assert set(_chinese()) == set(OURS)


def test_options_of_the_spec_are_honoured():
    two, four = facts_of("mhc(n=2)"), facts_of("mhc")
    assert two["spec"] == "mhc(n=2)"
    assert (two["options"]["n"]["value"], two["options"]["n"]["default"]) == ("2", "4")
    assert (two["options"]["n"]["least"], two["options"]["n"]["most"]) == (2, 16)
    assert two["cost"]["traffic"]["formula"] == "6 D"
    assert two["cost"]["traffic"][f"at_{WIDTH}"] == 6 * WIDTH
    assert four["cost"]["traffic"]["coefficients"] == [0, 10, 0]
    assert facts_of("hybridnorm", brief=True)["asks"] == {"qkv_norm": "true"}
    assert facts_of("admin", brief=True)["options"]["change"]["choices"][0] == "log"


def test_a_users_wiring_has_facts_too():
    """Family `own`, its docstring in place of a Chinese text, no entry in the bibliography."""

    @register
    class Mine(Wiring):
        """x <- x + F(x) | 2."""

        name = "mine"
        equation = "x <- x + F(x) | 2"
        paper = "none"
        year = 2026
        at_start = "x"
        stream_law = gradient_law = "sqrt"

        def __init__(self, branch, site, *, half: bool = True):
            super().__init__(branch, site)
            self.half = half
            self.reset_parameters()

        def forward(self, stream, context):
            return stream + self.branch(stream, context)

    facts = facts_of("mine")
    assert (facts["family"], facts["bibtex"], facts["cite"]) == ("own", None, None)
    assert facts["chinese"] == {}
    assert facts["cost"]["parameters"]["formula"] == "0"
    page = markdown([facts], "zh")
    assert "x <- x + F(x) | 2." in page
    assert "| `x <- x + F(x) \\| 2` |" in page
    assert bibtex("arXiv:2512.2488") is None


# -- pages ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts():
    return [f for f in all_facts() if f["family"] != "own"]


@pytest.mark.parametrize(("lang", "file"), [("en", "catalogue.md"), ("zh", "catalogue.zh-CN.md")])
def test_the_pages_are_up_to_date(facts, lang, file):
    """`make docs` writes them; a change of a class shows here."""
    written = (ROOT / "docs" / file).read_text(encoding="utf-8")
    assert written == markdown(facts, lang), "stale; run make docs"


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_page_shows_every_wiring_whole(facts, lang):
    page = markdown(facts, lang)
    for row in facts:
        section = page.split(f"\n### {row['name']}\n")[1].split("\n### ")[0]
        about = row["about"] if lang == "en" else row["chinese"]["about"]
        for part in (row["diagram"], about, row["cite"]):
            assert part in section
        assert all(c["formula"] in section for c in row["cost"].values())
        assert f"](#{row['name']})" in page


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_overview_has_the_laws_and_the_page_says_where_to_begin(facts, lang):
    """Each row its two laws in a word of its own; the names given as a beginning are wirings."""
    page = markdown(facts, lang)
    for row in facts:
        (line,) = re.findall(rf"^\| \[{re.escape(row['name'])}\]\(.*$", page, re.M)
        laws = [pages.LAWS[row[f"{what}_law"]][lang] for what in ("stream", "gradient")]
        assert re.split(r" (?<!\\)\| ", line)[3:5] == laws
    assert all(len({word[code] for word in pages.LAWS.values()}) == 5 for code in ("en", "zh"))
    begin = page.split("\n## ")[1]
    named = set(re.findall(r"`([a-z]+)`", begin)) & set(OURS)
    assert named == {
        *("prenorm", "postnorm", "deepnorm", "admin", "postact", "residual", "plain"),
        *("rezero", "skipinit", "layerscale", "hyper", "mhc"),
    }


def test_both_pages_have_the_same_shape(facts):
    """The same headings and tables in both languages, row by row and column by column."""

    def shape(page):
        levels = [len(level) for level in re.findall(r"^(#+) ", page, re.M)]
        return levels, [len(re.findall(r"(?<!\\)\|", r)) for r in re.findall(r"^\|.*$", page, re.M)]

    assert shape(markdown(facts, "en")) == shape(markdown(facts, "zh"))


def test_what_the_pages_name_in_the_code_exists(facts):
    """Options and files of the chapter "Not wirings", the laws, and the named starts."""
    from addnorm.branches import STARTS
    from addnorm.models.gpt import GPTConfig
    from addnorm.models.layers import AttentionConfig, FeedForwardConfig

    page = markdown(facts, "en").split("## Not wirings")[1].split("## What was")[0]
    for path in re.findall(r"`(addnorm/\S+)`", page):
        assert (ROOT / path).exists(), path
    for config in (AttentionConfig, FeedForwardConfig, GPTConfig):
        for option in re.findall(rf"`{config.__name__}\.(\w+)`", page):
            assert option in config.__dataclass_fields__, option
    assert all(row["start"] in STARTS for row in facts)
    assert {row["stream_law"] for row in facts} <= set(pages.WORDS)
