r"""From the bytes of a step to the coefficients of its update: the part of the state every replica computes for itself.

All of it is Python float64 in a fixed order, and the result is a list of integers times one power of two, so that the
sum over directions is exact in float32 in any order and every replica rounds each element once, alike.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from lightning_grad.spsa.codec import Codec
from lightning_grad.spsa.errors import JournalError, UpdateOverflowError
from lightning_grad.spsa.journal import Header, Record

Term = tuple[int, int, float]  # (step, direction, coefficient)
_WARN_DIRECTIONS = 4096


class ScaleTracker:
    r"""Running mean square of the projected gradients, and the power-of-two scale of the byte that follows it.

    .. math::
        m_t = \rho m_{t-1} + (1 - \rho) \frac1N \sum_i \hat g_i^2, \qquad
        \sigma = \lfloor \log_2 \sqrt{m_t} \rfloor - 2

    so the root mean square lies in [4, 8) scale units: 56 times below saturation.

    Args:
        rho: Decay, in [0, 1).
        scale_log2: Scale before the first step.
        adapt: ``False`` freezes the scale (codecs without one).
    """

    def __init__(self, rho: float = 0.9, scale_log2: int = 0, adapt: bool = True) -> None:
        self.rho = rho
        self.scale_log2 = scale_log2
        self.m2: float | None = None
        self._adapt = adapt

    @property
    def rms(self) -> float:
        """Root of the running mean square; 0 before the first observation."""
        return math.sqrt(self.m2) if self.m2 else 0.0

    def observe(self, values: Sequence[float]) -> None:
        """Take in the decoded values of one step, in ascending direction order; an empty step changes nothing."""
        if not values:
            return
        total = 0.0
        for value in values:
            total += value * value
        mean = total / len(values)
        self.m2 = mean if self.m2 is None else self.rho * self.m2 + (1.0 - self.rho) * mean
        if self._adapt and self.m2 > 0.0:
            self.scale_log2 = min(max(math.frexp(math.sqrt(self.m2))[1] - 3, -120), 120)


@dataclass(frozen=True)
class Quantized:
    """Coefficients as integers: term ``i`` contributes ``2**exponent * integers[i] * z_i`` to the change."""

    directions: tuple[tuple[int, int], ...]
    integers: tuple[int, ...]
    exponent: int


def quantize(terms: Iterable[Term]) -> Quantized | None:
    """Round coefficients to a common power of two so that every partial sum is an integer below ``2**24``.

    The error of a coefficient is at most ``2**-15`` of the largest one for up to 511 terms, one bit more per doubling.

    Returns:
        ``None`` if nothing is left to do: no term, all zero, or below float32's normal range.

    Raises:
        OverflowError: A coefficient is not finite or at least ``2**40``.
    """
    kept = [term for term in terms if term[2] != 0.0]
    if not kept:
        return None
    largest = max(abs(c) if math.isfinite(c) else math.inf for _, _, c in kept)
    if largest >= 2.0**40:
        raise OverflowError(f"largest coefficient {largest:g}")
    limit = min(1 << 15, ((1 << 24) - 1) // len(kept))
    exponent = math.frexp(largest)[1] - (limit.bit_length() - 1)
    if exponent < -126:
        return None
    integers = tuple(round(math.ldexp(c, -exponent)) for _, _, c in kept)
    return Quantized(tuple((t, d) for t, d, _ in kept), integers, exponent)


@dataclass(frozen=True)
class StepUpdate:
    """What one record means: the terms of the update and the numbers worth logging."""

    step: int
    terms: list[Term] = field(repr=False)
    values: list[float] = field(repr=False)
    lr: float
    abstained: int
    saturated: int

    @property
    def step_rms(self) -> float:
        """Root mean square over elements of the change (signs are uncorrelated)."""
        return math.sqrt(sum(c * c for _, _, c in self.terms))


class UpdateRule:
    """The replicated state of a run, advanced by records alone.

    Args:
        header: Constants of the run.

    State: ``step`` (next journal step), ``lr`` and ``roster`` in force, ``tracker``, the terms of the momentum horizon,
    ``bad_steps`` (steps in a row in which everyone abstained).
    """

    def __init__(self, header: Header) -> None:
        self.header = header
        self.codec = Codec(header.codec)
        self.tracker = ScaleTracker(header.rho, header.scale_log2, adapt=self.codec.scaled)
        self.step = 0
        self.lr = math.nan
        self.roster: tuple[int, ...] = ()
        self.bad_steps = 0
        self._history: deque[list[Term]] = deque(maxlen=header.momentum_horizon + 1 if header.momentum else 1)
        self._warned = False

    def copy(self) -> UpdateRule:
        """An independent one in the same state."""
        other = copy.copy(self)
        other._history = self._history.copy()  # all else is replaced in a step, never changed
        return other

    def clip(self, g: float) -> float:
        """Bound a value by ``clip`` running root mean squares; senders and receivers both do."""
        if self.header.clip is None or not self.tracker.m2 or math.isnan(g):
            return g
        bound = self.header.clip * math.sqrt(self.tracker.m2)
        return min(max(g, -bound), bound)

    def encode(self, g: float) -> bytes:
        """The bytes to send for a projected gradient measured at this step."""
        return self.codec.encode(self.clip(g), self.tracker.scale_log2)

    def advance(self, record: Record) -> StepUpdate:
        """Take in the record of the current step; if that raises, nothing has changed.

        Raises:
            JournalError: It has more or fewer codes than its roster.
            UpdateOverflowError: The update is not finite or too large.
        """
        lr = record.lr if record.lr is not None else self.lr
        roster = record.roster if record.roster is not None else self.roster
        slots, unit = self.header.directions, self.codec.unit
        if len(record.codes) != len(roster) * slots * unit:
            raise JournalError(
                f"record {self.step} has {len(record.codes)} bytes of codes; {len(roster)} workers with {slots}"
                f" directions send {len(roster) * slots * unit}."
            )
        found: list[tuple[int, float]] = []
        abstained = saturated = 0
        for position, worker in enumerate(roster):
            for j in range(slots):
                begin = (position * slots + j) * unit
                code = record.codes[begin : begin + unit]
                value = self.codec.decode(code, self.tracker.scale_log2)
                if value is None:
                    abstained += 1
                    continue
                saturated += self.codec.saturated(code)
                found.append((worker * slots + j, self.clip(value)))
        values = [value for _, value in found]
        tracker = copy.copy(self.tracker)
        tracker.observe(values)
        shares = self._shares(found, tracker)
        terms = self._terms(shares, lr) if shares else []
        update = StepUpdate(self.step, terms, values, lr, abstained, saturated)
        self._check(update, tracker)
        self.lr, self.roster, self.tracker = lr, roster, tracker
        self._history.appendleft(shares)
        self.bad_steps = 0 if found else self.bad_steps + 1
        self.step += 1
        return update

    def _shares(self, found: Sequence[tuple[int, float]], tracker: ScaleTracker) -> list[Term]:
        """Terms of this step for a learning rate of 1."""
        count = len(found)
        reduction = {"mean": float(count), "rsqrt": math.sqrt(count), "sum": 1.0}[self.header.reduction]
        scale = reduction * (tracker.rms if self.header.normalize else 1.0)
        return [(self.step, d, value / scale) for d, value in found] if scale else []

    def _terms(self, shares: list[Term], lr: float) -> list[Term]:
        """This step's shares and those of the momentum horizon, newest first."""
        terms: list[Term] = []
        power = 1.0
        for some in islice((shares, *self._history), self._history.maxlen):
            terms += [(t, d, lr * (power * x)) for t, d, x in some]
            power *= self.header.momentum
        return terms

    def _check(self, update: StepUpdate, tracker: ScaleTracker) -> None:
        largest = max((abs(c) for _, _, c in update.terms), default=0.0)
        if not all(math.isfinite(c) for _, _, c in update.terms) or largest >= 2.0**40:
            raise UpdateOverflowError(
                f"SPSA update overflow at step {self.step}: lr {update.lr:g}, scale 2**{tracker.scale_log2}, largest"
                f" coefficient {largest:g}. Lower the learning rate."
            )
        if len(update.terms) > _WARN_DIRECTIONS and not self._warned:
            self._warned = True
            warnings.warn(
                f"SPSA: {len(update.terms)} directions in one update; their coefficients keep fewer than 12 bits.",
                stacklevel=2,
            )
