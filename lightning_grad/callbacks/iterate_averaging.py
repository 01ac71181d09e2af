"""The mean of the iterates, for dynamics whose last iterate is noise."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_grad._lightning import averaged_iterates
from lightning_grad._validate import check_int


class IterateAveraging(WeightAveraging):
    """Uniform average of the parameters from a step on, put into the model at the end of the fit and for validation.

    Lightning's :class:`~lightning.pytorch.callbacks.WeightAveraging` with a start, and with the average scaled back to
    the norms that the parameters have: the mean of points on a sphere lies inside of it (``SGLD(sphere=True)``). Before
    the start the model keeps its own parameters everywhere.

    Args:
        average_start: First optimizer step that counts, >= 0.
        renormalize: At the end of the fit give every averaged parameter the norm of the last iterate.
        **kwargs: As for ``WeightAveraging``.

    Raises:
        ValueError: ``average_start`` is out of range.

    State: the average, in the checkpoint.

    Source: arXiv:2603.06028.
    """

    def __init__(self, average_start: int = 0, renormalize: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.average_start = check_int("average_start", average_start, 0)
        self.renormalize = renormalize
        self._swapped = False
        self._said = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start a new average; a checkpoint's replaces it."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.load_state_dict({"latest_update_step": trainer.global_step})  # not that of an earlier fit

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether a step counts."""
        return step_idx is not None and step_idx >= self.average_start

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average into the model."""
        # after the fit the model has the average already, or what the user has put in since
        if trainer.state.fn == TrainerFn.FITTING and self._started():
            super().on_validation_epoch_start(trainer, pl_module)
            self._swapped = True

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the model's own parameters back."""
        if self._swapped:
            super().on_validation_epoch_end(trainer, pl_module)
            self._swapped = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the model's own parameters back if a validation failed."""
        self.on_validation_epoch_end(trainer, pl_module)

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average into the model."""
        if not self._started():
            rank_zero_warn(
                f"IterateAveraging: average_start={self.average_start} was not reached in {trainer.global_step} steps;"
                " the model keeps its last parameters. Lower average_start or train for longer."
            )
            return
        norms = [torch.linalg.vector_norm(p.double()) for p in pl_module.parameters()]
        super().on_train_end(trainer, pl_module)
        if self.renormalize:
            for p, norm in zip(pl_module.parameters(), norms, strict=True):
                now = torch.linalg.vector_norm(p.double())
                if p.requires_grad and now > 0:
                    p.mul_(norm / now)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average as ``state_dict``, or the model's own parameters if there is none yet."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if "current_model_state" in checkpoint and not self._started():
            checkpoint["state_dict"] = checkpoint["current_model_state"]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore parameters and average; outside ``fit`` the average stays in the model."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _started(self) -> bool:
        started = averaged_iterates(self) > 0
        if not started and not self._said:
            self._said = True
            rank_zero_info(
                f"IterateAveraging: the average starts at step {self.average_start}; until then validation and"
                " checkpoints have the model's own parameters."
            )
        return started
