"""The engine: exact moves, kernels equal bit by bit, storages (oracles 8, 17, 19, part of 15)."""

import random

import numpy as np
import pytest
import torch

from lightning_grad.nvfp4 import NVFP4Linear
from lightning_grad.nvfp4.linear import Session
from lightning_grad.spsa import SPSAConfigError, SPSAEngine, digest64, fingerprint, rademacher, snap_
from lightning_grad.spsa.engine import _choose_kernel
from lightning_grad.spsa.kernels import TorchKernel, make_kernel, self_test

SHAPES = [(3, 70), (1,), (), (2, 5, 3, 4), (70_001,)]


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    values[3] = values[3].to(memory_format=torch.channels_last)
    return [(f"p{i}", torch.nn.Parameter(v)) for i, v in enumerate(values)]


def engine(named=None, **kwargs):
    kwargs = {"seed": 42, "eps_log2": -10, **kwargs}
    return SPSAEngine(named if named is not None else parameters(), **kwargs)


def signs(named, step, direction, seed=42):
    """Signs of each parameter, from the public function and the definition of the virtual index."""
    out, start = [], 0
    for _, p in named:
        out.append(rademacher(seed, step, direction, p.numel(), start=start).view(p.shape))
        start += -(-p.numel() // 256) * 256
    return out


def test_perturbation_is_the_shared_signs_in_logical_order():
    named = parameters()
    e = engine(named)
    before = [p.detach().clone() for _, p in named]
    e.perturb([(3, 1, 1)])
    for (_, p), old, z in zip(named, before, signs(named, 3, 1), strict=True):
        assert torch.equal(p.detach(), old + 2.0**-10 * z)


@pytest.mark.parametrize("restore", ["exact", "copy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_any_path_of_moves_returns_to_the_same_bits(dtype, restore):
    named = parameters(dtype)
    e = engine(named, restore=restore)
    base = digest64([p for _, p in named])
    exact = e.digest64()
    for t in range(4):
        e.perturb([(t, 0, 1)])
        e.perturb([(t, 0, -2)])
        e.perturb([(t, 0, 1), (t, 1, 1)])
        e.perturb([(t, 1, -2)])
        e.restore()
        assert digest64([p for _, p in named]) == base
        assert e.digest64() == exact


def test_one_direction_at_a_time():
    e = engine()
    e.perturb([(0, 0, 1)])
    with pytest.raises(ValueError, match="one direction at a time"):
        e.perturb([(0, 1, 1)])
    assert e.state == {(0, 0): 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_update_is_one_rounding_of_the_exact_sum(dtype):
    named = parameters(dtype)
    e = engine(named)
    before = [p.detach().clone() for _, p in named]
    terms = [(2, d, (d + 1) * 2.0**-9) for d in range(5)]  # already integers times a power of two
    e.perturb([(9, 9, -1)])
    assert e.apply(terms, restore_direction=(9, 9))
    assert e.state == {}
    total = [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    for t, d, c in terms:
        for s, z in zip(total, signs(named, t, d), strict=True):
            s += c * z
    for (_, p), old, s in zip(named, before, total, strict=True):
        want = (old.double() - s).to(dtype) if dtype == torch.float32 else old - s
        assert torch.equal(p.detach(), snap_(want.contiguous(), 2.0**-10))


def test_order_of_terms_and_of_accumulation_does_not_matter():
    generator = random.Random(0)
    terms = [(t, d, generator.gauss(0, 1e-3)) for t in range(3) for d in range(20)]
    digests = set()
    for _ in range(3):
        e = engine()
        generator.shuffle(terms)
        e.apply(terms)
        digests.add(e.digest64())
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_kernels_agree_bit_by_bit(name, dtype, monkeypatch):
    if name == "triton":
        if torch.cuda.is_available():
            pytest.skip("the interpreter is for machines without a GPU; the GPU has a test of its own")
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert steps_of(name, dtype) == steps_of("numpy", dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_gpu_gives_the_bits_of_the_cpu(name, dtype):
    assert steps_of(name, dtype, "cuda") == steps_of("numpy", dtype)


def steps_of(kernel, dtype, device="cpu"):
    """Digests along moves and updates."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(3, 70), (1,), (2, 5, 3, 4), (1500,)]
    values = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    named = [(str(i), torch.nn.Parameter(v.to(device))) for i, v in enumerate(values)]
    e = engine(named, seed=2**64 - 3, kernel=kernel)
    steps = [e.digest64()]
    for t in range(3):
        e.perturb([(t, 2**40, 1)])
        steps.append(digest64(e.params))
        e.perturb([(t, 2**40, -2)])
        e.apply([(t, d, 1e-3 * (d - 1.3)) for d in range(3)])
        steps.append(e.digest64())
    return steps


@pytest.mark.parametrize("outstanding", [1, -1])
@pytest.mark.parametrize("terms", [[(0, 7, 3e-3)], [(0, 8, 3e-3)], [(0, 7, 3e-3), (0, 8, 1e-3)]], ids=str)
def test_restoring_and_updating_in_one_pass_equals_two(outstanding, terms):
    start = torch.randn(300_000, generator=torch.Generator().manual_seed(1)) * 0.02
    one, two = (engine([("p", torch.nn.Parameter(start.clone()))]) for _ in range(2))
    for e in (one, two):
        e.perturb([(0, 7, outstanding)])
    two.restore()
    for e in (one, two):
        e.apply(terms)
    assert torch.equal(one.params[0], two.params[0])


def test_threads_do_not_change_the_bits():
    torch.set_num_threads(3)
    try:
        digests = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            generator = torch.Generator().manual_seed(3)
            p = torch.nn.Parameter(torch.randn(900_001, generator=generator))
            e = engine([("p", p)])
            e.perturb([(0, 0, 1)])
            e.apply([(0, d, 1e-3) for d in range(3)])
            digests.append(e.digest64())
        assert digests[0] == digests[1]
    finally:
        torch.set_num_threads(1)


def test_self_test_catches_a_kernel_that_is_wrong_in_one_bit(monkeypatch):
    assert self_test(make_kernel("torch"), torch.device("cpu"))

    class Wrong(TorchKernel):
        def run(self, layout, stores, work, start, stop):
            super().run(layout, stores, work, start, stop)
            bits = stores[0].flat.view(torch.int32)
            bits[1234] ^= 2

    assert not self_test(Wrong(), torch.device("cpu"))
    monkeypatch.setattr("lightning_grad.spsa.engine.make_kernel", lambda name: Wrong())
    with pytest.raises(SPSAConfigError, match='`kernel="torch"` gives wrong bits'):
        _choose_kernel("torch", torch.device("cpu"))


def test_bfloat16_split_equals_a_float32_run_from_the_same_values():
    """Oracle 19: the logical value of a split parameter is a float32."""
    small = parameters(torch.bfloat16)
    wide = [(n, torch.nn.Parameter(p.detach().float())) for n, p in small]
    a, b = engine(small), engine(wide)
    assert a.base == b.base
    for t in range(30):
        a.perturb([(t, 0, 1)])
        a.apply([(t, d, 1e-4 * (d + 1)) for d in range(3)])
        b.apply([(t, d, 1e-4 * (d + 1)) for d in range(3)])
        assert a.digest64() == b.digest64()
    for (_, p), (_, q) in zip(small, wide, strict=True):
        bits = q.detach().contiguous().view(torch.int32)
        half_up = ((bits + 0x8000) >> 16).to(torch.int16)
        assert torch.equal(p.detach().contiguous().view(torch.int16), half_up)


def test_bfloat16_low_half_survives_ties():
    """A low half of exactly 0x8000: nearest-even would need +32768, which is no int16."""
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, -0x407F8000], dtype=torch.int32)
    e = engine([("p", torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)))])
    store = e.stores[0]
    store.open()
    store.save(0, 4, bits.view(torch.float32))
    assert torch.equal(store.load(0, 4, True).view(torch.int32), bits)
    store.close()


def test_extra_state_carries_what_the_parameters_lose():
    for restore in ("exact", "copy"):
        a = engine(parameters(torch.bfloat16), restore=restore)
        a.apply([(0, 0, 1e-4)])
        b = engine(parameters(torch.bfloat16, seed=9), restore=restore)
        for p, q in zip(a.params, b.params, strict=True):
            q.data.copy_(p.data)
        b.load_extra_state(a.extra_state())
        assert a.digest64() == b.digest64()
    assert engine().extra_state() == {}


def test_base_is_taken_before_the_grid():
    named = parameters()
    values = [p.detach().clone() for _, p in named]
    e = engine(named)
    assert e.base == fingerprint(values) != e.fingerprint()


def test_replaced_parameters_are_followed():
    module = torch.nn.Linear(20, 20)
    e = SPSAEngine(module.named_parameters(), seed=0, eps_log2=-10)
    module.weight.data = module.weight.data.clone()
    e.perturb([(0, 0, 1)])
    e.restore()
    module.weight = torch.nn.Parameter(module.weight.detach().clone())
    assert e.rebind(module.named_parameters())
    assert not e.rebind(module.named_parameters())
    before = module.weight.detach().clone()
    e.perturb([(0, 0, 1)])
    assert not torch.equal(module.weight.detach(), before)


def test_drift_of_the_usual_way_is_what_the_grid_avoids():
    """The reference adds and subtracts Gaussian steps; after 100 rounds most weights differ. Ours: none."""
    values = torch.randn(2000) * 0.02
    moved = values.clone()
    for t in range(100):
        z = torch.randn(2000, generator=torch.Generator().manual_seed(t))
        moved = ((moved + 2.0**-10 * z) - 2 * 2.0**-10 * z) + 2.0**-10 * z
    assert (moved != values).float().mean() > 0.5
    e = engine([("p", torch.nn.Parameter(values.clone()))])
    start = e.params[0].detach().clone()
    for t in range(100):
        for move in (1, -2, 1):
            e.perturb([(t, 0, move)])
    assert torch.equal(e.params[0].detach(), start)


@pytest.mark.parametrize(
    ("named", "text"),
    [
        ([("h", torch.nn.Parameter(torch.ones(2, dtype=torch.float16)))], "`h` of dtype torch.float16"),
        ([("c", torch.nn.Parameter(torch.ones(2, dtype=torch.complex64)))], "`c` of dtype torch.complex64"),
        ([("m", torch.nn.Parameter(torch.ones(2, device="meta")))], "`m`: it is meta"),
        ([("f", torch.nn.Parameter(torch.ones(2), requires_grad=False))], "no trainable parameter.*f"),
        ([], "no trainable parameter"),
        ([("big", torch.nn.Parameter(torch.tensor([1.2e4])))], "parameter big holds 1.2e"),
        ([("nan", torch.nn.Parameter(torch.tensor([float("nan")])))], "parameter nan holds nan"),
    ],
)
def test_parameters_that_cannot_work_are_refused(named, text):
    with pytest.raises(SPSAConfigError, match=text):
        engine(named)


def test_too_large_parameter_names_an_eps_that_works():
    p = torch.nn.Parameter(torch.tensor([1.2e4]))
    with pytest.raises(SPSAConfigError, match=r"use eps >= 0.00391"):
        engine([("big", p)])
    engine([("big", p)], eps_log2=-8)


def test_tied_parameters_count_once_and_compile_prefix_is_dropped():
    p = torch.nn.Parameter(torch.ones(5))
    e = engine([("_orig_mod.a", p), ("b", p)])
    assert e.names == ["a"]
    assert e.layout.numel == 5


def test_overflow_leaves_the_exact_point():
    e = engine()
    before = e.digest64()
    e.perturb([(0, 0, 1)])
    with pytest.raises(OverflowError):
        e.apply([(0, 0, float("inf"))])
    assert (e.state, e.digest64()) == ({}, before)


def test_exact_state_is_the_logical_values():
    e = engine()
    state = e.exact_state()
    assert np.array_equal(state["p0"].numpy(), e.params[0].detach().reshape(-1).numpy())


@pytest.mark.parametrize("restore", ["exact", "copy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moves_are_seen_by_caches_of_weights(restore, dtype):
    """NVFP4 layers keep a packed weight as long as its version stays; numpy changes weights behind autograd's back."""
    layer = NVFP4Linear.convert(torch.nn.Linear(32, 32, bias=False, dtype=dtype), Session(backend="torch", epoch=0))
    engine = SPSAEngine(layer.named_parameters(), seed=1, eps_log2=-4, restore=restore)
    x = torch.randn(16, 32, dtype=dtype)
    with torch.no_grad():
        losses = [float(layer(x).float().square().sum())]
        for sign in (1, -1):
            engine.perturb([(0, 0, sign)])
            losses.append(float(layer(x).float().square().sum()))
            engine.restore()
    assert len(set(losses)) == 3
