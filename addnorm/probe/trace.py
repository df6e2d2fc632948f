"""What the X-ray measured: plain numbers with names and units, without torch.

A *connection* here is one residual connection, or one block of a model whose additions are not
seen. Index 0 is nearest to the input.
"""

from __future__ import annotations

import math
import typing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from addnorm.files import read_json, write_json

SCHEMA = 1
UNDERFLOW = 1e-45  # a gradient of exactly 0 counts as the smallest float32 in the slope


@dataclass(frozen=True)
class Finding:
    """What a trace means: a code, how bad, where, what was measured and what would cure it."""

    code: str
    severity: str  # note, warning, sick
    where: str
    value: str
    expected: str
    why: str
    remedy: str
    source: str


@dataclass(frozen=True)
class Connection:
    """The vitals of one connection. A value that cannot be measured is NaN."""

    name: str
    stream_before: float  # RMS of the stream that enters
    stream_after: float  # RMS of the stream that leaves
    branch_share: float  # RMS of what is added / RMS of what it is added to; NaN without a skip
    gradient_before: float  # RMS of dLoss/dstream where it enters
    gradient_after: float  # RMS of dLoss/dstream where it leaves
    token_similarity: float  # mean cosine between positions of the stream that leaves
    non_finite: int  # NaN or infinite values in the stream that leaves and in its gradient


@dataclass(frozen=True)
class Trace:
    """One X-ray: the vitals by depth, the loss they belong to, and the findings."""

    model: str  # class of the model
    wiring: str  # spec of its stack; "" for a model that is not ours
    blocks: str  # where the connections were found
    loss: float
    loss_kind: str  # which loss the gradients belong to
    connections: tuple[Connection, ...]
    findings: tuple[Finding, ...] = ()
    schema: int = field(default=SCHEMA)

    @property
    def ok(self) -> bool:
        """Whether no finding is sick."""
        return all(finding.severity != "sick" for finding in self.findings)

    @property
    def gradient_slope(self) -> float:
        """Decades of gradient RMS per 10 connections, least squares over depth, embedding excluded.

        Positive: the gradient is larger near the output, so it shrinks on its way back to the
        input. 0: every depth gets the same. NaN with fewer than 2 connections or where it is not
        finite.
        """
        rows = [(i, c.gradient_after) for i, c in enumerate(self.connections)]
        if len(rows) < 2 or not all(math.isfinite(g) for _, g in rows):
            return math.nan
        mean_x = sum(i for i, _ in rows) / len(rows)
        logs = [math.log10(max(g, UNDERFLOW)) for _, g in rows]
        mean_y = sum(logs) / len(logs)
        covariance = sum((i - mean_x) * (y - mean_y) for (i, _), y in zip(rows, logs, strict=True))
        return 10 * covariance / sum((i - mean_x) ** 2 for i, _ in rows)

    @property
    def stream_growth(self) -> float:
        """RMS of the stream after the last connection / before the first."""
        first, last = self.connections[0].stream_before, self.connections[-1].stream_after
        return last / first if first > 0 else math.nan

    @property
    def token_similarity(self) -> float:
        """Mean cosine between positions after the last connection: 1 says that all are alike."""
        return self.connections[-1].token_similarity

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the derived ones included."""
        derived = {
            "ok": self.ok,
            "gradient_slope": self.gradient_slope,
            "stream_growth": self.stream_growth,
            "token_similarity": self.token_similarity,
        }
        return asdict(self) | derived

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Trace:
        """Return the trace that `to_dict` wrote. Raises `ValueError` for another schema."""
        if facts.get("schema") != SCHEMA:
            raise ValueError(f"trace of schema {facts.get('schema')}; this version reads {SCHEMA}")
        connections = tuple(
            Connection(**typing.cast(Any, {k: math.nan if v is None else v for k, v in c.items()}))
            for c in facts["connections"]
        )
        findings = tuple(Finding(**f) for f in facts["findings"])
        loss = math.nan if facts["loss"] is None else facts["loss"]
        plain = {k: facts[k] for k in ("model", "wiring", "blocks", "loss_kind")}
        return cls(**plain, loss=loss, connections=connections, findings=findings)

    def save(self, path: str | Path) -> None:
        """Write the trace as JSON, or as one HTML page where the name ends in `.html`."""
        if Path(path).suffix == ".html":
            from addnorm.reports.pages import write_trace_page

            write_trace_page(self.to_dict(), Path(path))
        else:
            write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace from JSON."""
        facts = read_json(Path(path))
        if not isinstance(facts, dict) or "connections" not in facts:
            raise ValueError(f"{path} holds no trace")
        return cls.from_dict(facts)

    def table(self) -> str:
        """Return the vitals as an aligned text table, first connection on top."""
        head = ("#", "connection", "stream", "share", "gradient", "similarity")
        rows = [
            (str(i), c.name, *map(_short, vitals), f"{c.token_similarity:.3f}")
            for i, c in enumerate(self.connections)
            for vitals in [(c.stream_after, c.branch_share, c.gradient_after)]
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
            for row in [head, *rows]
        ]
        lines.append(
            f"gradient slope {self.gradient_slope:+.2f} decades per 10 connections, stream growth "
            f"{self.stream_growth:.3g}x, loss {self.loss:.4g} ({self.loss_kind})"
        )
        lines += [f"{f.severity}: {f.code} at {f.where}: {f.why} {f.remedy}" for f in self.findings]
        return "\n".join(line.rstrip() for line in lines)

    def __str__(self) -> str:
        return self.table()


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"
