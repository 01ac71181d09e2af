"""What loading a state dict does beyond torch: another optimizer's is refused, and state keeps its precision."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from lightning_grad.optim._buckets import wide_dtype
from lightning_grad.optim._executors import Group


def check_state_dict(
    owner: str,
    state_dict: dict[str, Any],
    hyperparameters: Collection[str],
    state_names: Callable[[Group], Collection[str]],
    is_shared: Callable[[str], bool],
) -> None:
    """Raise ``KeyError`` for the first key that is not as in a state dict of the class ``owner``.

    Unknown keys of a group are left alone, because schedulers and users keep values of their own there.

    Args:
        owner: Name of the class.
        state_dict: What is to be loaded.
        hyperparameters: What every group must have.
        state_names: What every parameter of a group that has state must have, beside ``step``.
        is_shared: Whether a name is one of those only some parameters have.
    """
    for index, group in enumerate(state_dict["param_groups"]):
        for missing in [name for name in hyperparameters if name not in group]:
            raise KeyError(f"{owner}: parameter group {index} has no `{missing}`; is it another optimizer's?")
        wanted = {"step", *state_names(group)}
        for key in group["params"]:
            entry = state_dict["state"].get(key)
            if not entry or all(map(is_shared, entry)):
                continue
            for missing in sorted(wanted - entry.keys()):
                raise KeyError(f"{owner}: the state of parameter {key} has no `{missing}`; is it another optimizer's?")
            for extra in sorted(name for name in entry.keys() - wanted if not is_shared(name)):
                raise KeyError(f"{owner}: the state of parameter {key} has an unknown `{extra}`")


def placed(name: str, value: Any, param: Tensor, group: Group, is_shared: bool) -> Tensor:
    """A loaded state as a tensor of its own, where the parameter is and in the dtype that the group asks for."""
    if name == "step":  # a number in optimizers older than torch's convention
        device = param.device if group["capturable"] else torch.device("cpu")
        return torch.as_tensor(value).to(device=device, dtype=torch.float32, copy=True)
    dtype = value.dtype
    if not is_shared and (dtype.is_floating_point or dtype.is_complex):
        dtype = torch.float32 if group["state_dtype"] == "float32" else param.dtype
        dtype = dtype.to_complex() if param.is_complex() and not dtype.is_complex else dtype
    elif is_shared and dtype is torch.float64:
        dtype = wide_dtype(param.device)
    own: Tensor = value.to(device=param.device, dtype=dtype, copy=True)
    return own
