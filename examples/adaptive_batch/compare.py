"""DigitsCNN with Adagrad: a small batch, a large batch, and batches that grow by the norm test.

    python examples/adaptive_batch/compare.py [--short]

Prints the table of the README and draws compare.png (with --short: two epochs, drawn into the working directory).
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_grad import AdaptiveBatchSize, BatchSizeLRScaler, NormTest
from lightning_grad.demos import DigitsCNN, DigitsData

HERE = Path(__file__).parent
SMALL, LARGE = 16, 256
RATES = (1e-2, 4e-2)


class Model(DigitsCNN):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(self.parameters(), lr=self.lr)


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
        scaler = BatchSizeLRScaler("linear")
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
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="two epochs, to see that everything works")
    short = parser.parse_args().short
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*samples_seen.*")
    epochs, seeds = (2, (0,)) if short else (12, (0, 1))
    torch.set_num_threads(1)  # the network is too small to share
    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    print(f"| batch | lr | steps | val loss after {epochs} epochs | val accuracy | last batch |")
    print("|---|---|---|---|---|---|")
    for kind in (f"fixed {SMALL}", f"fixed {LARGE}", "adaptive", "AdAdaGrad as published"):
        runs = {lr: [train(kind, lr, seed, epochs) for seed in seeds] for lr in RATES}
        chosen = min(runs, key=lambda lr: sum(curve.points[-1][2] for curve in runs[lr]))
        curves = runs[chosen]
        ends = [curve.points[-1] for curve in curves]
        columns = [statistics.mean(end[i] for end in ends) for i in (1, 2, 3)]
        spread = [statistics.stdev(end[i] for end in ends) if len(ends) > 1 else 0.0 for i in (2, 3)]
        last = statistics.mean(curve.sizes[-1][1] for curve in curves)
        print(
            f"| {kind} | {chosen:g} | {columns[0]:.0f} | {columns[1]:.4f} ± {spread[0]:.4f} |"
            f" {columns[2]:.4f} ± {spread[1]:.4f} | {last:.0f} |",
            flush=True,
        )
        samples, steps, losses, _ = zip(*curves[0].points, strict=True)
        axes[0].plot(samples, losses, label=kind)
        axes[1].plot(steps, losses, label=kind)
        axes[2].plot(*zip(*curves[0].sizes, strict=True), label=kind)
    axes[0].set(xlabel="samples", ylabel="validation loss", yscale="log")
    axes[1].set(xlabel="optimizer steps", ylabel="validation loss", yscale="log", xscale="log")
    axes[2].set(xlabel="samples", ylabel="batch size", yscale="log")
    for panel in axes:
        panel.legend()
    target = Path("compare.png") if short else HERE / "compare.png"
    figure.savefig(target, dpi=100, bbox_inches="tight")
    print(f"drawn: {target}")


if __name__ == "__main__":
    main()
