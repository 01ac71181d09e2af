"""Diagnostics of quantized tensors: signal-to-noise, saturation, underflow. Runs on sampled steps only."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_grad.nvfp4 import format as fmt
from lightning_grad.nvfp4.format import BLOCK
from lightning_grad.nvfp4.functional import dequantize, quantize
from lightning_grad.nvfp4.hadamard import rht
from lightning_grad.nvfp4.recipe import Draw, NVFP4Recipe
from lightning_grad.nvfp4.stream import ROLE_COLUMNS

TENSORS = ("x", "x_col", "w", "dy", "dy_col")


class Probe(Protocol):
    """Receives the tensors of a sampled step."""

    def record(self, layer: str, tensor: str, x: Tensor, recipe: NVFP4Recipe, draw: Draw | None = None) -> None:
        """See one tensor before quantization; ``tensor`` is one of :data:`TENSORS`."""

    def weight_gradient(self, layer: str, grad_y: Tensor, grad_w: Tensor) -> None:
        """See a weight gradient."""


def quantizer_input(tensor: str, x: Tensor, recipe: NVFP4Recipe) -> tuple[Tensor, tuple[int, int]]:
    """What the quantizer of a tensor gets to see, as fp32 ``[R, C]``, and its block."""
    if tensor == "w":
        return x.float(), (BLOCK, BLOCK) if recipe.weight_2d else (1, BLOCK)
    xb = fmt.to_bf16(x)
    if not tensor.endswith("_col"):
        return xb, (1, BLOCK)
    columns = F.pad(xb, (0, 0, 0, -x.shape[0] % BLOCK)).t().contiguous()
    return (rht(columns, recipe.hadamard_signs).float() if recipe.rht else columns), (1, BLOCK)


def tensor_statistics(
    tensor: str, x: Tensor, recipe: NVFP4Recipe, draw: Draw | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Quantize ``x`` as the layer does and describe the error.

    Returns:
        0-d tensors ``snr_db``, ``mse``, ``saturation``, ``underflow``, ``zero_scale_blocks``, ``amax``; and the log2 of
        the block scales (``-inf`` for zero scales).
    """
    source, block = quantizer_input(tensor, x, recipe)
    if draw is None:
        q = quantize(source, block, backend="torch")
    else:
        step, c2, rank = draw.counters
        counters = (step, c2 | ROLE_COLUMNS if tensor.endswith("_col") else c2, rank)
        q = quantize(
            source,
            block,
            rounding="stochastic",
            seed=draw.seed,
            counters=counters,
            sr_scale=recipe.sr_scale,
            backend="torch",
        )
    scales = fmt.scale_values(q.scales.view(torch.uint8))
    blocks = source.view(source.shape[0] // block[0], block[0], -1, BLOCK)
    error = dequantize(q) - source
    factor = (scales / fmt.global_scale(q.amax)).reciprocal()[:, None, :, None]
    non_zero = source != 0
    power, noise = source.square().sum(), error.square().sum()
    full = blocks.abs().amax((1, 3)) > 0
    out = {
        "snr_db": 10 * torch.log10(power / noise),
        "mse": error.square().mean(),
        "saturation": (((blocks * factor).abs() > fmt.E2M1_MAX) & (scales > 0)[:, None, :, None]).float().mean(),
        "underflow": ((dequantize(q) == 0) & non_zero).sum() / non_zero.sum().clamp(min=1),
        "zero_scale_blocks": (full & (scales == 0)).float().mean(),
        "amax": q.amax[0],
    }
    return out, scales.log2()


class Recorder:
    """Keeps the statistics of one step on the device.

    Args:
        layers: Layers to look at.
        tensors: Which of :data:`TENSORS`.
        wgrad_error: Also compare each weight gradient with one from unquantized operands, which holds the inputs.
        histograms: Keep the block scales, a value for each 16 elements (or 16x16 of a weight).
    """

    def __init__(
        self, layers: Collection[str], tensors: Collection[str], wgrad_error: bool = False, histograms: bool = True
    ) -> None:
        self.layers, self.tensors = set(layers), set(tensors)
        self.wgrad_error, self.keeps_histograms = wgrad_error, histograms
        self.values: dict[str, Tensor] = {}
        self.histograms: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}

    @torch.no_grad()
    def record(self, layer: str, tensor: str, x: Tensor, recipe: NVFP4Recipe, draw: Draw | None = None) -> None:
        """See one tensor before quantization."""
        if layer not in self.layers:
            return
        if tensor == "x" and self.wgrad_error:
            self._inputs[layer] = fmt.to_bf16(x.detach())
        if tensor in self.tensors:
            values, scales = tensor_statistics(tensor, x.detach(), recipe, draw)
            self.values.update({f"nvfp4/{layer}/{tensor}/{key}": value for key, value in values.items()})
            if self.keeps_histograms:
                self.histograms[f"nvfp4/{layer}/{tensor}/block_scale_log2"] = scales

    @torch.no_grad()
    def weight_gradient(self, layer: str, grad_y: Tensor, grad_w: Tensor) -> None:
        """See a weight gradient."""
        if layer in self._inputs:
            exact = fmt.to_bf16(grad_y).t() @ self._inputs.pop(layer)
            self.values[f"nvfp4/wgrad_error/{layer}"] = (grad_w.float() - exact).norm() / exact.norm()

    def scalars(self) -> dict[str, float]:
        """All scalars, in one transfer."""
        if not self.values:
            return {}
        return dict(zip(self.values, torch.stack(list(self.values.values())).tolist(), strict=True))
