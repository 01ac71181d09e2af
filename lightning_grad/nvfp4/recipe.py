"""The switches of the training recipe, and the operands a backend hands to its GEMMs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from lightning_grad._validate import check_choice
from lightning_grad.nvfp4.format import NVFP4Tensor, ScaleRounding
from lightning_grad.nvfp4.hadamard import SIGNS, check_signs
from lightning_grad.nvfp4.stream import Counters

Transpose = Literal["nt", "nn", "tn"]
Mode = Literal["nvfp4", "bf16_forward", "bf16"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class NVFP4Recipe:
    """What is quantized, and how.

    Args:
        rht: Random Hadamard transform of the weight-gradient operands.
        stochastic_rounding: Round gradients stochastically; otherwise to nearest.
        weight_2d: 16x16 blocks for weights, so forward and backward see one quantized weight; otherwise 1x16.
        hadamard_signs: 16 values +-1.
        sr_scale: How block scales of stochastically rounded tensors are rounded. ``"nearest"`` follows Transformer
            Engine and shrinks gradients by 0.3 % (block maxima saturate); ``"up"`` is unbiased with 17 % more error.
        mode: ``"nvfp4"``; ``"bf16_forward"`` quantizes in the backward pass only; ``"bf16"`` quantizes nothing.
    """

    rht: bool = True
    stochastic_rounding: bool = True
    weight_2d: bool = True
    hadamard_signs: tuple[int, ...] = SIGNS
    sr_scale: ScaleRounding = "nearest"
    mode: Mode = "nvfp4"

    def __post_init__(self) -> None:
        object.__setattr__(self, "hadamard_signs", check_signs(self.hadamard_signs))
        check_choice("sr_scale", self.sr_scale, ("nearest", "up"))
        check_choice("mode", self.mode, MODES)


class Operand(NamedTuple):
    """A GEMM operand: ``e2m1 * block scale`` (exact in bf16) and the tensor's amax ``[1]``."""

    values: Tensor
    amax: Tensor


class Packed(NamedTuple):
    """A matrix ``[R, C]`` in NVFP4 with blocks and byte pairs along the *rows*, as backends keep it between passes.

    ``codes`` is uint8 ``[R / 16, 8, C]`` (row ``2j`` of a group in the low nibble of byte row ``j``), ``scales`` uint8
    E4M3 codes: ``[R / 16, C]``, or ``[R / 16, C / 16]`` for 16x16 blocks. It is the transpose of :class:`NVFP4Tensor`
    of the transposed matrix, which saves every backend a transposition.
    """

    codes: Tensor
    scales: Tensor
    amax: Tensor


class Draw(NamedTuple):
    """Where in the stochastic-rounding stream a tensor draws: the key and counter words 1 to 3."""

    seed: int
    counters: Counters


class Backend(Protocol):
    """What a backend provides to the quantized linear layer. Matrices are 2-D, ``C % 16 == 0``.

    Backends inherit :meth:`forward` and :meth:`backward`, and may do the whole of them at once.
    """

    name: str

    def quantize(
        self,
        x: Tensor,
        block: tuple[int, int],
        amax: Tensor | None,
        scale_rounding: ScaleRounding,
        u: Tensor | None,
        draw: Draw | None,
    ) -> NVFP4Tensor:
        """Quantize; stochastic if ``u`` or ``draw`` is given."""

    def activation(
        self, x: Tensor, recipe: NVFP4Recipe, row: bool, column: bool
    ) -> tuple[Operand | None, Packed | None]:
        """Forms of an activation ``[M, K]``, rounded to bf16 and then to nearest.

        Row: blocks along K. Column: padded to 16 rows, transformed, blocks along M, packed.
        """

    def gradient(
        self, dy: Tensor, recipe: NVFP4Recipe, row: bool, column: bool, draw: Draw | None
    ) -> tuple[Operand | None, Operand | None]:
        """The same two forms of an output gradient ``[M, N]`` as operands; stochastic if ``draw`` is given.

        Word 2 of ``draw`` has role 0; the column form sets its lowest bit.
        """

    def forward(
        self,
        x: Tensor,
        weight: Tensor | Packed,
        bias: Tensor | None,
        recipe: NVFP4Recipe,
        out_dtype: torch.dtype,
        keep: bool,
    ) -> tuple[Tensor, Packed | None]:
        """``x @ weight.T + bias``, and the packed column form of ``x`` if it is to be kept."""
        a, kept = self.activation(x, recipe, row=True, column=keep)
        assert a is not None
        return self.gemm(a, self._weight_operand(weight, recipe, backward=False), "nt", bias, out_dtype), kept

    def backward(
        self,
        dy: Tensor,
        weight: Tensor | Packed | None,
        x: Packed | None,
        recipe: NVFP4Recipe,
        draw: Draw | None,
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradient of the input if given a weight, and of the weight if given the input; in ``dtypes``."""
        rows, columns = self.gradient(dy, recipe, weight is not None, x is not None, draw)
        dx = dw = None
        if rows is not None and weight is not None:
            dx = self.gemm(rows, self._weight_operand(weight, recipe, backward=True), "nn", None, dtypes[0])
        if columns is not None and x is not None:
            # straight from the fp32 accumulator to the weight's dtype: no rounding to bf16 on the way
            dw = self.gemm(columns, self.unpack(x), "tn", None, dtypes[1])
        return dx, dw

    def _weight_operand(self, weight: Tensor | Packed, recipe: NVFP4Recipe, backward: bool) -> Operand:
        if isinstance(weight, Packed):
            return self.unpack_weight(weight, recipe, backward)
        return self.weight(weight, recipe, backward)

    def unpack(self, packed: Packed) -> Operand:
        """The operand ``[R, C]`` of a packed matrix."""

    def pack_weight(self, weight: Tensor, recipe: NVFP4Recipe, backward: bool) -> Packed:
        """Quantize a weight from its stored dtype for the forward or the backward GEMM."""

    def weight(self, weight: Tensor, recipe: NVFP4Recipe, backward: bool) -> Operand:
        """As :meth:`pack_weight` followed by :meth:`unpack_weight`, without the packed form."""

    def unpack_weight(self, packed: Packed, recipe: NVFP4Recipe, backward: bool) -> Operand:
        """The operand ``[N, K]`` of a packed weight."""

    def gemm(self, a: Operand, b: Operand, transpose: Transpose, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """``a @ b`` with the per-tensor scales applied in fp32; ``transpose`` is "nt", "nn" or "tn"."""
