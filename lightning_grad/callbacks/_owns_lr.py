"""Callbacks that decide the learning rate: one of them per run, and the base its schedule is relative to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_grad._tensorboard import TensorBoardCharts
from lightning_grad.optim.group_edits import GroupEdits


class OwnsLearningRate(TensorBoardCharts):
    """Base: sets the learning rate of each step to :meth:`wanted_lr`, shaped by a scheduler and by other edits.

    A scheduler and ``BatchSizeLRScaler`` keep their effect as factors. With several groups the one with the largest
    base learning rate gets the value and the others keep their ratio to it, so a group with 0 stays frozen.
    """

    def __init__(self) -> None:
        self._base: list[float] = []
        self._remove: Callable[[], None] | None = None

    def wanted_lr(self) -> float | None:
        """Return the learning rate of the coming step; ``None``: leave the optimizer's own."""
        raise NotImplementedError

    def edit(self, index: int, group: dict[str, Any]) -> Mapping[str, Any]:
        """Values of a parameter group during the step."""
        wanted, largest = self.wanted_lr(), max(self._base, default=0.0)
        if wanted is None or largest == 0.0:
            return {}
        return {"lr": wanted * group["lr"] / largest}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a second owner and more than one optimizer."""
        name = type(self).__name__
        owners = [type(c).__name__ for c in trainer.callbacks if isinstance(c, OwnsLearningRate)]  # type: ignore[attr-defined]
        if len(owners) > 1:
            raise MisconfigurationException(f"{' and '.join(owners)} both set the learning rate; use one of them.")
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(f"{name} needs one optimizer; the model has {len(trainer.optimizers)}.")
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to the optimizer."""
        self._detach()
        optimizer = trainer.optimizers[0]
        # without a scheduler there is no `initial_lr`, and the learning rate is constant
        self._base = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        self._remove = GroupEdits.of(optimizer).add(self.edit)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Detach."""
        self._detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Detach, and undo what a failed step left behind."""
        self._detach()
        for optimizer in trainer.optimizers:
            GroupEdits.of(optimizer).restore()

    def _detach(self) -> None:
        if self._remove is not None:
            self._remove()
            self._remove = None
