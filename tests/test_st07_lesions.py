"""ST-07: the verdicts both ways, lesions and paths beside their oracles, planted bugs."""

import itertools
import math

import pytest
import torch
from study_rows import concluded, small, verdicts

from addnorm.probe.discover import discover
from addnorm.probe.lesion import lesions
from addnorm.probe.paths import spectrum
from addnorm.studies import bench
from addnorm.studies import st07_lesions as module

STUDY = module.STUDY


def made_up(*, many, plain=0.8, update=0.2, shift=0.0):
    """Metrics where 27 blocks cost `many` at 15 removed, and a plain block costs `plain`.

    The gradient comes through 6 blocks by sampling, through 3 + `shift` of them by the exact way.
    """

    def metrics(cell):
        net, n = cell["net"], module.NETS[cell["net"]]
        wobble = 1 + 0.1 * math.sin(7 * cell["seed"])
        worst = {"residual 27": many, "ensemble of 27": 0.002}.get(net, 0.5)
        rise = [wobble * worst * min(1, k / 15) for k in module.COUNTS[n]]
        length = [float(k == 6) for k in range(n + 1)]
        exact = [float(k == 3 + shift) for k in range(n + 1)]
        return {
            "error": 0.02,
            "block": list(range(1, n + 1)),
            "singles": [wobble * (plain if net == "plain 6" else 0.001)] * n,
            "removed": [k / n for k in module.COUNTS[n]],
            "rise": rise,
            "refit": rise,
            "share": [update * wobble] * n,
            "sampled": length,
            "estimate": length,
            "incoherent": exact,
            "coherent": exact,
            **{name: [] for name in ("tau", "shuffled", "swapped", "length")},
        }

    return metrics


def test_it_can_say_both():
    found = verdicts(concluded(STUDY, made_up(many=0.6)))
    assert {found[c.name] for c in STUDY.contrasts} == {"SUPPORTED"}
    assert [found[c] for c in ("1.36", "1.41", "1.20", "0.15")] == [
        "REFUTED",
        "SUPPORTED",
        "REFUTED",
        "REFUTED",
    ]
    found = verdicts(concluded(STUDY, made_up(many=0.004, plain=0.01, update=0.01, shift=3)))
    assert found["sampling-agrees"] == "SUPPORTED"
    assert [found[n] for n in ("primary", "robust", "not-identity", "cancel")] == ["REFUTED"] * 4
    assert [found[c] for c in ("1.36", "1.41", "1.20", "0.15")] == [
        "SUPPORTED",
        "REFUTED",
        "SUPPORTED",
        "SUPPORTED",
    ]


def test_a_training_that_diverged_decides_nothing():
    def metrics(cell):
        lost = cell["net"] == "residual 27" and cell["seed"] == 3
        return {"error": math.nan} if lost else made_up(many=0.6)(cell)

    result = concluded(STUDY, metrics)
    assert result["failed"] == 1
    assert (result["verdict"], verdicts(result)["robust"]) == ("INCONCLUSIVE", "SUPPORTED")


@pytest.fixture(scope="module")
def network():
    """A residual network of 4 blocks, as it starts, in evaluation mode."""
    return bench.mlp(
        0, 4, "residual", branch_layers=2, inner_norm="batchnorm", preactivation=True, start="he"
    ).eval()


def test_a_removed_block_is_what_the_x_ray_takes_for_a_lesion(network):
    x, y = module.held_out()
    structure = discover(network, x)
    known = lesions(network, x, y, loss=module.error_rate, structure=structure, estimate=False)
    clean = module.error_without(network, structure, (), x, y)
    assert clean == pytest.approx(known.clean)
    for k, rise in enumerate(known.singles):
        removed = module.error_without(network, structure, {k}, x, y)
        assert removed - clean == pytest.approx(rise, abs=1e-6)


def test_without_all_its_blocks_a_plain_network_is_its_head():
    model = module.build("plain 6", 0).eval()
    x, y = module.held_out()
    structure = discover(model, x)
    alone = module.error_rate(model.head(x.flatten(1)), y).item()
    assert module.error_without(model, structure, range(6), x, y) == pytest.approx(alone)
    assert module.error_without(model, structure, (), x, y) != alone


def test_the_paths_sum_up_to_the_spectrum(network):
    """The 16 paths one by one, Veit's way, beside the package's energy of each length."""
    x, y = (t[:32] for t in bench.training_set(bench.digits()))
    structure = discover(network, x)
    known = spectrum(network, x, y, incoherent="exact", structure=structure)
    for k in range(5):
        paths = itertools.combinations(range(4), k)
        energy = sum(module.path_gradient(network, structure, p, x, y) ** 2 for p in paths)
        assert energy == pytest.approx(known.incoherent[k], rel=1e-3)
    whole = [module.path_gradient(network, structure, p, x, y) for p in ((), range(4))]
    assert whole == pytest.approx([known.norm[0], known.norm[4]], rel=1e-4)


def test_statistics_taken_anew_are_those_of_the_training_set(network):
    """The first norm behind a removed block sees the input itself."""
    x = bench.training_set(bench.digits())[0]
    structure = discover(network, x)
    fitted = module._refitted(network, structure, {0, 1})
    first = fitted.stack.connections[2].branch.norms[0]
    torch.testing.assert_close(first.running_mean, x.flatten(1).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.running_var, x.flatten(1).var(0), rtol=1e-4, atol=1e-5)
    assert network.stack.connections[2].branch.norms[0].running_mean.abs().max() == 0


@pytest.fixture
def cheap(monkeypatch):
    """Few sets, few images, few paths."""
    monkeypatch.setattr(module, "DRAWS", 4)
    monkeypatch.setattr(module, "REFITS", 1)
    monkeypatch.setattr(module, "IMAGES", 16)


PATHS = ("length", "sampled", "incoherent", "coherent", "estimate", "share")


@pytest.mark.slow
@pytest.mark.usefixtures("cheap")
def test_a_lesion_that_removes_nothing_flips_the_verdict(monkeypatch):
    """The real measure: supported, and refuted where what leaves a block is what it returned."""
    monkeypatch.setitem(module.COUNTS, 27, (10, 15))
    monkeypatch.setattr(
        module, "_orders", lambda *_: {n: [] for n in ("tau", "shuffled", "swapped")}
    )
    monkeypatch.setattr(module, "_paths", lambda *_: dict.fromkeys(PATHS, [1.0] * 27))
    train, kept = module._trained, {}

    def trained_once(cell, n):
        key = (cell["net"], cell["seed"])
        return kept[key] if key in kept else kept.setdefault(key, train(cell, n))

    monkeypatch.setattr(module, "_trained", trained_once)
    study = small(STUDY, factors={"net": ("residual 27", "ensemble of 27")}, steps=25)
    assert concluded(study, study.measure)["verdict"] == "SUPPORTED"
    monkeypatch.setattr(module.Lesion, "after", lambda *_: None)
    assert concluded(study, study.measure)["verdict"] == "REFUTED"


@pytest.mark.slow
@pytest.mark.usefixtures("cheap")
def test_the_residual_removed_is_not_robust(monkeypatch):
    study = small(STUDY, factors={"net": ("plain 6", "residual 6")}, steps=80, samples=2, paths=1)
    assert verdicts(concluded(study, study.measure))["robust"] == "SUPPORTED"
    build = module.build
    monkeypatch.setattr(module, "build", lambda kind, seed: build("plain 6", seed))
    monkeypatch.setattr(module, "_paths", lambda *_: {"share": [], "sampled": []})
    assert verdicts(concluded(study, study.measure))["robust"] == "REFUTED"
