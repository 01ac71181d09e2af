"""What AdaptiveBatchSize refuses, and why."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn

from lightning_grad._lightning import missing_for_variable_length
from lightning_grad.callbacks._batch_drivers import PlanSettings
from lightning_grad.strategies._spsa_base import SPSABase

MAX_COPIES = 4
"""Gradients of micro-batches that may be kept for inner products."""


def refuse(trainer: pl.Trainer, pl_module: pl.LightningModule, mode: str, lr_scaler: pl.Callback | None) -> None:
    """Refuse settings that cannot work.

    Raises:
        MisconfigurationException: With the reason and the alternative.
    """
    name = type(trainer.strategy).__name__
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    reason = None
    if not pl_module.automatic_optimization:
        reason = "manual optimization: the callback cannot know which backward passes make a step"
    elif isinstance(trainer.strategy, SPSABase):
        reason = f"{name}: there are no gradients whose noise could be measured. Set the batch size in the loader"
    elif trainer.strategy.handles_gradient_accumulation or "DeepSpeed" in name:
        reason = f"{name}: it counts accumulation itself. Use a DDP strategy"
    elif "FSDP" in name or "ModelParallel" in name:
        reason = f"{name}: gradients are sharded, and the hooks see shards. Use a DDP strategy"
    elif any(callback is lr_scaler for callback in callbacks):
        reason = "its `lr_scaler` also among the Trainer's callbacks, where it would act again. Remove it from those"
    elif mode != "monitor" and any(isinstance(c, GradientAccumulationScheduler) for c in callbacks):
        reason = "GradientAccumulationScheduler: two callbacks would set accumulation. Use mode='monitor'"
    elif mode in ("auto", "sampler"):
        if trainer.overfit_batches:  # type: ignore[attr-defined]
            reason = "overfit_batches. Use mode='accumulate' or mode='monitor'"
        elif isinstance(trainer.limit_train_batches, float) and trainer.limit_train_batches != 1.0:
            reason = (
                f"limit_train_batches={trainer.limit_train_batches}: a fraction of a number of batches that changes."
                " Give an integer, or use mode='accumulate' or mode='monitor'"
            )
    if reason is not None:
        raise MisconfigurationException(f"AdaptiveBatchSize(mode={mode!r}) does not work with {reason}.")


def possible_mode(trainer: pl.Trainer, mode: str) -> str:
    """The mode, or ``"accumulate"`` where this version of Lightning does not let the number of batches change."""
    missing = missing_for_variable_length(trainer) if mode in ("auto", "sampler") else None
    if missing is None:
        return mode
    rank_zero_warn(
        f"AdaptiveBatchSize: this version of Lightning has no `{missing}`, so the loader's batch size cannot change"
        " during training; only accumulation will (mode='accumulate')."
    )
    return "accumulate"


def needs_two(mode: str, trainer: pl.Trainer, estimator: str, needs: frozenset[str], plans: PlanSettings) -> bool:
    """Whether every step must have two micro-batches for the estimator to see anything.

    Raises:
        ValueError: It must, and the mode does not let it; or the estimator cannot give what the criterion needs.
    """
    if estimator == "ghost" and "element" in needs:
        raise ValueError(
            "estimator='ghost' has no per-element variances; use estimator='micro_batch' or 'vmap', or"
            " CoordinateNormTest(granularity='tensor')."
        )
    alone = trainer.world_size * max(trainer.accumulate_grad_batches, plans.min_accumulate) < 2
    two = alone and (estimator == "micro_batch" or (estimator == "auto" and "element" in needs))
    if two and mode == "monitor":
        raise ValueError(
            "estimator='micro_batch' compares the micro-batches of a step, and there is only one: set"
            " accumulate_grad_batches >= 2, or use estimator='ghost' or 'vmap'."
        )
    return two


def refuse_copies(
    mode: str, trainer: pl.Trainer, estimator: str, needs: frozenset[str], scope: str | list[str], plans: PlanSettings
) -> None:
    """Refuse inner products that would keep many copies of the whole gradient.

    Raises:
        ValueError: With the three ways out.
    """
    if estimator != "micro_batch" or "inner" not in needs or scope != "all" or mode == "monitor":
        return
    most = math.inf if plans.max_micro is None else plans.max_batch / (plans.max_micro * trainer.world_size)
    if most > MAX_COPIES:
        raise ValueError(
            f"inner products between more than {MAX_COPIES} micro-batches and the gradient would keep that many copies"
            " of the gradient. Three ways out: estimator='vmap' (forward mode, no copies); `scope` with the names of"
            " some parameters; `max_micro_batch_size` >= max_batch_size / (4 * processes)."
        )
