"""`watch` for people whose loop is another library's: Hugging Face's Trainer, Lightning.

Either library is imported when its factory is called, and only then.
"""

from __future__ import annotations

import importlib
from typing import Any

from addnorm.probe.watch import Watch, watch


def hf_callback(
    every: int = 100, log: Any = None, blocks: str | None = None, **options: Any
) -> Any:
    """Return a `transformers.TrainerCallback` that watches the model of a `Trainer`.

    The arguments are those of `watch`; the callback's `watch` is the `Watch` from the beginning of
    a training on. Gradients of parameters are read after clipping, and where accelerate scales the
    loss, its scaler is found. Raises `ValueError` where transformers is not installed.
    """
    base: Any = _library("transformers", "hf").TrainerCallback

    class WatchCallback(base):  # type: ignore[misc]
        """Watches the model of a `Trainer`."""

        watch: Watch | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
            """Set the hooks, and count from the step that the training goes on at."""
            scaler = getattr(objects.get("optimizer"), "scaler", None)
            self.watch = watch(objects["model"], every, log, blocks, **{"scaler": scaler} | options)
            self.watch.begin(state.global_step)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Read the gradients."""
            if self.watch is not None:
                self.watch.before_update()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """End the step."""
            if self.watch is not None:
                self.watch.after_update()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Fetch what is left and take the hooks off."""
            if self.watch is not None:
                self.watch.close()

    return WatchCallback()


def lightning_callback(
    every: int = 100, log: Any = None, blocks: str | None = None, **options: Any
) -> Any:
    """Return a `lightning.pytorch.Callback` that watches the module of a Lightning `Trainer`.

    The arguments are those of `watch`, but without `log` the numbers go to the trainer's loggers.
    The callback's `watch` is the `Watch` from the beginning of a fit on. Lightning shows gradients
    before it clips them. Raises `ValueError` where lightning is not installed.
    """
    base: Any = _library("lightning.pytorch", "lightning").Callback

    class WatchCallback(base):  # type: ignore[misc]
        """Watches the module of a Lightning `Trainer`."""

        watch: Watch | None = None
        stepped = False  # batches whose gradients are only added up end no step

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """Set the hooks, and count from the step that the fit goes on at."""

            def to_loggers(row: dict[str, float], step: int) -> None:
                for logger in trainer.loggers:
                    logger.log_metrics(row, step)

            scaler = getattr(trainer.precision_plugin, "scaler", None)
            taker = to_loggers if log is None else log
            self.watch = watch(pl_module, every, taker, blocks, **{"scaler": scaler} | options)
            self.watch.begin(trainer.global_step)

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            """Read the gradients."""
            if self.watch is not None:
                self.watch.before_update(optimizer)
                self.stepped = True

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            """End the step where this batch made one."""
            if self.watch is not None and self.stepped:
                self.stepped = False
                loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
                self.watch.after_update(loss)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            """Fetch what is left and take the hooks off."""
            if self.watch is not None:
                self.watch.close()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            """Take the hooks off without a word to other processes, which may not come."""
            if self.watch is not None:
                self.watch.abandon()

    return WatchCallback()


def _library(name: str, extra: str) -> Any:
    """Import what the extra installs. Raises `ValueError` where it is absent."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"{name.partition('.')[0]} is not installed; pip install 'addnorm[{extra}]'"
        ) from None
