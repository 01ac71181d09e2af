"""The run that the reliability tests interrupt, and the plugins that must survive it.

A plugin joins with one line in ``CASES``: a name and what it adds to the run. Everything in a case must be made anew by
each call, because a restarted run is a new process.
"""

from __future__ import annotations

import inspect
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_grad import (
    AdaptiveBatchSize,
    BatchSizeLRScaler,
    ChecksumCheckpointIO,
    DynamicSampleAllocation,
    LanczosLearningRate,
    NoiseScale,
    NormTest,
    NVFP4Precision,
    NVFP4PrecisionSwitch,
    RandomStateCheckpoint,
    ResumableDataLoader,
    SharedSeedSPSAStrategy,
    StabilityMonitor,
)
from tests.rollout_models import RolloutRun

NUM_SAMPLES, BATCH_SIZE, CONTEXT = 22, 4, 16
STEPS_PER_EPOCH = 6  # 22 samples in batches of 4: the last batch is smaller


@dataclass(frozen=True)
class Case:
    """What a plugin adds to the run. ``expect`` may check the finished trainer, e.g. that the plugin did act."""

    name: str
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda params: torch.optim.AdamW(params, lr=1e-2)
    callbacks: Callable[[], list[pl.Callback]] = list
    trainer: Callable[[], dict[str, Any]] = dict
    model: type[pl.LightningModule] | None = None
    expect: Callable[[pl.Trainer], None] = lambda trainer: None
    loader: dict[str, Any] = field(default_factory=dict)

    def __reduce__(self) -> Any:  # into a process of its own a case travels by name, so it may hold lambdas
        return case_named, (self.name,)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


class SourceBytes(Dataset[Tensor]):
    """Windows of a source file of the Python library."""

    def __init__(self) -> None:
        text = Path(inspect.getfile(random)).read_bytes()
        self.data = torch.tensor(list(text[: NUM_SAMPLES * CONTEXT + 1]))

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index * CONTEXT : (index + 1) * CONTEXT + 1]


class SmallGPT(pl.LightningModule):
    """A byte-level transformer with dropout and a schedule that knows the total number of steps."""

    def __init__(self, case: Case, num_workers: int = 0, width: int = 16) -> None:
        super().__init__()
        self.case, self.num_workers = case, num_workers
        self.embed = nn.Embedding(256, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.2, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.block(self.embed(batch[:, :-1]), src_mask=self.mask, is_causal=True)
        return F.cross_entropy(self.head(hidden).transpose(1, 2), batch[:, 1:])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch) + torch.rand(()))  # draws a number, as some validations do

    def train_dataloader(self) -> ResumableDataLoader[Tensor]:
        return ResumableDataLoader(
            SourceBytes(), batch_size=BATCH_SIZE, shuffle=True, num_workers=self.num_workers, **self.case.loader
        )

    def val_dataloader(self) -> ResumableDataLoader[Tensor]:
        return ResumableDataLoader(SourceBytes(), batch_size=11)

    def configure_optimizers(self) -> Any:
        optimizer = self.case.optimizer(self.parameters())
        self.trainer.fit_loop.setup_data()  # as `estimated_stepping_batches` does if max_steps is not given
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _grew(trainer: pl.Trainer) -> None:
    callback = next(c for c in trainer.callbacks if isinstance(c, AdaptiveBatchSize))
    assert callback.tests > 0
    assert callback._driver is not None
    assert callback._driver.plan.batch_size > BATCH_SIZE


CASES = [
    Case("adamw"),
    Case("accumulate", trainer=lambda: {"accumulate_grad_batches": 2}),
    Case("mid_epoch_validation", trainer=lambda: {"val_check_interval": 4}),
    Case("limited_epochs", trainer=lambda: {"limit_train_batches": 4}),
    Case(
        "spsa",
        optimizer=lambda params: torch.optim.SGD(params, lr=1e-3),
        trainer=lambda: {"strategy": SharedSeedSPSAStrategy(normalize=True, forward_mode="train", momentum=0.5)},
    ),
    Case(
        "spsa_without_weights",
        optimizer=lambda params: torch.optim.SGD(params, lr=1e-3),
        trainer=lambda: {"strategy": SharedSeedSPSAStrategy(forward_mode="train", weights_in_checkpoint=False)},
    ),
    Case(
        "stability_monitor",
        callbacks=lambda: [StabilityMonitor(every_n_steps=2, k=2, num_probes=1, oscillation_steps=2)],
        trainer=lambda: {"accumulate_grad_batches": 2, "logger": CSVLogger(tempfile.mkdtemp())},
    ),
    Case(
        "lanczos_learning_rate",
        optimizer=lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.5),
        callbacks=lambda: [LanczosLearningRate(every_n_steps=3, k=10, probe="fixed", probe_batches=2, momentum="set")],
        trainer=lambda: {"accumulate_grad_batches": 2},
    ),
    Case(
        "nvfp4",
        callbacks=lambda: [NVFP4PrecisionSwitch(9)],
        trainer=lambda: {"plugins": [NVFP4Precision(keep_last=0)], "accumulate_grad_batches": 2},
    ),
    Case(
        "sample_allocation",
        model=RolloutRun,
        callbacks=lambda: [DynamicSampleAllocation(steps_per_iteration=6, save_rollouts=True, patience_empty=9)],
    ),
    Case(
        "adaptive_batch",
        callbacks=lambda: [AdaptiveBatchSize(16, NormTest(0.3), max_micro_batch_size=6, ema=0.5)],
        expect=_grew,
    ),
    Case(
        "adaptive_batch_both_ways",
        callbacks=lambda: [
            AdaptiveBatchSize(
                16,
                NoiseScale(0.25),
                max_micro_batch_size=8,
                min_batch_size=2,
                ema=0.0,
                allow_decrease=True,
                lr_scaler=BatchSizeLRScaler("gain", critical_batch="noise_scale", ramp_steps=3),
            )
        ],
    ),
    Case(
        "adaptive_batch_accumulate",
        callbacks=lambda: [AdaptiveBatchSize(16, NormTest(0.3), mode="accumulate", ema=0.5)],
        expect=_grew,
    ),
]


def fit(
    case: Case,
    folder: Path,
    *,
    steps: int,
    num_workers: int = 0,
    ckpt_path: Path | None = None,
    callbacks: tuple[pl.Callback, ...] = (),
    every: int = 1,
    seed: int = 0,
    keep: bool = False,
    **trainer: Any,
) -> dict[str, Tensor]:
    """Train to ``steps`` optimizer steps with a checkpoint every few steps, and return the final weights."""
    pl.seed_everything(seed, verbose=False)
    model = (case.model or SmallGPT)(case, num_workers)
    saver = ModelCheckpoint(
        folder, "{step}", save_last=True, every_n_train_steps=every, save_top_k=-1 if keep else 1, monitor=None
    )
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 1, "max_steps": steps, "max_epochs": -1,
    }  # fmt: skip
    extra = [RandomStateCheckpoint(), *case.callbacks(), *callbacks, saver]
    settings |= case.trainer() | trainer
    settings["plugins"] = [*settings.get("plugins", []), ChecksumCheckpointIO(require_checksum=True)]
    runner = pl.Trainer(**settings, callbacks=extra)
    if ckpt_path is not None:
        pl.seed_everything(seed + 1, verbose=False)  # a resumed process has drawn other numbers by then
        torch.rand(7)
    runner.fit(model, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    assert runner.global_step == steps
    case.expect(runner)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors whose bits differ."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
