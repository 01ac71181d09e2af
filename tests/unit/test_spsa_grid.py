"""The exact grid (oracle 2) and the digests."""

import hashlib

import numpy as np
import pytest
import torch

from lightning_grad.spsa import digest64, eps_exponent, fingerprint, snap_
from lightning_grad.spsa.grid import ChunkSnap

EPS_LOG2 = [-6, -10, -14]


def awkward_values(dtype=torch.float32):
    """Log-uniform magnitudes, and the neighbours of every power of two."""
    generator = torch.Generator().manual_seed(1)
    exponents = torch.rand(200_000, generator=generator, dtype=torch.float64) * 50 - 40
    random = torch.exp2(exponents) * (torch.rand(200_000, generator=generator).double() + 1)
    powers = torch.exp2(torch.arange(-40, 8, dtype=torch.float64)).to(dtype)
    near = torch.cat([powers, torch.nextafter(powers, powers * 2), torch.nextafter(powers, powers * 0)])
    values = torch.cat([random.to(dtype), near, torch.zeros(2, dtype=dtype)])
    return torch.cat([values, -values])


@pytest.mark.parametrize("eps_log2", EPS_LOG2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_snap_is_idempotent_and_moves_return_the_same_bits(eps_log2, dtype):
    eps = 2.0**eps_log2
    limit = eps * (2.0**22 if dtype == torch.float32 else 2.0**51)
    y = awkward_values(dtype)
    y = y[y.abs() < limit]
    x = snap_(y.clone(), eps)
    x = x[x.abs() < limit]  # rounding may reach the limit itself
    assert torch.equal(snap_(x.clone(), eps), x)
    generator = torch.Generator().manual_seed(2)
    z, w = (torch.randint(0, 2, x.shape, generator=generator).to(dtype) * 2 - 1 for _ in range(2))
    there = x + eps * z
    assert torch.equal(there - eps * z, x)
    minus = there - 2 * eps * z
    assert torch.equal(minus + eps * z, x)
    assert torch.equal(minus + eps * (z + w) - eps * w, x)  # the combined move to the next direction


def test_without_the_grid_moves_do_not_return():
    """The twin that must fail: otherwise the test above would prove nothing."""
    y = awkward_values()
    eps = 2.0**-10
    assert ((y + eps) - eps != y).float().mean() > 0.3


@pytest.mark.parametrize("eps_log2", EPS_LOG2)
def test_snap_error_is_within_the_stated_bound(eps_log2):
    eps = 2.0**eps_log2
    y = awkward_values()
    error = (snap_(y.clone(), eps).double() - y.double()).abs()
    assert (error <= 2.0**-23 * torch.maximum(y.double().abs(), torch.tensor(eps, dtype=torch.float64))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_chunk_snap_gives_the_same_bits(dtype):
    y = awkward_values(dtype)
    for eps in (2.0**-20, 2.0**-10, 2.0**-2):
        z = y.clone().numpy()
        ChunkSnap(eps)(z)
        assert z.tobytes() == snap_(y.clone(), eps).numpy().tobytes()


def test_eps_is_rounded_to_a_power_of_two():
    assert eps_exponent(1e-3) == -10
    assert eps_exponent(1e-2) == -7
    assert eps_exponent(0.1) == -3
    for bad in (0.0, -1.0, float("nan"), float("inf"), 1.0, 1e-9):
        with pytest.raises(ValueError, match="`eps` must"):
            eps_exponent(bad)


def digest_by_definition(arrays):
    total, start = 0, 0
    for array in arrays:
        flat = np.ascontiguousarray(array).reshape(-1)
        bits = flat.view(np.uint32 if flat.dtype == np.float32 else np.uint64)
        total += sum((2 * (start + i) + 1) * int(u) for i, u in enumerate(bits))
        start += -(-flat.size // 256) * 256
    return total % 2**64


def test_digest_equals_its_definition_and_ignores_strides():
    a = torch.randn(3, 7, 5, 2)
    b = torch.randn(257, dtype=torch.float64)
    c = torch.tensor(-1.5)
    want = digest_by_definition([t.numpy() for t in (a, b, c)])
    assert digest64([a, b, c]) == want
    assert digest64([a.to(memory_format=torch.channels_last), b, c]) == want


def test_every_flipped_bit_changes_the_digest():
    values = torch.randn(300)
    before = digest64([values])
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        index, bit = (
            int(torch.randint(300, (1,), generator=generator)),
            int(torch.randint(32, (1,), generator=generator)),
        )
        other = values.numpy().copy()
        other.view(np.uint32)[index] ^= np.uint32(1 << bit)
        assert digest64([torch.from_numpy(other)]) != before


def test_fingerprint_is_the_hash_of_all_bytes():
    a, b = torch.randn(40, 3), torch.randn(7, dtype=torch.float64)
    want = hashlib.sha256(a.numpy().tobytes() + b.numpy().tobytes()).hexdigest()
    assert fingerprint([a, b]) == want
    assert fingerprint([a.bfloat16()]) == fingerprint([a.bfloat16().float()])
