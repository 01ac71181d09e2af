"""Triton kernels of the NVFP4 quantizers, for NVIDIA GPUs from compute capability 8.0 and Triton's interpreter.

Integer forms instead of native fp8 and bf16 casts: they are exact on every target, and the interpreter's casts are not.
Divisions are IEEE (``div_rn``); maxima are integer maxima over the bits without the sign, which keep NaN.
"""

# Triton's language has no types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def round_bf16(x):
    """Nearest bf16, as fp32; NaN stays."""
    bits = _bits(x)
    rounded = _float((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536)
    return tl.where(x != x, x, rounded)


@triton.jit
def e4m3_code(v, UP: tl.constexpr):
    """E4M3 code of fp32 in [0, 448], to nearest even or up; NaN gives 0x7F."""
    bits = _bits(v) & 0x7FFFFFFF
    if UP:
        normal = ((bits + 0xFFFFF) >> 20) - 960
        subnormal = tl.ceil(v * 512.0)
    else:
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
        subnormal = (v * 512.0 + 8388608.0) - 8388608.0
    small = tl.where(v < 0.015625, subnormal, 0.0).to(tl.int32)
    return tl.minimum(tl.where(v < 0.015625, small, normal), 0x7F)


@triton.jit
def e4m3_value(code):
    """fp32 of a non-negative E4M3 code."""
    exponent = code >> 3
    mantissa = code & 7
    normal = _float(((exponent + 120) << 23) | (mantissa << 20))
    value = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    return tl.where(code == 0x7F, float("nan"), value)


@triton.jit
def encode_scale(amax):
    """``2688 / amax`` as one IEEE division, finite, 1 where nothing can be encoded. NaN stays."""
    scale = tl.div_rn(2688.0 + amax * 0.0, amax)
    scale = tl.where(amax == 0.0, 1.0, scale)
    scale = tl.where(scale > 3.4028234663852886e38, 3.4028234663852886e38, scale)
    scale = tl.where(amax == float("inf"), 1.0, scale)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def block_scale(block_bits, encode, UP: tl.constexpr):
    """Code, value and element factor of blocks whose magnitude has the given bits."""
    v = _float(block_bits) * (encode * 0.16666667163372039794921875)
    v = tl.where(v > 448.0, 448.0, v)
    code = e4m3_code(v, UP)
    value = e4m3_value(code)
    one = tl.full(value.shape, 1.0, tl.float32)
    factor = tl.div_rn(one, value * tl.div_rn(1.0 + encode * 0.0, encode))
    factor = tl.where(factor > 3.4028234663852886e38, 3.4028234663852886e38, factor)
    return code, value, factor


@triton.jit
def _saturate(y):
    y = tl.where(y != y, 6.0, y)
    return tl.where(y > 6.0, 6.0, tl.where(y < -6.0, -6.0, y))


@triton.jit
def magnitude_nearest(a):
    """Round ``0 <= a <= 6`` to the E2M1 grid, ties to even."""
    magic = tl.where(a >= 4.0, 16777216.0, tl.where(a >= 2.0, 8388608.0, 4194304.0)) * 1.5
    return (a + magic) - magic


@triton.jit
def magnitude_stochastic(a, u):
    """Round ``0 <= a <= 6`` to the E2M1 grid with uniforms ``u``."""
    step = tl.where(a >= 4.0, 2.0, tl.where(a >= 2.0, 1.0, 0.5))
    t = a + u * step
    step = tl.where(t >= 4.0, 2.0, tl.where(t >= 2.0, 1.0, 0.5))
    inverse = tl.where(t >= 4.0, 0.5, tl.where(t >= 2.0, 1.0, 2.0))
    q = tl.floor(t * inverse) * step
    return tl.where(q > 6.0, 6.0, q)


@triton.jit
def element(y, u, SR: tl.constexpr):
    """Magnitude on the grid and sign bit of a scaled element."""
    y = _saturate(y)
    sign = (_bits(y) >> 28) & 8
    a = tl.abs(y)
    if SR:
        return magnitude_stochastic(a, u), sign
    return magnitude_nearest(a), sign


@triton.jit
def element_code(q, sign):
    """Four-bit code of a magnitude on the grid."""
    n = (q * 2.0).to(tl.int32)
    code = tl.minimum(n, 4) + ((tl.minimum(tl.maximum(n, 4), 8) - 4) >> 1) + ((n >> 3) & (n >> 2) & 1)
    return code | sign


@triton.jit
def _bytes(seed, c0, c1, c2, c3):
    """Uniforms ``(k + 0.5) / 256`` of blocks ``c0[A, B]`` as ``[A, B, 16]``."""
    c0 = c0.to(tl.uint32)
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(seed, c0, zero + c1.to(tl.uint32), zero + c2.to(tl.uint32), zero + c3.to(tl.uint32))
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.reshape(words, (c0.shape[0], c0.shape[1], 4, 1))
    shift = (tl.arange(0, 4) * 8).to(tl.uint32)[None, None, None, :]
    k = (words >> shift) & 255
    return (tl.reshape(k, (c0.shape[0], c0.shape[1], 16)).to(tl.float32) + 0.5) * 0.00390625


@triton.jit
def _butterfly_stage(x, STRIDE: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    pairs = tl.permute(tl.reshape(x, (R // (2 * STRIDE), 2, STRIDE * C)), (0, 2, 1))
    a, b = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (R, C))


@triton.jit
def transform(x, signs, R: tl.constexpr, C: tl.constexpr):
    """Hadamard transform of groups of 16 rows of ``x[R, C]`` in the order of additions of the torch backend."""
    rows = tl.arange(0, R) % 16
    x = x * tl.load(signs + rows)[:, None]
    x = _butterfly_stage(x, 1, R, C)
    x = _butterfly_stage(x, 2, R, C)
    x = _butterfly_stage(x, 4, R, C)
    x = _butterfly_stage(x, 8, R, C)
    return round_bf16(x)


@triton.jit
def _tile(x, M, K, R: tl.constexpr, C: tl.constexpr, CAST: tl.constexpr):
    """Tile of a row-major matrix as fp32 (rounded to bf16 if CAST), zero outside."""
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.program_id(1) * C + tl.arange(0, C)
    inside = (r < M)[:, None] & (c < K)[None, :]
    offset = r.to(tl.int64)[:, None] * K + c[None, :]
    v = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    if CAST:
        v = round_bf16(v)
    return v, r, c, offset, inside


@triton.jit
def amax_kernel(
    x, row_out, col_out, signs, M, K,
    ROW: tl.constexpr, COL: tl.constexpr, RHT: tl.constexpr, CAST: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Bits of the largest magnitudes of a matrix and of its transformed columns, from one read."""
    v, _, _, _, _ = _tile(x, M, K, R, C, CAST)
    if ROW:
        tl.atomic_max(row_out, tl.max(tl.max(_bits(v) & 0x7FFFFFFF, 1), 0))
    if COL:
        if RHT:
            v = transform(v, signs, R, C)
        tl.atomic_max(col_out, tl.max(tl.max(_bits(v) & 0x7FFFFFFF, 1), 0))


@triton.jit
def forms_kernel(
    x, row_amax, col_amax, row_out, col_out, col_scales, signs, counters, seed, M, K, G,
    ROW: tl.constexpr, COL: tl.constexpr, PACK: tl.constexpr, RHT: tl.constexpr, SR: tl.constexpr, UP: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Row operand, and column form as operand or packed, of an activation or an output gradient."""
    v, r, c, offset, inside = _tile(x, M, K, R, C, True)
    if SR:
        step = tl.load(counters)
        role = tl.load(counters + 1)
        rank = tl.load(counters + 2)
    if ROW:
        blocks = tl.reshape(v, (R, C // 16, 16))
        _, value, factor = block_scale(tl.max(_bits(blocks) & 0x7FFFFFFF, 2), encode_scale(tl.load(row_amax)), UP)
        u = 0.0
        if SR:
            b = tl.program_id(1) * (C // 16) + tl.arange(0, C // 16)
            u = _bytes(seed, r[:, None] * (K // 16) + b[None, :], step, role, rank)
        q, sign = element(blocks * factor[:, :, None], u, SR)
        q = tl.where(sign != 0, -q, q) * value[:, :, None]
        tl.store(row_out + offset, tl.reshape(q, (R, C)).to(row_out.dtype.element_ty), mask=inside)
    if COL:
        if RHT:
            v = transform(v, signs, R, C)
        groups = tl.reshape(v, (R // 16, 16, C))
        bits = tl.max(_bits(groups) & 0x7FFFFFFF, 1)
        code, value, factor = block_scale(bits, encode_scale(tl.load(col_amax)), UP)
        g = tl.program_id(0) * (R // 16) + tl.arange(0, R // 16)
        u = 0.0
        if SR:
            k = _bytes(seed, c[None, :] * G + g[:, None], step, role | 1, rank)
            u = tl.permute(k, (0, 2, 1))
        q, sign = element(groups * factor[:, None, :], u, SR)
        if PACK:
            pairs = tl.reshape(element_code(q, sign), (R // 16, 8, 2, C))
            low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            i = g[:, None, None] * 8 + tl.arange(0, 8)[None, :, None]
            at = i.to(tl.int64) * K + c[None, None, :]
            full = (g < G)[:, None, None] & (tl.arange(0, 8) < 8)[None, :, None] & (c < K)[None, None, :]
            tl.store(col_out + at, (low | (high << 4)).to(tl.uint8), mask=full)
            spot = g.to(tl.int64)[:, None] * K + c[None, :]
            tl.store(col_scales + spot, code.to(tl.uint8), mask=(g < G)[:, None] & (c < K)[None, :])
        else:
            q = tl.where(sign != 0, -q, q) * value[:, None, :]
            padded = (r < G * 16)[:, None] & (c < K)[None, :]
            tl.store(col_out + offset, tl.reshape(q, (R, C)).to(col_out.dtype.element_ty), mask=padded)


@triton.jit
def weight_kernel(w, amax, out, scales, N, K, PACK: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """A weight in 16x16 blocks, as operand ``[N, K]`` or packed along its rows."""
    v, _, c, offset, inside = _tile(w, N, K, R, C, False)
    blocks = tl.reshape(v, (R // 16, 16, C // 16, 16))
    bits = tl.max(tl.max(_bits(blocks) & 0x7FFFFFFF, 3), 1)
    code, value, factor = block_scale(bits, encode_scale(tl.load(amax)), False)
    q, sign = element(blocks * factor[:, None, :, None], 0.0, False)
    if PACK:
        pairs = tl.reshape(element_code(q, sign), (R // 16, 8, 2, C))
        low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        g = tl.program_id(0) * (R // 16) + tl.arange(0, R // 16)
        i = g[:, None, None] * 8 + tl.arange(0, 8)[None, :, None]
        full = (g < N // 16)[:, None, None] & (tl.arange(0, 8) < 8)[None, :, None] & (c < K)[None, None, :]
        tl.store(out + i.to(tl.int64) * K + c[None, None, :], (low | (high << 4)).to(tl.uint8), mask=full)
        b = tl.program_id(1) * (C // 16) + tl.arange(0, C // 16)
        spot = g[:, None] * (K // 16) + b[None, :]
        tl.store(scales + spot, code.to(tl.uint8), mask=(g < N // 16)[:, None] & (b < K // 16)[None, :])
    else:
        q = tl.where(sign != 0, -q, q) * value[:, None, :, None]
        tl.store(out + offset, tl.reshape(q, (R, C)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def quantize_kernel(
    x, amax, codes, scales, u_in, counters, seed, M, K,
    SQUARE: tl.constexpr, SR: tl.constexpr, UP: tl.constexpr, EXPLICIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The public form: blocks along the rows (or 16x16), pairs of neighbours in a byte."""
    v, r, _, offset, inside = _tile(x, M, K, R, C, False)
    encode = encode_scale(tl.load(amax))
    b = tl.program_id(1) * (C // 16) + tl.arange(0, C // 16)
    if SQUARE:
        blocks = tl.reshape(v, (R // 16, 16, C // 16, 16))
        code, _, factor = block_scale(tl.max(tl.max(_bits(blocks) & 0x7FFFFFFF, 3), 1), encode, UP)
        y = tl.reshape(blocks * factor[:, None, :, None], (R, C // 16, 16))
        g = tl.program_id(0) * (R // 16) + tl.arange(0, R // 16)
        tl.store(
            scales + g[:, None] * (K // 16) + b[None, :],
            code.to(tl.uint8),
            mask=(g < M // 16)[:, None] & (b < K // 16)[None, :],
        )
    else:
        blocks = tl.reshape(v, (R, C // 16, 16))
        code, _, factor = block_scale(tl.max(_bits(blocks) & 0x7FFFFFFF, 2), encode, UP)
        y = blocks * factor[:, :, None]
        tl.store(
            scales + r[:, None] * (K // 16) + b[None, :],
            code.to(tl.uint8),
            mask=(r < M)[:, None] & (b < K // 16)[None, :],
        )
    u = 0.0
    if SR:
        if EXPLICIT:
            u = tl.reshape(tl.load(u_in + offset, mask=inside, other=0.0), (R, C // 16, 16))
        else:
            index = r[:, None] * (K // 16) + b[None, :]
            u = _bytes(seed, index, tl.load(counters), tl.load(counters + 1), tl.load(counters + 2))
    q, sign = element(y, u, SR)
    low, high = tl.split(tl.reshape(element_code(q, sign), (R, C // 2, 2)))
    h = tl.program_id(1) * (C // 2) + tl.arange(0, C // 2)
    tl.store(
        codes + r.to(tl.int64)[:, None] * (K // 2) + h[None, :],
        (low | (high << 4)).to(tl.uint8),
        mask=(r < M)[:, None] & (h < K // 2)[None, :],
    )


@triton.jit
def _signed_value(code):
    magnitude = code & 7
    twice = magnitude + tl.maximum(magnitude - 4, 0) + 2 * tl.maximum(magnitude - 6, 0)
    return (twice * (1 - ((code >> 2) & 2))).to(tl.float32) * 0.5


@triton.jit
def unpack_kernel(codes, scales, out, G, K, SQUARE: tl.constexpr, C: tl.constexpr):
    """Operand ``[16 G, K]`` of codes ``[G, 8, K]``: one group of 16 rows and C columns a program."""
    g = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    inside = (c < K)[None, :] & (tl.arange(0, 8) < 8)[:, None]
    packed = tl.load(codes + (g * 8 + tl.arange(0, 8))[:, None] * K + c[None, :], mask=inside, other=0).to(tl.int32)
    if SQUARE:
        scale = tl.load(scales + g * (K // 16) + c // 16, mask=c < K, other=0)
    else:
        scale = tl.load(scales + g * K + c, mask=c < K, other=0)
    value = e4m3_value(scale.to(tl.int32))[None, :]
    row = (g * 16 + 2 * tl.arange(0, 8))[:, None] * K + c[None, :]
    tl.store(out + row, (_signed_value(packed & 15) * value).to(out.dtype.element_ty), mask=inside)
    tl.store(out + row + K, (_signed_value(packed >> 4) * value).to(out.dtype.element_ty), mask=inside)


@triton.jit
def epilogue_kernel(acc, amax_a, amax_b, bias, out, N, total, BIAS: tl.constexpr, SIZE: tl.constexpr):
    """``out = acc * amax_a * amax_b / 2688**2 + bias`` in fp32, one cast."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    alpha = tl.load(amax_a) * tl.load(amax_b)
    alpha = tl.div_rn(alpha, 7225344.0 + alpha * 0.0)
    v = tl.load(acc + i, mask=i < total, other=0.0) * alpha
    if BIAS:
        v += tl.load(bias + i % N, mask=i < total, other=0.0).to(tl.float32)
    tl.store(out + i, v.to(out.dtype.element_ty), mask=i < total)
