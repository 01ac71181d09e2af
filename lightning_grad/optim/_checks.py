"""The switches that every rule optimizer has, and the checks of a parameter group, one text per kind of mistake."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from lightning_grad._validate import Brackets, check_choice

# Above this the product of two hyperparameters can overflow float32.
_LARGEST = 1e10
_BOOLEANS = {
    "maximize", "compile", "capturable", "differentiable", "decay_1d", "stochastic_rounding",
    "decoupled_weight_decay", "nesterov", "project", "sphere",
}  # fmt: skip


@dataclass(frozen=True)
class Range:
    """The numbers that a hyperparameter may be.

    Args:
        low: Lower end.
        high: Upper end; ``None``: every number that cannot overflow.
        brackets: Which ends belong to it: ``[`` and ``]`` do, ``(`` and ``)`` do not.
        largest: Upper end where ``high`` is ``None``.
        optional: ``None`` is allowed too.
    """

    low: float
    high: float | None = None
    brackets: Brackets = "[]"
    largest: float = _LARGEST
    optional: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raise ``ValueError`` unless ``value`` is one of them."""
        if value is None and self.optional:
            return
        high = self.largest if self.high is None else self.high
        number = _is_number(value)
        above = number and (value >= self.low if self.brackets[0] == "[" else value > self.low)
        below = number and (value <= high if self.brackets[1] == "]" else value < high)
        if above and below:
            return
        allowed = f"be {'>=' if self.brackets[0] == '[' else '>'} {self.low:g}"
        if self.high is not None:
            allowed = f"lie in {self.brackets[0]}{self.low:g}, {self.high:g}{self.brackets[1]}"
        elif above:
            allowed += f" and at most {self.largest:g}"
        raise ValueError(f"{name} must {allowed}, got {_shown(value)}")


NON_NEGATIVE = Range(0.0)
FRACTION = Range(0.0, 1.0)
BELOW_ONE = Range(0.0, 1.0, "[)")
Allowed = Mapping[str, Range | tuple[str, ...]]
"""Hyperparameter -> the numbers, or the words, that it may be."""


class Switches(TypedDict, total=False):
    """Keyword-only switches that every rule optimizer has.

    Args:
        maximize: Ascend instead of descend.
        foreach: ``None``: flat buckets; ``True``: lists (``torch._foreach_*``); ``False``: one tensor at a time.
        compile: Run the rule through ``torch.compile``: slow first step, fastest afterwards.
        capturable: Keep the step count and all scalars on the device, for CUDA graphs.
        differentiable: Let autograd differentiate through the step.
        decay_1d: If ``False``, tensors with at most one dimension get no weight decay.
        state_dtype: ``"param"``: state has the parameter's dtype; ``"float32"``: float32 whatever the parameter is.
        stochastic_rounding: Round bfloat16 parameters up or down at random so that small updates are not lost.
    """

    maximize: bool
    foreach: bool | None
    compile: bool
    capturable: bool
    differentiable: bool
    decay_1d: bool
    state_dtype: Literal["param", "float32"]
    stochastic_rounding: bool


SWITCH_DEFAULTS: Switches = {
    "maximize": False,
    "foreach": None,
    "compile": False,
    "capturable": False,
    "differentiable": False,
    "decay_1d": True,
    "state_dtype": "param",
    "stochastic_rounding": False,
}


def check_group(group: dict[str, Any], allowed: Allowed) -> None:
    """Raise ``ValueError`` for the first value of the group that is out of range."""
    _check_lr(group)
    for name, value in group.items():
        known = allowed.get(name)
        if name == "betas":
            _check_betas(value)
        elif isinstance(known, Range):
            known.check(name, value)
        elif known is not None:
            check_choice(name, value, known)
        elif name in _BOOLEANS and not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
    if group["foreach"] not in (None, True, False):
        raise ValueError(f"foreach must be True, False or None, got {group['foreach']!r}")
    if group["state_dtype"] not in ("param", "float32"):
        raise ValueError(f"state_dtype must be 'param' or 'float32', got {group['state_dtype']!r}")
    if group["differentiable"]:
        for other in ("foreach", "compile", "capturable"):
            if group[other]:
                raise ValueError(f"differentiable cannot be combined with {other}")


def check_equal(group: dict[str, Any], first: dict[str, Any], names: Iterable[str]) -> None:
    """Raise ``ValueError`` for the first of the names whose value is not that of the first group."""
    for name in names:
        if group[name] != first[name]:
            raise ValueError(f"{name} must be the same in all parameter groups, got {first[name]} and {group[name]}")


def check_params(params: Any, owner: str) -> None:
    """Refuse parameters that are shards of a larger tensor."""
    for param in [params] if isinstance(params, Tensor) else params:
        if hasattr(param, "to_local"):
            raise NotImplementedError(
                f"{owner} does not support DTensor parameters (FSDP2, tensor parallelism);"
                " use DDP, or an optimizer of torch.optim for these parameters"
            )


def _check_lr(group: dict[str, Any]) -> None:
    if "lr" not in group:
        return
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if group["foreach"] and not group["capturable"]:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        if lr.device.type != "cpu" or isinstance(lr, torch._subclasses.FakeTensor):
            return  # reading it would stop the device
        lr = lr.item()
    if not _is_number(lr) or not 0.0 <= lr < math.inf:
        raise ValueError(f"lr must be >= 0 and finite, got {_shown(lr)}")
    NON_NEGATIVE.check("lr", lr)


def _check_betas(betas: Any) -> None:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        BELOW_ONE.check(f"betas[{i}]", beta)


def _shown(value: Any) -> str:
    """The value, and its type where that is what is wrong with it."""
    return str(value) if _is_number(value) else f"{value!r} (type {type(value).__name__}, not a number)"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
