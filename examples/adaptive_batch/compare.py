"""DigitsCNN with Adagrad: a small batch, a large batch, and batches that grow by the norm test.

    python examples/adaptive_batch/compare.py [--short] [--out FOLDER]

For each, the learning rate with the best validation loss on one seed is then run on three others. Prints the table of
the README and draws compare.png (with --short: one epoch, rate and seed).
"""

from __future__ import annotations

import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_grad import AdaptiveBatchSize, BatchSizeLRScaler, NormTest, SamplesLR
from lightning_grad.demos import DigitsCNN, DigitsData, comparison

HERE = Path(__file__).parent
SMALL, LARGE = 16, 256
RATES = (2e-2, 4e-2, 8e-2, 1.6e-1)
KINDS = (f"fixed {SMALL}", f"fixed {LARGE}", "adaptive", "AdAdaGrad as published")


class Model(DigitsCNN):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adagrad(self.parameters(), lr=self.lr)
        schedule = SamplesLR(optimizer, base="cosine", warmup_samples=1344, final=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Curve(pl.Callback):
    """Loss and accuracy on the validation set against samples seen and optimizer steps."""

    def __init__(self, adaptive: AdaptiveBatchSize) -> None:
        self.adaptive = adaptive
        self.points: list[tuple[int, int, float, float]] = []
        self.sizes: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        size = int(trainer.callback_metrics.get("batching/batch_size", 0))
        self.sizes.append((self.adaptive.samples_seen, size))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        point = (float(metrics["val/loss"]), float(metrics["val/acc"]))
        self.points.append((self.adaptive.samples_seen, trainer.global_step, *point))


def callback_for(kind: str) -> AdaptiveBatchSize:
    rule = NormTest(eta=0.5)
    if kind == "adaptive":
        scaler = BatchSizeLRScaler("sqrt")
        return AdaptiveBatchSize(LARGE, rule, max_micro_batch_size=LARGE, warmup_steps=84, lr_scaler=scaler)
    if kind == "AdAdaGrad as published":
        return AdaptiveBatchSize(LARGE, rule, max_micro_batch_size=LARGE, preset="paper")
    return AdaptiveBatchSize(LARGE, rule, monitor_only=True)


def train(kind: str, lr: float, seed: int, epochs: int) -> Curve:
    callback = callback_for(kind)
    pl.seed_everything(seed, verbose=False)
    curve = Curve(callback)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[callback, curve],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    batch = LARGE if kind == f"fixed {LARGE}" else SMALL
    trainer.fit(Model(lr=lr), datamodule=DigitsData(batch_size=batch, seed=seed))
    return curve


def main() -> None:
    short, plot = comparison(__doc__, __file__)
    warnings.filterwarnings("ignore", message=".*samples_seen.*")
    epochs, seeds, rates = (1, (0,), RATES[2:3]) if short else (8, (2, 3, 4), RATES)
    torch.set_num_threads(1)  # the network is too small to share
    started = time.perf_counter()
    print(f"| batch | lr | steps | val loss after {epochs} epochs | val accuracy | last batch |")
    print("|---|---|---|---|---|---|")
    found: dict[str, list[Curve]] = {}
    for kind in KINDS:
        trials = {lr: train(kind, lr, 0, epochs).points[-1][2] for lr in rates}
        chosen = min(trials, key=lambda lr: trials[lr])
        found[kind] = [train(kind, chosen, seed, epochs) for seed in seeds]
        print(row(kind, chosen, found[kind]), flush=True)
    draw(found, plot)
    print(f"drawn: {plot}; {time.perf_counter() - started:.0f} s")


def row(kind: str, lr: float, curves: list[Curve]) -> str:
    ends = [curve.points[-1] for curve in curves]
    steps, loss, accuracy = (statistics.mean(end[i] for end in ends) for i in (1, 2, 3))
    spread = [statistics.stdev(end[i] for end in ends) if len(ends) > 1 else 0.0 for i in (2, 3)]
    last = statistics.mean(curve.sizes[-1][1] for curve in curves)
    return (
        f"| {kind} | {lr:g} | {steps:.0f} | {loss:.3f} ± {spread[0]:.3f} | {accuracy:.3f} ± {spread[1]:.3f} |"
        f" {last:.0f} |"
    )


def draw(found: dict[str, list[Curve]], target: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for kind, curves in found.items():
        points = torch.tensor([curve.points for curve in curves], dtype=torch.float64)  # seed, epoch, quantity
        samples, steps, losses = points[0, :, 0], points[:, :, 1].mean(0), points[:, :, 2]
        for panel, x in ((axes[0], samples), (axes[1], steps)):
            (line,) = panel.plot(x, losses.mean(0), label=kind)
            panel.fill_between(x, losses.amin(0), losses.amax(0), color=line.get_color(), alpha=0.15)
        axes[2].plot(*zip(*curves[0].sizes, strict=True))
    axes[0].set(xlabel="samples", ylabel="validation loss", yscale="log")
    axes[1].set(xlabel="optimizer steps", ylabel="validation loss", yscale="log", xscale="log")
    axes[2].set(xlabel="samples (first seed)", ylabel="batch size", yscale="log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(found))
    figure.savefig(target, dpi=100)


if __name__ == "__main__":
    main()
