"""Tell the posterior samplers how large the training set is."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn


class BindDataSize(pl.Callback):
    """Fill in ``n_data`` of SGLD, PSGLD and SGHMC from the training data loader; other optimizers are left alone.

    Raises:
        MisconfigurationException: An optimizer needs the size and the training data has none.

    State: none; the size is saved with the optimizer's parameter groups.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look for groups with ``n_data = 0``."""
        groups = [g for optimizer in trainer.optimizers for g in optimizer.param_groups if "n_data" in g]
        if groups and trainer.gradient_clip_val:
            rank_zero_warn(
                "gradient_clip_val changes the distribution that the sampler draws from; remove it for posterior"
                " samples."
            )
        for group in groups:
            if group["n_data"] == 0:
                group["n_data"] = _train_size(trainer)


def _train_size(trainer: pl.Trainer) -> int:
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    if dataset is None or not hasattr(dataset, "__len__"):
        raise MisconfigurationException(
            "BindDataSize needs one training loader with a dataset that has a length;"
            " pass n_data to the optimizer instead."
        )
    return len(dataset)
