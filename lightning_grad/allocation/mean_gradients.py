"""How the self-normalised estimate of ``em`` errs, from vectors that stand for the gradients of accepted samples."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_grad.allocation.prompt_weights import predicted_sn_mse


def gradient_sums(prompt_index: Tensor, vectors: Tensor, num_prompts: int) -> Tensor:
    """Sums over accepted samples, of any sketch or projection of their scores; sums of several processes are added.

    Args:
        prompt_index: Prompt of each accepted sample, int64 ``[n]``.
        vectors: ``[n, k]``; a row that is not finite is left out.
        num_prompts: ``m``.

    Returns:
        float64 ``[m, k + 2]``: the vectors, their squared lengths and how many there are.
    """
    good = torch.isfinite(vectors).all(1)
    vectors, prompt_index = vectors[good].double(), prompt_index[good]
    rows = torch.cat([vectors, vectors.square().sum(1, keepdim=True), torch.ones_like(vectors[:, :1])], 1)
    return torch.zeros(num_prompts, rows.shape[1], dtype=torch.float64).index_add_(0, prompt_index, rows)


def mean_gradients(sums: Tensor) -> tuple[Tensor, Tensor] | None:
    r"""Trace of the score covariance and mean score of every prompt, as :func:`predicted_sn_mse` takes them.

    With two or more accepted samples the trace and the squared length of the mean are unbiased (the length is cut at
    0). A prompt with one is taken to vary, in proportion to its second moment, as those do together; a prompt with none
    has the mean of all means and the median second moment.

    Args:
        sums: Of :func:`gradient_sums`, ``[m, k + 2]``.

    Returns:
        :math:`\mathrm{tr}\Sigma` ``[m]`` and :math:`\bar g` ``[m, k]``; ``None`` if no prompt has two accepted samples.
    """
    total, square, count = sums[:, :-2], sums[:, -2], sums[:, -1]
    many, one = count > 1, count == 1
    if not bool(many.any()):
        return None
    second, mean = square / count.clamp_min(1), total / count.clamp_min(1)[:, None]
    trace = (square - count * mean.square().sum(1)) / (count - 1).clamp_min(1)
    share = float(trace[many].sum() / second[many].sum().clamp_min(torch.finfo(torch.float64).tiny))
    share = min(max(share, 0.0), 1.0)
    second = torch.where(count > 0, second, second[count > 0].median())
    trace = torch.where(many, trace, share * second)
    mean = torch.where((many | one)[:, None], mean, mean[many | one].mean(0))
    length2 = (second - trace).clamp_min(0.0)  # of the true mean: that of the estimated one is too long
    mean = mean * (length2 / mean.square().sum(1).clamp_min(torch.finfo(torch.float64).tiny)).sqrt()[:, None]
    return trace, mean


def sn_mse_ratio(counts: Tensor, even: Tensor, p: Tensor, tr_sigma: Tensor, mean_grad: Tensor) -> float:
    """Mean squared error of the self-normalised estimate under a plan, over that under another one.

    Args:
        counts: The plan ``[m]``.
        even: What it is compared with ``[m]``.
        p: Acceptance rates ``[m]``.
        tr_sigma: See :func:`predicted_sn_mse`.
        mean_grad: The same.
    """
    under = [predicted_sn_mse(n, p, tr_sigma, mean_grad) for n in (counts, even)]
    return under[0] / under[1] if under[1] > 0 else 1.0
