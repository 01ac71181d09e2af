"""The byte (oracles 3 and 20)."""

import math

import pytest
import torch

from lightning_grad.spsa import Codec, decode_e4m3, encode_e4m3, rademacher


def test_all_codes_decode_as_torch_does():
    codes = torch.arange(256, dtype=torch.uint8)
    want = codes.view(torch.float8_e4m3fn).double()
    got = torch.tensor([decode_e4m3(c) for c in range(256)], dtype=torch.float64)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~got.isnan()], want[~want.isnan()])
    assert math.copysign(1.0, decode_e4m3(0x80)) == -1.0


def test_encode_equals_torch_after_clamping():
    generator = torch.Generator().manual_seed(0)
    size = torch.exp2(torch.rand(60_000, generator=generator) * 24 - 13)
    sign = torch.where(torch.rand(60_000, generator=generator) < 0.5, -1.0, 1.0)
    finite = torch.tensor([decode_e4m3(c) for c in range(0x7F)])
    ties = (finite[1:] + finite[:-1]) / 2
    below, above = torch.nextafter(ties, ties * 0), torch.nextafter(ties, ties * 2)
    values = torch.cat(
        [size * sign, finite, -finite, ties, -ties, below, above, torch.tensor([448.0, 464.0, 1e30, -1e30])]
    )
    want = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    assert [encode_e4m3(v) for v in values.tolist()] == want


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["e4m3", "sign", "f32"])
def test_not_finite_abstains(name, bad):
    codec = Codec(name)
    assert codec.encode(bad, 0) == codec.abstain
    assert codec.decode(codec.abstain, 0) is None
    assert len(codec.abstain) == codec.unit


def test_codec_scales_saturates_and_survives_extremes():
    codec = Codec("e4m3")
    assert codec.decode(codec.encode(3.25 * 2.0**-9, -9), -9) == 3.25 * 2.0**-9
    assert codec.saturated(codec.encode(1e300, -120))
    assert codec.decode(codec.encode(-1e300, 0), 0) == -448.0
    assert codec.decode(codec.encode(5e-324, 120), 120) == 0.0
    assert codec.decode(b"\xff", 0) is None
    assert Codec("sign").decode(Codec("sign").encode(-7.0, 3), 3) == -1.0
    assert Codec("sign").decode(b"\x77", 0) is None  # no legal code of this codec
    assert Codec("f32").decode(Codec("f32").encode(0.1, 5), 5) == float(torch.tensor(0.1))
    assert Codec("f32").encode(1e300, 0) == Codec("f32").abstain


def test_the_byte_adds_no_bias_to_the_direction():
    """Mean of Q(g) z against the gradient; 1 - cos of 2**20 signs' own noise is about d / n = 3e-5."""
    d, n = 30, 1 << 20
    gradient = torch.linspace(-1, 1, d).double()
    z = rademacher(0, 0, 0, n * d).view(n, d).double()
    g = z @ gradient
    scale = 2.0 ** (math.frexp(float(g.square().mean().sqrt()))[1] - 3)
    coded = (g / scale).float().to(torch.float8_e4m3fn).double() * scale
    sample = [
        Codec("e4m3").decode(Codec("e4m3").encode(v, round(math.log2(scale))), round(math.log2(scale)))
        for v in g[:500].tolist()
    ]
    assert sample == coded[:500].tolist()
    mean = coded @ z / n
    cosine = float(mean @ gradient / (mean.norm() * gradient.norm()))
    assert 1 - cosine < 1e-4
