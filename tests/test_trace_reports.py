"""What a trace shows: table, page, charts, JSON, in both languages; no model is run."""

import ast
import json
import math
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
from report_cases import HOSTILE

from addnorm.files import finite
from addnorm.probe.structure import Coverage
from addnorm.probe.trace import SCHEMA, Connection, Finding, Trace
from addnorm.reports.trace_charts import trace_chart, traces_chart
from addnorm.reports.trace_deep import LINES, deep_lines
from addnorm.reports.trace_deep_charts import deep_charts
from addnorm.reports.trace_table import as_text, rendered, sparkline
from addnorm.reports.trace_view import MEANINGS, PANELS, VITALS, coverage_lines, folded, grouped
from addnorm.reports.trace_words import PHRASES, chinese, said

ROOT = Path(__file__).parent.parent
PROBE = ROOT / "addnorm" / "probe"
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def connection(i, name="blocks.{}", **facts):
    return Connection(
        name=name.format(i),
        stream_before=float(i + 1),
        stream_after=float(i + 2),
        branch_share=1 / (i + 1),
        gradient_before=1e-3,
        gradient_after=1e-3 * 2.0**-i,
        token_similarity=0.1,
        non_finite=0,
        identity_gain=1.0,
        effective_rank=5.0,
        **facts,
    )


def finding(code, severity, where, **facts):
    return Finding(
        code, severity, where, "it adds 0", "1", f"Why {code}.", "Do it.", "a paper", **facts
    )


FOUND = (
    finding("quiet", "note", "blocks.0"),
    finding("loud", "sick", "blocks.3", why_zh="原因在此。", remedy_zh="对策在此。"),
    finding("middling", "warning", "blocks.1"),
)


def names(count):
    return [f"blocks.{i}" for i in range(count)]


def deep(n=6):
    """Every look as JSON has it, with nulls where a number is not known."""
    return {
        "lesion": {
            "names": names(n), "clean": 1.0, "singles": [0.1 * i for i in range(n)],
            "first_order": [0.05] * n, "pairs": [[0.1] * n for _ in range(n)],
            "correlation": None, "note": "the budget of 3 s ended after 4 of 6 evaluations",
        },
        "paths": {
            "names": names(n), "norm": [0.5**k for k in range(n + 1)],
            "share": [0.1] * (n + 1), "incoherent": [0.4**k for k in range(n + 1)],
            "incoherent_error": [0.01] * (n + 1), "mean_length": 1.2,
            "mean_length_incoherent": None, "range_90": [0, 3], "note": "",
        },
        "landscape": {
            "x": [-1.0, 0.0, 1.0], "y": [-1.0, 0.0, 1.0], "center": 1.0, "error": 0.002,
            "losses": [[1.0, 2.0, None], [1.5, 1.0, 2.0], [3.0, 2.0, 4.0]], "low": 1.0,
            "high": 4.0, "evaluations": 25, "path": [], "path_losses": [], "explained": [],
            "note": "stopped at 9 nodes to an axis: the held-out error is small enough",
        },
        "lens": {
            "depths": list(range(n + 1)), "names": ["", *names(n)],
            "loss": [2.0 - 0.1 * i for i in range(n + 1)],
            "agreement": [0.1, 0.6, 0.4, 0.5, 0.7, 0.9, 1.0], "divergence": [0.1] * (n + 1),
            "complete": True, "label": "biased estimate", "label_zh": "有偏估计",
            "notes": ["blocks.1 changes the shape and always works"],
        },
        "whiteness": {
            "autocorrelation": [1.0, 0.9, 0.8], "error": [None, 0.1, 0.1],
            "white_low": [1.0, -0.1, -0.1], "white_high": [1.0, 0.1, 0.1],
            "brown": [1.0, 0.95, 0.9], "brownness": 0.9, "reversals": 0.01,
        },
    }  # fmt: skip


def make(count=6, findings=FOUND, looks=None, **facts):
    return Trace(
        model="Net",
        wiring="",
        blocks=f"{count} connections found by their additions",
        loss=1.5,
        loss_kind="cross-entropy",
        connections=tuple(connection(i) for i in range(count)),
        findings=findings,
        coverage=Coverage(
            count, count + 3, {"inside a branch": 3}, {"blocks.0": "no residual addition was "
            "seen in it"}, {"flex": 1},
        ),
        fed="4 windows of 64 tokens of pydoc",
        deep=looks or {},
        **facts,
    )  # fmt: skip


# -- the table ---------------------------------------------------------------------------------


