"""Size of the updates, size of the parameters, and what an optimizer reports about itself."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad._lightning import logging_step
from lightning_grad._tensorboard import Charts, TensorBoardCharts, log_scalars
from lightning_grad._validate import check_int

_SHORT = (torch.float16, torch.bfloat16)
_SHARDING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


class OptimizerStats(TensorBoardCharts):
    r"""Log how far a step moves the parameters, every ``every_n_steps`` optimizer steps.

    .. math::
        \text{update\_norm} = \lVert \theta_t - \theta_{t-1} \rVert_2, \qquad
        \text{param\_norm} = \lVert \theta_t \rVert_2

    over all parameters of an optimizer. A healthy run moves by a slowly changing small part of ``param_norm`` a step;
    a jump comes before a divergence, and a step that moves nothing shows as zero.

    Tags: ``optim/{Class}/update_norm``, ``optim/{Class}/param_norm``, and ``optim/{Class}/{key}`` for each entry of the
    optimizer's ``stats() -> dict[str, float | Tensor]``, if it has that method. ``{Class}`` is the optimizer's class; a
    second optimizer of a class is ``{Class}_2``, and so on.

    Cost: on a logging step one copy of the parameters, held during the step, and two passes over them; on other steps
    nothing. Gradients are never copied. Under gradient accumulation a step is a whole window.

    Args:
        every_n_steps: Optimizer steps from one logging step to the next, >= 1. Steps of several optimizers on one batch
            count once, as on the x-axis of all logged values.

    Raises:
        ValueError: ``every_n_steps`` is out of range.
        MisconfigurationException: The strategy shards parameters, so that no process sees a whole update.

    State: none.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = check_int("every_n_steps", every_n_steps, 1)
        self._hooks: list[Any] = []

    def tensorboard_charts(self, trainer: pl.Trainer) -> Charts:
        """One chart for the updates and one for the parameters, with a curve per optimizer."""
        # patterns, so that runs with different optimizers share a chart
        return {
            "optim": {
                "size of an update": ["optim/*/update_norm"],
                "size of the parameters": ["optim/*/param_norm"],
            }
        }

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to the optimizers."""
        if isinstance(trainer.strategy, _SHARDING):
            raise MisconfigurationException(
                f"OptimizerStats needs whole parameters; {type(trainer.strategy).__name__} gives each process a part."
                " Remove the callback or use DDPStrategy."
            )
        super().on_fit_start(trainer, pl_module)
        self._detach()
        for name, optimizer in zip(_names(trainer.optimizers), trainer.optimizers, strict=True):
            if isinstance(optimizer, Optimizer):  # others have no hooks
                self._attach(trainer, name, optimizer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the optimizers as they were."""
        self._detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the optimizers as they were."""
        self._detach()

    def _attach(self, trainer: pl.Trainer, name: str, optimizer: Optimizer) -> None:
        before: list[Tensor] = []

        # Hooks of the optimizer, not of the Trainer: these run outside the closure, in which an optimizer may move the
        # parameters for a trial, and not at all when a loss scaler skips the step.
        def remember(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            before.clear()
            if (logging_step(trainer) + 1) % self.every_n_steps == 0:
                before.extend(p.detach().clone() for p in _parameters(optimizer))

        def measure(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if before:
                values = update_and_param_norm(before, _parameters(optimizer))
                before.clear()
                values |= {key: float(value) for key, value in getattr(optimizer, "stats", dict)().items()}
                log_scalars(trainer, {f"optim/{name}/{key}": value for key, value in values.items()})

        self._hooks += [optimizer.register_step_pre_hook(remember), optimizer.register_step_post_hook(measure)]

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


@torch.no_grad()
def update_and_param_norm(before: list[Tensor], after: list[Tensor]) -> dict[str, float]:
    """Return the Euclidean norms of ``after - before`` and of ``after`` over all tensors; overwrites ``before``."""
    torch._foreach_sub_(before, after)
    update, param = _norm(before), _norm(after)
    # one synchronization for both
    values = torch.stack([update, param]).tolist()
    return {"update_norm": values[0], "param_norm": values[1]}


def _norm(tensors: list[Tensor]) -> Tensor:
    # 16-bit norms overflow; a float32 sum over a large tensor loses digits (0.2 % at 10^7 entries): rows first
    rows = [torch.linalg.vector_norm(t.float() if t.dtype in _SHORT else t, dim=-1) for t in tensors]
    norms = [torch.linalg.vector_norm(row.double()).to(tensors[0].device) for row in rows]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _names(optimizers: list[Any]) -> list[str]:
    seen: Counter[str] = Counter()
    names = []
    for optimizer in optimizers:
        name = type(optimizer).__name__
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names
