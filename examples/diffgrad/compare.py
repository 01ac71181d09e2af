"""DigitsCNN with DiffGrad, AdamW and SGD: a learning-rate grid for each, several seeds.

    python examples/diffgrad/compare.py [--short] [--out FOLDER]

Prints the tables of the README and draws compare.png (with --short: two epochs).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_grad import DiffGrad
from lightning_grad.demos import DigitsCNN, DigitsData, RecordMetrics, comparison

HERE = Path(__file__).parent
ADAPTIVE = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
METHODS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[float, ...]]] = {
    "DiffGrad": (DiffGrad, ADAPTIVE),
    "AdamW": (torch.optim.AdamW, ADAPTIVE),
    "SGD, momentum 0.9": (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), (0.02, 0.04, 0.08, 0.16)),
    "SGD": (torch.optim.SGD, (0.08, 0.16, 0.32, 0.64)),
}


class Model(DigitsCNN):
    make: Callable[..., torch.optim.Optimizer]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters(), lr=self.lr)


def train(make: Callable[..., torch.optim.Optimizer], lr: float, seed: int, epochs: int) -> RecordMetrics:
    record = RecordMetrics()
    pl.seed_everything(seed, verbose=False)
    model = Model(lr=lr)
    model.make = make
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[record],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=DigitsData(seed=seed))
    return record


def mean_and_spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {spread:.4f}"


def main() -> None:
    import matplotlib.pyplot as plt

    short, plot = comparison(__doc__, __file__)
    epochs, seeds = (2, (0,)) if short else (10, (0, 1, 2))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    grid, best = [], []
    for name, (make, rates) in METHODS.items():
        runs = {lr: [train(make, lr, seed, epochs) for seed in seeds] for lr in (rates[1:3] if short else rates)}
        losses = {lr: statistics.mean(r.last("val/loss") for r in records) for lr, records in runs.items()}
        grid.append((name, losses))
        chosen = min(losses, key=lambda lr: losses[lr])
        records = runs[chosen]
        best.append((name, chosen, records))
        axes[0].plot(list(losses), list(losses.values()), "o-", label=name)
        curves = [r.curves["val/loss"] for r in records]
        mean = [(points[0][0], statistics.mean(v for _, v in points)) for points in zip(*curves, strict=True)]
        axes[1].plot(*zip(*mean, strict=True), label=f"{name}, lr {chosen:g}")
        print(f"{name}: " + ", ".join(f"lr {lr:g}: {loss:.4f}" for lr, loss in losses.items()), flush=True)
    print(
        f"\n| optimizer | best lr | val loss after {epochs} epochs | val accuracy | train loss |\n|---|---|---|---|---|"
    )
    for name, chosen, records in best:
        # the training loss of one batch says little: the mean over the last epoch
        train_loss = [statistics.mean(v for _, v in r.curves["train/loss"][-21:]) for r in records]
        columns = [[r.last("val/loss") for r in records], [r.last("val/acc") for r in records], train_loss]
        print(f"| {name} | {chosen:g} | " + " | ".join(map(mean_and_spread, columns)) + " |")
    axes[0].set(xlabel="learning rate", ylabel="validation loss at the end", xscale="log", yscale="log")
    axes[1].set(xlabel="step", ylabel="validation loss", yscale="log")
    for panel in axes:
        panel.legend()
    figure.savefig(plot, dpi=100, bbox_inches="tight")
    print(f"drawn: {plot}")


if __name__ == "__main__":
    main()
