"""The pages in headless Chromium: drawn, silent, offline, in both languages, without overflow."""

import contextlib
import shutil
from dataclasses import replace

import pytest
from playwright.sync_api import sync_playwright
from report_cases import (
    HOSTILE,
    make_result,
    make_run,
    make_trace,
    many_wirings,
    seeds,
    three_wirings,
)
from test_trace_reports import connection, finding
from test_trace_reports import deep as deep_looks
from test_trace_reports import make as make_deep

from addnorm.reports.chart_style import PALETTE
from addnorm.reports.pages import write_comparison_page, write_run_page, write_trace_page

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is installed")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]

# Whether each character has ink, and other ink than the box of a missing glyph (U+FFFE has none).
GLYPHS = """
(characters) => {
  const family = getComputedStyle(document.querySelector("h1")).fontFamily;
  const paint = (text) => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 60, height: 60 });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.font = "40px " + family;
    context.fillText(text, 4, 46);
    return context.getImageData(0, 0, 60, 60).data.join();
  };
  const bad = [paint("\\uFFFE"), paint(" "), paint("\\u{10FFFD}")];
  const seen = new Map();
  const missing = [...characters].filter((c) => {
    const ink = paint(c);
    const twin = seen.has(ink);
    seen.set(ink, c);
    return twin || bad.includes(ink);
  });
  return missing.join("");
}
"""


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def run_page(path, lang="en"):
    write_run_page(*make_run(), path, lang)


def trace_page(path, lang="en"):
    trace = make_trace(24, slope=1.2, growth=8)
    trace["findings"] = [
        {
            "code": "vanishing",
            "severity": "warning",
            "where": "stack.connections.3",
            "value": "1.2",
            "expected": "below 1",
            "why": "The gradient shrinks.",
            "remedy": "Take another wiring.",
            "source": "a paper",
        }
    ]
    write_trace_page(trace, path, lang)


def deep_page(path, lang="en"):
    make_deep(looks=deep_looks()).save(path, lang)


def both_page(path, lang="en"):
    make_deep(4).compare(make_deep(9)).save(path, lang)


PAGES = {
    "comparison": (lambda p, lang="en": write_comparison_page(three_wirings(), p, lang), 4),
    "many": (lambda p, lang="en": write_comparison_page(many_wirings(45), p, lang), 4),
    "trace": (trace_page, 1),
    "looks": (deep_page, 7),
    "traces": (both_page, 1),
    "run": (run_page, 1),
}


