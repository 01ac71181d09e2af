r"""Loss of models trained on more tokens than is optimal, and error of downstream tasks as a function of loss.

With :math:`M = D/N` and :math:`C = 6ND`, equal exponents :math:`\alpha = \beta = 2\eta` turn the law of parameters and
tokens into :math:`L(C, M) = E + (a M^\eta + b M^{-\eta}) C^{-\eta}`, :math:`a = A 6^\eta`, :math:`b = B 6^\eta`: over-
training moves the curve and keeps its slope. Source: Gadre et al. (arXiv:2403.08540).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_grad.scaling._columns import Array, Fit, bootstrap, budgets, checked
from lightning_grad.scaling._varpro import fit_separable


@dataclass(frozen=True)
class Overtraining(Fit):
    """The fitted law ``E + (a * M**eta + b * M**-eta) * C**-eta``."""

    E: float = 0.0
    a: float = 0.0
    b: float = 0.0
    eta: float = 0.0

    names = ("E", "a", "b", "eta")

    def predict(self, C: npt.ArrayLike, M: npt.ArrayLike) -> Array:
        """Return the loss at compute ``C`` and ``M`` tokens per parameter."""
        c, m = np.asarray(C, dtype=np.float64), np.asarray(M, dtype=np.float64)
        loss: Array = self.E + (self.a * m**self.eta + self.b * m**-self.eta) * c**-self.eta
        return loss

    @property
    def best_ratio(self) -> float:
        """Tokens per parameter of least loss, the same at every compute."""
        return float((self.b / self.a) ** (1.0 / (2.0 * self.eta)))


def fit_overtraining(
    C: npt.ArrayLike, M: npt.ArrayLike, L: npt.ArrayLike, bootstrap_resamples: int = 0, seed: int = 0
) -> Overtraining:
    """Fit the law to losses ``L`` at compute ``C`` and ``M`` tokens per parameter; at least 5 rows.

    Raises:
        ValueError: Names the column and row.
    """
    columns = checked({"C": C, "M": M, "L": L}, 5, vary=("C", "M"))
    compute, ratio, y = columns.values()
    log_c, log_m = np.log(compute), np.log(ratio)
    mean_c, mean_m = float(log_c.mean()), float(log_m.mean())

    def fit(rows: npt.NDArray[np.int64], start: Array | None) -> tuple[Array, float, list[str]]:
        u, v = log_c[rows] - mean_c, log_m[rows] - mean_m
        exponents = np.stack([np.zeros_like(u), v - u, -v - u])[..., None]
        found = fit_separable(exponents, y[rows], [(0.005, 0.495)], grid=128, start=start)
        eta = float(found.theta[0])
        E, a, b = found.coefficients
        doubts = [] if found.converged else ["not converged"]
        doubts += ["eta at a bound"] if found.at_bound else []
        doubts += [f"{name} is not positive" for name, value in (("E", E), ("a", a), ("b", b)) if value <= 0]
        p = np.array([E, a * np.exp(eta * (mean_c - mean_m)), b * np.exp(eta * (mean_c + mean_m)), eta])
        return p, found.rss, doubts

    p, rss, doubts = fit(np.arange(len(y)), None)
    samples = bootstrap(lambda rows: fit(rows, p[3:])[0], budgets(compute), bootstrap_resamples, seed, unknowns=4)
    return Overtraining(rss, tuple(doubts), samples, *map(float, p))


@dataclass(frozen=True)
class Downstream(Fit):
    """The fitted law ``eps - k * exp(-gamma * L)``."""

    eps: float = 0.0
    k: float = 0.0
    gamma: float = 0.0

    names = ("eps", "k", "gamma")

    def predict(self, L: npt.ArrayLike) -> Array:
        """Return the error at loss ``L``."""
        error: Array = self.eps - self.k * np.exp(-self.gamma * np.asarray(L, dtype=np.float64))
        return error


def fit_downstream(L: npt.ArrayLike, error: npt.ArrayLike, bootstrap_resamples: int = 0, seed: int = 0) -> Downstream:
    """Fit the average error of downstream tasks as a function of the loss ``L``; at least 4 rows.

    Raises:
        ValueError: Names the column and row.
    """
    columns = checked({"L": L, "error": error}, 4, vary=("L",))
    loss, y = columns.values()
    mean = float(loss.mean())
    scale = float(np.ptp(loss))  # gamma in units of the range of losses

    def fit(rows: npt.NDArray[np.int64], start: Array | None) -> tuple[Array, float, list[str]]:
        u = -((loss[rows] - mean) / scale)[:, None]
        found = fit_separable(
            np.stack([np.zeros_like(u), u]), y[rows], [(1e-2, 50.0)], grid=128, log_grid=True, start=start, signed=True
        )
        gamma = float(found.theta[0]) / scale
        doubts = [] if found.converged else ["not converged"]
        doubts += ["gamma at a bound"] if found.at_bound else []
        doubts += ["k is not positive"] if found.coefficients[1] >= 0 else []
        return (
            np.array([found.coefficients[0], -found.coefficients[1] * np.exp(gamma * mean), gamma]),
            found.rss,
            doubts,
        )

    p, rss, doubts = fit(np.arange(len(y)), None)
    strata = np.zeros(len(y), dtype=np.int64)
    samples = bootstrap(lambda rows: fit(rows, p[2:] * scale)[0], strata, bootstrap_resamples, seed, unknowns=3)
    return Downstream(rss, tuple(doubts), samples, *map(float, p))
