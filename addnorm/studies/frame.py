"""A study, declared: question, claims, factors, metric, contrasts, verdict rule, budget.

One file `stNN_name.py` per study defines `STUDY`. Everything that decides the verdict stands there
before a run: the primary contrast, its direction and its limit. `measure` computes one cell (one
level of each factor, one seed) with the package's own models, trainer and X-ray; a contrast turns
the rows of one seed into one number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from addnorm.studies.verdict import Rule, Verdict

MODES = ("quick", "default", "long")
Row = Mapping[str, Any]


class Words(NamedTuple):
    """A text in both languages of the pages."""

    en: str
    zh: str


POINTS = Words("points", "个百分点")


@dataclass(frozen=True)
class Claim:
    """What a document says, in our words, and which contrast answers it.

    The claim gets the verdict of the contrast named `by` where it stands with its statement. Where
    it does not, it is REFUTED when the statement is SUPPORTED, and otherwise undecided: that "at
    least tenfold" is refuted does not make the contrary true.
    """

    id: str
    """number of the claim, document.claim: "1.10" """
    document: str
    """the document, "000" to "004" """
    line: int
    """where it stands"""
    says: Words
    by: str = "primary"
    stands: bool = True

    def answer(self, verdict: Verdict) -> Verdict:
        """Return the verdict on the claim, given that on the statement of its contrast."""
        if self.stands:
            return verdict
        return "REFUTED" if verdict == "SUPPORTED" else "INCONCLUSIVE"


class Rows(Sequence[Row]):
    """Measured cells: the levels of the factors, the settings, the seed and the metrics of each."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def only(self, **levels: Any) -> Rows:
        """Return the rows with these levels."""
        return Rows([r for r in self._rows if all(r[k] == v for k, v in levels.items())])

    def value(self, metric: str, **levels: Any) -> Any:
        """Return the metric of the one row with these levels; NaN where it was not finite."""
        (row,) = self.only(**levels)
        return math.nan if row[metric] is None else row[metric]

    def maybe(self, metric: str, **levels: Any) -> Any:
        """Return `value`, and NaN where the mode leaves these levels out."""
        return self.value(metric, **levels) if len(self.only(**levels)) else math.nan

    def best(self, metric: str, **levels: Any) -> float:
        """Return the smallest value of the metric in these rows, such as over a grid of rates."""
        values = [v for v in self.only(**levels).column(metric) if not math.isnan(v)]
        return min(values, default=math.nan)

    def column(self, name: str) -> list[Any]:
        """Return one value of each row, in the order of the factors' levels."""
        return [math.nan if row[name] is None else row[name] for row in self._rows]


@dataclass(frozen=True)
class Contrast:
    """A statement that can be wrong: over the seeds, the effect lies on one side of the limit.

    `rule`: `above` or `below` the limit, `within` it in absolute value (no difference), or `exact`,
    a computation whose deviation stays within the limit for every seed.
    """

    statement: Words
    effect: Callable[[Rows], float]
    """rows of one seed to one number in `unit`"""
    limit: float
    rule: Rule = "above"
    unit: Words = Words("", "")  # noqa: RUF009  # immutable
    name: str = "primary"


def in_points(effect: Callable[[Rows], float]) -> Callable[[Rows], float]:
    """Return an effect that is a difference of shares in percentage points."""
    return lambda rows: 100 * effect(rows)


@dataclass(frozen=True)
class Metric:
    """A number that `measure` returns, or a list of them over depth, steps or the like."""

    title: Words
    unit: Words = Words("", "")  # noqa: RUF009  # immutable
    failed: float | None = None
    """what stands for a training that diverged, such as the loss of guessing; None leaves it out"""


@dataclass(frozen=True)
class Plot:
    """A chart of the measured rows, every seed shown.

    `lines`: y over the numeric factor x, a line through the medians. `dots`: y over the levels of
    x, a tick at the median. `profile`: y is a list, drawn over its index (or over the list metric
    `x`), a thin line per seed and the median.
    """

    kind: Literal["lines", "dots", "profile"]
    title: Words
    x: str
    y: str
    color: str = ""
    facet: str = ""
    x_title: Words | None = None
    log_x: bool = False
    log_y: bool = False
    reference: float | None = None
    """a horizontal line, such as the loss of guessing"""
    reference_title: Words | None = None
    only: Mapping[str, Any] = field(default_factory=dict)
    """levels that are shown, such as {"rate": 0.05}"""


@dataclass(frozen=True)
class Published:
    """A figure of a paper beside which the result stands."""

    what: Words
    value: str | Words
    source: str
    """paper with table or section, "He et al. 2015 (arXiv:1512.03385), Table 6" """


@dataclass(frozen=True)
class Mode:
    """How much is computed: seeds, changed factors, settings of each cell, minutes on 2 cores."""

    seeds: int
    minutes: float
    factors: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A question with everything that decides its answer."""

    id: str
    """ "ST-03" """
    name: str
    """one word of the command line, such as "degradation" """
    title: Words
    question: Words
    design: Words
    """what is built, trained and compared"""
    controls: Words
    """what is held equal, and what else could explain the result"""
    lesson: Words
    """what to take away, whatever the verdict: hedged by it"""
    claims: tuple[Claim, ...]
    factors: Mapping[str, Sequence[Any]]
    measure: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    """a cell (levels, settings, seed) to its metrics; a function of the module, for processes"""
    metrics: Mapping[str, Metric]
    primary: Contrast
    modes: Mapping[str, Mode]
    """`default` and `quick`, and `long` where that differs from default"""
    plots: tuple[Plot, ...]
    """the first one stands in the gallery"""
    secondary: tuple[Contrast, ...] = ()
    published: tuple[Published, ...] = ()
    skip: Callable[[Mapping[str, Any]], bool] | None = None
    """levels that are not combined"""
    heavy: bool = False
    """whether `--all` leaves it to `--long`"""
    relied: bool = False
    """whether the package's own docs rely on the primary statement"""

    def __post_init__(self) -> None:
        names = [c.name for c in self.contrasts]
        assert len(set(names)) == len(names), f"{self.id}: two contrasts of one name"
        assert all(c.by in names for c in self.claims), f"{self.id}: a claim without its contrast"
        assert {"quick", "default"} <= set(self.modes) <= set(MODES), self.id
        shown = {*self.metrics, *self.factors}
        assert all(p.y in self.metrics and (p.x in shown or not p.x) for p in self.plots), self.id

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        """The primary contrast, then the secondary ones."""
        return (self.primary, *self.secondary)

    def mode(self, name: str) -> Mode:
        """Return the mode; `long` is the default one where the study has no other."""
        return self.modes.get(name, self.modes["default"])

    def cells(self, mode: str) -> Iterator[dict[str, Any]]:
        """Yield the cells of a mode, seed by seed, so that whole seeds are complete early."""
        chosen = self.mode(mode)
        factors = {**self.factors, **chosen.factors}
        for seed in range(chosen.seeds):
            for levels in itertools.product(*factors.values()):
                cell = dict(zip(factors, levels, strict=True))
                if self.skip is None or not self.skip(cell):
                    yield {**cell, **chosen.settings, "seed": seed}
