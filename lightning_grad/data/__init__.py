"""Samplers and loaders whose position survives a restart."""

from lightning_grad.data.resumable import (
    PositionedBatchSampler,
    ResumableBatchSampler,
    ResumableDataLoader,
    ResumableSampler,
    epoch_order,
)

__all__ = [
    "PositionedBatchSampler",
    "ResumableBatchSampler",
    "ResumableDataLoader",
    "ResumableSampler",
    "epoch_order",
]
