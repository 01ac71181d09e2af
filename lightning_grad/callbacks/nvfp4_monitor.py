"""TensorBoard diagnostics of quantized tensors."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_grad._tensorboard import Charts, TensorBoardCharts, log_histogram, log_scalars
from lightning_grad._validate import check_choice, check_int
from lightning_grad.callbacks.nvfp4_switch import nvfp4_plugin
from lightning_grad.nvfp4.conversion import check_patterns
from lightning_grad.nvfp4.probe import TENSORS, Recorder
from lightning_grad.nvfp4.recipe import MODES


class NVFP4Monitor(TensorBoardCharts):
    """Log how well NVFP4 holds the tensors of the converted layers.

    Tags per layer and tensor (``x``, ``w``, ``dy`` and the transformed column forms ``x_col``, ``dy_col``):
    ``nvfp4/{layer}/{tensor}/snr_db``, ``…/mse``, ``…/saturation`` (share of elements above 6 after scaling),
    ``…/underflow`` (share of non-zero elements that become 0), ``…/zero_scale_blocks``, ``…/amax``, and the histogram
    ``…/block_scale_log2``. Also ``nvfp4/mode``. Gaussian data give 20.4 dB (x), 19.1 dB (w) and 17.2 dB (dy).

    Cost: nothing between sampled steps; on one, each tensor is quantized and decoded once more. The values are those of
    rank 0 and of the first micro-batch of a step. Models compiled as a whole are not seen.

    Args:
        every_n_steps: Optimizer steps from one sampled step to the next, >= 1.
        layers: fnmatch patterns of layer names; ``None`` takes all.
        tensors: Which tensors to look at.
        histograms: Log the histograms, to loggers that can.
        max_layers: At most so many layers, >= 1.
        wgrad_error: Also log ``nvfp4/wgrad_error/{layer}``, the relative error of the weight gradient against
            unquantized operands: a hint at layers to keep in high precision. Holds the inputs of a sampled step.

    Raises:
        ValueError: An argument is out of range.
        MisconfigurationException: The trainer has no NVFP4 plugin.

    State: none.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        layers: list[str] | None = None,
        tensors: tuple[str, ...] = TENSORS,
        histograms: bool = True,
        max_layers: int = 16,
        wgrad_error: bool = False,
    ) -> None:
        self.every_n_steps = check_int("every_n_steps", every_n_steps, 1)
        self.layers = check_patterns("layers", layers)
        self.tensors = tuple(check_choice("tensors", tensor, TENSORS) for tensor in tensors)
        self.histograms = histograms
        self.max_layers = check_int("max_layers", max_layers, 1)
        self.wgrad_error = wgrad_error
        self._sampled = -1

    def tensorboard_charts(self, trainer: pl.Trainer) -> Charts:
        """One chart of the signal-to-noise ratio for each kind of tensor, with a curve per layer."""
        titles = {"x": "activations", "w": "weights", "dy": "gradients"}
        charts = {
            f"signal to noise of {titles[tensor]}, dB": [f"nvfp4/*/{tensor}/snr_db"]
            for tensor in titles
            if tensor in self.tensors
        }
        return {"nvfp4": {**charts, "0 NVFP4, 1 BF16 forward, 2 BF16": ["nvfp4/mode"]}}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the plugin."""
        plugin = nvfp4_plugin(trainer, "NVFP4Monitor")
        if plugin.backend == "transformer_engine":
            rank_zero_warn("NVFP4Monitor sees no tensors of backend 'transformer_engine'; backend='triton' shows them.")
        super().on_fit_start(trainer, pl_module)
        self._sampled = -1

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the recorder in place on a sampled step."""
        step = trainer.global_step
        if step % self.every_n_steps or step == self._sampled or not trainer.is_global_zero:
            return
        self._sampled = step
        plugin = nvfp4_plugin(trainer, "NVFP4Monitor")
        names = [layer._nvfp4.name for layer in plugin.layers]
        if self.layers is not None:
            names = [name for name in names if any(fnmatch(name, pattern) for pattern in self.layers)]
        plugin.session.probe = Recorder(names[: self.max_layers], self.tensors, self.wgrad_error, self.histograms)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was recorded."""
        plugin = nvfp4_plugin(trainer, "NVFP4Monitor")
        recorder, plugin.session.probe = plugin.session.probe, None
        if not isinstance(recorder, Recorder):
            return
        log_scalars(trainer, recorder.scalars() | {"nvfp4/mode": float(MODES.index(plugin.mode))})
        for tag, values in recorder.histograms.items():
            log_histogram(trainer, tag, values)
