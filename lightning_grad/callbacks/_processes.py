"""Numbers that the processes of a run must agree on."""

from __future__ import annotations

import lightning.pytorch as pl
import torch


def sum_over_processes(trainer: pl.Trainer, value: int) -> int:
    """The sum of ``value`` over all processes, which must all call this; the same on each of them."""
    if trainer.world_size == 1:
        return value
    return int(trainer.strategy.reduce(torch.tensor(value, device=trainer.strategy.root_device), reduce_op="sum"))
