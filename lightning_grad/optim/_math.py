"""Arithmetic that update rules are written in.

One rule runs on tensors (compiled, differentiable), on lists of tensors (:class:`TensorList`), and in place without
fresh temporaries (:class:`Buffer`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Scalar = float | Tensor
TINY = torch.finfo(torch.float32).tiny
_LANES = 16  # numbers in the widest vector of a CPU
_ROW = 4096
_ENDLESS = torch.tensor(torch.inf, device="cpu")
#: The CPU kernel of ``torch.optim.AdamW(fused=True)``, which has no public name; run on torch 2.13. Without it
#: the same step takes seven passes.
_FUSED: Any = getattr(torch, "_fused_adamw_", None)


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

    def exp(self) -> TensorList:
        return TensorList(list(torch._foreach_exp(self.items)))

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


class Pool:
    """Memory for temporaries: the n-th one of every block is the same memory."""

    def __init__(self) -> None:
        self._bases: list[Tensor] = []
        self._views: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}
        self._next = 0

    def reset(self) -> None:
        """A new block begins: what was taken is free."""
        self._next = 0

    def take(self, like: Tensor) -> Tensor:
        """An uninitialized tensor with the shape, dtype and device of ``like``."""
        index, self._next = self._next, self._next + 1
        key = (index, like.shape, like.dtype)
        view = self._views.get(key)
        if view is None or view.device != like.device:
            view = self._views[key] = self._view(index, like)
        return view

    def _view(self, index: int, like: Tensor) -> Tensor:
        if index == len(self._bases):
            self._bases.append(like.new_empty(like.numel()))
        base = self._bases[index]
        if base.numel() < like.numel() or base.dtype != like.dtype or base.device != like.device:
            self._views = {key: view for key, view in self._views.items() if key[0] != index}
            base = self._bases[index] = like.new_empty(like.numel())
        return base[: like.numel()].view(like.shape)


class Buffer:
    """A tensor in an expression that is evaluated once: temporaries (``own``) are overwritten by the next operator.

    In the eager mode every fresh temporary costs as much as the arithmetic. The parameter is ``own`` too, because a
    rule only makes its next value from it; gradients are not, and states change through :func:`ema`,
    :func:`ema_of_square` and :func:`scale_add` only. A rule may therefore use a temporary as the left operand once.
    """

    __slots__ = ("own", "pool", "tensor")

    def __init__(self, tensor: Tensor, pool: Pool, own: bool = False) -> None:
        self.tensor, self.pool, self.own = tensor, pool, own

    def _apply(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Buffer:
        """Run ``op`` into this tensor if it is a temporary, else into a new one."""
        if self.own:
            op(self.tensor, *args, **kwargs, out=self.tensor)
            return self
        out = self.pool.take(self.tensor)
        op(self.tensor, *args, **kwargs, out=out)
        return Buffer(out, self.pool, True)

    def __add__(self, other: Buffer | Scalar) -> Buffer:
        return self._apply(torch.add, other.tensor if isinstance(other, Buffer) else other)

    def __sub__(self, other: Buffer | Scalar) -> Buffer:
        return self._apply(torch.sub, other.tensor if isinstance(other, Buffer) else other)

    def __mul__(self, other: Buffer | Scalar) -> Buffer:
        return self._apply(torch.mul, other.tensor if isinstance(other, Buffer) else other)

    __rmul__ = __mul__

    def __truediv__(self, other: Buffer | Scalar) -> Buffer:
        return self._apply(torch.div, other.tensor if isinstance(other, Buffer) else other)

    def __neg__(self) -> Buffer:
        return self._apply(torch.neg)

    def abs(self) -> Buffer:
        return self._apply(torch.abs)

    def sqrt(self) -> Buffer:
        return self._apply(torch.sqrt)

    def exp(self) -> Buffer:
        return self._apply(torch.exp)

    def clamp_min(self, low: float) -> Buffer:
        return self._apply(torch.clamp, low)

    def add(self, other: Buffer, *, alpha: float) -> Buffer:
        return self._apply(torch.add, other.tensor, alpha=alpha)

    def addcdiv(self, a: Buffer, b: Buffer, *, value: float) -> Buffer:
        return self._apply(torch.addcdiv, a.tensor, b.tensor, value=value)

    def addcmul(self, a: Buffer, b: Buffer, *, value: float) -> Buffer:
        return self._apply(torch.addcmul, a.tensor, b.tensor, value=value)


# A scalar is a number in the eager modes (one fused kernel) and a 0-dim tensor when it must not be read on the host.


def borrowed(x: Any) -> Any:
    """``x`` as an operand that is used again."""
    return Buffer(x.tensor, x.pool) if isinstance(x, Buffer) else x


def axpy(y: Any, x: Any, a: Scalar) -> Any:
    """``y + a * x``."""
    return y + borrowed(x) * a if isinstance(a, Tensor) else y.add(x, alpha=a)


def addcmul(y: Any, a: Any, b: Any, c: Scalar) -> Any:
    """``y + c * a * b``."""
    return y + (borrowed(a) * c) * b if isinstance(c, Tensor) else y.addcmul(a, b, value=c)


def addcdiv(y: Any, a: Any, b: Any, c: Scalar) -> Any:
    """``y + c * a / b``; ``None`` for ``b`` is 1."""
    if b is None:
        return axpy(y, a, c)
    return y + (borrowed(a) * c) / b if isinstance(c, Tensor) else y.addcdiv(a, b, value=c)


def ema(average: Any, x: Any, beta: Scalar) -> Any:
    """``beta * average + (1 - beta) * x``, for a state: the old value is gone afterwards."""
    if isinstance(average, Buffer):
        average.tensor.lerp_(x.tensor, 1.0 - beta)
        return average
    if isinstance(beta, Tensor):  # the compiler makes slow code of a lerp whose weight it does not know
        return average + (x - average) * (1.0 - beta)
    return average.lerp(x, 1.0 - beta)


def spent(state: Any) -> Any:
    """A state that the rule replaces, as a temporary: its memory may be overwritten."""
    return Buffer(state.tensor, state.pool, own=True) if isinstance(state, Buffer) else state


def damped(x: Any, numerator: Any, denominator: Any) -> tuple[Any, Any]:
    """The fraction times ``sigmoid(x)``, for ``x >= 0``; ``None`` for the denominator is 1."""
    # torch.sigmoid is slower, and on CPU rounds otherwise at the end of a tensor, where it does not fill a vector
    slowness = (-x).exp() + 1.0
    return numerator, slowness if denominator is None else slowness * denominator


def ema_of_square(average: Any, x: Any, beta: Scalar) -> Any:
    """``beta * average + (1 - beta) * x * x``, for a state: the old value is gone afterwards."""
    if isinstance(average, Buffer):
        average.tensor.mul_(beta)
        if isinstance(beta, Tensor):
            average.tensor.add_((x.tensor * (1.0 - beta)).mul_(x.tensor))
        else:
            average.tensor.addcmul_(x.tensor, x.tensor, value=1.0 - beta)
        return average
    return addcmul(average * beta, x, x, 1.0 - beta)


def adam_scalars(betas: tuple[float, float], eps: float, step: Any) -> dict[str, Any]:
    """What :func:`adam` needs in ``h`` at a step, and ``unbias``.

    With them ``mhat / (sqrt(vhat) + eps) = unbias * m / (sqrt(v) + h["eps"])``.
    """
    root = (1.0 - betas[1] ** step) ** 0.5
    unbias = root / (1.0 - betas[0] ** step)
    return {"beta1": betas[0], "beta2": betas[1], "eps": eps * root, "unbias": unbias, "guard": eps < TINY}


def adam(s: Mapping[str, Any], g: Any, h: Mapping[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """Adam's averages after the gradient ``g``, and ``exp_avg / (sqrt(exp_avg_sq) + eps)``.

    Args:
        s: ``exp_avg``, ``exp_avg_sq``; the old values are gone afterwards.
        g: The gradient.
        h: ``beta1``, ``beta2``, ``eps``, and the flag ``guard``: ``eps`` may be 0, and 0 / 0 counts as 0.

    Returns:
        The averages; the numerator; the denominator, or ``None`` if the numerator is the quotient.
    """
    m, v, eps = s["exp_avg"], s["exp_avg_sq"], h["eps"]
    on_cpu = isinstance(m, Buffer) and m.tensor.device.type == "cpu"
    if on_cpu and _FUSED is not None and not (h["guard"] or isinstance(eps, Tensor)):
        quotient = m.pool.take(m.tensor)
        adam_in_one_pass(quotient, g.tensor, m.tensor, v.tensor, h["beta1"], h["beta2"], eps)
        return {"exp_avg": m, "exp_avg_sq": v}, Buffer(quotient, m.pool, True), None
    m, v = ema(m, g, h["beta1"]), ema_of_square(v, g, h["beta2"])
    return {"exp_avg": m, "exp_avg_sq": v}, m, adam_denominator(v, h)


def adam_denominator(v: Any, h: Mapping[str, Any]) -> Any:
    """``sqrt(v) + eps``; with the flag ``guard`` such that 0 / 0 counts as 0."""
    denominator = v.sqrt() + h["eps"]
    return denominator.clamp_min(TINY) if h["guard"] else denominator


def adam_in_one_pass(u: Tensor, g: Tensor, m: Tensor, v: Tensor, beta1: float, beta2: float, eps: float) -> None:
    """Update the averages ``m`` and ``v`` in place and set ``u`` to ``m / (sqrt(v) + eps)``; contiguous, on CPU.

    By the kernel of ``torch.optim.AdamW(fused=True)``: one pass over memory, not seven. It makes a step from zero with
    learning rate -1, as the infinitely many-th step, whose bias corrections are 1.
    """
    flat = [t.view(-1) for t in (u.zero_(), g, m, v)]
    rest = u.numel() % _LANES
    if rest:  # the kernel rounds otherwise where it does not fill a vector: what a number becomes must not depend on it
        ends = [t[-rest:] for t in flat]
        padded = list(u.new_zeros(4, _LANES))
        for whole, end in zip(padded, ends, strict=True):
            whole[:rest] = end
        _adam_kernel(padded, beta1, beta2, eps)
        for index in (0, 2, 3):
            ends[index].copy_(padded[index][:rest])
        flat = [t[:-rest] for t in flat]
    _adam_kernel(flat, beta1, beta2, eps)


def _adam_kernel(tensors: list[Tensor], beta1: float, beta2: float, eps: float) -> None:
    u, g, m, v = ([t] for t in tensors)
    _FUSED(
        u, g, m, v, [], [_ENDLESS], lr=-1.0, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip


def scale_add(state: Any, factor: Scalar, x: Any, a: Scalar) -> Any:
    """``factor * state + a * x``, for a state: the old value is gone afterwards."""
    if isinstance(state, Buffer):
        axpy(Buffer(state.tensor, state.pool, own=True) * factor, x, a)
        return state
    return axpy(state * factor, x, a)


def stochastic_round(x: Tensor) -> Tensor:
    """Round float32 to a neighbouring bfloat16, up with the probability that keeps the mean; the result is float32.

    A uniform 16-bit number is added to the raw bits and the low half is cleared. Infinities and NaN pass unchanged.
    """
    bits = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)
    bits.add_(x.view(torch.int32)).bitwise_and_(-65536)
    return torch.where(x.isfinite(), bits.view(torch.float32), x)


def square_sum(x: Tensor) -> Tensor:
    """The sum of squares, without a temporary of the size of ``x`` where ``x`` is large."""
    rest = x.numel() % _ROW
    if x.requires_grad or x.numel() < 4 * _ROW or not x.is_contiguous():
        return x.square().sum()
    flat = x.view(-1)
    # row by row, because one norm over all would add millions of float32 numbers one after the other
    norms: Tensor = torch.linalg.vector_norm(flat[: x.numel() - rest].view(-1, _ROW), dim=1)
    return norms.square().sum() + flat[x.numel() - rest :].square().sum()


def ratio(a: Scalar, b: Tensor) -> Tensor:
    """``a / b``; 0 where ``b`` is 0, NaN where it is infinite: a sum that overflowed must not end training unseen."""
    zero = b == 0
    return (a / b.masked_fill(zero, 1.0) + (b - b)).masked_fill(zero, 0.0)  # b - b: 0, or NaN
