"""Whether Markov chains have mixed: split R-hat and effective sample size."""

from __future__ import annotations

import torch
from torch import Tensor


def split_rhat(chains: Tensor) -> float:
    """Potential scale reduction of chains that are cut in half: near 1 if they agree, above 1.01 if they do not.

    Args:
        chains: ``(C, T)``: T >= 4 draws of one quantity in each of C >= 1 chains.

    Raises:
        ValueError: The shape is another.

    Source: Gelman et al., Bayesian Data Analysis, 3rd edition, section 11.4.
    """
    halves = _halves(chains)
    draws = halves.shape[1]
    within = halves.var(1).mean()
    between = halves.mean(1).var() * draws
    return float((((draws - 1) / draws * within + between / draws) / within).sqrt())


def effective_sample_size(chains: Tensor) -> float:
    """Number of independent draws with the same variance of the mean.

    Args:
        chains: ``(C, T)``, as for :func:`split_rhat`.

    Returns:
        At most ``C * T * log10(C * T)``; sums autocorrelations over pairs of lags until a pair is negative (Geyer).
    """
    halves = _halves(chains)
    count, draws = halves.shape
    centered = halves - halves.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centered, n=2 * draws)
    covariance = torch.fft.irfft(spectrum.abs().square(), n=2 * draws)[:, :draws].mean(0) / draws
    within = halves.var(1).mean()
    total = (draws - 1) / draws * within + (halves.mean(1).var() if count > 1 else 0.0)
    rho = 1 - (within - covariance * draws / (draws - 1)) / total
    pairs = rho[: draws // 2 * 2].view(-1, 2).sum(1)
    negative = (pairs < 0).nonzero()
    stop = int(negative[0]) if len(negative) else len(pairs)
    tau = float(-1 + 2 * pairs[:stop].cummin(0).values.sum())
    size = count * draws
    return size / max(tau, 1 / float(torch.log10(torch.tensor(float(size)))))


def _halves(chains: Tensor) -> Tensor:
    if chains.ndim != 2 or chains.shape[1] < 4:
        raise ValueError(f"`chains` must have shape (chains, draws) with at least 4 draws, got {tuple(chains.shape)}.")
    half = chains.shape[1] // 2
    return torch.cat([chains[:, :half], chains[:, -half:]]).double()
