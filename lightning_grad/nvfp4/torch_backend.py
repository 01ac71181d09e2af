"""The plain-torch backend: any device, eager or compiled. It defines the bits the other backends must give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_grad.nvfp4 import format as fmt
from lightning_grad.nvfp4.format import BLOCK, NVFP4Tensor, ScaleRounding
from lightning_grad.nvfp4.hadamard import butterfly_rows, transform_columns
from lightning_grad.nvfp4.recipe import Draw, NVFP4Recipe, Operand, Packed, Transpose
from lightning_grad.nvfp4.stream import ROLE_COLUMNS, both_bytes, column_byte_rows, column_bytes, row_bytes

#: Key in decimal, and counter words 1 to 3. As text the key is a constant of a compiled quantizer; inductor fails on
#: the 64-bit arithmetic of a symbolic one.
Stream = tuple[str, Tensor, Tensor, Tensor]


def block_amax(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Largest magnitude over ``dims`` (kept), NaN-propagating."""
    magnitude = x.abs()
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


def _scaled(x: Tensor, dims: tuple[int, ...], rounding: ScaleRounding) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The input scaled to the E2M1 range and saturated, scale codes and values of its blocks, amax."""
    blocks = block_amax(x, dims)
    amax = tensor_amax(blocks)
    codes, scales, factor = fmt.block_scales(blocks, amax, rounding)
    # NaN may stay: the amax makes the whole product NaN
    return (x * factor).clamp_(-fmt.E2M1_MAX, fmt.E2M1_MAX), codes, scales, amax


def operand(x: Tensor, dims: tuple[int, ...], rounding: ScaleRounding, k: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize fp32 ``x`` in blocks over ``dims`` and decode without the per-tensor scale."""
    y, _, scales, amax = _scaled(x, dims, rounding)
    q = fmt.round_nearest_(y) if k is None else fmt.round_stochastic_(y, k)
    return q.mul_(scales), amax


