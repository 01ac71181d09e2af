"""The prompts of a run as a data module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_grad.data.rollouts import RolloutLoader


class RolloutDataModule(pl.LightningDataModule):
    """Prompts whose completions the model samples; :class:`lightning_grad.DynamicSampleAllocation` fills the batches.

    Args:
        prompts: Any objects the model's ``sample(prompts, counts, generator)`` understands.
        difficulty: Integer level of each prompt; acceptance is then logged by level.
    """

    def __init__(self, prompts: Sequence[Any], difficulty: Sequence[int] | Tensor | None = None) -> None:
        super().__init__()
        self.loader = RolloutLoader(prompts, difficulty=difficulty)

    def train_dataloader(self) -> RolloutLoader:
        """The one loader of the run."""
        return self.loader
