"""The quantized linear layer: gradients from its own operands, memory, autograd, autocast, checkpointing, compile."""

import copy
import os
import pickle
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_grad.nvfp4 import (
    NVFP4Linear,
    NVFP4Recipe,
    dequantize,
    exact_products,
    linear,
    quantize,
    rht,
    torch_backend,
)
from lightning_grad.nvfp4.linear import Session

M, K, N = 48, 64, 32


def data(m=M, dtype=torch.float32):
    g = torch.Generator().manual_seed(5)
    x, w, b, dy = (torch.randn(s, generator=g) for s in ((m, K), (N, K), (N,), (m, N)))
    return x.to(dtype), w, b, dy.to(dtype)


def run(x, w, b, dy, **kwargs):
    x, w, b = (t.detach().clone().requires_grad_() for t in (x, w, b))
    y = linear(x, w, b, backend="torch", **kwargs)
    y.backward(dy)
    return y.detach(), x.grad, w.grad, b.grad


def expected(x, w, b, dy, recipe, step=0, layer_id=0, rank=0, seed=0):
    """The layer in float64 from the public functions: quantize, rht, dequantize."""
    m = x.shape[0]
    pad = nn.functional.pad
    xb, dyb = x.bfloat16().float(), dy.bfloat16().float()
    transform = (lambda t: rht(t).float()) if recipe.rht else (lambda t: t)
    xc = transform(pad(xb, (0, 0, 0, -m % 16)).t().contiguous())
    dyc = transform(pad(dyb, (0, 0, 0, -m % 16)).t().contiguous())
    sr = {"rounding": "stochastic", "sr_scale": recipe.sr_scale, "seed": seed} if recipe.stochastic_rounding else {}
    rows = dict(sr, counters=(step, layer_id << 1, rank)) if sr else {}
    columns = dict(sr, counters=(step, (layer_id << 1) | 1, rank)) if sr else {}
    block = (16, 16) if recipe.weight_2d else (1, 16)

    def decode(q):
        # 2.7 rounds twice more than the GEMM does: undo with exact operands
        return dequantize(q).double()

    wf = decode(quantize(w, block))
    wb = decode(quantize(w.t().contiguous(), block)).t()
    return (
        decode(quantize(xb)) @ wf.t() + b.double(),
        decode(quantize(dyb, **rows)) @ wb,
        decode(quantize(dyc, **columns)) @ decode(quantize(xc)).t(),
        dy.double().sum(0),
    )


RECIPES = {
    "default": NVFP4Recipe(),
    "no_rht": NVFP4Recipe(rht=False),
    "no_sr": NVFP4Recipe(stochastic_rounding=False),
    "weight_1d": NVFP4Recipe(weight_2d=False),
    "sr_up": NVFP4Recipe(sr_scale="up"),
    "signs": NVFP4Recipe(hadamard_signs=(1, -1) * 8),
}


@pytest.mark.parametrize("name", [n for n in RECIPES if n != "signs"])
@pytest.mark.parametrize("m", [48, 41])
def test_outputs_and_gradients_are_products_of_the_public_operands(name, m):
    x, w, b, dy = data(m)
    place = {"step": 7, "layer_id": 5, "rank": 2, "seed": 99}
    got = run(x, w, b, dy, config=RECIPES[name], **place)
    want = expected(x, w, b, dy, RECIPES[name], **place)
    for g, e in zip(got, want, strict=True):
        # fp32 sums of at most 64 products, and two roundings of the decoded values
        torch.testing.assert_close(g.double(), e, rtol=0, atol=4e-6 * float(e.abs().max()) * 4)


def test_custom_signs_reach_the_weight_gradient_only():
    x, w, b, dy = data()
    base, other = run(x, w, b, dy), run(x, w, b, dy, config=RECIPES["signs"])
    assert torch.equal(base[0], other[0])
    assert torch.equal(base[1], other[1])
    assert not torch.equal(base[2], other[2])


