"""Checked columns of measurements, and the bootstrap over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lightning_grad._validate import check_int

Array = npt.NDArray[np.float64]


def checked(columns: Mapping[str, npt.ArrayLike], unknowns: int, *, vary: tuple[str, ...] = ()) -> dict[str, Array]:
    """Return the columns as float64, positive, finite and of one length.

    Raises:
        ValueError: Names the column and the row (counted from 1).
    """
    found: dict[str, Array] = {}
    for name, values in columns.items():
        try:
            array = np.asarray(values, dtype=np.float64).reshape(-1)
        except (TypeError, ValueError):
            raise ValueError(f"Column {name} holds something that is not a number.") from None
        bad = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
        if bad.size:
            raise ValueError(f"Column {name}, row {bad[0] + 1}: must be positive and finite, got {array[bad[0]]:g}.")
        found[name] = array
    lengths = {name: len(array) for name, array in found.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Columns must have one length, got {lengths}.")
    rows = next(iter(lengths.values()))
    if rows < unknowns:
        raise ValueError(f"The fit needs at least {unknowns} rows, got {rows}.")
    for name in vary:
        if np.ptp(found[name]) == 0.0:
            raise ValueError(f"Column {name} must vary; all {rows} rows are {found[name][0]:g}.")
    return found


def budgets(compute: Array) -> npt.NDArray[np.int64]:
    """Return the index of the compute budget of each row; budgets within 1 % are one."""
    order = np.argsort(compute)
    ordered = compute[order]
    index = np.empty(len(compute), dtype=np.int64)
    index[order] = np.concatenate([[0], np.cumsum(ordered[1:] > 1.01 * ordered[:-1])])
    return index


def bootstrap(
    refit: Callable[[npt.NDArray[np.int64]], Array],
    strata: npt.NDArray[np.int64],
    resamples: int,
    seed: int = 0,
    *,
    unknowns: int,
) -> Array:
    """Return the parameters of ``resamples`` fits to rows drawn with replacement within each stratum.

    Strata of one row would never vary: they are pooled. A draw of fewer different rows than ``unknowns`` determines no
    fit and is drawn again; there must be more rows than that.
    """
    check_int("bootstrap_resamples", resamples, 0)
    rng = np.random.default_rng(seed)
    sizes = np.bincount(strata)
    pooled = np.where(sizes[strata] > 1, strata, -1)
    parts = [np.flatnonzero(pooled == k) for k in np.unique(pooled)]
    fits: list[Array] = []
    while len(fits) < resamples:
        rows = np.concatenate([rng.choice(part, len(part)) for part in parts])
        if len(np.unique(rows)) >= unknowns:
            fits.append(refit(rows))
    return np.array(fits) if fits else np.empty((0, 0))


@dataclass(frozen=True)
class Fit:
    """Base of all fits.

    Attributes:
        rss: Weighted sum of squared residuals; with ``method="approach3"`` the sum of Huber's loss that was minimized.
        status: What is doubtful about the fit; empty if nothing is.
        samples: Parameters of the bootstrap fits, ``(resamples, parameters)`` in the order of ``names``.
    """

    rss: float
    status: tuple[str, ...] = ()
    samples: Array = field(default_factory=lambda: np.empty((0, 0)), repr=False, compare=False)

    names = ()  # type: tuple[str, ...]

    @property
    def parameters(self) -> dict[str, float]:
        """The fitted numbers by name."""
        return {name: float(getattr(self, name)) for name in self.names}

    def intervals(self, level: float = 0.9) -> dict[str, tuple[float, float]]:
        """Return the percentile interval of each parameter; empty without a bootstrap."""
        return {name: percentiles(self.samples[:, i], level) for i, name in enumerate(self.names) if self.samples.size}


def percentiles(values: Array, level: float = 0.9) -> tuple[float, float]:
    """Return the central interval that holds the fraction ``level`` of ``values``."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
