"""Comparisons: what the statements say, and the numbers of the table."""

import itertools
import math
import re

import pytest
from report_cases import (
    UNIFORM,
    UNIGRAM,
    make_cell,
    make_result,
    many_wirings,
    seeds,
    three_wirings,
)
from scipy import stats

from addnorm.reports.statements import statements
from addnorm.reports.summary import merge, status_of, summarise
from addnorm.training.config import TrainConfig

CJK = re.compile("[\u4e00-\u9fff]")


def said(cells):
    """The statements of cells by code; of a code that comes twice, the last."""
    return {s.code: s for s in statements(summarise(make_result(cells)))}


# -- statements --------------------------------------------------------------------------------


@pytest.mark.parametrize(("good", "bad"), [("plain", "prenorm"), ("prenorm", "plain")])
def test_the_opposite_outcome_gives_the_opposite_advice(good, bad):
    """Nothing is fixed to a name: exchange the outcomes and every sentence changes sides."""
    cells = seeds(bad, 3, [2.3, 2.31]) + seeds(bad, 24, [3.28, 3.27], slope=1.7)
    cells += seeds(good, 3, [2.1, 2.11]) + seeds(good, 24, [1.93, 1.94])
    result = make_result(cells)
    found = statements(summarise(result))
    assert found[0].code == "take"
    assert found[0].en.startswith(f"At depth 24 take {good}: validation loss 1.935")
    assert f"the next, {bad}, is at 3.275 (stuck)" in found[0].en
    assert f"建议采用 {good}" in found[0].zh
    trains = {s.en.split(":")[0]: s for s in found if s.code == "trains"}
    assert "trained at depth 3, 24 (validation loss 2.105 / 1.935)" in trains[good].en
    assert "stuck at depth 24 (3.275; the unigram line is 3.269)" in trains[bad].en
    assert "停滞" in trains[bad].zh
    assert "停滞" not in trains[good].zh
    whys = [s for s in found if s.code.startswith("why")]
    assert [s.en.split(",")[1].split()[0] for s in whys] == [bad]
    deeper = {s.en.split(":")[0]: s.code for s in found if s.code.startswith("depth")}
    assert deeper == {good: "depth-helps"}


def test_intervals_that_overlap_are_a_tie_and_intervals_that_do_not_are_none():
    tie = said(seeds("plain", 12, [1.90, 2.00]) + seeds("prenorm", 12, [1.95, 2.05]))
    assert "cannot be told from chance" in tie["take-tie"].en
    assert "plain" in tie["take-tie"].en
    assert "or prenorm" in tie["take-tie"].en
    assert "take" not in tie
    apart = said(seeds("plain", 12, [1.90, 2.00]) + seeds("prenorm", 12, [2.01, 2.05]))
    assert "take-tie" not in apart
    assert "take plain" in apart["take"].en


def test_one_seed_never_decides_between_wirings_that_train():
    cells = [make_cell("plain", 12, 0, 1.5), make_cell("prenorm", 12, 0, 2.5)]
    assert "take-one-seed" in said(cells)


def test_nothing_trained():
    none = said(seeds("plain", 24, [3.3, 3.3]) + seeds("prenorm", 24, [None, None]))
    assert none["take-none"].en.startswith("Take none of these at depth 24: no wiring trained")
    shallow = said(seeds("plain", 3, [2.0, 2.1]) + seeds("plain", 24, [3.3, 3.3]))
    assert shallow["take-none"].en.endswith("At depth 3, take plain.")
    partly = said(seeds("plain", 24, [2.0, 3.3]) + seeds("prenorm", 24, [3.3, 3.3]))
    assert "plain, trained with only 1 of 2 seeds" in partly["take-none"].en


@pytest.mark.parametrize(
    ("without", "with_", "code"),
    [(3.28, 2.0, "needs-warmup"), (2.0, 3.28, "warmup-harms"), (2.0, 1.99, None)],
)
def test_warmup_sentences_follow_the_outcome(without, with_, code):
    cells = seeds("postnorm", 12, [without, without + 0.01])
    found = said(cells + seeds("postnorm", 12, [with_, with_ + 0.01], warmup=100))
    assert {"needs-warmup", "warmup-harms"} & set(found) == ({code} if code else set())
    if code == "needs-warmup":
        assert "with 100 warm-up steps the validation loss is 2.005 (trained)" in found[code].en
        assert "with none it is 3.285 (stuck)" in found[code].en
        assert "需要预热" in found[code].zh


