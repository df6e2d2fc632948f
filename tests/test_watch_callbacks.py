"""The callbacks of Hugging Face's Trainer and of Lightning."""

import re
import sys
import types

import pytest
import torch
from torch import nn

from addnorm import watch
from addnorm.callbacks import hf_callback, lightning_callback


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.lin(x)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(Block(), Block()))


def batch(number):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(number))


def by_hand(steps, accumulate=1, begin=0, clip=None):
    """The rows of a plain loop."""
    model, rows = network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, 1, lambda row, step: rows.append((step, row)), flush=1) as watched:
        watched.begin(begin)
        for step in range(steps):
            for part in range(accumulate):
                loss = model(batch(step * accumulate + part)).square().mean()
                loss.backward()
            watched.before_update()
            optimizer.step()
            watched.after_update(loss)
            optimizer.zero_grad()
    return rows


def without_loss(rows):
    return [(step, {k: v for k, v in row.items() if k != "loss"}) for step, row in rows]


@pytest.mark.parametrize(
    ("factory", "library", "message"),
    [
        (hf_callback, "transformers", "transformers is not installed; pip install 'addnorm[hf]'"),
        (
            lightning_callback,
            "lightning.pytorch",
            "lightning is not installed; pip install 'addnorm[lightning]'",
        ),
    ],
)
def test_an_absent_library_is_named_with_its_extra(monkeypatch, factory, library, message):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        factory()


def test_the_callback_of_the_trainer_hears_what_a_plain_loop_hears():
    """Driven by the events that `transformers.Trainer` sends, in its order."""
    callbacks = pytest.importorskip("transformers.trainer_callback")
    rows, model = [], network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callback = hf_callback(1, lambda row, step: rows.append((step, row)), flush=1)
    assert isinstance(callback, callbacks.TrainerCallback)
    handler = callbacks.CallbackHandler([callback], model, None, optimizer, None)
    state, control = callbacks.TrainerState(global_step=5), callbacks.TrainerControl()
    arguments = None
    handler.on_train_begin(arguments, state, control)
    for step in range(3):
        for part in range(2):
            handler.on_step_begin(arguments, state, control)
            model(batch(2 * step + part)).square().mean().backward()
        handler.on_pre_optimizer_step(arguments, state, control)
        optimizer.step()
        handler.on_optimizer_step(arguments, state, control)
        optimizer.zero_grad()
        handler.on_step_end(arguments, state, control)
    handler.on_train_end(arguments, state, control)
    assert rows == without_loss(by_hand(3, accumulate=2, begin=5))
    assert [step for step, _ in rows] == [6, 7, 8]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_real_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2, loss_type="ForCausalLM"
    )
    tokens = [{"input_ids": [i % 11] * 8, "labels": [i % 11] * 8} for i in range(16)]
    rows = []
    callback = hf_callback(1, lambda row, step: rows.append((step, row)), flush=1)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, use_cpu=True, report_to=[], save_strategy="no"
    )
    model = transformers.GPT2LMHeadModel(config)
    transformers.Trainer(model, arguments, train_dataset=tokens, callbacks=[callback]).train()
    assert [step for step, _ in rows] == [1, 2, 3]
    assert rows[0][1]["stream/layer_1/rms_after"] > 0
    assert rows[0][1]["parameters/layer_1/update_ratio"] > 0


def drive_lightning(callback, model, steps, accumulate=1, begin=0):
    """Send the events of Lightning's automatic optimization in its order."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = []
    logger = types.SimpleNamespace(log_metrics=lambda row, step: rows.append((step, row)))
    plugin = types.SimpleNamespace(scaler=None)
    trainer = types.SimpleNamespace(loggers=[logger], precision_plugin=plugin, global_step=begin)
    callback.on_train_start(trainer, model)
    for step in range(steps):
        for part in range(accumulate):
            loss = model(batch(step * accumulate + part)).square().mean()
            loss.backward()
            if part == accumulate - 1:
                callback.on_before_optimizer_step(trainer, model, optimizer)
                optimizer.step()
                optimizer.zero_grad()
            outputs = {"loss": loss.detach()}
            callback.on_train_batch_end(trainer, model, outputs, None, part)
    callback.on_train_end(trainer, model)
    return rows


def test_the_callback_of_lightning_hears_what_a_plain_loop_hears(monkeypatch):
    lightning = types.ModuleType("lightning.pytorch")
    lightning.Callback = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, "lightning.pytorch", lightning)
    callback, model = lightning_callback(1, flush=1), network()
    assert isinstance(callback, lightning.Callback)
    assert drive_lightning(callback, model, 3, 2, 4) == by_hand(3, accumulate=2, begin=4)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model = network()
    trainer = types.SimpleNamespace(
        loggers=[], precision_plugin=types.SimpleNamespace(scaler=None), global_step=0
    )
    callback.on_train_start(trainer, model)
    callback.on_exception(trainer, model, RuntimeError())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_real_lightning_trainer(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, inputs, _number):
            return self.net(inputs).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    rows = []
    callback = lightning_callback(1, lambda row, step: rows.append((step, row)), flush=1)
    trainer = lightning.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[callback],
    )
    loader = torch.utils.data.DataLoader([batch(i) for i in range(3)], batch_size=None)
    trainer.fit(Module(), loader)
    expected = by_hand(3)
    assert [step for step, _ in rows] == [1, 2, 3]
    for (_, row), (_, other) in zip(rows, expected, strict=True):
        assert row == pytest.approx(other)
