"""The Markdown pages of the studies and their pictures, out of the results; no torch.

`docs/studies.md` has a table of verdicts and a section per study, `docs/gallery.md` the first chart
of each; both also in Chinese.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from addnorm.files import write_atomic
from addnorm.reports.chart_style import Lang
from addnorm.reports.study_charts import plot_chart
from addnorm.reports.study_effects import effects_chart
from addnorm.reports.study_pages import by_place, main_of
from addnorm.reports.study_picture import shown_rows
from addnorm.reports.study_words import (
    MODES,
    counted,
    demand,
    duration,
    effect_in,
    effect_line,
    known,
    level_text,
    probability,
    text_in,
    verdict_in,
)

PPI, COLOURS = 110, 64  # of a picture; few colours make a small file
_TEMPLATES = Path(__file__).parent / "templates"


def study_markdown(results: Sequence[Mapping[str, Any]], lang: str) -> str:
    """Return the page of verdicts: a table, then each study with its claims, lesson and chart."""
    return _render("studies.md.j2", results, lang)


def gallery_markdown(results: Sequence[Mapping[str, Any]], lang: str) -> str:
    """Return the page with the first chart of every study."""
    return _render("gallery.md.j2", results, lang)


def picture_of(result: Mapping[str, Any], lang: str) -> str:
    """Return the name of a study's picture in a language."""
    return f"{result['name']}.png" if lang == "en" else f"{result['name']}.zh-CN.png"


def write_picture(result: Mapping[str, Any], folder: Path, lang: Lang = "en") -> None:
    """Write the first chart of a study that has rows, or else that of its effects, as a PNG."""
    from PIL import Image

    plots = [plot for plot in result["plots"] if shown_rows(result, plot)]
    chart = plot_chart(result, plots[0], lang) if plots else effects_chart(result, lang)
    drawn = io.BytesIO()
    chart.save(drawn, format="png", ppi=PPI)
    with Image.open(drawn) as picture:
        small = picture.convert("RGB").quantize(COLOURS)
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomic(folder / picture_of(result, lang)) as file:
        small.save(file, format="png", optimize=True)


def _render(template: str, results: Sequence[Mapping[str, Any]], lang: str) -> str:
    if lang not in ("en", "zh"):
        raise ValueError(f"no language {lang!r}; take en or zh")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=False,  # Markdown, and all of it is ours
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    return environment.get_template(template).render(
        results=results,
        claims=by_place(results),
        lang=lang,
        zh=lang == "zh",
        suffix=".zh-CN" if lang == "zh" else "",
        say=lambda en, zh: zh if lang == "zh" else en,
        text=lambda words: text_in(words, lang),
        verdict=lambda name: verdict_in(name, lang),
        mode=lambda result: MODES[result["mode"]][lang == "zh"],
        effect=lambda contrast: effect_in(contrast, lang),
        asks=lambda contrast: demand(contrast, lang),
        effect_line=lambda r: effect_line(main_of(r), len(r["seeds"]))[lang == "zh"],
        time=lambda result: duration(result["seconds"], lang),
        counted=lambda verdicts: counted(verdicts, lang),
        picture=lambda result: picture_of(result, lang),
        main_of=main_of,
        probability=probability,
        known=known,
        level_text=level_text,
    )


def _cell(text: str) -> str:
    """Put text into a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
