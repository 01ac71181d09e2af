r"""Variable projection: least squares for sums of powers, with the linear coefficients solved for exactly.

All laws of this package are :math:`y = \sum_j c_j \exp(\theta \cdot a_j(x))` with few exponents :math:`\theta` (one or
two) and linear coefficients :math:`c`. For given :math:`\theta` the best :math:`c` is a linear problem; what is left is
a search in one or two dimensions, well conditioned where the joint problem is not.

1. A grid over :math:`\theta` with non-negative :math:`c` (all active sets of at most three columns are tried).
2. Levenberg-Marquardt on the projected residual. The gradient with respect to :math:`\theta` needs no derivative of
   :math:`c` (envelope theorem), its Gauss-Newton matrix is Kaufman's.
3. With ``delta``, Huber's loss by iterated reweighting of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_STEPS = 200
_REWEIGHTINGS = 50


@dataclass(frozen=True)
class Separable:
    """The best fit: exponents, coefficients, weighted sum of squares, and what is doubtful about it."""

    theta: Array
    coefficients: Array
    rss: float
    converged: bool
    at_bound: bool


def fit_separable(
    exponents: Array,
    y: Array,
    bounds: Sequence[tuple[float, float]],
    *,
    grid: int = 32,
    log_grid: bool = False,
    weights: Array | None = None,
    delta: float | None = None,
    start: Array | None = None,
    signed: bool = False,
) -> Separable:
    r"""Fit :math:`y_i \approx \sum_j c_j \exp(\sum_k \theta_k a_{jik})`.

    Args:
        exponents: :math:`a` ``(columns, n, exponents)``; a column of zeros is a constant.
        y: ``(n,)``.
        bounds: Interval of each exponent.
        grid: Grid points per exponent.
        log_grid: Space them geometrically (the bounds must be positive).
        weights: ``(n,)``, non-negative.
        delta: Huber's threshold; ``None``: squares.
        start: Exponents to start from instead of a grid.
        signed: Let coefficients be negative in the grid as well.
    """
    base = np.ones_like(y) if weights is None else weights
    low, high = np.array(bounds).T
    axes = [np.geomspace(a, b, grid) if log_grid else np.linspace(a, b, grid) for a, b in bounds]
    theta = _best_of_grid(exponents, y, axes, base, signed) if start is None else start.copy()
    theta, coefficients, converged = _refine(exponents, y, theta, low, high, base)
    w = base
    if delta is not None:
        for _ in range(_REWEIGHTINGS):
            residual = np.abs(_design(exponents, theta) @ coefficients - y)
            w = base * np.minimum(1.0, delta / np.maximum(residual, 1e-300))
            before = theta
            theta, coefficients, converged = _refine(exponents, y, theta, low, high, w)
            if np.abs(theta - before).max() <= 1e-12:
                break
    rss = float(w @ (_design(exponents, theta) @ coefficients - y) ** 2)
    span = 1e-9 * (high - low)
    return Separable(theta, coefficients, rss, converged, bool(((theta <= low + span) | (theta >= high - span)).any()))


def _design(exponents: Array, theta: Array) -> Array:
    """``(n, columns)``."""
    design: Array = np.exp(exponents @ theta).T
    return design


def _solve(design: Array, y: Array, w: Array) -> tuple[Array, Array]:
    """Weighted least squares: coefficients, and an orthonormal basis of the weighted columns."""
    root = np.sqrt(w)
    # unit columns: powers of a wide range differ by orders of magnitude
    scaled = design * root[:, None]
    norms = np.maximum(np.linalg.norm(scaled, axis=0), 1e-300)
    q, r = np.linalg.qr(scaled / norms)
    target = q.T @ (root * y)
    if np.abs(np.diag(r)).min() > 1e-13:
        return np.linalg.solve(r, target) / norms, q
    return np.linalg.lstsq(r, target, rcond=1e-13)[0] / norms, q


def _refine(exponents: Array, y: Array, theta: Array, low: Array, high: Array, w: Array) -> tuple[Array, Array, bool]:
    root, damping = np.sqrt(w), 1e-3

    def evaluate(at: Array) -> tuple[float, Array, Array, Array, Array]:
        design = _design(exponents, at)
        coefficients, q = _solve(design, y, w)
        residual = root * (design @ coefficients - y)
        return float(residual @ residual), coefficients, q, residual, design

    rss, coefficients, q, residual, design = evaluate(theta)
    for _ in range(_STEPS):
        # d residual / d theta_k with c fixed, projected off the columns
        slopes = root[:, None] * np.einsum("jnk,nj,j->nk", exponents, design, coefficients)
        jacobian = slopes - q @ (q.T @ slopes)
        gradient, normal = jacobian.T @ residual, jacobian.T @ jacobian
        blocked = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
        free = ~blocked
        if not free.any() or float(np.trace(normal)) == 0.0:
            return theta, coefficients, True
        step = np.zeros_like(theta)
        inner = normal[np.ix_(free, free)]
        step[free] = -np.linalg.solve(inner + damping * np.diag(np.diag(inner) + 1e-300), gradient[free])
        trial = np.clip(theta + step, low, high)
        moved = np.abs(trial - theta).max()
        found = evaluate(trial)
        if found[0] < rss:
            theta, (rss, coefficients, q, residual, design) = trial, found
            damping = max(damping / 10, 1e-15)
        else:
            damping = min(damping * 10, 1e12)
        if moved <= 1e-14 * (1.0 + np.abs(theta).max()):
            return theta, coefficients, True
    return theta, coefficients, False


def _best_of_grid(exponents: Array, y: Array, axes: Sequence[Array], w: Array, signed: bool) -> Array:
    thetas = np.array(list(product(*axes)))
    designs = np.exp(np.einsum("jnk,gk->gnj", exponents, thetas))
    norms = np.sqrt(np.einsum("gnj,n->gj", designs**2, w))
    designs /= norms[:, None, :]
    gram = np.einsum("gni,gnj,n->gij", designs, designs, w)
    right = np.einsum("gni,n,n->gi", designs, y, w)
    best = np.full(len(thetas), float(w @ y**2))
    columns = range(exponents.shape[0])
    for size in range(1, exponents.shape[0] + 1):
        for active in map(list, combinations(columns, size)):
            a, b = gram[:, active][:, :, active] + 1e-14 * np.eye(size), right[:, active]
            c = np.linalg.solve(a, b[..., None])[..., 0]
            rss = w @ y**2 - np.einsum("gi,gi->g", c, b)
            best = np.where(((c >= 0).all(1) | signed) & (rss < best), rss, best)
    chosen: Array = thetas[int(np.argmin(best))]
    return chosen
