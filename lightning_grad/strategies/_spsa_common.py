"""What both SPSA strategies need from Lightning: configuration checks, hook order, logging."""

from __future__ import annotations

import math
import warnings
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
        rank_zero_warn(f"{name}.configure_gradient_clipping is never called under SPSA; remove the override.")


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
    if any(rate != rates[0] for rate in rates):
        listed = ", ".join(f"group {number}: {rate:g}" for number, rate in enumerate(rates))
        raise SPSAConfigError(f"SPSA uses one learning rate; the parameter groups have {listed}.")
    if not math.isfinite(rates[0]) or rates[0] < 0.0:
        raise SPSAConfigError(f"`lr` of {type(optimizer).__name__} must be a number >= 0, got {rates[0]!r}.")
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


def log_step(module: pl.LightningModule, session: Session, update: StepUpdate, more: dict[str, float]) -> None:
    """Write the scalars of one step."""
    measured, tracker = session.measured, session.rule.tracker
    values = {
        "loss": measured.loss,
        "loss_spread": measured.spread,
        "grad_rms": tracker.rms,
        "grad_last": measured.grad,
        "scale_log2": float(tracker.scale_log2),
        "lr": update.lr,
        "step_rms": update.step_rms,
        "directions": float(len(update.values)),
        "abstained": float(update.abstained),
        "saturated": float(update.saturated),
        "workers": float(len(session.rule.roster)),
        "journal_bytes": float(session.journal.num_bytes),
        "step": float(update.step),
        **more,
    }
    module.log_dict(
        {f"spsa/{name}": value for name, value in values.items()}, on_step=True, on_epoch=False, batch_size=1
    )


def warn_once(text: str) -> None:
    """A warning on every process that sees the reason."""
    warnings.warn(text, stacklevel=3)
