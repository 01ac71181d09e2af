"""MiniLM on docstrings with forward passes only: one worker, four workers that exchange bytes; and backpropagation.

    python examples/spsa_minilm/compare.py [--short] [--out FOLDER]

Prints the table of the README and draws compare.png (with --short: a few steps).
"""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_grad import SharedSeedSPSAStrategy
from lightning_grad.demos import DocstringData, MiniLMSentences, comparison

HERE = Path(__file__).parent
TRAINABLE = ["upper.*.bias", "upper.*LayerNorm.weight"]


class Decaying(MiniLMSentences):
    """Linear decay to zero over the run."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        steps = max(int(self.trainer.max_steps), 1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 / steps, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Backpropagation(MiniLMSentences):
    """Adam on the last layer."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.upper[-1].requires_grad_(True).parameters(), lr=1e-4)


class Curve(pl.Callback):
    """Validation figures by number of forward passes, written by rank 0."""

    def __init__(self, path: Path, forwards_per_step: int) -> None:
        self.path, self.factor, self.rows = path, forwards_per_step, []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        self.rows.append((trainer.global_step * self.factor, float(metrics["val/loss"]), float(metrics["val/acc"])))
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(self.rows))


def train(workers: int, steps: int, seed: int, every: int, sizes: dict[str, int]) -> list[tuple[int, float, float]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curve.json"
        pl.seed_everything(seed, verbose=False)
        trainer = pl.Trainer(
            strategy=SharedSeedSPSAStrategy(
                normalize=True,
                seed=seed,
                trainable=TRAINABLE,
                reduction="sum",
                check_interval=1,
                start_method="fork",
            ),
            accelerator="cpu",
            devices=workers,
            max_steps=steps,
            max_epochs=-1,
            val_check_interval=every,
            check_val_every_n_epoch=None,
            callbacks=[Curve(path, 2 * workers)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=-1,
        )
        trainer.fit(Decaying(), datamodule=DocstringData(seed=0, **sizes))
        rows: list[tuple[int, float, float]] = json.loads(path.read_text())
        return rows


def backpropagate(steps: int, sizes: dict[str, int]) -> tuple[float, float]:
    """Validation loss and accuracy."""
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    model, data = Backpropagation(), DocstringData(seed=0, **sizes)
    trainer.fit(model, datamodule=data)
    trainer.limit_val_batches = 1.0
    (metrics,) = trainer.validate(model, datamodule=data, verbose=False)
    return metrics["val/loss"], metrics["val/acc"]


def main() -> None:
    import matplotlib.pyplot as plt

    short, plot = comparison(__doc__, __file__)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sizes = {"num_train": 64, "num_val": 32} if short else {}
    runs = {"1 worker": (1, 2, 1)} if short else {"1 worker": (1, 200, 50), "4 workers, sum": (4, 50, 12)}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    print(f"{'run':16s} {'forwards':>8s} {'val/loss':>9s} {'val/acc':>8s} {'seconds':>8s}")
    for name, (workers, steps, every) in runs.items():
        start = time.perf_counter()
        rows = train(workers, steps, 1, every, sizes)
        print(f"{name:16s} {rows[-1][0]:8d} {rows[-1][1]:9.3f} {rows[-1][2]:8.3f} {time.perf_counter() - start:8.0f}")
        for axis, column in zip(axes, (1, 2), strict=True):
            axis.plot([row[0] for row in rows], [row[column] for row in rows], "o-", label=name)
    print(f"{'before training':16s} {0:8d} {rows[0][1]:9.3f} {rows[0][2]:8.3f}")
    start, (loss, accuracy) = time.perf_counter(), backpropagate(2 if short else 60, sizes)
    print(f"{'backpropagation':16s} {'':8s} {loss:9.3f} {accuracy:8.3f} {time.perf_counter() - start:8.0f}")
    for axis, title in zip(axes, ("validation loss", "validation accuracy"), strict=True):
        axis.set(xlabel="forward passes of all workers", title=title)
        axis.legend()
    figure.tight_layout()
    figure.savefig(plot, dpi=110)


if __name__ == "__main__":
    main()
