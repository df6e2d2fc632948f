"""Self-contained HTML pages, and those of a comparison, an X-ray and a training run; no torch.

A page asks the network for nothing: Vega, the charts and the styles are inside, and its content
security policy allows only the scripts whose hashes it names.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from addnorm import __version__
from addnorm.files import write_text
from addnorm.reports import charts, charts_single
from addnorm.reports.chart_style import Lang
from addnorm.reports.statements import statements
from addnorm.reports.summary import STATUS, UNITS, Summary, summarise
from addnorm.reports.trace_charts import trace_chart, traces_chart
from addnorm.reports.trace_deep import both_lines
from addnorm.reports.trace_deep_charts import deep_charts
from addnorm.reports.trace_view import (
    MEANINGS,
    OVERALL,
    PANELS,
    VITALS,
    coverage_lines,
    grouped,
    measured,
    verdict,
)
from addnorm.reports.trace_words import chinese, said

Chart = Callable[[Lang], Any]
_TEMPLATES = Path(__file__).parent / "templates"


def write_comparison_page(result: dict[str, Any], path: Path, lang: str = "en") -> None:
    """Write the report of a comparison as one HTML file, both languages inside.

    `lang`, `en` or `zh`, is what the page shows first. Raises `ValueError` for another one and for
    a comparison without a finished cell.
    """
    s = summarise(result)
    advice, *rest = statements(s)
    drawn: dict[str, Chart] = {
        "loss": lambda lang: charts.loss_by_depth(s, lang),
        "gradient": lambda lang: charts.gradient_by_depth(s, lang),
        "curves": lambda lang: charts.curves(s, lang),
        "stream": lambda lang: charts.stream_by_depth(s, lang),
    }
    context = {
        "title": ("Comparison of residual connections", "残差连接接法对比"),
        "s": s,
        "advice": advice,
        "found": rest,
        "rows": s.rows(),
        "warmups": _warmup_rows(s) if len(s.warmups) > 1 else [],
        "settings": _facts(result["settings"]),
        "choice": _facts(result.get("choice", {})),
        "measured": result.get("choice", {}).get("measured", []),
    }
    write_page("comparison.html.j2", path, lang, drawn, context)


def write_trace_page(trace: dict[str, Any], path: Path, lang: str = "en") -> None:
    """Write one X-ray, given as `Trace.to_dict()`, as one HTML file, both languages inside."""
    deep = trace.get("deep", {})
    figures = deep_charts(deep)
    drawn: dict[str, Chart] = {"trace": lambda lang: trace_chart(trace, lang), **figures}
    coverage = trace.get("coverage")
    seen = zip(coverage_lines(coverage, False), coverage_lines(coverage, True), strict=True)
    context = {
        "title": (f"X-ray of {trace['model']}", f"{trace['model']} 的透视"),
        "trace": trace,
        "groups": grouped(trace["findings"]),
        "counted": verdict(trace["findings"]),
        "coverage": list(seen),
        "fallbacks": (coverage or {}).get("fallbacks", {}),
        "deep": {name: both_lines(name, look) for name, look in deep.items()},
        "figures": list(figures),
        "vitals": measured(trace["connections"], VITALS),
        "lost": any(c["non_finite"] for c in trace["connections"]),
        "meanings": MEANINGS,
    }
    write_page("trace.html.j2", path, lang, drawn, context)


def write_traces_page(difference: dict[str, Any], path: Path, lang: str = "en") -> None:
    """Write two X-rays side by side, given as `TraceComparison.to_dict()`, as one HTML file."""
    drawn: dict[str, Chart] = {"traces": lambda lang: traces_chart(difference, lang)}
    both = [row[side] for row in difference["rows"] for side in "ab"]
    context = {
        "title": ("Two X-rays", "两次透视"),
        "difference": difference,
        "groups": {key: grouped(difference[key]) for key in ("new", "gone", "stayed")},
        "overall": OVERALL,
        "vitals": measured(both, PANELS),
    }
    write_page("traces.html.j2", path, lang, drawn, context)


def write_run_page(
    config: dict[str, Any],
    metrics: list[dict[str, Any]],
    summary: dict[str, Any],
    path: Path,
    lang: str = "en",
) -> None:
    """Write one training run as one HTML file, both languages inside.

    The arguments are what `config.json`, `metrics.jsonl` and `summary.json` of its folder hold.
    """
    unigram, uniform = float(config["data"]["unigram"]), float(config["data"]["uniform"])
    unit = str(config["data"]["unit"])
    drawn: dict[str, Chart] = {
        "run": lambda lang: charts_single.run_chart(metrics, unigram, uniform, lang, unit)
    }
    context = {
        "title": ("Training run", "训练记录"),
        "config": config,
        "words": UNITS[unit],
        "summary": summary,
        "evaluations": [row for row in metrics if "validation" in row],
        "measured": config.get("choice", {}).get("measured", []),
        "parts": {k: _facts(config.get(k, {})) for k in ("model", "train", "runtime", "choice")},
    }
    write_page("run.html.j2", path, lang, drawn, context)


def _warmup_rows(s: Summary) -> list[dict[str, Any]]:
    """Return a row per depth and wiring with its best group at each warm-up."""
    return [
        {"depth": depth, "wiring": wiring, "groups": [s.best(wiring, depth, w) for w in s.warmups]}
        for depth in s.depths
        for wiring in s.wirings
    ]


# -- the page ----------------------------------------------------------------------------------


def write_page(
    template: str, path: Path, lang: str, drawn: Mapping[str, Chart], context: dict[str, Any]
) -> None:
    """Write a page out of a template, both languages inside.

    `drawn` are its charts by the name of their place; `context` is what the template reads, `title`
    among it. Vega is inside where there is a chart. Raises `ValueError` for a `lang` other than
    `en` or `zh`, the one that the page shows first.
    """
    if lang not in ("en", "zh"):
        raise ValueError(f"no language {lang!r}; take en or zh")
    vega = _vega() if drawn else ""
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    page = _environment().get_template(template)
    html = page.render(
        **context,
        lang=lang,
        version=__version__,
        charts=list(drawn),
        data=_embed(_specs(drawn)),
        vega=Markup(vega),
        script=Markup(script),
        style=Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")),
        hashes=[_hash(vega), _hash(script)],
    )
    write_text(path, html)


def _specs(drawn: Mapping[str, Chart]) -> dict[str, Any]:
    """Return the charts in both languages; what they plot stands once, under `datasets`."""
    datasets: dict[str, Any] = {}
    specs: dict[str, dict[str, Any]] = {}
    for name, draw in drawn.items():
        specs[name] = {}
        for lang in ("en", "zh"):
            spec = draw(lang).to_dict()
            own = spec.pop("datasets", {})
            datasets |= own
            specs[name][lang] = {"spec": spec, "datasets": list(own)}
    return {"datasets": datasets, "charts": specs}


def _embed(value: Any) -> Markup:
    """Return JSON that no string in it can end: it holds no <, > or &."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@functools.cache
