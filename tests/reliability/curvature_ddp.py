"""Run by test_curvature_ddp.py: curvature callbacks and LossNormalizedLR on two processes, resumed too."""

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_grad import LanczosLearningRate, LossNormalizedLR, ResumableDataLoader, StabilityMonitor
from tests.unit.test_stability_monitor import Memory

CASES = {
    "monitor": lambda: [StabilityMonitor(every_n_steps=2, k=5, batch_sharpness_batches=1, oscillation_steps=1)],
    "lanczos": lambda: [LanczosLearningRate(every_n_steps=2, k=8)],
    "normalized": lambda: [LossNormalizedLR(0.1, every_n_steps=1)],
}
STEPS = 6


class Net(pl.LightningModule):
    """The processes split every batch of eight between them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.momentum = 0.0 if name == "monitor" else 0.5

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        wrong = 1.0 - logits.softmax(1).gather(1, batch[1][:, None])[:, 0]
        return {"loss": F.cross_entropy(logits, batch[1]), "one_minus_p": wrong}

    def train_dataloader(self):
        gen = torch.Generator().manual_seed(0)
        x, y = torch.randn(96, 4, generator=gen), torch.randint(0, 3, (96,), generator=gen)
        return ResumableDataLoader(TensorDataset(x, y), batch_size=8 // self.trainer.world_size)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=self.momentum)


def run(name: str, folder: Path, devices: int, ckpt: Path | None = None):
    """Weights at the end, and what was logged, by tag."""
    memory, model = Memory(), Net(name)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=STEPS, max_epochs=-1,
        logger=memory, callbacks=[*CASES[name](), saver], accumulate_grad_batches=2,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    tags = sorted({tag for _, row in memory.rows for tag in row if "/" in tag})
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return weights, {tag: memory.of(tag) for tag in tags}


def main() -> None:
    out, result = Path(sys.argv[1]), {}
    for name in CASES:
        weights, logged = run(name, out / name, 2)
        resumed = {}
        for step in (1, 3, STEPS - 1):
            again, later = run(name, out / f"{name}-again", 2, out / name / f"step={step}.ckpt")
            tail = {tag: [row for row in rows if row[0] >= step] for tag, rows in logged.items()}
            resumed[step] = bool(torch.equal(again, weights)) and later == {t: rows for t, rows in tail.items() if rows}
        mine = {"weights": weights.tolist(), "logged": logged, "resumed": resumed}
        result[name] = [None, None]
        dist.all_gather_object(result[name], mine)
    if dist.get_rank() == 0:
        (out / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
