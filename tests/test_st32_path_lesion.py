"""ST-32: the verdicts both ways, survival and lesions beside their oracles, a planted bug."""

import itertools
import math

import pytest
import torch
from study_rows import concluded, small, verdicts

from addnorm.probe.discover import discover
from addnorm.probe.lesion import lesions
from addnorm.studies import bench
from addnorm.studies import st32_path_lesion as module

STUDY = module.STUDY


def made_up(*, sign=-1, slope=0.1, pull=0.9, order=1):
    """The gradient that survives falls (`sign` -1) as the rise grows; so do the updates."""

    def metrics(cell):
        place = list(module.WIRINGS).index(cell["wiring"]) / 8
        wobble = 0.01 * math.sin(7 * cell["seed"] + 3 * place)
        rho = {"slope": slope, "pull": pull, "share": pull - 0.05, "gain": 0.5}
        rho |= {"count": 0.7, "singles": pull}
        return {
            **{f"rho_{name}": value + wobble for name, value in rho.items()},
            "rise": place,
            "survives": 0.5 + 0.3 * sign * place,
            "updates": order * place,
            "length": 2.0,
            "loss": 0.1,
            **{name: [] for name in ("singles", "pull", "slope", "connection")},
        }

    return metrics


def test_it_can_say_both():
    found = verdicts(concluded(STUDY, made_up()))
    names = ("primary", "adds-nothing", "pull", "share", "beats-counting", "additive")
    assert [found[name] for name in names] == ["SUPPORTED"] * 6
    assert found["first-order"] == "REFUTED"
    found = verdicts(concluded(STUDY, made_up(sign=1, slope=0.9, pull=0.3)))
    names = ("primary", "adds-nothing", "pull", "share", "beats-counting", "additive")
    assert [found[name] for name in names] == ["REFUTED"] * 6
    assert found["first-order"] == "SUPPORTED"


def test_a_training_that_diverged_decides_nothing():
    def metrics(cell):
        lost = cell["seed"] == 2 and cell["task"] == "text" and cell["wiring"] == "ReZero"
        return {"rise": math.nan} if lost else made_up()(cell)

    result = concluded(STUDY, metrics)
    assert result["failed"] == 1
    assert {c["verdict"] for c in result["contrasts"]} == {"INCONCLUSIVE"}


@pytest.mark.parametrize("removed", [1, 2, 4])
def test_survival_is_the_mean_over_all_sets(removed):
    """Six branches, the energy of each of the 64 paths at random, every set that can be drawn."""
    n = 6
    torch.manual_seed(removed)
    by_path = dict(zip(itertools.product((0, 1), repeat=n), torch.rand(2**n).tolist(), strict=True))
    kept = []
    for gone in itertools.combinations(range(n), removed):
        kept.append(sum(e for path, e in by_path.items() if not any(path[i] for i in gone)))
    energy = [sum(e for path, e in by_path.items() if sum(path) == k) for k in range(n + 1)]
    expected = sum(kept) / len(kept) / sum(energy)
    assert module.survival(energy, removed) == pytest.approx(expected)


def test_a_set_of_two_is_the_pair_of_the_x_ray():
    model = bench.mlp(0, 4, "prenorm", branch_layers=2).eval()
    x, y = (t[:64] for t in bench.training_set(bench.digits()))
    structure = discover(model, x)
    known = lesions(model, x, y, pairs=True, structure=structure)
    for i, j in itertools.combinations(range(4), 2):
        rise = module.loss_without(model, structure, {i, j}, x, y) - known.clean
        assert rise == pytest.approx(known.pairs[i][j], abs=1e-5)


def test_ranks_that_do_not_vary_say_nothing():
    assert module.rank_correlation([1, 1, 1], [1, 2, 3]) == 0
    assert module.rank_correlation([1, 2, 3], [5, 6, 9]) == pytest.approx(1)


@pytest.mark.slow
def test_lesions_of_other_branches_are_not_foretold(monkeypatch):
    """The real measure: the pull ranks the sets, and not where a fixed set is removed."""
    levels = {"task": ("digits",), "wiring": ("residual, BN", "post-norm")}
    study = small(STUDY, seeds=8, factors=levels, steps=90)
    assert verdicts(concluded(study, study.measure))["pull"] == "SUPPORTED"
    real = module.loss_without

    def elsewhere(model, structure, removed, x, y):
        others = {(5 * k + 3) % len(structure) for k in range(len(structure) - len(removed))}
        return real(model, structure, others, x, y)

    monkeypatch.setattr(module, "loss_without", elsewhere)
    assert verdicts(concluded(study, study.measure))["pull"] == "REFUTED"
