"""Models and plugins for the tests of the command line."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class TinyData(LightningDataModule):
    def __init__(self, length: int = 16) -> None:
        super().__init__()
        self.length = length

    def _loader(self) -> DataLoader:
        x = torch.randn(self.length, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


class Tiny(LightningModule):
    """Embedding-free two-layer net.

    Args:
        width: Hidden units, at least 1.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"`width` must be an integer >= 1, got {width}.")
        self.save_hyperparameters()
        self.width = width
        self.build()

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(4, self.width), nn.LayerNorm(self.width))
        self.head = nn.Linear(self.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x).tanh())

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])


class LateTiny(Tiny):
    """Makes its layers in ``configure_model``."""

    def build(self) -> None:
        pass

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            super().build()


class OwnOptimizer(Tiny):
    """Has an optimizer of its own."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.125)


class TwoOptimizers(Tiny):
    """Steps two optimizers by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.net.parameters(), lr=0.1), torch.optim.Adam(self.head.parameters(), lr=0.1)]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


class ReplaceLayers(Precision):
    """Replaces every linear layer by a new one with new Parameter objects, as Lightning's own TE plugin does."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        for name, child in list(module.named_modules()):
            if type(child) is nn.Linear:
                new = nn.Linear(child.in_features, child.out_features)
                new.load_state_dict(child.state_dict())
                parent, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(parent), leaf, new)
        return module


class Picky(Callback):
    """Refuses a value.

    Args:
        beta: In (0, 1).
    """

    def __init__(self, beta: float = 0.5) -> None:
        if not 0 < beta < 1:
            raise ValueError(f"`beta` must be in (0, 1), got {beta}.")


class RefusesAtStart(Callback):
    """Finds at setup that it cannot work."""

    def setup(self, trainer, pl_module, stage: str) -> None:
        from lightning.pytorch.utilities.exceptions import MisconfigurationException

        raise MisconfigurationException("RefusesAtStart needs a map-style dataset.\nUse another one.")


class Crashes(Tiny):
    """Has a bug."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        raise ValueError("a bug")


class Misuses(Tiny):
    """Asks Lightning for what it refuses, in the middle of training."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        from lightning.pytorch.utilities.exceptions import MisconfigurationException

        raise MisconfigurationException("not in the middle of training")


class OwnIntervalLR(torch.optim.lr_scheduler.LambdaLR):
    """A scheduler from elsewhere, whose ``interval`` is a setting of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer, interval: int = 10) -> None:
        self.interval = interval
        super().__init__(optimizer, lambda epoch: 1.0)
