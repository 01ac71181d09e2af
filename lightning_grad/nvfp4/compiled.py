"""The loops of the torch backend as a few large functions for ``torch.compile``.

A compiled call costs some 40 microseconds besides its work, so each quantization is one call. Sizes are symbolic, which
shapes the code: a dimension is never split or flattened in here (inductor would index by division, and not vectorize),
and small tensors that a loop over all elements reads are returned, which makes the compiler store them once instead of
computing them anew for each element.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_grad.nvfp4 import format as fmt
from lightning_grad.nvfp4.exact_products import exact_products
from lightning_grad.nvfp4.format import BLOCK, ScaleRounding
from lightning_grad.nvfp4.hadamard import transformed_rows
from lightning_grad.nvfp4.recipe import Draw, NVFP4Recipe, Operand, Packed
from lightning_grad.nvfp4.stream import ROLE_COLUMNS, device_words
from lightning_grad.nvfp4.torch_backend import TorchBackend, transform_signs
from lightning_grad.random import philox4x32

Many = tuple[Tensor, ...]


def _scales(blocks: Tensor, rounding: ScaleRounding) -> Many:
    amax = blocks.amax().reshape(1)
    return *fmt.block_scales(blocks, amax, rounding), amax


def _columns(x: Tensor, signs: Sequence[int] | None, rounding: ScaleRounding) -> Many:
    """Groups of 16 rows of ``x[R, C]`` transformed, bf16 ``[G, 16, C]``, and the scales ``[G, 1, C]``."""
    x = x.view(x.shape[0] // BLOCK, BLOCK, x.shape[1])
    if signs is None:
        return x, *_scales(x.float().abs().amax(1, keepdim=True), rounding)
    rows = transformed_rows(x, signs)
    largest = rows[0].abs()
    for row in rows[1:]:
        largest = torch.maximum(largest, row.abs())
    # rounding to bf16 is monotonic, so the largest rounded number is the largest one rounded
    blocks = fmt.to_bf16(largest)[:, None]
    return torch.stack([row.to(torch.bfloat16) for row in rows], dim=1), *_scales(blocks, rounding)


def _to_range(x: Tensor, factor: Tensor) -> Tensor:
    return (x.float() * factor).clamp(-fmt.E2M1_MAX, fmt.E2M1_MAX)


def _round(x: Tensor, factor: Tensor, scales: Tensor, k: Tensor | None) -> Tensor:
    y = _to_range(x, factor)
    return (fmt.round_nearest_(y) if k is None else fmt.round_stochastic_(y, k.float())) * scales


def packed_columns(x: Tensor, signs: Sequence[int] | None) -> Many:
    """Codes, scale codes and amax of ``x[R, C]`` in bf16, transformed, in blocks over dimension 0."""
    values, codes, _, factor, amax = _columns(x, signs, "nearest")
    return fmt.encode_pairs(_to_range(values, factor)).to(torch.uint8), codes[:, 0], amax, factor, values


def _row_values(x: Tensor, rounding: ScaleRounding, words: Tensor | None) -> Many:
    """Operand ``[M, C]`` of ``x[M, C]`` in blocks over dimension 1, and the amax."""
    blocks = x.view(x.shape[0], x.shape[1] // BLOCK, BLOCK)
    _, scales, factor, amax = _scales(blocks.float().abs().amax(2, keepdim=True), rounding)
    k = None if words is None else words.view(torch.uint8)
    return _round(blocks, factor, scales, k).view(x.shape), amax, scales, factor


def _column_values(x: Tensor, signs: Sequence[int] | None, rounding: ScaleRounding, words: Tensor | None) -> Many:
    """Operand ``[R, C]`` of ``x[R, C]``, transformed, in blocks over dimension 0, and the amax."""
    values, _, scales, factor, amax = _columns(x, signs, rounding)
    k = None
    if words is not None:
        shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=x.device)[:, None]
        k = ((words[:, :, None] >> shifts) & 255).flatten(1, 2)
    return _round(values, factor, scales, k).view(x.shape), amax, scales, factor, values


def _words(index: Tensor, counters: Many, role: int, seed: str, dim: int) -> Tensor:
    """Random words of blocks, as int32 in a new dimension."""
    c1, c2, c3 = counters
    return torch.stack([w.to(torch.int32) for w in philox4x32((index, c1, c2 + role, c3), int(seed))], dim)


def _product(a: Tensor, b: Tensor, amax_a: Tensor, amax_b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = torch.mm(a, b) * fmt.product_scale(amax_a, amax_b)
    return (out if bias is None else out + bias.float()).to(dtype)


def forward(
    x: Tensor,
    padded: Tensor | None,
    signs: Sequence[int] | None,
    weight: Many,
    transposed: bool,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Many]:
    """The layer on ``x[M, K]`` in bf16.

    Args:
        x: Input.
        padded: The same with rows that fill the last group; ``None`` makes no packed form.
        signs: Of the transform; ``None`` does without.
        weight: Codes, scale codes and amax.
        transposed: The weight is packed along K.
        bias: Added in fp32.
        dtype: Of the result.

    Returns:
        The result; codes, scale codes and amax of the packed form; behind them what is only to be stored.
    """
    values, amax, *stored = _row_values(x, "nearest", None)
    w = unpacked(weight[0], weight[1])
    out = _product(values, w if transposed else w.t(), amax, weight[2], bias, dtype)
    return out, (*(() if padded is None else packed_columns(padded, signs)), *stored)


def backward(
    dy: Tensor,
    padded: Tensor | None,
    signs: Sequence[int] | None,
    rounding: ScaleRounding,
    counters: Many | None,
    seed: str,
    weight: Many | None,
    x: Many | None,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor | None, Tensor | None, Many]:
    """Gradients from ``dy[M, N]`` in bf16.

    Args:
        dy: Output gradient.
        padded: The same with rows that fill the last group.
        signs: Of the transform; ``None`` does without.
        rounding: Of the scales.
        counters: int64 words 1 to 3 of role 0; ``None`` rounds to nearest.
        seed: Key in decimal: as text it is a constant. Inductor fails on the 64-bit arithmetic of a symbolic one.
        weight: Codes, scale codes and amax; ``None`` makes no gradient of the input.
        x: The same of the input; ``None`` makes no gradient of the weight.
        dtypes: Of the results.

    Returns:
        The gradients, and what is only to be stored.
    """
    dx = dw = None
    stored: Many = ()
    words = None
    if weight is not None:
        m, n = dy.shape
        if counters is not None:
            index = torch.arange(n // BLOCK, dtype=torch.int64, device=dy.device)
            index = index + torch.arange(m, dtype=torch.int64, device=dy.device)[:, None] * (n // BLOCK)
            words = _words(index, counters, 0, seed, 2)
            stored += (words,)
        values, amax, *rest = _row_values(dy, rounding, words)
        stored += tuple(rest)
        dx = _product(values, unpacked(weight[0], weight[1]), amax, weight[2], None, dtypes[0])
    if x is not None and padded is not None:
        rows, n = padded.shape
        if counters is not None:
            index = torch.arange(n, dtype=torch.int64, device=dy.device) * (rows // BLOCK)
            index = index + torch.arange(rows // BLOCK, dtype=torch.int64, device=dy.device)[:, None]
            words = _words(index, counters, ROLE_COLUMNS, seed, 1)
            stored += (words,)
        values, amax, *rest = _column_values(padded, signs, rounding, words)
        stored += tuple(rest)
        dw = _product(values.t(), unpacked(x[0], x[1]), amax, x[2], None, dtypes[1])
    return dx, dw, stored


def packed(x: Tensor, two_d: bool) -> Many:
    """Codes, scale codes and amax of ``x[R, C]`` in blocks over dimension 0, or over both."""
    x = x.view(x.shape[0] // BLOCK, BLOCK, x.shape[1] // BLOCK, BLOCK)
    blocks = x.float().abs().amax(1, keepdim=True)
    if two_d:
        blocks = blocks.amax(3, keepdim=True)
    codes, _, factor, amax = _scales(blocks, "nearest")
    scales = codes[:, 0, :, 0] if two_d else codes[:, 0].flatten(1)
    return fmt.encode_pairs(_to_range(x, factor)).to(torch.uint8).flatten(2), scales, amax, factor


def unpacked(codes: Tensor, scales: Tensor) -> Tensor:
    """Operand ``[R, C]`` of codes ``[R / 16, 8, C]`` and scale codes ``[R / 16, C or C / 16]``."""
    groups, _, columns = codes.shape
    scale = fmt.scale_values(scales)[:, None]
    both = codes.float()  # compilers vectorize fp32 better than integers
    if scales.shape[1] != columns:
        both, scale = both.view(groups, BLOCK // 2, columns // BLOCK, BLOCK), scale[..., None]
    high = (both * 0.0625).floor()
    values = torch.stack([_decode(both - 16.0 * high) * scale, _decode(high) * scale], dim=2)
    return values.view(groups * BLOCK, columns)


def _decode(code: Tensor) -> Tensor:
    """Values of the codes 0..15, in fp32."""
    negative = code >= 8.0
    c = torch.where(negative, code - 8.0, code)
    value = torch.where(c >= 6.0, 2.0 * c - 8.0, torch.where(c >= 4.0, c - 2.0, 0.5 * c))
    return torch.where(negative, -value, value)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # not fullgraph: beyond dynamo's limit of recompilations that would be an error, now it is eager mode
    compiled = torch.compile(function, dynamic=True)

    def run(*args: Any) -> Any:
        try:
            with exact_products():
                return compiled(*args)
        except Exception as error:
            if "compiler" in str(error).lower() and "C++" in str(error):
                raise RuntimeError(
                    "NVFP4Precision(compile_kernels=True) needs a C++ compiler (g++ or clang++) on this machine;"
                    " install one or use compile_kernels=False."
                ) from error
            raise

    return run


def _narrow(x: Tensor) -> Tensor:
    x = x.detach()
    return (x if x.dtype == torch.bfloat16 else x.float().to(torch.bfloat16)).contiguous()


def _padded(x: Tensor) -> Tensor:
    missing = -x.shape[0] % BLOCK
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _agree(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> bool:
    """Integers and amaxes equal, products but for the order of their sums."""
    for a, b in zip(got, want, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        x, y = a.float(), b.float()
        relative = absolute = 0.0
        if b.is_floating_point() and b.numel() > 1:
            relative = 0.0 if b.dtype == torch.float32 else 2.0**-7
            absolute = 1e-5 * float(y.abs().nan_to_num(0.0, 0.0).max())
        if not torch.allclose(x, y, relative, absolute, equal_nan=True):
            return False
    return True


def _kind(x: Tensor) -> tuple[Any, ...]:
    """What code for ``x[M, C]`` may depend on: dtype, device, C, how M fills groups of 16, and M = 1 or C.

    Compilers make other code where two sizes are equal, or one is 1; else code serves every M.
    """
    rows, columns = x.shape
    return x.dtype, x.device, columns, rows % BLOCK, rows == 1, rows == columns


def _sizes(weight: Tensor | Packed | None) -> torch.Size | None:
    return None if weight is None else (weight.codes if isinstance(weight, Packed) else weight).shape


class CompiledBackend(TorchBackend):
    """:class:`TorchBackend` with compiled passes: the same bits.

    The first call of each compiles, about a minute for all on a CPU, and needs a C++ compiler there. Inside a function
    that is being compiled itself the eager form is traced.

    Compilers of loops differ by processor, so nothing is taken on trust: the first result for each recipe, weight and
    kind of token count (:func:`_kind`) is compared with eager mode, which replaces the compiled form for good where
    they differ.
    """

    def __init__(self) -> None:
        self.trusted = True
        self._seen: set[Any] = set()

    def _checked(self, key: tuple[Any, ...], compiled: Callable[[], Many], eager: Callable[[], Many]) -> Many:
        """The compiled result, or the eager one where they differ."""
        if not self.trusted or torch.compiler.is_compiling():
            return eager()
        got = compiled()
        if key in self._seen:
            return got
        want = eager()
        if _agree(got, want):
            self._seen.add(key)
            return got
        self.trusted = False
        warnings.warn(
            f"NVFP4: the compiled form of '{key[0]}' differs from eager mode on this machine; eager mode is used.",
            stacklevel=2,
        )
        return want

    def forward(
        self,
        x: Tensor,
        weight: Tensor | Packed,
        bias: Tensor | None,
        recipe: NVFP4Recipe,
        out_dtype: torch.dtype,
        keep: bool,
    ) -> tuple[Tensor, Packed | None]:
        """See :meth:`Backend.forward <lightning_grad.nvfp4.recipe.Backend.forward>`."""

        def compiled() -> Many:
            w = weight if isinstance(weight, Packed) else self.pack_weight(weight, recipe, backward=False)
            xb = _narrow(x)
            out, kept = _compiled(forward)(
                xb,
                _padded(xb) if keep else None,
                transform_signs(recipe),
                w,
                not recipe.weight_2d,
                None if bias is None else bias.detach(),
                out_dtype,
            )
            return out, *kept[: 3 * keep]

        def eager() -> Many:
            out, kept = super(CompiledBackend, self).forward(x, weight, bias, recipe, out_dtype, keep)
            return out, *(kept or ())

        key = ("forward", _kind(x), _sizes(weight), recipe, bias is None, out_dtype, keep)
        out, *kept = self._checked(key, compiled, eager)
        return out, Packed(*kept) if keep else None

    def backward(
        self,
        dy: Tensor,
        weight: Tensor | Packed | None,
        x: Packed | None,
        recipe: NVFP4Recipe,
        draw: Draw | None,
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> tuple[Tensor | None, Tensor | None]:
        """See :meth:`Backend.backward <lightning_grad.nvfp4.recipe.Backend.backward>`."""

        def compiled() -> tuple[Any, ...]:
            w = self.pack_weight(weight, recipe, backward=True) if isinstance(weight, Tensor) else weight
            dyb = _narrow(dy)
            dx, dw, _ = _compiled(backward)(
                dyb,
                None if x is None else _padded(dyb),
                transform_signs(recipe),
                "nearest" if draw is None else recipe.sr_scale,
                None if draw is None else device_words(draw.counters, dy.device),
                "" if draw is None else str(draw.seed),
                w,
                x,
                dtypes,
            )
            return dx, dw

        def eager() -> tuple[Any, ...]:
            return super(CompiledBackend, self).backward(dy, weight, x, recipe, draw, dtypes)

        if weight is None and x is None:
            return None, None
        k = None if x is None else x.codes.shape[-1]
        key = ("backward", _kind(dy), k, _sizes(weight), recipe, draw is None, dtypes)
        dx, dw = self._checked(key, compiled, eager)
        return dx, dw

    def activation(
        self, x: Tensor, recipe: NVFP4Recipe, row: bool, column: bool
    ) -> tuple[Operand | None, Packed | None]:
        """See :meth:`TorchBackend.activation`; here for the mode that quantizes in the backward pass only."""
        if row or not column:
            return super().activation(x, recipe, row, column)

        def compiled() -> Many:
            return cast(Many, _compiled(packed_columns)(_padded(_narrow(x)), transform_signs(recipe))[:3])

        def eager() -> Many:
            kept = super(CompiledBackend, self).activation(x, recipe, row, column)[1]
            assert kept is not None
            return kept

        return None, Packed(*self._checked(("activation", _kind(x), recipe), compiled, eager))

    def pack_weight(self, weight: Tensor, recipe: NVFP4Recipe, backward: bool) -> Packed:
        """See :meth:`TorchBackend.pack_weight`."""

        def compiled() -> Many:
            w = weight if recipe.weight_2d or backward else weight.t()
            return cast(Many, _compiled(packed)(w.detach().contiguous(), recipe.weight_2d)[:3])

        key = ("pack_weight", weight.shape, weight.device, weight.dtype, recipe, backward)
        eager = super().pack_weight
        return Packed(*self._checked(key, compiled, lambda: eager(weight, recipe, backward)))
