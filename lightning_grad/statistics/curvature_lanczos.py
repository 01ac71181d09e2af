r"""Lanczos with full reorthogonalization, and the spectral density it gives (stochastic Lanczos quadrature).

``k`` products with a symmetric :math:`A` give a :math:`k \times k` tridiagonal :math:`T`. Its eigenvalues (Ritz values)
converge to the ends of the spectrum first; with the squared first components :math:`\tau_i^2` of its eigenvectors,
:math:`\sum_i \tau_i^2 f(\theta_i)` is Gauss quadrature for :math:`v^T f(A) v`, exact for polynomials of degree
:math:`2k-1`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_grad._validate import check_choice, check_int
from lightning_grad.statistics.curvature import MatVec, rademacher

Reorthogonalize = Literal["full", "none"]


@dataclass(frozen=True)
class Lanczos:
    """A Lanczos factorization of a symmetric map.

    ``diagonal`` ``(k,)`` and ``off_diagonal`` ``(k - 1,)`` of the tridiagonal matrix and ``basis`` ``(k, P)``
    (``None`` without reorthogonalization); ``residual`` is the coefficient that would follow, 0 after a breakdown, i.e.
    when the vectors span an invariant subspace and all Ritz values are exact.
    """

    diagonal: Tensor
    off_diagonal: Tensor
    basis: Tensor | None
    residual: float

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return Ritz values, ascending, and their weights (which sum to 1), both float64."""
        values, vectors = self._eigh()
        return values, vectors[0] ** 2

    def error_bounds(self) -> Tensor:
        """Return for each Ritz value a distance within which there is an eigenvalue (rounding apart)."""
        return self.residual * self._eigh()[1][-1].abs()

    def vector(self, index: int) -> Tensor:
        """Return the Ritz vector of Ritz value ``index``, of norm 1."""
        if self.basis is None:
            raise ValueError("Ritz vectors need `reorthogonalize='full'`.")
        return self._eigh()[1][:, index].to(self.basis) @ self.basis

    def _eigh(self) -> tuple[Tensor, Tensor]:
        t = torch.diag(self.diagonal)
        if self.off_diagonal.numel():
            t = t + torch.diag(self.off_diagonal, 1) + torch.diag(self.off_diagonal, -1)
        values, vectors = torch.linalg.eigh(t)
        return values, vectors


@torch.no_grad()
def lanczos(matvec: MatVec, v0: Tensor, k: int, reorthogonalize: Reorthogonalize = "full") -> Lanczos:
    """Run at most ``k`` steps from ``v0``; one product each.

    Args:
        matvec: The map.
        v0: Start vector, not zero; its dtype and device are used throughout.
        k: Steps, >= 1; no more than ``v0`` has entries.
        reorthogonalize: ``"full"`` keeps ``k`` vectors and makes each new one orthogonal to all, twice where once is
            not enough. ``"none"`` keeps two; copies of converged eigenvalues then appear, and only the extremes mean
            anything.

    Raises:
        ValueError: An argument is out of range, or ``v0`` is zero or not finite.
        FloatingPointError: A product is not finite.
    """
    check_int("k", k, 1)
    check_choice("reorthogonalize", reorthogonalize, get_args(Reorthogonalize))
    norm = _norm(v0)
    if not 0.0 < norm < math.inf:
        raise ValueError(f"`v0` must be finite and not zero, got the norm {norm:g}.")
    k = min(k, v0.numel())
    tiny = 1e-12 if v0.dtype == torch.float64 else 1e-6
    full = reorthogonalize == "full"
    # written in place throughout: a fresh vector a time costs as much as the arithmetic
    rows = k if full else 2
    basis = torch.empty(rows, v0.numel(), dtype=v0.dtype, device=v0.device)
    torch.div(v0, norm, out=basis[0])
    alphas: list[float] = []
    betas: list[float] = []
    for j in range(k):
        q = basis[j % rows]
        product = matvec(q).to(v0.dtype)
        w = torch.sub(product, basis[(j - 1) % rows], alpha=betas[-1]) if j else product.clone()
        alpha = float(w @ q)
        w.sub_(q, alpha=alpha)
        beta = _orthogonalize(w, basis[: j + 1]) if full else _norm(w)
        if not (abs(alpha) < math.inf and beta < math.inf):
            raise FloatingPointError(f"Product {j + 1} of Lanczos is not finite.")
        alphas.append(alpha)
        if beta <= tiny * max([*map(abs, alphas), *betas]):
            beta = 0.0
            break
        if j + 1 < k:
            betas.append(beta)
            torch.div(w, beta, out=basis[(j + 1) % rows])
    steps = len(alphas)
    return Lanczos(
        torch.tensor(alphas, dtype=torch.float64),
        torch.tensor(betas[: steps - 1], dtype=torch.float64),
        basis[:steps] if full else None,
        beta,
    )


