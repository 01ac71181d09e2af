"""The pass of :mod:`lightning_grad.spsa.kernels` as one fused Triton kernel: each element is loaded and stored once.

One program works on ``NUM_BLOCKS`` Philox blocks of 256 elements, held as a tile of words by 64 bits. No multiplication
meets an addition, so contraction cannot change a result; ``(y + M) - M`` stays two roundings, because neither Triton
nor ptxas reassociates floating point. 64-bit Philox is written out here: Triton's own helper fixes the high key word
to zero.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_grad.spsa.layout import Layout, Storage
from lightning_grad.spsa.signs import BLOCK, SIGN_TAG

if TYPE_CHECKING:
    from lightning_grad.spsa.kernels import Pass, Weighted

_BLOCKS = 4


@triton.jit
def _signed_sum(terms_ptr, weights_ptr, count, k0, k1, block, x, SHAPE0: tl.constexpr):
    """``x`` plus the weighted signs of ``count`` directions, for the blocks numbered ``block``."""
    shift = tl.arange(0, 64).to(tl.uint64)
    i = 0
    while i < count:  # the interpreter cannot take range() of a kernel argument
        c0 = block + 1
        c1 = block * 0
        c2 = c1 + tl.load(terms_ptr + 2 * i).to(tl.uint64, bitcast=True)
        c3 = c1 + tl.load(terms_ptr + 2 * i + 1).to(tl.uint64, bitcast=True)
        key0, key1 = k0, k1
        for _ in tl.static_range(10):
            hi0 = tl.umulhi(c0, c1 * 0 + 0xD2E7470EE14C6C93)
            hi1 = tl.umulhi(c2, c1 * 0 + 0xCA5A826395121157)
            lo0 = c0 * 0xD2E7470EE14C6C93
            lo1 = c2 * 0xCA5A826395121157
            c0 = hi1 ^ c1 ^ key0
            c2 = hi0 ^ c3 ^ key1
            c1 = lo1
            c3 = lo0
            key0 = key0 + 0x9E3779B97F4A7C15
            key1 = key1 + 0xBB67AE8584CAA73B
        words = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (SHAPE0,))
        bits = (words[:, None] >> shift[None, :]) & 1
        weight = tl.load(weights_ptr + i).to(x.dtype)
        x = x + tl.where(bits != 0, weight, -weight)
        i += 1
    return x


@triton.jit
def _pass_kernel(
    x_ptr, numel, first_block, key_ptr, eps,
    moves_ptr, move_weights_ptr, num_moves,
    changes_ptr, change_weights_ptr, num_changes,
    UPDATE: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    rows: tl.constexpr = NUM_BLOCKS * 4
    word = pid * rows + tl.arange(0, rows).to(tl.int64)
    index = word[:, None] * 64 + tl.arange(0, 64).to(tl.int64)[None, :]
    inside = index < numel
    x = tl.load(x_ptr + index, mask=inside, other=0.0)
    block = (first_block + pid * NUM_BLOCKS + tl.arange(0, NUM_BLOCKS).to(tl.int64)).to(tl.uint64)
    k0 = tl.load(key_ptr).to(tl.uint64, bitcast=True)
    k1 = tl.load(key_ptr + 1).to(tl.uint64, bitcast=True)
    x = _signed_sum(moves_ptr, move_weights_ptr, num_moves, k0, k1, block, x, rows)
    if UPDATE:
        # the sum is formed apart from x: only then is every partial sum exact
        change = _signed_sum(changes_ptr, change_weights_ptr, num_changes, k0, k1, block, x * 0.0, rows)
        y = x + change
        if x.dtype == tl.float64:
            bits = y.to(tl.int64, bitcast=True)
            head = (bits & 0x7FF0000000000000).to(tl.float64, bitcast=True)
        else:
            bits = y.to(tl.int32, bitcast=True)
            head = (bits & 0x7F800000).to(tl.float32, bitcast=True)
        size = tl.maximum(head, (x * 0.0) + eps) * 2.0
        magic = tl.where(bits < 0, -size, size)
        x = (y + magic) - magic
    tl.store(x_ptr + index, x, mask=inside)


class TritonKernel:
    """CUDA (or Triton's interpreter): one launch per parameter and pass."""

    name = "triton"

    def run(self, layout: Layout, stores: Sequence[Storage], work: Pass, start: int, stop: int) -> None:
        """See :class:`lightning_grad.spsa.kernels.Kernel`."""
        device = stores[0].param.device
        key = torch.tensor([_signed(work.seed), SIGN_TAG], dtype=torch.int64, device=device)
        moves = _term_tensors(work.moves, device)
        changed = _term_tensors(work.changes or (), device)
        for piece in layout.pieces(start, stop):
            store = stores[piece.index]
            x = store.load(piece.begin, piece.end, work.moving)
            grid = (-(-x.numel() // (_BLOCKS * BLOCK)),)
            launch: Any = _pass_kernel[grid]
            launch(
                x, x.numel(), piece.virtual // BLOCK, key, work.eps, *moves, len(work.moves), *changed,
                len(work.changes or ()), UPDATE=bool(work.changes), NUM_BLOCKS=_BLOCKS,
            )  # fmt: skip
            store.save(piece.begin, piece.end, x)


def _term_tensors(terms: Sequence[Weighted], device: torch.device) -> tuple[Tensor, Tensor]:
    rows = [(_signed(t), _signed(d)) for t, d, _ in terms] or [(0, 0)]
    weights = [weight for _, _, weight in terms] or [0.0]
    return torch.tensor(rows, dtype=torch.int64, device=device), torch.tensor(
        weights, dtype=torch.float32, device=device
    )


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
