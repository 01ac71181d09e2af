"""Run by test_nvfp4_fsdp: two CPU processes train sharded NVFP4 layers; the first compares with one process.

The first part is a Trainer with ``ModelParallelStrategy`` (FSDP2). Lightning's ``FSDPStrategy`` wants GPUs, so the
second part wraps the model in torch's ``FullyShardedDataParallel`` (FSDP1) by hand, with what the plugin gives it.
"""

from __future__ import annotations

import copy
import sys
import warnings

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.data import DataLoader

from lightning_grad import NVFP4FSDPPrecision, NVFP4Precision
from lightning_grad.nvfp4 import NVFP4Linear
from lightning_grad.nvfp4.linear import Session

STEPS, LR, SEED, BATCH = 3, 0.1, 3, 4
DATA = torch.randn(2 * BATCH * STEPS, 32, generator=torch.Generator().manual_seed(1))


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(3))

    def configure_model(self):
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for module in (*self.blocks, self):
                fully_shard(module, mesh=mesh)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def train_dataloader(self):
        return DataLoader(DATA[self.global_rank :: 2], batch_size=BATCH)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), LR)


def batch_of(step, rank):
    return DATA[rank::2][BATCH * step :][:BATCH]


def one_process(precision):
    """Both ranks' batches in one process: their gradients, each with its rank's rounding, averaged."""
    model = Model()
    names = [f"blocks.{block}.{layer}" for block in (0, 1) for layer in (0, 2)]
    for step in range(STEPS):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        sums = [torch.zeros_like(p, dtype=dtype) for p in model.parameters()]
        for rank in (0, 1):
            replica = copy.deepcopy(model).to(dtype)
            session = Session(seed=SEED, rank=rank, step=torch.tensor(step + 1))
            for number, name in enumerate(names):
                NVFP4Linear.convert(replica.get_submodule(name), session, number, name)
            batch = batch_of(step, rank).to(dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                replica.training_step(batch, step).backward()
            for total, parameter in zip(sums, replica.parameters(), strict=True):
                total += parameter.grad / 2
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), sums, strict=True):
                parameter.add_(gradient.float(), alpha=-LR)
    return model.state_dict()


def check(got, precision):
    want, start = one_process(precision), Model().state_dict()
    assert list(got) == list(want), "plain keys"
    for name, value in want.items():
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], value), name
        assert not torch.equal(value, start[name]), name


def fsdp2(path):
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    plugin = NVFP4Precision(keep_last=1, seed=SEED)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, plugins=[plugin], max_steps=STEPS,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, logger=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(Model())
    trainer.save_checkpoint(path)
    if trainer.is_global_zero:
        checkpoint = torch.load(path, weights_only=True)
        check(checkpoint["state_dict"], "fp32")
        assert checkpoint["NVFP4Precision"]["step"] == STEPS
        print("FSDP2 equal")


def fsdp1():
    rank = dist.get_rank()
    plugin, model = NVFP4FSDPPrecision(keep_last=1, seed=SEED), Model()
    plugin.convert_module(model)
    plugin.session.rank = rank
    sharded = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({nn.Sequential}),
        mixed_precision=plugin.mixed_precision_config,
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    optimizer = torch.optim.SGD(sharded.parameters(), LR)
    for step in range(STEPS):
        with plugin.forward_context():
            loss = sharded(batch_of(step, rank)).square().mean()
        loss.backward()
        plugin.session.step.add_(1)
        optimizer.step()
        optimizer.zero_grad()
    with FullyShardedDataParallel.state_dict_type(
        sharded, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=True)
    ):
        state = sharded.state_dict()
    if rank == 0:
        assert isinstance(model.blocks[0][0], NVFP4Linear)
        check(state, "bf16")
        print("FSDP1 equal")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    fsdp2(sys.argv[1])
    fsdp1()
