"""The Triton backend: fused quantizers, BF16 tensor-core GEMMs on decoded operands. Imported only when chosen.

Tested bit for bit against the torch backend in Triton's interpreter; not yet compiled for or timed on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_grad.nvfp4 import torch_backend
from lightning_grad.nvfp4 import triton_kernels as kernels
from lightning_grad.nvfp4.format import BLOCK, NVFP4Tensor, ScaleRounding
from lightning_grad.nvfp4.recipe import Backend, Draw, NVFP4Recipe, Operand, Packed, Transpose
from lightning_grad.nvfp4.stream import device_words

_TILE = 64
_EPILOGUE = 1024


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return _ceil(rows, _TILE), _ceil(columns, _TILE)


class TritonBackend(Backend):
    """Quantizers as Triton kernels. Operands are bf16 on a GPU and fp32 in the interpreter, which has no bf16 GEMM."""

    name = "triton"

    def __init__(self) -> None:
        self._signs: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
        self._plain = torch_backend.TorchBackend()

    def _diagonal(self, recipe: NVFP4Recipe, device: torch.device) -> Tensor:
        key = (device, recipe.hadamard_signs)
        if key not in self._signs:
            self._signs[key] = torch.tensor([0.25 * s for s in recipe.hadamard_signs], device=device)
        return self._signs[key]

    def _amax(self, x: Tensor, recipe: NVFP4Recipe | None, row: bool, column: bool) -> tuple[Tensor, Tensor]:
        """Magnitudes ``[1]`` of the row and of the column form; without a recipe of ``x`` as it is."""
        bits = torch.zeros(2, dtype=torch.int32, device=x.device)
        signs = x if recipe is None else self._diagonal(recipe, x.device)
        rht = recipe is not None and recipe.rht
        cast = recipe is not None
        kernels.amax_kernel[_grid(*x.shape)](
            x, bits, bits[1:], signs, *x.shape, ROW=row, COL=column, RHT=rht, CAST=cast, R=_TILE, C=_TILE
        )
        magnitudes = bits.view(torch.float32)
        return magnitudes[:1], magnitudes[1:]

    def _forms(
        self, x: Tensor, recipe: NVFP4Recipe, row: bool, column: bool, pack: bool, draw: Draw | None
    ) -> tuple[Operand | None, Tensor, Tensor, Tensor]:
        """Row operand; values or codes of the column form, its scale codes and its amax."""
        x = x.contiguous()
        rows, columns = x.shape
        groups = _ceil(rows, BLOCK)
        row_amax, column_amax = self._amax(x, recipe, row, column)
        dtype = _operand_dtype(x)
        values = torch.empty(x.shape if row else (1, 1), dtype=dtype, device=x.device)
        scales = torch.empty((groups, columns) if column and pack else (1, 1), dtype=torch.uint8, device=x.device)
        if pack:
            out = torch.empty((groups, BLOCK // 2, columns) if column else (1,), dtype=torch.uint8, device=x.device)
        else:
            out = torch.empty((groups * BLOCK, columns) if column else (1,), dtype=dtype, device=x.device)
        kernels.forms_kernel[_grid(rows, columns)](
            x, row_amax, column_amax, values, out, scales, self._diagonal(recipe, x.device),
            _counters(draw, x.device), 0 if draw is None else draw.seed, rows, columns, groups,
            ROW=row, COL=column, PACK=pack, RHT=recipe.rht, SR=draw is not None,
            UP=draw is not None and recipe.sr_scale == "up", R=_TILE, C=_TILE,
        )  # fmt: skip
        return Operand(values, row_amax) if row else None, out, scales, column_amax

    def activation(
        self, x: Tensor, recipe: NVFP4Recipe, row: bool, column: bool
    ) -> tuple[Operand | None, Packed | None]:
        """Row operand and packed column form; see :class:`~lightning_grad.nvfp4.recipe.Backend`."""
        rows, codes, scales, amax = self._forms(x, recipe, row, column, True, None)
        return rows, Packed(codes, scales, amax) if column else None

    def gradient(
        self, dy: Tensor, recipe: NVFP4Recipe, row: bool, column: bool, draw: Draw | None
    ) -> tuple[Operand | None, Operand | None]:
        """Row and column operands of the output gradient."""
        rows, values, _, amax = self._forms(dy, recipe, row, column, False, draw)
        return rows, Operand(values, amax) if column else None

    def unpack(self, packed: Packed) -> Operand:
        """Operand of a packed matrix."""
        groups, _, columns = packed.codes.shape
        square = packed.scales.shape[1] != columns
        out = torch.empty(groups * BLOCK, columns, dtype=_operand_dtype(packed.codes), device=packed.codes.device)
        kernels.unpack_kernel[(groups, _ceil(columns, _TILE))](
            packed.codes, packed.scales.contiguous(), out, groups, columns, SQUARE=square, C=_TILE
        )
        return Operand(out, packed.amax)

    def pack_weight(self, weight: Tensor, recipe: NVFP4Recipe, backward: bool) -> Packed:
        """Packed weight; the 1-D form, which is not the default, uses the torch backend."""
        if not recipe.weight_2d:
            return self._plain.pack_weight(weight, recipe, backward)
        n, k = weight.shape
        codes = torch.empty(n // BLOCK, BLOCK // 2, k, dtype=torch.uint8, device=weight.device)
        scales = torch.empty(n // BLOCK, k // BLOCK, dtype=torch.uint8, device=weight.device)
        return Packed(codes, scales, self._weight(weight, codes, scales, pack=True))

    def weight(self, weight: Tensor, recipe: NVFP4Recipe, backward: bool) -> Operand:
        """Weight operand without the packed form."""
        if not recipe.weight_2d:
            values, amax = self._plain.weight(weight, recipe, backward)
            return Operand(values.to(_operand_dtype(weight)), amax)
        out = torch.empty(weight.shape, dtype=_operand_dtype(weight), device=weight.device)
        return Operand(out, self._weight(weight, out, out, pack=False))

    def _weight(self, weight: Tensor, out: Tensor, scales: Tensor, pack: bool) -> Tensor:
        w = weight.detach().contiguous()
        amax, _ = self._amax(w, None, True, False)
        kernels.weight_kernel[_grid(*w.shape)](w, amax, out, scales, *w.shape, PACK=pack, R=_TILE, C=_TILE)
        return amax

    def unpack_weight(self, packed: Packed, recipe: NVFP4Recipe, backward: bool) -> Operand:
        """Operand of a packed weight."""
        values, amax = self.unpack(packed)
        return Operand(values if recipe.weight_2d or backward else values.t(), amax)

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
        x = x.float().contiguous()
        rows, columns = x.shape
        amax = self._amax(x, None, True, False)[0] if amax is None else amax.reshape(1).float()
        codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=x.device)
        scales = torch.empty(rows // block[0], columns // BLOCK, dtype=torch.uint8, device=x.device)
        kernels.quantize_kernel[_grid(rows, columns)](
            x, amax, codes, scales, x if u is None else u.float().contiguous(), _counters(draw, x.device),
            0 if draw is None else draw.seed, rows, columns, SQUARE=block[0] == BLOCK, SR=draw is not None,
            UP=scale_rounding == "up", EXPLICIT=u is not None, R=_TILE, C=_TILE,
        )  # fmt: skip
        return NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), amax, (rows, columns), block)

    def gemm(self, a: Operand, b: Operand, transpose: Transpose, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """bf16 GEMM with an fp32 accumulator, then scale, bias and cast in one kernel."""
        left = a.values.t() if transpose == "tn" else a.values
        right = b.values.t() if transpose == "nt" else b.values
        if not left.is_cuda:
            return torch_backend.finish(torch.mm(left, right), a, b, bias, out_dtype)
        acc = torch.mm(left, right, out_dtype=torch.float32)
        out = torch.empty(acc.shape, dtype=out_dtype, device=acc.device)
        kernels.epilogue_kernel[(_ceil(acc.numel(), _EPILOGUE),)](
            acc, a.amax, b.amax, acc if bias is None else bias, out, acc.shape[1], acc.numel(),
            BIAS=bias is not None, SIZE=_EPILOGUE,
        )  # fmt: skip
        return out


def _operand_dtype(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.is_cuda else torch.float32


def _counters(draw: Draw | None, device: torch.device) -> Tensor:
    """Words 1 to 3 on the device; the step may be there already and is never read back."""
    words = device_words((0, 0, 0) if draw is None else draw.counters, device)
    return torch.stack([word.to(device, torch.int64) for word in words])
