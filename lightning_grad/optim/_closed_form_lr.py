"""Schedules whose learning rate is a function of a position, so that they can be asked and set at any time."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler


class ClosedFormLR(LRScheduler):
    """Base: ``get_lr`` depends on the schedule's own position and not on the present learning rates."""

    def _write(self) -> None:
        """Set the learning rates of the present position."""
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):  # a captured graph may hold it: keep the object
                group["lr"].fill_(float(lr))
            else:
                group["lr"] = lr
        self._last_lr: list[Any] = [group["lr"] for group in self.optimizer.param_groups]
