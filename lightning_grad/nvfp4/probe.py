"""Diagnostics of quantized tensors: signal-to-noise, saturation, underflow. Runs on sampled steps only."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lightning_grad.nvfp4.recipe import Draw, NVFP4Recipe


class Probe(Protocol):
    """Receives the tensors of a sampled step."""

    def record(self, layer: str, tensor: str, x: Tensor, recipe: NVFP4Recipe, draw: Draw | None = None) -> None:
        """See one tensor before quantization; ``tensor`` is "x", "x_col", "w", "dy" or "dy_col"."""
