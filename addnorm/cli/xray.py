"""`addnorm xray`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from addnorm import runs
from addnorm.cli.parsing import Lang, emit_json
from addnorm.plugins import own_code, resolve
from addnorm.probe.trace import Trace
from addnorm.probe.vitals import xray
from addnorm.reports.pages import write_trace_page


@dataclass(frozen=True)
class Options:
    """The options of `addnorm xray`."""

    target: Annotated[str, tyro.conf.Positional]
    """folder of a run, or pkg.module:function returning (model, inputs[, targets])"""
    blocks: str = ""
    """glob over module names, in place of the search for connections"""
    html: str = ""
    """also write a page to this file"""
    json: str = ""
    """also write the trace as JSON to this file; - is stdout"""
    lang: Lang = "en"
    """the page's first language"""


def run(options: Options) -> int:
    """X-ray the target, print the table, and return 1 when a finding is sick."""
    trace = _trace(options.target, options.blocks or None)
    if options.html:
        write_trace_page(trace.to_dict(), Path(options.html), options.lang)
    if options.json != "-":
        print(f"{trace.model}, {trace.wiring or 'no wiring of addnorm'}: {trace.blocks}")
        print(trace.table())
    emit_json(trace.to_dict(), options.json)
    return 0 if trace.ok else 1


def _trace(target: str, blocks: str | None) -> Trace:
    if ":" not in target:
        return runs.xray_run(runs.load_run(target), blocks=blocks)
    function = resolve(target)
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(f"{target} must need no arguments: {error}") from None
    with own_code(target):
        made = function()
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise ValueError(f"{target} must return (model, inputs) or (model, inputs, targets)")
    return xray(*made, blocks=blocks)
