"""Carry the global random states and, where Lightning drops it, the data position through a checkpoint."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_grad._lightning import replace_method
from lightning_grad.data import ResumableDataLoader


class RandomStateCheckpoint(pl.Callback):
    """Make a resumed run draw the random numbers the uninterrupted run would have drawn.

    Saves the states of torch (CPU, and the process's CUDA device), Python's ``random`` and numpy's global generator, of
    every process, and restores them in ``on_train_start``: making the data iterator before that may draw numbers.

    Exact resume also needs a loader that remembers its position: :class:`lightning_grad.ResumableDataLoader`. To those
    the callback hands their position once more, because Lightning forgets it when ``estimated_stepping_batches`` is
    read in ``configure_optimizers`` (its issue 20550), and because a checkpoint written on an exception counts the
    batch that failed as done; it is trained on again. Lightning's count of epochs is mended where a resume at the last
    batch of an epoch leaves it one behind.

    Args:
        isolate_validation: Let validation during training leave no trace in the random states. A checkpoint written at
            the batch before a validation is resumed by Lightning after it, without running it, so a validation that
            draws numbers (the iterator of a plain ``DataLoader`` does) would make the resumed run differ.

    State: ``version`` and ``ranks``, a list of one dict per process with ``torch``, ``python``, ``numpy`` and, on a
    GPU, ``cuda``. All plain types.
    """

    def __init__(self, isolate_validation: bool = True) -> None:
        self.isolate_validation = isolate_validation
        self._before_validation: dict[str, Any] | None = None
        self._undo: Callable[[], None] | None = None
        self._pending: dict[str, Any] | None = None
        self._positions: list[dict[str, Any]] = []
        self._batch_failed = False
        self._device: torch.device | None = None

    @property
    @override
    def state_key(self) -> str:
        return "RandomStateCheckpoint"

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device

    @override
    def state_dict(self) -> dict[str, Any]:
        # Lightning calls this on every process when it saves, so the exchange below is a collective of all of them
        # a run resumed from a checkpoint that is written during a validation does not validate again
        own = self._before_validation or _random_states(self._device)
        ranks = [own]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            ranks = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(ranks, own)
        return {"version": 1, "ranks": ranks}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("version") != 1:
            raise ValueError(
                f"RandomStateCheckpoint: the saved state has version {state_dict.get('version')!r}, this release reads"
                " 1. Resume with the release that wrote it, or leave the callback out."
            )
        self._pending = state_dict

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        self._positions = loop.get("state_dict", {}).get("combined_loader", [])
        batches = loop.get("epoch_loop.batch_progress", {}).get("current", {})
        self._batch_failed = bool(batches) and batches["processed"] < batches["ready"]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.train_dataloader is not None:
            plain = [x for x in CombinedLoader(trainer.train_dataloader).flattened if not hasattr(x, "state_dict")]
            if plain:
                rank_zero_info(
                    f"RandomStateCheckpoint: {type(plain[0]).__name__} keeps no position, so resume is exact at"
                    " the end of an epoch only. lightning_grad.ResumableDataLoader makes it exact at every step."
                )
        self._restore_positions(trainer)
        self._restore_pending(trainer)
        self._release()
        if self.isolate_validation:
            self._isolate(trainer)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pending = None

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Resumed at the last batch of an epoch, Lightning forgets to count the epoch that begins, and a checkpoint at
        # the end of that one would be taken for something else.
        progress: Any = trainer.fit_loop.epoch_progress
        if progress.current.started == progress.current.processed:
            progress.increment_ready()
            progress.increment_started()
        if self._pending is not None:
            # Resumed at the last batch of an epoch, Lightning makes the iterator of the validation that it leaves out.
            # It calls no on_train_epoch_start then, so no hook of the user can have drawn in between.
            self._restore_pending(trainer)
            self._pending = None

    def _restore_pending(self, trainer: pl.Trainer) -> None:
        if self._pending is None:
            return
        ranks = self._pending["ranks"]
        if len(ranks) != trainer.world_size:
            rank_zero_warn(
                f"RandomStateCheckpoint: the checkpoint holds the random states of {len(ranks)} processes, this run has"
                f" {trainer.world_size}; they are not restored, so the run is not the one that was interrupted."
            )
            self._pending = None
            return
        _restore(ranks[trainer.global_rank], self._device)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def _isolate(self, trainer: pl.Trainer) -> None:
        # Every hook is too early or too late: on_train_batch_end of others may draw after ours, and in
        # on_validation_start the loader's iterator exists already.
        loop = trainer.fit_loop.epoch_loop.val_loop
        run = loop.run

        @functools.wraps(run)
        def isolated() -> Any:
            self._before_validation = _random_states(self._device)
            try:
                return run()
            finally:
                states, self._before_validation = self._before_validation, None
                _restore(states, self._device)

        self._undo = replace_method(loop, "run", isolated)

    def _restore_positions(self, trainer: pl.Trainer) -> None:
        positions, self._positions = self._positions, []
        if not positions or trainer.train_dataloader is None:
            return
        loaders = [
            loader
            for loader in CombinedLoader(trainer.train_dataloader).flattened
            if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        ]
        if len(loaders) != len(positions):
            return  # Lightning has said so already
        for loader, position in zip(loaders, positions, strict=True):
            if isinstance(loader, ResumableDataLoader):
                # harmless if Lightning did it: no batch has been drawn yet
                loader.load_state_dict(_one_back(position, len(loader)) if self._batch_failed else position)


def _one_back(position: dict[str, Any], length: int) -> dict[str, Any]:
    """The position before the batch that was delivered last; of several loaders each has its own."""
    if "batches" not in position:
        return position
    if position["batches"]:
        return position | {"batches": position["batches"] - 1}
    return position | {"epoch": position["epoch"] - 1, "batches": length - 1}  # it was the last of its epoch


def _random_states(device: torch.device | None) -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = cast("tuple[str, Any, int, int, float]", np.random.get_state(legacy=True))
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
    }
    if device is not None and device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore(states: dict[str, Any], device: torch.device | None) -> None:
    torch.set_rng_state(states["torch"].cpu())
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in states and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