def test_the_table_goes_by_depth_and_the_findings_by_severity():
    lines = make().table().split("\n")
    rows = [line for line in lines if re.match(r" *\d+  blocks\.", line)]
    assert [int(row.split()[0]) for row in rows] == list(range(6))
    assert lines[0] == (
        "Net, no wiring of addnorm, 6 connections: 6 connections found by their additions; "
        "given 4 windows of 64 tokens of pydoc"
    )
    found = [line for line in lines if re.match("(sick|warning|note): ", line)]
    assert found == ["sick: loud, blocks.3", "warning: middling, blocks.1", "note: quiet, blocks.0"]
    assert "Findings: 1 sick, 1 warning, 1 note" in lines
    assert any(line.startswith("gradient RMS") and "█▇▅▄▂▁" in line for line in lines)
    assert "3 ignored: inside a branch" in lines
    assert "1 call of flex out of sight" in lines


def test_the_chinese_table_says_the_same_in_chinese():
    text = make(looks=deep()).table("zh")
    assert "病态：loud，blocks.3" in text
    assert "原因在此。" in text
    assert "输出恒为 0" in text
    assert "由加法识别出 6 个连接；输入：pydoc 的 4 段文本，每段 64 个词元" in text
    assert "3 个加法不是连接：位于分支内部" in text
    assert "3 秒的预算在 4/6 次计算后用完" in text
    words = set(re.findall(r"[a-z]{4,}", text))
    allowed = {"blocks", "quiet", "loud", "middling", "addnorm", "pydoc", "flex", "paper", "Why"}
    assert words - allowed == set()  # the findings' own texts without Chinese have short words


def test_a_language_that_is_not_there():
    with pytest.raises(ValueError, match="no language 'de'; take en or zh"):
        make().table("de")


def test_a_long_table_is_folded_around_what_findings_name():
    trace = make(300, findings=(finding("loud", "sick", "blocks.150"),))
    text = trace.table()
    assert len([line for line in text.split("\n") if "blocks." in line]) < 65
    assert re.search(r"^150  blocks\.150 ", text, re.M)
    assert "more, --all shows them" in text
    assert len(re.findall(r"^ *\d+  blocks\.", trace.table(everything=True), re.M)) == 300


@pytest.mark.parametrize(("count", "named"), [(61, ()), (200, (77, 78)), (1000, range(1000))])
def test_folding_leaves_nothing_out_unsaid(count, named):
    """What is shown and what is left out make the whole, in order, in at most 60 lines."""
    shown = folded(count, named)
    whole = [k for i in shown for k in ([i] if isinstance(i, int) else range(i[0], i[1] + 1))]
    assert whole == list(range(count))
    assert len(shown) <= 60


def test_findings_of_one_code_stand_together():
    many = tuple(finding("loud", "sick", f"blocks.{i}") for i in range(5))
    (group,) = grouped(make(findings=many).to_dict()["findings"])
    assert len(group.findings) == 3
    assert group.more == ("blocks.3", "blocks.4")
    assert "  and at 2 more: blocks.3, blocks.4" in make(findings=many).table()
    assert make(findings=many).table(everything=True).count("sick: loud") == 5


@pytest.mark.parametrize(
    ("values", "log", "line"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], False, "▁▂▃▄▅▆▇█"),
        ([1, 10, 100], True, "▁▅█"),
        ([5.0, 5.001], False, "▄▄"),
        ([1.0, math.nan, math.inf], False, "▄·×"),
        ([0.0, 1e-3, 1.0], True, "▁▁█"),
    ],
)
def test_sparklines(values, log, line):
    assert sparkline(values, log=log) == line


def test_a_long_sparkline_keeps_its_outlier():
    assert "█" in sparkline([1.0] * 500 + [9.0] + [1.0] * 500, width=40)


def test_names_cannot_steer_the_terminal():
    trace = replace(make(), model="\x1b[31mNet", connections=(connection(0, "a\x1b]0;t\x07"),))
    assert "\x1b" not in trace.table()
    assert "\x07" not in as_text(rendered(trace.to_dict(), "zh"))


# -- words -------------------------------------------------------------------------------------


def test_every_vital_look_and_phrase_has_its_chinese():
    for vital in VITALS:
        assert CHINESE.search(vital.zh), vital
        assert CHINESE.search(vital.short_zh), vital
    for key, (en, zh) in MEANINGS.items():
        assert en, key
        assert CHINESE.search(zh) or "E[" in zh, key
    for name, look in deep().items():
        pairs = list(zip(LINES[name](look, False), LINES[name](look, True), strict=True))
        assert pairs, name
        assert all(en != zh and CHINESE.search(zh) for en, zh in pairs), name
    for en, zh in PHRASES:
        assert CHINESE.search(zh) or "{" in zh, en
        assert re.compile(en).groups == len(set(re.findall(r"{(\d)}", zh))), en


