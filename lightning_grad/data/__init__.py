"""Samplers and loaders whose position survives a restart."""

from lightning_grad.data.adaptive import AdaptiveBatchSampler, AdaptiveDataLoader, DrawnOrderSampler
from lightning_grad.data.batch_course import MicroBatch
from lightning_grad.data.resumable import (
    PositionedBatchSampler,
    ResumableBatchSampler,
    ResumableDataLoader,
    ResumableSampler,
    epoch_order,
)

__all__ = [
    "AdaptiveBatchSampler",
    "AdaptiveDataLoader",
    "DrawnOrderSampler",
    "MicroBatch",
    "PositionedBatchSampler",
    "ResumableBatchSampler",
    "ResumableDataLoader",
    "ResumableSampler",
    "epoch_order",
]
