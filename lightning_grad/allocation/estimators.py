"""Weights and advantages of generated samples, so that the training loss estimates the intended gradient.

Source: arXiv 2505.02391, Algorithm 1 (self-normalised); Horvitz and Thompson (1952); the leave-one-out baseline of RLOO
(arXiv 2402.14740). ``flat`` is what the published trainer does.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_grad._validate import check_choice, check_range
from lightning_grad.allocation.prompt_weights import Objective

Estimator = Literal["self_normalized", "horvitz_thompson", "flat"]
AdvantageKind = Literal["loo", "mean", "mean_std"]


def sample_weights(
    prompt_index: Tensor,
    accepted: Tensor,
    *,
    num_prompts: int,
    objective: Objective,
    estimator: Estimator = "self_normalized",
    p: Tensor | None = None,
    counts: Tensor | None = None,
    accepted_counts: Tensor | None = None,
) -> Tensor:
    r"""Weight :math:`v_{ij}` of every sample in the estimate :math:`\sum v_{ij} c_{ij} \nabla \log \pi(y_{ij})`.

    Args:
        prompt_index: Prompt of each sample, int64 ``[n]`` in ``[0, num_prompts)``.
        accepted: Whether each sample was accepted, bool ``[n]``.
        num_prompts: ``m``.
        objective: ``"em"``: only accepted samples count. ``"reward"`` and ``"reward_baseline"``: all do, with ``1/(m
            n_i)``.
        estimator: For ``em``: ``"self_normalized"`` is :math:`1/(m^+ D_i)`, unbiased for the mean score of a prompt
            given that it has an accepted sample (:math:`D_i` accepted, :math:`m^+` prompts with any);
            ``"horvitz_thompson"`` is :math:`1/(m n_i p_i)`, unbiased if ``p`` is right and independent of these
            samples; ``"flat"`` is :math:`1/\sum D`, the published code, which estimates neither objective.
        p: Acceptance rates ``[m]``; needed by ``"horvitz_thompson"``.
        counts: Samples per prompt ``[m]`` over all processes; ``None`` counts ``prompt_index``.
        accepted_counts: Accepted samples per prompt ``[m]`` over all processes; ``None`` counts ``accepted``.

    Returns:
        float64 tensor ``[n]``; 0 for samples that do not count.

    Raises:
        ValueError: ``"horvitz_thompson"`` without ``p``.
    """
    check_choice("objective", objective, get_args(Objective))
    check_choice("estimator", estimator, get_args(Estimator))
    if counts is None:
        counts = torch.bincount(prompt_index, minlength=num_prompts)
    if objective != "em":
        return 1.0 / (num_prompts * counts[prompt_index].double())
    if accepted_counts is None:
        accepted_counts = torch.bincount(prompt_index[accepted], minlength=num_prompts)
    found = accepted_counts.double()
    if estimator == "horvitz_thompson":
        if p is None:
            raise ValueError("`estimator='horvitz_thompson'` needs `p`, the acceptance rate of every prompt.")
        weights = 1.0 / (num_prompts * counts[prompt_index] * p.double()[prompt_index])
    elif estimator == "flat":
        weights = torch.full_like(prompt_index, 1.0, dtype=torch.float64) / found.sum()
    else:
        weights = 1.0 / ((found > 0).sum() * found[prompt_index])
    return torch.where(accepted, weights, 0.0)


def group_advantages(
    reward: Tensor,
    prompt_index: Tensor,
    *,
    kind: AdvantageKind = "loo",
    eps: float = 1e-6,
    group_sums: Tensor | None = None,
) -> Tensor:
    """Reward minus a baseline of the same prompt's samples; groups may have any size.

    Args:
        reward: Shape ``[n]``. Samples whose reward is not finite are left out of the groups and get 0.
        prompt_index: Prompt of each sample, int64 ``[n]``.
        kind: ``"loo"`` subtracts the mean of the *other* samples (unbiased); ``"mean"`` the group mean;
            ``"mean_std"`` also divides by the group's standard deviation (GRPO; biased). A group of one gets 0.
        eps: Added to the standard deviation, >= 0.
        group_sums: Count, sum and sum of squares per prompt over all processes, float64 ``[m, 3]``, when a group
            straddles processes (:func:`group_moments`, summed); ``None`` uses these samples.

    Returns:
        float64 tensor ``[n]``.
    """
    check_choice("kind", kind, get_args(AdvantageKind))
    check_range("eps", eps, 0.0, float("inf"), "[)")
    sums = group_moments(reward, prompt_index, num_prompts=None) if group_sums is None else group_sums
    count, total, square = sums[prompt_index].unbind(1)
    valid = torch.isfinite(reward) & (count > 1)
    centred = torch.where(valid, reward.double(), 0.0) - total / count.clamp_min(1)
    if kind == "loo":
        centred = centred * count / (count - 1).clamp_min(1)
    elif kind == "mean_std":
        variance = (square - total.square() / count.clamp_min(1)) / (count - 1).clamp_min(1)
        centred = centred / (variance.clamp_min(0).sqrt() + eps)
    return torch.where(valid, centred, 0.0)


def group_moments(reward: Tensor, prompt_index: Tensor, num_prompts: int | None) -> Tensor:
    """Count, sum and sum of squares of the finite rewards of every prompt, float64 ``[m, 3]``; add over processes."""
    size = int(prompt_index.max()) + 1 if num_prompts is None else num_prompts
    finite = torch.isfinite(reward)
    value = torch.where(finite, reward.double(), 0.0)
    rows = torch.stack([finite.double(), value, value.square()], dim=1)
    return torch.zeros(size, 3, dtype=torch.float64).index_add_(0, prompt_index, rows)
