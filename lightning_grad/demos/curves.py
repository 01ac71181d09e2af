"""The curves of a run, kept in memory for a comparison."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger

Curve = list[tuple[int, float]]
"""Pairs of optimizer steps and a value."""


class RecordMetrics(pl.Callback):
    """Keep every value the model logs, by optimizer step.

    Args:
        every_n_steps: Optimizer steps from one recorded training value to the next; validations are all recorded.

    Attributes:
        curves: Name of a metric -> its values as pairs ``(optimizer steps taken, value)``, in order.

    State: none; a resumed run records from where it starts.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        self.every_n_steps = every_n_steps
        self.curves: dict[str, Curve] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Record the training values."""
        if trainer.global_step % self.every_n_steps == 0:
            self._record(trainer, "train/")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the validation values."""
        if not trainer.sanity_checking:
            self._record(trainer, "val/")

    def _record(self, trainer: pl.Trainer, prefix: str) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.startswith(prefix):
                self.curves.setdefault(name, []).append((trainer.global_step, float(value)))

    def last(self, name: str) -> float:
        """Return the last value of a metric; NaN if it was never logged."""
        return self.curves[name][-1][1] if name in self.curves else math.nan


class RecordLogger(Logger):
    """A logger that keeps what callbacks log with an interval of their own, such as curvature.

    Attributes:
        curves: Name of a metric -> its values as pairs ``(step, value)``, in order.
    """

    name = version = "record"

    def __init__(self) -> None:
        super().__init__()
        self.curves: dict[str, Curve] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep the values."""
        for name, value in metrics.items():
            self.curves.setdefault(name, []).append((step or 0, value))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""