def test_stream_is_reproducible_and_independent():
    x, w, b, dy = data()
    base = run(x, w, b, dy, step=1)
    assert all(torch.equal(p, q) for p, q in zip(base, run(x, w, b, dy, step=torch.tensor(1)), strict=True))
    for place in ({"step": 2}, {"step": 1, "layer_id": 1}, {"step": 1, "rank": 1}, {"step": 1, "seed": 1}):
        other = run(x, w, b, dy, **place)
        assert torch.equal(base[0], other[0])
        assert not torch.equal(base[1], other[1])
        assert not torch.equal(base[2], other[2])


def test_global_random_state_is_untouched():
    before = torch.get_rng_state()
    run(*data())
    assert torch.equal(before, torch.get_rng_state())


def test_input_gradient_is_unbiased_with_scales_rounded_up():
    """The gain <dX, E dX> / <E dX, E dX> of a draw has mean 1: 5 sigma, a false alarm in 1.7 million seeds.

    Its twin, scales to nearest, saturates block maxima and must fail.
    """
    x, w, b, dy = data(512)
    dy = dy.bfloat16().float()
    want = dy @ dequantize(quantize(w, (16, 16)))

    def sigmas(sr_scale):
        recipe = NVFP4Recipe(sr_scale=sr_scale)
        dx = torch.stack([run(x, w, b, dy, step=i, config=recipe)[1] for i in range(64)])
        gains = (dx * want).sum((1, 2)).double() / (want * want).sum()
        return float((gains.mean() - 1).abs() / (gains.std() / 64**0.5))

    assert sigmas("up") < 5
    assert sigmas("nearest") > 5


def test_exact_on_grid_inputs():
    """Every block holds 6 * 2**k and grid points: without RHT and SR the layer is a plain fp32 one."""
    g = torch.Generator().manual_seed(1)
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    x, w, dy = (grid[torch.randint(0, 8, s, generator=g)] for s in ((16, 64), (32, 64), (16, 32)))
    for t in (x, w, dy):
        t.fill_diagonal_(6.0)
        t[:, ::16] = 6.0
        t[::16] = 6.0
    got = run(x, w, torch.zeros(32), dy, config=NVFP4Recipe(rht=False, stochastic_rounding=False))
    want = (x @ w.t(), dy @ w, dy.t() @ x, dy.sum(0))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_token_order_inside_a_group_is_invisible_to_the_forward_pass():
    x, w, b, dy = data(16)
    order = torch.randperm(16)
    recipe = NVFP4Recipe(rht=False, stochastic_rounding=False)
    base, moved = run(x, w, b, dy, config=recipe), run(x[order], w, b, dy[order], config=recipe)
    assert torch.equal(base[0][order], moved[0])
    assert torch.equal(base[1][order], moved[1])
    torch.testing.assert_close(base[2], moved[2], rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing():
    x, w, b, dy = data(41)
    padded = [nn.functional.pad(t, (0, 0, 0, 7)) for t in (x, dy)]
    recipe = NVFP4Recipe(stochastic_rounding=False)
    base, wide = run(x, w, b, dy, config=recipe), run(padded[0], w, b, padded[1], config=recipe)
    assert torch.equal(base[0], wide[0][:41])
    assert torch.equal(base[1], wide[1][:41])
    assert torch.equal(base[2], wide[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    x, w, b, dy = data(dtype=dtype)
    y, dx, dw, db = run(x, w, b, dy)
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (dtype, dtype, torch.float32, torch.float32)
    assert torch.equal(dx.bfloat16(), run(x.float(), w, b, dy.float())[1].to(dtype).bfloat16())


def test_autocast_sets_the_output_dtype_and_nothing_else():
    x, w, b, dy = data()
    plain = run(x, w, b, dy)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, w.requires_grad_(), b, backend="torch")
        assert torch.equal(y, plain[0].bfloat16())
    y.backward(dy.bfloat16())
    assert x.grad.dtype == torch.float32
    assert w.grad.dtype == torch.float32


def test_leading_dimensions_and_no_tokens():
    x, w, b, _ = data()
    assert torch.equal(linear(x.view(4, 12, K), w, b).view(M, N), linear(x, w, b))
    empty = torch.zeros(0, K, requires_grad=True)
    w = w.requires_grad_()
    linear(empty, w, b).sum().backward()
    assert empty.grad.shape == (0, K)
    assert w.grad.count_nonzero() == 0


def saved_bytes(function):
    total = []

    def see(t):
        total.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
        out = function()
    return sum(total), out


@pytest.mark.parametrize("m", [512, 500])
def test_one_packed_copy_is_all_that_is_kept(m):
    layer = NVFP4Linear.convert(nn.Linear(256, 128))
    x = torch.randn(m, 256, requires_grad=True)
    total, _ = saved_bytes(lambda: layer(x))
    assert total <= 0.5625 * (m + 15) * 256 + 4 * 256 * 128 + 4 * (256 + 128)
    plain, _ = saved_bytes(lambda: nn.functional.linear(x, layer.weight, layer.bias))
    assert plain >= 4 * m * 256


def test_frozen_weight_keeps_no_activation_and_no_grad_keeps_nothing():
    layer = NVFP4Linear.convert(nn.Linear(K, N)).requires_grad_(False)
    x = torch.randn(M, K, requires_grad=True)
    total, y = saved_bytes(lambda: layer(x))
    assert total == 4 * K * N
    y.sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    with torch.no_grad():
        assert saved_bytes(lambda: layer(x))[0] == 0


def test_differentiable_once():
    x, w, b, _ = data()
    w.requires_grad_()
    (grad,) = torch.autograd.grad(linear(x, w, b).sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="NVFP4Linear is differentiable once"):
        grad.sum().backward()
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda t: linear(x, t, b), (w,), (w,))


def test_activation_checkpointing_is_bitwise_neutral():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(K, 64), nn.GELU(), nn.Linear(64, 32))
    for i in (0, 2):
        NVFP4Linear.convert(net[i], Session(epoch=0), layer_id=i)
    x = torch.randn(M, K, requires_grad=True)

    def grads(function):
        net.zero_grad()
        x.grad = None
        function(x).square().sum().backward()
        return [x.grad] + [p.grad for p in net.parameters()]

    plain = grads(net)
    for reentrant in (False, True):
        again = grads(lambda t, r=reentrant: checkpoint(net, t, use_reentrant=r))
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_weight_cache_follows_every_kind_of_update():
    session = Session(epoch=0)
    layer = NVFP4Linear.convert(nn.Linear(K, N), session)
    x = torch.randn(M, K)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2.0)  # visible in _version
    assert not torch.equal(layer(x), before)
    raw = layer.weight.detach().numpy()  # as an optimizer that writes through pointers
    raw *= 0.25
    version = layer.weight._version
    stale = layer(x)
    session.epoch += 1
    fresh = layer(x)
    assert layer.weight._version == version
    assert not torch.equal(stale, fresh)
    uncached = NVFP4Linear.convert(copy.deepcopy(layer), Session())
    assert torch.equal(uncached(x), fresh)
    raw *= 3.0
    layer.eval()
    assert not torch.equal(layer(x), fresh), "callbacks may swap weights in for validation"


