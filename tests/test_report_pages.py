"""Reports: what the charts encode, and what the pages hold."""

import json
import math
import re
import subprocess
import sys

import pytest
from report_cases import (
    HOSTILE,
    UNIFORM,
    UNIGRAM,
    make_cell,
    make_result,
    make_run,
    make_trace,
    many_wirings,
    seeds,
    three_wirings,
)

from addnorm.reports import charts, charts_single
from addnorm.reports.pages import number, write_comparison_page, write_run_page, write_trace_page
from addnorm.reports.statements import statements
from addnorm.reports.summary import summarise
from addnorm.reports.trace_charts import trace_chart

CJK = re.compile("[\u4e00-\u9fff]")


def page_of(path):
    """The HTML of a page without its scripts, and the data of its charts."""
    html = path.read_text()
    blocks = re.findall(r"<script([^>]*)>(.*?)</script>", html, re.S)
    found = [json.loads(body) for kind, body in blocks if "json" in kind]
    assert len(blocks) == 3
    assert len(found) == 1
    return re.sub(r"<script[^>]*>.*?</script>", "", html, flags=re.S), found[0]


# -- charts ------------------------------------------------------------------------------------


def units(spec):
    """Every mark of a chart with its encoding."""
    for key in ("layer", "vconcat"):
        for inner in spec.get(key, []):
            yield from units(inner)
    if "spec" in spec:
        yield from units(spec["spec"])
    if "mark" in spec:
        yield spec


def rows_of(spec):
    return [row for rows in spec["datasets"].values() for row in rows]


def test_loss_chart():
    spec = charts.loss_by_depth(summarise(three_wirings())).to_dict()
    marks = list(units(spec))
    lines = [u for u in marks if u["mark"]["type"] == "line"]
    assert lines[0]["encoding"]["x"]["field"] == "x"
    assert lines[0]["encoding"]["x"]["scale"]["type"] == "log"
    assert lines[0]["encoding"]["y"]["field"] == "loss"
    assert lines[0]["encoding"]["strokeDash"]["field"] == "warmup"
    rules = {u["encoding"]["y"]["datum"] for u in marks if u["mark"]["type"] == "rule"}
    assert rules == {UNIGRAM, UNIFORM}
    rows = rows_of(spec)
    kinds = [r.get("kind") for r in rows]
    assert (kinds.count("mean"), kinds.count("seed"), kinds.count("diverged")) == (18, 51, 3)
    top = lines[0]["encoding"]["y"]["scale"]["domain"][1]
    lost = [r["loss"] for r in rows if r.get("kind") == "diverged"]
    assert all(UNIFORM < y < top for y in lost)
    assert sum(r["loss"] is None for r in rows if r.get("kind") == "mean") == 2


def test_gradient_chart_is_logarithmic_and_relative_to_the_last_connection():
    spec = charts.gradient_by_depth(summarise(three_wirings())).to_dict()
    line = next(u for u in units(spec) if u["mark"]["type"] == "line")
    assert line["encoding"]["y"] | {"axis": 0} == {
        "field": "y",
        "type": "quantitative",
        "title": "gradient RMS / that at the last",
        "scale": line["encoding"]["y"]["scale"],
        "axis": 0,
    }
    assert line["encoding"]["y"]["scale"]["type"] == "log"
    assert line["encoding"]["x"]["field"] == "place"
    assert line["encoding"]["color"]["field"] == "wiring"
    assert spec["facet"]["field"] == "depth"
    rows = [r for r in rows_of(spec) if (r["wiring"], r["depth"]) == ("plain", 24)]
    assert len(rows) == 48
    assert rows[-1]["y"] == 1.0
    assert rows[0]["y"] == pytest.approx(10 ** (-1.7 * 4.7), rel=1e-4)


