r"""Learning-rate schedules with guarantees for the last iterate, in optimizer steps.

For convex losses with gradients of norm at most :math:`G` and a start at distance :math:`R`, the best any method can
promise after :math:`T` steps is :math:`O(GR/\sqrt T)`. A constant step reaches it for the *average* of the iterates;
the last iterate needs a schedule that knows :math:`T`: no sequence of steps chosen without the horizon is optimal at
every :math:`T` (Kornowski, Shamir, arXiv:2604.13870). Who does not know it trains at a constant learning rate and
cools down when the end is decided (:class:`CooldownLR`), or averages the iterates.

Sources: Zamani, Glineur (2023); Defazio et al. (2023); Liu, Zhou (arXiv:2312.08531).
"""

from __future__ import annotations

import math
import warnings
from typing import ClassVar, Literal

from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad._validate import check_choice, check_int, check_range
from lightning_grad.optim._closed_form_lr import ClosedFormLR


class _StepLR(ClosedFormLR):
    """A factor on the base learning rate at step ``t``."""

    interval: ClassVar[str] = "step"
    """What ``step()`` counts; the command ``lightning-grad`` steps the schedule accordingly."""
    total: int | None

    def __init__(self, optimizer: Optimizer) -> None:
        self._warned = False
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """Return the factor on the base learning rate at step ``step``, counted from 0."""
        raise NotImplementedError

    def resolve(self, total: int) -> None:
        """Fill in ``total=None``; does nothing if a number was given. Called by the command ``lightning-grad``."""
        if self.total is None:
            self._check_total(total)
            self.total = total
            self._write()

    def _check_total(self, total: int) -> None:
        check_int("total", total, 1)

    @override
    def _present_factor(self) -> float:
        if self.total is not None and self.last_epoch > self.total and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__}: more steps than `total` ({self.total}); the learning rate stays at its end.",
                stacklevel=2,
            )
        return self.factor(self.last_epoch)


class LinearDecayLR(_StepLR):
    r"""Linear decay to ``final`` at step ``total``: the optimal rate for the last iterate when the horizon is known.

    With :math:`w` warm-up steps, :math:`n = T - w` steps after them and :math:`s = t - w`, the factor at step
    :math:`t = 0 \ldots T-1` is :math:`(t+1)/(w+1)` during warm-up, then :math:`f + (1-f)\, u` with

    - :math:`u = (n - s)/n` (``offset=0``): :math:`O(GR/\sqrt T)`;
    - :math:`u = 1 - (s+1)/(n+1)` (``offset=1``): with learning rate :math:`R/(G\sqrt{T+1})` and :math:`f = 0` it is
      exactly minimax, :math:`f(x_T) - f^* \le GR/\sqrt{T+1}`.

    Args:
        optimizer: The optimizer.
        total: Optimizer steps :math:`T`. ``None``: those of the run, filled in by the command ``lightning-grad``.
        warmup: Steps of linear warm-up :math:`w` >= 0, less than ``total``.
        final: Factor :math:`f` at the end, in [0, 1].
        offset: 0 or 1, see above.

    Raises:
        ValueError: An argument is out of range.
        RuntimeError: A step was taken and ``total`` is still unknown.

    State: the step. ``total`` and the other settings are the constructor's, so that a longer run can be resumed.
    """

    _settings = ("total", "warmup", "final", "offset", "_warned")

    def __init__(
        self, optimizer: Optimizer, total: int | None = None, warmup: int = 0, final: float = 0.0, offset: int = 0
    ) -> None:
        self.warmup = check_int("warmup", warmup, 0)
        self.total = total
        if total is not None:
            self._check_total(total)
        self.final, self.offset = check_range("final", final, 0.0, 1.0), check_int("offset", offset, 0, 1)
        super().__init__(optimizer)

    @override
    def _ready(self) -> bool:
        return self.total is not None

    @override
    def _check_total(self, total: int) -> None:
        check_int("total", total, 1)
        check_int("warmup", self.warmup, 0, total - 1)

    @override
    def factor(self, step: int) -> float:
        if self.total is None and step > 0:
            raise RuntimeError(
                f"{type(self).__name__} does not know its horizon: give `total`, e.g."
                " int(self.trainer.estimated_stepping_batches) in configure_optimizers."
            )
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.total is None:  # the constructor's call; :meth:`resolve` sets the first learning rate
            return 1.0
        n, s = self.total - self.warmup, step - self.warmup
        left = (n - s) / (n + self.offset)  # 1 - (s + 1)/(n + 1) = (n - s)/(n + 1)
        return self.final + (1.0 - self.final) * max(0.0, left)


