"""One byte per direction: OCP FP8 E4M3 in plain Python, and the two other codes of the wire.

The code is nearest-even and saturates at 448; 0x7F and 0xFF mean "abstain". It is written out here and not taken from
torch, because the cast's treatment of values above 448 differs between versions and devices.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache

from lightning_grad._validate import check_choice

CODECS = {"e4m3": 1, "sign": 1, "f32": 4}
"""Bytes per code, by name."""
ABSTAIN = 0x7F
_MAX = 448.0


def encode_e4m3(x: float) -> int:
    """E4M3FN code (0..255) of the nearest value, ties to even; not finite gives 0x7F, beyond ±448 saturates."""
    if not math.isfinite(x):
        return ABSTAIN
    sign = 0x80 if math.copysign(1.0, x) < 0 else 0
    size = min(abs(x), _MAX)
    if size == 0.0:
        return sign
    exponent = max(math.frexp(size)[1] - 1, -6)
    steps = round(math.ldexp(size, 3 - exponent))  # Python rounds halves to even; 16 carries into the exponent
    return sign | (((exponent + 6) << 3) + steps)


def decode_e4m3(code: int) -> float:
    """Exact value of a code; NaN for 0x7F and 0xFF."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 0xF, code & 7
    if code & 0x7F == ABSTAIN:
        return math.nan
    if exponent == 0:
        return sign * math.ldexp(mantissa, -9)
    return sign * math.ldexp(8 + mantissa, exponent - 10)


class Codec:
    """How a projected gradient becomes bytes and back.

    Args:
        name: ``"e4m3"`` (one byte, scaled), ``"sign"`` (one byte, -1, 0 or +1) or ``"f32"`` (four bytes, no scale).
    """

    def __init__(self, name: str) -> None:
        self.name = check_choice("codec", name, CODECS)
        self.unit = CODECS[name]
        self.abstain = struct.pack("<f", math.nan) if name == "f32" else bytes([ABSTAIN])

    @property
    def scaled(self) -> bool:
        """Whether the running power-of-two scale applies."""
        return self.name == "e4m3"

    def encode(self, g: float, scale_log2: int) -> bytes:
        """Code of ``g``; not finite means abstain."""
        if not math.isfinite(g):
            return self.abstain
        if self.name == "f32":
            try:
                return struct.pack("<f", g)
            except OverflowError:
                return self.abstain
        if self.name == "sign":
            return bytes([0x00 if g == 0 else 0x38 if g > 0 else 0xB8])
        return bytes([encode_e4m3(_scaled_down(g, scale_log2))])

    def decode(self, code: bytes, scale_log2: int) -> float | None:
        """Value in units of the projected gradient; ``None`` if the sender abstained (or sent no legal code)."""
        if self.name == "f32":
            value: float = struct.unpack("<f", code)[0]
            return value if math.isfinite(value) else None
        if self.name == "sign":
            return {0x00: 0.0, 0x38: 1.0, 0xB8: -1.0}.get(code[0])
        value = _table()[code[0]]
        return None if math.isnan(value) else math.ldexp(value, scale_log2)

    def saturated(self, code: bytes) -> bool:
        """Whether the code is the largest one, so the true value may be larger."""
        return self.name == "e4m3" and code[0] & 0x7F == 0x7E


def _scaled_down(g: float, scale_log2: int) -> float:
    try:
        return math.ldexp(g, -scale_log2)
    except OverflowError:  # far beyond 448: saturate
        return math.copysign(_MAX, g)


@lru_cache(maxsize=1)
def _table() -> tuple[float, ...]:
    return tuple(decode_e4m3(code) for code in range(256))
