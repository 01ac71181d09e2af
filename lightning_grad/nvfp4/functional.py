"""Quantize, dequantize and multiply matrices: the functional surface of the format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_grad._validate import check_choice
from lightning_grad.nvfp4 import format as fmt
from lightning_grad.nvfp4.backends import load, resolve
from lightning_grad.nvfp4.format import BLOCK, NVFP4Tensor, ScaleRounding
from lightning_grad.nvfp4.recipe import Backend, Draw, Operand
from lightning_grad.nvfp4.stream import check_stream
from lightning_grad.nvfp4.torch_backend import finish
from lightning_grad.random import Word


def functional_backend(name: str, device: torch.device) -> Backend:
    """Backend of a functional call; "auto" means Triton on a CUDA device that can run it, else torch.

    Raises:
        RuntimeError: The named backend cannot run on ``device``.
    """
    if name == "auto":
        name = "triton" if device.type == "cuda" and resolve("auto", device)[0] != "torch" else "torch"
    elif name not in ("torch", "torch+compile"):
        name, _ = resolve(name, device, owner="quantize")
    return load(name)


def check_matrix(name: str, x: Tensor, block: tuple[int, int] = (1, BLOCK)) -> None:
    """Refuse what the format cannot hold.

    Raises:
        TypeError: ``x`` is complex or an integer tensor.
        ValueError: ``x`` is not a matrix, or does not divide into blocks.
    """
    if x.is_complex() or not x.is_floating_point():
        raise TypeError(f"`{name}` must be a real floating-point tensor, got {x.dtype}.")
    if x.ndim != 2:
        raise ValueError(f"`{name}` must be a matrix, got shape {tuple(x.shape)}; flatten the leading dimensions.")
    if x.shape[1] % BLOCK or x.shape[0] % block[0]:
        raise ValueError(f"`{name}` of shape {tuple(x.shape)} does not divide into {block[0]}x{block[1]} blocks.")


def quantize(
    x: Tensor,
    block: tuple[int, int] = (1, BLOCK),
    *,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    u: Tensor | None = None,
    seed: int = 0,
    counters: Sequence[Word] = (0, 0, 0),
    amax: Tensor | None = None,
    sr_scale: ScaleRounding = "nearest",
    backend: str = "auto",
) -> NVFP4Tensor:
    """Quantize a matrix to NVFP4.

    Args:
        x: ``[R, C]`` of any real floating dtype, C (with 16x16 blocks R too) a multiple of 16; converted to fp32 first
            (exact for bf16).
        block: ``(1, 16)`` or ``(16, 16)``.
        rounding: To nearest even, or stochastically (1x16 blocks only).
        u: Explicit uniforms in [0, 1) of the shape of ``x``, instead of the stream.
        seed: Key of the stochastic-rounding stream, in [0, 2**64).
        counters: Step, ``layer << 1 | role`` and rank, each in [0, 2**32).
        amax: Per-tensor magnitude to use instead of the tensor's own (for example one reduced over ranks): one
            floating number >= 0.
        sr_scale: Rounding of the block scales of stochastically rounded tensors.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        Codes, block scales and amax on the device of ``x``.

    Raises:
        TypeError: ``x`` is complex or an integer tensor.
        ValueError: Not a matrix, not divisible into blocks, or an argument out of range.
        RuntimeError: The named backend cannot run here.
    """
    if block not in ((1, BLOCK), (BLOCK, BLOCK)):
        raise ValueError(f"`block` must be (1, 16) or (16, 16), got {block!r}.")
    check_matrix("x", x, block)
    check_choice("rounding", rounding, ("nearest", "stochastic"))
    check_choice("sr_scale", sr_scale, ("nearest", "up"))
    if rounding == "stochastic" and block != (1, BLOCK):
        raise ValueError(f"`rounding='stochastic'` is defined for 1x16 blocks, got block={block!r}.")
    if u is not None and (rounding == "nearest" or u.shape != x.shape):
        raise ValueError(
            f"`u` needs rounding='stochastic' and the shape of `x` {tuple(x.shape)}, got {tuple(u.shape)}."
        )
    if amax is not None and (amax.numel() != 1 or not amax.is_floating_point()):
        raise ValueError(f"`amax` must be one floating number, got {amax.dtype} of shape {tuple(amax.shape)}.")
    scale_rounding: ScaleRounding = "nearest"
    draw = None
    if rounding == "stochastic":
        draw, scale_rounding = Draw(seed, check_stream(seed, counters)), sr_scale
    kernels = functional_backend(backend, x.device)
    with torch.no_grad():
        return kernels.quantize(x.detach(), block, amax, scale_rounding, u, draw)


def _scale_values(q: NVFP4Tensor) -> Tensor:
    scales = fmt.from_e4m3(q.scales.view(torch.uint8))
    return scales.repeat_interleave(q.block[0], 0).repeat_interleave(BLOCK, 1)


def dequantize(q: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode: ``fl(e2m1 * fl(fl(scale * amax) * fl(1 / 2688)))``, then cast.

    Args:
        q: A quantized matrix ``[R, C]``.
        dtype: Of the result.

    Returns:
        ``[R, C]``.
    """
    return (fmt.decode_e2m1(fmt.unpack(q.codes)) * ((_scale_values(q) * q.amax) * fmt.INV_TENSOR_MAX)).to(dtype)


def decode_operand(q: NVFP4Tensor) -> Tensor:
    """``e2m1 * scale`` as fp32 ``[R, C]``, without the per-tensor scale: what the GEMMs multiply."""
    return fmt.decode_e2m1(fmt.unpack(q.codes)) * _scale_values(q)


def matmul(
    a: NVFP4Tensor, b: NVFP4Tensor, out_dtype: torch.dtype = torch.float32, bias: Tensor | None = None
) -> Tensor:
    """``a @ b.T + bias`` of ``a [M, K]`` and ``b [N, K]``, accumulated in fp32.

    Args:
        a: Left operand ``[M, K]``.
        b: Right operand ``[N, K]``, transposed in the product.
        out_dtype: Dtype of the result, rounded once.
        bias: ``[N]``, added in fp32.

    Returns:
        ``[M, N]``.

    Raises:
        ValueError: K differs, or ``bias`` is not ``[N]``.
    """
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"`a` {a.shape} and `b` {b.shape} must have equal second dimensions.")
    if bias is not None and bias.shape != (b.shape[0],):
        raise ValueError(f"`bias` must have shape ({b.shape[0]},), got {tuple(bias.shape)}.")
    left, right = Operand(decode_operand(a), a.amax), Operand(decode_operand(b), b.amax)
    return finish(left.values @ right.values.t(), left, right, bias, out_dtype)