def texts(file, *keys):
    """The texts that a module gives as one of these keyword arguments, with 7 for each value."""
    tree = ast.parse((PROBE / file).read_text(encoding="utf-8"))

    def written(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value if isinstance(part, ast.Constant) else "7" for part in node.values
            )
        elif isinstance(node, ast.IfExp):
            yield from written(node.body)
            yield from written(node.orelse)

    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in keys:
                    yield from written(keyword.value)


def test_what_a_finding_measured_and_expected_is_known_in_chinese():
    """Read out of the code of the findings: a new text fails here until it has its Chinese."""
    found = list(texts("findings.py", "where", "value", "expected"))
    assert len(found) > 15
    missing = [text for text in found if not CHINESE.search(chinese(text))]
    assert missing == []


def test_phrases_within_phrases():
    assert chinese("2 connections of our stacks, 3 modules named h.*") == (
        "addnorm 的 Stack 中有 2 个连接，3 个名为 h.* 的模块"
    )
    assert chinese("a; b") == "a; b"
    assert chinese("it adds 0; NaN or infinity") == "输出恒为 0；NaN 或无穷"
    assert said({"why": "x", "why_zh": "因"}, "why", True) == "因"
    assert said({"why": "x", "why_zh": ""}, "why", True) == "x"
    assert said({"why": "x", "why_zh": "因"}, "why", False) == "x"


def test_coverage_counts_in_the_singular():
    coverage = {"connections": 1, "additions": 1, "opaque": {"f": 1}, "fallbacks": {"a": "b"}}
    assert coverage_lines(coverage, False) == [
        "1 connection among 1 addition",
        "1 block taken whole: b",
        "1 call of f out of sight",
    ]
    assert coverage_lines(None, True) == []


# -- JSON --------------------------------------------------------------------------------------


def test_a_trace_survives_json_with_everything(tmp_path):
    hole = replace(connection(1), branch_share=math.nan)
    trace = replace(make(looks=deep()), connections=(connection(0), hole))
    trace.save(tmp_path / "t.json")
    again = Trace.load(tmp_path / "t.json")
    assert finite(again.to_dict()) == finite(trace.to_dict())
    assert again.fed == trace.fed
    assert again.coverage == trace.coverage
    for lang in ("en", "zh"):
        assert again.table(lang) == trace.table(lang)
        assert trace_chart(again.to_dict(), lang).to_dict() == trace.plot(lang).to_dict()