@pytest.mark.parametrize(
    ("slope", "similarity", "code"),
    [
        (1.7, 0.2, "why-vanishing"),
        (-1.7, 0.2, "why-exploding"),
        (0.2, 0.99, "why-collapse"),
        (0.2, 0.2, "why-unseen"),
    ],
)
def test_the_reason_follows_the_xray(slope, similarity, code):
    found = said(seeds("plain", 24, [3.28, 3.29], slope=slope, similarity=similarity))
    assert [c for c in found if c.startswith("why")] == [code]
    if code == "why-vanishing":
        assert "1.7 decades per 10 connections" in found[code].en
        assert "about 8.0 decades over all 48" in found[code].en
    assert not any(
        s.code.startswith("why")
        for s in statements(summarise(make_result(seeds("plain", 24, [2.0], slope=slope))))
    )


def test_every_statement_is_there_in_both_languages():
    results = [three_wirings(), many_wirings(12), make_result(seeds("plain", 3, [None]))]
    results.append(make_result(seeds("plain", 3, [3.3], similarity=0.99)))
    codes = set()
    for result in results:
        for s in statements(summarise(result)):
            codes.add(s.code)
            assert s.en.endswith(".")
            assert not CJK.search(s.en)
            assert s.zh.endswith("。")
            assert CJK.search(s.zh)
    assert {"take", "take-none", "trains", "needs-warmup", "why-vanishing", "own-start"} <= codes


# -- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("validation", "finite", "status"),
    [
        (UNIGRAM - 0.1001, True, "trained"),
        (UNIGRAM - 0.0999, True, "stuck"),
        (UNIGRAM, True, "stuck"),
        (UNIFORM, True, "stuck"),
        (UNIFORM + 0.0999, True, "stuck"),
        (UNIFORM + 0.1001, True, "diverged"),
        (2.0, False, "diverged"),
        (math.nan, True, "diverged"),
        (math.inf, True, "diverged"),
    ],
)
def test_status(validation, finite, status):
    assert status_of(validation, finite, UNIGRAM, UNIFORM) == status


def test_mean_and_interval():
    losses = [2.0, 2.1, 2.3]
    rows = summarise(make_result(seeds("prenorm", 12, losses))).rows()
    low, high = stats.t.interval(0.95, 2, loc=sum(losses) / 3, scale=stats.sem(losses))
    assert rows[0]["loss"] == pytest.approx(32 / 15)
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx((low, high))
    two = summarise(make_result(seeds("prenorm", 12, losses[:2]))).rows()[0]
    assert (two["low"], two["high"], two["seeds"]) == (2.0, 2.1, 2)
    lost = summarise(make_result(seeds("prenorm", 12, [2.0, 2.1, None]))).rows()[0]
    assert (lost["loss"], lost["high"], lost["status"]) == (math.inf, math.inf, "mixed")
    assert lost["trained"] == 2


def test_equal_time_and_equal_flops_are_read_off_the_curves():
    """Linear between evaluations; the budgets are those of the fastest and of the cheapest."""
    fast = make_cell("plain", 4, 0, 2.0) | {"curve": [[0, 4.6, 0], [250, 2.0, 1.0]]}
    slow = make_cell("prenorm", 4, 0, 2.2, slow=2) | {"curve": [[0, 4.6, 0], [250, 2.2, 2.0]]}
    deep = make_cell("plain", 8, 0, 1.8) | {"curve": [[0, 4.6, 0], [250, 1.8, 2.0]]}
    rows = {(r["wiring"], r["depth"]): r for r in summarise(make_result([fast, slow, deep])).rows()}
    assert rows["plain", 4]["equal_time"] == pytest.approx(2.0)
    assert rows["prenorm", 4]["equal_time"] == pytest.approx(3.4)
    assert rows["plain", 8]["equal_time"] == pytest.approx(1.8)
    assert rows["prenorm", 4]["equal_flops"] == pytest.approx(2.2)
    assert rows["plain", 8]["equal_flops"] == pytest.approx(3.2)


def test_the_table_takes_the_best_rate_and_warmup():
    cells = seeds("plain", 12, [2.3, 2.3], lr=0.001) + seeds("plain", 12, [2.2, 2.2], warmup=100)
    cells += seeds("plain", 12, [None, 1.0], lr=0.01)
    row = summarise(make_result(cells)).rows()[0]
    assert (row["lr"], row["warmup"], row["loss"]) == (0.002, 100, 2.2)


def test_an_empty_comparison_is_refused():
    with pytest.raises(ValueError, match="no finished cell"):
        summarise(make_result([]))


