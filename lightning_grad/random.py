"""Counter-based random numbers: the same bits on every device, dtype, version and call order.

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11) maps a counter and a key to random words
without any state, so a number is named by *where* it is used (step, layer, block) and a resumed run draws it again.

- :func:`philox4x32`: ten rounds on 32-bit words, for stochastic rounding (NVFP4) and samplers. Triton's ``tl.philox``
  gives the same words.
- :func:`philox4x64`: ten rounds on 64-bit words, for shared-seed signs (SPSA). :func:`philox4x64_stream` gives the same
  words through numpy's C implementation.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_M32 = (0xD2511F53, 0xCD9E8D57)
_W32 = (0x9E3779B9, 0xBB67AE85)
_M64 = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_W64 = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10

Word = Tensor | int


def philox4x32(counter: tuple[Word, Word, Word, Word], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 in int64 lanes.

    Args:
        counter: Four words in [0, 2**32): int64 tensors that broadcast against each other, or Python integers. At least
            one must be a tensor; it gives the device.
        seed: Key in [0, 2**64): low 32 bits first.

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2**32).
    """
    device = next(word.device for word in counter if isinstance(word, Tensor))
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64, device=device) for word in counter)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(_ROUNDS):
        # The product wraps modulo 2**64 in int64, which leaves its bits right. Words 1 and 3 keep the whole product;
        # masks drop its high half and the sign extension of the shift where they would matter.
        p0, p1 = c0 * _M32[0], c2 * _M32[1]
        c0 = _xor(p1 >> 32, c1).bitwise_xor_(k0).bitwise_and_(_MASK32)
        c2 = _xor(p0 >> 32, c3).bitwise_xor_(k1).bitwise_and_(_MASK32)
        c1, c3 = p1, p0
        k0, k1 = (k0 + _W32[0]) & _MASK32, (k1 + _W32[1]) & _MASK32
    c1, c3 = c1 & _MASK32, c3 & _MASK32
    shape = torch.broadcast_shapes(c0.shape, c1.shape, c2.shape, c3.shape)
    return c0.expand(shape), c1.expand(shape), c2.expand(shape), c3.expand(shape)


def philox4x64(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x64-10 in int64 lanes (the bits of the unsigned words).

    Args:
        counter: Four words: int64 tensors holding the bits of the unsigned value, or Python integers in [0, 2**64). At
            least one must be a tensor; it gives the device.
        key: Two words in [0, 2**64).

    Returns:
        Four int64 tensors of the broadcast shape; their bit patterns are the unsigned output words.
    """
    device = next(word.device for word in counter if isinstance(word, Tensor))
    c0, c1, c2, c3 = (
        word if isinstance(word, Tensor) else torch.tensor(_signed(word), dtype=torch.int64, device=device)
        for word in counter
    )
    k0, k1 = key
    for _ in range(_ROUNDS):
        hi0, hi1 = _mulhi64(c0, _M64[0]), _mulhi64(c2, _M64[1])
        lo0, lo1 = c0 * _signed(_M64[0]), c2 * _signed(_M64[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ _signed(k0), lo1, hi0 ^ c3 ^ _signed(k1), lo0
        k0, k1 = (k0 + _W64[0]) & _MASK64, (k1 + _W64[1]) & _MASK64
    shape = torch.broadcast_shapes(c0.shape, c1.shape, c2.shape, c3.shape)
    return c0.expand(shape), c1.expand(shape), c2.expand(shape), c3.expand(shape)


def philox4x64_generator(key: tuple[int, int], counter: tuple[int, int, int, int]) -> np.random.Philox:
    """A numpy bit generator whose first ``random_raw`` words are those of ``counter``; later ones follow it.

    Args:
        key: Two words in [0, 2**64).
        counter: First counter; its 256-bit value (word 0 is the lowest) rises by one per block of four words.
    """
    value = sum(word << (64 * i) for i, word in enumerate(counter))
    # numpy increments the counter before it generates, so start one below
    before = (value - 1) % (1 << 256)
    words = [before >> (64 * i) & _MASK64 for i in range(4)]
    return np.random.Philox(key=np.array(key, dtype=np.uint64), counter=np.array(words, dtype=np.uint64))


def philox4x64_stream(key: tuple[int, int], counter: tuple[int, int, int, int], num_blocks: int) -> NDArray[np.uint64]:
    """Output words of ``num_blocks`` consecutive counters, in numpy's C implementation.

    Args:
        key: Two words in [0, 2**64).
        counter: First counter; its 256-bit value (word 0 is the lowest) rises by one per block.
        num_blocks: Number of blocks of four words, >= 0.

    Returns:
        uint64 array of ``4 * num_blocks`` words, block after block.
    """
    raw: NDArray[np.uint64] = philox4x64_generator(key, counter).random_raw(4 * num_blocks)
    return raw


def _xor(a: Tensor, b: Tensor) -> Tensor:
    """``a ^ b``, in the memory of ``a`` where the shape allows it: new memory costs a quarter of the whole."""
    return a.bitwise_xor_(b) if b.ndim == 0 or b.shape == a.shape else a ^ b


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit word."""
    return word - (1 << 64) if word >= 1 << 63 else word


def _mulhi64(a: Tensor, b: int) -> Tensor:
    """High 64 bits of the unsigned product, from 32-bit limbs (int64 has no wider product)."""
    a_lo, a_hi = a & _MASK32, a >> 32 & _MASK32
    b_lo, b_hi = b & _MASK32, b >> 32
    low = a_lo * b_lo
    mid1 = a_hi * b_lo + (low >> 32 & _MASK32)
    # a_hi * b_lo + carry stays below 2**64, so its unsigned high half is recovered by a masked shift
    mid2 = a_lo * b_hi + (mid1 & _MASK32)
    return a_hi * b_hi + (mid1 >> 32 & _MASK32) + (mid2 >> 32 & _MASK32)
