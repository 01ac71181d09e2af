r"""The parabola method (Approach 2 of Hoffmann et al.) and its bias.

Per compute budget a parabola of the loss in :math:`\log_{10}` of parameters or tokens; a line through the vertices.
The losses of a budget are no parabola unless :math:`\alpha = \beta`, so the vertex is off even without noise: on a
centred grid by a shift that depends on the exponents and the width of the grid only, the same at every budget.
:class:`~lightning_grad.scaling.Chinchilla` has no such bias. Source: Czech et al. (arXiv:2603.22339).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from lightning_grad._validate import check_choice, check_int, check_range
from lightning_grad.scaling._columns import Array, Fit, bootstrap, budgets, checked


@dataclass(frozen=True)
class IsoflopParabola(Fit):
    """The fitted line: the optimum is ``10**intercept * C**exponent`` of ``axis``.

    ``vertices`` are the optima of the budgets ``compute``.
    """

    exponent: float = 0.0
    intercept: float = 0.0
    axis: str = "tokens"
    compute: tuple[float, ...] = ()
    vertices: tuple[float, ...] = ()

    names = ("exponent", "intercept")

    def predict(self, C: npt.ArrayLike) -> Array:
        """Return the optimum at compute ``C``."""
        optimum: Array = 10 ** (self.intercept + self.exponent * np.log10(np.asarray(C, dtype=np.float64)))
        return optimum

    def optimal(self, C: float) -> tuple[float, float]:
        """Return the best parameters and tokens for ``C`` floating-point operations."""
        own = float(self.predict(C))
        return (C / 6.0 / own, own) if self.axis == "tokens" else (own, C / 6.0 / own)


def fit_isoflop_parabola(
    C: npt.ArrayLike,
    N: npt.ArrayLike,
    L: npt.ArrayLike,
    axis: Literal["tokens", "params"] = "tokens",
    bootstrap_resamples: int = 0,
    seed: int = 0,
) -> IsoflopParabola:
    """Fit a parabola per budget and a line through the vertices.

    Args:
        C: Compute; rows within 1 % are one budget. At least two budgets with three rows.
        N: Parameters.
        L: Losses.
        axis: What the parabola is in; tokens are ``C / 6N``.
        bootstrap_resamples: Fits to rows resampled within each budget, for intervals; they need four rows of each.
        seed: Of the resampling.

    Raises:
        ValueError: Names the column and row; a single budget, or one whose losses have no minimum.
    """
    check_choice("axis", axis, ("tokens", "params"))
    columns = checked({"C": C, "N": N, "L": L}, 6, vary=("N",))
    compute, params, loss = columns.values()
    x = np.log10(params if axis == "params" else compute / (6.0 * params))
    index = budgets(compute)
    groups = [np.flatnonzero(index == k) for k in range(index.max() + 1)]
    if len(groups) < 2:
        raise ValueError(f"Column C must hold at least two budgets; all rows are about {compute[0]:g}.")
    for rows in groups:
        if len(np.unique(x[rows])) < 3:
            raise ValueError(f"Column C: the budget {compute[rows[0]]:g} (row {rows[0] + 1}) needs three sizes.")
    log_c = np.array([np.log10(compute[rows]).mean() for rows in groups])

    def fit(draw: npt.NDArray[np.int64]) -> tuple[Array, Array, float]:
        vertices, rss = np.empty(len(groups)), 0.0
        for k in range(len(groups)):
            rows = draw[index[draw] == k]
            if len(np.unique(x[rows])) < 3:  # a resample: many parabolas pass through two sizes
                vertices[k] = np.nan
                continue
            centre = x[rows].mean()
            q = np.polynomial.polynomial.polyfit(x[rows] - centre, loss[rows], 2)
            rss += float(((np.polynomial.polynomial.polyval(x[rows] - centre, q) - loss[rows]) ** 2).sum())
            vertices[k] = centre - q[1] / (2 * q[2]) if q[2] > 0 else np.nan
        usable = np.isfinite(vertices)
        if usable.sum() < 2:
            return np.full(2, np.nan), vertices, rss
        return np.polynomial.polynomial.polyfit(log_c[usable], vertices[usable], 1)[::-1], vertices, rss

    line, vertices, rss = fit(np.arange(len(loss)))
    if np.isnan(vertices).any():
        rows = groups[int(np.flatnonzero(np.isnan(vertices))[0])]
        budget = f"{compute[rows[0]]:g} (row {rows[0] + 1})"
        raise ValueError(f"Column L: the losses of the budget {budget} have no minimum.")
    exact = min(map(len, groups)) < 4  # the parabola of three rows passes through them: nothing to resample
    samples = bootstrap(lambda draw: fit(draw)[0], index, 0 if exact else bootstrap_resamples, seed, unknowns=6)
    samples = samples[np.isfinite(samples).all(1)] if samples.size else samples
    outside = [k for k, rows in enumerate(groups) if not x[rows].min() <= vertices[k] <= x[rows].max()]
    doubts = [f"the optimum of the budget {10 ** log_c[k]:.3g} lies outside its rows" for k in outside]
    if exact and bootstrap_resamples:
        doubts.append("no intervals: they need four rows of each budget")
    return IsoflopParabola(
        rss, tuple(doubts), samples, float(line[0]), float(line[1]), axis,
        tuple(map(float, 10**log_c)), tuple(map(float, 10**vertices)),
    )  # fmt: skip


def parabola_vertex_shift(alpha: float, beta: float, half_width: float, n: int) -> float:
    r"""Return by how many decades the parabola puts the optimal parameters too high (tokens: too low).

    The vertex of the least-squares parabola through :math:`10^{-\alpha w}/\alpha + 10^{\beta w}/\beta` on ``n`` points
    :math:`w` in :math:`[-h, h]`: the loss of a budget around its optimum, up to scale.

    Args:
        alpha: Exponent of parameters, > 0.
        beta: Exponent of tokens, > 0.
        half_width: :math:`h` in decades, > 0: ``log10(8)`` for a grid from 1/8 to 8 times the optimum.
        n: Points, >= 3.
    """
    check_range("alpha", alpha, 0.0, np.inf, "()")
    check_range("beta", beta, 0.0, np.inf, "()")
    check_range("half_width", half_width, 0.0, np.inf, "()")
    w = np.linspace(-half_width, half_width, check_int("n", n, 3))
    q = np.polynomial.polynomial.polyfit(w, 10 ** (-alpha * w) / alpha + 10 ** (beta * w) / beta, 2)
    return float(-q[1] / (2 * q[2]))
