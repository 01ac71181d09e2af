"""How much each prompt deserves, and what an allocation is worth.

Pure functions of acceptance rates and gradient norms. The three objectives have different variances, so they need
different allocations; mixing them up costs more than it gains.

Source: "Optimizing Chain-of-Thought Reasoners via Gradient Variance Minimization in Rejection Sampling and RL",
arXiv 2505.02391, Algorithms 1 and 2; Neyman (1934) for the square-root rule.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_grad._validate import check_choice, check_range

Objective = Literal["em", "reward", "reward_baseline"]
ZeroPolicy = Literal["keep", "drop"]


def smooth_acceptance(successes: Tensor, trials: Tensor, prior: tuple[float, float] | None = (0.5, 0.5)) -> Tensor:
    """Posterior mean of the acceptance rate under a Beta prior.

    Args:
        successes: Accepted samples per prompt, shape ``[m]``; may be fractional (decayed counts).
        trials: Samples per prompt, shape ``[m]``.
        prior: Beta parameters ``(a, b)``, both >= 0. ``None`` gives the plain ratio, 0 where there was no trial.

    Returns:
        float64 tensor ``[m]``, ``(a + successes) / (a + b + trials)``.
    """
    a, b = (0.0, 0.0) if prior is None else prior
    check_range("prior[0]", a, 0.0, float("inf"), "[)")
    check_range("prior[1]", b, 0.0, float("inf"), "[)")
    total = trials.double() + (a + b)
    return torch.where(total > 0, (successes.double() + a) / total.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def fill_missing_norms(grad_norm: Tensor) -> Tensor:
    """Replace gradient norms that are not positive and finite by the median of those that are (1 if there are none)."""
    norm = grad_norm.double()
    known = torch.isfinite(norm) & (norm > 0)
    fill = norm[known].median() if bool(known.any()) else torch.ones((), dtype=torch.float64)
    return torch.where(known, norm, fill)


def allocation_weights(
    p: Tensor,
    grad_norm: Tensor,
    *,
    objective: Objective = "em",
    alpha: float = 1e-3,
    beta: float = 2.0,
    grad_norm_rejected: Tensor | None = None,
    shrink: float = 0.0,
    cost: Tensor | None = None,
    zero_policy: ZeroPolicy = "keep",
    reward_var: Tensor | None = None,
) -> Tensor:
    r"""Weights :math:`w_i`; :math:`n_i \propto w_i` minimises the variance of the objective's gradient estimate.

    .. math::
        \text{em: } \frac{G_i}{\sqrt{p_i + \alpha / p_i^{\beta - 1}}}, \quad
        \text{reward: } G_i \sqrt{p_i}, \quad
        \text{reward\_baseline: } \sqrt{p_i (1 - p_i) [(1 - p_i) G_i^2 + p_i G_{i,\mathrm{rej}}^2]}

    Args:
        p: Acceptance rates (mean rewards) in [0, 1], shape ``[m]``.
        grad_norm: Root mean square :math:`G_i` of the score norm over accepted samples, shape ``[m]``.
        objective: What is maximised: ``"em"`` mean log p, ``"reward"`` mean p without a baseline, ``"reward_baseline"``
            mean p with a baseline near p. The ``em`` rule is wrong for a reward objective.
        alpha: Damping of hopeless prompts, >= 0; ``em`` only.
        beta: Its exponent, >= 1; ``em`` only. The weight per unit of G peaks at ``p = (alpha * (beta - 1)) ** (1 /
            beta)``.
        grad_norm_rejected: The same moment over rejected samples; ``reward_baseline`` only. ``None`` assumes it equals
            ``grad_norm``, which turns the rule into ``G * sqrt(p * (1 - p))``.
        shrink: Mix with uniform, in [0, 1]: ``(1 - shrink) * w / mean(w) + shrink``. Dropped prompts stay dropped.
        cost: Cost of one sample of each prompt, > 0; weights are divided by its square root.
        zero_policy: ``"keep"`` gives prompts without a gradient norm the median of the others; ``"drop"`` gives prompts
            with ``p = 0`` or without a norm the weight 0 (the published rule).
        reward_var: Variance of the reward per prompt, for rewards that are not 0/1; replaces ``p * (1 - p)``, and
            ``p`` by ``reward_var + p**2`` in ``reward`` (taking reward and norm as independent).

    Returns:
        float64 tensor ``[m]``, >= 0.
    """
    check_choice("objective", objective, get_args(Objective))
    check_choice("zero_policy", zero_policy, get_args(ZeroPolicy))
    check_range("alpha", alpha, 0.0, float("inf"), "[)")
    check_range("beta", beta, 1.0, float("inf"), "[)")
    check_range("shrink", shrink, 0.0, 1.0)
    p = p.double()
    norm = fill_missing_norms(grad_norm) if zero_policy == "keep" else grad_norm.double()
    variance = p * (1 - p) if reward_var is None else reward_var.double()
    if objective == "em":
        weights = norm * (p + alpha * p ** (1.0 - beta)).rsqrt()
    elif objective == "reward":
        weights = norm * (p if reward_var is None else variance + p.square()).sqrt()
    else:
        rejected = norm if grad_norm_rejected is None else grad_norm_rejected.double()
        rejected = torch.where(torch.isfinite(rejected), rejected, norm)
        weights = (variance * ((1 - p) * norm.square() + p * rejected.square())).sqrt()
    sampled = (p > 0) & (norm > 0) & torch.isfinite(norm) if objective == "em" or zero_policy == "drop" else norm > 0
    weights = torch.where(sampled, weights, 0.0)
    mean = weights.mean()
    if shrink > 0.0 and bool(mean > 0):
        weights = torch.where(sampled, (1 - shrink) * weights / mean + shrink, 0.0)
    return weights if cost is None else weights * cost.double().rsqrt()


def predicted_variance(
    n: Tensor,
    p: Tensor,
    grad_norm2: Tensor,
    *,
    objective: Objective = "em",
    mean_grad_norm2: Tensor | None = None,
    grad_norm2_rejected: Tensor | None = None,
    exact: bool = False,
) -> float:
    r"""Trace of the covariance of the unbiased gradient estimate, :math:`m^{-2} \sum_i s_i^2 / n_i`.

    For ``em`` this is the variance of the Horvitz-Thompson estimate with the true acceptance rates.

    Args:
        n: Samples per prompt, shape ``[m]``. A prompt with ``n = 0`` contributes nothing: leaving it out is bias.
        p: Acceptance rates, shape ``[m]``.
        grad_norm2: Second moment :math:`G_i^2` over accepted samples, shape ``[m]``.
        objective: As in :func:`allocation_weights`.
        mean_grad_norm2: :math:`\|\bar g_i\|^2`, the squared norm of the mean score over accepted samples; for
            ``exact``.
        grad_norm2_rejected: Second moment over rejected samples; ``None`` takes ``grad_norm2``.
        exact: Subtract the squared mean. ``False`` gives the upper bound that the allocation minimises.

    Raises:
        ValueError: ``exact`` without ``mean_grad_norm2``.
    """
    check_choice("objective", objective, get_args(Objective))
    p, second = p.double(), grad_norm2.double()
    if objective == "em":
        spread = second / p
    elif objective == "reward":
        spread = p * second
    else:
        rejected = second if grad_norm2_rejected is None else grad_norm2_rejected.double()
        spread = p * (1 - p) * ((1 - p) * second + p * rejected)
    if exact:
        if mean_grad_norm2 is None:
            raise ValueError("`exact=True` needs `mean_grad_norm2`, the squared norm of each prompt's mean gradient.")
        mean2 = mean_grad_norm2.double()
        spread = spread - (mean2 if objective == "em" else p.square() * mean2)
    terms = torch.where(n > 0, spread / n.double().clamp_min(1.0), 0.0)
    return float(terms.sum()) / n.numel() ** 2


def predicted_sn_mse(n: Tensor, p: Tensor, tr_sigma: Tensor, mean_grad: Tensor) -> float:
    r"""Mean squared error of the self-normalised ``em`` estimate, whose prompts without an accepted sample are missing.

    .. math::
        m^{-2} \Big[ \sum_i \mathrm{tr}\Sigma_i \, E[1\{D_i \ge 1\} / D_i] + \sum_i P_i (1 - P_i) \|\bar g_i\|^2
        + \big\| \sum_i P_i \bar g_i \big\|^2 \Big], \quad D_i \sim \mathrm{Bin}(n_i, p_i), \; P_i = (1 - p_i)^{n_i}

    Args:
        n: Samples per prompt, shape ``[m]``.
        p: Acceptance rates, shape ``[m]``.
        tr_sigma: Trace of the score covariance over accepted samples, shape ``[m]``.
        mean_grad: Mean score over accepted samples, shape ``[m, d]``.
    """
    p, mean = p.double(), mean_grad.double()
    missing = (1 - p) ** n
    found = (tr_sigma.double() * _mean_inverse_count(n, p)).sum()
    lost = (missing * (1 - missing) * mean.square().sum(1)).sum()
    bias = (missing[:, None] * mean).sum(0).square().sum()
    return float(found + lost + bias) / n.numel() ** 2


def _mean_inverse_count(n: Tensor, p: Tensor) -> Tensor:
    """``E[1{D >= 1} / D]`` for ``D ~ Binomial(n, p)``, by ``f(j) = (1 - p) f(j - 1) + (1 - (1 - p)**j) / j``."""
    q = 1 - p
    value, power = torch.zeros_like(q), torch.ones_like(q)
    for j in range(1, int(n.max()) + 1):
        power = power * q
        value = torch.where(j <= n, q * value + (1 - power) / j, value)
    return value
