"""Metrics of generated samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_grad._validate import check_int


class AcceptanceRate(Metric):
    """Accepted samples over all samples.

    Args:
        num_prompts: Also count per prompt; then ``update`` needs ``prompt_index``.
        **kwargs: As for ``torchmetrics.Metric``.
    """

    full_state_update = False
    accepted: Tensor
    total: Tensor

    def __init__(self, num_prompts: int | None = None, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.num_prompts = None if num_prompts is None else check_int("num_prompts", num_prompts, 1)
        for name in ("accepted", "total"):
            self.add_state(name, torch.zeros(num_prompts or 1, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, accepted: Tensor, prompt_index: Tensor | None = None) -> None:
        """Add samples: bool ``[n]``, and the prompt of each if the metric counts per prompt."""
        if self.num_prompts is not None and prompt_index is None:
            raise ValueError(f"AcceptanceRate(num_prompts={self.num_prompts}).update() needs `prompt_index`.")
        index = torch.zeros_like(accepted, dtype=torch.int64) if self.num_prompts is None else prompt_index
        assert index is not None
        self.accepted.index_add_(0, index, accepted.double())
        self.total.index_add_(0, index, torch.ones_like(accepted, dtype=torch.float64))

    def compute(self) -> Tensor:
        """The rate over all samples; NaN if there are none."""
        return (self.accepted.sum() / self.total.sum()).float()

    def per_prompt(self) -> Tensor:
        """The rate of every prompt, NaN where unseen; of this process until ``compute`` has synchronized."""
        return (self.accepted / self.total).float()


class GroupSignal(Metric):
    """Fraction of groups (all samples of a prompt) whose rewards are all exactly equal: they teach a baseline nothing.

    Equality is exact: a standard deviation computed in floating point is rarely 0. Give whole groups, e.g. the samples
    of an iteration.

    Args:
        **kwargs: As for ``torchmetrics.Metric``.
    """

    full_state_update = False
    equal: Tensor
    groups: Tensor

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        for name in ("equal", "groups"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, reward: Tensor, prompt_index: Tensor) -> None:
        """Add groups: rewards ``[n]`` and the prompt of each sample."""
        size = int(prompt_index.max()) + 1 if len(prompt_index) else 0
        high = torch.full((size,), -torch.inf, dtype=reward.dtype, device=reward.device)
        high = high.scatter_reduce(0, prompt_index, reward, "amax")
        low = torch.full_like(high, torch.inf).scatter_reduce(0, prompt_index, reward, "amin")
        seen = torch.bincount(prompt_index, minlength=size) > 0
        self.equal += ((high == low) & seen).sum()
        self.groups += seen.sum()

    def compute(self) -> Tensor:
        """The fraction; NaN if there are no groups."""
        return (self.equal / self.groups).float()
