"""ST-07: the verdicts both ways, lesions and paths beside their oracles, planted bugs."""

import itertools
import math

import pytest
import torch
from study_rows import concluded, small, verdicts
from torch.nn import functional as F

from addnorm.probe.discover import discover
from addnorm.probe.lesion import lesions
from addnorm.probe.paths import spectrum
from addnorm.studies import bench
from addnorm.studies import st07_lesions as module

STUDY = module.STUDY


def made_up(*, many, plain=0.8, update=0.2, shift=0.0, parts=0.5, deep=0.02):
    """Metrics where 27 blocks cost `many` at 15 removed, a plain block `plain`.

    Sub-networks cost `parts` on average; with BatchNorm anew half of that. The whole network of 27
    errs at `deep`. The gradient comes through 6 blocks by sampling, through 3 + `shift` of them by
    the exact way.
    """

    def metrics(cell):
        net, n = cell["net"], module.NETS[cell["net"]]
        wobble = 1 + 0.1 * math.sin(7 * cell["seed"])
        worst = {"residual 27": many, "ensemble of 27": 0.002}.get(net, 0.5)
        rise = [wobble * worst * min(1, k / 15) for k in module.COUNTS[n]]
        rise += [0.01] if net.startswith("ensemble") else []  # one member is left
        length = [float(k == 6) for k in range(n + 1)]
        exact = [float(k == 3 + shift) for k in range(n + 1)]
        return {
            "error": deep if net == "residual 27" else 0.02,
            "block": list(range(1, n + 1)),
            "singles": [wobble * (plain if net == "plain 6" else 0.001)] * n,
            "removed": [k / n for k in module.COUNTS[n]],
            "rise": rise,
            "refit": rise,
            "average": parts * wobble,
            "average_anew": parts * wobble / 2,
            "share": [update * wobble] * n,
            "sampled": length,
            "estimate": length,
            "incoherent": exact,
            "coherent": exact,
            **{name: [] for name in ("tau", "shuffled", "swapped", "length")},
        }

    return metrics


CLAIMS = ("1.36", "1.40", "1.41", "1.20", "1.20b", "0.15b")


def test_it_can_say_both():
    found = verdicts(concluded(STUDY, made_up(many=0.16)))
    assert {found[c.name] for c in STUDY.contrasts} == {"SUPPORTED"}
    refuted = {claim for claim in CLAIMS if found[claim] == "REFUTED"}
    assert refuted == {"1.36", "1.40", "1.20", "0.15b"}
    assert found["1.41"] == found["1.20b"] == "SUPPORTED"
    other = made_up(many=0.004, plain=0.01, update=0.01, shift=3, parts=0.01, deep=0.05)
    found = verdicts(concluded(STUDY, other))
    names = {c.name for c in STUDY.contrasts} - {"behaves-like", "short-paths", "sampling-agrees"}
    assert {found[name] for name in names} == {"REFUTED"}
    assert found["1.41"] == found["1.20b"] == "REFUTED"
    assert {found[c] for c in CLAIMS if c not in ("1.41", "1.20b")} == {"INCONCLUSIVE"}
    assert verdicts(concluded(STUDY, made_up(many=0.9)))["behaves-like"] == "REFUTED"


def test_the_kinder_reading_counts():
    """What falls to nothing with BatchNorm taken anew speaks for the claims, not against them."""

    def metrics(cell):
        known = made_up(many=0.6)(cell)
        return known | {"refit": [0.0] * len(known["refit"]), "average_anew": 0.0}

    found = verdicts(concluded(STUDY, metrics))
    names = ("primary", "not-the-average", "not-identity")
    assert [found[name] for name in names] == ["REFUTED"] * 3


def test_a_training_that_diverged_decides_nothing():
    def metrics(cell):
        lost = cell["net"] == "residual 27" and cell["seed"] == 3
        return {"error": math.nan} if lost else made_up(many=0.6)(cell)

    result = concluded(STUDY, metrics)
    assert result["failed"] == 1
    assert (result["verdict"], verdicts(result)["robust"]) == ("INCONCLUSIVE", "SUPPORTED")


@pytest.fixture
def cheap(monkeypatch):
    """Few sets, few images, few paths."""
    monkeypatch.setattr(module, "DRAWS", 4)
    monkeypatch.setattr(module, "REFITS", 1)
    monkeypatch.setattr(module, "HALVES", 1)
    monkeypatch.setattr(module, "IMAGES", 16)


@pytest.fixture(scope="module")
def network():
    """A residual network of 4 blocks, as it starts, in evaluation mode."""
    return bench.mlp(
        0, 4, "residual", branch_layers=2, inner_norm="batchnorm", preactivation=True, start="he"
    ).eval()


