"""Passes that belong to no training step, such as those of a Hessian-vector product: recorders look away meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0  # of the process: on a GPU, autograd calls hooks in threads of its own


@contextmanager
def recorders_paused() -> Iterator[None]:
    """Let no hook of this package record what is computed inside."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def paused() -> bool:
    """Whether hooks that record gradients should do nothing."""
    return _depth > 0
