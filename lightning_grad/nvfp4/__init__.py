"""NVFP4: the number format, the quantized linear layer and its backends. No Lightning import below this line."""

from lightning_grad.nvfp4.backends import backend_info
from lightning_grad.nvfp4.format import NVFP4Tensor, pack, round_e2m1, to_e4m3, unpack
from lightning_grad.nvfp4.functional import dequantize, matmul, quantize
from lightning_grad.nvfp4.hadamard import rht
from lightning_grad.nvfp4.linear import NVFP4Linear, linear
from lightning_grad.nvfp4.recipe import NVFP4Recipe
from lightning_grad.nvfp4.stream import philox, sr_uniform

__all__ = [
    "NVFP4Linear",
    "NVFP4Recipe",
    "NVFP4Tensor",
    "backend_info",
    "dequantize",
    "linear",
    "matmul",
    "pack",
    "philox",
    "quantize",
    "rht",
    "round_e2m1",
    "sr_uniform",
    "to_e4m3",
    "unpack",
]
