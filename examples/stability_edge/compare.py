"""Gradient descent on digits at the edge of stability: sharpness against 2/lr, full batch and small batch.

    python examples/stability_edge/compare.py [--short] [--out FOLDER]

Prints the table of the README and draws compare.png (with --short: 11 steps of two runs).
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_grad import StabilityMonitor
from lightning_grad.demos import DigitsData, DigitsMLP, RecordLogger, RecordMetrics, comparison
from lightning_grad.statistics.curvature import HessianOperator, rademacher
from lightning_grad.statistics.curvature_lanczos import lanczos

WHOLE, SMALL, EVERY = 1348, 32, 10
RUNS = ((WHOLE, 0.1), (WHOLE, 0.2), (WHOLE, 0.4), (SMALL, 0.2))


class Model(DigitsMLP):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class WholeSharpness(pl.Callback):
    """The largest eigenvalue on the whole training set, which a monitor on a small batch does not see."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % EVERY:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        whole = data.train_set.tensors
        params = list(pl_module.parameters())
        with HessianOperator(lambda: pl_module.sample_loss(whole).mean(), params, module=pl_module) as hessian:
            run = lanczos(hessian, rademacher(hessian.size, trainer.global_step), 10)
        assert trainer.logger is not None
        trainer.logger.log_metrics({"whole": float(run.ritz()[0][-1])}, step=trainer.global_step)


def train(batch: int, lr: float, seed: int, steps: int) -> tuple[RecordLogger, RecordMetrics]:
    pl.seed_everything(seed, verbose=False)
    record, metrics = RecordLogger(), RecordMetrics()
    monitor = StabilityMonitor(every_n_steps=EVERY, num_probes=1, batch_sharpness_batches=1 if batch == WHOLE else 8)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=[monitor, metrics, *([WholeSharpness()] if batch != WHOLE else [])],
        logger=record,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(Model(lr=lr), datamodule=DigitsData(batch_size=batch, seed=seed))
    if batch == WHOLE:
        record.curves["whole"] = record.curves["stability/lambda_max"]
    return record, metrics


def main() -> None:
    short, plot = comparison(__doc__, __file__)
    steps, seeds, runs = (11, (0,), RUNS[2:]) if short else (250, (0, 1, 2), RUNS)
    started = time.perf_counter()
    print("| batch | lr | 2/lr | sharpness at step 0 | peak over 2/lr | last fifth over 2/lr | batch sharpness, same |")
    print("|---|---|---|---|---|---|---|")
    drawn: dict[tuple[int, float], Any] = {}
    for batch, lr in runs:
        found = [train(batch, lr, seed, steps) for seed in seeds]
        drawn[batch, lr] = found[0]
        curves = [[value for _, value in record.curves["whole"]] for record, _ in found]
        own = [[value for _, value in record.curves["stability/batch_sharpness"]] for record, _ in found]
        late = max(1, len(curves[0]) // 5)
        cells = [
            mean_and_spread([curve[0] for curve in curves], 2),
            mean_and_spread([max(curve) * lr / 2 for curve in curves], 2),
            mean_and_spread([statistics.mean(curve[-late:]) * lr / 2 for curve in curves], 2),
            mean_and_spread([statistics.mean(curve[-late:]) * lr / 2 for curve in own], 2),
        ]
        print(f"| {batch} | {lr:g} | {2 / lr:g} | {' | '.join(cells)} |", flush=True)
    draw(drawn, plot)
    print(f"drawn: {plot}; {time.perf_counter() - started:.0f} s")


def mean_and_spread(values: list[float], digits: int) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def draw(drawn: dict[tuple[int, float], Any], target: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for color, ((batch, lr), (record, metrics)) in enumerate(drawn.items()):
        points = record.curves["whole"]
        label = f"batch {batch}, lr {lr:g}"
        axes[0].plot([s for s, _ in points], [v for _, v in points], color=f"C{color}", label=label)
        if batch == WHOLE:
            axes[0].axhline(2 / lr, ls="--", color=f"C{color}", lw=1)
        axes[1].plot(*zip(*metrics.curves["train/loss"], strict=True), color=f"C{color}", lw=1, label=label)
    axes[0].set(xlabel="step", ylabel="sharpness; dashed: 2/lr", yscale="log")
    axes[1].set(xlabel="step", ylabel="training loss of the batch", yscale="log")
    axes[0].legend(fontsize=8)
    figure.savefig(target, dpi=90)


if __name__ == "__main__":
    main()