def test_json_has_no_nan(tmp_path):
    replace(make(), loss=math.nan).save(tmp_path / "t.json")
    text = (tmp_path / "t.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None
    assert math.isnan(Trace.load(tmp_path / "t.json").loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": SCHEMA + 1}, f"trace of schema {SCHEMA + 1}; this version reads {SCHEMA}"),
        ({"connections": []}, "holds no trace"),
        ({"connections": [{"name": "a"}]}, "holds no whole trace: "),
        ({"findings": [{"code": 3}]}, "holds no whole trace: "),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path, change, message):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(finite(make().to_dict() | change)), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Trace.load(path)


# -- charts and pages --------------------------------------------------------------------------


def marks(spec):
    for part in spec.get("vconcat", [spec]):
        for layer in part.get("layer", [part]):
            yield layer["mark"]["type"], layer


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_charts_are_valid_and_share_the_axis_of_depth(lang):
    """`to_dict` validates against the schema of Vega-Lite."""
    trace = make(looks=deep())
    spec = trace.plot(lang).to_dict()
    assert spec["$schema"].startswith("https://vega.github.io/schema/vega-lite/")
    assert len(spec["vconcat"]) == len([p for p in PANELS if p.key not in
                                        ("gain_backward", "dead_units")])  # fmt: skip
    looks = {name: draw(lang).to_dict() for name, draw in deep_charts(trace.deep).items()}
    assert set(looks) == {"lesion", "pairs", "paths", "landscape", "lens", "whiteness"}
    domains = {
        tuple(layer["encoding"]["x"]["scale"]["domain"])
        for each in (spec, looks["lesion"])
        for _, layer in marks(each)
        if "x" in layer["encoding"]
    }
    assert domains == {(-0.6, 5.6)}
    lens = {tuple(layer["encoding"]["x"]["scale"]["domain"]) for _, layer in marks(looks["lens"])}
    assert [(a - 0.5, b - 0.5) for a, b in lens] == [(-0.6, 5.6)]


def test_each_language_has_its_own_titles():
    charts = deep_charts(deep())
    for draw in charts.values():
        en, zh = (draw(lang).to_dict()["title"] for lang in ("en", "zh"))
        assert en["text"] != zh["text"]
        assert CHINESE.search(zh["subtitle"])


def test_a_lens_without_a_loss_has_two_panels():
    look = deep()["lens"] | {"loss": [None] * 7}
    assert len(deep_charts({"lens": look})["lens"]("en").to_dict()["vconcat"]) == 2


def test_the_lens_settles_where_the_last_disagreement_ends():
    (line, *_) = deep_lines({"lens": deep()["lens"]}, False)
    assert line.startswith("lens: after 3 of 6 connections at least half")


def test_the_page_holds_every_part_once_and_escapes_names(tmp_path):
    hostile = finding(HOSTILE, "sick", HOSTILE)
    trace = replace(
        make(findings=(hostile,), looks=deep()),
        model=HOSTILE,
        connections=(connection(0, HOSTILE), connection(1)),
        fed=HOSTILE,
    )
    trace.save(tmp_path / "t.html")
    html = (tmp_path / "t.html").read_text(encoding="utf-8")
    assert HOSTILE not in html
    assert "<img" not in html.split("<script", 1)[0]
    for name in ("trace", "lesion", "pairs", "paths", "landscape", "lens", "whiteness"):
        assert html.count(f'id="chart-{name}"') == 1
    heads = re.findall(r'<h2><span data-lang="en" lang="en">(.*?)</span>', html)
    assert heads == [
        "Findings", "Coverage", "Through depth", "Lesions", "Paths", "Loss landscape",
        "Logit lens", "Gradient whiteness", "Connections", "How it was measured",
    ]  # fmt: skip
    assert "://" not in re.sub(r"<script.*?</script>", "", html, flags=re.S)


def test_the_page_of_a_healthy_trace_says_so(tmp_path):
    make(findings=()).save(tmp_path / "t.html", "zh")
    html = (tmp_path / "t.html").read_text(encoding="utf-8")
    assert '<html lang="zh-CN">' in html
    assert "没有需要报告的问题" in html
    with pytest.raises(ValueError, match="no language 'de'"):
        make().save(tmp_path / "t.html", "de")


# -- two traces --------------------------------------------------------------------------------


def test_a_comparison_of_unequal_depths(tmp_path):
    a, b = make(4, findings=FOUND[:2]), make(9, findings=FOUND[1:])
    both = a.compare(b)
    assert [(r.index_a, r.index_b) for r in both.rows] == [(0, 0), (1, 3), (2, 5), (3, 8)]
    assert [f.code for f in both.gone] == ["quiet"]
    assert [f.code for f in both.new] == ["middling"]
    assert [f.code for f in both.stayed] == ["loud"]
    assert not both.ok
    text = both.table()
    for line in ("gone note: quiet, ", "new warning: middling, ", "in both sick: loud, "):
        assert f"\n{line}" in text
    assert "两者皆有 病态：loud，blocks.3：原因在此。" in both.table("zh")
    both.save(tmp_path / "c.html")
    both.save(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["ok"] is False
    html = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert html.count('id="chart-traces"') == 1
    for lang in ("en", "zh"):
        assert traces_chart(both.to_dict(), lang).to_dict()["vconcat"]


# -- data frames and docs ----------------------------------------------------------------------


def test_to_pandas_needs_pandas_and_gives_a_row_a_connection(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match=r"to_pandas\(\) needs pandas: pip install pandas"):
        make().to_pandas()
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=list))
    rows = make().to_pandas()
    assert [row["name"] for row in rows] == names(6)
    assert rows[2]["stream_after"] == 4.0


def test_the_docs_list_every_finding(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "runs"))
    import findings_table

    assert set(findings_table.SAYS) == set(findings_table.codes())
    for lang, path in findings_table.PAGES.items():
        page = path.read_text(encoding="utf-8")
        assert findings_table.filled(page, lang) == page, "say `make docs`"


def test_the_docs_have_the_same_shape_in_both_languages():
    shapes = []
    for name in ("xray.md", "xray.zh-CN.md"):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        code = re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)
        commands = [[line.split("#")[0].strip() for line in c.split("\n")] for _, c in code]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        levels = re.findall(r"^(#+) ", prose, re.M)
        shapes.append((levels, len(re.findall(r"^\|", prose, re.M)), commands))
    assert shapes[0] == shapes[1]