def _vega() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script for the Vega-Lite that Altair writes."""
    import vl_convert
    from altair import SCHEMA_VERSION

    version = "_".join(SCHEMA_VERSION.split(".")[:2])
    bundle: str = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]
    return bundle.replace("\r\n", "\n").replace("</script", "<\\/script")


def _hash(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "count": count, "breaks": breaks}
    environment.filters |= {"chinese": chinese, "said": said}
    environment.globals["STATUS"] = STATUS
    return environment


# -- numbers and facts -------------------------------------------------------------------------


def number(value: Any, form: str = ".3f") -> str:
    """Return a number as the tables show it: – where it is not known, ∞ where it is infinite."""
    if not isinstance(value, int | float) or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if form.endswith("g") and value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    text = format(value, form)
    if not text.strip("-0.%"):  # no minus zero
        text = text.lstrip("-")
    return text.replace("-", "−")


def count(value: Any) -> str:
    """Return a whole number with thousands separated."""
    return number(value, ",.0f")


def breaks(name: str) -> Markup:
    """Return the spec of a wiring that may break after its brackets and commas."""
    text = str(Markup.escape(name))
    return Markup(text.replace("(", "(<wbr>").replace(",", ",<wbr>"))


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return settings as names and text; what was `measured` has lines of its own."""
    return [(str(name), _text(value)) for name, value in values.items() if name != "measured"]


def _text(value: Any) -> str:
    match value:
        case None | "":
            return "–"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.6g}"
        case dict():
            return ", ".join(f"{k} = {_text(v)}" for k, v in value.items()) or "–"
        case str():
            return value
        case Sequence():
            return ", ".join(map(_text, value)) or "–"
        case _:
            return str(value)
