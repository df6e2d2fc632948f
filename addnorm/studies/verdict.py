"""From one number per seed to a verdict: exact sign-flip tests, bootstrap intervals, Holm.

A contrast gives one effect per seed, of conditions that share the seed's start and data order. The
declared limit parts the two verdicts: effects that lie beyond it on one side speak for the
statement, beyond it on the other side against it, and what chance can explain decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import bootstrap, permutation_test

Rule = Literal["above", "below", "within", "exact"]
Verdict = Literal["SUPPORTED", "REFUTED", "INCONCLUSIVE"]
ALPHA = 0.05
SEEDS = 6  # fewer sign-flips than 2^6 cannot give a two-sided p below 0.05
RESAMPLES = 9999  # of the bootstrap, and of the flips where 2^n is larger


@dataclass(frozen=True)
class Judgement:
    """What the effects of a contrast say of its statement."""

    verdict: Verdict
    effect: float  # the median over seeds; NaN where a seed has none
    interval: tuple[float, float]  # 95 %, of the median, by bootstrap over seeds
    p: float  # of `rule` below; NaN for rule "exact" and where it cannot be computed


def judge(effects: Sequence[float], rule: Rule, limit: float) -> Judgement:
    """Return the verdict on a statement about effects, one number per seed.

    `above`: the effect exceeds `limit`. `below`: it stays under it. For both, p is two-sided, of
    the exact sign-flip test of the mean of effect - limit, and the side decides between SUPPORTED
    and REFUTED. `within`: |effect| < limit, by two one-sided sign-flip tests (TOST, Schuirmann
    1987), p the larger of both; REFUTED where the effect lies beyond the limit by the two-sided
    test, whose p it then is. `exact`: |effect| <= limit for every seed, a computation without
    chance. INCONCLUSIVE where p exceeds 0.05, and where an effect is not finite.
    """
    values = np.asarray(effects, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        return Judgement("INCONCLUSIVE", math.nan, (math.nan, math.nan), math.nan)
    middle, interval = float(np.median(values)), median_interval(values)
    if rule == "exact":
        verdict: Verdict = "SUPPORTED" if (np.abs(values) <= limit).all() else "REFUTED"
        return Judgement(verdict, middle, interval, math.nan)
    if rule == "within":
        p = max(sign_flip(values + limit, "greater"), sign_flip(values - limit, "less"))
        if p <= ALPHA:
            return Judgement("SUPPORTED", middle, interval, p)
        beyond = [v for v in (values - limit, -limit - values) if v.mean() > 0]
        outside = min((sign_flip(v, "two-sided") for v in beyond), default=math.nan)
        if outside <= ALPHA:
            return Judgement("REFUTED", middle, interval, outside)
        return Judgement("INCONCLUSIVE", middle, interval, p)
    p = sign_flip(values - limit, "two-sided")
    return Judgement(_side(values, rule, limit, p), middle, interval, p)


def _side(values: np.ndarray, rule: Rule, limit: float, p: float) -> Verdict:
    """Return the verdict of a one-sided statement whose two-sided p is known."""
    if not p <= ALPHA:
        return "INCONCLUSIVE"
    return "SUPPORTED" if (values.mean() > limit) == (rule == "above") else "REFUTED"


def sign_flip(values: np.ndarray, alternative: Literal["two-sided", "greater", "less"]) -> float:
    """Return p of the sign-flip test that the values `(n,)` are symmetric about 0.

    All 2^n flips of sign are counted up to n = 13; beyond that 9,999 random ones, seeded. A single
    value has p = 1.
    """
    if len(values) < 2:
        return 1.0
    found = permutation_test(
        (values,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        alternative=alternative,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of the median by bootstrap over the values `(n,)`."""
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.min()), float(values.max())
    found = bootstrap(
        (values,),
        np.median,
        method="percentile",
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def holm(ps: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979); NaN stays out of the count."""
    known = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    corrected, largest = [math.nan] * len(ps), 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[i] = largest
    return corrected


def judge_all(
    contrasts: Sequence[tuple[Sequence[float], Rule, float]],
) -> list[tuple[Judgement, float]]:
    """Return the judgement of each secondary contrast with its p after Holm's correction.

    A p above 0.05 after the correction makes the verdict INCONCLUSIVE.
    """
    judged = [judge(*contrast) for contrast in contrasts]
    result = []
    for one, p in zip(judged, holm([j.p for j in judged]), strict=True):
        weak = not math.isnan(p) and p > ALPHA
        verdict: Verdict = "INCONCLUSIVE" if weak else one.verdict
        result.append((Judgement(verdict, one.effect, one.interval, one.p), p))
    return result
