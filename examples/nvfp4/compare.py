"""TinyGPT in float32 and under NVFP4, same seed and batches: validation loss and saved activation memory.

    python examples/nvfp4/compare.py [--short] [--lr LR] [--out FOLDER]

Prints the table of the README and draws compare.png (with --short: a few steps). --lr: another peak rate than 1e-3;
the first two rows and no picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_grad import NVFP4Precision, NVFP4PrecisionSwitch
from lightning_grad.demos import RecordMetrics, SourceText, TinyGPT
from lightning_grad.demos.comparison import comparison_parser, parse_comparison

HERE = Path(__file__).parent
RUNS: dict[str, tuple[dict[str, Any] | None, float | None]] = {
    "float32": (None, None),
    "NVFP4, last block high": ({"keep_last": 1}, None),
    "NVFP4, all blocks": ({"keep_last": 0}, None),
    "NVFP4, last block high, BF16 forward from 82 %": ({"keep_last": 1}, 0.82),
}


class WSD(TinyGPT):
    """20 steps of warm-up, constant, decay to 1 % over the last fifth."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        total = int(self.trainer.estimated_stepping_batches)

        def scale(step: int) -> float:
            left = (total - step) / (0.2 * total)
            return min((step + 1) / 20, 1.0, max(left, 0.01))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(plugin: NVFP4Precision | None, switch: float | None, lr: float, steps: int) -> RecordMetrics:
    record = RecordMetrics()
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, val_check_interval=max(steps // 3, 1), logger=False,
        plugins=[] if plugin is None else [plugin], enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[record] if switch is None else [record, NVFP4PrecisionSwitch(switch)],
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    data = SourceText(block_size=128, batch_size=8, num_val_blocks=32 if steps < 100 else 128)
    trainer.fit(WSD(num_layers=4, dim=128, num_heads=4, block_size=128, lr=lr), datamodule=data)
    return record


def saved_bytes(plugin: NVFP4Precision | None) -> tuple[int, int]:
    """Bytes that one forward pass keeps for backward: inputs of the linear layers of a block, and the whole model."""
    torch.manual_seed(0)
    model = TinyGPT(num_layers=4, dim=128, num_heads=4, block_size=128)
    if plugin is not None:
        plugin.convert_module(model)
    weights = {p.data_ptr() for p in model.parameters()}

    def keeping(function: Any) -> int:
        seen: dict[tuple[int, Any], int] = {}

        def see(t: Tensor) -> Tensor:
            if t.data_ptr() not in weights:
                seen[t.data_ptr(), t.dtype] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
            out = function()  # kept alive, so that no address is used twice
        del out
        return sum(seen.values())

    linear: nn.Module = model.blocks[0].mlp.up  # type: ignore[assignment, union-attr]
    x = torch.randn(1024, 128, requires_grad=True)
    tokens = torch.randint(0, 256, (8, 128))
    return keeping(lambda: linear(x)), keeping(lambda: model(tokens))


def main() -> None:
    import matplotlib.pyplot as plt

    parser = comparison_parser(__doc__)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    options = parse_comparison(parser, __file__)
    whole_table = options.lr == 1e-3 and not options.short
    figure, axes = plt.subplots(figsize=(7, 4))
    base = None
    print(f"| run, rate {options.lr:g} | validation loss | against float32 |\n|---|---|---|")
    for name, (arguments, switch) in list(RUNS.items())[: None if whole_table else 2]:
        plugin = None if arguments is None else NVFP4Precision(**arguments)
        record = train(plugin, switch, options.lr, 4 if options.short else 300)
        loss = record.last("val/loss")
        base = base or loss
        print(f"| {name} | {loss:.4f} | {loss / base - 1:+.2%} |", flush=True)
        axes.plot(*zip(*record.curves["val/loss"], strict=True), label=name)
    if options.lr != 1e-3:
        return
    one, whole = saved_bytes(None)
    one4, whole4 = saved_bytes(NVFP4Precision(keep_last=0))
    print(f"\nkept for backward, input of one linear layer [1024, 128]: {one:,} -> {one4:,} bytes ({one4 / one:.1%})")
    print(f"kept for backward, whole model, 1024 tokens: {whole:,} -> {whole4:,} bytes ({whole4 / whole:.1%})")
    axes.set(xlabel="step", ylabel="validation loss")
    axes.legend()
    figure.savefig(options.plot, dpi=100, bbox_inches="tight")
    print(f"drawn: {options.plot}")


if __name__ == "__main__":
    main()
