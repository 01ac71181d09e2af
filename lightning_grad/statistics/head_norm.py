r"""Gradient norms of a linear output head without a backward pass.

For logits :math:`z_t = W h_t + b` and the score of a completion :math:`y`, with
:math:`\delta_t = \mathrm{onehot}(y_t) - \mathrm{softmax}(z_t)`,

.. math:: \nabla_W \log \pi(y) = \sum_t \delta_t h_t^\top, \qquad
    \|\nabla_W\|_F^2 = \sum_{t,s} (\delta_t \cdot \delta_s)(h_t \cdot h_s).

A bias is one more column of ones in :math:`h`. Let :math:`o_t = e^{z_t - c_t}` for any :math:`c_t`, but 0 for the
target, :math:`O_t` its sum and :math:`S_t` the sum with the target; then
:math:`S_t \delta_t = O_t \, \mathrm{onehot}(y_t) - o_t`. Nothing is subtracted from 1, where a confident model's
gradient would drown, and one pass over the vocabulary is enough. :math:`c_t` only keeps the exponentials in range: 0
does for most models, and where it does not, a guess that is checked afterwards spares a pass for the maximum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_grad._validate import check_choice, check_int

HeadNormMethod = Literal["auto", "direct", "gram", "sketch", "token"]

_DIRECT_LIMIT = 4_000_000  # elements of one sample's V x d gradient that "auto" is willing to form
_TILE = 48  # columns of a Gram matrix that are computed at a time; as many rows would take longer
_LOOK = 128  # columns of the logits from which their size is guessed
_SAFE_LOGIT, _SAFE_SUM = 30.0, math.exp(40.0)  # products of two such sums, and of e^-30, are far inside float32
_CHUNK_BYTES = {"cpu": 8 * 2**20}  # stays in a cache, and new pages for more cost more than it gains; elsewhere:
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
        Norms ``[n]`` in at least float32, on the device of ``logits``. From float32 inputs the exact methods are within
        1e-6 of autograd in float64: products are taken in float32, sums over tokens and blocks in float64.
    """
    check_choice("method", method, get_args(HeadNormMethod))
    check_int("sketch_dim", sketch_dim, 1)
    _, length, vocabulary = logits.shape
    if method == "auto":
        method = _cheapest(length, vocabulary, hidden.shape[-1])
    sketch = _Sketch(vocabulary, sketch_dim, logits.device, generator) if method == "sketch" else None
    return _by_chunk(hidden, logits, targets, mask, bias, method, sketch).clamp_min(0.0).sqrt()


