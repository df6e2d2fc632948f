"""What the X-ray measured: plain numbers with names and units, without torch.

A *connection* here is one residual connection, or one block of a model whose additions are not
seen. Index 0 is nearest to the input.
"""

from __future__ import annotations

import math
import typing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addnorm.files import read_json, write_json
from addnorm.probe.structure import Coverage

if TYPE_CHECKING:
    from altair import VConcatChart
    from pandas import DataFrame  # type: ignore[import-untyped,unused-ignore]
    from rich.console import RenderableType

    from addnorm.probe.trace_comparison import TraceComparison

SCHEMA = 2
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
    why_zh: str = ""  # in Chinese
    remedy_zh: str = ""


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
    non_finite: int  # NaN or infinite values in the stream that leaves and in the gradients
    non_finite_gradient: int = 0  # those of them on the way back
    block: str = ""  # the block that it lies in
    kind: str = ""  # wiring, add, or block (taken whole)
    projected: bool = False  # whether the skip goes through a projection of its own
    branch_cosine: float = math.nan  # cosine between what is added and what it is added to
    stream_cosine: float = math.nan  # mean over positions, between the stream before and after
    identity_gain: float = math.nan  # E[v.Jv]/E[v.v], J of the connection: 0 for a lost skip
    gain_forward: float = math.nan  # sqrt(E|Jv|^2/E|v|^2)
    gain_backward: float = math.nan  # sqrt(E|J'v|^2/E|v|^2)
    effective_rank: float = math.nan  # (sum s^2)^2 / sum s^4 over the singular values s
    dead_units: float = math.nan  # share of the branch's features that are 0 in the whole batch
    streams_cosine: float = math.nan  # mean cosine between the streams, where there are several


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
    coverage: Coverage | None = None  # what discovery saw, what fell back and why
    fed: str = ""  # what the model was given, in a few words; "" where nobody said
    deep: dict[str, Any] = field(default_factory=dict)  # results of the deeper looks, by name
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
        looks = {k: v if isinstance(v, dict) else v.to_dict() for k, v in self.deep.items()}
        return asdict(replace(self, deep={})) | derived | {"deep": looks}

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Trace:
        """Return the trace that `to_dict` wrote. Raises `ValueError` for another schema."""
        if facts.get("schema") != SCHEMA:
            raise ValueError(f"trace of schema {facts.get('schema')}; this version reads {SCHEMA}")
        connections = tuple(
            Connection(**typing.cast(Any, {k: math.nan if v is None else v for k, v in c.items()}))
            for c in facts["connections"]
        )
        seen = facts.get("coverage")
        if seen is not None:
            lists = {k: tuple(seen.get(k, ())) for k in ("notes", "doubled")}
            seen = Coverage(**seen | lists)
        loss = math.nan if facts["loss"] is None else facts["loss"]
        plain = {k: facts[k] for k in ("model", "wiring", "blocks", "loss_kind")}
        return cls(
            **plain,
            loss=loss,
            connections=connections,
            findings=tuple(Finding(**f) for f in facts["findings"]),
            coverage=seen,
            fed=facts.get("fed", ""),
            deep=facts.get("deep", {}),
        )

    def save(self, path: str | Path, lang: str = "en") -> None:
        """Write the trace as JSON, or as one HTML page where the name ends in `.html`.

        The page holds English and Chinese; `lang`, `en` or `zh`, is what it shows first.
        """
        if Path(path).suffix == ".html":
            from addnorm.reports.pages import write_trace_page

            write_trace_page(self.to_dict(), Path(path), lang)
        else:
            write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace from JSON. Raises `ValueError` where the file holds none, or a torn one."""
        facts = read_json(Path(path))
        if not isinstance(facts, dict) or not facts.get("connections"):
            raise ValueError(f"{path} holds no trace")
        try:
            return cls.from_dict(facts)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no whole trace: {error}") from None

    def to_pandas(self) -> DataFrame:
        """Return the vitals as a data frame, one row a connection. Needs pandas."""
        try:
            import pandas as pd  # type: ignore[import-untyped,unused-ignore]
        except ImportError:
            raise ValueError("to_pandas() needs pandas: pip install pandas") from None
        return pd.DataFrame([asdict(connection) for connection in self.connections])

    def table(self, lang: str = "en", *, everything: bool = False) -> str:
        """Return text: sparklines over depth, a row a connection from the input on, the findings.

        `lang` is `en` or `zh`. The middle of a long table is left out, and of many findings with
        one code all but the first, unless `everything` is asked for.
        """
        from addnorm.reports.trace_table import plain

        return plain(self.to_dict(), lang, everything)

    def plot(self, lang: str = "en") -> VConcatChart:
        """Return the vitals over depth as an Altair chart, which a notebook shows."""
        from addnorm.reports.trace_charts import trace_chart

        return trace_chart(self.to_dict(), "zh" if lang == "zh" else "en")

    def compare(self, other: Trace) -> TraceComparison:
        """Return this trace beside `other`: what differs by depth, which findings are gone or new.

        The traces may differ in model and depth.
        """
        from addnorm.probe.trace_comparison import compare_traces

        return compare_traces(self, other)

    def __rich__(self) -> RenderableType:
        from addnorm.reports.trace_table import rendered

        return rendered(self.to_dict())

    def __str__(self) -> str:
        return self.table()
