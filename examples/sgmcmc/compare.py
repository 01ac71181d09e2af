"""Predictions on digits from one network, and from posterior samples of SGHMC: accuracy and calibration.

    python examples/sgmcmc/compare.py [--short] [--out FOLDER]

The training set is cut to 300 images, so that one network is too sure of itself. Prints the table of the README and
draws compare.png (with --short: few steps).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad import SGHMC, BindDataSize, PosteriorSamples
from lightning_grad.demos import DigitsCNN, DigitsData, comparison


class Model(DigitsCNN):
    def __init__(self, make: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())


def data(size: int = 300) -> tuple[TensorDataset, Tensor, Tensor]:
    digits = DigitsData()
    digits.setup("fit")
    train = next(iter(DataLoader(digits.train_set, batch_size=size)))
    images, labels = next(iter(DataLoader(digits.val_set, batch_size=10_000)))
    return TensorDataset(*train), images, labels


def scores(probabilities: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Accuracy, negative log likelihood, and expected calibration error in 10 bins of confidence."""
    confidence, guess = probabilities.max(1)
    right = (guess == labels).float()
    nll = -probabilities.gather(1, labels[:, None]).clamp_min(1e-12).log().mean()
    bins = (confidence * 10).long().clamp_max(9)
    gaps = [(bins == b).float().mean() * (right[bins == b].mean() - confidence[bins == b].mean()).abs()
            for b in bins.unique()]  # fmt: skip
    return right.mean().item(), nll.item(), torch.stack(gaps).sum().item()


def train(
    make: Callable[..., torch.optim.Optimizer], train_set: TensorDataset, steps: int, samples: PosteriorSamples
) -> Model:
    pl.seed_everything(0, verbose=False)
    model = Model(make)
    loader = DataLoader(train_set, batch_size=50, shuffle=True, generator=torch.Generator().manual_seed(0))
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=[BindDataSize(), samples], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, loader)
    return model.eval()


@torch.no_grad()
def predict(model: Model, images: Tensor) -> Tensor:
    return model(images).softmax(1)


def main() -> None:
    import matplotlib.pyplot as plt

    short, plot = comparison(__doc__, __file__)
    steps, burn_in = (40, 20) if short else (3000, 1000)
    train_set, images, labels = data()
    print("| prediction | accuracy | log loss | calibration error |\n| --- | --- | --- | --- |")
    confidence = {}
    for name, make in {
        "AdamW, one network": partial(torch.optim.AdamW, lr=2e-3),
        "SGHMC, temperature 0.02": partial(SGHMC, lr=0.05, friction=0.1, weight_decay=1e-3, temperature=0.02, seed=0),
        "SGHMC, temperature 1": partial(SGHMC, lr=0.02, friction=0.1, weight_decay=1e-3, seed=0),
    }.items():
        samples = PosteriorSamples(burn_in_steps=burn_in, every_n_steps=10 if short else 50)
        model = train(make, train_set, steps, samples)
        if name.startswith("SGHMC"):
            probabilities = samples.predict(model, partial(predict, model, images)).mean(0)
            name = f"{name}, {len(samples)} samples"
        else:
            probabilities = predict(model, images)
        accuracy, nll, error = scores(probabilities, labels)
        print(f"| {name} | {accuracy:.4f} | {nll:.4f} | {error:.4f} |", flush=True)
        confidence[name] = probabilities.max(1).values.numpy()
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.hist(list(confidence.values()), bins=10, range=(0, 1), label=list(confidence))
    axes.set(xlabel="confidence", ylabel="validation images", yscale="log")
    figure.legend(loc="outside upper left", fontsize=8)
    figure.savefig(plot, dpi=90)


if __name__ == "__main__":
    main()
