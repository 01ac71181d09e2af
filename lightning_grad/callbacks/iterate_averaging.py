"""The mean of the iterates, for dynamics whose last iterate is noise."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging

from lightning_grad._validate import check_int


class IterateAveraging(WeightAveraging):
    """Uniform average of the parameters from a step on, put into the model at the end of the fit and for validation.

    Lightning's :class:`~lightning.pytorch.callbacks.WeightAveraging` with a start, and with the average scaled back to
    the norms that the parameters have: the mean of points on a sphere lies inside of it (``SGLD(sphere=True)``).

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

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether a step counts."""
        return step_idx is not None and step_idx >= self.average_start

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average into the model."""
        norms = [torch.linalg.vector_norm(p.double()) for p in pl_module.parameters()]
        super().on_train_end(trainer, pl_module)
        if self.renormalize:
            for p, norm in zip(pl_module.parameters(), norms, strict=True):
                now = torch.linalg.vector_norm(p.double())
                if p.requires_grad and now > 0:
                    p.mul_(norm / now)
