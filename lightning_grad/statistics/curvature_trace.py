r"""Trace and Frobenius norm of a symmetric map from a few products.

For random signs :math:`z`, :math:`\mathbb{E}\, z^T A z = \mathrm{tr} A` (Hutchinson) and
:math:`\mathbb{E}\, \|A z\|^2 = \|A\|_F^2`, from the same products. Hutch++ (Meyer et al., arXiv:2010.09649) takes the
trace on the span of :math:`A S` exactly and leaves only the rest to chance: with a decaying spectrum its error falls as
:math:`1/m` in the number of products instead of :math:`1/\sqrt m`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_grad._validate import check_int
from lightning_grad.statistics.curvature import MatVec, rademacher


@dataclass(frozen=True)
class Estimate:
    """A mean over probes and its standard error (NaN for one probe)."""

    value: float
    error: float

    @classmethod
    def of(cls, samples: list[float]) -> Estimate:
        """Return mean and standard error of ``samples``."""
        n, mean = len(samples), math.fsum(samples) / len(samples)
        if n < 2:
            return cls(mean, math.nan)
        return cls(mean, math.sqrt(math.fsum((s - mean) ** 2 for s in samples) / (n * (n - 1))))


@torch.no_grad()
def hutchinson(
    matvec: MatVec,
    size: int,
    num_probes: int = 4,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Estimate, Estimate]:
    """Return unbiased estimates of the trace and of the squared Frobenius norm from ``num_probes`` products.

    Args:
        matvec: The map.
        size: Entries of its vectors.
        num_probes: Products, >= 1; their spread gives the standard errors.
        seed: Of the first probe; the others take the following integers.
        device: Where the probes are.
        dtype: Of the probes; sums are float64.
    """
    check_int("num_probes", num_probes, 1)
    traces, squares = [], []
    for i in range(num_probes):
        z = rademacher(size, seed + i, device, dtype)
        product = matvec(z).double()
        traces.append(float(z.double() @ product))
        squares.append(float(product @ product))
    return Estimate.of(traces), Estimate.of(squares)


@torch.no_grad()
def hutchpp(
    matvec: MatVec,
    size: int,
    num_products: int = 12,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Estimate:
    """Return an unbiased estimate of the trace from at most ``num_products`` (>= 6) products.

    A third of them each for the range, the exact part and the rest; memory for a third of them as vectors.

    Args:
        matvec: The map.
        size: Entries of its vectors; with ``num_products`` of three times as many or more the trace is exact.
        num_products: Bound on the products, >= 6.
        seed: As for :func:`hutchinson`.
        device: Where the probes are.
        dtype: Of the probes.
    """
    part = min(check_int("num_products", num_products, 6) // 3, size)
    sketch = torch.stack([matvec(rademacher(size, seed + i, device, dtype)) for i in range(part)], 1)
    basis: Tensor = torch.linalg.qr(sketch.double())[0].to(sketch.dtype)
    exact = math.fsum(float(q.double() @ matvec(q).double()) for q in basis.T)
    if part == size:
        return Estimate(exact, 0.0)
    rest = []
    for i in range(part, 2 * part):
        z = rademacher(size, seed + i, device, dtype)
        z = z - basis @ (basis.T @ z)
        rest.append(float(z.double() @ matvec(z).double()))
    estimate = Estimate.of(rest)
    return Estimate(exact + estimate.value, estimate.error)
