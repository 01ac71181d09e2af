"""The NVFP4 number format: four-bit elements, E4M3 block scales, one fp32 scale per tensor.

Everything here is a pure function of tensors and defines the bits that every backend must reproduce. Arithmetic is
IEEE fp32, rounded to nearest even, in exactly the order written: the scale chain of Transformer Engine >= 2.14.

Source: NVIDIA, "Pretraining Large Language Models with NVFP4" (arXiv:2509.25149), appendix B; Transformer Engine's
``NVFP4BlockScaling`` recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
TENSOR_MAX = E2M1_MAX * E4M3_MAX
#: ``alpha`` of a product of two tensors is ``amax_a * amax_b`` divided by this.
PRODUCT_MAX = TENSOR_MAX * TENSOR_MAX
FLT_MAX = torch.finfo(torch.float32).max
#: 1/6 in fp32, bits 0x3E2AAAAB.
SIXTH = 0.16666667163372039794921875
#: 1/2688 in fp32.
INV_TENSOR_MAX = torch.tensor(TENSOR_MAX).reciprocal().item()

ScaleRounding = Literal["nearest", "up"]

_EXPONENT = 0x7F800000
_ONE = 0x3F800000
_NAN = 0x7FC00000
_SIGN_AND_CODE = -0x8000 | 0x0E00  # as int16: sign, lowest two exponent bits, highest mantissa bit
_TWO_SIGNIFICANT_BITS = -0x400000  # as int32: sign, exponent and one mantissa bit


@dataclass(frozen=True)
class NVFP4Tensor:
    """A matrix in NVFP4.

    Attributes:
        codes: uint8 ``[R, C // 2]``; element ``2j`` in the low nibble of byte ``j``.
        scales: float8_e4m3fn ``[R // block[0], C // 16]``.
        amax: float32 ``[1]``, the largest magnitude of the source.
        shape: ``(R, C)``.
        block: ``(1, 16)`` or ``(16, 16)``.

    Decoded element: ``e2m1 * scale * amax / 2688``.
    """

    codes: Tensor
    scales: Tensor
    amax: Tensor
    shape: tuple[int, int]
    block: tuple[int, int] = (1, BLOCK)

    @property
    def num_bytes(self) -> int:
        """Bytes of the codes, the scales and the amax."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.amax))


def _magnitude_bits(v: Tensor) -> Tensor:
    """Bits of ``|v|`` as int32; all NaNs as one, because adding to the bits of the largest would overflow."""
    return (v.contiguous().view(torch.int32) & 0x7FFFFFFF).clamp(max=_NAN)


def to_e4m3(v: Tensor) -> Tensor:
    """Round fp32 values in [0, 448] to E4M3, nearest even with subnormals; NaN gives 0x7F.

    Integer arithmetic, so the bits do not depend on a device's cast.

    Returns:
        uint8 codes of the shape of ``v``.
    """
    bits = _magnitude_bits(v)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    # below the smallest normal 2**-6 the step is fixed at 2**-9; NaN takes the other branch
    subnormal = torch.round(v * 512.0).nan_to_num(0.0).to(torch.int32)
    return torch.where(v < 2.0**-6, subnormal, normal).clamp(max=0x7F).to(torch.uint8)


def to_e4m3_up(v: Tensor) -> Tensor:
    """Round fp32 values in [0, 448] up to the next E4M3 code; NaN gives 0x7F."""
    bits = _magnitude_bits(v)
    normal = ((bits + 0xFFFFF) >> 20) - 960
    subnormal = torch.ceil(v * 512.0).nan_to_num(0.0).to(torch.int32)
    return torch.where(v < 2.0**-6, subnormal, normal).clamp(max=0x7F).to(torch.uint8)


def from_e4m3(codes: Tensor) -> Tensor:
    """fp32 values of non-negative E4M3 codes (uint8)."""
    c = codes.to(torch.int32)
    exponent, mantissa = c >> 3, c & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).view(torch.float32)
    value = torch.where(exponent == 0, mantissa.to(torch.float32) * 2.0**-9, normal)
    return torch.where(c == 0x7F, torch.full_like(value, torch.nan), value)


def scale_values(codes: Tensor) -> Tensor:
    """:func:`from_e4m3` by the fastest way of the device."""
    if codes.device.type == "cpu" and not torch.compiler.is_compiling():
        return codes.view(torch.float8_e4m3fn).float()
    return from_e4m3(codes)


def global_scale(amax: Tensor) -> Tensor:
    """The per-tensor encoding scale ``2688 / amax``, clamped to finite; 1 where nothing can be encoded."""
    # scalar / tensor is reciprocal-then-multiply in torch and misses the IEEE quotient for a quarter of all values
    scale = torch.div(torch.full_like(amax, TENSOR_MAX), amax).clamp(max=FLT_MAX)
    return torch.where((amax == 0) | (scale == 0), torch.ones_like(scale), scale)


def block_scales(
    block_amax: Tensor, amax: Tensor, rounding: ScaleRounding = "nearest"
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales of blocks with magnitude ``block_amax`` in a tensor with magnitude ``amax``.

    Returns:
        uint8 E4M3 codes, their fp32 values, and the factor that takes an element to the E2M1 range.
    """
    encode = global_scale(amax)
    v = (block_amax * (encode * SIXTH)).clamp_(max=E4M3_MAX)
    if rounding == "up":
        codes = to_e4m3_up(v)
        values = from_e4m3(codes)
    elif v.device.type == "cpu" and not torch.compiler.is_compiling():
        # the CPU's cast gives the same bits as the integer form in a tenth of the time
        cast = v.to(torch.float8_e4m3fn)
        codes, values = cast.view(torch.uint8), cast.float()
    else:
        codes = to_e4m3(v)
        values = from_e4m3(codes)
    factor = (values * encode.reciprocal()).reciprocal_().clamp_(max=FLT_MAX)
    return codes, values, factor


def _by_binade(magnitude: Tensor, below_2: float, below_4: float, above: float) -> Tensor:
    """A constant for each step size of the grid. Compilers vectorize comparisons, but not bit casts."""
    upper = torch.where(magnitude >= 4.0, torch.full_like(magnitude, above), torch.full_like(magnitude, below_4))
    return torch.where(magnitude >= 2.0, upper, torch.full_like(magnitude, below_2))


def round_nearest_(y: Tensor) -> Tensor:
    """Round fp32 ``y`` with ``|y| <= 6`` to the E2M1 grid in place, ties to even. The sign of a zero is lost."""
    if torch.compiler.is_compiling():
        magic = _by_binade(y.abs(), 1.5 * 2.0**22, 1.5 * 2.0**23, 1.5 * 2.0**24)
        return (y + magic) - magic
    magic = _magic(y)
    return y.add_(magic).sub_(magic)


def _magic(y: Tensor) -> Tensor:
    """``1.5 * 2**(22 + exponent)``: added and subtracted it leaves one mantissa bit; below 1 the step stays 0.5."""
    bits = y.view(torch.int32).bitwise_and(_EXPONENT)
    return bits.clamp_(min=_ONE).add_((22 << 23) | (1 << 22)).view(torch.float32)


def round_stochastic_(y: Tensor, k: Tensor) -> Tensor:
    """Round fp32 ``y`` with ``|y| <= 6`` to the E2M1 grid with uniforms ``(k + 0.5) / 256``; ``y`` is overwritten.

    Args:
        y: Values.
        k: fp32 of the shape of ``y`` holding integers 0..255.
    """
    return _round_up_with(y, (k + 0.5).mul_(1.0 / 256.0))


def _round_up_with(y: Tensor, u: Tensor) -> Tensor:
    """Stochastic rounding of ``y`` with uniforms ``u``, which is overwritten with the result."""
    if torch.compiler.is_compiling():
        magnitude = y.abs()
        t = magnitude + u * _by_binade(magnitude, 0.5, 1.0, 2.0)
        q = (t * _by_binade(t, 2.0, 1.0, 0.5)).floor() * _by_binade(t, 0.5, 1.0, 2.0)
        return q.clamp(max=E2M1_MAX).copysign(y)
    # the exponent of max(|y|, 1) gives twice the step of the grid
    step = y.view(torch.int32).bitwise_and(_EXPONENT).clamp_(min=_ONE).view(torch.float32)
    # twice fl(|y| + u * step): every operation but the one addition is exact
    twice = u.mul_(step).add_(y.abs(), alpha=2.0).floor_()
    twice.view(torch.int32).bitwise_and_(_TWO_SIGNIFICANT_BITS)
    return twice.mul_(0.5).clamp_(max=E2M1_MAX).copysign_(y)


def saturate(y: Tensor) -> Tensor:
    """Clamp to [-6, 6] with NaN to +6, as the hardware conversion does."""
    return torch.nan_to_num(y, nan=E2M1_MAX, posinf=E2M1_MAX, neginf=-E2M1_MAX).clamp_(-E2M1_MAX, E2M1_MAX)


def round_e2m1(y: Tensor, u: Tensor | None = None) -> Tensor:
    """Round to the E2M1 grid, saturating at +-6; NaN gives 6.

    Args:
        y: fp32 values.
        u: Uniforms in [0, 1) of the shape of ``y`` for stochastic rounding; ``None`` rounds to nearest even.

    Returns:
        fp32 values on the grid with the sign bit of ``y`` (so ``-0.1`` gives ``-0.0``).
    """
    clamped = saturate(y.float())
    rounded = round_nearest_(clamped.clone()) if u is None else _round_up_with(clamped, u.to(torch.float32, copy=True))
    return rounded.copysign_(clamped)


def encode_e2m1(q: Tensor) -> Tensor:
    """uint8 codes 0..15 of fp32 values on the E2M1 grid; a negative zero gives 8."""
    n = (q.abs() * 2.0).to(torch.int8)  # 0 1 2 3 4 6 8 12
    magnitude = n.clamp(max=4) + ((n.clamp(4, 8) - 4) >> 1) + ((n >> 3) & (n >> 2) & 1)
    # the top bits of the float, where the sign is
    negative = (q.view(torch.int32) >> 28).to(torch.int8) & 8
    return (magnitude | negative).to(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """fp32 values of uint8 codes 0..15."""
    c = codes.to(torch.int8)
    magnitude = c & 7
    twice = magnitude + (magnitude - 4).clamp(min=0) + 2 * (magnitude - 6).clamp(min=0)
    return (twice.to(torch.float32) * 0.5).copysign(7.5 - c.to(torch.float32))


def encode_pairs(y: Tensor) -> Tensor:
    """Round fp32 ``y[G, 16, C]`` with ``|y| <= 6`` or NaN to nearest and pack rows ``2j``, ``2j + 1``; eats ``y``.

    Returns:
        Codes ``[G, 8, C]``, row ``2j`` in the low nibble: uint8, or their fp32 values under a compiler.
    """
    if torch.compiler.is_compiling():
        return _code(y[:, 0::2]) + 16.0 * _code(y[:, 1::2])
    y.nan_to_num_(E2M1_MAX)
    magic = _magic(y)
    q = (y + magic).sub_(magic).copysign_(y)
    # scaled by 2**-14 an E2M1 number in binary16 is subnormal where it is subnormal in E2M1: shift, and it is the code
    bits = q.mul_(2.0**-14).to(torch.float16).view(torch.int16)
    # magnitude - 64 if negative; of the two shifts by sign and exponent the second is -8 if negative, else 0
    codes = (bits >> 9).sub_(bits >> 12, alpha=9).view(y.shape[0], BLOCK // 2, 2, *y.shape[2:])
    return codes[:, :, 0].add(codes[:, :, 1], alpha=16).to(torch.uint8)


def _code(y: Tensor) -> Tensor:
    """Codes 0..15 of ``y`` rounded to nearest, as fp32: compilers vectorize comparisons, not bit casts."""
    y = torch.where(y.abs() <= E2M1_MAX, y, E2M1_MAX)  # NaN gives 6
    magnitude = y.abs()
    # codes are multiples of the step above 0, 2 below 2 and 4 below 4; the constant rounds to an integer, ties to even
    steps = magnitude * _by_binade(magnitude, 2.0, 1.0, 0.5)
    code = ((steps + 1.5 * 2.0**23) - 1.5 * 2.0**23) + _by_binade(magnitude, 0.0, 2.0, 4.0)
    return code + (4.0 - torch.full_like(y, 4.0).copysign(y))


def decode_pairs(codes: Tensor) -> Tensor:
    """Values times ``2**-14`` of ``codes[G, 8, C]``, as fp16 ``[G, 16, C]``; the inverse of :func:`encode_pairs`."""
    c = codes.view(torch.int8).to(torch.int16)
    # shifts that copy the sign of each nibble through the exponent; all but it and the three bits is masked
    both = torch.stack(((c << 12) >> 3, c << 5), dim=2).bitwise_and_(_SIGN_AND_CODE)
    return both.view(torch.float16).view(c.shape[0], BLOCK, c.shape[2])


def pack(codes: Tensor) -> Tensor:
    """Two uint8 codes a byte along the last dimension, the even element in the low nibble."""
    if codes.shape[-1] % 2:
        raise ValueError(f"`codes` must have an even last dimension, got shape {tuple(codes.shape)}.")
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def to_bf16(x: Tensor) -> Tensor:
    """Round to bf16 and return fp32 (fp64 goes through fp32 first on every device)."""
    if x.dtype == torch.bfloat16:
        return x.float()
    wide = x.float()
    if not torch.compiler.is_compiling():
        return wide.to(torch.bfloat16).float()
    # a compiler may drop a cast there and back; it cannot drop integer arithmetic
    bits = wide.view(torch.int32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)
    return torch.where(wide.isnan(), wide, rounded)


def product_scale(amax_a: Tensor, amax_b: Tensor) -> Tensor:
    """``alpha`` of a GEMM of two operands without their per-tensor scales; stays on the device."""
    return torch.div(amax_a * amax_b, torch.full_like(amax_a, PRODUCT_MAX))
