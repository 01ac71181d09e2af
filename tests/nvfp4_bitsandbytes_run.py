"""Run by test_nvfp4_bitsandbytes in a process of its own: training with an 8-bit optimizer beside NVFP4."""

from __future__ import annotations

import bitsandbytes as bnb
import lightning.pytorch as pl
import torch

from lightning_grad import NVFP4Precision
from lightning_grad.demos import TinyGPT
from lightning_grad.nvfp4 import dequantize, quantize
from lightning_grad.nvfp4.backends import load
from tests.unit.test_nvfp4_plugin import fit


def main():
    class Model(TinyGPT):
        def configure_optimizers(self):
            return bnb.optim.AdamW8bit(self.parameters(), lr=3e-3)

    class Watch(pl.Callback):
        versions: list[int] = []  # noqa: RUF012
        losses: list[float] = []  # noqa: RUF012

        def on_before_backward(self, trainer, pl_module, loss):
            layer = pl_module.blocks[0].mlp.up
            used = load("torch").unpack(layer._nvfp4._packed[0])
            got = used.values * used.amax / 2688
            torch.testing.assert_close(got, dequantize(quantize(layer.weight.detach(), (16, 16))), rtol=1e-6, atol=0)
            self.versions.append(layer.weight._version)
            self.losses.append(float(loss.detach()))

    watch = Watch()
    torch.manual_seed(0)
    # 4096 elements is the size from which bitsandbytes keeps 8-bit states
    model = Model(num_layers=2, dim=64, num_heads=2, block_size=16)
    # two batches of random tokens, five times each: what can be learned is to know them by heart
    fit(model, 10, NVFP4Precision(keep_last=0), batch_size=20, callbacks=[watch])
    assert len(set(watch.versions)) == 1, "bitsandbytes now bumps _version: the epoch in the cache key may go"
    assert max(watch.losses[-2:]) < min(watch.losses[:2]) - 0.1, watch.losses


if __name__ == "__main__":
    main()
