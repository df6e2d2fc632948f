"""The pages, charts and docs of the studies: what they hold, and how they look in Chromium."""

import json
import math
import re
from dataclasses import replace

import pytest
from playwright.sync_api import sync_playwright
from study_cases import HOSTILE, made_up, measure, result_of, words
from test_page_browser import CHROMIUM, FLAGS, GLYPHS, drawn, opened, titles
from test_report_pages import CJK, page_of, rows_of, units

from addnorm.reports.study_charts import plot_chart
from addnorm.reports.study_docs import gallery_markdown, picture_of, study_markdown, write_picture
from addnorm.reports.study_effects import effects_chart
from addnorm.reports.study_pages import codes, strip, write_study_pages
from addnorm.reports.study_picture import shown_rows
from addnorm.reports.study_words import (
    amount,
    effect_in,
    effect_line,
    failures,
    probability,
    rule_lines,
    test_line,
)
from addnorm.studies.frame import Contrast, Mode, Plot

NAMES = tuple(f"wiring-{i}(start=0.00{i})" for i in range(9))
test_line.__test__ = False  # a function of the package


@pytest.fixture(scope="module")
def result():
    return result_of(made_up())


@pytest.fixture(scope="module")
def many():
    """Nine wirings of long names; one has losses of 0, one fails for half of the seeds."""

    def measured(cell):
        found = measure(cell | {"net": "residual"})
        if cell["seed"] < 4:
            found["loss"] = {NAMES[3]: 0.0, NAMES[5]: math.nan}.get(cell["net"], found["loss"])
        return found

    study = made_up(
        id="ST-91",
        name="many",
        factors={"net": NAMES, "depth": (4, 64), "width": (32,)},
        primary=Contrast(
            words("The first is near 0."),
            lambda rows: rows.value("loss", net=NAMES[0], depth=4),
            0.5,
            rule="within",
        ),
        secondary=(),
        claims=(),
        plots=(
            Plot("dots", words("By wiring"), x="net", y="loss", color="depth", log_y=True),
            Plot("lines", words("By depth"), x="depth", y="loss", color="net"),
            Plot("profile", words("Curves"), x="", y="curve", color="net", log_y=True),
        ),
        modes={"quick": Mode(6, 1), "default": Mode(8, 2)},
    )
    return result_of(study, measured)


def spec_of(result, index, lang="en"):
    return plot_chart(result, result["plots"][index], lang).to_dict()


def of_kind(spec, kind):
    return [row for row in rows_of(spec) if row.get("kind") == kind]


# -- words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.123456, "0.123"),
        (-1234.5, "−1,234"),
        (1e-16, "1e−16"),
        (1.23e-6, "1.2e−6"),
        (2e7, "2e7"),
        (None, "–"),
        (math.nan, "–"),
        (7, "7"),
    ],
)
def test_amount(value, text):
    assert amount(value) == text


@pytest.mark.parametrize(
    ("p", "text"), [(0.0004, "< 0.001"), (0.0078, "0.008"), (0.25, "0.25"), (None, "–")]
)
def test_probability(p, text):
    assert probability(p) == text


def contrast(rule, limit=0.5, effect=1.0, p=0.03):
    unit = {"en": "nats", "zh": "nat"}
    return {
        "rule": rule, "limit": limit, "unit": unit, "effect": effect, "interval": [0.9, 1.1], "p": p
    }  # fmt: skip


def test_an_effect_is_told_with_its_interval_limit_and_p():
    assert effect_in(contrast("above"), "en") == "1 [0.9, 1.1] nats"
    assert effect_in(contrast("above", effect=None), "en") == "–"
    en, zh = (text.replace("\xa0", " ") for text in effect_line(contrast("below", p=0.0001), 12))
    assert en == (
        "Median effect over 12 seeds: 1 nats, 95 % interval [0.9, 1.1]; the statement asks for "
        "< 0.5 nats, p < 0.001."
    )
    assert "12 个种子" in zh
    assert "命题要求 < 0.5 nat，p < 0.001" in zh
    assert "p =" not in effect_line(contrast("exact", p=None), 12).en


