r"""The grid on which adding and removing a perturbation is exact, and the digests that compare replicas.

A float that gives up its last mantissa bit (and is a multiple of ``2 ulp(eps)``) can be moved by ``eps`` and back
without rounding: :math:`x`, :math:`x \pm \epsilon` and :math:`x \pm 2\epsilon` are all representable while
:math:`|x| < 2^{22}\epsilon`. So the perturbed parameters return to the same bits and no copy is needed.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_grad._validate import check_range
from lightning_grad.spsa.signs import BLOCK

CHUNK = 65536
EPS_LOG2_RANGE = (-20, -2)
_MASK64 = (1 << 64) - 1
# exponent bits, exponent bits of 2 ulp headroom: the value |x| / eps from which moves may round
_EXPONENT = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}
LIMIT_LOG2 = {torch.float32: 22, torch.float64: 51}


def eps_exponent(eps: float) -> int:
    """The nearest power of two, as its exponent.

    Args:
        eps: Perturbation size, > 0; its base-2 logarithm must round into [-20, -2].

    Raises:
        ValueError: ``eps`` is out of range.
    """
    low, high = EPS_LOG2_RANGE
    check_range("eps", eps, 0.0, math.inf, "()")
    exponent = round(math.log2(eps))
    if not low <= exponent <= high:
        raise ValueError(f"`eps` must round to a power of two in [2**{low}, 2**{high}], got {eps!r}.")
    return exponent


def snap_(tensor: Tensor, eps: float) -> Tensor:
    """Round a float32 or float64 tensor in place to the grid of ``eps`` (a power of two); returns the tensor.

    Error: at most ``2**-23 |y|`` (float32) where ``|y| >= eps``, at most ``eps * 2**-23`` below.
    """
    bits: Tensor = tensor.view(_INTEGER[tensor.dtype])
    head = (bits & _EXPONENT[tensor.dtype]).view(tensor.dtype)
    magic = torch.copysign(head.clamp_min(eps).mul_(2.0), tensor)
    return tensor.add_(magic).sub_(magic)  # two roundings by design: never simplify


class ChunkSnap:
    """:func:`snap_` for numpy chunks, with buffers that are used again: time counts by the call and by the pass.

    The magic number is another one. Any multiple of ``4 ulp(h)`` that brings ``|y|`` between ``2 h`` and ``4 h`` rounds
    alike; ``max(|y| without its last two bits, 2 eps)`` is one, and costs a pass less.
    """

    def __init__(self, eps: float) -> None:
        self._least = 2.0 * eps
        self._dtype: np.dtype[Any] | None = None
        self._size = 0

    def _prepare(self, size: int, dtype: np.dtype[Any]) -> None:
        self._dtype, self._size = dtype, size
        self._bits = np.dtype(np.int64 if dtype == np.float64 else np.int32)
        integer = self._bits.type
        self._kept, self._sign_mask = integer(np.iinfo(integer).max - 3), integer(np.iinfo(integer).min)
        self._head, self._sign = np.empty(size, dtype=integer), np.empty(size, dtype=integer)
        self._bounded = torch.from_numpy(self._head.view(dtype))

    def __call__(self, y: NDArray) -> None:  # type: ignore[type-arg]
        """Round ``y``, float32 or float64, in place."""
        size = y.size
        if self._dtype != y.dtype or self._size < size:
            self._prepare(max(size, self._size), y.dtype)
        bits, head, sign = y.view(self._bits), self._head[:size], self._sign[:size]
        np.bitwise_and(bits, self._kept, out=head)
        self._bounded[:size].clamp_(min=self._least)  # three times as fast as numpy's maximum
        np.bitwise_and(bits, self._sign_mask, out=sign)
        np.bitwise_or(head, sign, out=head)
        magic = head.view(y.dtype)
        np.add(y, magic, out=y)
        np.subtract(y, magic, out=y)


def digest_chunk(values: Tensor, virtual_start: int) -> int:
    """Share of :func:`digest64` of consecutive float32 or float64 values whose first virtual index is given."""
    total = 0
    size = CHUNK if values.device.type == "cpu" else 64 * CHUNK
    for begin in range(0, values.numel(), size):
        part = values[begin : begin + size].contiguous()
        bits: Tensor = part.view(_INTEGER[part.dtype]).to(torch.int64)
        if part.dtype == torch.float32:
            bits = bits & 0xFFFFFFFF
        first = 2 * (virtual_start + begin) + 1
        weight = torch.arange(first, first + 2 * part.numel(), 2, dtype=torch.int64, device=part.device)
        total += int((bits * weight).sum())  # wraps modulo 2**64, in any order
    return total & _MASK64


def digest64(tensors: Iterable[Tensor]) -> int:
    r"""Order-independent 64-bit digest of the exact bits: :math:`\sum_v (2v+1)\,u(v) \bmod 2^{64}`.

    ``u`` is the unsigned pattern of element ``v``; every tensor starts at the next multiple of 256. Each weight is
    odd, so a change of one element always changes the digest. Not a cryptographic hash.
    """
    total, start = 0, 0
    for values in map(logical, tensors):
        total += digest_chunk(values, start)
        start += -(-values.numel() // BLOCK) * BLOCK
    return total & _MASK64


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the little-endian bytes of all values, tensor after tensor (bfloat16 counts as its float32 value)."""
    return hash_chunks(chunk for tensor in tensors for chunk in _chunks(logical(tensor)))


def hash_chunks(chunks: Iterable[Tensor]) -> str:
    """SHA-256 over chunks of float32 or float64 values."""
    digest = hashlib.sha256()
    for chunk in chunks:
        values = chunk.cpu().contiguous().numpy()
        digest.update((values.byteswap() if sys.byteorder == "big" else values).data)
    return digest.hexdigest()


def logical(tensor: Tensor) -> Tensor:
    """Values in row-major order as flat float32 or float64, without a copy where that is possible."""
    flat = tensor.detach().reshape(-1)
    return flat if flat.dtype in _INTEGER else flat.float()


def _chunks(flat: Tensor) -> Iterator[Tensor]:
    for begin in range(0, flat.numel(), CHUNK * 16):
        yield flat[begin : begin + CHUNK * 16]
