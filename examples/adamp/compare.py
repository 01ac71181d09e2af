"""AdamP and SGDP against AdamW and SGD on digits, with a network whose weights are followed by BatchNorm.

    python examples/adamp/compare.py [--short] [--out FOLDER]

Prints the validation loss and how far the norm of the convolution weights grew, and draws compare.png (with --short:
two epochs).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_grad import SGDP, AdamP
from lightning_grad.demos import DigitsCNN, DigitsData, RecordMetrics, comparison

METHODS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamP": partial(AdamP, lr=4e-3, weight_decay=1e-2),
    "AdamW": partial(torch.optim.AdamW, lr=4e-3, weight_decay=1e-2),
    "SGDP": partial(SGDP, lr=0.1, momentum=0.9, weight_decay=1e-5),
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-4),
}


class NormalizedCNN(DigitsCNN):
    """Two convolutions with BatchNorm, so that their weights are scale invariant."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.make = make
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())

    def norm(self) -> float:
        return float(self.network[4].weight.detach().norm())


class Norms(pl.Callback):
    """The norm of the second convolution's weight after every epoch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, NormalizedCNN)
        self.values.append(pl_module.norm())


def train(make: Callable[..., torch.optim.Optimizer], seed: int, epochs: int) -> tuple[float, list[float]]:
    pl.seed_everything(seed, verbose=False)
    record, norms, model = RecordMetrics(), Norms(), NormalizedCNN(make)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[record, norms], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=DigitsData(seed=seed))
    return record.last("val/loss"), [*norms.values, model.norm()]


def main() -> None:
    import matplotlib.pyplot as plt

    short, plot = comparison(__doc__, __file__)
    epochs, seeds = (2, (0,)) if short else (10, (0, 1, 2))
    figure, axes = plt.subplots(figsize=(6, 4))
    print("| method | val/loss | norm of the second convolution, last / first |\n| --- | --- | --- |")
    for name, make in METHODS.items():
        runs = [train(make, seed, epochs) for seed in seeds]
        losses = [loss for loss, _ in runs]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        growth = statistics.mean(norms[-1] / norms[0] for _, norms in runs)
        print(f"| {name} | {statistics.mean(losses):.4f} ± {spread:.4f} | {growth:.2f} |", flush=True)
        axes.plot([value / runs[0][1][0] for value in runs[0][1]], label=name)
    axes.set(xlabel="epoch", ylabel="norm of a convolution weight / start")
    axes.legend()
    figure.tight_layout()
    figure.savefig(plot, dpi=90)


if __name__ == "__main__":
    main()
