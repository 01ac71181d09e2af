"""Range checks whose error text makes sense alone: argument, value given, what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

Brackets = Literal["[]", "[)", "(]", "()"]


def check_range(name: str, value: float, low: float, high: float, brackets: Brackets = "[]") -> float:
    """Return ``value`` if it is a number in the interval, else raise.

    Args:
        name: Argument name as the user wrote it.
        value: Number to check. ``bool``, NaN and non-numbers are refused.
        low: Lower end; may be ``-inf``.
        high: Upper end; may be ``inf``.
        brackets: Which ends belong to the interval: ``[`` and ``]`` do, ``(`` and ``)`` do not.

    Raises:
        ValueError: ``value`` is outside, NaN, or not a number.
    """
    interval = f"{brackets[0]}{low:g}, {high:g}{brackets[1]}"
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(f"`{name}` must be a number in {interval}, got {value!r}.")
    above = value >= low if brackets[0] == "[" else value > low
    below = value <= high if brackets[1] == "]" else value < high
    if not (above and below):
        raise ValueError(f"`{name}` must be in {interval}, got {value!r}.")
    return value


def check_int(name: str, value: int, low: int, high: int | None = None) -> int:
    """Return ``value`` if it is an integer in ``[low, high]`` (``None``: no upper end), else raise ``ValueError``."""
    allowed = f">= {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ValueError(f"`{name}` must be an integer {allowed}, got {value!r}.")
    return value


def check_choice(name: str, value: str, allowed: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``allowed``, else raise a ``ValueError`` that lists them."""
    options = list(allowed)
    if value not in options:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, options))}, got {value!r}.")
    return value
