"""The stochastic-rounding stream: counter-based, so backends, resumes and recomputations draw the same numbers.

One Philox4x32-10 call serves one block of 16 elements, 8 bits each. The counter names the place of use: block index
(row-major in the tensor being quantized), backward step, ``layer << 1 | role``, rank. Role 0 is the row form of the
output gradient, role 1 its column form, whose blocks are numbered over ``[N, M / 16]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lightning_grad._validate import check_int
from lightning_grad.nvfp4.format import BLOCK
from lightning_grad.random import Word, philox4x32

Counters = tuple[Word, Word, Word]
#: Lowest bit of counter word 2: 0 for the row form of the output gradient, 1 for its column form.
ROLE_COLUMNS = 1


def check_stream(seed: int, counters: Sequence[Word]) -> Counters:
    """Return words 1 to 3 of the counter; refuse what Philox would silently take modulo its width.

    Args:
        seed: Key in [0, 2**64).
        counters: Step, ``layer << 1 | role``, rank: integers in [0, 2**32), or integer tensors, which are not read.

    Raises:
        ValueError: A number is out of range, or there are not three words.
    """
    check_int("seed", seed, 0, 2**64 - 1)
    if len(counters) != 3:
        raise ValueError(f"`counters` must be three words (step, layer << 1 | role, rank), got {len(counters)}.")
    for word in counters:
        if not isinstance(word, Tensor):
            check_int("counters", word, 0, 2**32 - 1)
    c1, c2, c3 = counters
    return c1, c2, c3


def philox(c0: Word, c1: Word, c2: Word, c3: Word, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: the four output words of one counter; see :func:`lightning_grad.random.philox4x32`."""
    return philox4x32((c0, c1, c2, c3), seed)


@lru_cache(1024)  # bounded: a step given as an integer is another one each time
def _constant(word: int, device: torch.device) -> Tensor:
    return torch.tensor(word, dtype=torch.int64, device=device)


def device_words(counters: Counters, device: torch.device) -> tuple[Tensor, ...]:
    """Words 1 to 3 as int64 tensors ``[]``; those of a layer are copied to ``device`` once."""
    return tuple(word if isinstance(word, Tensor) else _constant(word, device) for word in counters)


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


def _spread(words: Sequence[Tensor], groups: int, columns: int) -> Tensor:
    """Words of the blocks ``[groups, columns]`` as fp32 bytes ``[groups, 16, columns]``."""
    out = torch.empty(groups, BLOCK, columns, device=words[0].device)
    for i, word in enumerate(words):  # torch.cat would keep the transposed strides and slow down what follows
        out[:, 4 * i : 4 * i + 4] = _bytes(word.view(groups, columns)).transpose(1, 2)
    return out


def gradient_bytes(
    shape: tuple[int, int], want: tuple[bool, bool], seed: int, counters: Counters, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Random bytes of the row and the column form of an output gradient, as far as wanted.

    Both come from one Philox call, which costs more in operations than in numbers.

    Args:
        shape: Tokens M, and output features N, a multiple of 16.
        want: Row form, column form.
        seed: Key.
        counters: Words 1 to 3 of role 0.
        device: Where to put them.

    Returns:
        fp32 ``[M * N / 16, 16]`` and ``[ceil(M / 16), 16, N]``, holding 0..255; ``None`` if unwanted.
    """
    rows, columns = shape
    groups = (rows + BLOCK - 1) // BLOCK
    first, second = want[0] * rows * columns // BLOCK, want[1] * groups * columns
    # row blocks are numbered in their order in memory, blocks of the column form over the transposed matrix
    by_row = torch.arange(first, dtype=torch.int64, device=device)
    by_column = torch.arange(second, dtype=torch.int64, device=device).view(columns, second // columns).t().reshape(-1)
    role = torch.zeros(first + second, dtype=torch.int64, device=device)
    role[first:] = ROLE_COLUMNS
    c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64, device=device) for word in counters)
    drawn = [word.to(torch.int32) for word in philox4x32((torch.cat((by_row, by_column)), c1, role + c2, c3), seed)]
    row = column = None
    if first:
        row = _bytes(torch.stack([word[:first] for word in drawn], dim=-1)).view(-1, BLOCK).to(torch.float32)
    if second:
        column = _spread([word[first:] for word in drawn], groups, columns)
    return row, column


def sr_uniform(
    n_blocks: int, seed: int = 0, counters: Sequence[Word] = (0, 0, 0), device: torch.device | str = "cpu"
) -> Tensor:
    """Uniforms ``(k + 0.5) / 256`` of the stream.

    Args:
        n_blocks: Number of 16-element blocks, counted from 0.
        seed: Key in [0, 2**64).
        counters: Step, ``layer << 1 | role``, rank; each in [0, 2**32).
        device: Where to put them.

    Returns:
        fp32 ``[n_blocks, 16]`` in (0, 1).

    Raises:
        ValueError: An argument is out of range.
    """
    check_int("n_blocks", n_blocks, 0)
    k = row_bytes(n_blocks, seed, check_stream(seed, counters), torch.device(device))
    return (k.to(torch.float32) + 0.5) / 256.0
