"""The pages of the studies: one for each result and an index, both languages inside; no torch."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from addnorm.reports.pages import Chart, write_page
from addnorm.reports.study_charts import plot_chart
from addnorm.reports.study_effects import effects_chart
from addnorm.reports.study_picture import shown_rows
from addnorm.reports.study_words import (
    MODES,
    VERDICTS,
    amount,
    counted,
    demand,
    duration,
    effect_in,
    effect_line,
    failures,
    known,
    level_text,
    probability,
    rule_lines,
    test_line,
    verdict_in,
)

STRIP = 150  # pixels, of the effects of a secondary contrast


def write_study_pages(
    results: Sequence[Mapping[str, Any]],
    out: Path,
    lang: str = "en",
    names: Sequence[str] | None = None,
) -> None:
    """Write `NAME.html` for each result into the folder `out`, and `index.html` with all verdicts.

    `names`: the results whose pages are written though they are there; all of them by default.
    `lang`, `en` or `zh`, is what the pages show first. Raises `ValueError` for another one.
    """
    for result in results:
        page = out / f"{result['name']}.html"
        if names is None or result["name"] in names or not page.exists():
            write_study_page(result, page, lang)
    _write_index(results, out / "index.html", lang)


def write_study_page(result: Mapping[str, Any], path: Path, lang: str = "en") -> None:
    """Write the page of one result of a study."""
    plots = [plot for plot in result["plots"] if shown_rows(result, plot)]
    drawn: dict[str, Chart] = {}
    if any(known(v) for v in main_of(result)["effects"]):
        drawn["effects"] = functools.partial(effects_chart, result)
    for i, plot in enumerate(plots):
        drawn[f"plot-{i}"] = functools.partial(plot_chart, result, plot)
    main, count = main_of(result), len(result["seeds"])
    by_name = {contrast["name"]: contrast for contrast in result["contrasts"]}
    title = result["title"]
    context = {
        **_words(),
        "title": tuple(f"{result['id']} {title[key]}" for key in ("en", "zh")),
        "r": result,
        "main": main,
        "says": effect_line(main, count),
        "test": test_line(main, count),
        "rules": rule_lines(main, result["planned"]),
        "claims": [(claim, by_name[claim["by"]]) for claim in result["claims"]],
        "plots": list(drawn),
        "left_out": len(result["plots"]) - len(plots),
        "secondary": [(c, strip(c)) for c in result["contrasts"] if c["name"] != "primary"],
        "failures": failures(result),
        "stands": [m for m in result["metrics"].values() if known(m["failed"])],
        "rest": sum(row["seed"] not in result["seeds"] for row in result["rows"]),
        "again": f"addnorm study {result['name']}"
        + ("" if result["mode"] == "default" else f" --{result['mode']}"),
    }
    write_page("study.html.j2", path, lang, drawn, context)


def _write_index(results: Sequence[Mapping[str, Any]], path: Path, lang: str) -> None:
    rows = [{**result, **_primary(result)} for result in results]
    claims = by_place(results)
    context = {
        **_words(),
        "title": ("The studies", "实验一览"),
        "rows": rows,
        "claims": claims,
        "verdicts": [counted((r["verdict"] for r in rows), lang) for lang in ("en", "zh")],
        "answers": [counted((c["verdict"] for c, _ in claims), lang) for lang in ("en", "zh")],
    }
    write_page("studies.html.j2", path, lang, {}, context)


def _words() -> dict[str, Any]:
    """Return what the templates of studies call."""
    functions = (amount, codes, demand, duration, level_text, probability, verdict_in)
    called: dict[str, Any] = {f.__name__: f for f in functions}
    called["effect_in"] = _unbroken
    return called | {"VERDICTS": VERDICTS, "MODES": MODES}


def _unbroken(row: Mapping[str, Any], lang: str) -> str:
    """Write an effect whose interval stays on one line."""
    return effect_in(row, lang).replace(", ", ",\N{NO-BREAK SPACE}")


def codes(text: str) -> Markup:
    """Return text in which `backticks` are code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def main_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the primary contrast of a result."""
    (main,) = [c for c in result["contrasts"] if c["name"] == "primary"]
    return dict(main)


def by_place(results: Sequence[Mapping[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """Return every claim with the name of its study, in the order of documents and lines."""
    claims = [(claim, str(result["name"])) for result in results for claim in result["claims"]]
    return sorted(claims, key=lambda pair: (pair[0]["document"], pair[0]["line"], pair[0]["id"]))


def _primary(result: Mapping[str, Any]) -> dict[str, Any]:
    main = main_of(result)
    return {key: main[key] for key in ("unit", "statement", "rule", "limit")}


def strip(contrast: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return where the effects and limits of a contrast lie in a strip, in pixels; the side too.

    None where there is no effect, and for a computation, whose effects lie far inside its limit.
    """
    found = [v for v in contrast["effects"] if known(v)]
    limit, rule = contrast["limit"], contrast["rule"]
    if not found or rule == "exact":
        return None
    limits = [-limit, limit] if rule == "within" else [limit]
    low, high = min(found + limits), max(found + limits)
    span = (high - low) or 1.0
    at = {v: round(6 + (STRIP - 12) * (v - low) / span, 1) for v in {*found, *limits}}
    places = [at[v] for v in limits]
    side = {"above": (places[0], STRIP), "below": (0, places[0])}.get(rule, (places[0], places[-1]))
    return {"points": [at[v] for v in found], "limits": places, "side": side}
