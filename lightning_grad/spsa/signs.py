r"""The random directions: signs that any machine, device and library version draws alike.

Element ``v`` of direction ``d`` at step ``t`` is one bit of Philox 4x64-10: key ``(seed, tag)``, counter
``(v // 256 + 1, 0, t, d)``, bit ``v % 256`` of the 256 output bits, ``z = 2 bit - 1``. The counter fields make
``(t, d, v) -> bit`` injective, so no two directions can share a stream.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11).
"""

from __future__ import annotations

import sys
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_grad._validate import check_int
from lightning_grad.random import philox4x64, philox4x64_generator

BLOCK = 256
SIGN_TAG = 0x4C47535053410001
_BIG_ENDIAN = sys.byteorder == "big"


class SignStream:
    """Sign bits of one direction as bytes (bit order little), from a block on, in numpy's C implementation."""

    def __init__(self, seed: int, step: int, direction: int, block: int = 0) -> None:
        self._bits = philox4x64_generator((seed, SIGN_TAG), (block + 1, 0, step, direction))

    def take(self, num_elements: int) -> NDArray[np.uint8]:
        """Bytes of the next ``num_elements`` signs; ``num_elements`` must be a multiple of 256."""
        raw: NDArray[np.uint64] = self._bits.random_raw(num_elements // 64)
        return (raw.byteswap() if _BIG_ENDIAN else raw).view(np.uint8)


def sign_bytes(seed: int, step: int, direction: int, block: int, num_blocks: int, device: torch.device) -> Tensor:
    """The same bytes as :class:`SignStream`, computed with torch on any device; uint8, 32 per block."""
    first = torch.arange(block + 1, block + 1 + num_blocks, dtype=torch.int64, device=device)
    words = torch.stack(philox4x64((first, 0, step, direction), (seed, SIGN_TAG)), dim=-1)
    if _BIG_ENDIAN:
        return words.view(torch.uint8).view(-1, 8).flip(1).reshape(-1)
    return words.view(torch.uint8).view(-1)


@lru_cache(maxsize=1)
def bit_table() -> NDArray[np.float32]:
    """Row ``b``: the eight signs (-1 or +1) that byte ``b`` stands for."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return bits.astype(np.float32) * 2 - 1


def rademacher(
    seed: int,
    step: int,
    direction: int,
    numel: int,
    *,
    start: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Signs -1 and +1 of one direction.

    Args:
        seed: Run seed, in [0, 2**64).
        step: Step ``t``, in [0, 2**63).
        direction: Direction ``d``, in [0, 2**63).
        numel: Number of signs, >= 0.
        start: First virtual index; a multiple of 256.
        device: Where the signs are computed; the values do not depend on it.
        dtype: Of the result.

    Raises:
        ValueError: An argument is out of range.
    """
    check_int("seed", seed, 0, 2**64 - 1)
    check_int("step", step, 0, 2**63 - 1)
    check_int("direction", direction, 0, 2**63 - 1)
    check_int("numel", numel, 0)
    if check_int("start", start, 0) % BLOCK:
        raise ValueError(f"`start` must be a multiple of {BLOCK}, got {start}.")
    device = torch.device(device)
    padded = -(-numel // BLOCK) * BLOCK
    if device.type == "cpu":
        rows = torch.from_numpy(SignStream(seed, step, direction, start // BLOCK).take(padded).copy())
    else:
        rows = sign_bytes(seed, step, direction, start // BLOCK, padded // BLOCK, device)
    table = torch.from_numpy(bit_table()).to(device)
    return table.index_select(0, rows.int()).view(-1)[:numel].to(dtype)
