"""Gradient descent on a classification loss with the step divided by the mean error probability."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad._lightning import logging_step, replace_method
from lightning_grad._tensorboard import Charts, log_scalars
from lightning_grad._validate import check_int, check_range
from lightning_grad.callbacks._owns_lr import OwnsLearningRate
from lightning_grad.optim.group_edits import GroupEdits
from lightning_grad.statistics.sample_grads import batch_axis


class LossNormalizedLR(OwnsLearningRate):
    r"""Use the learning rate :math:`\gamma / \overline{(1 - p)}` in each step, :math:`p` the probability of the truth.

    For cross-entropy with SGD: where the gradient vanishes because nearly all samples are fitted, the step does not.
    ``training_step`` returns ``{"loss": loss, "one_minus_p": tensor}`` with the error probability of each sample, or
    their mean. The mean is over the accumulated micro-batches and processes of the step, weighted by size; one whose
    ``training_step`` returns ``None`` is left out. The logistic loss may rise while the accuracy improves: watch the
    accuracy.

    Tags: ``loss_normalized/one_minus_p``, ``loss_normalized/lr``.

    Args:
        gamma: Length scale :math:`\gamma` > 0.
        key: Name of the error probabilities in the dictionary.
        clamp: Smallest mean that is divided by, > 0.
        every_n_steps: Optimizer steps from one logged value to the next, >= 1.

    Raises:
        ValueError: An argument is out of range.
        MisconfigurationException: ``training_step`` returns no such key, manual optimization, several optimizers, or
            another callback sets the learning rate.

    State: none.

    Source: Tyurin (arXiv:2412.08424); see :mod:`lightning_grad.optim.normalized_logistic` for the bound.
    """

    def __init__(
        self, gamma: float = 1.0, key: str = "one_minus_p", clamp: float = 1e-12, every_n_steps: int = 50
    ) -> None:
        super().__init__()
        self.gamma = check_range("gamma", gamma, 0.0, math.inf, "()")
        self.clamp = check_range("clamp", clamp, 0.0, 1.0, "(]")
        self.every_n_steps = check_int("every_n_steps", every_n_steps, 1)
        self.key = key
        self._latest: tuple[Tensor, int] | None = None
        self._sum: Tensor | None = None
        self._count = 0
        self._lr: float | None = None
        self._undo: Callable[[], None] | None = None

    def tensorboard_charts(self, trainer: pl.Trainer) -> Charts:
        """One chart each."""
        return {
            "loss_normalized": {
                "mean error probability": ["loss_normalized/one_minus_p"],
                "learning rate": ["loss_normalized/lr"],
            }
        }

    def wanted_lr(self) -> float | None:
        """Return the learning rate once the closure of the step has run."""
        return self._lr

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot work, and read along what ``training_step`` returns."""
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "LossNormalizedLR does not work with manual optimization; use automatic optimization."
            )
        super().on_fit_start(trainer, pl_module)
        step = pl_module.training_step

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            if output is None:  # Lightning leaves such a micro-batch out, and so does the mean
                return None
            value = output.get(self.key) if isinstance(output, dict) else None
            if not isinstance(value, Tensor):
                raise MisconfigurationException(
                    f"LossNormalizedLR needs {type(pl_module).__name__}.training_step to return a dictionary with"
                    f" 'loss' and '{self.key}', the error probability of each sample."
                )
            batch = next(iter([*args, *kwargs.values()]), None)
            size = value.numel() if value.ndim else (batch_axis(batch) or 1)
            self._latest = (value.detach().double().mean() * size, size)
            return output

        self._undo = replace_method(pl_module, "training_step", training_step)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Count the micro-batch: others may call ``training_step`` too, but this loss is trained on."""
        assert self._latest is not None
        total, size = self._latest
        self._sum = total if self._sum is None else self._sum + total
        self._count += size

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Set the learning rate of the step that is under way."""
        if self._sum is None:
            return
        pair = torch.stack([self._sum, torch.as_tensor(float(self._count)).to(self._sum)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(pair)
        mean = float(pair[0] / pair[1])
        self._sum, self._count = None, 0
        self._lr = self.gamma / max(mean, self.clamp)
        GroupEdits.of(optimizer).refresh(optimizer)
        if trainer.loggers and (logging_step(trainer) + 1) % self.every_n_steps == 0:
            log_scalars(trainer, {"loss_normalized/one_minus_p": mean, "loss_normalized/lr": self._lr})

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Detach."""
        super().teardown(trainer, pl_module, stage)
        self._give_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Detach."""
        super().on_exception(trainer, pl_module, exception)
        self._give_back()

    def _give_back(self) -> None:
        self._sum, self._count, self._lr = None, 0, None  # of a window that was cut short
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()
