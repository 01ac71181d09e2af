"""A spectral density on TensorBoard: as a histogram, and as a figure."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import numpy as np
import torch

from lightning_grad._lightning import logging_step
from lightning_grad._tensorboard import log_figure, tensorboard_writers
from lightning_grad.statistics.curvature_lanczos import Spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINS = 64


def require_figures(who: str) -> None:
    """Raise if there is no matplotlib."""
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(f'{who} needs matplotlib: pip install "lightning-grad[demo]".')


def log_spectrum(trainer: pl.Trainer, plugin: str, found: Spectrum, *, histogram: bool, figure: bool) -> None:
    """Log ``<plugin>/spectrum`` (estimated numbers of eigenvalues) and ``<plugin>/density``."""
    if histogram:
        for writer in tensorboard_writers(trainer):
            _write_histogram(writer, f"{plugin}/spectrum", found, logging_step(trainer))
    if figure:
        log_figure(trainer, f"{plugin}/density", lambda: density_figure(found))


def _write_histogram(writer: object, tag: str, found: Spectrum, step: int) -> None:
    low, high = found.smallest, found.largest
    pad = 1e-6 * max(abs(low), abs(high), 1e-300)
    counts, edges = np.histogram(
        found.values.numpy(), _BINS, (low - pad, high + pad), weights=found.size * found.weights.numpy()
    )
    values = found.size * found.weights
    writer.add_histogram_raw(  # type: ignore[attr-defined]
        tag,
        min=low,
        max=high,
        num=found.size,
        sum=float(values @ found.values),
        sum_squares=float(values @ found.values**2),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def density_figure(found: Spectrum) -> Figure:
    """Return the density over the eigenvalues, on a logarithmic axis, with the Ritz values marked."""
    from matplotlib.figure import Figure

    span = max(found.largest - found.smallest, 1e-12)
    points = torch.linspace(found.smallest - 0.05 * span, found.largest + 0.05 * span, 500, dtype=torch.float64)
    figure = Figure(figsize=(6.0, 3.5), layout="constrained")
    axes = figure.subplots()
    density = found.density(points)
    axes.semilogy(points, density.clamp_min(float(density.max()) * 1e-8))
    axes.plot(found.values, np.full(len(found.values), float(density.max()) * 1e-8), "|", color="k", ms=8)
    axes.set(xlabel="eigenvalue of the Hessian", ylabel="density")
    axes.set_title(f"{found.size} eigenvalues, largest {found.largest:.4g}, smallest {found.smallest:.4g}", fontsize=9)
    return figure
