"""The loss of ``training_step`` as a function of the parameters, without logging."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.func import functional_call

from lightning_grad.statistics.sample_grads import SampleLoss


@contextlib.contextmanager
def muted(pl_module: pl.LightningModule) -> Iterator[None]:
    """Let ``log`` and ``log_dict`` of the module do nothing."""
    names = ("log", "log_dict")
    own = {name: pl_module.__dict__[name] for name in names if name in pl_module.__dict__}
    for name in names:
        pl_module.__dict__[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name in names:
            pl_module.__dict__.pop(name, None)
        pl_module.__dict__.update(own)


class _TrainingStep(nn.Module):
    """Call ``training_step`` through ``forward``, which is what ``functional_call`` can reach."""

    def __init__(self, inner: pl.LightningModule) -> None:
        super().__init__()
        self.inner = inner
        self._takes_index = "batch_idx" in inspect.signature(inner.training_step).parameters

    def forward(self, batch: Any) -> Tensor:
        args = (batch, 0) if self._takes_index else (batch,)
        out = self.inner.training_step(*args)
        loss = out["loss"] if isinstance(out, Mapping) else out
        if not isinstance(loss, Tensor):
            raise ValueError(f"`training_step` returned {type(out).__name__}, which holds no loss.")
        return loss


def step_loss(pl_module: pl.LightningModule) -> SampleLoss:
    """``loss(params, batch)`` with the parameter names of ``pl_module``."""
    module = _TrainingStep(pl_module)

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        with muted(pl_module):
            value: Tensor = functional_call(module, {f"inner.{n}": p for n, p in params.items()}, (batch,))
            return value

    return loss