@pytest.mark.parametrize(
    ("rule", "supported", "refuted"),
    [
        ("above", "above 0.5 nats", "below 0.5 nats"),
        ("below", "below 0.5 nats", "above 0.5 nats"),
        ("within", "against −0.5 nats and against 0.5 nats", "beyond one of the two"),
        ("exact", "is at most 0.5 nats", "single seed is larger"),
    ],
)
def test_a_rule_says_what_would_have_said_the_opposite(rule, supported, refuted):
    lines = dict(rule_lines(contrast(rule), 8))
    assert list(lines) == ["SUPPORTED", "REFUTED", "INCONCLUSIVE"]
    assert supported in lines["SUPPORTED"].en
    assert refuted in lines["REFUTED"].en
    assert all(CJK.search(line.zh) for line in lines.values())


def test_the_test_is_told_for_its_rule_and_seeds():
    assert "all 256 ways" in test_line(contrast("above"), 8).en
    assert "9,999 random ways" in test_line(contrast("above"), 14).en
    assert "TOST" in test_line(contrast("within"), 8).en
    assert "no p" in test_line(contrast("exact"), 8).en


def test_failures_are_named_by_their_levels(result):
    assert failures(result) == [
        ({"net": "plain", "depth": 64, "width": 32}, [3]),
        ({"net": "plain", "depth": 64, "width": 128}, [3]),
    ]


# -- charts ------------------------------------------------------------------------------------


def test_lines_show_every_seed_the_medians_and_the_failed(result):
    spec = spec_of(result, 0)
    assert len(of_kind(spec, "seed")) == 2 * 3 * 8 - 1
    (lost,) = of_kind(spec, "failed")
    assert (lost["y"], lost["seed"], lost["at"]) == (2.3, 3, 64)
    medians = {(r["s"], r["x"]): r["y"] for r in of_kind(spec, "median")}
    values = [r["loss"] for r in result["rows"] if (r["net"], r["depth"]) == ("plain", 4)]
    narrow = sorted(values[::2])  # widths alternate
    assert medians["plain", 4.0] == pytest.approx((narrow[3] + narrow[4]) / 2, rel=1e-4)
    assert len(medians) == 6
    marks = [unit["mark"]["type"] for unit in units(spec)]
    assert marks == ["rule", "line", "circle", "point", "point", "point"]
    line = next(u for u in units(spec) if u["mark"]["type"] == "line")
    assert line["encoding"]["x"]["scale"]["type"] == line["encoding"]["y"]["scale"]["type"] == "log"
    assert line["encoding"]["x"]["axis"]["values"] == [4, 16, 64]
    assert "Dotted line: guessing (2.3)." in spec["title"]["subtitle"]
    assert "×: failed (1)." in spec["title"]["subtitle"]


def test_points_stand_near_their_level(result):
    """Each seed a little aside, so that equal values are seen apart, and no level is left."""
    rows = of_kind(spec_of(result, 0), "seed")
    assert all(abs(math.log(r["x"] / r["at"])) < 0.1 for r in rows)
    assert len({(r["s"], r["at"], r["x"]) for r in rows}) == len(rows)


def test_points_of_near_levels_do_not_mix():
    study = made_up(
        factors={"net": ("plain", "residual"), "depth": (4, 5, 64), "width": (32,)},
        secondary=(),
        claims=(),
        plots=(Plot("lines", words("Loss"), x="depth", y="loss", color="net"),),
    )
    rows = of_kind(spec_of(result_of(study), 0), "seed")
    assert all(min((4, 5, 64), key=lambda level: abs(level - r["x"])) == r["at"] for r in rows)


def test_dots_stand_side_by_side_in_panels(result):
    spec = spec_of(result, 1)
    assert spec["facet"]["sort"] == ["width = 32", "width = 128"]
    rows = [r for r in of_kind(spec, "seed") if r["at"] == "residual"]
    span = {s: [r["o"] for r in rows if r["s"] == s] for s in ("4", "16", "64")}
    assert max(span["4"]) < min(span["16"]) <= max(span["16"]) < min(span["64"])
    assert all(-1 <= o <= 1 for places in span.values() for o in places)
    assert len(of_kind(spec, "median")) == 2 * 2 * 3


def test_a_failure_without_a_value_stands_above_the_others(result):
    spec = spec_of(result, 3)
    lost = of_kind(spec, "failed")
    assert len(lost) == 2
    assert all(r["value"] is None for r in lost)
    assert min(r["y"] for r in lost) > max(r["y"] for r in of_kind(spec, "seed"))
    assert spec["facet"]["field"] == "p"  # the width has no axis: a panel for each


