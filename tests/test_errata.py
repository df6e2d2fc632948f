"""The errata of the five documents: data, proofs and their counterparts, pages; glossary, path."""

import fnmatch
import io
import re
import tomllib
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import addnorm.studies
from addnorm import twins
from addnorm.contract import catalogue
from addnorm.models import residual_layer
from addnorm.reports.errata import errata_markdown, print_errata, write_docs
from addnorm.reports.glossary import glossary_markdown, reading_markdown
from addnorm.studies import all_studies
from addnorm.studies.checks import CHECKS, prove
from addnorm.studies.checks.doc000 import DRAWN
from addnorm.studies.checks.doc003 import PRINTED
from addnorm.studies.errata import bibliography, check_errata, load_errata
from addnorm.studies.texts import load_glossary, load_reading

ROOT = Path(addnorm.studies.__file__).parent.parent.parent
LINES = {"000": 122, "001": 284, "002": 150, "003": 148, "004": 160}  # of the documents
SEVERITIES = {
    "A": "01 02 03 04 05 06 09 14 18 19 23 25 29 31 33 41 42 43 46",
    "B": "16 26 27 28 36 37 38 39 40",
    "C": "07 08 10 11 12 17 32 34 47",
    "D": "13 15 20 21 22 24 30 35 44 45",
}
PLACES = {
    "000": "03 16 17 18 19 20 21 22",
    "001": "01 02 05 06 07 08 09 10 11 12 13 14 15 47",
    "002": "04 23 24 25 26 27 28 29 30 31",
    "003": "32 33 34 35 36",
    "004": "37 38 39 40 41 42 43 44 45 46",
}
# Names of `addnorm study`, whether the study is there yet or not.
STUDIES = {
    "ST-00": "arithmetic", "ST-01": "signal", "ST-02": "plus-one", "ST-03": "degradation",
    "ST-04": "vanishing", "ST-05": "shortcuts", "ST-06": "convergence", "ST-07": "lesions",
    "ST-08": "norm-order", "ST-09": "shattering", "ST-10": "anatomy", "ST-11": "landscape",
    "ST-12": "skip-norm", "ST-13": "ladder", "ST-14": "scaling", "ST-15": "identity",
    "ST-16": "curse", "ST-17": "rank-collapse", "ST-18": "layernorm", "ST-19": "cost",
    "ST-20": "clinic", "ST-21": "gradient-table", "ST-31": "streams",
}  # fmt: skip
CHINESE = re.compile("[\u4e00-\u9fff]")
both = pytest.mark.parametrize("lang", ["en", "zh"])


@pytest.fixture(scope="module")
def errata():
    return load_errata()


@pytest.fixture(scope="module")
def rows():
    return check_errata({})


def ids(table):
    return {f"E{number}": key for key, numbers in table.items() for number in numbers.split()}


# -- the data ------------------------------------------------------------------------------------


def test_the_47_errata_have_their_severity_and_document(errata):
    assert sorted(e.id for e in errata) == [f"E{i:02}" for i in range(1, 48)]
    assert {e.id: e.severity for e in errata} == ids(SEVERITIES)
    assert {e.id: e.document for e in errata} == ids(PLACES)


def test_every_line_lies_in_its_document_and_spans_run_forward(errata):
    for erratum in errata:
        places = [f"{erratum.document}:{at}" for at in erratum.lines]
        for place in (*places, *erratum.also):
            document, span = place.split(":")
            first, *last = map(int, span.split("-"))
            assert 1 <= first < (last or [first + 1])[0] <= LINES[document] + 1, place
        assert len(set(places)) == len(places)
        assert all(place[:3] != erratum.document for place in erratum.also)
        assert list(erratum.also) == sorted(erratum.also, key=lambda p: (p[:3], int(p[4:])))


def test_errata_come_in_the_order_of_documents_and_lines(errata):
    order = [(e.document, e.line) for e in errata]
    assert order == sorted(order)


