"""Plots of the fits. Matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lightning_grad.scaling._columns import Array, budgets
from lightning_grad.scaling.chinchilla import Chinchilla
from lightning_grad.scaling.isoflop import IsoflopParabola
from lightning_grad.scaling.overtraining import Downstream, Overtraining
from lightning_grad.scaling.power_law import PowerLaw


def require_matplotlib() -> None:
    """Raise ``ModuleNotFoundError`` with what to install."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'the plot needs matplotlib: pip install "lightning-grad[demo]", or leave it out with --no-plot.'
        ) from None


def check_target(path: Path) -> None:
    """See that a plot can be written to ``path``, as far as that shows beforehand.

    Raises:
        ValueError: Its folder is not there, or matplotlib does not know the suffix.
    """
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {path.parent}.")
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError:
        return  # said when it comes to drawing
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in known:
        raise ValueError(f"--plot {path}: no format {path.suffix}; choose one of {', '.join(sorted(known))}.")


def draw(fit: Any, columns: dict[str, Array]) -> Any:
    """Return a figure of the rows and the fit.

    Args:
        fit: What one of the ``fit_`` functions of :mod:`lightning_grad.scaling` returned.
        columns: The rows by name, as :func:`lightning_grad.scaling.table.read_runs` names them.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.2), layout="constrained")
    axes = figure.subplots()
    painters: dict[type, Callable[[Any, Any, dict[str, Array]], None]] = {
        PowerLaw: _power,
        Chinchilla: _chinchilla,
        IsoflopParabola: _isoflop,
        Overtraining: _overtraining,
        Downstream: _downstream,
    }
    painters[type(fit)](axes, fit, columns)
    axes.set_title(", ".join(f"{name} {value:.4g}" for name, value in fit.parameters.items()), fontsize=9)
    return figure


def _grid(values: Array, points: int = 200) -> Array:
    grid: Array = np.geomspace(values.min(), values.max(), points)
    return grid


def _power(axes: Any, fit: PowerLaw, columns: dict[str, Array]) -> None:
    x = columns["x"]
    axes.loglog(x, columns["y"], "o", ms=4)
    axes.loglog(_grid(x), fit.predict(_grid(x)), label="c + a x^-b")
    axes.set(xlabel="x", ylabel="y")
    axes.legend()


def _curves(axes: Any, x: Array, loss: Array, compute: Array, curve: Any) -> None:
    """Rows and fitted curve of each compute budget."""
    index = budgets(compute)
    for k in range(index.max() + 1):
        rows = index == k
        (points,) = axes.plot(x[rows], loss[rows], "o", ms=4)
        if np.ptp(x[rows]) > 0:
            budget = float(np.exp(np.log(compute[rows]).mean()))
            axes.plot(_grid(x[rows]), curve(_grid(x[rows]), budget), color=points.get_color(), label=f"C {budget:.2g}")
    axes.set(xscale="log", ylabel="loss")
    if index.max() < 12:
        axes.legend(fontsize=7)


def _chinchilla(axes: Any, fit: Chinchilla, columns: dict[str, Array]) -> None:
    compute = 6.0 * columns["params"] * columns["tokens"]
    _curves(axes, columns["params"], columns["loss"], compute, lambda n, c: fit.predict(n, c / (6.0 * n)))
    best = np.array([fit.optimal(c) for c in _grid(compute)]).T
    axes.plot(best[0], fit.predict(best[0], best[1]), "k--", lw=1)
    axes.set(xlabel="parameters (dashed: best for the compute)")


def _isoflop(axes: Any, fit: IsoflopParabola, columns: dict[str, Array]) -> None:
    axes.loglog(fit.compute, fit.vertices, "o", label="vertex of the parabola")
    grid = _grid(np.array(fit.compute))
    axes.loglog(grid, fit.predict(grid), label="line")
    axes.set(xlabel="compute", ylabel=f"best {fit.axis}")
    axes.legend()


def _overtraining(axes: Any, fit: Overtraining, columns: dict[str, Array]) -> None:
    _curves(axes, columns["ratio"], columns["loss"], columns["compute"], lambda m, c: fit.predict(c, m))
    axes.set(xlabel="tokens per parameter")


def _downstream(axes: Any, fit: Downstream, columns: dict[str, Array]) -> None:
    loss = columns["loss"]
    axes.plot(loss, columns["error"], "o", ms=4)
    axes.plot(_grid(loss), fit.predict(_grid(loss)))
    axes.set(xlabel="loss", ylabel="error")
