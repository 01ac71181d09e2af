"""scikit-learn's handwritten digits, and two small classifiers for them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_grad._validate import check_int, check_range
from lightning_grad.data import ResumableDataLoader

Batch = tuple[Tensor, Tensor]


def load_digits() -> Batch:
    """Return scikit-learn's 1797 digits: images ``(1797, 1, 8, 8)`` float32 in [0, 1], labels ``(1797,)`` int64."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('DigitsData needs scikit-learn: pip install "lightning-grad[demo]".') from error
    images, labels = sklearn_digits(return_X_y=True)
    return torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels).long()


class DigitsData(pl.LightningDataModule):
    """Handwritten digits of scikit-learn, 8 x 8 pixels, 10 classes; 1797 images that come with the package.

    Batches are ``(images, labels)``: ``(batch_size, 1, 8, 8)`` float32 in [0, 1] and ``(batch_size,)`` int64.
    The validation part is drawn once, from ``split_seed``; the same for every ``seed`` of the training order.

    Args:
        batch_size: Images per batch.
        val_fraction: Fraction of the images in the validation part, in (0, 1).
        seed: Seed of the order of the training images.
        split_seed: Seed of the split.
        num_workers: Worker processes of each loader.

    Raises:
        ValueError: An argument is out of range.
        ModuleNotFoundError: scikit-learn is not installed (raised by ``setup``).
    """

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.25,
        seed: int = 0,
        split_seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_int("batch_size", batch_size, 1)
        check_range("val_fraction", val_fraction, 0.0, 1.0, "()")
        check_int("seed", seed, 0)
        check_int("split_seed", split_seed, 0)
        check_int("num_workers", num_workers, 0)
        self.save_hyperparameters()
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.split_seed = split_seed
        self.num_workers = num_workers
        self.train_set: TensorDataset | None = None
        self.val_set: TensorDataset | None = None

    def setup(self, stage: str) -> None:
        """Load and split the images (once)."""
        if self.train_set is not None:
            return
        images, labels = load_digits()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.split_seed))
        num_val = min(max(1, round(self.val_fraction * len(labels))), len(labels) - 1)
        val, train = order[:num_val], order[num_val:]
        self.train_set = TensorDataset(images[train], labels[train])
        self.val_set = TensorDataset(images[val], labels[val])

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training images; the order depends on ``seed`` and the epoch, and survives a checkpoint."""
        assert self.train_set is not None, "call setup() first"
        return ResumableDataLoader(
            self.train_set,
            batch_size=self.batch_size,
            shuffle=True,
            drop_last=True,
            seed=self.seed,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation images in order."""
        assert self.val_set is not None, "call setup() first"
        # a generator of its own: otherwise each pass over the loader draws from the global random state
        return DataLoader(
            self.val_set, self.batch_size, num_workers=self.num_workers, generator=torch.Generator().manual_seed(0)
        )

    def test_dataloader(self) -> DataLoader[Any]:
        """Same as :meth:`val_dataloader`: the demos choose nothing by validation."""
        return self.val_dataloader()


class _DigitsClassifier(pl.LightningModule):
    """Losses, accuracy and logging; a subclass builds ``self.network``."""

    network: nn.Module

    def __init__(self, lr: float) -> None:
        super().__init__()
        check_range("lr", lr, 0.0, 1e10, "(]")
        self.lr = lr
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(B, 10)`` of images ``(B, 1, 8, 8)``."""
        logits: Tensor = self.network(images)
        return logits

    def sample_loss(self, batch: Batch) -> Tensor:
        """Return the cross-entropy of each image, ``(B,)``, in nats."""
        images, labels = batch
        return F.cross_entropy(self(images), labels, reduction="none")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of the batch."""
        loss = self.sample_loss(batch).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch[1]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the mean loss and the accuracy over the validation set."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the mean loss and the accuracy over the test set."""
        self._evaluate("test", batch)

    def _evaluate(self, part: str, batch: Batch) -> None:
        images, labels = batch
        logits = self(images)
        self.accuracy(logits, labels)
        size = len(labels)
        loss = F.cross_entropy(logits, labels)
        self.log(f"{part}/loss", loss, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        self.log(f"{part}/acc", self.accuracy, on_epoch=True, prog_bar=True, batch_size=size)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with torch's defaults; the command line's ``optimizer:`` replaces it."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class DigitsCNN(_DigitsClassifier):
    """Two 3 x 3 convolutions, each with ReLU and 2 x 2 max-pooling, and two linear layers.

    Args:
        channels: Channels of the first convolution; the second has twice as many.
        hidden: Units of the hidden linear layer.
        dropout: Probability of dropping a hidden unit, in [0, 1).
        lr: Learning rate of the default optimizer, AdamW; unused when an optimizer is given on the command line.

    Raises:
        ValueError: An argument is out of range.

    Logs ``train/loss`` (every step), ``val/loss``, ``val/acc``, ``test/loss``, ``test/acc``.
    """

    def __init__(self, channels: int = 16, hidden: int = 64, dropout: float = 0.0, lr: float = 1e-3) -> None:
        super().__init__(lr)
        check_int("channels", channels, 1)
        check_int("hidden", hidden, 1)
        check_range("dropout", dropout, 0.0, 1.0, "[)")
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * channels, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, 10),
        )


class DigitsMLP(_DigitsClassifier):
    """A fully connected network on the 64 pixels.

    Args:
        hidden: Units of each hidden layer.
        num_layers: Hidden layers.
        lr: Learning rate of the default optimizer, AdamW; unused when an optimizer is given on the command line.

    Raises:
        ValueError: An argument is out of range.

    Logs what :class:`DigitsCNN` logs.
    """

    def __init__(self, hidden: int = 128, num_layers: int = 2, lr: float = 1e-3) -> None:
        super().__init__(lr)
        check_int("hidden", hidden, 1)
        check_int("num_layers", num_layers, 1)
        self.save_hyperparameters()
        sizes = [64] + [hidden] * num_layers
        hidden_layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.network = nn.Sequential(nn.Flatten(), *hidden_layers, nn.Linear(hidden, 10))
