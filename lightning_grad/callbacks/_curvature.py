"""What the curvature callbacks share: the Hessian of a module's training loss, when it is due, and who may ask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from lightning_grad.callbacks._step_loss import batch_loss, undisturbed
from lightning_grad.callbacks.batch_size_lr_scaler import BatchSizeLRScaler
from lightning_grad.nvfp4.linear import NVFP4Linear
from lightning_grad.statistics.curvature import HessianOperator, Mode, adam_scale
from lightning_grad.statistics.pause import recorders_paused
from lightning_grad.strategies._spsa_base import SPSABase

_FULL_UP_TO = 20_000_000  # parameters


@contextmanager
def curvature_operator(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batches: Sequence[Any],
    mode: Mode = "auto",
    preconditioned: bool = False,
) -> Iterator[HessianOperator]:
    """Yield the Hessian of the mean training loss on ``batches`` and processes.

    The loss is that of :func:`batch_loss`, the parameters are those that the optimizer has; without autocast, in the
    module's present mode. The module is left as :func:`undisturbed` leaves it.
    """
    params = _params(trainer, pl_module)
    scale = adam_scale(trainer.optimizers[0], params) if preconditioned else None
    reduce = _mean_over_processes if _num_processes() > 1 else None
    of_batch = batch_loss(pl_module)

    def loss() -> Tensor:
        return torch.stack([of_batch(batch) for batch in batches]).mean()

    with (
        recorders_paused(),
        undisturbed(pl_module),
        HessianOperator(loss, params, mode, module=pl_module, reduce=reduce, scale=scale) as operator,
    ):
        yield operator


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _mean_over_processes(value: Tensor) -> Tensor:
    dist.all_reduce(value)
    return value / _num_processes()


def check_supported(name: str, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse what the Hessian of a whole model on the current batch cannot be had from.

    Raises:
        MisconfigurationException: A sharding strategy, SPSA, four-bit layers, several optimizers, manual
            optimization without ``curvature_loss``, or a ``training_step`` that fetches its batches itself.
        ValueError: Parameters of low precision, complex, or on several devices.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise MisconfigurationException(
            f"{name} needs whole parameters and works with one device or DDPStrategy; the strategy is"
            f" {type(trainer.strategy).__name__}."
        )
    if isinstance(trainer.strategy, SPSABase):
        raise MisconfigurationException(
            f"{name} compares gradient steps with the curvature; {type(trainer.strategy).__name__} takes none."
        )
    if any(isinstance(module, NVFP4Linear) for module in pl_module.modules()):
        raise MisconfigurationException(
            f"{name} needs a loss that can be differentiated twice; four-bit layers (NVFP4Precision) can be once, and"
            " finite differences would measure their rounding."
        )
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(f"{name} needs one optimizer; the model has {len(trainer.optimizers)}.")
    if not pl_module.automatic_optimization and not hasattr(pl_module, "curvature_loss"):
        raise MisconfigurationException(
            f"{name}: with manual optimization there is no loss to differentiate again. Define"
            f" {type(pl_module).__name__}.curvature_loss(batch)."
        )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            f"{name} looks at the batch before the step; {type(pl_module).__name__}.training_step fetches its own from"
            " `dataloader_iter`."
        )
    HessianOperator(lambda: torch.zeros(()), _params(trainer, pl_module))


def _params(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Tensor]:
    """The parameters that the optimizer moves, in the module's order."""
    moved = {p for group in trainer.optimizers[0].param_groups for p in group["params"]}
    return [p for p in pl_module.parameters() if p.requires_grad and p in moved]


def share_critical_batch(trainer: pl.Trainer, trace: float, lambda_max: float) -> None:
    r"""Tell ``BatchSizeLRScaler(critical_batch="curvature")`` :math:`(\mathrm{tr} H - \lambda)/\lambda`.

    It scales the learning rate, so all processes must come with the same figures.
    """
    if not 0.0 < lambda_max < trace:
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        scaler = getattr(callback, "lr_scaler", callback)
        if isinstance(scaler, BatchSizeLRScaler) and scaler.critical_batch == "curvature":
            scaler.critical_batch_size = (trace - lambda_max) / lambda_max


def reorthogonalization(size: int) -> Literal["full", "none"]:
    """Whether Lanczos keeps all its vectors: the basis is ``k`` times as large as the model."""
    return "full" if size <= _FULL_UP_TO else "none"


def first_of_window(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether ``batch_idx`` begins a window of gradient accumulation."""
    return batch_idx % trainer.accumulate_grad_batches == 0


def samples_per_step(trainer: pl.Trainer, batch: Any) -> int:
    """Samples of an optimizer step, taking the other micro-batches for as large as ``batch``."""
    return extract_batch_size(batch) * trainer.world_size * trainer.accumulate_grad_batches


def momentum_of(optimizer: Optimizer) -> float:
    """Momentum of the first group: ``momentum``, or the first of ``betas``."""
    group = optimizer.param_groups[0]
    return float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))


def is_sgd(optimizer: Optimizer) -> bool:
    """Whether torch's SGD does the steps, or a subclass."""
    return isinstance(optimizer, SGD)


def is_adam(optimizer: Optimizer) -> bool:
    """Whether torch's Adam or AdamW does the steps, without the running maximum."""
    return isinstance(optimizer, Adam | torch.optim.AdamW) and not optimizer.param_groups[0]["amsgrad"]


def learning_rate(optimizer: Optimizer) -> float:
    """The largest learning rate of the groups."""
    return max(float(group["lr"]) for group in optimizer.param_groups)
