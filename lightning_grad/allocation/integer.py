"""Spend an integer budget: exact minimiser of ``sum(w**2 / n)`` under bounds, and the largest-remainder rule.

Source: T. Wright, exact optimal sample allocation (US Census Bureau RRS2014-07) for the greedy rule, whose vectorised
form is used here; arXiv 2505.02391 for the largest-remainder rule of the published pipeline.
"""

from __future__ import annotations

import heapq
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_grad._validate import check_choice, check_int

Rounding = Literal["optimal", "largest_remainder"]


def is_degenerate(weights: Tensor) -> bool:
    """Whether the weights say nothing: one is negative or not finite, or all are zero."""
    return not bool(torch.isfinite(weights).all() and (weights >= 0).all() and (weights > 0).any())


def allocate(
    weights: Tensor,
    budget: int,
    *,
    min_samples: int | Tensor = 0,
    max_samples: int | Tensor | None = None,
    rounding: Rounding = "optimal",
    seed: int = 0,
) -> Tensor:
    """Split ``budget`` samples over ``m`` prompts in proportion to ``weights``, to the unit.

    Args:
        weights: Shape ``[m]``, >= 0. Degenerate weights (:func:`is_degenerate`) give an even split whose extra units
            go to a subset drawn with ``seed``.
        budget: Number of samples, >= 0; met exactly.
        min_samples: Lower bound of every ``n_i`` (integer or tensor ``[m]``), >= 0. With 0, a prompt of weight 0 gets
            nothing while others can still take samples, and a budget below the number of positive weights gives one
            sample to each of the largest.
        max_samples: Upper bound (integer or tensor ``[m]``); ``None``: no bound.
        rounding: ``"optimal"`` is the exact minimiser of ``sum(w_i**2 / n_i)`` over the integers within the bounds;
            ``"largest_remainder"`` rounds the proportional shares.
        seed: Seed of the even split.

    Returns:
        int64 tensor ``[m]`` that sums to ``budget``. Ties go to the lower index.

    Raises:
        ValueError: The bounds do not admit the budget.
    """
    check_choice("rounding", rounding, get_args(Rounding))
    check_int("budget", budget, 0)
    weights = weights.detach().double().cpu()
    low, high = _bounds(weights.numel(), budget, min_samples, max_samples)
    if is_degenerate(weights):
        order = torch.randperm(weights.numel(), generator=torch.Generator().manual_seed(seed))
        return _even(budget, low, high, order)
    # a power of two changes no plan, and squares of what is left neither overflow nor, where it matters, vanish
    weights = torch.ldexp(weights, -torch.frexp(weights.max()).exponent)
    positive = (weights > 0) & (high > 0)
    if budget < int(torch.maximum(low, positive.long()).sum()):
        return _one_each(weights, budget, low, positive)
    if rounding == "largest_remainder":
        return _largest_remainder(weights, budget, low, high)
    floor = torch.maximum(low, positive.long())
    room = int((high - floor)[positive].sum())
    spare = budget - int(floor.sum())
    if spare >= room:  # every weighted prompt is full: the rest may go where the weight is 0
        full = torch.where(positive, high, floor)
        return _even(budget, full, high, torch.arange(weights.numel()))
    n = floor.clone()
    n[positive] = _optimal(weights[positive], int(floor[positive].sum()) + spare, floor[positive], high[positive])
    return n


def _bounds(m: int, budget: int, min_samples: int | Tensor, max_samples: int | Tensor | None) -> tuple[Tensor, Tensor]:
    low = torch.as_tensor(min_samples, dtype=torch.int64).expand(m)
    # more than the budget can never be used, and a finite bound keeps sums in int64
    high = torch.as_tensor(budget if max_samples is None else max_samples, dtype=torch.int64).expand(m)
    if bool((low < 0).any()) or (max_samples is not None and bool((high < low).any())):
        raise ValueError(f"need 0 <= min_samples <= max_samples, got {min_samples} and {max_samples}.")
    if budget < int(low.sum()):
        size = (
            f"{m} prompts x min_samples {min_samples}"
            if isinstance(min_samples, int)
            else f"sum(min_samples) {int(low.sum())}"
        )
        raise ValueError(f"budget {budget} is smaller than {size}; lower min_samples or raise budget.")
    if max_samples is not None and budget > int(high.sum()):
        size = f"{m} prompts x max_samples {max_samples}" if isinstance(max_samples, int) else "sum(max_samples)"
        raise ValueError(f"budget {budget} exceeds {size} = {int(high.sum())}; raise max_samples or lower budget.")
    return low, high.clamp_max(budget)


def _even(budget: int, low: Tensor, high: Tensor, order: Tensor) -> Tensor:
    """As even as the bounds allow: the water level by bisection, the units above it to the first in ``order``."""
    bottom, top = int(low.min()), int(high.max())
    while bottom < top:
        level = (bottom + top + 1) // 2
        if int(torch.minimum(torch.clamp_min(low, level), high).sum()) <= budget:
            bottom = level
        else:
            top = level - 1
    n = torch.minimum(torch.clamp_min(low, bottom), high)
    open_ = order[((n < high) & (n <= bottom))[order]]
    n[open_[: budget - int(n.sum())]] += 1
    return n


