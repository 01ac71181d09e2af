"""The quickstart with DiffGrad and with AdamW: same model, data, seed and length.

    python examples/quickstart/compare.py [--short] [--out FOLDER]

Prints the table of the README and draws compare.png (with --short: a few steps).
"""

from __future__ import annotations

from pathlib import Path

from lightning_grad.cli import LightningGradCLI
from lightning_grad.demos import RecordMetrics, comparison

HERE = Path(__file__).parent
# where gradients change by much less than 1, as here, DiffGrad is Adam at half the learning rate
VARIANTS = {"DiffGrad": 4e-3, "AdamW": 2e-3}


def train(optimizer: str, lr: float, short: bool) -> RecordMetrics:
    args = ["fit", "-c", str(HERE / "config.yaml"), f"--optimizer={optimizer}", f"--optimizer.lr={lr}"]
    args += ["--trainer.logger=false", "--trainer.callbacks=lightning_grad.demos.RecordMetrics"]
    args += ["--trainer.enable_checkpointing=false", "--trainer.enable_model_summary=false"]
    if short:
        args += ["--trainer.limit_train_batches=4", "--trainer.val_check_interval=2", "--data.num_val_blocks=16"]
        args += ["--trainer.enable_progress_bar=false", "--model.num_layers=1"]
    cli = LightningGradCLI(args=args)
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, RecordMetrics))


def main() -> None:
    import matplotlib.pyplot as plt

    short, plot = comparison(__doc__, __file__)
    figure, axes = plt.subplots(figsize=(6, 4))
    rows = []
    for optimizer, lr in VARIANTS.items():
        record = train(optimizer, lr, short)
        curve = record.curves["val/loss"]
        axes.plot(*zip(*curve, strict=True), "o-", label=f"{optimizer}, lr {lr:g}")
        rows.append((optimizer, lr, curve))
    print("\n| optimizer | lr | " + " | ".join(f"step {step}" for step, _ in rows[0][2]) + " |")
    print("|---|---|" + "---|" * len(rows[0][2]))
    for optimizer, lr, curve in rows:
        print(f"| {optimizer} | {lr:g} | " + " | ".join(f"{value:.3f}" for _, value in curve) + " |")
    axes.set(xlabel="step", ylabel="validation loss (nats per byte)")
    axes.legend()
    figure.savefig(plot, dpi=100, bbox_inches="tight")
    print(f"drawn: {plot}")


if __name__ == "__main__":
    main()