@contextlib.contextmanager
def opened(browser, path, **options):
    """Open a page, and at the end insist that it was silent and asked for nothing else."""
    noises, requests = [], []
    page = browser.new_page(**({"viewport": {"width": 1280, "height": 900}} | options))
    page.on("console", lambda message: noises.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: noises.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    drawn(page)
    yield page
    assert noises == []
    assert [r for r in requests if not r.startswith(("data:", "blob:"))] == [path.as_uri()]
    page.close()


def drawn(page):
    """Wait until every chart is drawn, and return the language."""
    page.wait_for_function("document.documentElement.dataset.drawn", timeout=60_000)
    return page.evaluate("document.documentElement.dataset.drawn")


def titles(page):
    return page.eval_on_selector_all(
        ".chart svg .role-title-text", "all => all.map((e) => e.textContent)"
    )


@pytest.mark.parametrize("name", PAGES)
def test_page_in_both_languages(browser, tmp_path, name):
    write, count = PAGES[name]
    path = tmp_path / "page.html"
    write(path)
    with opened(browser, path) as page:
        shown = {}
        for lang, tag, other in (("en", "en", "中文"), ("zh", "zh-CN", "English")):
            assert drawn(page) == lang
            assert page.evaluate("document.documentElement.lang") == tag
            boxes = [svg.bounding_box() for svg in page.query_selector_all(".chart svg.marks")]
            assert len(boxes) == count
            assert all(box["width"] > 100 and box["height"] > 100 for box in boxes)
            assert not page.evaluate("document.body.innerText.includes('undefined')")
            assert page.evaluate("document.documentElement.scrollWidth") <= 1280
            shown[lang] = (page.title(), page.inner_text("h2 >> nth=0"), *titles(page))
            button = page.locator("#language")
            assert button.inner_text() == other
            button.focus()
            page.keyboard.press("Enter")
        assert len(shown["en"]) >= count + 2
        assert all(a != b for a, b in zip(shown["en"], shown["zh"], strict=True))
        assert drawn(page) == "en"


def test_every_mark_is_there(browser, tmp_path):
    """As many points as seeds, crosses as diverged seeds, lines as wirings."""
    path = tmp_path / "page.html"
    write_comparison_page(three_wirings(), path)
    with opened(browser, path) as page:
        marks = {
            name: page.locator(f"#chart-loss .concat_0_layer_{i}_marks > *").count()
            for name, i in (("seeds", 5), ("means", 6), ("diverged", 7))
        }
        assert marks == {"seeds": 51, "means": 16, "diverged": 3}
        assert "× diverged" in page.text_content("#chart-loss")
        assert "unigram 3.269" in page.text_content("#chart-loss")
        names = page.eval_on_selector_all(
            "#chart-gradient .role-legend-label text", "all => all.map((e) => e.textContent)"
        )
        assert names == ["plain", "postnorm", "prenorm"]


@pytest.mark.parametrize("name", ["loss", "gradient", "curves", "stream"])
def test_a_click_in_the_legend_fades_the_rest(browser, tmp_path, name):
    path = tmp_path / "page.html"
    write_comparison_page(make_result(seeds("a", 3, [2.0]) + seeds("b", 3, [2.1])), path)
    with opened(browser, path) as page:
        faded = page.locator(f"#chart-{name} .role-mark [opacity='0.06']")
        assert faded.count() == 0
        page.locator(f"#chart-{name} .role-legend-label text").first.click()
        faded.first.wait_for(state="attached")
        colours = faded.evaluate_all(
            "all => all.map((e) => e.getAttribute('stroke') ?? e.getAttribute('fill'))"
        )
        assert set(colours) == {PALETTE[1]}


def test_no_chinese_glyph_is_missing(browser, tmp_path):
    path = tmp_path / "page.html"
    write_comparison_page(three_wirings(), path, "zh")
    with opened(browser, path) as page:
        text = page.inner_text("body") + "".join(titles(page))
        chinese = "".join(sorted({c for c in text if "\u4e00" <= c <= "\u9fff"}))
        assert len(chinese) > 100
        assert page.evaluate(GLYPHS, chinese) == ""
        assert page.evaluate(GLYPHS, "\ufffe") == "\ufffe"


def test_hostile_names_are_shown_and_do_nothing(browser, tmp_path):
    path = tmp_path / "page.html"
    result = make_result(seeds(HOSTILE, 3, [2.0, 2.1]) + seeds("plain", 3, [2.2, 2.3]))
    result["data"]["source"] = HOSTILE
    write_comparison_page(result, path)
    with opened(browser, path) as page:
        page.on("dialog", lambda dialog: pytest.fail("a script of a name ran"))
        assert page.locator("img").count() == 0
        assert HOSTILE in page.inner_text("dl >> nth=1")
        assert HOSTILE in page.text_content("#chart-loss")
        point = page.locator("#chart-loss .concat_0_layer_6_marks > path").first
        point.hover(force=True)
        page.wait_for_selector("#vg-tooltip-element.visible")
        assert HOSTILE in page.inner_text("#vg-tooltip-element")


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_hostile_names_in_a_trace_are_shown_and_do_nothing(browser, tmp_path, lang):
    path = tmp_path / "page.html"
    found = (finding(HOSTILE, "sick", HOSTILE),)
    rows = (connection(0, HOSTILE), connection(1))
    replace(make_deep(findings=found), model=HOSTILE, connections=rows).save(path, lang)
    with opened(browser, path) as page:
        page.on("dialog", lambda dialog: pytest.fail("a script of a name ran"))
        assert page.locator("img").count() == 0
        assert HOSTILE in page.inner_text("h1")
        assert HOSTILE in page.inner_text(".advice code")
        assert HOSTILE in page.inner_text("tbody th >> nth=0")


def test_a_hover_marks_the_connection_in_all_panels(browser, tmp_path):
    path = tmp_path / "page.html"
    make_deep().save(path)
    with opened(browser, path) as page:
        strips = page.locator("#chart-trace .role-mark.mark-rule line[opacity='0.22']")
        assert strips.count() == 0
        hidden = page.locator("#chart-trace .role-mark.mark-rule line[opacity='0']")
        page.locator("#chart-trace").scroll_into_view_if_needed()
        box = hidden.nth(2).bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        strips.first.wait_for(state="attached")
        page.wait_for_selector("#vg-tooltip-element.visible")
        assert strips.count() == 6  # one in each panel
        assert "blocks.2" in page.inner_text("#vg-tooltip-element")


def test_panels_over_depth_stand_in_line(browser, tmp_path):
    """A place on the axis is at the same pixel in the vitals, the lesions and the lens."""
    path = tmp_path / "page.html"
    deep_page(path)
    with opened(browser, path) as page:
        edges = {
            name: page.locator(f"#chart-{name} svg path.background >> nth=-1").bounding_box()
            for name in ("trace", "lesion", "lens")
        }
        left = [round(box["x"]) for box in edges.values()]
        width = [round(box["width"]) for box in edges.values()]
        assert max(left) - min(left) <= 4
        assert max(width) - min(width) <= 2


def test_long_names_do_not_widen_the_page(browser, tmp_path):
    path = tmp_path / "page.html"
    rows = tuple(connection(i, "a_name_that_does_not_end" * 9 + "{}") for i in range(3))
    found = (finding("loud", "sick", rows[0].name),)
    replace(make_deep(findings=found), connections=rows).save(path)
    with opened(browser, path) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280
        cell = page.locator("tbody th").first.bounding_box()
        assert cell["width"] <= 361


def test_narrow_screen_scrolls_inside_the_page_only(browser, tmp_path):
    path = tmp_path / "page.html"
    write_comparison_page(three_wirings(), path)
    with opened(browser, path, viewport={"width": 400, "height": 800}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_the_page_reads_without_scripts(browser, tmp_path):
    path = tmp_path / "page.html"
    write_comparison_page(three_wirings(), path, "zh")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.inner_text("h1") == "残差连接接法对比"
    assert "深度 24 时建议采用 prenorm" in page.inner_text(".advice")
    context.close()
