"""The 16-point random Hadamard transform of the weight-gradient operands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.nvfp4.format import BLOCK, to_bf16

#: Transformer Engine's fixed sign vector; one vector for all layers makes runs portable.
SIGNS: tuple[int, ...] = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def check_signs(signs: Sequence[int] | None) -> tuple[int, ...]:
    """Return 16 signs, the default for ``None``, else raise ``ValueError``."""
    if signs is None:
        return SIGNS
    values = tuple(signs)
    if len(values) != BLOCK or any(isinstance(s, bool) or s not in (-1, 1) for s in values):
        raise ValueError(f"`hadamard_signs` must be 16 values, each 1 or -1, got {list(values)!r}.")
    return values


def butterfly(x: Tensor) -> Tensor:
    """Sylvester-Hadamard transform of fp32 ``x[A, 16, B]`` along dimension 1, stages of stride 1, 2, 4, 8; eats ``x``.

    The order of the additions is part of the format's definition here: it makes backends agree bit for bit.
    """
    spare = torch.empty_like(x)
    for stride in (1, 2, 4, 8):
        split = (x.shape[0], BLOCK // 2 // stride, 2, stride, x.shape[2])
        (a, b), (low, high) = x.view(split).unbind(2), spare.view(split).unbind(2)
        torch.add(a, b, out=low)
        torch.sub(a, b, out=high)
        x, spare = spare, x
    return x


def butterfly_rows(rows: list[Tensor]) -> list[Tensor]:
    """:func:`butterfly` on 16 separate rows, which makes one loop of it for a compiler."""
    for stride in (1, 2, 4, 8):
        out = list(rows)
        for i in range(BLOCK):
            if not i & stride:
                out[i], out[i + stride] = rows[i] + rows[i + stride], rows[i] - rows[i + stride]
        rows = out
    return rows


def transformed_rows(x: Tensor, signs: Sequence[int]) -> list[Tensor]:
    """The 16 rows of each group transformed, fp32, not yet rounded; one loop for a compiler."""
    return butterfly_rows([row.float() * (0.25 * s) for row, s in zip(x.unbind(1), signs, strict=True)])


def transform_columns(x: Tensor, signs: Sequence[int]) -> Tensor:
    """Transform groups of 16 rows: fp32 ``x[A, 16, B]`` holding bf16 values; rounded to bf16, as fp32."""
    if torch.compiler.is_compiling():
        return torch.stack([to_bf16(row) for row in transformed_rows(x, signs)], dim=1)
    diagonal = torch.tensor([0.25 * s for s in signs], dtype=torch.float32, device=x.device)
    return to_bf16(butterfly(x * diagonal[:, None]))


def rht(x: Tensor, signs: Sequence[int] | None = None, inverse: bool = False) -> Tensor:
    r"""Random Hadamard transform of groups of 16 along the last dimension.

    .. math:: y = x H, \qquad H = \tfrac14 \operatorname{diag}(s) H_{16}, \qquad H H^T = 1

    Args:
        x: Tensor whose last dimension is a multiple of 16; rounded to bf16 first.
        signs: 16 values +-1; ``None`` is the fixed default.
        inverse: Multiply by :math:`H^T` instead.

    Returns:
        bf16 tensor of the shape of ``x``; sums are fp32 and rounded once.
    """
    vector = check_signs(signs)
    if x.ndim == 0 or x.shape[-1] % BLOCK:
        raise ValueError(f"`x` must have a last dimension that is a multiple of 16, got shape {tuple(x.shape)}.")
    groups = to_bf16(x).reshape(-1, BLOCK).t().contiguous()[None]
    if inverse:
        diagonal = torch.tensor([0.25 * s for s in vector], dtype=torch.float32, device=x.device)
        out = to_bf16(butterfly(groups.clone()) * diagonal[:, None])
    else:
        out = transform_columns(groups, vector)
    return out[0].t().reshape(x.shape).to(torch.bfloat16)
