"""SGD on digits: schedules of the learning rate when the end is known, and when it is not.

    python examples/lr_schedules/compare.py [--short] [--out FOLDER]

Each schedule's rate is chosen by the validation loss of one seed at the full length; the table has three others. A run
is stopped after 4, 8 and 16 epochs. Prints the table of the README and draws compare.png (with --short: two epochs, one
rate and seed).
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_grad import CooldownLR, InverseSqrtLR, LinearDecayLR
from lightning_grad.demos import DigitsData, DigitsMLP, RecordMetrics, comparison

RATES = (0.04, 0.08, 0.16, 0.32, 0.64)
STEPS_PER_EPOCH = 21
KINDS = ("constant", "inverse sqrt", "cosine", "linear decay", "cooldown")


class Model(DigitsMLP):
    kind, total = "constant", 1

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        schedule: Any = {
            "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
            "inverse sqrt": lambda: InverseSqrtLR(optimizer, warmup=STEPS_PER_EPOCH),
            "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.total),
            "linear decay": lambda: LinearDecayLR(optimizer, total=self.total),
            "cooldown": lambda: CooldownLR(optimizer),
        }[self.kind]()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class End(pl.Callback):
    """Decides on the way that the run is to end: a fifth of its length before, a cooldown begins."""

    def __init__(self, epochs: int) -> None:
        self.total = epochs * STEPS_PER_EPOCH

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        schedule = trainer.lr_scheduler_configs[0].scheduler
        length = self.total // 5
        if isinstance(schedule, CooldownLR) and trainer.global_step == self.total - length:
            schedule.start_cooldown(length)


def train(kind: str, lr: float, seed: int, epochs: int, planned: int) -> RecordMetrics:
    """Train for ``epochs`` with a schedule made for ``planned`` epochs."""
    pl.seed_everything(seed, verbose=False)
    record, model = RecordMetrics(every_n_steps=10**9), Model(lr=lr)
    model.kind, model.total = kind, planned * STEPS_PER_EPOCH
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[record, End(epochs)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=DigitsData(seed=seed))
    return record


def main() -> None:
    short, plot = comparison(__doc__, __file__)
    ends, seeds, rates = ((1, 2), (0,), RATES[2:3]) if short else ((4, 8, 16), (11, 12, 13), RATES)
    last = ends[-1]
    started = time.perf_counter()
    print("| schedule | made for | rate | " + " | ".join(f"{n} epochs" for n in ends) + " |")
    print("|---" * (3 + len(ends)) + "|")
    drawn: dict[str, list[RecordMetrics]] = {}
    for kind in KINDS:
        trials = {lr: train(kind, lr, 9, last, last).last("val/loss") for lr in rates}
        best = min(trials, key=lambda lr: trials[lr])
        whole = [train(kind, best, seed, last, last) for seed in seeds]
        drawn[kind] = whole
        # validations come once an epoch, so a run of 16 epochs shows the shorter ones too, but for the cooldown
        stopped = [[run.curves["val/loss"][n - 1][1] for run in whole] for n in ends]
        if kind == "cooldown":
            stopped[:-1] = [[train(kind, best, s, n, n).last("val/loss") for s in seeds] for n in ends[:-1]]
        print(row(kind, "any end" if kind in ("constant", "inverse sqrt", "cooldown") else str(last), best, stopped))
        if kind == "linear decay":
            known = [[train(kind, best, s, n, n).last("val/loss") for s in seeds] for n in ends[:-1]]
            print(row(kind, "the very end", best, [*known, stopped[-1]]), flush=True)
    draw(drawn, plot)
    print(f"drawn: {plot}; {time.perf_counter() - started:.0f} s")


def row(kind: str, planned: str, lr: float, losses: list[list[float]]) -> str:
    cells = [
        f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"
        for values in losses
    ]
    return f"| {kind} | {planned} | {lr:g} | {' | '.join(cells)} |"


def draw(drawn: dict[str, list[RecordMetrics]], target: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for kind, runs in drawn.items():
        losses = torch.tensor([[loss for _, loss in run.curves["val/loss"]] for run in runs])
        epochs = range(1, losses.shape[1] + 1)
        (line,) = axes.plot(epochs, losses.mean(0), label=kind)
        axes.fill_between(epochs, losses.amin(0), losses.amax(0), color=line.get_color(), alpha=0.15)
    axes.set(xlabel="epoch", ylabel="validation loss", yscale="log")
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=90)


if __name__ == "__main__":
    main()
