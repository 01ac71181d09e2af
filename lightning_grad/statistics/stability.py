r"""How large a learning rate the curvature allows, and the learning rate it suggests. Functions of numbers.

Sources: Wu, Su (arXiv:2305.17490), Mulayoff, Michaeli (ICML 2024) and Cohen et al. (arXiv:2207.14484) for the limits;
Polyak's heavy ball and Granziol, Zohren, Roberts (arXiv:2006.09092) for the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_grad._validate import check_choice, check_int, check_range

LearningRateRule = Literal["polyak", "inverse", "edge"]


def stability_limits(
    trace: float,
    frobenius_sq: float,
    lambda_max: float,
    batch_size: int,
    dataset_size: int | None = None,
    momentum: float = 0.0,
) -> dict[str, float]:
    r"""Return the largest learning rates that linear stability at a minimum that fits the data allows.

    - ``gd``: :math:`2 (1 + \beta) / \lambda_{\max}`, full-batch heavy ball (SGD as torch writes it, dampening 0).
    - ``sgd``: :math:`2\, \mathrm{tr} H / ((1 - p) \|H\|_F^2 + p\, (\mathrm{tr} H)^2)` with
      :math:`p = (N - B)/(B (N - 1))`, or :math:`1/B` for unknown :math:`N`: necessary for mean-square stability of SGD
      without momentum at batch size :math:`B`. For :math:`B = 1` it is :math:`2 / \mathrm{tr} H`. NaN with momentum,
      for which we know no such bound.
    - ``limit``: the smaller of those that are numbers.

    Both are necessary, not sufficient; a limit is ``inf`` where the curvature is not positive.

    Args:
        trace: :math:`\mathrm{tr} H` of the mean loss.
        frobenius_sq: :math:`\|H\|_F^2`.
        lambda_max: Largest eigenvalue of :math:`H`.
        batch_size: Samples :math:`B` of an optimizer step, >= 1.
        dataset_size: Samples :math:`N`, if they are drawn without replacement, >= 1; ``None``: not known.
        momentum: :math:`\beta` in [0, 1).

    Raises:
        ValueError: An argument is out of range.
    """
    check_int("batch_size", batch_size, 1)
    check_range("momentum", momentum, 0.0, 1.0, "[)")
    p = 1.0 / batch_size
    if dataset_size is not None:
        check_int("dataset_size", dataset_size, 1)
        p = (dataset_size - batch_size) / (batch_size * (dataset_size - 1)) if dataset_size > batch_size else 0.0
    spread = (1.0 - p) * frobenius_sq + p * trace**2
    gd = 2.0 * (1.0 + momentum) / lambda_max if lambda_max > 0 else math.inf
    sgd = 2.0 * trace / spread if trace > 0 and spread > 0 else math.inf
    if momentum:
        sgd = math.nan
    return {"gd": gd, "sgd": sgd, "limit": gd if math.isnan(sgd) else min(gd, sgd)}


def heavy_ball(largest: float, mu: float) -> tuple[float, float]:
    r"""Return Polyak's learning rate and momentum for a quadratic with curvatures in :math:`[\mu, L]`.

    .. math::
        \eta = \left(\tfrac{2}{\sqrt L + \sqrt \mu}\right)^2, \qquad
        \beta = \left(\tfrac{\sqrt L - \sqrt \mu}{\sqrt L + \sqrt \mu}\right)^2
    """
    check_range("largest", largest, 0.0, math.inf, "()")
    check_range("mu", mu, 0.0, largest)
    a, b = math.sqrt(largest), math.sqrt(mu)
    return (2.0 / (a + b)) ** 2, ((a - b) / (a + b)) ** 2


def growth_limit(smallest: float, momentum: float = 0.0, growth: float = 1.2, nesterov: bool = False) -> float:
    r"""Return the learning rate at which heavy ball multiplies a displacement by ``growth`` per step.

    Along an eigenvector of eigenvalue :math:`-m < 0` the displacement grows by the larger root of
    :math:`r^2 - (1 + \beta + \eta m) r + \beta`, so a growth of :math:`r` takes

    .. math:: \eta = \frac{(r - 1)(r - \beta)}{r\, m},

    and with Nesterov's momentum, where the polynomial is :math:`r^2 - (1 + \beta)(1 + \eta m) r + \beta (1 + \eta m)`,
    the same over :math:`((1 + \beta) r - \beta)\, m`; ``inf`` if ``smallest`` is not negative. The rules that look at
    the largest eigenvalue know nothing of this: at :math:`m = L` and :math:`\beta = 0.9`, half of Polyak's step grows
    3.5 times per step.
    """
    check_range("momentum", momentum, 0.0, 1.0, "[)")
    check_range("growth", growth, 1.0, math.inf, "()")
    slope = (1.0 + momentum) * growth - momentum if nesterov else growth
    return (growth - 1.0) * (growth - momentum) / (slope * -smallest) if smallest < 0.0 else math.inf


def smoothed_lr(
    old: float | None,
    new: float,
    ema: float,
    max_change: float,
    bounds: tuple[float, float],
    smooth_falls: bool = True,
) -> float:
    """Return the next learning rate: an average of logarithms, at most ``max_change`` times away, within ``bounds``.

    Args:
        old: Learning rate so far, > 0; ``None``: this is the first, and only ``bounds`` act on it.
        new: What the curvature suggests, > 0.
        ema: Weight of ``old``, in [0, 1).
        max_change: Largest factor of one change, > 1.
        bounds: Least and largest value.
        smooth_falls: Without it a smaller value counts at once and in full.
    """
    if old is not None and (smooth_falls or new > old):
        change = (1.0 - ema) * math.log(new / old)
        limit = math.log(max_change)
        new = old * math.exp(min(max(change, -limit), limit))
    return min(max(new, bounds[0]), bounds[1])


def curvature_lr(largest: float, momentum: float = 0.0, rule: str = "polyak", nesterov: bool = False) -> float:
    r"""Return the learning rate for largest curvature :math:`L` at a given momentum.

    ``polyak`` :math:`(1 + \sqrt\beta)^2 / L`, the heavy-ball optimum whose momentum is :math:`\beta`; ``inverse``
    :math:`1/L`; ``edge`` the limit of stability, :math:`2 (1 + \beta)/L`, or :math:`2 (1 + \beta) / ((1 + 2\beta) L)`
    for Nesterov's momentum. At :math:`\beta = 0.9` the first is 3.797/L and the edge 3.800/L: use a safety factor.

    Args:
        largest: :math:`L` > 0.
        momentum: :math:`\beta` in [0, 1).
        rule: One of the three.
        nesterov: Whether the momentum is Nesterov's; matters to ``edge`` only.

    Raises:
        ValueError: ``rule`` is unknown or ``largest`` is not positive.
    """
    check_choice("rule", rule, get_args(LearningRateRule))
    check_range("largest", largest, 0.0, math.inf, "()")
    if rule == "inverse":
        return 1.0 / largest
    if rule == "edge":
        return 2.0 * (1.0 + momentum) / (largest * ((1.0 + 2.0 * momentum) if nesterov else 1.0))
    return (1.0 + math.sqrt(momentum)) ** 2 / largest


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the cosine of two gradients given in parts; 0 if one of them is zero."""
    dot = sum(float(torch.linalg.vecdot(x.flatten(), y.flatten())) for x, y in zip(a, b, strict=True))
    norms = [math.hypot(*(float(torch.linalg.vector_norm(x)) for x in part)) for part in (a, b)]
    return dot / (norms[0] * norms[1]) if norms[0] and norms[1] else 0.0


class LogSlope:
    r"""Slope of the least-squares line of :math:`y` over :math:`\log t`, of points that come one by one.

    Hoffer, Hubara, Soudry (arXiv:1705.08741): in the first phase of training the distance from the initial weights
    grows like :math:`\log t`. ``state`` is all there is to save.
    """

    def __init__(self) -> None:
        self.state = [0.0] * 5  # points, mean of x, mean of y, sum of squares of x, sum of products, both centred

    def add(self, step: int, y: float) -> None:
        """Take the value at ``step``; 0 has no logarithm and is left out."""
        if step < 1:
            return
        n, mean_x, mean_y, squares, products = self.state
        n, x = n + 1.0, math.log(step)
        gap = x - mean_x
        mean_x += gap / n
        mean_y += (y - mean_y) / n
        self.state = [n, mean_x, mean_y, squares + gap * (x - mean_x), products + gap * (y - mean_y)]

    @property
    def slope(self) -> float:
        """The slope; NaN before there are two different steps."""
        return self.state[4] / self.state[3] if self.state[3] > 0.0 else math.nan
