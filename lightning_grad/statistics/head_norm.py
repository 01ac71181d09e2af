r"""Gradient norms of a linear output head without a backward pass.

For logits :math:`z_t = W h_t + b` and the score of a completion :math:`y`, with
:math:`\delta_t = \mathrm{onehot}(y_t) - \mathrm{softmax}(z_t)`,

.. math:: \nabla_W \log \pi(y) = \sum_t \delta_t h_t^\top, \qquad
    \|\nabla_W\|_F^2 = \sum_{t,s} (\delta_t \cdot \delta_s)(h_t \cdot h_s).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_grad._validate import check_choice, check_int

HeadNormMethod = Literal["auto", "direct", "gram", "sketch", "token"]

_DIRECT_LIMIT = 4_000_000  # elements of one sample's V x d gradient that "auto" is willing to form
_CHUNK_BYTES = {"cpu": 16 * 2**20}  # small enough to stay in the allocator's cache; elsewhere:
_CHUNK_BYTES_ELSEWHERE = 256 * 2**20


def head_grad_norm(
    hidden: Tensor,
    logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    bias: bool = False,
    method: HeadNormMethod = "auto",
    sketch_dim: int = 256,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Norm of the head's gradient of each completion's summed log-likelihood.

    Args:
        hidden: Inputs of the head, ``[n, R, d]``.
        logits: Its outputs, ``[n, R, V]``.
        targets: Completion tokens, int64 ``[n, R]``.
        mask: 1 on the tokens that count (up to and including the end token), ``[n, R]``.
        bias: Whether the head has a bias; its gradient is then part of the norm.
        method: ``"direct"`` forms the ``V x d`` gradient, ``"gram"`` two ``R x R`` matrices (both exact), ``"sketch"``
            hashes the vocabulary to ``sketch_dim`` signed buckets (unbiased for the squared norm, relative standard
            deviation about ``sqrt(2 / sketch_dim)``), ``"token"`` adds ``|delta_t|**2`` only (a proxy that ignores
            ``hidden``). ``"auto"`` takes the cheaper exact one, or the sketch where both would be large.
        sketch_dim: Buckets of the sketch, >= 1.
        generator: Random numbers of the sketch; ``None`` uses torch's global generator.

    Returns:
        Norms ``[n]`` in at least float32, on the device of ``logits``.
    """
    check_choice("method", method, get_args(HeadNormMethod))
    check_int("sketch_dim", sketch_dim, 1)
    rows, length, vocabulary = logits.shape
    width = hidden.shape[-1]
    if method == "auto":
        method = _cheapest(length, vocabulary, width)
    sketch = _sketch(vocabulary, sketch_dim, logits, generator) if method == "sketch" else None
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if not rows:
        return torch.zeros(0, dtype=dtype, device=logits.device)
    limit = _CHUNK_BYTES.get(logits.device.type, _CHUNK_BYTES_ELSEWHERE)
    chunk = min(rows, max(1, limit // max(1, dtype.itemsize * length * vocabulary)))
    # fresh memory for every chunk would cost more, in page faults, than the arithmetic
    buffer = torch.empty(chunk, length, vocabulary, dtype=dtype, device=logits.device)
    parts = [
        _squared_norm(
            hidden[i : i + chunk],
            logits[i : i + chunk],
            targets[i : i + chunk],
            mask[i : i + chunk],
            bias,
            method,
            sketch_dim,
            sketch,
            buffer[: len(logits[i : i + chunk])],
        )
        for i in range(0, rows, chunk)
    ]
    return torch.cat(parts).clamp_min(0.0).sqrt()


def _cheapest(length: int, vocabulary: int, width: int) -> HeadNormMethod:
    if length * (vocabulary + width) < vocabulary * width:
        return "gram"
    return "direct" if vocabulary * width <= _DIRECT_LIMIT else "sketch"


def _sketch(vocabulary: int, size: int, like: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A sign for every token, and by how much each block of ``size`` tokens is turned around in the buckets."""
    sign = torch.randint(2, (vocabulary,), generator=generator) * 2 - 1
    return sign.to(like.device), torch.randint(size, (-(-vocabulary // size),), generator=generator)


def _hashed(delta: Tensor, size: int, sketch: tuple[Tensor, Tensor]) -> Tensor:
    """``delta [n, R, V]`` in signed buckets ``[n, R, size]``; block by block, as one pass over contiguous memory."""
    sign, turns = sketch[0].to(delta.dtype), sketch[1].tolist()
    buckets = delta.new_zeros(*delta.shape[:2], size)
    for block, signs, turn in zip(delta.split(size, -1), sign.split(size), turns, strict=True):
        before = min(size - turn, len(signs))
        buckets[..., turn : turn + before].addcmul_(block[..., :before], signs[:before])
        after = len(signs) - before
        buckets[..., :after].addcmul_(block[..., before:], signs[before:])
    return buckets


def _squared_norm(
    hidden: Tensor,
    logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    bias: bool,
    method: HeadNormMethod,
    sketch_dim: int,
    sketch: tuple[Tensor, Tensor] | None,
    buffer: Tensor,
) -> Tensor:
    dtype = buffer.dtype
    delta = torch.softmax(logits.detach().to(dtype), dim=-1, out=buffer)  # the sign does not matter
    delta.scatter_add_(-1, targets[..., None], torch.full_like(targets[..., None], -1.0, dtype=dtype))
    mask = mask.to(dtype)
    if method == "token":
        return (delta.square().sum(2) * mask).sum(1)
    # another pass over all logits would cost as much as the rest, so the mask goes to what is small
    hidden = hidden.to(dtype) * mask[..., None]
    total = (mask[:, None] @ delta).square().sum((1, 2)) if bias else torch.zeros_like(hidden[:, 0, 0])
    if method == "gram":
        return total + (delta @ delta.mT).mul_(hidden @ hidden.mT).sum((1, 2))
    if sketch is not None:
        delta = _hashed(delta, sketch_dim, sketch)
    return total + (delta.mT @ hidden).square().sum((1, 2))