def test_merge_joins_cells_and_refuses_other_settings():
    one = make_result(seeds("plain", 3, [2.0]))
    two = make_result(seeds("prenorm", 3, [2.1]))
    joined = merge([one, two, one], lambda r: r["settings"]["network"])
    assert joined["settings"]["wirings"] == ["plain", "prenorm"]
    assert len(joined["cells"]) == 2
    with pytest.raises(ValueError, match="cannot be joined"):
        merge([one, two], lambda r: r["settings"]["wirings"])


def test_a_training_that_ended_early_sets_no_budget():
    """Equal time and equal FLOPs are budgets of whole trainings; one that diverged has ∞ there."""
    alone = summarise(make_result([make_cell("prenorm", 12, 0, 2.0)])).rows()[0]
    cells = [make_cell("prenorm", 12, 0, 2.0), make_cell("plain", 12, 0, None)]
    plain, prenorm = sorted(summarise(make_result(cells)).rows(), key=lambda r: r["wiring"])
    assert prenorm["equal_time"] == alone["equal_time"] == pytest.approx(2.0)
    assert prenorm["equal_flops"] == alone["equal_flops"] == pytest.approx(2.0)
    assert math.isnan(plain["equal_flops"])
    assert plain["equal_time"] == math.inf


def test_a_training_that_failed_at_its_first_step_is_a_row_and_no_error():
    cell = make_cell("plain", 12, 0, None) | {"steps": 0, "tokens": 0, "seconds": 0.0}
    cell["curve"] = [[0, None, 0.0]]
    row = summarise(make_result([cell])).rows()[0]
    assert row["status"] == "diverged"
    assert math.isnan(row["equal_time"])


def test_what_was_not_measured_is_not_explained():
    cells = seeds("plain", 24, [3.3, 3.3])
    for cell in cells:
        cell["start"] = cell["start"] | {"gradient_slope": None}
    assert not any(code.startswith("why") for code in said(cells))


def test_one_seed_says_nothing_about_the_spread_of_seeds():
    cells = [make_cell("prenorm", 3, 0, 2.5), make_cell("prenorm", 12, 0, 2.0)]
    found = said(cells)
    assert "0.500 lower than at depth 3, from one seed" in found["depth-one-seed"].en
    assert not any("spread" in s.en for s in found.values())


def test_a_loss_that_still_falls_is_no_illness():
    """The same stuck end, once level and once still falling in the last third."""
    level, falling = seeds("plain", 24, [3.3, 3.3]), seeds("plain", 24, [3.3, 3.3])
    for cell in falling:
        cell["curve"] = [[0, 4.7, 0.0], [150, 3.6, 0.6], [250, 3.3, 1.0]]
    for cell in level:
        cell["curve"] = [[0, 4.7, 0.0], [150, 3.301, 0.6], [250, 3.3, 1.0]]
    assert "too-short" in said(falling)
    assert "too-short" not in said(level)
    assert any(code.startswith("why") for code in said(level))


@pytest.mark.parametrize(("fall", "short"), [(0.0, False), (0.1, False), (0.5, True)])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_falling_loss_shows_under_a_falling_rate(schedule, fall, short):
    """A loss that goes with the sum of the rates, read at 11 points.

    Under cosine half a nat over the training is 0.3 % over the last evaluation.
    """
    rates = TrainConfig(steps=200, warmup=0, schedule=schedule)
    moved = list(itertools.accumulate([0.0, *map(rates.rate, range(200))]))
    cells = seeds("plain", 24, [3.3, 3.3])
    for cell in cells:
        cell["curve"] = [
            [i, 3.3 + fall * (1 - moved[i] / moved[-1]), i / 1000] for i in range(0, 201, 20)
        ]
    last = [row[1] for row in cells[0]["curve"][-2:]]
    assert schedule == "constant" or 1 - last[1] / last[0] < 0.004
    assert ("too-short" in said(cells)) == (short or (schedule == "constant" and fall > 0))


def test_the_best_cell_of_all_is_named_when_it_is_not_the_deepest():
    cells = seeds("postnorm", 2, [2.1, 2.11]) + seeds("prenorm", 8, [2.4, 2.41])
    assert "postnorm at depth 2, validation loss 2.105" in said(cells)["best-of-all"].en
    cells = seeds("postnorm", 2, [2.5, 2.51]) + seeds("prenorm", 8, [2.4, 2.41])
    assert "best-of-all" not in said(cells)