def test_texts_are_in_both_languages(errata):
    """Chinese in the Chinese text only, but for the name that E35 is about; whole sentences."""
    for erratum in errata:
        for words in (erratum.says, erratum.right):
            assert CHINESE.search(words.zh), erratum.id
            assert words.zh.endswith("。"), erratum.id
            assert words.en.endswith("."), erratum.id
            assert erratum.id == "E35" or not CHINESE.search(words.en), erratum.id


def test_every_check_and_every_source_is_used(errata):
    """A check belongs to one erratum; our bibliography holds what is cited and nothing else."""
    assert sorted(e.check for e in errata if e.proof == "run") == sorted(CHECKS)
    cited = {key for e in errata for key in e.source}
    own = set(re.findall(r"^@\w+\{(\w+),", (studies_folder() / "references.bib").read_text(), re.M))
    assert cited <= set(bibliography())
    assert own <= cited


def test_a_study_that_is_there_knows_its_claim(errata):
    """Where the study is written, it has the claim, of this document."""
    claims = {(s.id, c.id): c.document for s in all_studies() for c in s.claims}
    there = {s.id for s in all_studies()}
    for erratum in errata:
        assert not erratum.study or erratum.study in STUDIES
        if erratum.study in there:
            document = claims.get((erratum.study, erratum.claim))
            assert document in {erratum.document, *(p[:3] for p in erratum.also)}, erratum.id


def test_names_of_studies_are_the_ones_that_exist():
    for study in all_studies():
        assert STUDIES.get(study.id, study.name) == study.name


