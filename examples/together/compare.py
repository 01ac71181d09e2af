"""Kill a run that combines DiffGrad, adaptive batches and NVFP4; resume it; compare with the run that was left alone.

    python examples/together/compare.py [--short] [--out FOLDER]

Prints the table of the README and draws compare.png (with --short: a few steps).
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_grad import (
    AdaptiveBatchSize,
    DiffGrad,
    NormTest,
    NVFP4Precision,
    RandomStateCheckpoint,
    param_groups,
)
from lightning_grad.demos import RecordMetrics, SourceText, TinyGPT, comparison
from lightning_grad.demos.comparison import quiet

SIZES = {"num_layers": 2, "dim": 64, "num_heads": 4, "block_size": 64}


class Together(TinyGPT):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return DiffGrad(param_groups(self, weight_decay=0.01), lr=4e-3)


class Plain(TinyGPT):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


class Kill(pl.Callback):
    """The process ends as by `kill -9` after ``at`` optimizer steps: nothing is written, nothing is closed."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Result:
    curve: list[tuple[int, float]]  # validation loss by optimizer steps
    loss: float  # at the end
    samples: int
    weights: str  # the first digits of their SHA-256


def train(folder: Path, steps: int, together: bool = True, kill_at: int | None = None) -> Result:
    """Train, going on from the last checkpoint in ``folder`` if there is one."""
    quiet()  # in the process that is killed, too
    pl.seed_everything(0, verbose=False)
    batch = AdaptiveBatchSize(max_batch_size=32, criterion=NormTest(eta=0.5), monitor_only=not together)
    saving = ModelCheckpoint(folder, every_n_train_steps=steps // 6, save_last=True)
    record = RecordMetrics()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, check_val_every_n_epoch=None, val_check_interval=steps // 6, logger=False,
        plugins=[NVFP4Precision(keep_last=1)] if together else [],
        callbacks=[batch, RandomStateCheckpoint(), saving, record, *([Kill(kill_at)] if kill_at else [])],
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    last = folder / "last.ckpt"
    model = (Together if together else Plain)(**SIZES)
    data = SourceText(block_size=64, batch_size=8, num_val_blocks=128)
    trainer.fit(model, datamodule=data, ckpt_path=last if last.exists() else None)
    (last_values,) = trainer.validate(model, datamodule=data, verbose=False)
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values()))
    return Result(record.curves["val/loss"], last_values["val/loss"], batch.samples_seen, digest.hexdigest()[:12])


def killed_and_resumed(folder: Path, steps: int, kill_at: int) -> Result:
    """Let the run be killed in a process of its own, and go on from what it left."""
    process = multiprocessing.get_context("spawn").Process(target=train, args=(folder, steps, True, kill_at))
    process.start()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"the run ended with {process.exitcode}, it was to be killed")
    return train(folder, steps)


def main() -> None:
    short, plot = comparison(__doc__, __file__)
    steps, kill_at = (6, 3) if short else (300, 167)
    started = time.perf_counter()
    print(f"| run, {steps} steps | samples | val loss | SHA-256 of the weights |\n|---|---|---|---|")
    found: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, run in (
            ("AdamW, batch of 8, float32", lambda folder: train(folder, steps, together=False)),
            ("together", lambda folder: train(folder, steps)),
            (f"together, killed at step {kill_at}", lambda folder: killed_and_resumed(folder, steps, kill_at)),
        ):
            found[name] = run(Path(scratch) / name)
            result = found[name]
            print(f"| {name} | {result.samples} | {result.loss:.4f} | {result.weights} |", flush=True)
    _, alone, resumed = found.values()
    print("the same bits" if alone.weights == resumed.weights else "NOT the same bits")
    draw(found, plot)
    print(f"drawn: {plot}; {time.perf_counter() - started:.0f} s")


def draw(found: dict[str, Result], target: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, result), style in zip(found.items(), ("-", "-", "o"), strict=True):
        axes.plot(*zip(*result.curve, strict=True), style, label=name)
    axes.set(xlabel="optimizer steps", ylabel="validation loss")
    axes.legend()
    figure.savefig(target, dpi=100)


if __name__ == "__main__":
    main()