def packed(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize fp32 ``x[G, 16, ...]`` to nearest and pack pairs along dimension 1."""
    y, scale_codes, _, amax = _scaled(x, dims, "nearest")
    y.nan_to_num_(fmt.E2M1_MAX)
    codes = fmt.encode_e2m1(fmt.round_nearest_(y.clone()).copysign_(y))
    low, high = codes.view(x.shape[0], BLOCK // 2, 2, *x.shape[2:]).unbind(2)
    return low | (high << 4), scale_codes, amax


def rows_operand(xb: Tensor, rounding: ScaleRounding, k: Tensor | None) -> tuple[Tensor, Tensor]:
    """Row operand of ``xb``, fp32 holding bf16 values."""
    values, amax = operand(xb.view(-1, BLOCK), (1,), rounding, k)
    return values.view(xb.shape), amax


def _groups(xb: Tensor, signs: tuple[int, ...] | None) -> Tensor:
    groups = pad_rows(xb)
    return groups if signs is None else transform_columns(groups, signs)


def _column_rows(
    xb: Tensor, signs: tuple[int, ...] | None, rounding: ScaleRounding, ks: list[Tensor] | None
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Column form as 16 separate rows ``[G, C]`` on the E2M1 grid, scale codes and values, amax.

    For compilers: with every step pointwise, transform, rounding and packing become one loop.
    """
    rows = list(pad_rows(xb).unbind(1))
    if signs is not None:
        rows = [fmt.to_bf16(r) for r in butterfly_rows([r * (0.25 * s) for r, s in zip(rows, signs, strict=True)])]
    blocks = rows[0].abs()
    for row in rows[1:]:
        blocks = torch.maximum(blocks, row.abs())
    amax = tensor_amax(blocks)
    codes, scales, factor = fmt.block_scales(blocks, amax, rounding)
    grid = []
    for i, row in enumerate(rows):
        y = (row * factor).clamp(-fmt.E2M1_MAX, fmt.E2M1_MAX)
        y = y.nan_to_num(fmt.E2M1_MAX)
        q = fmt.round_nearest_(y.clone()).copysign(y) if ks is None else fmt.round_stochastic_(y, ks[i])
        grid.append(q)
    return grid, codes, scales, amax


def activation(x: Tensor, signs: tuple[int, ...] | None, row: bool, column: bool) -> tuple[Tensor, ...]:
    """Row operand and packed column form of a bf16 activation, as far as wanted: values, amax, codes, scales, amax."""
    xb = fmt.to_bf16(x).contiguous()
    out: tuple[Tensor, ...] = rows_operand(xb, "nearest", None) if row else ()
    if not column:
        return out
    if torch.compiler.is_compiling():
        grid, codes, _, amax = _column_rows(xb, signs, "nearest", None)
        elements = [fmt.encode_e2m1(q) for q in grid]
        pairs = [low | (high << 4) for low, high in zip(elements[::2], elements[1::2], strict=True)]
        return *out, torch.stack(pairs, dim=1), codes, amax
    packed_codes, scales, amax = packed(_groups(xb, signs), (1,))
    return *out, packed_codes, scales[:, 0], amax


def gradient(
    dy: Tensor, signs: tuple[int, ...] | None, row: bool, column: bool, rounding: ScaleRounding, stream: Stream | None
) -> tuple[Tensor, ...]:
    """Row and column operands of a bf16 output gradient, as far as wanted: values, amax, values, amax."""
    dyb = fmt.to_bf16(dy).contiguous()
    if stream is None:
        rounding = "nearest"
    out: tuple[Tensor, ...] = ()
    k_row = k_column = None
    if stream is not None and row and column and not torch.compiler.is_compiling():
        k_row, k_column = both_bytes(dyb.shape[0], dyb.shape[1], int(stream[0]), stream[1:], dyb.device)
    elif stream is not None and row:
        k_row = row_bytes(dyb.numel() // BLOCK, int(stream[0]), stream[1:], dyb.device)
    if row:
        out = rows_operand(dyb, rounding, k_row)
    return (*out, *_gradient_columns(dyb, signs, rounding, stream, k_column)) if column else out


def _gradient_columns(
    dyb: Tensor, signs: tuple[int, ...] | None, rounding: ScaleRounding, stream: Stream | None, k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Column operand of ``dyb``, fp32 holding bf16 values; ``k`` are the random bytes if they exist already."""
    place: tuple[Any, ...] = ()
    if stream is not None:
        key, c1, c2, c3 = stream
        counters = (c1, c2 | ROLE_COLUMNS, c3)
        place = ((dyb.shape[0] + BLOCK - 1) // BLOCK, dyb.shape[1], int(key), counters, dyb.device)
    if torch.compiler.is_compiling():
        grid, _, scales, amax = _column_rows(dyb, signs, rounding, column_byte_rows(*place) if place else None)
        return torch.stack([q * scales for q in grid], dim=1).flatten(0, 1), amax
    if k is None and place:
        k = column_bytes(*place)
    values, amax = operand(_groups(dyb, signs), (1,), rounding, k)
    return values.flatten(0, 1), amax


def _weight_blocks(weight: Tensor, two_d: bool, backward: bool) -> tuple[Tensor, tuple[int, ...]]:
    """Weight as fp32 blocks and the dimensions of a block. 1-D: along K forward, along N backward."""
    n, k = weight.shape
    w = weight.float().contiguous()
    if two_d:
        return w.view(n // BLOCK, BLOCK, k // BLOCK, BLOCK), (1, 3)
    return (w.view(n // BLOCK, BLOCK, k), (1,)) if backward else (w.view(n * k // BLOCK, BLOCK), (1,))


def weight_operand(weight: Tensor, two_d: bool, backward: bool) -> tuple[Tensor, Tensor]:
    """Weight operand ``[N, K]``."""
    blocks, dims = _weight_blocks(weight, two_d, backward)
    values, amax = operand(blocks, dims, "nearest", None)
    return values.view(weight.shape), amax


def weight_packed(weight: Tensor, two_d: bool, backward: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Packed weight; a 1-D forward weight is packed transposed, because its blocks lie along K."""
    if not two_d and not backward:
        weight = weight.t()
    blocks, dims = _weight_blocks(weight, two_d, backward=True)
    codes, scales, amax = packed(blocks, dims)
    return (codes.flatten(2), scales[:, 0, :, 0], amax) if two_d else (codes, scales[:, 0], amax)


def unpack_values(codes: Tensor, scale: Tensor) -> Tensor:
    """Operand ``[R, C]`` of codes ``[R / 16, 8, C]`` and scale values ``[R / 16, C or C / 16]``."""
    groups, _, columns = codes.shape
    if torch.compiler.is_compiling():
        c = codes.to(torch.int32)
        values = torch.stack((fmt.decode_operand(c & 15), fmt.decode_operand(c >> 4)), dim=2)
    else:
        values = torch.stack((fmt.decode_operand(codes & 15), fmt.decode_operand(codes >> 4)), dim=2)
    if scale.shape[1] == columns:
        values = values.view(groups, BLOCK, columns).mul_(scale[:, None])
    else:
        values = values.view(groups, BLOCK, columns // BLOCK, BLOCK).mul_(scale[:, None, :, None])
    return values.view(groups * BLOCK, columns)


def _signs(recipe: NVFP4Recipe) -> tuple[int, ...] | None:
    return recipe.hadamard_signs if recipe.rht else None


def _narrow(x: Tensor) -> Tensor:
    """Cast to bf16 outside a compiled quantizer, where it costs least; inside, :func:`fmt.to_bf16` does it safely."""
    return x if torch.compiler.is_compiling() else x.to(torch.bfloat16)


def finish(acc: Tensor, a: Operand, b: Operand, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Scale the fp32 accumulator, add the bias, cast once."""
    acc.mul_(fmt.product_scale(a.amax, b.amax))
    if bias is not None:
        acc.add_(bias.float())
    return acc.to(out_dtype)


class TorchBackend:
    """fp32 GEMMs on decoded operands.

    Args:
        compiled: Compile the quantizers with ``torch.compile`` (20 to 90 s once on a CPU; needs a C++ compiler).
    """

    name = "torch"

    def __init__(self, compiled: bool = False) -> None:
        self.compiled = compiled
        self._cache: dict[Callable[..., Any], Callable[..., Any]] = {}

    def _fn(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if not self.compiled or torch.compiler.is_compiling():
            return function
        if function not in self._cache:
            self._cache[function] = _compile(function)
        return self._cache[function]

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
        out = self._fn(activation)(_narrow(x), _signs(recipe), row, column)
        return Operand(*out[:2]) if row else None, Packed(*out[-3:]) if column else None

    def gradient(
        self, dy: Tensor, recipe: NVFP4Recipe, row: bool, column: bool, draw: Draw | None
    ) -> tuple[Operand | None, Operand | None]:
        """Row and column operands of the output gradient."""
        stream = None if draw is None else (str(draw.seed), *_words(draw, dy.device))
        out = self._fn(gradient)(_narrow(dy), _signs(recipe), row, column, recipe.sr_scale, stream)
        return Operand(*out[:2]) if row else None, Operand(*out[-2:]) if column else None

    def unpack(self, packed: Packed) -> Operand:
        """Operand of a packed matrix."""
        return Operand(self._fn(unpack_values)(packed.codes, fmt.scale_values(packed.scales)), packed.amax)

    def pack_weight(self, weight: Tensor, recipe: NVFP4Recipe, backward: bool) -> Packed:
        """Packed weight."""
        return Packed(*self._fn(weight_packed)(weight, recipe.weight_2d, backward))

    def weight(self, weight: Tensor, recipe: NVFP4Recipe, backward: bool) -> Operand:
        """Weight operand without the packed form."""
        return Operand(*self._fn(weight_operand)(weight, recipe.weight_2d, backward))

    def unpack_weight(self, packed: Packed, recipe: NVFP4Recipe, backward: bool) -> Operand:
        """Operand of a packed weight."""
        values, amax = self.unpack(packed)
        return Operand(values if recipe.weight_2d or backward else values.t(), amax)

    def gemm(self, a: Operand, b: Operand, transpose: Transpose, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Product with the per-tensor scales applied in fp32."""
        left = a.values.t() if transpose == "tn" else a.values
        right = b.values.t() if transpose == "nt" else b.values
        return finish(torch.mm(left, right), a, b, bias, out_dtype)


def _words(draw: Draw, device: torch.device) -> tuple[Tensor, ...]:
    """Counter words as 0-d tensors: a compiled quantizer must not be specialised on the layer or the step."""
    return tuple(torch.as_tensor(word, dtype=torch.int64, device=device) for word in draw.counters)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(function, dynamic=True)

    def run(*args: Any) -> Any:
        try:
            return compiled(*args)
        except Exception as error:
            if "compiler" in str(error).lower() and "C++" in str(error):
                raise RuntimeError(
                    "NVFP4Precision(compile_kernels=True) needs a C++ compiler (g++ or clang++) on this machine;"
                    " install one or use compile_kernels=False."
                ) from error
            raise

    return run