def _norm(w: Tensor) -> float:
    # on CPU in float32, a million entries: vector_norm is off by 3e-5, and eigenvalues by twice that, the dot by 4e-6
    return math.sqrt(float(w @ w))


def _orthogonalize(w: Tensor, basis: Tensor) -> float:
    """Take the components along the rows of ``basis`` out of ``w``, in place, and return the norm that is left."""
    norm = _norm(w)
    for _ in range(2):
        before = norm
        w.addmv_(basis.T, basis @ w, alpha=-1.0)
        norm = _norm(w)
        if norm > 0.7 * before:  # little was taken away, and its rounding errors are as little
            break
    return norm


@dataclass(frozen=True)
class Spectrum:
    """What a few Lanczos runs say about a spectrum of ``size`` eigenvalues; float64 tensors.

    ``values`` and ``weights`` are the Ritz values of all probes and their weights, which sum to 1.
    """

    values: Tensor
    weights: Tensor
    size: int

    @property
    def largest(self) -> float:
        """The largest Ritz value: a lower bound of the largest eigenvalue that converges fast."""
        return float(self.values.max())

    @property
    def smallest(self) -> float:
        """The smallest Ritz value."""
        return float(self.values.min())

    @property
    def trace(self) -> float:
        """Estimate of the trace, unbiased over probes."""
        return self.size * float(self.weights @ self.values)

    @property
    def frobenius_sq(self) -> float:
        """Estimate of the squared Frobenius norm, unbiased over probes (two Lanczos steps or more)."""
        return self.size * float(self.weights @ self.values**2)

    @property
    def negative_mass(self) -> float:
        """Estimated fraction of the eigenvalues below zero."""
        return float(self.weights[self.values < 0].sum())

    def density(self, points: Tensor, sigma: float | None = None) -> Tensor:
        """Return the spectral density at ``points``, smoothed by a Gaussian of width ``sigma``.

        The default width is 1 % of the range of the Ritz values.
        """
        width = sigma or 0.01 * max(self.largest - self.smallest, 1e-12 * max(abs(self.largest), 1e-300))
        t = (points.double()[:, None] - self.values) / width
        density: Tensor = torch.exp(-0.5 * t**2) @ self.weights / (width * (2 * torch.pi) ** 0.5)
        return density


def spectrum(
    matvec: MatVec,
    size: int,
    k: int = 20,
    num_probes: int = 1,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    reorthogonalize: Reorthogonalize = "full",
) -> Spectrum:
    """Stochastic Lanczos quadrature: ``k`` steps from each of ``num_probes`` random sign vectors.

    Costs ``k * num_probes`` products, and memory for ``k`` vectors.

    Args:
        matvec: The map.
        size: Entries of its vectors.
        k: Lanczos steps of each probe, >= 1.
        num_probes: Probes, >= 1.
        seed: Of the first probe; the others take the following integers.
        device: Where the probes are.
        dtype: Of the probes.
        reorthogonalize: As for :func:`lanczos`.
    """
    check_int("num_probes", num_probes, 1)
    runs = [
        lanczos(matvec, rademacher(size, seed + i, device, dtype), k, reorthogonalize).ritz() for i in range(num_probes)
    ]
    return joined(runs, size)


def joined(runs: Sequence[tuple[Tensor, Tensor]], size: int) -> Spectrum:
    """Return the spectrum of several probes from their Ritz values and weights."""
    return Spectrum(torch.cat([v for v, _ in runs]), torch.cat([w for _, w in runs]) / len(runs), size)