def head_grad_sketch(
    hidden: Tensor,
    logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    bias: bool = False,
    dim: int = 256,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Short vectors in place of the head's gradients: their dot products are those of the gradients, in expectation.

    Unlike norms they have means: what the norm of a mean gradient is can be told from them. Relative standard deviation
    of a squared length about ``sqrt(3 / dim)``. Equal states of ``generator`` give vectors that can be compared.

    Args:
        hidden: As for :func:`head_grad_norm`, and so are ``logits``, ``targets``, ``mask`` and ``bias``.
        logits: ``[n, R, V]``.
        targets: ``[n, R]``.
        mask: ``[n, R]``.
        bias: Whether the head has a bias.
        dim: Length of the vectors, >= 1.
        generator: Random numbers of the sketch; ``None`` uses torch's global generator.

    Returns:
        Vectors ``[n, dim]`` in at least float32, on the device of ``logits``.

    Source: Pham and Pagh, "Fast and scalable polynomial kernels via explicit feature maps" (KDD 2013).
    """
    check_int("dim", dim, 1)
    device = logits.device
    token = _Sketch(logits.shape[2], dim, device, generator)
    width = _Sketch(hidden.shape[2] + bias, dim, device, generator)
    return _by_chunk(hidden, logits, targets, mask, bias, "sketch", token, width)


def _by_chunk(
    hidden: Tensor,
    logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    bias: bool,
    method: HeadNormMethod,
    sketch: _Sketch | None,
    width: _Sketch | None = None,
) -> Tensor:
    rows, length, vocabulary = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if not rows:
        return torch.zeros(0, *(() if width is None else (width.size,)), dtype=dtype, device=logits.device)
    limit = _CHUNK_BYTES.get(logits.device.type, _CHUNK_BYTES_ELSEWHERE) // dtype.itemsize
    chunk = min(rows, max(1, limit // max(1, length * vocabulary)))
    # a sample that is too large goes through in parts of its vocabulary, which a sketch wants in whole blocks
    unit = 1 if sketch is None else sketch.size
    block = vocabulary if method == "direct" else max(unit, limit // max(1, chunk * length) // unit * unit)
    # fresh memory for every part would cost more, in page faults, than the arithmetic
    buffer = torch.empty(chunk * length * min(block, vocabulary), dtype=dtype, device=logits.device)
    wide = dtype if logits.device.type == "mps" else torch.float64  # which that device does not have
    parts = []
    for i in range(0, rows, chunk):
        part = slice(i, i + chunk)
        h, keep = hidden[part].detach().to(wide), mask[part].to(wide)[..., None]
        h = torch.cat([h, torch.ones_like(h[..., :1])], -1) if bias else h
        z = logits[part].detach()
        parts.append(_per_sample(h * keep, z, targets[part], keep, method, sketch, width, buffer, block).to(dtype))
    return torch.cat(parts)


def _cheapest(length: int, vocabulary: int, width: int) -> HeadNormMethod:
    if length * (vocabulary + width) < vocabulary * width:
        return "gram"
    return "direct" if vocabulary * width <= _DIRECT_LIMIT else "sketch"


class _Sketch:
    """A sign for every token, and by how much each block of ``size`` tokens is turned around in the buckets."""

    def __init__(self, vocabulary: int, size: int, device: torch.device, generator: torch.Generator | None) -> None:
        self.size = size
        self.sign = (torch.randint(2, (vocabulary,), generator=generator) * 2 - 1).to(device)
        turns = torch.randint(size, (-(-vocabulary // size),), generator=generator)
        self.turns = turns.tolist()
        token = torch.arange(vocabulary)
        self.bucket = ((token + turns[token // size]) % size).to(device)

    def add(self, buckets: Tensor, part: Tensor, start: int) -> None:
        """Add tokens from ``start`` on, ``[n, R, w]``; block by block, as one pass over contiguous memory."""
        size, sign = self.size, self.sign.to(part.dtype)
        for i in range(0, part.shape[-1], size):
            block, signs = part[..., i : i + size], sign[start + i : start + i + size][: part.shape[-1] - i]
            turn = self.turns[(start + i) // size]
            before = min(size - turn, len(signs))
            buckets[..., turn : turn + before].addcmul_(block[..., :before], signs[:before])
            after = len(signs) - before
            buckets[..., :after].addcmul_(block[..., before:], signs[before:])

    def add_tokens(self, buckets: Tensor, tokens: Tensor, value: Tensor) -> None:
        """Add one token's value per row; both ``[n, R, 1]``."""
        buckets.scatter_add_(-1, self.bucket[tokens], self.sign[tokens] * value)


def _others(
    logits: Tensor, shift: Tensor | None, targets: Tensor, buffer: Tensor, block: int
) -> Iterator[tuple[int, Tensor]]:
    """Blocks ``[n, R, w]`` of ``exp(z - shift)`` over the vocabulary with 0 for the target, and where they start."""
    for start in range(0, logits.shape[-1], block):
        part = logits[..., start : start + block]
        value = buffer[: part.numel()].view(part.shape)
        if shift is None:
            torch.exp(part, out=value)
        else:
            torch.sub(part, shift, out=value).exp_()
        place = targets - start
        inside = (place >= 0) & (place < part.shape[-1])
        place = place.clamp(0, part.shape[-1] - 1)
        yield start, value.scatter_(-1, place, value.gather(-1, place).masked_fill(inside, 0.0))


def _likely_shift(logits: Tensor, targets: Tensor, narrow: torch.dtype) -> Tensor | None:
    """A number not above, and likely near, the maximum of each row (plus 8); ``None``: all rows do without."""
    look = torch.maximum(logits[..., :_LOOK].amax(-1, keepdim=True), logits.gather(-1, targets)).to(narrow)
    if logits.dtype == narrow and bool((look.abs() < _SAFE_LOGIT).all()):
        return None
    return (look / 16).round() * 16  # so few digits that the difference to logits of its size is not rounded


def _add_gram(gram: Tensor, value: Tensor, scratch: Tensor) -> None:
    """Add ``value @ value.mT`` to ``gram`` on and below the diagonal; what is added above it is not defined."""
    if len(value) == 1:  # a batch of one is slower than none
        gram, value, scratch = gram[0], value[0], scratch[0]
    for i in range(0, value.shape[-2], _TILE):
        tile = slice(i, i + _TILE)
        torch.matmul(value[..., i:, :], value[..., tile, :].mT, out=scratch[..., i:, tile])
    gram += scratch


def _per_sample(
    hidden: Tensor,
    logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    method: HeadNormMethod,
    sketch: _Sketch | None,
    width: _Sketch | None,
    buffer: Tensor,
    block: int,
    *,
    guess: bool = True,
) -> Tensor:
    """Squared norms ``[n]``, or vectors ``[n, dim]`` if there is a sketch of ``hidden`` too."""
    n, length, _ = logits.shape
    narrow, wide = buffer.dtype, hidden.dtype
    where = targets[..., None]
    shift = _likely_shift(logits, where, narrow) if guess else logits.amax(-1, keepdim=True).to(narrow)

    def exp(z: Tensor) -> Tensor:
        return (z.to(wide) if shift is None else z.to(wide) - shift).exp()

    chosen = exp(logits.gather(-1, where))
    others, square = torch.zeros_like(chosen), torch.zeros_like(chosen)
    size = length if method == "gram" else 0
    gram, scratch = hidden.new_zeros(n, size, size), buffer.new_zeros(n, size, size)
    buckets = buffer.new_zeros(n, length, 0 if sketch is None else sketch.size)
    for start, value in _others(logits, shift, where, buffer, block):
        others += value.sum(-1, keepdim=True)
        if method == "token":
            square += value.square().sum(-1, keepdim=True)
        elif method == "gram":
            _add_gram(gram, value, scratch)
        elif sketch is not None:
            sketch.add(buckets, value, start)
    if guess and not bool((others < _SAFE_SUM).all()):
        return _per_sample(hidden, logits, targets, mask, method, sketch, width, buffer, block, guess=False)
    total = others + chosen
    if method == "token":
        return (((others.square() + square) / total.square()) * mask).sum((1, 2))
    hidden = hidden / total
    if method == "gram":
        h = hidden @ hidden.mT  # symmetric: it is enough that the rest counts each pair of tokens once
        cross = exp(logits.gather(-1, where.mT.expand_as(h)))
        cross = torch.where(where == where.mT, others * -0.5, cross).mul_(others.mT)
        pairs = gram.tril(-1).sub_(cross).mul_(h).sum((1, 2))
        return 2.0 * pairs + (gram.diagonal(0, 1, 2) * h.diagonal(0, 1, 2)).sum(1)
    if sketch is not None:
        sketch.add_tokens(buckets, where, -others.to(narrow))
        delta = buckets
        if width is not None:
            h = torch.zeros_like(buckets)
            width.add(h, hidden.to(narrow), 0)
            product = torch.fft.rfft(delta) * torch.fft.rfft(h)  # of an outer product: a circular convolution
            vectors: Tensor = torch.fft.irfft(product.sum(1), n=width.size)
            return vectors
    else:
        delta = value.scatter_(-1, where, -others.to(narrow))  # one block holds all; the sign does not matter
    return (delta.mT @ hidden.to(narrow)).square().sum((1, 2)).to(wide)
