"""The stochastic-rounding stream: counter-based, so backends, resumes and recomputations draw the same numbers.

One Philox4x32-10 call serves one block of 16 elements, 8 bits each. The counter names the place of use: block index
(row-major in the tensor being quantized), backward step, ``layer << 1 | role``, rank. Role 0 is the row form of the
output gradient, role 1 its column form, whose blocks are numbered over ``[N, M / 16]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.nvfp4.format import BLOCK
from lightning_grad.random import Word, philox4x32

Counters = tuple[Word, Word, Word]
#: Lowest bit of counter word 2: 0 for the row form of the output gradient, 1 for its column form.
ROLE_COLUMNS = 1


def philox(c0: Word, c1: Word, c2: Word, c3: Word, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: the four output words of one counter; see :func:`lightning_grad.random.philox4x32`."""
    return philox4x32((c0, c1, c2, c3), seed)


def _bytes(word: Tensor) -> Tensor:
    """The four bytes of each 32-bit word, low first, in a new last dimension."""
    if torch.compiler.is_compiling():
        shifts = torch.arange(0, 32, 8, device=word.device)
        return ((word[..., None] >> shifts) & 255).to(torch.uint8)
    return word.to(torch.int32)[..., None].view(torch.uint8)


def row_bytes(num_blocks: int, seed: int, counters: Counters, device: torch.device) -> Tensor:
    """uint8 ``[num_blocks, 16]``: the random bytes of consecutive blocks."""
    index = torch.arange(num_blocks, dtype=torch.int64, device=device)
    words = philox4x32((index, *counters), seed)
    return _bytes(torch.stack(words, dim=-1)).view(num_blocks, BLOCK)


def _column_words(groups: int, columns: int, seed: int, counters: Counters, device: torch.device) -> tuple[Tensor, ...]:
    index = torch.arange(columns, dtype=torch.int64, device=device) * groups
    index = index + torch.arange(groups, dtype=torch.int64, device=device)[:, None]
    return philox4x32((index, *counters), seed)


def column_bytes(groups: int, columns: int, seed: int, counters: Counters, device: torch.device) -> Tensor:
    """uint8 ``[groups, 16, columns]``: bytes of the transposed tensor ``[columns, 16 * groups]``, not transposed."""
    words = _column_words(groups, columns, seed, counters, device)
    out = torch.empty(groups, BLOCK, columns, dtype=torch.uint8, device=device)
    for i, word in enumerate(words):  # torch.cat would keep the transposed strides and slow down what follows
        out[:, 4 * i : 4 * i + 4] = _bytes(word).transpose(1, 2)
    return out


def both_bytes(rows: int, columns: int, seed: int, counters: Counters, device: torch.device) -> tuple[Tensor, Tensor]:
    """:func:`row_bytes` and :func:`column_bytes` of one output gradient ``[rows, columns]``, from one Philox call.

    A call costs more in operations than in numbers, so eager mode gains a third of it.
    """
    groups = (rows + BLOCK - 1) // BLOCK
    first = rows * columns // BLOCK
    index = torch.empty(first + groups * columns, dtype=torch.int64, device=device)
    role = torch.zeros_like(index)
    torch.arange(first, out=index[:first])
    grid = index[first:].view(groups, columns)
    grid.copy_(torch.arange(columns, device=device) * groups)
    grid.add_(torch.arange(groups, device=device)[:, None])
    role[first:] = ROLE_COLUMNS
    c1, c2, c3 = counters
    words = philox4x32((index, c1, role + c2, c3), seed)
    row = torch.empty(first, 4, dtype=torch.int32, device=device)
    column = torch.empty(groups, BLOCK, columns, dtype=torch.uint8, device=device)
    for i, word in enumerate(words):
        row[:, i] = word[:first]
        column[:, 4 * i : 4 * i + 4] = _bytes(word[first:].view(groups, columns)).transpose(1, 2)
    return row.view(torch.uint8), column


def column_byte_rows(groups: int, columns: int, seed: int, counters: Counters, device: torch.device) -> list[Tensor]:
    """:func:`column_bytes` as 16 separate rows ``[groups, columns]``, for compilers."""
    words = _column_words(groups, columns, seed, counters, device)
    return [(word >> shift) & 255 for word in words for shift in (0, 8, 16, 24)]


def sr_uniform(
    n_blocks: int, seed: int = 0, counters: Sequence[Word] = (0, 0, 0), device: torch.device | str = "cpu"
) -> Tensor:
    """Uniforms ``(k + 0.5) / 256`` of the stream.

    Args:
        n_blocks: Number of 16-element blocks, counted from 0.
        seed: 64-bit key.
        counters: Step, ``layer << 1 | role``, rank; each in [0, 2**32).
        device: Where to put them.

    Returns:
        fp32 ``[n_blocks, 16]``.
    """
    c1, c2, c3 = counters
    k = row_bytes(n_blocks, seed, (c1, c2, c3), torch.device(device))
    return (k.to(torch.float32) + 0.5) / 256.0
