r"""A power law, with or without a constant: :math:`y = c + a x^{-b}`.

Sources: Hestness et al. (arXiv:1712.00409) for error against data; Henighan et al. (arXiv:2010.14701) in the form
:math:`y_\infty + (x_0/x)^b` with :math:`x_0 = a^{1/b}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from lightning_grad._validate import check_choice, check_range
from lightning_grad.scaling._columns import Array, Fit, bootstrap, checked
from lightning_grad.scaling._varpro import fit_separable

_BOUNDS = (0.005, 2.0)


@dataclass(frozen=True)
class PowerLaw(Fit):
    """The fitted law ``c + a * x**-b``."""

    a: float = 0.0
    b: float = 0.0
    c: float = 0.0

    names = ("c", "a", "b")

    def predict(self, x: npt.ArrayLike) -> Array:
        """Return the law at ``x``."""
        return self.c + self.a * np.asarray(x, dtype=np.float64) ** -self.b


def fit_power_law(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    constant: bool = True,
    weights: npt.ArrayLike | None = None,
    loss: Literal["mse", "huber"] = "mse",
    delta: float = 1e-3,
    bootstrap_resamples: int = 0,
    seed: int = 0,
) -> PowerLaw:
    """Fit ``y = c + a * x**-b`` with ``c >= 0`` and ``b`` in (0.005, 2); ``status`` says if ``a`` is not positive.

    Args:
        x: Data, parameters or compute; positive, at least 4 values over at least a decade (less is said in ``status``).
        y: Loss or error; positive.
        constant: ``False``: ``c = 0``.
        weights: Of the rows, non-negative, positive for at least 4.
        loss: Squares, or Huber's loss of the residuals.
        delta: Huber's threshold in units of ``y``, > 0.
        bootstrap_resamples: Fits to resampled rows for intervals.
        seed: Of the resampling.

    Raises:
        ValueError: Names the column and row, or the argument.
    """
    check_choice("loss", loss, ("mse", "huber"))
    check_range("delta", delta, 0.0, np.inf, "()")
    columns = checked({"x": x, "y": y}, 4, vary=("x",))
    w = None if weights is None else np.asarray(weights, dtype=np.float64).reshape(-1)
    if w is not None and (w.shape != columns["y"].shape or not (np.isfinite(w) & (w >= 0)).all()):
        raise ValueError("`weights` must be one finite number >= 0 for each row.")
    if w is not None:  # a row without weight is no row, in a resample neither
        kept = w > 0
        if kept.sum() < 4:
            raise ValueError(f"`weights` must be positive for at least 4 rows, got {kept.sum()}.")
        w, columns = w[kept], checked({name: column[kept] for name, column in columns.items()}, 4, vary=("x",))
    log_x = np.log(columns["x"])
    mean = float(log_x.mean())

    def fit(rows: npt.NDArray[np.int64], start: Array | None, with_constant: bool) -> tuple[Array, float, list[str]]:
        u = -(log_x[rows] - mean)[:, None]
        exponents = np.stack([np.zeros_like(u), u]) if with_constant else u[None]
        found = fit_separable(
            exponents, columns["y"][rows], [_BOUNDS], grid=64, log_grid=True, start=start,
            weights=None if w is None else w[rows], delta=delta if loss == "huber" else None,
        )  # fmt: skip
        if with_constant and found.coefficients[0] <= 0:  # non-negative least squares
            values, rss, doubts = fit(rows, start, False)
            return values, rss, [*doubts, "c = 0"]
        b = float(found.theta[0])
        c = float(found.coefficients[0]) if with_constant else 0.0
        doubts = ["b at a bound"] if found.at_bound else []
        doubts += [] if found.converged else ["not converged"]
        doubts += [] if found.coefficients[-1] > 0 else ["a is not positive: y does not fall"]
        return np.array([c, found.coefficients[-1] * np.exp(b * mean), b]), found.rss, doubts

    everything = np.arange(len(log_x))
    (c, a, b), rss, doubts = fit(everything, None, constant)
    if np.ptp(log_x) < np.log(10) - 1e-9:
        doubts.append("x spans less than a decade")
    samples = bootstrap(
        lambda rows: fit(rows, np.array([b]), constant)[0],
        np.zeros(len(log_x), dtype=np.int64),
        bootstrap_resamples,
        seed,
        unknowns=3 if constant else 2,
    )
    return PowerLaw(rss, tuple(doubts), samples, float(a), float(b), float(c))
