"""ST-19: the verdicts both ways, counts by hand, and planted costs through the real measure."""

import math

import pytest
import torch
from study_rows import concluded, small, verdicts

from addnorm.studies import st19_cost as module

STUDY = module.STUDY


def made_up(**found):
    """Costs as they should be, or as given; times are a little different for every cell."""

    def metrics(cell):
        wobble = 0.01 * math.sin(7 * cell["seed"] + 1)
        sound = {
            "parameters": 0,
            "projected": 4096.0,
            "share": 0.005,
            "traffic": 3.0,
            "memory": 0.0,
            "norm_memory": 0.2,
            "time": 0.02,
            "least": 0.02,
            "norm_time": 0.1,
            "pass": 2.0,
        } | found
        return sound | {k: sound[k] + wobble for k in ("time", "norm_time")}

    return metrics


@pytest.mark.parametrize(
    ("wrong", "contrast", "claim"),
    [
        ({"parameters": 64}, "primary", "4.19"),
        ({"share": 0.2}, "operations", "4.20"),
        ({"norm_time": -0.02}, "norm-takes-time", "4.21"),
        ({"projected": 0.0}, "projection-adds", None),
        ({"memory": 0.1}, "memory", None),
        ({"traffic": 4.0}, "traffic", None),
        ({"time": 0.3}, "time", "4.20b"),
        ({"time": -0.3}, "time", "4.20b"),
    ],
)
def test_every_statement_can_be_refuted(wrong, contrast, claim):
    sound, found = (verdicts(concluded(STUDY, made_up(**w))) for w in ({}, wrong))
    assert (sound[contrast], found[contrast]) == ("SUPPORTED", "REFUTED")
    changed = {name for name in sound if sound[name] != found[name]}
    assert changed == {contrast} | ({claim} if claim else set())


def test_a_busy_machine_decides_nothing():
    def metrics(cell):
        return made_up()(cell) | {"time": 0.5 * math.sin(5 * cell["seed"]), "norm_time": math.nan}

    found = verdicts(concluded(STUDY, metrics))
    assert (found["time"], found["4.21"]) == ("INCONCLUSIVE", "INCONCLUSIVE")
    assert found["4.20"] == "REFUTED"


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("dense", 2 * 64 * 64),
        ("convolution", 2 * 9 * 64 * 64),
        ("transformer", (12 * 64 * 64 + 2 * 64 * 64) / 2),  # and 64 positions: scores and their sum
    ],
)
def test_the_multiply_adds_by_hand(kind, count):
    stack = module._stack(kind, "plain")
    x = torch.randn(*module.SHAPES[kind], 64)
    assert module.products(stack, x) == count


def test_the_kept_bytes_by_hand():
    """A dense branch keeps its input and what its ReLU returns, each (512, 64) in float32."""
    x = torch.randn(512, 64)
    one = 512 * 64 * 4
    assert module.saved(module._stack("dense", "plain"), x) == 2 * module.COUNT * one
    more = module.saved(module._stack("dense", "prenorm"), x) - 2 * module.COUNT * one
    assert more == module.COUNT * (one + 2 * 512 * 4)  # the norm's input, mean and 1/deviation


def test_the_stacks_take_turns():
    """Each is timed as often, and the ratio is that of neighbours."""
    stacks = {name: module._stack("dense", "plain") for name in module.TIMED}
    seconds = module.timed(stacks, torch.randn(4, 64), 5, 1)
    assert {len(values) for values in seconds.values()} == {5}
    assert module.longer([1.1, 2.2, 30.0], [1.0, 2.0, 3.0]) == pytest.approx(0.1)


def test_a_matrix_in_the_shortcut_flips_the_claims(monkeypatch):
    """A projection in place of the identity: parameters and operations are added, and seen."""
    module._joining.cache_clear()
    module._traffic.cache_clear()
    monkeypatch.setitem(module.WIRINGS, "residual", module.WIRINGS["projection"])
    study = small(STUDY, seeds=6, repeats=1)
    found = verdicts(concluded(study, study.measure))
    assert (found["primary"], found["operations"]) == ("REFUTED", "REFUTED")
    module._joining.cache_clear()
    module._traffic.cache_clear()


def test_the_real_counts_refute_both_claims():
    study = small(STUDY, seeds=6, repeats=1)
    found = verdicts(concluded(study, study.measure))
    names = ("primary", "operations", "projection-adds", "memory", "traffic")
    assert {found[name] for name in names} == {"SUPPORTED"}
    assert (found["4.19"], found["4.20"]) == ("REFUTED", "REFUTED")
