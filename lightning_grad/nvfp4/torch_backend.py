"""The plain-torch backend: any device. It defines the bits the other backends must give."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_grad.nvfp4 import format as fmt
from lightning_grad.nvfp4.exact_products import exact_products
from lightning_grad.nvfp4.format import BLOCK, NVFP4Tensor, ScaleRounding
from lightning_grad.nvfp4.hadamard import transform_columns
from lightning_grad.nvfp4.recipe import Backend, Draw, NVFP4Recipe, Operand, Packed, Transpose
from lightning_grad.nvfp4.stream import gradient_bytes, row_bytes

#: Elements that a CPU handles at a time: what the operations on them leave behind stays in its second-level cache, and
#: is not given back to the system and faulted in again with each.
CHUNK = 1 << 17


def in_chunks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function`` of ``tensors``, which treats all along dimension 0 alike, a chunk at a time."""
    rows = max(CHUNK * tensors[0].shape[0] // max(tensors[0].numel(), 1), 1)
    if rows >= tensors[0].shape[0] or tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        return function(*tensors)
    return torch.cat([function(*parts) for parts in zip(*(t.split(rows) for t in tensors), strict=True)])


def block_amax(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Largest magnitude over ``dims`` (kept) in fp32, NaN-propagating."""
    magnitude = x.float().abs()
    if dims == (1, 3):
        magnitude, dims = magnitude.amax(1, keepdim=True), (3,)
    last = x.ndim - 1
    if dims == (last,) and x.device.type == "cpu" and not torch.compiler.is_compiling():
        # reductions over 16 neighbours are slow in eager mode; pooling gives the same maxima, NaN included
        pooled = F.max_pool1d(magnitude.reshape(1, 1, -1), BLOCK, BLOCK)
        return pooled.view(*magnitude.shape[:-1], 1)
    return magnitude.amax(dims, keepdim=True)


def pad_rows(x: Tensor) -> Tensor:
    """Zero rows up to a multiple of 16, as groups ``[R / 16, 16, C]``."""
    missing = -x.shape[0] % BLOCK
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
    return padded.view(-1, BLOCK, x.shape[1])


def tensor_amax(blocks: Tensor) -> Tensor:
    """``[1]``: the largest of the block maxima."""
    return blocks.amax().reshape(1) if blocks.numel() else blocks.new_zeros(1)


def _measure(x: Tensor, dims: tuple[int, ...], rounding: ScaleRounding) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale codes of the blocks of ``x`` over ``dims``, their values, the factor to the E2M1 range, and the amax."""
    blocks = in_chunks(partial(block_amax, dims=dims), x)
    amax = tensor_amax(blocks)
    return *fmt.block_scales(blocks, amax, rounding), amax


def _to_range(x: Tensor, factor: Tensor) -> Tensor:
    """The input scaled to the E2M1 range and saturated. NaN may stay: the amax makes the whole product NaN."""
    return (x.float() * factor).clamp_(-fmt.E2M1_MAX, fmt.E2M1_MAX)


def round_blocks(x: Tensor, factor: Tensor, scales: Tensor) -> Tensor:
    """Operand values of ``x`` rounded to nearest; ``factor`` and ``scales`` broadcast."""
    return fmt.round_nearest_(_to_range(x, factor)).mul_(scales)


def round_blocks_stochastic(x: Tensor, factor: Tensor, scales: Tensor, k: Tensor) -> Tensor:
    """Operand values of ``x`` rounded stochastically with the random bytes ``k`` (fp32)."""
    return fmt.round_stochastic_(_to_range(x, factor), k).mul_(scales)


def pack_blocks(x: Tensor, factor: Tensor) -> Tensor:
    """Codes ``[G, 8, C]`` of ``x[G, 16, C]`` rounded to nearest, two rows a byte; see :func:`fmt.encode_pairs`."""
    return fmt.encode_pairs(_to_range(x, factor))


def unpack_values(codes: Tensor, scale: Tensor) -> Tensor:
    """Operand ``[R, C]`` of codes ``[R / 16, 8, C]`` and scale values ``[R / 16, C or C / 16]``."""
    groups, _, columns = codes.shape
    values = fmt.decode_pairs(codes).float()
    scale = scale * 2.0**14
    if scale.shape[1] == columns:
        values = values.mul_(scale[:, None])
    else:
        values = values.view(groups, BLOCK, columns // BLOCK, BLOCK).mul_(scale[:, None, :, None])
    return values.view(groups * BLOCK, columns)


def weight_blocks(weight: Tensor, two_d: bool, backward: bool) -> tuple[Tensor, tuple[int, ...]]:
    """Weight as fp32 blocks and the dimensions of a block. 1-D: along K forward, along N backward."""
    n, k = weight.shape
    w = weight.float().contiguous()
    if two_d:
        return w.view(n // BLOCK, BLOCK, k // BLOCK, BLOCK), (1, 3)
    return (w.view(n // BLOCK, BLOCK, k), (1,)) if backward else (w.view(n * k // BLOCK, BLOCK), (1,))


def transform_signs(recipe: NVFP4Recipe) -> tuple[int, ...] | None:
    """Signs of the Hadamard transform; ``None`` does without it."""
    return recipe.hadamard_signs if recipe.rht else None


def finish(acc: Tensor, a: Operand, b: Operand, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Scale the fp32 accumulator, add the bias, cast once."""
    acc.mul_(fmt.product_scale(a.amax, b.amax))
    if bias is not None:
        acc.add_(bias.float())
    return acc.to(out_dtype)


class TorchBackend(Backend):
    """fp32 GEMMs on decoded operands."""

    name = "torch"

    def _values(
        self, x: Tensor, dims: tuple[int, ...], rounding: ScaleRounding, k: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Quantize ``x`` in blocks over ``dims`` and decode without the per-tensor scale."""
        _, scales, factor, amax = _measure(x, dims, rounding)
        if k is None:
            return in_chunks(round_blocks, x, factor, scales), amax
        return in_chunks(round_blocks_stochastic, x, factor, scales, k), amax

    def _rows(self, xb: Tensor, rounding: ScaleRounding, k: Tensor | None) -> Operand:
        values, amax = self._values(xb.view(-1, BLOCK), (1,), rounding, k)
        return Operand(values.view(xb.shape), amax)

    def _groups(self, xb: Tensor, signs: tuple[int, ...] | None) -> Tensor:
        """Groups of 16 rows ``[R / 16, 16, C]``, transformed."""
        groups = pad_rows(xb)
        return groups if signs is None else in_chunks(partial(transform_columns, signs=signs), groups)

    def _packed(self, x: Tensor, dims: tuple[int, ...]) -> Packed:
        """Quantize ``x[G, 16, ...]`` to nearest and pack pairs along dimension 1."""
        codes, _, factor, amax = _measure(x, dims, "nearest")
        if x.ndim == 4:
            x, factor = x.flatten(2), factor.expand(-1, -1, -1, BLOCK).flatten(2)
            codes = codes.flatten(2)
        return Packed(in_chunks(pack_blocks, x, factor).to(torch.uint8), codes[:, 0], amax)

    def quantize(
        self,
        x: Tensor,
        block: tuple[int, int],
        amax: Tensor | None,
        scale_rounding: ScaleRounding,
        u: Tensor | None,
        draw: Draw | None,
    ) -> NVFP4Tensor:
        """Quantize to the public form; see :func:`lightning_grad.nvfp4.quantize`."""
        rows, columns = x.shape
        blocks = x.float().reshape(rows // block[0], block[0], columns // BLOCK, BLOCK)
        magnitude = block_amax(blocks, (1, 3))
        amax = tensor_amax(magnitude) if amax is None else amax.reshape(1).float()
        codes, _, factor = fmt.block_scales(magnitude, amax, scale_rounding)
        y = blocks * factor
        if u is None and draw is not None:
            u = (row_bytes(x.numel() // BLOCK, draw.seed, draw.counters, x.device) + 0.5) / 256.0
        q = fmt.round_e2m1(y, None if u is None else u.reshape(y.shape))
        elements = fmt.encode_e2m1(q).view(rows, columns)
        scales = codes.view(rows // block[0], columns // BLOCK).view(torch.float8_e4m3fn)
        return NVFP4Tensor(fmt.pack(elements), scales, amax, (rows, columns), block)

    def activation(
        self, x: Tensor, recipe: NVFP4Recipe, row: bool, column: bool
    ) -> tuple[Operand | None, Packed | None]:
        """Row operand and packed column form; see :class:`~lightning_grad.nvfp4.recipe.Backend`."""
        xb = fmt.to_bf16(x).contiguous()
        kept = self._packed(self._groups(xb, transform_signs(recipe)), (1,)) if column else None
        return self._rows(xb, "nearest", None) if row else None, kept

    def gradient(
        self, dy: Tensor, recipe: NVFP4Recipe, row: bool, column: bool, draw: Draw | None
    ) -> tuple[Operand | None, Operand | None]:
        """Row and column operands of the output gradient."""
        dyb = fmt.to_bf16(dy).contiguous()
        rounding: ScaleRounding = "nearest"
        k_row = k_column = None
        if draw is not None:
            rounding = recipe.sr_scale
            rows_columns = (dyb.shape[0], dyb.shape[1])
            k_row, k_column = gradient_bytes(rows_columns, (row, column), draw.seed, draw.counters, dyb.device)
        rows = self._rows(dyb, rounding, k_row) if row else None
        if not column:
            return rows, None
        values, amax = self._values(self._groups(dyb, transform_signs(recipe)), (1,), rounding, k_column)
        return rows, Operand(values.flatten(0, 1), amax)

    def unpack(self, packed: Packed) -> Operand:
        """Operand of a packed matrix."""
        return Operand(in_chunks(unpack_values, packed.codes, fmt.scale_values(packed.scales)), packed.amax)

    def pack_weight(self, weight: Tensor, recipe: NVFP4Recipe, backward: bool) -> Packed:
        """Packed weight; a 1-D forward weight is packed transposed, because its blocks lie along K."""
        if not recipe.weight_2d and not backward:
            weight = weight.t()
        return self._packed(*weight_blocks(weight, recipe.weight_2d, backward=True))

    def weight(self, weight: Tensor, recipe: NVFP4Recipe, backward: bool) -> Operand:
        """Weight operand ``[N, K]`` without the packed form."""
        values, amax = self._values(*weight_blocks(weight, recipe.weight_2d, backward), "nearest", None)
        return Operand(values.view(weight.shape), amax)

    def unpack_weight(self, packed: Packed, recipe: NVFP4Recipe, backward: bool) -> Operand:
        """Operand of a packed weight."""
        values, amax = self.unpack(packed)
        return Operand(values if recipe.weight_2d or backward else values.t(), amax)

    def gemm(self, a: Operand, b: Operand, transpose: Transpose, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Product with the per-tensor scales applied in fp32."""
        left = a.values.t() if transpose == "tn" else a.values
        right = b.values.t() if transpose == "nt" else b.values
        if torch.compiler.is_compiling():  # old versions trace no context managers
            return finish(torch.mm(left, right), a, b, bias, out_dtype)
        with exact_products():
            product = torch.mm(left, right)
        return finish(product, a, b, bias, out_dtype)
