"""From what is known of the prompts to a plan: how many samples each gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_grad._validate import check_choice, check_int, check_range
from lightning_grad.allocation.history import PromptHistory
from lightning_grad.allocation.integer import Rounding, allocate, is_degenerate
from lightning_grad.allocation.prompt_weights import (
    Objective,
    ZeroPolicy,
    allocation_weights,
    fill_missing_norms,
    predicted_variance,
)

Cost = Literal["samples", "tokens"]


@dataclass(frozen=True)
class Plan:
    """How many samples each prompt gets, and what that is worth.

    ``variance_ratio`` is the predicted variance over that of an even split of as many samples (1 where not known).
    """

    counts: Tensor
    p: Tensor
    grad_norm: Tensor
    variance_ratio: float = 1.0
    fallback: bool = False


@dataclass(frozen=True)
class AllocationRule:
    """The settings of a plan; see :class:`lightning_grad.DynamicSampleAllocation` for their meaning."""

    objective: Objective = "em"
    alpha: float = 1e-3
    beta: float = 2.0
    prior: tuple[float, float] | None = (0.5, 0.5)
    zero_policy: ZeroPolicy = "keep"
    shrink: float | None = None
    min_samples: int = 1
    max_samples: int | None = None
    rounding: Rounding = "optimal"
    cost: Cost = "samples"
    floor: int = field(init=False)

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, get_args(Objective))
        check_choice("zero_policy", self.zero_policy, get_args(ZeroPolicy))
        check_choice("rounding", self.rounding, get_args(Rounding))
        check_choice("cost", self.cost, get_args(Cost))
        check_range("alpha", self.alpha, 0.0, float("inf"), "[)")
        check_range("beta", self.beta, 1.0, float("inf"), "[)")
        check_int("min_samples", self.min_samples, 0)
        if self.shrink is not None:
            check_range("shrink", self.shrink, 0.0, 1.0)
        for i, value in enumerate(self.prior or ()):
            check_range(f"prior[{i}]", value, 0.0, float("inf"), "[)")
        # a leave-one-out baseline needs a second sample
        floor = max(2, self.min_samples) if self.objective == "reward_baseline" else self.min_samples
        object.__setattr__(self, "floor", floor)
        if self.max_samples is not None:
            check_int("max_samples", self.max_samples, max(1, floor))

    @property
    def shrinkage(self) -> float:
        """``shrink`` with its default: pilots are too noisy for the small gain of the reward objectives."""
        if self.shrink is not None:
            return self.shrink
        # 8 pilots on the toy: the worst plan of 60 has 1.013 of the variance of an even split; with 0.5, 1.056
        return 0.0 if self.objective == "em" else 0.75

    def weights(self, history: PromptHistory) -> Tensor:
        """Allocation weights ``[m]`` from the history."""
        p, norm = history.acceptance(self.prior), history.grad_norm()
        binary = torch.equal(history["reward"], history["reward2"])
        reward_var = None if binary or self.objective == "em" else history.reward_var()
        if reward_var is not None and self.objective == "reward":
            mean = history.mean_reward()
            p = torch.where(torch.isfinite(mean), mean, mean.nanmean())
        return allocation_weights(
            p,
            norm,
            objective=self.objective,
            alpha=self.alpha,
            beta=self.beta,
            grad_norm_rejected=history.grad_norm_rejected(),
            shrink=self.shrinkage,
            cost=history.mean_length() if self.cost == "tokens" else None,
            zero_policy=self.zero_policy,
            reward_var=reward_var,
        )

    def plan(self, history: PromptHistory, budget: int, *, at_least: int = 0, seed: int = 0) -> Plan:
        """Spend ``budget`` samples.

        Args:
            history: What is known of the prompts.
            budget: Samples; with ``cost="tokens"`` the budget is ``budget`` completions of mean length.
            at_least: Samples that every prompt already has and that count.
            seed: Seed of the even split that degenerate weights get.
        """
        weights = self.weights(history)
        low = max(self.floor, at_least)
        counts = self._spend(weights, budget, low, history, seed)
        p, norm = history.acceptance(self.prior), fill_missing_norms(history.grad_norm())
        even = self.even(history.num_prompts, int(counts.sum()), at_least=at_least)
        return Plan(counts, p, norm, self._ratio(counts, even, p, norm, history), is_degenerate(weights))

    def even(self, num_prompts: int, budget: int, *, at_least: int = 0) -> Tensor:
        """As even as possible, within the bounds."""
        low = max(self.floor, at_least)
        return allocate(torch.ones(num_prompts), budget, min_samples=low, max_samples=self.max_samples)

    def _spend(self, weights: Tensor, budget: int, low: int, history: PromptHistory, seed: int) -> Tensor:
        def split(samples: int) -> Tensor:
            return allocate(
                weights, samples, min_samples=low, max_samples=self.max_samples, rounding=self.rounding, seed=seed
            )

        if self.cost == "samples":
            return split(budget)
        price = history.mean_length()
        limit = budget * float(price.mean()) * (1 + 1e-12)
        least = low * len(price)
        most = max(least, int(limit / float(price.min())))
        if self.max_samples is not None:
            most = min(most, self.max_samples * len(price))
        while least < most:  # the dearer plans have more samples
            middle = (least + most + 1) // 2
            if float((split(middle) * price).sum()) <= limit:
                least = middle
            else:
                most = middle - 1
        return split(least)

    def _ratio(self, counts: Tensor, even: Tensor, p: Tensor, norm: Tensor, history: PromptHistory) -> float:
        rejected = history.grad_norm_rejected()
        rejected = torch.where(torch.isfinite(rejected), rejected, norm).square()
        known = p.clamp_min(torch.finfo(torch.float64).tiny)
        values = [
            predicted_variance(n, known, norm.square(), objective=self.objective, grad_norm2_rejected=rejected)
            for n in (torch.where(p > 0, counts, 0), torch.where(p > 0, even, 0))
        ]
        return values[0] / values[1] if values[1] > 0 else 1.0


def gini(counts: Tensor) -> float:
    """Inequality of the allocation: 0 for an even one, near 1 if a few prompts get everything."""
    ordered = counts.double().sort().values
    total, m = float(ordered.sum()), counts.numel()
    ranks = torch.arange(1, m + 1, dtype=torch.float64)
    return float(((2 * ranks - m - 1) * ordered).sum()) / (m * total) if total > 0 else 0.0


def share_of(counts: Tensor, rank: int, world: int) -> Tensor:
    """This process's part of a plan: block ``rank`` of the flattened list of requests, as counts ``[m]``."""
    total = int(counts.sum())
    first, last = rank * total // world, (rank + 1) * total // world
    end = counts.cumsum(0)
    return (end.clamp_max(last) - (end - counts).clamp_min(first)).clamp_min(0)
