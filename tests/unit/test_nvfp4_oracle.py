"""Bit equality with Transformer Engine's own reference, which this project did not write."""

import pytest
import torch

from lightning_grad.nvfp4 import NVFP4Recipe, linear, matmul, quantize, rht
from tests.nvfp4_oracle import inputs, load_reference, positive_zeros

FAMILIES = list(inputs(16, 16))


@pytest.fixture(scope="module")
def reference():
    return load_reference()


def theirs(reference, x, tile, *, transposed=False, with_rht=False):
    module, utils = reference
    quantizer = module.NVFP4QuantizerRef(
        dtype=utils.Fp4Formats.E2M1,
        quant_tile_shape=tile,
        rowwise=not transposed,
        columnwise=transposed,
        with_rht=with_rht,
    )
    # processors with bf16 instructions flush denormals in oneDNN's bf16 product, which transforms the reference's input
    with torch.backends.mkldnn.flags(enabled=False):
        return quantizer, quantizer.quantize(x)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [(1, 16), (16, 16)], ids=["1d", "2d"])
def test_codes_scales_and_amax_are_equal(reference, family, dtype, block):
    x = inputs()[family].to(dtype)
    ours = quantize(x, block)
    _, want = theirs(reference, x, block)
    assert torch.equal(positive_zeros(ours.codes), positive_zeros(want.data.view(torch.uint8)))
    scales = ours.scales.view(torch.uint8).repeat_interleave(block[0], 0)
    assert torch.equal(scales, want.scale.view(torch.uint8))
    assert torch.equal(ours.amax, want.global_amax_row.reshape(1).float())


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "spread"])
def test_transformed_columns_are_equal(reference, family):
    x = inputs()[family].to(torch.bfloat16)
    ours = quantize(rht(x.t().contiguous()))
    _, want = theirs(reference, x, (1, 16), transposed=True, with_rht=True)
    assert torch.equal(positive_zeros(ours.codes), positive_zeros(want.data_t.view(torch.uint8)))
    assert torch.equal(ours.scales.view(torch.uint8), want.scale_t.view(torch.uint8))
    assert torch.equal(ours.amax, want.global_amax_col.reshape(1).float())


def test_transform_of_wide_groups_differs_by_summation_order_only(reference):
    x = inputs(256, 256)["spread"].to(torch.bfloat16)
    _module, _ = reference
    quantizer, _ = theirs(reference, x, (1, 16), transposed=True, with_rht=True)
    want = quantizer._apply_rht(x).float()
    got = rht(x).float()
    different = got != want
    assert different.float().mean() <= 1e-4
    # fp32 sums in another order differ by 2**-20 of the group at most, which may move one bf16 rounding
    largest = x.float().abs().view(256, -1, 16).amax(-1, keepdim=True).expand(-1, -1, 16).reshape(256, 256)
    assert ((got - want).abs() <= 2.0**-20 * largest + 2.0**-7 * want.abs()).all()


def test_matmul_is_the_block_gemm(reference):
    a, b = inputs(64, 128)["normal"].to(torch.bfloat16), inputs(32, 128)["outlier"].to(torch.bfloat16)
    quantizer, qa = theirs(reference, a, (1, 16))
    _, qb = theirs(reference, b, (1, 16))
    want = quantizer.qgemm(qa.data, qb.data, None, torch.float32, qa.scale, qb.scale, qresult_x=qa, qresult_w=qb)
    got = matmul(quantize(a), quantize(b))
    bound = 2e-6 * (a.float().abs() @ b.float().abs().t())  # fp32 sums of 128 exact products in another order
    assert ((got - want).abs() <= bound).all()


def test_linear_is_made_of_their_operands(reference):
    """Y and dX of the layer from the reference's quantized tensors, without stochastic rounding."""
    g = torch.Generator().manual_seed(3)
    x, w, dy = (torch.randn(s, generator=g) for s in ((64, 96), (32, 96), (64, 32)))
    x.requires_grad_(), w.requires_grad_()
    y = linear(x, w, config=NVFP4Recipe(stochastic_rounding=False), backend="torch")
    y.backward(dy)

    def decoded(t, tile, **kwargs):
        _quantizer, q = theirs(reference, t, tile, **kwargs)
        data, scale = (q.data_t, q.scale_t) if kwargs else (q.data, q.scale)
        amax = q.global_amax_col if kwargs else q.global_amax_row
        values = reference[0].cast_from_fp4x2(data.view(torch.uint8), torch.float64)
        return values * scale.double().repeat_interleave(16, 1) * (amax.double() / 2688)

    xq, wq = decoded(x.detach().bfloat16(), (1, 16)), decoded(w.detach(), (16, 16))
    dyq = decoded(dy.bfloat16(), (1, 16))
    columns = {"transposed": True, "with_rht": True}
    xc, dyc = decoded(x.detach().bfloat16(), (1, 16), **columns), decoded(dy.bfloat16(), (1, 16), **columns)
    for got, a, b in ((y, xq, wq.t()), (x.grad, dyq, wq), (w.grad, dyc, xc.t())):
        assert ((got.double() - a @ b).abs() <= 2e-6 * (a.abs() @ b.abs())).all()