def test_profiles_are_a_line_per_seed_and_their_median(result):
    spec = spec_of(result, 2)
    lines = {r["id"] for r in of_kind(spec, "seed")}
    assert len(lines) == 2 * 3 * 8 - 1
    torn = of_kind(spec, "failed")
    assert [r["y"] for r in torn] == [2.3, 4.0, None]
    middle = [r for r in of_kind(spec, "median") if (r["s"], r["p"]) == ("plain", "depth = 64")]
    whole = [r["curve"] for r in shown_rows(result, result["plots"][2])
             if (r["net"], r["depth"]) == ("plain", 64) and not r["failed"]]  # fmt: skip
    assert [r["y"] for r in middle] == pytest.approx(
        [sorted(at)[3] for at in zip(*whole, strict=True)], rel=1e-4
    )
    assert [r["x"] for r in middle] == list(range(0, 22, 2))
    assert "Dashed: failed (1)." in spec["title"]["subtitle"]


def test_long_profiles_are_thinned_but_keep_their_ends():
    long = made_up(
        factors={"net": ("plain",), "depth": (4, 64), "width": (32,)},
        secondary=(),
        claims=(),
        plots=(Plot("profile", words("Curves"), x="", y="curve"),),
    )
    found = result_of(long, lambda cell: measure(cell) | {"curve": [float(i) for i in range(1000)]})
    rows = of_kind(spec_of(found, 0), "seed")
    one = [r for r in rows if r["id"] == rows[0]["id"]]
    assert len(one) <= 240
    assert (one[0]["x"], one[-1]["x"]) == (0, 999)


def test_long_names_go_downwards_and_zeros_to_the_edge(many):
    spec = spec_of(many, 0)
    circle = next(u for u in units(spec) if u["mark"]["type"] == "circle")
    assert circle["encoding"]["y"]["field"] == "at"
    assert circle["encoding"]["y"]["sort"] == list(NAMES)
    assert circle["encoding"]["x"]["scale"]["type"] == "log"
    low = circle["encoding"]["x"]["scale"]["domain"][0]
    zeros = of_kind(spec, "low")
    assert len(zeros) == 8
    assert all(r["y"] == pytest.approx(low, rel=1e-4) for r in zeros)
    assert all(r["y"] >= low * 0.999 for r in of_kind(spec, "median"))
    assert "▽" in spec["title"]["subtitle"]


def test_many_series_have_looks_of_their_own(many):
    point = next(u for u in units(spec_of(many, 1)) if "shape" in u["encoding"])
    looks = [point["encoding"][k]["scale"]["range"] for k in ("color", "shape")]
    assert len(set(zip(*looks, strict=True))) == len(NAMES)


def test_only_complete_seeds_are_drawn():
    study = made_up()
    rows = [r for r in result_of(study)["rows"] if r["seed"] < 3 or r["net"] == "plain"]
    cut = result_of(study) | {"rows": rows, "seeds": [0, 1, 2]}
    assert {r["seed"] for r in shown_rows(cut, study.plots[1].__dict__)} == {0, 1, 2}
    none = cut | {"seeds": []}
    assert len({r["seed"] for r in shown_rows(none, study.plots[1].__dict__)}) == 8


@pytest.mark.parametrize("index", range(4))
def test_languages_share_their_data(result, index):
    en, zh = (spec_of(result, index, lang) for lang in ("en", "zh"))
    assert en["datasets"] == zh["datasets"]
    assert CJK.search(zh["title"]["text"])
    assert not CJK.search(json.dumps(en, ensure_ascii=False))


@pytest.mark.parametrize(
    ("rule", "limit", "limits", "ground"),
    [
        ("above", 1.0, [1.0], (1.0, None)),
        ("below", 1.0, [1.0], (None, 1.0)),
        ("within", 1.0, [-1.0, 1.0], (-1.0, 1.0)),
        ("exact", 0.0, [0.0], (0.0, 0.0)),
    ],
)
def test_effects_stand_against_their_limit(rule, limit, limits, ground):
    main = Contrast(words("so"), lambda rows: rows.value("loss", **AT), limit, rule=rule)
    found = result_of(made_up(primary=main))
    spec = effects_chart(found).to_dict()
    assert [r["x"] for r in of_kind(spec, "limit")] == limits
    assert len(of_kind(spec, "seed")) == 8
    (shade,) = of_kind(spec, "holds")
    ends = next(units(spec))["encoding"]["x"]["scale"]["domain"]
    wanted = [e if g is None else g for e, g in zip(ends, ground, strict=True)]
    assert [shade["x"], shade["to"]] == pytest.approx(wanted, rel=1e-4)
    (middle,) = of_kind(spec, "median")
    (interval,) = of_kind(spec, "interval")
    assert interval["x"] <= middle["x"] <= interval["to"]


