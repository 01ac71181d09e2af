r"""Loss as a function of parameters and tokens: :math:`L(N, D) = E + A N^{-\alpha} + B D^{-\beta}`.

With compute :math:`C = 6ND` the loss is least at :math:`N^* = G (C/6)^{\beta/(\alpha+\beta)}`,
:math:`D^* = (C/6)^{\alpha/(\alpha+\beta)}/G`, :math:`G = (\alpha A/(\beta B))^{1/(\alpha+\beta)}`.

Sources: Hoffmann et al. (2022) for the law; Czech et al. (arXiv:2603.22339) for fitting it by variable projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from lightning_grad._validate import check_choice, check_range
from lightning_grad.scaling._columns import Array, Fit, bootstrap, budgets, checked, percentiles
from lightning_grad.scaling._varpro import fit_separable

_BOUNDS = [(0.01, 0.99)] * 2


@dataclass(frozen=True)
class Chinchilla(Fit):
    """The fitted surface."""

    E: float = 0.0
    A: float = 0.0
    B: float = 0.0
    alpha: float = 0.0
    beta: float = 0.0

    names = ("E", "A", "B", "alpha", "beta")

    def predict(self, N: npt.ArrayLike, D: npt.ArrayLike) -> Array:
        """Return the loss of ``N`` parameters trained on ``D`` tokens."""
        n, d = np.asarray(N, dtype=np.float64), np.asarray(D, dtype=np.float64)
        loss: Array = self.E + self.A * n**-self.alpha + self.B * d**-self.beta
        return loss

    def optimal(self, C: float) -> tuple[float, float]:
        """Return the best parameters and tokens for ``C`` floating-point operations."""
        n, d = _optimum(np.array([[self.E, self.A, self.B, self.alpha, self.beta]]), C)
        return float(n[0]), float(d[0])

    def optimal_intervals(self, C: float, level: float = 0.9) -> tuple[tuple[float, float], tuple[float, float]] | None:
        """Return the percentile intervals of :meth:`optimal`; ``None`` without a bootstrap."""
        if not self.samples.size:
            return None
        n, d = _optimum(self.samples, C)
        return percentiles(n, level), percentiles(d, level)

    @property
    def exponents(self) -> tuple[float, float]:
        """Return the powers of compute with which parameters and tokens grow."""
        total = self.alpha + self.beta
        return self.beta / total, self.alpha / total


def _optimum(p: Array, C: float) -> tuple[Array, Array]:
    _, A, B, alpha, beta = p.T
    total = alpha + beta
    with np.errstate(invalid="ignore"):  # a resample may have a negative A or B
        log_g = np.log(alpha * A / (beta * B)) / total
    base = np.log(C / 6.0)
    return np.exp(log_g + beta / total * base), np.exp(alpha / total * base - log_g)


def fit_chinchilla(
    N: npt.ArrayLike,
    D: npt.ArrayLike,
    L: npt.ArrayLike,
    method: Literal["vpnls", "approach3"] = "vpnls",
    loss: Literal["mse", "huber"] = "mse",
    delta: float = 1e-3,
    bootstrap_resamples: int = 0,
    seed: int = 0,
) -> Chinchilla:
    """Fit the five numbers of the law.

    Args:
        N: Parameters; positive.
        D: Tokens; positive.
        L: Losses; positive, at least 6 rows.
        method: ``"vpnls"``: residuals in the loss, by variable projection. ``"approach3"``: Huber's loss of the
            residuals in the logarithm of the loss (Hoffmann et al.), started from the former.
        loss: Squares or Huber's loss (``vpnls``).
        delta: Huber's threshold, > 0, in units of the loss or its logarithm.
        bootstrap_resamples: Fits to rows resampled within each compute budget, for intervals.
        seed: Of the resampling.

    Raises:
        ValueError: Names the column and row, or the argument.
    """
    check_choice("method", method, ("vpnls", "approach3"))
    check_choice("loss", loss, ("mse", "huber"))
    check_range("delta", delta, 0.0, np.inf, "()")
    columns = checked({"N": N, "D": D, "L": L}, 6, vary=("N", "D"))
    n, d, y = columns.values()
    log_n, log_d = np.log(n), np.log(d)
    mean_n, mean_d = float(log_n.mean()), float(log_d.mean())

    def fit(rows: npt.NDArray[np.int64], start: Array | None) -> tuple[Array, float, list[str]]:
        u, v = log_n[rows] - mean_n, log_d[rows] - mean_d
        exponents = np.zeros((3, len(rows), 2))
        exponents[1, :, 0], exponents[2, :, 1] = -u, -v
        found = fit_separable(
            exponents, y[rows], _BOUNDS, start=start, delta=delta if loss == "huber" and method == "vpnls" else None
        )
        p, rss, converged = np.array([*found.coefficients, *found.theta]), found.rss, found.converged
        if method == "approach3" and (p[:3] > 0).all():
            p, rss, converged = _log_huber(u, v, y[rows], p, delta)
        doubts = [] if converged else ["not converged"]
        doubts += ["alpha or beta at a bound"] if found.at_bound else []
        doubts += [f"{name} is not positive" for name, value in zip("EAB", p, strict=False) if value <= 0]
        p[1] *= np.exp(p[3] * mean_n)
        p[2] *= np.exp(p[4] * mean_d)
        return p, rss, doubts

    p, rss, doubts = fit(np.arange(len(y)), None)
    samples = bootstrap(lambda rows: fit(rows, p[3:])[0], budgets(n * d), bootstrap_resamples, seed, unknowns=5)
    return Chinchilla(rss, tuple(doubts), samples, *map(float, p))


def _log_huber(u: Array, v: Array, y: Array, start: Array, delta: float) -> tuple[Array, float, bool]:
    """Minimize Huber's loss of log-residuals over (E, A, B, alpha, beta) by damped, reweighted Gauss-Newton."""
    q = np.array([*np.log(start[:3]), *start[3:]])
    zero, log_y = np.zeros_like(u), np.log(y)

    def terms(q: Array) -> tuple[Array, Array]:
        parts = np.stack([zero + q[0], q[1] - q[3] * u, q[2] - q[4] * v])
        total = np.logaddexp.reduce(parts, axis=0)
        return total - log_y, np.exp(parts - total)

    def objective(r: Array) -> float:
        size = np.abs(r)
        return float(np.where(size <= delta, 0.5 * r**2, delta * (size - 0.5 * delta)).sum())

    residual, share = terms(q)
    value, damping = objective(residual), 1e-3
    for _ in range(500):
        jacobian = np.stack([share[0], share[1], share[2], -share[1] * u, -share[2] * v], 1)
        w = np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
        normal = jacobian.T @ (w[:, None] * jacobian)
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-300), -jacobian.T @ (w * residual))
        trial_residual, trial_share = terms(q + step)
        trial = objective(trial_residual)
        if trial < value:
            q, residual, share, value = q + step, trial_residual, trial_share, trial
            damping = max(damping / 10, 1e-15)
        else:
            damping = min(damping * 10, 1e12)
        if np.abs(step).max() <= 1e-13 * (1.0 + np.abs(q).max()):
            return np.array([*np.exp(q[:3]), *q[3:]]), value, True
    return np.array([*np.exp(q[:3]), *q[3:]]), value, False