def _one_each(weights: Tensor, budget: int, low: Tensor, positive: Tensor) -> Tensor:
    """Lower bounds first, then one sample to each of the largest weights that has none."""
    n = low.clone()
    waiting = torch.nonzero(positive & (n == 0)).flatten()
    order = waiting[torch.argsort(weights[waiting], descending=True, stable=True)]
    n[order[: budget - int(n.sum())]] = 1
    return n


def _optimal(weights: Tensor, budget: int, low: Tensor, high: Tensor) -> Tensor:
    """Greedy on the marginal gains ``w**2 / (n (n + 1))``: all units above a threshold at once, the last few by a heap.

    ``low >= 1`` and ``low.sum() <= budget < high.sum()``. The gains of a prompt fall with ``n``, so taking every unit
    whose gain exceeds ``d**2`` is what the unit-by-unit greedy rule does, and greedy is optimal because each term is
    convex.
    """

    def at(inverse: float) -> Tensor:
        x = weights * inverse  # in place from here on: half of the time would go to fresh memory
        x = x.square_().mul_(4.0).add_(1.0).sqrt_().sub_(1.0).mul_(0.5).ceil_().clamp_(max=float(budget))
        n = torch.maximum(x.long(), low)
        return torch.minimum(n, high, out=n)

    m, total_weight = weights.numel(), float(weights.sum())
    close = max(1024, m // 64)  # so few units are quickly given by sorting
    best, below, above = low, 2**0.5 / float(weights.max()), float("inf")  # below, nobody has a second unit by weight
    over: Tensor | None = None  # the plan at `above`
    guess = max((budget + 0.5 * m) / total_weight, below)  # n is about w / d - 1/2
    for step in range(200):
        if budget - int(best.sum()) <= close:
            break
        n = at(guess)
        total = int(n.sum())
        if total <= budget:
            best, below = n, guess
        else:
            above = guess
            over = n
        if over is not None and int(torch.sub(over, best).max()) <= 1:
            break  # nobody's second unit is in between: the first ones by size, however many are equal
        # away from the bounds sums are close to linear in 1/d and a proportional step lands; near them halving does
        near = guess * (budget + 0.5 * m) / (total + 0.5 * m)
        guess = near if step % 2 == 0 and below < near < above else min(4 * below, (below * above) ** 0.5)
        if guess in (below, above):
            break
    n = best.clone()
    missing = budget - int(n.sum())
    while missing > 0:
        gains = torch.where(n < high, weights.square() / (n.double() * (n + 1)), -1.0)
        missing -= _finish(weights, n, high, gains, missing)
    return n


def _finish(weights: Tensor, n: Tensor, high: Tensor, gains: Tensor, units: int) -> int:
    """Give up to ``units`` more samples greedily, in place, and return how many; who gets one has a large next gain."""
    order = torch.argsort(gains, descending=True, stable=True)[:units]
    order = order[gains[order] >= 0]
    n_next = n[order] + 1
    after = torch.where(n_next < high[order], weights[order].square() / (n_next.double() * (n_next + 1)), -1.0)
    first = int((gains[order] > after.max()).sum())  # of these, nobody's second unit comes before somebody's first
    if first >= min(units, 1024):
        n[order[:first]] = n_next[:first]
        return first
    units = min(units, 4096)  # the heap is slow; the rest comes in the next round
    order = order[:units]
    heap = [(-gain, index) for gain, index in zip(gains[order].tolist(), order.tolist(), strict=True)]
    heapq.heapify(heap)
    counts = {index: int(n[index]) for _, index in heap}
    squares = {index: float(weights[index]) ** 2 for index in counts}
    limits = {index: int(high[index]) for index in counts}
    for _ in range(units):
        _, index = heapq.heappop(heap)
        counts[index] += 1
        count = counts[index]
        if count < limits[index]:
            heapq.heappush(heap, (-squares[index] / (count * (count + 1)), index))
    keys = torch.tensor(list(counts), dtype=torch.int64)
    n[keys] = torch.tensor(list(counts.values()), dtype=torch.int64)
    return units


def _largest_remainder(weights: Tensor, budget: int, low: Tensor, high: Tensor) -> Tensor:
    """Proportional shares; shares outside a bound are frozen there and the rest shared again; then round."""
    n = low.clone()
    free = torch.ones_like(low, dtype=torch.bool)
    share = torch.zeros_like(weights)
    while bool(free.any()):
        total = weights[free].sum()
        left = budget - int(n[~free].sum())
        if total <= 0:
            n[free] = _even(left, low[free], high[free], torch.arange(int(free.sum())))
            return n
        share = torch.where(free, left * weights / total, 0.0)
        short, over = free & (share < low), free & (share > high)
        deficit, excess = (low - share)[short].sum(), (share - high)[over].sum()
        if not bool(short.any() or over.any()):
            break
        # freezing the side with the larger violation never has to be undone
        frozen, bound = (short, low) if deficit > excess else (over, high)
        if float(deficit) == float(excess):
            frozen, bound = short | over, torch.where(short, low, high)
        n = torch.where(frozen, bound, n)
        free = free & ~frozen
    n = torch.where(free, share.floor().long(), n)
    fraction = torch.where(free & (n < high), share - share.floor(), -1.0)
    order = torch.argsort(fraction, descending=True, stable=True)
    n[order[: budget - int(n.sum())]] += 1
    return n
