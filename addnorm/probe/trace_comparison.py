"""Two traces beside each other: vitals by position in depth, findings gone and new; no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addnorm.files import write_json

if TYPE_CHECKING:
    from addnorm.probe.trace import Connection, Finding, Trace


@dataclass(frozen=True)
class Pair:
    """A connection of each trace at about the same position in depth."""

    place: float  # 0 is the first connection, 1 the last
    index_a: int
    index_b: int
    a: Connection
    b: Connection


@dataclass(frozen=True)
class Side:
    """What one of the two traces says as a whole."""

    label: str  # model and wiring
    connections: int
    loss: float
    loss_kind: str
    ok: bool
    gradient_slope: float
    stream_growth: float
    token_similarity: float
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class TraceComparison:
    """Trace `a` beside trace `b`, say before and after a change, in plain numbers.

    `rows` pairs every connection of the trace that has fewer with the one of the other trace that
    is nearest by its place in depth. A finding is `gone` or `new` by its code: where it lies
    changes with depth and names.
    """

    a: Side
    b: Side
    rows: tuple[Pair, ...]
    gone: tuple[Finding, ...]  # of a; b has none of that code
    new: tuple[Finding, ...]  # of b; a has none of that code
    stayed: tuple[Finding, ...]  # of b; a has some of that code too

    @property
    def ok(self) -> bool:
        """Whether trace b has no sick finding."""
        return self.b.ok

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"ok": self.ok}

    def table(self, lang: str = "en", *, everything: bool = False) -> str:
        """Return both as text; long tables are folded unless `everything` is asked for."""
        from addnorm.reports.trace_table import as_text, compared

        return as_text(compared(self.to_dict(), lang, everything))

    def save(self, path: str | Path, lang: str = "en") -> None:
        """Write JSON, or one HTML page where the name ends in `.html`."""
        if Path(path).suffix == ".html":
            from addnorm.reports.pages import write_traces_page

            write_traces_page(self.to_dict(), Path(path), lang)
        else:
            write_json(Path(path), self.to_dict())

    def __str__(self) -> str:
        return self.table()


def compare_traces(a: Trace, b: Trace) -> TraceComparison:
    """Return both traces beside each other."""
    codes_a, codes_b = ({f.code for f in trace.findings} for trace in (a, b))
    count = min(len(a.connections), len(b.connections))
    rows = []
    for k in range(count):
        place = k / (count - 1) if count > 1 else 0.0
        i, j = (_nearest(place, len(trace.connections)) for trace in (a, b))
        rows.append(Pair(place, i, j, a.connections[i], b.connections[j]))
    return TraceComparison(
        a=_side(a),
        b=_side(b),
        rows=tuple(rows),
        gone=tuple(f for f in a.findings if f.code not in codes_b),
        new=tuple(f for f in b.findings if f.code not in codes_a),
        stayed=tuple(f for f in b.findings if f.code in codes_a),
    )


def _nearest(place: float, count: int) -> int:
    return int(place * (count - 1) + 0.5)


def _side(trace: Trace) -> Side:
    return Side(
        label=f"{trace.model}, {trace.wiring}" if trace.wiring else trace.model,
        connections=len(trace.connections),
        loss=trace.loss,
        loss_kind=trace.loss_kind,
        ok=trace.ok,
        gradient_slope=trace.gradient_slope,
        stream_growth=trace.stream_growth,
        token_similarity=trace.token_similarity,
        findings=trace.findings,
    )