def test_a_removed_block_is_what_the_x_ray_takes_for_a_lesion(network):
    x, y = bench.test_set(bench.digits())
    structure = discover(network, x)
    known = lesions(network, x, y, loss=module.error_rate, structure=structure, estimate=False)
    answers = module._network(network, structure, x)
    clean = module.error_rate(answers((), False), y).item()
    assert clean == pytest.approx(known.clean)
    for k, rise in enumerate(known.singles):
        removed = module.error_rate(answers({k}, False), y).item()
        assert removed - clean == pytest.approx(rise, abs=1e-6)


def test_without_all_its_blocks_a_plain_network_is_its_head():
    model = module.build("plain 6", 0).eval()
    x = bench.test_set(bench.digits())[0]
    answers = module._network(model, discover(model, x), x)
    torch.testing.assert_close(answers(range(6), False), model.head(x.flatten(1)).softmax(-1))
    assert not torch.equal(answers((), False), answers(range(6), False))


def test_an_ensemble_is_the_mean_of_those_that_are_left():
    models = [module.build("ensemble of 27", seed).eval() for seed in range(3)]
    x = bench.test_set(bench.digits())[0][:20]
    known = [model(x).softmax(-1) for model in models]
    answers = module._ensemble(models, x)
    torch.testing.assert_close(answers({1}, False), (known[0] + known[2]) / 2)


@pytest.mark.usefixtures("cheap")
def test_what_is_removed_and_what_is_left(monkeypatch):
    """The first block of a network stays, but for the singles; one member is left at last."""
    seen = []

    def answers(removed, anew):
        seen.append((frozenset(removed), anew))
        return torch.eye(10)[bench.test_set(bench.digits())[1]]  # all right

    monkeypatch.setattr(module, "_trained", lambda *_: [module.build("residual 6", 0)])
    monkeypatch.setattr(module, "_network", lambda *_: answers)
    monkeypatch.setattr(module, "_ensemble", lambda *_: answers)
    monkeypatch.setattr(module, "_orders", lambda *_: {})
    monkeypatch.setattr(module, "_paths", lambda *_: {})
    found = module.measure({"net": "residual 27", "seed": 0})
    assert {len(removed) for removed, anew in seen if anew} >= set(module.COUNTS[27])
    assert [removed for removed, _ in seen if 0 in removed] == [{0}]
    assert found["removed"] == [k / 27 for k in module.COUNTS[27]]
    seen.clear()
    found = module.measure({"net": "ensemble of 27", "seed": 0})
    assert found["removed"] == [k / 27 for k in (*module.COUNTS[27], 26)]
    assert max(len(removed) for removed, _ in seen) == 26


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


def test_statistics_are_taken_anew_without_the_blocks(network):
    """With nothing in front of it, the first norm left normalises the training images."""
    data = bench.digits()
    images = bench.training_set(data)[0]
    answers = module._network(network, discover(network, images), images)
    only_last = answers(range(3), True)
    last, x = network.stack.connections[3].branch, images.flatten(1)

    def normed(v):
        return F.relu((v - v.mean(0)) / (v.var(0) + 1e-5).sqrt())

    stream = x + last.out(normed(last.linear(normed(x))))
    expected = network.head(normed(stream)).softmax(-1)
    torch.testing.assert_close(only_last, expected, rtol=1e-3, atol=1e-4)
    assert network.stack.connections[3].branch.norms[0].running_mean.abs().max() == 0


PATHS = ("length", "sampled", "incoherent", "coherent", "estimate", "share")


@pytest.mark.slow
@pytest.mark.usefixtures("cheap")
def test_a_lesion_that_removes_nothing_flips_the_verdict(monkeypatch):
    """The real measure: supported, and not where what leaves a block is what it returned."""
    monkeypatch.setitem(module.COUNTS, 27, (5, 10, 20))
    monkeypatch.setattr(module, "MANY", 20)  # clear with few sets and few steps
    monkeypatch.setitem(module.COUNTS, 9, (5,))
    monkeypatch.setitem(module.NETS, "ensemble of 27", 9)
    monkeypatch.setattr(
        module, "_orders", lambda *_: {n: [] for n in ("tau", "shuffled", "swapped")}
    )
    monkeypatch.setattr(module, "_paths", lambda *_: dict.fromkeys(PATHS, [1.0] * 27))
    train, kept = module._trained, {}

    def trained_once(cell, n):
        key = (cell["net"], cell["seed"])
        return kept[key] if key in kept else kept.setdefault(key, train(cell, n))

    monkeypatch.setattr(module, "_trained", trained_once)
    study = small(STUDY, factors={"net": ("residual 27", "ensemble of 27")}, steps=60)
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
