r"""How the learning rate should follow the batch size, and what random-matrix theory says about the limit.

All rules give ``lr(b) / lr(b0)``. ``gain`` has the form :math:`(1 + c/b_0) / (1 + c/b)`: linear for :math:`b \ll c`,
saturating above. With :math:`c` the gradient noise scale it is the AdaScale gain
:math:`(\sigma^2/b_0 + \mu^2) / (\sigma^2/b + \mu^2)`; with :math:`c = (\mathrm{tr} H - \lambda_1)/\lambda_1` it is the
largest stable step under multiplicative (Wishart) Hessian noise.

Sources: Granziol, Zohren, Roberts (arXiv:2006.09092); Johnson et al. (arXiv:2007.05105); McCandlish et al.
(arXiv:1812.06162); Hoffer, Hubara, Soudry (arXiv:1705.08741); Li et al. (arXiv:2405.14578).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from lightning_grad._validate import check_choice, check_int, check_range

Rule = Literal["none", "linear", "sqrt", "power", "gain", "sqrt_gain", "surge", "wigner"]
RULES: tuple[str, ...] = get_args(Rule)
NEEDS_CRITICAL_BATCH = frozenset({"gain", "sqrt_gain", "surge", "wigner"})


def lr_gain(b: float, b0: float, c: float) -> float:
    """Gain of a step with ``b`` samples over one with ``b0``, for the critical batch size ``c``."""
    return (1.0 + c / b0) / (1.0 + c / b)


def _surge(ratio: float) -> float:
    return 2.0 / (math.sqrt(1.0 / ratio) + math.sqrt(ratio))


def _wigner(b: float, critical: float) -> float:
    return 1.0 / (1.0 + critical / b) if b >= critical else math.sqrt(b / critical) / 2.0


def lr_factor(rule: str, b: float, b0: float, critical_batch: float | None = None, exponent: float = 0.5) -> float:
    """Factor ``lr(b) / lr(b0)`` of a rule.

    Args:
        rule: ``none`` 1; ``linear`` b/b0; ``sqrt``; ``power`` (b/b0)**exponent; ``gain`` and ``sqrt_gain`` saturate at
            the critical batch; ``surge`` rises, peaks there and falls (sign-like optimizers); ``wigner`` is the largest
            stable step under additive Hessian noise.
        b: Batch size.
        b0: Reference batch size.
        critical_batch: Critical batch size > 0, for the last four.
        exponent: For ``power``.
    """
    check_choice("rule", rule, RULES)
    if rule in NEEDS_CRITICAL_BATCH:
        if critical_batch is None:
            raise ValueError(
                f"rule={rule!r} needs `critical_batch`: a number, 'noise_scale' (with AdaptiveBatchSize) or 'curvature'"
                " (with LanczosLearningRate or StabilityMonitor)."
            )
        c = check_range("critical_batch", critical_batch, 0.0, math.inf, "()")
        if rule == "surge":
            return _surge(b / c) / _surge(b0 / c)
        if rule == "wigner":
            return _wigner(b, c) / _wigner(b0, c)
        gain = lr_gain(b, b0, c)
        return gain if rule == "gain" else math.sqrt(gain)
    powers = {"none": 0.0, "linear": 1.0, "sqrt": 0.5, "power": exponent}
    return float((b / b0) ** powers[rule])


def effective_batch(b: float, population: float) -> float:
    """Batch with replacement that is as noisy as ``b`` samples drawn without it: ``b / (1 - b/N)``."""
    return math.inf if b >= population else b / (1.0 - b / population)


def rmt_top_eigenvalue(
    b: float,
    l1: float,
    *,
    model: Literal["wigner", "wishart"] = "wishart",
    total_variance: float | None = None,
    bulk: float | None = None,
    num_params: int | None = None,
) -> float:
    r"""Top eigenvalue of the Hessian of a batch, given the true one; the largest stable SGD step is 2 over it.

    Args:
        b: Batch size.
        l1: Top eigenvalue :math:`\lambda_1` of the true Hessian.
        model: ``"wigner"`` additive noise of ``total_variance`` :math:`V = P s^2` (``s^2/b`` per entry);
            ``"wishart"`` Gauss-Newton noise with bulk eigenvalue ``bulk`` and ``num_params`` parameters.
        total_variance: :math:`V`, for ``"wigner"``.
        bulk: :math:`\sigma^2`, for ``"wishart"``.
        num_params: :math:`P`, for ``"wishart"``.
    """
    if check_choice("model", model, ("wigner", "wishart")) == "wigner":
        if total_variance is None:
            raise ValueError("model='wigner' needs `total_variance`.")
        critical = total_variance / l1**2
        return l1 + total_variance / (b * l1) if b >= critical else 2.0 * math.sqrt(total_variance / b)
    if bulk is None or num_params is None:
        raise ValueError("model='wishart' needs `bulk` and `num_params`.")
    ratio = num_params / b
    if l1 > bulk * (1.0 + math.sqrt(ratio)):
        return l1 * (1.0 + ratio * bulk / (l1 - bulk))
    return bulk * (1.0 + math.sqrt(ratio)) ** 2


def regime_adaptation(milestones: Sequence[int], max_epochs: int, b: int, b0: int) -> tuple[list[int], int, float]:
    """Stretch a schedule made for batch ``b0`` so that batch ``b`` makes as many updates (arXiv:1705.08741).

    Every number of epochs is multiplied by ``b/b0``, rounded up as in the paper's code: at least as many updates.

    Args:
        milestones: Epochs at which the schedule changes, >= 0.
        max_epochs: Epochs of the run, >= 1.
        b: New batch size, >= 1.
        b0: Batch size the schedule was made for, >= 1.

    Returns:
        New milestones, new number of epochs, and the factor ``sqrt(b/b0)`` for the learning rate.

    Raises:
        ValueError: A number is out of range.
    """
    for milestone in milestones:
        check_int("milestones", milestone, 0)
    check_int("max_epochs", max_epochs, 1)
    check_int("b", b, 1)
    check_int("b0", b0, 1)
    stretch = math.ceil(b / b0)
    return [m * stretch for m in milestones], max_epochs * stretch, math.sqrt(b / b0)
