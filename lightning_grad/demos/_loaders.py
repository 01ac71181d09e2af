"""The loaders of the demo data modules."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


def train_loader(dataset: Dataset[Any], batch_size: int, seed: int, num_workers: int) -> DataLoader[Any]:
    """Return a shuffling loader that leaves the global random state alone."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size, shuffle=True, drop_last=True, num_workers=num_workers, generator=generator)


def eval_loader(dataset: Dataset[Any], batch_size: int, num_workers: int) -> DataLoader[Any]:
    """Return a loader that goes through ``dataset`` in order."""
    return DataLoader(dataset, batch_size, num_workers=num_workers)
