"""Precision plugins."""

from lightning_grad.precision.nvfp4 import NVFP4FSDPPrecision, NVFP4Precision

__all__ = ["NVFP4FSDPPrecision", "NVFP4Precision"]