def test_weight_cache_changes_no_bit():
    x, w, b, dy = data()
    for recipe in (NVFP4Recipe(), NVFP4Recipe(weight_2d=False)):
        layers = [NVFP4Linear.convert(nn.Linear(K, N), Session(recipe=recipe, epoch=e)) for e in (None, 0)]
        out = []
        for layer in layers:
            layer.load_state_dict({"weight": w, "bias": b})
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.backward(dy)
            out.append((y, leaf.grad, layer.weight.grad))
        assert all(torch.equal(p, q) for p, q in zip(*out, strict=True))


FAULTS = """
import resource, torch
from torch import nn
from lightning_grad.nvfp4 import NVFP4Linear
layer = NVFP4Linear.convert(nn.Linear(16, 16))
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    temporaries = [torch.zeros(100_000) for _ in range(100)]
    del temporaries
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another one")
def test_freed_memory_stays_with_a_process_of_small_tensors():
    """40 MB of temporaries are 9,800 pages, faulted in again if glibc gave them back."""
    environment = {key: value for key, value in os.environ.items() if "MALLOC" not in key and key != "LD_PRELOAD"}
    result = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=Path(__file__).parents[2], env=environment | {"PYTHONPATH": "."},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert int(result.stdout) < 1000


def test_conversion_is_a_class_swap():
    layer = nn.Linear(K, N)
    weight, keys = layer.weight, list(layer.state_dict())
    layer.register_forward_hook(lambda *_: None)
    NVFP4Linear.convert(layer)
    assert layer.weight is weight
    assert list(layer.state_dict()) == keys
    assert len(layer._forward_hooks) == 1
    clone = pickle.loads(pickle.dumps(copy.deepcopy(NVFP4Linear.convert(nn.Linear(K, N)))))
    assert type(clone) is NVFP4Linear
    layer.revert()
    assert type(layer) is nn.Linear
    assert "_nvfp4" not in layer.__dict__
    with pytest.raises(ValueError, match="in_features=20"):
        NVFP4Linear.convert(nn.Linear(20, 16))


def test_refusals():
    layer = NVFP4Linear.convert(nn.Linear(K, N))
    with pytest.raises(TypeError, match="int64"):
        layer(torch.zeros(2, K, dtype=torch.int64))
    with pytest.raises(ValueError, match="multiple of 16"):
        linear(torch.zeros(2, 24), torch.zeros(16, 24))
    for shapes in (((2, K), (N, 16)), ((2, K), (K,)), ((), (N, K))):
        with pytest.raises(ValueError, match=r"must end in the K of `weight` \[N, K\]"):
            linear(*map(torch.zeros, shapes))
    with pytest.raises(ValueError, match=rf"`bias` must have shape \({N},\), got \(1,\)"):
        linear(torch.zeros(2, K), torch.zeros(N, K), torch.zeros(1))
    with pytest.raises(ValueError, match=f"must end in in_features={K}"):
        layer(torch.zeros(2, N))
    with pytest.raises(ValueError, match=r"`counters`.*4294967296"):
        linear(torch.zeros(2, K), torch.zeros(N, K), layer_id=2**31)
    with pytest.raises(ValueError, match="`mode`"):
        NVFP4Recipe(mode="fp8")
    with pytest.raises(RuntimeError, match=r"cannot run: .*It needs a GPU of compute capability 10\.x"):
        linear(torch.zeros(2, K), torch.zeros(N, K), backend="transformer_engine")


def test_modes():
    x, w, b, dy = data()
    session = Session()
    layer = NVFP4Linear.convert(nn.Linear(K, N), session)
    layer.load_state_dict({"weight": w, "bias": b})
    plain = nn.functional.linear(x, w, b)
    nvfp4 = run(x, w, b, dy, step=1)
    session.mode = "bf16"
    assert torch.equal(layer(x), plain)
    session.mode = "bf16_forward"
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    assert torch.equal(y, plain)
    y.backward(dy)
    assert torch.equal(leaf.grad, nvfp4[1])
    assert torch.equal(layer.weight.grad, nvfp4[2])
    session.mode, session.eval_precision = "nvfp4", "high"
    assert not torch.equal(layer(x), plain)
    assert torch.equal(layer.eval()(x), plain)


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="torch < 2.9 has no such setting")
def test_the_precision_of_other_products_is_left_alone(monkeypatch):
    """Two threads inside, one of which raises: the setting lasts until the last has left, then is the user's again."""
    monkeypatch.setattr(exact_products, "TILES", True)
    setting = torch.backends.mkldnn.matmul
    default = setting.fp32_precision
    for users in ("ieee", default):
        setting.fp32_precision = users
        with exact_products.exact_products():
            with pytest.raises(ZeroDivisionError), exact_products.exact_products():
                raise ZeroDivisionError
            assert setting.fp32_precision == "bf16"
        assert setting.fp32_precision == users


@pytest.mark.parametrize("name", RECIPES)
def test_chunks_do_not_show(monkeypatch, name):
    """Tensors of every form are larger than a chunk; the last chunk is a short one."""
    x, w, b, dy = data(41)
    whole = run(x, w, b, dy, config=RECIPES[name])
    pack, calls = torch_backend.pack_blocks, []
    monkeypatch.setattr(torch_backend, "CHUNK", 1100)
    monkeypatch.setattr(torch_backend, "pack_blocks", lambda *parts: (calls.append(parts[0].shape[0]), pack(*parts))[1])
    for got, want in zip(run(x, w, b, dy, config=RECIPES[name]), whole, strict=True):
        assert torch.equal(got, want)
    assert calls == [1, 1, 1]  # groups of 16 rows and 64 columns
