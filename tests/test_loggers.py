"""Where the rows of `watch` go: any logger by what it has, and JSON Lines."""

import re

import pytest

from addnorm.files import read_lines
from addnorm.probe.loggers import JsonLines, sink_of

ROW = {"stream/layer_0/rms_before": 1.5, "loss": float("nan")}


class Logging:
    def __init__(self):
        self.heard = []

    def log(self, row, step):
        self.heard.append((row, step))
        return "something"


class Scalars:
    def __init__(self):
        self.heard = []

    def add_scalar(self, name, value, step):
        self.heard.append((name, value, step))


def test_an_object_with_log_gets_a_dict_of_its_own():
    logger = Logging()
    sink_of(logger)(ROW, 7)
    ((row, step),) = logger.heard
    assert (row, step) == (ROW, 7)
    assert row is not ROW


def test_an_object_with_add_scalar_gets_one_number_after_the_other():
    writer = Scalars()
    sink_of(writer)(ROW, 7)
    assert writer.heard == [(name, value, 7) for name, value in ROW.items()]


def test_a_function_and_nothing():
    heard = []
    sink_of(lambda row, step: heard.append((row, step)))(ROW, 3)
    assert heard == [(ROW, 3)]
    assert sink_of(None) is None


def test_json_lines_are_appended_with_null_for_what_json_lacks(tmp_path):
    path = tmp_path / "new" / "watch.jsonl"
    for step in (1, 2):
        JsonLines(path).log(ROW, step)
    expected = {"stream/layer_0/rms_before": 1.5, "loss": None}
    assert read_lines(path) == [{"step": step} | expected for step in (1, 2)]


@pytest.mark.parametrize(
    ("log", "hint"),
    [(3, ""), ("run/watch.jsonl", "; did you mean JsonLines(path)?")],
)
def test_anything_else_is_refused(log, hint):
    message = (
        f"log={log!r} must have log(dict, step) or add_scalar(name, value, step), or be a function "
        f"(dict, step){hint}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sink_of(log)


def test_a_summary_writer_of_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", exc_type=ImportError)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tensorboard.SummaryWriter(tmp_path) as writer:
        sink_of(writer)({"loss": 2.5}, 4)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(4, 2.5)]


def test_an_offline_run_of_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(mode="offline", dir=tmp_path, project="addnorm") as run:
        sink = sink_of(run)
        sink({"loss": 2.5}, 4)
        sink({"loss": 3.5}, 5)  # which is what sends off the step before
        assert (run.summary["_step"], run.summary["loss"]) == (4, 2.5)
