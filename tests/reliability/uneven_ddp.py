"""Run by test_adaptive_batch_ddp.py: two processes with batches of different sizes train, and write what they did."""

import datetime
import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, IterableDataset

from lightning_grad import AdaptiveBatchSize, BatchSizeLRScaler, SamplesLR
from lightning_grad.callbacks import Criterion


class Packed(IterableDataset):
    """Makes its own batches."""

    def __iter__(self):
        rank = dist.get_rank()
        gen = torch.Generator().manual_seed(rank)
        for i in range(16):
            size = [[4, 4], [4, 9]][rank][i % 2]
            yield torch.randn(size, 4, generator=gen), torch.randn(size, 1, generator=gen)


class Quarrel(Criterion):
    """Each process wants another batch; the first one's word counts."""

    def target(self, stats):
        return 1.0 if dist.get_rank() else 40.0


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.samples = torch.nn.Linear(4, 1), 0

    def training_step(self, batch, batch_idx):
        self.samples += len(batch[0])
        return (self.net(batch[0]) - batch[1]).square().mean()

    def train_dataloader(self):
        return DataLoader(Packed(), batch_size=None)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.01)
        if not any(isinstance(callback, AdaptiveBatchSize) for callback in self.trainer.callbacks):
            return optimizer
        schedule = {"scheduler": SamplesLR(optimizer, 1000, "linear"), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Look(pl.Callback):
    def __init__(self, scaler):
        self.scaler, self.accumulate, self.factors = scaler, [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.accumulate.append(trainer.accumulate_grad_batches)
        self.factors.append(self.scaler.factor)


def run(which: str):
    scaler = BatchSizeLRScaler("linear")
    callback: pl.Callback = scaler
    if which != "alone":
        callback = AdaptiveBatchSize(
            40, Quarrel(), "micro_batch", mode=which, test_interval=1, lr_scaler=scaler, log=False
        )
    model, look = Net(), Look(scaler)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(timeout=datetime.timedelta(seconds=30)), max_epochs=1,
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[callback, look], limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model)
    counted = callback.samples_seen if isinstance(callback, AdaptiveBatchSize) else None
    mine = {"weight": model.net.weight.tolist(), "accumulate": look.accumulate, "factors": look.factors}
    mine |= {"counted": counted, "rate": trainer.optimizers[0].param_groups[0]["lr"]}
    everyone, samples = [None, None], [None, None]
    dist.all_gather_object(everyone, mine)
    dist.all_gather_object(samples, model.samples)
    return {"processes": everyone, "samples": sum(samples)}


if __name__ == "__main__":
    result = {which: run(which) for which in ("alone", "monitor", "accumulate")}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(result))
    dist.barrier()  # else a process that ends first may take the other's connection threads down
    dist.destroy_process_group()
