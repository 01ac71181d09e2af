"""Importance and stratified sampling of ordinary training examples.

Source: Alain et al. 2015 (arXiv 1511.06481); Katharopoulos and Fleuret 2018 (arXiv 1803.00942); Neyman (1934).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_grad._validate import check_int, check_range


def importance_probs(scores: Tensor, uniform_mix: float = 0.1) -> Tensor:
    r"""Sampling probabilities :math:`q_i = (1 - \lambda) s_i / \sum s + \lambda / m`.

    With loss weights ``1 / (m q)`` the weighted gradient is unbiased for any scores, stale ones included.

    Args:
        scores: Gradient-norm scores ``[m]``, >= 0. Not-finite scores count as the median; all zero gives uniform.
        uniform_mix: :math:`\lambda` in [0, 1]; loss weights are at most :math:`1/\lambda`.

    Returns:
        float64 tensor ``[m]`` that sums to 1.
    """
    check_range("uniform_mix", uniform_mix, 0.0, 1.0)
    scores = scores.double()
    known = torch.isfinite(scores) & (scores >= 0)
    if bool(known.any()):
        scores = torch.where(known, scores, scores[known].median())
    total = scores.sum()
    m = scores.numel()
    if not bool(known.any()) or float(total) <= 0.0:
        return torch.full((m,), 1.0 / m, dtype=torch.float64)
    return (1 - uniform_mix) * scores / total + uniform_mix / m


def importance_variance_ratio(scores: Tensor, mean_grad_norm2: float = 0.0) -> float:
    r"""Best possible variance of importance sampling over that of uniform sampling.

    :math:`((\overline{\|g\|})^2 - \|\bar g\|^2) / (\overline{\|g\|^2} - \|\bar g\|^2)`; 1 means nothing to gain.

    Args:
        scores: Gradient norms ``[m]``.
        mean_grad_norm2: Squared norm of the mean gradient; 0 gives a ratio that is too close to 1.
    """
    scores = scores.double()
    uniform = float(scores.square().mean()) - mean_grad_norm2
    return 1.0 if uniform <= 0.0 else (float(scores.mean()) ** 2 - mean_grad_norm2) / uniform


def systematic_sample(probs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
    """Draw ``num_samples`` indices with one uniform number: index ``i`` comes ``floor`` or ``ceil`` of ``n q_i`` times.

    Each draw has the marginal law ``probs``; the order is shuffled. (``torch.multinomial`` stops at 2**24 categories.)

    Args:
        probs: Probabilities ``[m]`` that sum to 1.
        num_samples: >= 0.
        generator: CPU generator.

    Returns:
        int64 tensor ``[num_samples]``.
    """
    check_int("num_samples", num_samples, 0)
    edges = probs.double().cumsum(0)
    offset = torch.rand((), dtype=torch.float64, generator=generator)
    points = (torch.arange(num_samples, dtype=torch.float64) + offset) / max(num_samples, 1) * edges[-1]
    index = torch.searchsorted(edges, points, right=True).clamp_max(probs.numel() - 1)
    return index[torch.randperm(num_samples, generator=generator)]


def linear_head_scores(hidden: Tensor, logits: Tensor, target: Tensor, *, bias: bool = True) -> Tensor:
    r"""Gradient norm of a linear softmax head per example, :math:`\|\mathrm{softmax}(z) - \mathrm{onehot}\| \|h\|`.

    Args:
        hidden: Inputs of the head ``[B, d]``.
        logits: Its outputs ``[B, C]``.
        target: Classes ``[B]``.
        bias: Whether the head has a bias, whose gradient is then part of the norm.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    delta = torch.softmax(logits.detach().to(dtype), -1)
    delta.scatter_add_(-1, target[:, None], torch.full_like(delta[:, :1], -1.0))
    norms: Tensor = delta.norm(dim=-1) * (hidden.detach().to(dtype).square().sum(-1) + float(bias)).sqrt()
    return norms


def stratified_sample(
    strata: Tensor, counts: Tensor, num_samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    r"""Draw ``counts[h]`` examples of every stratum, without replacement as long as there are any.

    Args:
        strata: Stratum of each example, int64 ``[m]``.
        counts: Examples to draw per stratum ``[H]``, summing to ``num_samples``; >= 1 for strata with examples.
        num_samples: Draws.
        generator: CPU generator.

    Returns:
        Shuffled indices ``[num_samples]`` and loss weights :math:`W_h n / n_h`, whose mean-weighted loss is unbiased.
    """
    chosen, weights = [], []
    for h, count in enumerate(counts.tolist()):
        members = (strata == h).nonzero()[:, 0]
        if not len(members) or not count:
            continue
        rounds = -(-count // len(members))
        order = torch.cat([members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)])
        chosen.append(order[:count])
        share = len(members) / len(strata)
        weights.append(torch.full((count,), share * num_samples / count, dtype=torch.float64))
    shuffle = torch.randperm(num_samples, generator=generator)
    return torch.cat(chosen)[shuffle], torch.cat(weights)[shuffle]