class InverseSqrtLR(_StepLR):
    r"""Factor :math:`1/\sqrt{t+1}`; with :math:`w` warm-up steps :math:`\sqrt{(w+1)/(t+1)}` after them.

    Needs no horizon and is not optimal: the guarantee for the last iterate is :math:`O(\log T/\sqrt T)`. Prefer
    :class:`LinearDecayLR` when the number of steps is known and :class:`CooldownLR` when it is decided on the way.

    Args:
        optimizer: The optimizer.
        warmup: Steps of linear warm-up :math:`w` >= 0, with the factor :math:`(t+1)/(w+1)`.

    Raises:
        ValueError: ``warmup`` is out of range.

    State: the step.
    """

    _settings = ("total", "warmup")

    def __init__(self, optimizer: Optimizer, warmup: int = 0) -> None:
        self.total, self.warmup = None, check_int("warmup", warmup, 0)
        super().__init__(optimizer)

    @override
    def resolve(self, total: int) -> None:
        pass

    @override
    def factor(self, step: int) -> float:
        width = self.warmup + 1
        return min((step + 1) / width, math.sqrt(width / (step + 1)))


class StronglyConvexLR(_StepLR):
    r"""Learning rate :math:`2/(\mu (t + \mathrm{shift}))` for :math:`\mu`-strongly convex losses.

    The last iterate comes within :math:`O(\log T/T)`; :math:`O(1/T)` needs the horizon. The base learning rates count
    only by their ratios: the group with the largest gets the value above, a group with 0 stays at 0.

    Args:
        optimizer: The optimizer.
        mu: Strong convexity :math:`\mu` > 0: the smallest curvature, e.g. the weight decay of a convex model.
        shift: > 0; the first learning rate is :math:`2/(\mu\,\mathrm{shift})`.

    Raises:
        ValueError: An argument is out of range.

    State: the step.
    """

    _settings = ("total", "mu", "shift")

    def __init__(self, optimizer: Optimizer, mu: float, shift: float = 2.0) -> None:
        self.total = None
        self.mu, self.shift = check_range("mu", mu, 0.0, math.inf, "()"), check_range("shift", shift, 0, math.inf, "()")
        super().__init__(optimizer)

    @override
    def resolve(self, total: int) -> None:
        pass

    @override
    def factor(self, step: int) -> float:
        largest = max(float(lr) for lr in self.base_lrs)
        return 2.0 / (self.mu * (step + self.shift)) / largest if largest > 0 else 0.0


class CooldownLR(_StepLR):
    r"""Constant, then a decay over the last part of the run, which may begin whenever the end is decided.

    With the cooldown from step :math:`a` to :math:`T` and :math:`s = (t - a)/(T - a)` the factor is 1 before it, then
    :math:`f + (1-f)(1-s)` (``linear``) or :math:`f + (1-f)(1-\sqrt s)` (``1-sqrt``). The rate for the last iterate is
    :math:`O(1/\sqrt T)` with a constant that depends on the fraction. A time limit or a signal ends a run well by
    ``scheduler.start_cooldown(length)`` and ``length`` more steps.

    Args:
        optimizer: The optimizer.
        total: Optimizer steps :math:`T`. ``None``: those of the run if it has an end (filled in by the command
            ``lightning-grad``), else constant until :meth:`start_cooldown`.
        cooldown_fraction: Part of ``total`` in the cooldown, in (0, 1]; at least one step.
        shape: ``"linear"`` or ``"1-sqrt"``.
        final: Factor :math:`f` at the end, in [0, 1].

    Raises:
        ValueError: An argument is out of range.

    State: the step, and a cooldown that was started by hand.
    """

    _settings = ("total", "cooldown_fraction", "shape", "final", "_warned")

    def __init__(
        self,
        optimizer: Optimizer,
        total: int | None = None,
        cooldown_fraction: float = 0.2,
        shape: Literal["linear", "1-sqrt"] = "linear",
        final: float = 0.0,
    ) -> None:
        self.total = None if total is None else check_int("total", total, 1)
        self.cooldown_fraction = check_range("cooldown_fraction", cooldown_fraction, 0.0, 1.0, "(]")
        self.shape = check_choice("shape", shape, ("linear", "1-sqrt"))
        self.final = check_range("final", final, 0.0, 1.0)
        self._started: tuple[int, int, float] | None = None  # begin, end, and the factor at the beginning
        super().__init__(optimizer)

    def start_cooldown(self, length: int) -> None:
        """Decay from the present rate over the next ``length`` steps, of which the coming one is the first.

        ``total`` no longer counts, nor does a cooldown that has begun.

        Args:
            length: Steps until the factor is ``final``, >= 1.

        Raises:
            ValueError: ``length`` is out of range.
        """
        end = self.last_epoch + check_int("length", length, 1)
        self._started = (self.last_epoch, end, self.factor(self.last_epoch))

    @property
    def cooldown(self) -> tuple[int, int] | None:
        """First step of the cooldown and the end of the run; ``None`` while neither is known."""
        if self._started is not None:
            return self._started[:2]
        if self.total is None:
            return None
        return self.total - max(1, round(self.cooldown_fraction * self.total)), self.total

    @override
    def _present_factor(self) -> float:
        if self._started is not None:  # `total` no longer counts, also not for the warning
            return self.factor(self.last_epoch)
        return super()._present_factor()

    @override
    def factor(self, step: int) -> float:
        if self.cooldown is None or step < self.cooldown[0]:
            return 1.0
        begin, end = self.cooldown
        top = 1.0 if self._started is None else self._started[2]
        done = min(1.0, (step - begin) / (end - begin))
        left = 1.0 - (done if self.shape == "linear" else math.sqrt(done))
        return self.final + (top - self.final) * left
