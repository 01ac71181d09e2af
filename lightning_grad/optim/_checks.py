"""The switches that every rule optimizer has, and the checks of a parameter group, one text per kind of mistake."""

from __future__ import annotations

import math
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

# Above this the product of two hyperparameters can overflow float32.
_LARGEST = 1e10
_NON_NEGATIVE = {"eps", "weight_decay", "delta", "b0", "temperature", "lam", "v_init", "lipschitz", "smoothness"}
_FRACTION_BELOW_ONE = {"momentum", "alpha"}
_FRACTION = {"wd_ratio", "dampening"}
_BOOLEANS = {
    "maximize", "compile", "capturable", "differentiable", "decay_1d", "stochastic_rounding",
    "decoupled_weight_decay", "nesterov", "project", "sphere",
}  # fmt: skip


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


def check_group(group: dict[str, Any]) -> None:
    """Raise ``ValueError`` for the first value of the group that is out of range."""
    _check_lr(group)
    for name, value in group.items():
        if name == "betas":
            _check_betas(value)
        elif name in _NON_NEGATIVE and value is not None:
            check_non_negative(name, value)
        elif name in _FRACTION_BELOW_ONE and not (_is_number(value) and 0.0 <= value < 1.0):
            raise ValueError(f"{name} must lie in [0, 1), got {_shown(value)}")
        elif name in _FRACTION and not (_is_number(value) and 0.0 <= value <= 1.0):
            raise ValueError(f"{name} must lie in [0, 1], got {_shown(value)}")
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


def check_params(params: Any, owner: str) -> None:
    """Refuse parameters that are shards of a larger tensor."""
    for param in [params] if isinstance(params, Tensor) else params:
        if hasattr(param, "to_local"):
            raise NotImplementedError(
                f"{owner} does not support DTensor parameters (FSDP2, tensor parallelism);"
                " use DDP, or an optimizer of torch.optim for these parameters"
            )


def check_non_negative(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number >= 0."""
    if not _is_number(value) or math.isnan(value) or value < 0.0:
        raise ValueError(f"{name} must be >= 0, got {_shown(value)}")
    if value > _LARGEST:
        raise ValueError(f"{name} must be >= 0 and at most {_LARGEST:g}, got {value}")


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
    if lr > _LARGEST:
        raise ValueError(f"lr must be >= 0 and at most {_LARGEST:g}, got {lr}")


def _check_betas(betas: Any) -> None:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        if not (_is_number(beta) and 0.0 <= beta < 1.0):
            raise ValueError(f"betas[{i}] must lie in [0, 1), got {_shown(beta)}")


def _shown(value: Any) -> str:
    """The value, and its type where that is what is wrong with it."""
    return str(value) if _is_number(value) else f"{value!r} (type {type(value).__name__}, not a number)"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
