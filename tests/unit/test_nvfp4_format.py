"""The number format: worked examples from Transformer Engine's reference, closed forms, invariants."""

import math
import weakref

import pytest
import torch

from lightning_grad.nvfp4 import (
    dequantize,
    matmul,
    pack,
    philox,
    quantize,
    rht,
    round_e2m1,
    sr_uniform,
    to_e4m3,
    unpack,
)
from lightning_grad.nvfp4 import format as fmt
from lightning_grad.nvfp4.stream import device_words
from tests.nvfp4_oracle import inputs

GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def normal(rows=512, columns=512):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def hexes(q):
    return q.codes.numpy().tobytes().hex().upper(), q.scales.view(torch.uint8).numpy().tobytes().hex().upper()


def test_every_tie_of_the_grid():
    x = torch.tensor([[6, 4, 3, 2, 1.5, 1, 0.5, 0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, 5.5, 0]])
    q = quantize(x)
    assert hexes(q) == ("67452301AACCEE07", "7E")
    assert dequantize(q).tolist() == [[6, 4, 3, 2, 1.5, 1, 0.5, 0, -1, -1, -2, -2, -4, -4, 6, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_blocks_with_saturation_and_underflow(dtype):
    first = [10, -7, 3, -1.5, 0.8, 0.4, 0.2, 0.1, -10, 9, -8, 6, 5, 4, 2, 1]
    second = [0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.9, -1, 0.05, -0.025, 0.0125, 0, 0.99, -0.33]
    q = quantize(torch.tensor([first + second]).to(dtype))
    assert hexes(q) == ("E7A401007F6E4512A1C4E5E6F78100C7", "7E63")
    assert q.amax.tolist() == [10.0]
    decoded = torch.tensor([10, -6.666667, 3.3333335, -1.6666667, 0.8333334, 0, 0, 0, -10, 10, -6.666667, 6.666667])
    torch.testing.assert_close(dequantize(q)[0, :12], decoded, rtol=2e-7, atol=0)


def test_zero_block_and_vanishing_scale():
    x = torch.cat([torch.zeros(16), torch.full((8,), 1e-3), torch.full((8,), -1e-3), torch.tensor([1e3] + [1.0] * 15)])
    q = quantize(x[None])
    assert hexes(q) == ("00" * 8 + "77777777FFFFFFFF" + "07" + "00" * 7, "00007E")
    assert dequantize(q)[0, 32] == 1000
    assert dequantize(q)[0, :32].count_nonzero() == 0


def test_blocks_of_sixteen_rows():
    w = torch.tensor(
        [[((i - 7.5) * 0.25 + (j % 5) - 2) * (1 if j < 16 else 0.125) for j in range(32)] for i in range(16)]
    )
    q = quantize(w, (16, 16))
    assert q.amax.tolist() == [3.875]
    assert hexes(q)[1] == "7E66"
    assert q.codes[0].numpy().tobytes().hex().upper() == "EFBDF0DE0BEFBDF0DE0BEFBDF0DE0BEF"
    assert q.codes[1].numpy().tobytes().hex().upper() == "EFADF1DE1AEFADF1DE1AEFADF1DE1AEF"


def test_hadamard_examples():
    x = torch.zeros(3, 16)
    x[0, 0], x[1, 3], x[2] = 16, 16, torch.arange(16.0)
    assert rht(x)[0].tolist() == [4.0] * 16
    assert rht(x)[1].tolist() == [-4.0, 4.0, 4.0, -4.0] * 4
    third = [-14.5, -7.5, 6.5, -0.5, 6.5, -0.5, -14.5, 8.5, 7.5, 14.5, 0.5, 1.5, 0.5, -2.5, 9.5, -15.5]
    assert rht(x)[2].tolist() == third


def test_hadamard_is_the_matrix():
    """Against the definition H[i, j] = (-1) ** popcount(i & j) in float64."""
    signs = [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]
    h = torch.tensor([[0.25 * signs[i] * (-1) ** (i & j).bit_count() for j in range(16)] for i in range(16)]).double()
    x = normal(8, 64).bfloat16()
    want = (x.double().view(-1, 16) @ h).view(8, 64)
    torch.testing.assert_close(rht(x).double(), want, rtol=2**-8, atol=1e-6)  # one bf16 rounding
    other = [-1] * 16
    torch.testing.assert_close(
        rht(x, other).double().abs(),
        ((x.double().view(-1, 16) @ (h * torch.tensor(signs)[:, None])).view(8, 64)).abs(),
        rtol=2**-8,
        atol=1e-6,
    )


def test_stochastic_rounding_examples():
    y, u, q = torch.tensor(
        [
            (0.3, 0.39, 0), (0.3, 0.41, 0.5), (1.1, 0.79, 1), (1.1, 0.81, 1.5), (2.6, 0.39, 2), (2.6, 0.41, 3),
            (4.5, 0.74, 4), (4.5, 0.76, 6), (5.9, 0.04, 4), (5.9, 0.06, 6), (6.2, 0.99, 6), (-0.3, 0.41, -0.5),
            (-1.9, 0.21, -2), (-3.9, 0.11, -4), (0, 0.999, 0), (0.25, 0.5, 0.5),
        ]
    ).t()  # fmt: skip
    assert torch.equal(round_e2m1(y, u), q)
    assert torch.signbit(round_e2m1(torch.tensor([-0.1]), torch.tensor([0.0]))).all()


def test_stochastic_rounding_is_the_textbook_formula():
    """Against a float64 rounder that knows the neighbours on the grid."""
    y = torch.linspace(-6.4, 6.4, 4001)
    for k in (0, 1, 64, 127, 128, 200, 255):
        u = (k + 0.5) / 256
        got = round_e2m1(y, torch.full_like(y, u)).tolist()
        for value, q in zip(y.tolist(), got, strict=True):
            a = min(abs(value), 6.0)
            low = max(g for g in GRID if g <= a)
            high = min((g for g in GRID if g > a), default=6.0)
            position = (a - low) / (high - low) if high > low else 0.0
            if abs(position + u - 1) > 1e-6:
                assert abs(q) == (high if position + u >= 1 else low), (value, u)


def test_special_values_of_the_rounder():
    y = torch.tensor([-0.0, -1e-20, math.nan, math.inf, -math.inf, 7.0])
    q = round_e2m1(y)
    assert fmt.encode_e2m1(q).tolist() == [8, 8, 7, 7, 15, 7]
    assert fmt.decode_e2m1(torch.arange(16, dtype=torch.uint8)).tolist() == GRID + [-g for g in GRID]
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(fmt.encode_e2m1(fmt.decode_e2m1(codes)), codes)
    assert fmt.encode_pairs(y[[3, 0, 1, 2, 4, 5, 0, 0] * 2].clamp(-6, 6).view(1, 16, 1)).flatten().tolist() == [
        0x87, 0x78, 0x7F, 0x88, 0x87, 0x78, 0x7F, 0x88,
    ]  # fmt: skip


def test_packed_pairs_are_the_codes_of_the_elements():
    y = torch.randn(3, 16, 5).mul_(3).clamp_(-6, 6)
    codes = fmt.encode_e2m1(round_e2m1(y))
    packed = fmt.encode_pairs(y.clone())
    assert torch.equal(packed, codes[:, ::2] | (codes[:, 1::2] << 4))
    every = torch.arange(256, dtype=torch.uint8).view(2, 8, 16)
    want = fmt.decode_e2m1(torch.stack((every & 15, every >> 4), dim=2).view(2, 16, 16))
    assert torch.equal(fmt.decode_pairs(every).float() * 2**14, want)


def test_e4m3_codes_equal_the_cast_everywhere():
    """All midpoints of neighbouring codes, their neighbours in fp32, and a dense sweep; torch's cast is the oracle."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (values[1:] + values[:-1]) / 2
    up, down = (torch.nextafter(middle, torch.tensor(limit)) for limit in (math.inf, 0.0))
    v = torch.cat([values, middle, up, down, torch.linspace(0, 448, 100001), torch.logspace(-30, -2, 5001)])
    assert torch.equal(to_e4m3(v), v.to(torch.float8_e4m3fn).view(torch.uint8))
    codes = torch.arange(127, dtype=torch.uint8)
    assert torch.equal(fmt.from_e4m3(codes), values)
    nan = torch.tensor([0x7FC00000, -1, 0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert to_e4m3(nan).tolist() == fmt.to_e4m3_up(nan).tolist() == [0x7F] * 4
    assert fmt.to_e4m3_up(values).tolist() == codes.tolist()
    assert torch.equal(fmt.to_e4m3_up(up), codes[1:])
    assert torch.equal(fmt.to_e4m3_up(down), codes[1:])


def test_packing():
    codes = torch.arange(16, dtype=torch.uint8).repeat(3, 2)
    assert pack(codes)[0, 0] == 0x10
    assert torch.equal(unpack(pack(codes)), codes)
    with pytest.raises(ValueError, match="`codes`"):
        pack(codes[:, :15])


def test_words_on_the_device_are_kept_for_layers_and_not_for_every_step():
    device = torch.device("cpu")
    first = device_words((1, 6, 0), device)
    assert [int(word) for word in first] == [1, 6, 0]
    assert device_words((torch.tensor(9), 6, 0), device)[1] is first[1]
    step = weakref.ref(device_words((12345, 6, 0), device)[0])
    for number in range(2000):
        device_words((number, 6, 0), device)
    assert step() is None


def test_stream_known_answer():
    step, layer_id, rank = 3, 3, 0
    words = philox(torch.tensor([0, 1]), step, layer_id << 1, rank, seed=0x9ABCDEF012345678)
    got = [[f"{int(w[i]):08X}" for w in words] for i in range(2)]
    assert got == [["7A75C070", "3EA56599", "0B3DA199", "08F658A5"], ["4B7E50CD", "F7AA3998", "6FC7A483", "F138359A"]]
    k = sr_uniform(1, 0x9ABCDEF012345678, (step, layer_id << 1, rank)) * 256 - 0.5
    assert k[0].tolist() == [112, 192, 117, 122, 153, 101, 165, 62, 153, 161, 61, 11, 165, 88, 246, 8]


def relative_mse(x, **kwargs):
    return float(((dequantize(quantize(x, **kwargs)) - x) ** 2).sum() / (x**2).sum())


def test_errors_of_normal_data_are_in_their_bands():
    x = normal()
    assert relative_mse(x) == pytest.approx(0.00904, rel=0.02)
    assert relative_mse(x, block=(16, 16)) == pytest.approx(0.01241, rel=0.02)
    assert relative_mse(x, rounding="stochastic") == pytest.approx(0.01886, rel=0.02)
    assert relative_mse(x, rounding="stochastic", sr_scale="up") == pytest.approx(0.0221, rel=0.02)
    gain = float((dequantize(quantize(x)) * x).sum() / (x * x).sum())
    assert gain == pytest.approx(0.9954, abs=0.001)


@pytest.mark.parametrize(
    ("name", "value"), [("uniform", 0.01035), ("relu", 0.0074), ("laplace", 0.0086), ("t3", 0.0082)]
)
def test_errors_of_other_data_are_in_their_bands(name, value):
    torch.manual_seed(1)
    u = torch.rand(512, 512)
    x = {
        "uniform": lambda: u,
        "relu": lambda: normal().relu(),
        "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).icdf(u.clamp(1e-6, 1 - 1e-6)),
        "t3": lambda: torch.distributions.StudentT(3.0).sample((512, 512)),
    }[name]()
    assert relative_mse(x) == pytest.approx(value, rel=0.05)


def draws(x, n, sr_scale):
    return (dequantize(quantize(x, rounding="stochastic", counters=(i, 0, 0), sr_scale=sr_scale)) for i in range(n))


@pytest.mark.parametrize(("sr_scale", "gain", "errors"), [
    ("nearest", 0.9966, (0.0357, 0.0198, 0.0133)), ("up", 1.0, (0.037, 0.0188, 0.0096)),
])  # fmt: skip
def test_mean_of_stochastic_draws(sr_scale, gain, errors):
    """The mean of n draws approaches x as 1/sqrt(n), down to the bias of saturating block maxima."""
    x = normal(256, 256)
    total = torch.zeros_like(x)
    seen = {}
    for n, value in enumerate(draws(x, 256, sr_scale), start=1):
        total += value
        if n in (16, 64, 256):
            seen[n] = float((total / n - x).norm() / x.norm())
    assert float((total / 256 * x).sum() / (x * x).sum()) == pytest.approx(gain, abs=0.0005)
    for n, want in zip((16, 64, 256), errors, strict=True):
        assert seen[n] == pytest.approx(want, rel=0.1)


def test_error_of_an_element_is_bounded():
    for name, x in inputs(64, 256).items():
        q = quantize(x)
        codes = q.scales.view(torch.uint8)
        blocks = x.view(64, -1, 16)
        bound = blocks.abs().amax(-1) / 6 * (1 + 2**-4)
        worst = (dequantize(q) - x).abs().view(64, -1, 16).amax(-1)
        # subnormal scales are coarse; below 7.9e-36 the encoding scale is clamped; scale * amax overflows above 7.5e35
        usable = (codes >= 0x08) & (q.amax > 7.9e-36) & (q.amax < 7.5e35)
        assert (worst <= bound)[usable].all(), name


def test_invariants():
    x = normal(64, 128)
    q = quantize(x)
    for exponent in range(-30, 31, 6):
        scaled = quantize(x * 2.0**exponent)
        assert torch.equal(scaled.codes, q.codes)
        assert torch.equal(scaled.scales.view(torch.uint8), q.scales.view(torch.uint8))
    two, transposed = quantize(x, (16, 16)), quantize(x.t().contiguous(), (16, 16))
    assert torch.equal(dequantize(two).t(), dequantize(transposed))
    again = quantize(dequantize(q))
    assert torch.equal(dequantize(again), dequantize(q))
    assert torch.equal(quantize(x, backend="torch").codes, q.codes)


def test_grid_points_are_exact():
    x = torch.tensor(GRID)[torch.randint(0, 8, (32, 64), generator=torch.Generator().manual_seed(2))]
    x.view(32, 4, 16)[..., 0] = 6
    x *= 2.0 ** torch.arange(-2.0, 2.0).repeat_interleave(16)
    assert torch.equal(dequantize(quantize(x)), x)


def test_hadamard_invariants():
    x, w = normal(64, 1024), normal(32, 1024) * 0.5 + 0.1
    assert rht(x).float().norm() == pytest.approx(float(x.norm()), rel=1e-4)
    torch.testing.assert_close(rht(rht(x), inverse=True).float(), x, rtol=2**-6, atol=2**-6)
    product, want = rht(x).double() @ rht(w).double().t(), x.double() @ w.double().t()
    assert (product - want).norm() / want.norm() < 3 * 2.4e-3


def underflow(x):
    q = quantize(x)
    return float(((dequantize(q) == 0) & (x != 0)).float().mean())


def test_hadamard_removes_underflow_not_error():
    x = 0.01 * normal(256, 256)
    x[:, ::16] = 5.0
    transformed = rht(x).float()
    assert underflow(x.bfloat16().float()) == pytest.approx(0.9375, abs=0.01)
    assert underflow(transformed) == 0.0

    def crest(t):
        blocks = t.view(-1, 16)
        return float((blocks.abs().amax(1) / blocks.square().mean(1).sqrt()).mean())

    assert crest(x) == pytest.approx(4.0, abs=0.01)
    assert crest(transformed) == pytest.approx(1.01, abs=0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_inputs_give_non_finite_outputs(bad):
    x, w = normal(16, 32), normal(16, 32)
    x[3, 5] = bad
    q = quantize(x)
    assert not q.amax.isfinite().all()
    assert not matmul(q, quantize(w))[3].isfinite().any()


def test_negative_underflow_keeps_its_sign():
    x = torch.zeros(1, 16)
    x[0, 0], x[0, 1], x[0, 2] = 6.0, -0.01, -0.0
    assert unpack(quantize(x).codes)[0, :4].tolist() == [7, 8, 8, 0]


def test_products_of_operands_are_exact_in_bf16_and_fp32():
    e2m1 = torch.tensor(GRID)
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = (e2m1[:, None] * scales).unique()
    assert len(values) == 238  # 237 and zero
    assert torch.equal(values.bfloat16().float(), values)
    assert torch.equal(values.half().float(), values)
    assert torch.equal((values[:, None] * values).double(), values.double()[:, None] * values.double())


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: quantize(torch.zeros(2, 3, 16)), ValueError, "matrix"),
        (lambda: quantize(torch.zeros(2, 24)), ValueError, r"\(2, 24\)"),
        (lambda: quantize(torch.zeros(8, 16), (16, 16)), ValueError, r"\(8, 16\)"),
        (lambda: quantize(torch.zeros(8, 16), (4, 16)), ValueError, "`block`"),
        (lambda: quantize(torch.zeros(16, 16), rounding="up"), ValueError, "`rounding`"),
        (lambda: quantize(torch.zeros(16, 16), (16, 16), rounding="stochastic"), ValueError, "1x16"),
        (lambda: quantize(torch.zeros(16, 16), u=torch.zeros(16, 16)), ValueError, "`u`"),
        (lambda: quantize(torch.zeros(16, 16, dtype=torch.int32)), TypeError, "int32"),
        (lambda: quantize(torch.zeros(16, 16, dtype=torch.complex64)), TypeError, "complex64"),
        (lambda: quantize(torch.zeros(16, 16), backend="cuda"), ValueError, "`backend`"),
        (lambda: rht(torch.zeros(3, 8)), ValueError, r"\(3, 8\)"),
        (lambda: rht(torch.zeros(3, 16), signs=[1, 0] * 8), ValueError, "`hadamard_signs`"),
        (lambda: matmul(quantize(torch.zeros(1, 16)), quantize(torch.zeros(1, 32))), ValueError, "second"),
        (lambda: matmul(*[quantize(torch.zeros(3, 16))] * 2, bias=torch.zeros(2)), ValueError, r"`bias`.*\(3,\)"),
        (lambda: quantize(torch.zeros(16, 16), amax=torch.zeros(2)), ValueError, r"`amax`.*\(2,\)"),
        (lambda: quantize(torch.zeros(16, 16), amax=torch.tensor(1)), ValueError, "`amax`.*int64"),
        (lambda: quantize(torch.zeros(1, 16), rounding="stochastic", seed=2**64), ValueError, "`seed`"),
        (lambda: quantize(torch.zeros(1, 16), rounding="stochastic", counters=(1, 2)), ValueError, "`counters`.*got 2"),
        (lambda: quantize(torch.zeros(1, 16), rounding="stochastic", counters=(0, -1, 0)), ValueError, "`counters`"),
        (lambda: sr_uniform(1, counters=(2**32, 0, 0)), ValueError, "`counters`"),
        (lambda: sr_uniform(-1), ValueError, "`n_blocks`"),
    ],
)  # fmt: skip
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()
