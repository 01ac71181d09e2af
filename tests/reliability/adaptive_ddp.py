"""Run by test_adaptive_batch_ddp.py: train on two processes, resume from some steps, and write what was seen."""

import json
import random
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_grad import AdaptiveBatchSize, RandomStateCheckpoint, SamplesLR
from lightning_grad.allocation.batch_size import Criterion, NormTest
from lightning_grad.data import ResumableDataLoader

N, EPOCHS = 97, 3


class Dice(Criterion):
    """Ask for a batch size drawn from what was measured: any sequence of plans, the same again after a resume."""

    def target(self, stats):
        return float(random.Random(stats.trace_cov).randint(2, 40))


class Net(pl.LightningModule):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        )
        self.seen: list[int] = []

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        self.seen += index.tolist()
        return (self.net(x)[:, 0] - y).square().mean()

    def train_dataloader(self):
        gen = torch.Generator().manual_seed(1)
        x, y = torch.randn(N, 4, generator=gen), torch.randn(N, generator=gen)
        data = torch.utils.data.TensorDataset(x, y, torch.arange(N))
        return ResumableDataLoader(data, batch_size=3, shuffle=True)

    def configure_optimizers(self):
        optimizer = torch.optim.Adagrad(self.parameters(), lr=0.05)
        if self.mode == "dice":
            schedule = SamplesLR(optimizer, base="linear", final=0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Sizes(pl.Callback):
    """Of every optimizer step: the batch size, the samples this process has seen, and the learning rate."""

    def __init__(self, adaptive: AdaptiveBatchSize) -> None:
        self.adaptive, self.seen, self.own, self.rates = adaptive, [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.seen.append(self.adaptive._driver.plan.batch_size)
        self.own.append(len(pl_module.seen))
        self.rates.append(optimizer.param_groups[0]["lr"])


def run(folder: Path, ckpt: Path | None, mode: str):
    pl.seed_everything(3 if ckpt is None else 4, verbose=False)
    model = Net(mode)
    if mode == "dice":
        adaptive = AdaptiveBatchSize(
            40, Dice(), max_micro_batch_size=6, min_batch_size=2, allow_decrease=True, ema=0.0, max_growth=None
        )
    else:
        adaptive = AdaptiveBatchSize(40, NormTest(0.3), max_micro_batch_size=6, mode=mode, ema=0.5)
    sizes = Sizes(adaptive)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=EPOCHS, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[RandomStateCheckpoint(), adaptive, sizes, saver], limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    seen = gather(model.seen)
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return weights, seen, trainer.global_step, adaptive._driver.plan, adaptive.tests, sizes


def gather(value):
    everyone = [None, None]
    dist.all_gather_object(everyone, value)
    return everyone


def main() -> None:
    out = Path(sys.argv[1])
    result = {}
    for mode in ("sampler", "accumulate", "dice"):
        straight, seen, steps, plan, tests, sizes = run(out / mode, None, mode)
        resumed = {}
        for step in (1, steps // 3, steps // 2, steps - 1):
            again, *_, later = run(out / f"{mode}-again", out / mode / f"step={step}.ckpt", mode)
            resumed[step] = bool(torch.equal(again, straight)) and later.rates == sizes.rates[step:]
        result[mode] = {
            "seen": seen, "steps": steps, "resumed": resumed, "batch_size": plan.batch_size, "tests": tests,
            "sizes": sizes.seen, "own": gather(sizes.own), "rates": gather(sizes.rates),
        }  # fmt: skip
    if dist.get_rank() == 0:
        (out / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
