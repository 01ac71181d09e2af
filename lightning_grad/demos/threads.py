"""Fewer threads for models that are too small to share."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from lightning_grad._validate import check_int


class LimitThreads(pl.Callback):
    """Let torch use at most ``num_threads`` CPU threads during ``fit``.

    A model whose operations take microseconds gains nothing from a second thread, and loses a factor when another
    process wants the core, because torch's threads wait for each other in a busy loop after every operation.

    Args:
        num_threads: CPU threads, >= 1.

    State: none.
    """

    def __init__(self, num_threads: int = 1) -> None:
        self.num_threads = check_int("num_threads", num_threads, 1)
        self._before: int | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lower the number of threads."""
        self._before = torch.get_num_threads()
        torch.set_num_threads(min(self.num_threads, self._before))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put back the number of threads."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put back the number of threads."""
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            torch.set_num_threads(self._before)
            self._before = None
