"""SGD on digits: the best of a grid of constant rates next to LanczosLearningRate, constant and with linear decay.

    python examples/lanczos_lr/compare.py [--short] [--long] [--momentum BETA] [--out FOLDER]

The rate of the grid is chosen by the validation loss of one seed; the table has three others. Prints the table of the
README and draws compare.png (with --short: one epoch, rate and seed). --long: forty epochs, the rate 0.16 against
intervals and numbers of products. --momentum: another than 0.9; no picture.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_grad import LanczosLearningRate, LinearDecayLR
from lightning_grad.demos import DigitsData, DigitsMLP, RecordLogger, RecordMetrics
from lightning_grad.demos.comparison import comparison_parser, parse_comparison

RATES = (0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
PLAIN = {"max_growth": None, "early": False, "smooth_falls": True}
KINDS: dict[str, dict[str, Any] | None] = {
    "best of the grid": None,
    "LanczosLearningRate, defaults": {},
    "LanczosLearningRate, every 20 steps": {"every_n_steps": 20},
    "LanczosLearningRate, without safeguards": PLAIN,
}
LONG: dict[str, dict[str, Any] | None] = {
    "rate 0.16": None,
    "LanczosLearningRate, defaults": {},
    "LanczosLearningRate, every 500 steps": {"every_n_steps": 500},
    "LanczosLearningRate, k 10": {"k": 10},
}


class Model(DigitsMLP):
    decay = False
    momentum = 0.9

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)
        if not self.decay:
            return optimizer
        schedule = LinearDecayLR(optimizer, total=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(settings: dict[str, Any] | None, lr: float, decay: bool, seed: int, epochs: int) -> tuple[float, Any]:
    pl.seed_everything(seed, verbose=False)
    metrics, curvature, model = RecordMetrics(), RecordLogger(), Model(lr=lr)
    model.decay = decay
    own = [] if settings is None else [LanczosLearningRate(**settings)]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[metrics, *own],
        logger=curvature,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=DigitsData(seed=seed))
    return metrics.last("val/loss"), curvature.curves


def main() -> None:
    parser = comparison_parser(__doc__)
    parser.add_argument("--long", action="store_true", help="forty epochs, another table and no picture")
    parser.add_argument("--momentum", type=float, default=0.9, help="of SGD")
    options = parse_comparison(parser, __file__)
    Model.momentum = options.momentum
    short, plot = options.short, options.plot
    epochs, seeds, rates = (1, (0,), RATES[3:4]) if short else (10, (11, 12, 13), RATES)
    started = time.perf_counter()
    if options.long:
        table(LONG, [0.16, 0.16], (11, 12, 13), 40)
        return
    grid = [[train(None, lr, decay, 9, epochs)[0] for lr in rates] for decay in (False, True)]
    best = [rates[losses.index(min(losses))] for losses in grid]
    print(f"| constant rate, seed 9 | {' | '.join(map(str, rates))} |\n{'| --- ' * (len(rates) + 1)}|")
    for label, losses in zip(("constant", "linear decay"), grid, strict=True):
        print(f"| {label} | {' | '.join(f'{loss:.3f}' for loss in losses)} |")
    print()
    means, curves = table(KINDS, best, seeds, epochs)
    if options.momentum == 0.9:
        draw(rates, grid, means, curves, plot)
        print(f"drawn: {plot}; {time.perf_counter() - started:.0f} s")


def table(
    kinds: dict[str, dict[str, Any] | None], best: list[float], seeds: tuple[int, ...], epochs: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Print a row for each kind; return the means, and the curves of the first run of each."""
    print("| learning rate | constant | linear decay |\n| --- | --- | --- |")
    means: dict[str, list[float]] = {}
    curves: dict[str, Any] = {}
    for name, settings in kinds.items():
        cells = []
        for decay in (False, True):
            lr = best[decay] if settings is None else 1.0
            runs = [train(settings, lr, decay, seed, epochs) for seed in seeds]
            curves.setdefault(name, runs[0][1])
            losses = [loss for loss, _ in runs]
            means.setdefault(name, []).append(statistics.mean(losses))
            spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
            cells.append(f"{means[name][-1]:.3f} ± {spread:.3f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return means, curves


def draw(
    rates: tuple[float, ...], grid: list[list[float]], means: dict[str, list[float]], curves: dict[str, Any], file: Path
) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    names = list(KINDS)[1:]
    for i, (label, style) in enumerate((("constant", "--"), ("linear decay", "-"))):
        axes[0].loglog(rates, grid[i], style, marker="o", color="k", label=f"grid, {label}")
        for color, name in enumerate(names):
            axes[0].axhline(means[name][i], ls=style, color=f"C{color}")
    axes[0].set(xlabel="learning rate", ylabel="validation loss after 10 epochs")
    axes[0].set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
    axes[0].set_xticks([], minor=True)
    axes[0].legend(fontsize=8)
    for color, name in enumerate(names):
        for panel, tag in ((axes[1], "curvature/lr_applied"), (axes[2], "curvature/lambda_max")):
            points = curves[name].get(tag, [])
            panel.plot([s + 1 for s, _ in points], [v for _, v in points], ".-", color=f"C{color}", label=name)
    axes[1].set(xlabel="step + 1 (first seed, constant)", ylabel="learning rate", xscale="log", yscale="log")
    axes[2].set(xlabel="step + 1", ylabel="largest eigenvalue", xscale="log", yscale="log")
    axes[1].legend(fontsize=8)
    figure.savefig(file, dpi=90)


if __name__ == "__main__":
    main()
