"""Arithmetic that update rules are written in: one rule runs on a tensor, on a list of tensors and in a compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Scalar = float | Tensor


class TensorList:
    """A list of tensors that answers to the operators of one, through ``torch._foreach_*``."""

    def __init__(self, items: list[Tensor]) -> None:
        self.items = items

    def _binary(self, op: Callable[..., Any], other: TensorList | Scalar) -> TensorList:
        return TensorList(list(op(self.items, other.items if isinstance(other, TensorList) else other)))

    def __add__(self, other: TensorList | Scalar) -> TensorList:
        return self._binary(torch._foreach_add, other)

    def __sub__(self, other: TensorList | Scalar) -> TensorList:
        return self._binary(torch._foreach_sub, other)

    def __mul__(self, other: TensorList | Scalar) -> TensorList:
        return self._binary(torch._foreach_mul, other)

    __rmul__ = __mul__

    def __truediv__(self, other: TensorList | Scalar) -> TensorList:
        return self._binary(torch._foreach_div, other)

    def clamp_min(self, low: float) -> TensorList:
        return self._binary(torch._foreach_clamp_min, low)

    def __neg__(self) -> TensorList:
        return TensorList(list(torch._foreach_neg(self.items)))

    def abs(self) -> TensorList:
        return TensorList(list(torch._foreach_abs(self.items)))

    def sqrt(self) -> TensorList:
        return TensorList(list(torch._foreach_sqrt(self.items)))

    def sigmoid(self) -> TensorList:
        return TensorList(list(torch._foreach_sigmoid(self.items)))

    def lerp(self, end: TensorList, weight: Scalar) -> TensorList:
        if isinstance(weight, Tensor):  # the foreach form takes numbers only
            return self + (end - self) * weight
        return TensorList(list(torch._foreach_lerp(self.items, end.items, weight)))

    def add(self, other: TensorList, *, alpha: float) -> TensorList:
        return TensorList(list(torch._foreach_add(self.items, other.items, alpha=alpha)))

    def addcmul(self, a: TensorList, b: TensorList, *, value: float) -> TensorList:
        return TensorList(list(torch._foreach_addcmul(self.items, a.items, b.items, value)))

    def addcdiv(self, a: TensorList, b: TensorList, *, value: float) -> TensorList:
        return TensorList(list(torch._foreach_addcdiv(self.items, a.items, b.items, value)))


# A scalar is a number in the eager modes (one fused kernel) and a 0-dim tensor when it must not be read on the host.


def axpy(y: Any, x: Any, a: Scalar) -> Any:
    """``y + a * x``."""
    return y + x * a if isinstance(a, Tensor) else y.add(x, alpha=a)


def addcmul(y: Any, a: Any, b: Any, c: Scalar) -> Any:
    """``y + c * a * b``."""
    return y + (a * c) * b if isinstance(c, Tensor) else y.addcmul(a, b, value=c)


def addcdiv(y: Any, a: Any, b: Any, c: Scalar) -> Any:
    """``y + c * a / b``."""
    return y + (a * c) / b if isinstance(c, Tensor) else y.addcdiv(a, b, value=c)


def ema(average: Any, x: Any, beta: Scalar) -> Any:
    """``beta * average + (1 - beta) * x``."""
    return average.lerp(x, 1.0 - beta)


def ema_of_square(average: Any, x: Any, beta: Scalar) -> Any:
    """``beta * average + (1 - beta) * x * x``."""
    return addcmul(average * beta, x, x, 1.0 - beta)


def stochastic_round(x: Tensor) -> Tensor:
    """Round float32 to a neighbouring bfloat16, up with the probability that keeps the mean; the result is float32.

    A uniform 16-bit number is added to the raw bits and the low half is cleared. Infinities and NaN pass unchanged.
    """
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)
    rounded = ((x.view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)