GOOD = """
[[erratum]]
id = "E01"
severity = "A"
document = "001"
lines = [33, "35-40"]
says = { en = "a", zh = "甲" }
right = { en = "b", zh = "乙" }
proof = "text"
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('severity = "A"', 'severity = "E"', "E01: 'E' is none of A, B, C, D"),
        ('"001"', '"005"', "E01: '005' is none of 000, 001, 002, 003, 004"),
        ('"text"', '"belief"', "E01: 'belief' is none of run, study, citation, text"),
        ('"text"', '"run"', "E01: a proof of kind run needs its lines and its proof"),
        ('"text"', '"run"\ncheck = "gone"', "a proof of kind run needs its lines and its proof"),
        ('"text"', '"study"', "E01: a proof of kind study needs its lines and its proof"),
        ('"text"', '"citation"', "E01: a proof of kind citation needs its lines and its proof"),
        ('"text"', '"text"\nstudy = "ST-01"', "E01: study and claim belong together"),
        ('[33, "35-40"]', "[]", "E01: a proof of kind text needs its lines and its proof"),
        ('[33, "35-40"]', '["33 to 40"]', "'001:33 to 40' is not a document and a line"),
        ('"text"', '"text"\nalso = ["4:9"]', "E01: '4:9' is not a document and a line"),
        (', zh = "乙"', "", "E01: right needs en and zh"),
        ('proof = "text"', "", "E01: lacks proof"),
        ('proof = "text"', 'proof = "text"\nproven = true', "E01: has the unknown proven"),
        ("\n[[erratum]]", GOOD + "\n[[erratum]]", "E01: stands twice"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path, old, new, message):
    path = tmp_path / "errata.toml"
    path.write_text(GOOD, encoding="utf-8")
    (erratum,) = load_errata(path)
    assert (erratum.line, erratum.lines) == (33, ("33", "35-40"))
    assert old in GOOD
    path.write_text(GOOD.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_errata(path)


# -- the proofs ----------------------------------------------------------------------------------


def gaussian_ranks(x):
    """Return each row with its values replaced by the normal quantiles of their ranks."""
    ranks = x.argsort(-1).argsort(-1) + 0.5
    return torch.special.ndtri(ranks / x.shape[-1])


def neighbours(x):
    """Return each token plus the one before it: what lies further back is out of reach."""
    return x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


# The counterpart that has not the error: with it the check must not hold.
HEALTHY = {
    "guarantee": [{"branch": lambda x: 0.5 * x}],
    "slope_below_one": [{"activation": "sigmoid", "start": "xavier"}],
    "token_reach": [{"layer": neighbours}],
    "missing_edge": [{"edges": (*DRAWN[:-1], ("add 1", "add 2"))}],
    "bracket": [{"jacobian": torch.ones(8, 8, dtype=torch.float64) + torch.eye(8).double()}],
    "path_sum": [{"activation": lambda x: x}],
    "bar_labels": [{"bars": ((100, 0), (5, 28), (1, 42), (0, 56))}],
    "shortest_path": [{"named": 8}],
    "chart_bars": [{"bars": (16, 7, 7, 4)}, {"bars": [16, 7, 6, 3]}],
    "identity_matrix": [{"first": torch.eye(4).double(), "second": torch.eye(4).double()}],
    "drawn_blocks": [{"residual": ("weights", "activation", "weights", "add", "activation")}],
    "explosion": [{"wiring": "rezero"}, {"wiring": "prenorm"}],
    "depth_not_attention": [{"skip": True}],
    "one_skip": [{"layer": twins.TwoSkips}],
    "five_forms": [{"forms": {"one": nn.LayerNorm(16), "same": nn.LayerNorm(16)}}],
    "norm_axis": [{"norm": nn.LayerNorm(16)}],
    "batch_axis": [{"layer": twins.Mixer}],
    "mask_keyword": [{"layer": twins.AttnMaskKeyword}],
    "stream_dropout": [{"layer": twins.BranchDropout}],
    "batch_or_data": [{"norm": nn.LayerNorm}],
    "monotone": [{"gradients": [0.1, 0.2, 0.3, 0.4, 0.5]}],
    "confounded": [{"with_skip": "plain"}],
    "two_formulas": [{"second": PRINTED[0]}, {"first": PRINTED[1]}],
    "accumulates": [{"listing": twins.gradients}],
    "inplace": [{"block": residual_layer.ResidualBlock}],
    "biased_variance": [{"norm": residual_layer.LayerNorm}],
    "doubled": [{"layer": residual_layer.ResidualLayer}],
    "undefined": [{"names": ("MultiheadAttention", "Linear")}],
    "parameters_added": [{"wiring": "highway"}],
    "additions": [{"channels": (64, 128)}],
    "per_neuron": [{"norm": nn.LayerNorm(16)}],
    "skewness": [{"norm": gaussian_ranks}],
    "learned_shortcut": [{"wiring": "linear-shortcut"}],
}


def test_every_check_has_a_counterpart():
    assert HEALTHY.keys() == CHECKS.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_holds_for_what_the_document_has(name):
    """With any seed; the evidence stands in both languages."""
    for seed in range(3):
        torch.manual_seed(seed)
        proof = CHECKS[name]()
        assert proof.holds, proof.evidence.en
    assert CHINESE.search(proof.evidence.zh)
    assert proof.evidence.en.endswith(".")
    assert proof.evidence.zh.endswith("。")
    assert not CHINESE.search(proof.evidence.en)


@pytest.mark.parametrize(("name", "subject"), [(n, s) for n, ss in HEALTHY.items() for s in ss])
def test_a_check_does_not_hold_for_what_is_right(name, subject):
    proof = CHECKS[name](**subject)
    assert not proof.holds, proof.evidence.en


# Numbers and words that the evidence must contain, worked out by hand or printed in a document.
SHOWN = {
    "bracket": ["(0.9)^10 = 0.35", "(0.5)^10 = 0.00098"],
    "bar_labels": ["12 % and 5.23 % at n = 28", "0.274 % at n = 56", "3 % 33 layers"],
    "shortest_path": ["3, 2, 2, 1, 2, 1, 1, 0", "Path 8 is the shortest", "3 paths"],
    "chart_bars": ["rounded 16, 7, 7, 4", "truncated 16, 7, 6, 3"],
    "missing_edge": ["add 1 → norm 2", "single input: add 2"],
    "token_reach": ["3 blocks", "8 tokens"],
    "mask_keyword": ["unexpected keyword argument 'mask'"],
    "monotone": ["0.000202, 0.00012", "layers.0 > layers.1."],
    "confounded": ["factor of 1100", "12.6", "0.061 to 0.767", "0.040 and 0.167"],
    "accumulates": ["2 times"],
    "inplace": ["modified by an inplace operation"],
    "biased_variance": ["0.7071 (D = 2), 0.9354 (D = 8), 0.9922 (D = 64)", "NaN"],
    "additions": ["0.09%", "4,718,592"],  # 64 / 73,728; 8 x 8 positions x 64 x 2 x 9 x 64
    "stream_dropout": ["0.9^12 = 28%"],
    "drawn_blocks": ["2 in the plain row, 1 in"],
}


@pytest.mark.parametrize("name", SHOWN)
def test_the_evidence_shows_the_numbers(name):
    evidence = prove(name).evidence.en
    assert all(part in evidence for part in SHOWN[name]), evidence


def test_a_proof_repeats_itself_and_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    assert prove("bracket") == prove("bracket")
    assert torch.equal(torch.random.get_rng_state(), before)


# -- how each came out ---------------------------------------------------------------------------


def test_a_study_beside_a_citation_is_told_and_does_not_decide():
    for verdict, told in (("INCONCLUSIVE", "inconclusive"), ("SUPPORTED", "supported")):
        (row,) = (r for r in check_errata({("ST-05", "2.15"): verdict}) if r["id"] == "E29")
        assert row["status"] == "holds"
        assert row["evidence"]["en"] == (
            f"As the sources say. Study ST-05 (shortcuts), the claim at 002:145: {told}."
        )


def test_without_verdicts_only_the_studies_are_open(errata, rows):
    assert [row["id"] for row in rows] == [e.id for e in errata]
    status = {row["id"]: row["status"] for row in rows}
    open_ones = {name for name, value in status.items() if value == "not run"}
    assert open_ones == {"E01", "E06", "E09", "E18", "E19", "E46"}
    assert all(value == "holds" for name, value in status.items() if name not in open_ones)
    assert all(row["evidence"]["en"] and row["evidence"]["zh"] for row in rows)


@pytest.mark.parametrize(
    ("verdict", "status", "en", "zh"),
    [
        ("REFUTED", "holds", "refuted", "被否定"),
        ("SUPPORTED", "fails", "supported", "得到支持"),
        ("INCONCLUSIVE", "inconclusive", "inconclusive", "不能断定"),
        ("", "not run", "not run yet", "尚未运行"),
    ],
)
def test_a_study_decides_by_the_verdict_on_its_claim(errata, verdict, status, en, zh):
    verdicts = {("ST-04", "1.29"): "REFUTED"} | ({("ST-04", "1.10"): verdict} if verdict else {})
    (row,) = check_errata(verdicts, [e for e in errata if e.id == "E01"])
    assert row["status"] == status
    assert row["evidence"]["en"] == f"Study ST-04 (vanishing), the claim at 001:33: {en}."
    assert row["evidence"]["zh"] == f"实验 ST-04（vanishing），001:33 的论断：{zh}。"


def test_the_verdict_of_a_further_study_is_told_and_decides_nothing(errata):
    (row,) = check_errata({("ST-02", "1.23"): "SUPPORTED"}, [e for e in errata if e.id == "E02"])
    assert row["status"] == "holds"
    assert row["evidence"]["en"].endswith(
        "Study ST-02 (plus-one), the claim at 001:149: supported."
    )
    assert row["evidence"]["zh"].endswith("实验 ST-02（plus-one），001:149 的论断：得到支持。")


def test_a_check_that_does_not_hold_fails(errata, monkeypatch):
    healthy = lambda: CHECKS_BEFORE["one_skip"](twins.TwoSkips)  # noqa: E731
    CHECKS_BEFORE = dict(CHECKS)
    monkeypatch.setitem(CHECKS, "one_skip", healthy)
    (row,) = check_errata({}, [e for e in errata if e.id == "E23"])
    assert row["status"] == "fails"


def test_a_citation_needs_every_source_in_the_bibliography(tmp_path):
    path = tmp_path / "errata.toml"
    text = GOOD.replace('"text"', '"citation"\nsource = ["he2015deep", "nobody1900nothing"]')
    path.write_text(text, encoding="utf-8")
    (row,) = check_errata({}, load_errata(path))
    assert row["status"] == "fails"
    assert row["evidence"]["en"] == "Not in the bibliography: nobody1900nothing."
    path.write_text(text.replace(', "nobody1900nothing"', ""), encoding="utf-8")
    (row,) = check_errata({}, load_errata(path))
    assert row["status"] == "holds"
    assert row["sources"] == [
        "He et al. 2015, Deep Residual Learning for Image Recognition, arXiv:1512.03385"
    ]


@pytest.mark.parametrize(
    ("key", "cited"),
    [
        ("hochreiter1997long",
         "Hochreiter and Schmidhuber 1997, Long Short-Term Memory, Neural Computation"),
        ("bishop1995neural",
         "Bishop 1995, Neural Networks for Pattern Recognition, Oxford University Press"),
        ("simpx2025buildyourownllm",
         "simpx 2025, build your own LLM, https://github.com/simpx/buildyourownllm"),
        ("balduzzi2017shattered",
         "Balduzzi et al. 2017, The Shattered Gradients Problem: If resnets are the answer, then "
         "what is the question?, arXiv:1702.08591"),
    ],
)  # fmt: skip
def test_the_bibliography_cites(key, cited):
    assert bibliography()[key] == cited


def test_no_citation_keeps_marks_of_bibtex():
    for text in bibliography().values():
        assert not re.search(r"[{}\\\n]", text)


# -- pages ---------------------------------------------------------------------------------------


@both
def test_the_page_has_every_erratum_whole(rows, lang):
    page = errata_markdown(rows, lang)
    assert page.endswith("\n")
    assert not page.endswith("\n\n")
    for row in rows:
        section = page.split(f"\n### {row['id']}\n")[1].split("\n### ")[0].split("\n## ")[0]
        for part in (row["says"][lang], row["right"][lang], row["evidence"][lang]):
            assert part in section
        for place in (*row["lines"], *row["also"], *row["sources"]):
            assert place in section
        assert f"](#{row['id'].lower()})" in page
    opened = "## Document " if lang == "en" else "## 文档 "
    assert re.findall(rf"^{opened}(\d+)", page, re.M) == list(LINES)


@both
def test_the_terminal_lists_every_erratum_in_order(rows, lang):
    file = io.StringIO()
    print_errata(Console(file=file, width=150), list(reversed(rows)), lang)
    text = file.getvalue()
    assert re.findall(r"^(E\d\d) ", text, re.M) == [row["id"] for row in rows]
    assert ("47 errata: holds 41, not run yet 6." if lang == "en" else "共 47 条：成立 41") in text


def test_both_languages_have_the_same_shape(rows):
    def shape(page):
        return re.findall(r"^#+ ", page, re.M), [
            len(re.findall(r"(?<!\\)\|", line)) for line in re.findall(r"^\|.*$", page, re.M)
        ]

    assert shape(errata_markdown(rows, "en")) == shape(errata_markdown(rows, "zh"))
    for write, given in ((glossary_markdown, load_glossary()), (reading_markdown, load_reading())):
        assert shape(write(given, "en")) == shape(write(given, "zh"))


def test_the_pages_in_docs_are_up_to_date(rows, tmp_path):
    """Glossary and path to the letter; of the errata what is said, for verdicts may have come."""
    for path in write_docs(tmp_path, rows, load_glossary(), load_reading()):
        kept = (ROOT / "docs" / path.name).read_text(encoding="utf-8")
        fresh = path.read_text(encoding="utf-8")
        if path.name.startswith("errata"):
            label = "证明" if "zh" in path.name else "Proof"
            told = re.compile(rf"^(\*\*{label}\*\*.*|\|.*|47 errata.*|共 47 条.*)$", re.M)
            kept, fresh = told.sub("", kept), told.sub("", fresh)
        assert kept == fresh, f"{path.name} is stale: write_docs writes it"


@pytest.mark.parametrize("suffix", ["", ".zh-CN"])
def test_links_between_the_pages_lead_somewhere(suffix):
    for name in ("errata", "glossary", "reading"):
        page = (ROOT / "docs" / f"{name}{suffix}.md").read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\(([\w.-]*)#?([\w-]*)\)", page):
            other = ROOT / "docs" / target if target else ROOT / "docs" / f"{name}{suffix}.md"
            text = other.read_text(encoding="utf-8")
            assert not anchor or f"\n### {anchor}\n" in text.replace("### E", "### e"), anchor


# -- glossary and reading path -------------------------------------------------------------------


def test_the_glossary_is_in_both_languages():
    entries = load_glossary()
    assert 45 <= len(entries) <= 65
    assert len({e["en"] for e in entries}) == len(entries)
    usual = [e["zh"][0] for e in entries]
    assert len(set(usual)) == len(usual)
    for entry in entries:
        assert entry.keys() == {"topic", "en", "zh", "wrong", "defined", "see"}
        assert CHINESE.search(entry["zh"][0]) or entry["zh"] == [entry["en"]], entry["en"]
        assert CHINESE.search(entry["defined"]["zh"])
        assert entry["defined"]["zh"].endswith("。")
        assert entry["defined"]["en"].endswith(".")
        assert not set(entry["zh"]) & set(entry["wrong"])
    (residual,) = (e for e in entries if e["en"] == "residual connection")
    assert (residual["zh"], residual["wrong"]) == (["残差连接"], ["剩余连接"])


def test_no_text_uses_a_rendering_that_it_warns_of(errata):
    """But where it is named; 正则化 and 剩余 are words of their own elsewhere."""
    wrong = {w for e in load_glossary() for w in e["wrong"]} - {"正则化", "剩余", "余数", "病变"}
    texts = [e["defined"]["zh"] for e in load_glossary()]
    texts += [s["text"]["zh"] for s in load_reading()]
    texts += [w for e in errata if e.id != "E35" for w in (e.says.zh, e.right.zh)]
    assert not [(w, t) for w in wrong for t in texts if w in t]


def test_what_the_glossary_points_to_exists():
    for entry in load_glossary():
        for place in entry["see"]:
            kind, name = place.split(" ")
            assert name in {"study": STUDIES.values(), "wiring": catalogue()}[kind], place


def test_the_path_leads_through_the_studies():
    steps = load_reading()
    assert 8 <= len(steps) <= 12
    for step in steps:
        assert step.keys() == {"title", "text", "studies"}
        assert step["studies"]
        assert set(step["studies"]) <= set(STUDIES.values())
        for words in (step["title"], step["text"]):
            assert CHINESE.search(words["zh"])
            assert not CHINESE.search(words["en"])
    assert set(STUDIES.values()) == {name for step in steps for name in step["studies"]}


# -- the package ---------------------------------------------------------------------------------


def studies_folder():
    return Path(addnorm.studies.__file__).parent


def test_what_is_no_python_is_packaged():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = patterns["tool"]["setuptools"]["package-data"]["addnorm"]
    for name in ("errata.toml", "glossary.toml", "reading.toml", "references.bib"):
        assert (studies_folder() / name).exists()
        assert any(fnmatch.fnmatch(f"studies/{name}", pattern) for pattern in patterns), name
