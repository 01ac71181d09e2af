"""The toy run of the SPSA strategy tests."""

import lightning.pytorch as pl
import torch

from lightning_grad import SharedSeedSPSAStrategy
from lightning_grad.spsa import Journal
from tests.spsa_helpers import batches, loss_of, tiny_model


class Toy(pl.LightningModule):
    """A tiny regression; in step ``t`` worker ``w`` holds its share of the step's micro-batches."""

    def __init__(self, steps=8, micro=4, lr=2.0**-6, scheduler=False, dropout=0.0):
        super().__init__()
        self.net = tiny_model()
        if dropout:
            self.net.insert(2, torch.nn.Dropout(dropout))
        self.steps, self.micro, self.lr, self.scheduler = steps, micro, lr, scheduler
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = loss_of(self.net, (batch[0][0], batch[1][0]))
        self.seen.append((loss.requires_grad, self.training, self.net.training))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", loss_of(self.net, (batch[0][0], batch[1][0])))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        if not self.scheduler:
            return optimizer
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self):
        data = batches(self.steps * self.micro)
        world, rank = self.trainer.world_size, self.trainer.global_rank
        per = self.micro // world
        mine = [data[t * self.micro + rank * per + i] for t in range(self.steps) for i in range(per)]
        return torch.utils.data.DataLoader(mine, batch_size=1, shuffle=False)

    val_dataloader = train_dataloader


class Diverges(Toy):
    """Its loss is NaN from a batch on."""

    def __init__(self, batch):
        super().__init__(steps=20, micro=1)
        self.batch = batch

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (float("nan") if batch_idx >= self.batch else 1.0)


def trainer(strategy, **settings):
    quiet = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_epochs": 1,
        "enable_model_summary": False, "enable_checkpointing": False, "use_distributed_sampler": False,
        "limit_val_batches": 0,
    }  # fmt: skip
    return pl.Trainer(strategy=strategy, **{**quiet, **settings})


def fit(path, *, workers=1, model=None, micro=4, ckpt_path=None, trainer_settings=None, **options):
    """Train and return the journal; the digest is compared and kept at every step."""
    options = {"check_interval": 1, "seed": 3, **options}
    if workers > 1:
        options["start_method"] = "fork"
        if (
            torch.distributed.is_initialized()
        ):  # of an earlier run in this process; a forked child would take it for its own
            torch.distributed.destroy_process_group()
    model = model if model is not None else Toy(micro=micro)
    settings = {"devices": workers, "accumulate_grad_batches": micro // workers, **(trainer_settings or {})}
    runner = trainer(SharedSeedSPSAStrategy(journal_path=str(path), **options), **settings)
    runner.fit(model, ckpt_path=ckpt_path)
    return Journal.load(path)


def digests(journal):
    return [record.digest for record in journal]