def test_a_gradient_of_zero_stays_on_the_chart_and_an_unknown_one_does_not():
    cell = make_cell("plain", 3, 0, 3.3)
    cell["start"]["connections"][0]["gradient_after"] = 0.0
    cell["start"]["connections"][1]["gradient_after"] = None
    rows = rows_of(charts.gradient_by_depth(summarise(make_result([cell]))).to_dict())
    assert rows[0]["y"] == pytest.approx(1e-42, rel=1e-3)
    assert rows[1]["y"] is None


def test_curves_and_stream():
    s = summarise(three_wirings())
    spec = charts.curves(s).to_dict()
    assert spec["facet"]["field"] == "depth"
    line = next(u for u in units(spec) if u["mark"]["type"] == "line")
    assert line["encoding"]["x"]["field"] == "step"
    assert line["encoding"]["strokeDash"]["field"] == "warmup"
    spec = charts.stream_by_depth(s).to_dict()
    assert (spec["facet"]["row"]["field"], spec["facet"]["column"]["field"]) == ("depth", "when")
    line = next(u for u in units(spec) if u["mark"]["type"] == "line")
    assert line["encoding"]["y"]["scale"]["type"] == "log"


@pytest.mark.parametrize(
    "draw", ["loss_by_depth", "gradient_by_depth", "curves", "stream_by_depth"]
)
def test_languages_share_their_data(draw):
    s = summarise(three_wirings())
    en, zh = (getattr(charts, draw)(s, lang).to_dict() for lang in ("en", "zh"))
    assert en["datasets"] == zh["datasets"]
    assert CJK.search(zh["title"]["text"])
    assert not CJK.search(json.dumps(en, ensure_ascii=False).replace("（", ""))


def test_every_wiring_has_its_own_colour_and_shape():
    spec = charts.gradient_by_depth(summarise(many_wirings(45))).to_dict()
    point = next(u for u in units(spec) if u["mark"]["type"] == "point")
    looks = [point["encoding"][k]["scale"]["range"] for k in ("color", "shape")]
    assert len(set(zip(*looks, strict=True))) == 45


def test_trace_chart_leaves_out_what_was_not_measured():
    full = trace_chart(make_trace(6)).to_dict()
    assert len(full["vconcat"]) == 4
    assert len(trace_chart(make_trace(6, wiring="plain")).to_dict()["vconcat"]) == 3
    axes = [next(units(p))["encoding"]["y"]["title"] for p in full["vconcat"]]
    assert axes == ["stream RMS", "branch share", "gradient RMS", "token similarity"]
    assert full["resolve"]["scale"]["x"] == "shared"
    nothing = make_trace(2)
    for c in nothing["connections"]:
        c |= {"stream_after": math.nan, "branch_share": None, "gradient_after": math.inf}
    assert trace_chart(nothing).to_dict()["vconcat"]


def test_run_chart_averages_a_long_run():
    _, metrics, _ = make_run()
    rows = rows_of(charts_single.run_chart(metrics, UNIGRAM, UNIFORM, points=100).to_dict())
    train = [r for r in rows if r.get("kind") == "training"]
    assert len(train) == 100
    first = [m["loss"] for m in metrics if "loss" in m][:10]
    assert train[0] == {
        "kind": "training",
        "step": 10,
        "loss": pytest.approx(sum(first) / 10, rel=1e-4),
    }
    assert len([r for r in rows if r.get("kind") == "validation"]) == 4
    assert charts_single.run_chart([], UNIGRAM, UNIFORM).to_dict()


# -- pages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (None, ".3f", "–"),
        (math.nan, ".3f", "–"),
        (math.inf, ".3f", "∞"),
        (-0.154, "+.2f", "−0.15"),
        (1.7e-6, ".3g", "1.7e−6"),
        (0.0, ".3g", "0"),
        (12345, ",.0f", "12,345"),
    ],
)
def test_number(value, form, text):
    assert number(value, form) == text