AT = {"net": "plain", "depth": 4, "width": 32}


def test_a_strip_of_a_contrast():
    given = {"effects": [0.0, 2.0, None], "limit": 1.0, "rule": "above"}
    assert strip(given) == {"points": [6.0, 144.0], "limits": [75.0], "side": (75.0, 150)}
    assert strip(given | {"rule": "below"})["side"] == (0, 75.0)
    assert strip(given | {"rule": "within"})["limits"] == [6.0, 98.0]
    assert strip(given | {"rule": "exact"}) is None
    assert strip(given | {"effects": [None]}) is None


# -- pages -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, result, many):
    out = tmp_path_factory.mktemp("studies")
    write_study_pages([result, many], out)
    return out


def text_of(html):
    """The page's words in English, one space apart."""
    html = re.sub(r'<span data-lang="zh".*?</span>', "", html)
    return " ".join(re.sub(r"<[^>]+>", " ", html).replace("\xa0", " ").split())


def test_a_page_leads_from_the_claim_to_the_verdict(folder, result):
    html, data = page_of(folder / "made-up.html")
    text = text_of(html)
    order = [
        "Is deep worse than shallow?",
        "supported Deep plain networks have a higher loss than shallow ones, by 0.5 nats.",
        "Median effect over 8 seeds: 1.83 nats, 95 % interval [1.4, 1.91]; the statement asks for "
        "&gt; 0.5 nats, p = 0.008.",
        "001:9 Deep plain networks are worse. supported It follows from what was tested",
        "000:80 Depth alone decides. refuted What was tested says the opposite: “The width makes "
        "no difference” (supported)",
        "Networks of several depths.",
        "All else is equal.",
        "asks for an effect &gt; 0.5 nats",
        "of all 256 ways to flip",
        "p is at most 0.05 and the mean effect lies above 0.5 nats ← this is the case",
        "p is at most 0.05 and the mean effect lies below 0.5 nats",
        "1 more plot of this study needs levels that this mode leaves out.",
        "2 of 96 cells failed",
        "For a failed one stands: training loss 2.3",
        "net = plain , depth = 64 , width = 32 : seed 3",
        "Descriptive: the study&#39;s verdict is that of the primary statement alone.",
        "Residual networks lose less than 0.1 nats.",
        "The same, larger 8.75 % Nobody 2015, Table 6",
        "Made-up numbers teach nothing.",
        "addnorm study made-up",
        f"addnorm {result['addnorm']}, torch {result['torch']}, Python {result['python']}",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert list(data["charts"]) == ["effects", "plot-0", "plot-1", "plot-2", "plot-3"]
    assert result["machine"] in text
    assert result["date"] in text


def test_a_page_of_a_run_that_the_budget_cut(tmp_path):
    rows = [r for r in result_of(made_up())["rows"] if r["seed"] < 3]
    cut = result_of(made_up()) | {"rows": rows, "seeds": [], "planned": 8, "mode": "quick"}
    lost = {"effects": [], "effect": None, "interval": [None, None], "p": None, "corrected": None}
    lost["verdict"] = cut["verdict"] = "INCONCLUSIVE"
    cut["contrasts"] = [c | lost for c in cut["contrasts"]]
    write_study_pages([cut], tmp_path)
    html, data = page_of(tmp_path / "made-up.html")
    text = text_of(html)
    assert "inconclusive" in text
    assert "0 of the 8 planned seeds are complete." in text
    assert "No seed is complete" in text
    assert "36 cells belong to seeds that are not complete" in text
    assert "addnorm study made-up --quick" in text
    assert "effects" not in data["charts"]
    assert "nan" not in text.lower().split()


def test_the_index_lists_verdicts_and_claims(folder):
    text = text_of(page_of(folder / "index.html")[0])
    assert "2 studies: 2 supported. 2 claims of the documents: 1 supported, 1 refuted." in text
    assert re.search(
        r"ST-90 Made up Deep plain networks .* supported 1\.83 \[1\.4, 1\.91\] nats", text
    )
    assert text.index("000:80") < text.index("001:9")
    links = re.findall(r'href="([^"]+)"', (folder / "index.html").read_text())
    assert set(links) == {"made-up.html", "many.html"}
    assert len((folder / "index.html").read_text()) < 60_000  # no charts, no Vega


def test_an_empty_folder_has_an_index(tmp_path):
    write_study_pages([], tmp_path)
    assert "No result yet." in (tmp_path / "index.html").read_text()
    with pytest.raises(ValueError, match="no language 'de'; take en or zh"):
        write_study_pages([], tmp_path, "de")


def test_pages_that_are_there_are_kept_where_others_are_named(tmp_path, result, many):
    for name in ("made-up", "many"):
        (tmp_path / f"{name}.html").write_text("old")
    write_study_pages([result, many], tmp_path, "en", ["many"])
    assert (tmp_path / "made-up.html").read_text() == "old"
    assert len((tmp_path / "many.html").read_text()) > 100_000
    (tmp_path / "made-up.html").unlink()
    write_study_pages([result, many], tmp_path, "en", [])
    assert len((tmp_path / "made-up.html").read_text()) > 100_000


def test_backticks_are_code():
    assert codes("`a<b` and c`d") == "<code>a&lt;b</code> and c`d"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A study each of whose texts and levels tries to end the script or to open a tag."""
    bad = words(HOSTILE, HOSTILE)
    given = made_up()
    study = replace(
        given,
        title=bad, question=bad, design=bad, controls=bad, lesson=bad,
        factors={"net": ("plain", "residual", HOSTILE), "depth": (4, 64), "width": (32, 128)},
        claims=tuple(replace(c, says=bad) for c in given.claims),
        primary=replace(given.primary, statement=bad, unit=bad),
        plots=tuple(replace(p, title=bad, x_title=bad) for p in given.plots),
        published=tuple(
            replace(p, what=bad, value=HOSTILE, source=HOSTILE) for p in given.published
        ),
    )  # fmt: skip
    found = result_of(study) | {"machine": HOSTILE, "settings": {HOSTILE: HOSTILE}}
    for row in found["rows"]:
        row["failed"] = row["failed"] or row["net"] == HOSTILE
    out = tmp_path_factory.mktemp("hostile")
    write_study_pages([found], out)
    return out


def test_hostile_texts_are_text(hostile):
    for name in ("made-up", "index"):
        whole = (hostile / f"{name}.html").read_text()
        assert "<img src=x" not in whole
        assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in whole
        page_of(hostile / f"{name}.html")


# -- in the browser ----------------------------------------------------------------------------

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@needs_chromium
@pytest.mark.parametrize(("name", "count"), [("made-up", 5), ("many", 4), ("index", 0)])
def test_page_in_both_languages(browser, folder, name, count):
    with opened(browser, folder / f"{name}.html") as page:
        shown = {}
        for lang, tag in (("en", "en"), ("zh", "zh-CN")):
            assert drawn(page) == lang
            assert page.evaluate("document.documentElement.lang") == tag
            boxes = [svg.bounding_box() for svg in page.query_selector_all(".chart svg.marks")]
            assert len(boxes) == count
            assert all(box["width"] > 100 and box["height"] > 100 for box in boxes)
            assert all(box["width"] < 1032 for box in boxes)  # none runs out of the page
            text = page.inner_text("body")
            assert not re.search(r"undefined|\bNaN\b|\bNone\b(?! of)|null", text)
            assert page.evaluate("document.documentElement.scrollWidth") <= 1280
            named = [title for title in titles(page) if " = " not in title]  # no panel's level
            shown[lang] = (page.title(), page.inner_text("h2 >> nth=0"), *named)
            page.click("#language")
        assert len(shown["en"]) >= count + 2
        assert all(a != b for a, b in zip(shown["en"], shown["zh"], strict=True))


@needs_chromium
def test_the_verdict_box(browser, folder):
    with opened(browser, folder / "made-up.html") as page:
        box = page.inner_text(".advice.verdict").replace("\n\n", "\n").replace("\xa0", " ")
        assert box == (
            "supported Deep plain networks have a higher loss than shallow ones, by 0.5 nats.\n"
            "Median effect over 8 seeds: 1.83 nats, 95 % interval [1.4, 1.91]; the statement asks "
            "for > 0.5 nats, p = 0.008."
        )
        page.click("#language")
        assert drawn(page) == "zh"
        assert page.inner_text(".advice.verdict").startswith("支持 中文：Deep plain")
        assert "8 个种子的效应中位数：1.83 中文：nats" in page.inner_text(".advice.verdict")


@needs_chromium
def test_every_mark_is_drawn(browser, folder):
    """As many points as seeds, and a cross for the failed one."""
    with opened(browser, folder / "made-up.html") as page:
        marks = [page.locator(f"#chart-plot-0 .layer_{i}_marks > *").count() for i in (2, 3, 4, 5)]
        assert marks == [47, 0, 1, 6]  # seeds, zeros, failed, medians
        assert page.locator("#chart-effects .layer_4_marks > *").count() == 8
        page.locator("#chart-plot-0 .role-legend-label text").first.click()
        page.locator("#chart-plot-0 .role-mark [opacity='0.06']").first.wait_for(state="attached")


@needs_chromium
def test_links_lead_from_the_index_to_the_studies_and_back(browser, folder):
    page = browser.new_page()
    page.goto((folder / "index.html").as_uri())
    page.click("text=ST-90 Made up")
    page.wait_for_selector("html[data-drawn=en]")
    assert page.inner_text("h1") == "ST-90 Made up"
    page.click("text=All studies")
    assert page.inner_text("h1") == "The studies"
    page.close()


@needs_chromium
def test_hostile_texts_do_nothing(browser, hostile):
    for name in ("made-up", "index"):
        with opened(browser, hostile / f"{name}.html") as page:
            page.on("dialog", lambda dialog: pytest.fail("a script of a name ran"))
            assert page.locator("img").count() == 0
            assert HOSTILE in page.inner_text("body")
            assert page.evaluate("document.documentElement.scrollWidth") <= 1280


@needs_chromium
def test_a_narrow_screen_scrolls_inside_the_page_only(browser, folder):
    for name in ("made-up", "index"):
        given = {"viewport": {"width": 400, "height": 800}}
        with opened(browser, folder / f"{name}.html", **given) as page:
            assert page.evaluate("document.documentElement.scrollWidth") <= 400


@needs_chromium
def test_no_chinese_glyph_is_missing(browser, folder):
    with opened(browser, folder / "made-up.html") as page:
        page.click("#language")
        assert drawn(page) == "zh"
        text = page.inner_text("body") + "".join(titles(page))
        chinese = "".join(sorted({c for c in text if "\u4e00" <= c <= "\u9fff"}))
        assert len(chinese) > 100
        assert page.evaluate(GLYPHS, chinese) == ""


# -- docs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_docs_of_the_studies(result, many, lang):
    text = study_markdown([result, many], lang)
    suffix = ".zh-CN" if lang == "zh" else ""
    for part in (
        f"(gallery{suffix}.md)",
        f"(images/studies/made-up{suffix}.png)",
        '<a id="made-up"></a>',
        "(#made-up)",
        result["date"],
        result["machine"],
        f"torch {result['torch']}",
        "001:9",
        result["lesson"][lang],
        "1.83 [1.4, 1.91]",
        "0.008",
    ):
        assert part in text
    assert "\n\n\n\n" not in text
    assert text.endswith("\n")
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):  # tables keep their columns
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block
    gallery = gallery_markdown([result, many], lang)
    assert gallery.count(f"(images/studies/many{suffix}.png)") == 1
    assert result["question"][lang] in gallery
    assert f"(studies{suffix}.md#made-up)" in gallery
    with pytest.raises(ValueError, match="no language 'de'"):
        study_markdown([result], "de")


def test_every_line_of_the_english_docs_is_english(result):
    text = study_markdown([result], "en").replace("中文", "")
    assert not CJK.search(text + gallery_markdown([result], "en").replace("中文", ""))


def test_pictures_are_small(tmp_path, result, many):
    from PIL import Image

    for found in (result, many):
        for lang in ("en", "zh"):
            write_picture(found, tmp_path / "new", lang)
            path = tmp_path / "new" / picture_of(found, lang)
            assert path.stat().st_size < 60_000
            with Image.open(path) as picture:
                assert picture.width > 900
    assert len(list((tmp_path / "new").iterdir())) == 4


def test_a_picture_without_plots_is_that_of_the_effects(tmp_path, result):
    write_picture(result | {"plots": []}, tmp_path)
    assert (tmp_path / "made-up.png").stat().st_size > 3000
