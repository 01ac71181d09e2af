"""The optimizer of a config, built when Lightning asks for it and not before."""

from __future__ import annotations

import copy
import difflib
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lightning_grad._cli_errors import ConfigError
from lightning_grad.optim.groups import OptimizerGroup, named_groups
from lightning_grad.optim.last_iterate_lr import LinearDecayLR, _StepLR

Interval = Literal["auto", "epoch", "step"]


@dataclass
class OptimizerPlan:
    """What the config says about the optimizer. :meth:`attach` makes it the model's ``configure_optimizers``.

    The stock command builds the optimizer from the parameters the model has when the command line is read. Layers made
    later (``configure_model``) or replaced later (a precision plugin) are then missing from it, and training silently
    changes nothing. Here nothing is built before ``configure_optimizers`` runs.

    Args:
        optimizer: Mapping with ``class_path`` and ``init_args``.
        lr_scheduler: The same for a scheduler, or ``None``.
        interval: When the scheduler steps; ``auto``: each step for schedules that count steps, else each epoch.
        groups: Parameters with settings of their own.
        no_decay: Words that mark modules whose parameters do not decay.
        combine: ``(module, optimizer, lr_scheduler) -> value of configure_optimizers``.
    """

    optimizer: Mapping[str, Any]
    lr_scheduler: Mapping[str, Any] | None
    interval: Interval
    combine: Callable[..., Any]
    groups: Sequence[OptimizerGroup] = field(default_factory=list)
    no_decay: Sequence[str] = field(default_factory=list)

    def attach(self, module: LightningModule) -> None:
        """Replace the module's ``configure_optimizers``."""
        if is_overridden("configure_optimizers", module):
            rank_zero_info(
                f"The config's `optimizer` replaces {type(module).__name__}.configure_optimizers. "
                "Leave `optimizer` out of the config to use the model's own."
            )
        # a partial, not a closure: launchers that spawn processes pickle the module
        module.configure_optimizers = partial(self.configure, module)  # type: ignore[method-assign]

    def check(self, module: LightningModule) -> None:
        """Try the optimizer's arguments on stand-ins for the parameters, so that a bad value is reported at once."""
        cls, kwargs = _resolve(self.optimizer)
        parameters: list[torch.Tensor] = [*module.parameters()] or [torch.zeros(2, 2)]
        _try(cls, parameters, kwargs, "`optimizer`")

    def configure(self, module: LightningModule) -> Any:
        """Build optimizer and scheduler from the parameters the module has now."""
        cls, kwargs = _resolve(self.optimizer)
        if self.groups or self.no_decay:
            params: Any = self._groups(module, cls, kwargs)
        else:
            params = module.parameters()
        optimizer = _build(cls, params, kwargs, "`optimizer`")
        if self.lr_scheduler is None:
            return self.combine(module, optimizer=optimizer, lr_scheduler=None)
        scheduler_cls, scheduler_kwargs = _resolve(self.lr_scheduler)
        scheduler = _build(scheduler_cls, optimizer, scheduler_kwargs, "`lr_scheduler`")
        combined = self.combine(module, optimizer=optimizer, lr_scheduler=scheduler)
        if self._interval_of(scheduler, module) == "epoch":
            return combined
        entry: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
        if hasattr(scheduler, "monitor"):
            entry["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": entry}

    def _interval_of(self, scheduler: Any, module: LightningModule) -> str:
        """When the scheduler steps; one of ours that lacks the length of the run is told."""
        if not isinstance(scheduler, _StepLR):
            return "epoch" if self.interval == "auto" else self.interval
        name = type(scheduler).__name__
        if self.interval == "epoch":
            raise ConfigError(f"`lr_scheduler_interval`: {name} counts optimizer steps; leave the interval out.")
        if scheduler.total is None:
            total = module.trainer.estimated_stepping_batches
            if math.isfinite(total) and total > 0:
                _checked(lambda: scheduler.resolve(int(total)), f"`lr_scheduler` ({name})")
            elif isinstance(scheduler, LinearDecayLR):
                raise ConfigError(
                    f"`lr_scheduler`: {name} needs to know the number of steps and this run has no end. Set `total`,"
                    " or `trainer.max_steps` or `trainer.max_epochs`, or use CooldownLR."
                )
        return scheduler.interval

    def _groups(self, module: LightningModule, cls: type[Optimizer], kwargs: dict[str, Any]) -> list[dict[str, Any]]:
        try:
            groups = named_groups(module, self.groups, self.no_decay)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        parameters = [parameter for group in groups for parameter in group["params"]]
        # what a group may set is known only to an instance
        instance = _try(cls, parameters, kwargs, "`optimizer`")
        allowed = sorted(instance.defaults) if instance is not None else None
        for index, group in enumerate(self.groups):
            for name in group.overrides:
                if allowed is not None and name not in allowed:
                    near = difflib.get_close_matches(name, allowed, n=1)
                    hint = f"Did you mean `{near[0]}`?" if near else f"It has {', '.join(allowed)}."
                    raise ConfigError(
                        f"`optimizer_groups[{index}].overrides`: {cls.__name__} has no group setting `{name}`. {hint}"
                    )
            # constructors check their own arguments and not those of a group: ask the constructor
            _try(cls, parameters, {**kwargs, **group.overrides}, f"`optimizer_groups[{index}].overrides`")
        if self.no_decay and allowed is not None and "weight_decay" not in allowed:
            raise ConfigError(f"`no_decay`: {cls.__name__} has no `weight_decay`. Leave `no_decay` out.")
        return groups


def _resolve(init: Mapping[str, Any]) -> tuple[type[Any], dict[str, Any]]:
    module, _, name = init["class_path"].rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    return cls, {**(init.get("init_args") or {}), **(init.get("dict_kwargs") or {})}


def _build(cls: type[Any], first: Any, kwargs: dict[str, Any], key: str) -> Any:
    return _checked(lambda: cls(first, **kwargs), f"{key} ({cls.__name__})")


def _checked(call: Callable[[], Any], where: str) -> Any:
    try:
        return call()
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _try(
    cls: type[Optimizer], parameters: Sequence[torch.Tensor], kwargs: dict[str, Any], key: str
) -> Optimizer | None:
    """Construct the optimizer over empty copies of the parameters; None if only the real parameters will do."""
    try:
        copies = [torch.nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in parameters]
    except ValueError:  # a lazy module's parameter, which has no shape yet
        return None
    try:
        return cls(copies, **copy.deepcopy(kwargs))
    except ValueError as error:
        raise ConfigError(f"{key} ({cls.__name__}): {error}") from error
    except Exception:  # fused kernels and the like refuse meta tensors; the real construction will tell
        return None