def test_comparison_page_holds_what_was_found_first(tmp_path):
    result = three_wirings()
    write_comparison_page(json.loads(json.dumps(result)), tmp_path / "new" / "page.html")
    html, data = page_of(tmp_path / "new" / "page.html")
    found = statements(summarise(result))
    places = [html.index(s.en.replace("'", "&#39;")) for s in found]
    assert places == sorted(places)
    assert max(places) < html.index('id="chart-loss"') < html.index("<table>")
    assert all(s.zh in html for s in found)
    assert list(data["charts"]) == ["loss", "gradient", "curves", "stream"]
    for part in (
        "5f" * 32,
        "465,048",
        "2 cores, x86_64, cpu",
        "2026-11-22",
        "torch 2.13.0",
        "95 %",
    ):
        assert part in html
    assert html.count("<table>") == 2
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["page.html"]


def test_one_warmup_has_no_table_of_warmups(tmp_path):
    write_comparison_page(make_result(seeds("plain", 3, [2.0])), tmp_path / "page.html")
    assert page_of(tmp_path / "page.html")[0].count("<table>") == 1


def test_a_page_starts_in_the_language_that_was_asked_for(tmp_path):
    for lang, tag in (("en", "en"), ("zh", "zh-CN")):
        write_trace_page(make_trace(4), tmp_path / "page.html", lang)
        html = (tmp_path / "page.html").read_text()
        assert html.lstrip().startswith(f'<!DOCTYPE html>\n<html lang="{tag}">')
    with pytest.raises(ValueError, match="no language 'de'; take en or zh"):
        write_trace_page(make_trace(4), tmp_path / "page.html", "de")


def test_hostile_names_are_text(tmp_path):
    """A wiring or a path cannot end the script that carries it, nor open a tag."""
    cells = seeds(HOSTILE, 3, [2.0, 2.1]) + seeds("plain\u2028", 3, [2.2, 2.3])
    result = make_result(cells)
    result["data"]["source"] = result["settings"]["data"] = HOSTILE
    write_comparison_page(result, tmp_path / "comparison.html")
    trace = make_trace(4, wiring=HOSTILE) | {"model": HOSTILE, "blocks": HOSTILE}
    trace["connections"][0]["name"] = HOSTILE
    finding = dict.fromkeys(("code", "where", "value", "expected", "why", "remedy"), HOSTILE)
    trace["findings"] = [finding | {"severity": HOSTILE, "source": HOSTILE}]
    write_trace_page(trace, tmp_path / "trace.html")
    config, metrics, last = make_run(HOSTILE)
    write_run_page(config, metrics, last | {"status": HOSTILE}, tmp_path / "run.html")
    for name in ("comparison", "trace", "run"):
        html, data = page_of(tmp_path / f"{name}.html")
        assert "<img src=x" not in (tmp_path / f"{name}.html").read_text()
        html = html.replace("<wbr>", "")
        assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in html
        assert name == "run" or HOSTILE in json.dumps(data)


def test_a_page_forbids_the_network(tmp_path):
    write_trace_page(make_trace(4), tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    rules = dict(part.strip().split(" ", 1) for part in policy[1].replace("&#39;", "'").split(";"))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in rules["script-src"]
    assert rules["script-src"].count("sha256-") == 2
    assert not re.search(r"""(src|href)=["']?https?:""", page_of(tmp_path / "page.html")[0])


def test_trace_page_of_a_trace_with_nan(tmp_path):
    trace = make_trace(3) | {"loss": math.nan, "gradient_slope": math.nan}
    trace["connections"][1] |= {"gradient_after": math.nan, "stream_after": math.inf}
    write_trace_page(trace, tmp_path / "page.html")
    html, _ = page_of(tmp_path / "page.html")
    assert "nan" not in html.lower().replace("finance", "")
    assert "∞" in html


def test_run_page_of_a_run_that_diverged(tmp_path):
    config, metrics, last = make_run()
    lost = last | {"status": "diverged", "validation": None, "step": 12}
    write_run_page(config, metrics[:12], lost, tmp_path / "page.html", "zh")
    html, data = page_of(tmp_path / "page.html")
    assert "训练在第 12 步之后发散" in html
    assert list(data["charts"]) == ["run"]


def test_reports_never_import_torch():
    code = "import sys, addnorm.reports.pages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
