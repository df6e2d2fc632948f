"""ST-11: the verdicts both ways, wells counted by hand, and the shortcut taken away."""

import math

import pytest
import torch
from study_rows import concluded, small, verdicts

from addnorm.studies import st11_landscape as module

STUDY = module.STUDY


def made_up(*, share=0.3, rise=0.5, wells=1.0, steps=4, near=0.0):
    """Metrics of plain networks as given, `steps` and `rise` relative to the residual ones."""

    def metrics(cell):
        wobble = 1 + 0.02 * math.sin(3 * cell["seed"] + cell["depth"])
        plain = cell["net"] == "plain"
        deep = plain and cell["depth"] > 8
        return {
            "steps": 40 * wobble * (steps if plain else 1),
            "loss": 0.05,
            "test": 0.1,
            "error": 0.05,
            "near": near * wobble if plain else 0.0,
            "non_convex": share * wobble if deep else 0.01,
            "rise": 4 * wobble * (rise if plain else 1),
            "wells": wells * wobble if plain else 1.0,
            "held_out": 0.005,
            "section": [1.0, 0.1, 1.0],
            "place": [-0.5, 0.0, 0.5],
        }

    return metrics


def test_it_can_say_both():
    found = verdicts(concluded(STUDY, made_up(near=0.1)))
    assert (found["primary"], found["deeper"], found["shallow-alike"]) == ("SUPPORTED",) * 3
    assert (found["sooner"], found["near-by"]) == ("SUPPORTED", "SUPPORTED")
    assert (found["sharper"], found["chaos"]) == ("REFUTED", "REFUTED")
    assert (found["1.25"], found["1.43"]) == ("SUPPORTED", "SUPPORTED")
    found = verdicts(concluded(STUDY, made_up(share=0.01, rise=2, wells=4, steps=1, near=0.01)))
    assert (found["primary"], found["deeper"], found["near-by"]) == ("REFUTED",) * 3
    assert (found["sharper"], found["chaos"]) == ("SUPPORTED", "SUPPORTED")
    assert (found["1.25"], found["1.43"]) == ("REFUTED", "REFUTED")


def test_a_network_that_never_reached_the_loss_decides_nothing_but_the_steps():
    def metrics(cell):
        lost = cell["net"] == "plain" and cell["depth"] == 20
        return {"steps": math.nan} if lost else made_up()(cell)

    result = concluded(STUDY, metrics)
    assert result["failed"] == STUDY.mode("default").seeds
    found = verdicts(result)
    assert (found["primary"], found["sharper"]) == ("INCONCLUSIVE", "INCONCLUSIVE")
    assert (found["sooner"], found["deeper"]) == ("SUPPORTED", "SUPPORTED")


def test_a_mode_without_the_deepest_networks_is_judged():
    study = small(STUDY, seeds=8, factors={"depth": (8, 20)})
    found = verdicts(concluded(study, made_up()))
    assert (found["primary"], found["deeper"], found["chaos"]) == (
        "SUPPORTED",
        "INCONCLUSIVE",
        "INCONCLUSIVE",
    )


@pytest.mark.parametrize(
    ("losses", "deep", "count"),
    [
        ([[3, 2, 1, 2, 3]], 0.5, 1),
        ([[0, 2, 1, 3, 0.5]], 0.5, 3),  # passes of 2 and 3 between minima of 0, 1 and 0.5
        ([[0, 2, 1, 3, 0.5]], 1.5, 2),  # the middle one is only 1 deep
        ([[1, 1, 1], [1, 1, 1]], 0.1, 1),
        ([[0, 9, 9], [9, 1, 9], [9, 9, 0]], 0.5, 2),  # diagonally by a pass of 1
        ([[0, 9, 9], [9, 1, 9], [9, 9, 0]], 1.5, 1),
        ([[0, 9, 9], [9, 9, 9], [9, 9, 0]], 1.5, 2),
    ],
)
def test_wells(losses, deep, count):
    assert module.wells(losses, deep) == count


def test_the_kept_state_is_the_first_that_is_good_enough():
    """Against all states of the same training, kept one by one."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    reached = module.Reached(model, x, y, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    states, losses = [], []
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        reached.after_update(loss)
        states.append({n: p.detach().clone() for n, p in model.named_parameters()})
        losses.append(torch.nn.functional.cross_entropy(model(x), y).item())
        assert model.training
    first = next(i for i, value in enumerate(losses) if value < 0.9)
    assert 0 < first < 59
    assert reached.steps == first + 1
    for name, tensor in states[first].items():
        torch.testing.assert_close(reached.state[name], tensor)


@pytest.mark.slow
def test_the_shortcut_removed_flips_the_verdict(monkeypatch):
    """The real measure at 20 layers: refuted where the "residual" network has no shortcut."""
    monkeypatch.setattr(module, "TARGETS", {20: (0.05, 250)})
    monkeypatch.setattr(module, "POINTS", 17)
    monkeypatch.setattr(module, "IMAGES", 256)
    known = {}

    def measured(cell):
        key = module.WIRINGS[cell["net"]], cell["seed"]
        if key not in known:
            known[key] = STUDY.measure(cell)
        return known[key]

    study = small(STUDY, factors={"depth": (20,)}, directions=2)
    assert concluded(study, measured)["verdict"] == "SUPPORTED"
    monkeypatch.setitem(module.WIRINGS, "residual", module.WIRINGS["plain"])
    assert concluded(study, measured)["verdict"] == "REFUTED"
