"""What both SPSA strategies need from Lightning: configuration checks, hook order, logging."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lightning_grad._lightning import logging_step
from lightning_grad.spsa import errors
from lightning_grad.spsa.options import Options
from lightning_grad.spsa.rule import StepUpdate
from lightning_grad.spsa.session import Session


class SPSAConfigError(errors.SPSAConfigError, MisconfigurationException):
    """The run is set up in a way that cannot work under SPSA."""


@contextmanager
def config_errors() -> Iterator[None]:
    """Turn the torch layer's configuration errors into ones that Lightning's handlers know."""
    try:
        yield
    except SPSAConfigError:
        raise
    except errors.SPSAConfigError as error:
        raise SPSAConfigError(str(error)) from error


def check_trainer(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse what cannot work without gradients; see the page of the method for the list."""
    if not module.automatic_optimization:
        raise SPSAConfigError("SPSA needs automatic optimization; set self.automatic_optimization = True.")
    if trainer.gradient_clip_val:
        raise SPSAConfigError(
            "`gradient_clip_val` has no effect without gradients; use `clip` of the strategy (in units of the running"
            " rms)."
        )
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(c, GradientAccumulationScheduler) for c in callbacks):
        raise SPSAConfigError(
            "GradientAccumulationScheduler changes the number of directions per step; under SPSA K must stay constant."
        )
    if is_overridden("backward", module, pl.LightningModule):
        raise SPSAConfigError(f"{type(module).__name__}.backward is never called under SPSA; remove the override.")
    if is_overridden("configure_gradient_clipping", module, pl.LightningModule):
        name = type(module).__name__
        rank_zero_warn(f"{name}.configure_gradient_clipping finds no gradients under SPSA; remove the override.")


def check_optimizers(optimizers: list[Optimizer]) -> None:
    """One optimizer, one learning rate, no weight decay."""
    if len(optimizers) != 1:
        raise SPSAConfigError(
            f"SPSA uses one learning rate; configure_optimizers returned {len(optimizers)} optimizers."
        )
    (optimizer,) = optimizers
    if not isinstance(optimizer, torch.optim.SGD):
        rank_zero_info(f"SPSA: only the learning rate of {type(optimizer).__name__} is used.")
    for number, group in enumerate(optimizer.param_groups):
        if group.get("weight_decay"):
            raise SPSAConfigError(
                f"weight decay is not supported by SPSA; parameter group {number} has {group['weight_decay']:g}, set"
                f" it to 0."
            )
    current_lr(optimizer)


def current_lr(optimizer: Optimizer) -> float:
    """The learning rate of an optimizer whose groups agree on it."""
    rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
    if not rates:
        raise SPSAConfigError(f"{type(optimizer).__name__} has no learning rate; set `lr` of the strategy.")
    bad = [rate for rate in rates if not math.isfinite(rate) or rate < 0.0]
    if bad:
        raise SPSAConfigError(f"`lr` of {type(optimizer).__name__} must be a number >= 0, got {bad[0]!r}.")
    if any(rate != rates[0] for rate in rates):
        listed = ", ".join(f"group {number}: {rate:g}" for number, rate in enumerate(rates))
        raise SPSAConfigError(f"SPSA uses one learning rate; the parameter groups have {listed}.")
    return rates[0]


def report_eps(options: Options) -> None:
    """Say which power of two is used, if another number was given."""
    used = 2.0**options.eps_log2
    if used != options.eps:
        rank_zero_info(f"SPSA: `eps` {options.eps:g} is rounded to the power of two {used:g} (2**{options.eps_log2}).")


def warn_large_lr(options: Options, module: torch.nn.Module, lr: float) -> None:
    """Learning rates of first-order methods are orders of magnitude too large here."""
    if lr > 1e-3 and not options.normalize and all(p.requires_grad for p in module.parameters()):
        rank_zero_warn(
            f"SPSA: lr {lr:g} is large for training all parameters without `normalize`; the typical range is"
            f" 1e-7..1e-4."
        )


def run_closure(
    precision: Precision, optimizer: Optimizer, closure: Callable[[], Any], model: pl.LightningModule
) -> Any:
    """Run the closure, the hooks before an optimizer step, and the optimizer without any gradient.

    The last is a no-op that keeps the counters of optimizers and schedulers in step.

    Goes through the base class, so that no loss scaler expects gradients.
    """
    return Precision.optimizer_step(precision, optimizer, model=model, closure=closure)


class StepLog:
    """Writes the scalars of a step, on the steps Lightning logs at; counts add up in between."""

    def __init__(self) -> None:
        self._since: Counter[str] = Counter()

    def write(self, module: pl.LightningModule, session: Session, update: StepUpdate, **more: float) -> None:
        """Take in a step; names in ``more`` that end in ``_s`` add up too."""
        durations = {name: value for name, value in more.items() if name.endswith("_s")}
        for name, value in {"abstained": update.abstained, "saturated": update.saturated, **durations}.items():
            self._since[name] += value  # type: ignore[assignment]
        number, every = logging_step(module.trainer), module.trainer.log_every_n_steps  # type: ignore[attr-defined]
        # sixteen calls of Lightning's log take longer than a small model's forward pass
        if not every or (number and (number + 1) % every):
            return
        measured, tracker = session.measured, session.rule.tracker
        values = {
            "loss": measured.loss,
            "loss_spread": measured.spread,
            "grad_rms": tracker.rms,
            "grad_last": measured.grad,
            "scale_log2": tracker.scale_log2,
            "lr": update.lr,
            "step_rms": update.step_rms,
            "directions": len(update.values),
            "workers": len(session.rule.roster),
            "journal_bytes": session.journal.num_bytes,
            "step": update.step,
            **more,
            **self._since,
        }
        self._since.clear()
        tags = {f"spsa/{name}": float(value) for name, value in values.items()}
        module.log_dict(tags, on_step=True, on_epoch=False, batch_size=1)
