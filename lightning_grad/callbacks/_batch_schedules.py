"""LR schedules under a batch size that changes: those that count samples are told, the others are warned of."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_grad.optim.samples_lr import SamplesLR


def sample_schedules(trainer: pl.Trainer) -> list[SamplesLR]:
    """Schedules of the run that count samples."""
    return [c.scheduler for c in trainer.lr_scheduler_configs if isinstance(c.scheduler, SamplesLR)]


def warn_of_step_schedules(trainer: pl.Trainer) -> None:
    """Say which schedules will not finish."""
    for config in trainer.lr_scheduler_configs:
        if config.interval == "step" and not isinstance(config.scheduler, SamplesLR):
            rank_zero_warn(
                f"AdaptiveBatchSize: {type(config.scheduler).__name__} counts optimizer steps, and there will be fewer"
                " of them than it was told as the batch grows. Use SamplesLR, which counts samples."
            )


def resolve_schedules(trainer: pl.Trainer, population: int | None) -> None:
    """Tell schedules with ``total_samples="auto"`` how many samples the run will see.

    Raises:
        MisconfigurationException: The data set or the run has no known length.
    """
    epochs = trainer.max_epochs
    for schedule in sample_schedules(trainer):
        if population is not None and epochs is not None and epochs > 0:
            schedule.resolve(population * epochs)
        elif schedule.total_samples is None:
            raise MisconfigurationException(
                "SamplesLR(total_samples='auto') needs `max_epochs` and a data set with a length; give a number."
            )
