"""The signs: known answers, a big-integer Philox, statistics with stated bounds (oracle 1)."""

import itertools

import numpy as np
import pytest
import torch

from lightning_grad.spsa import rademacher
from lightning_grad.spsa.signs import SIGN_TAG, SignStream, sign_bytes

MASK = (1 << 64) - 1


def big_integer_philox(counter, key):
    """Philox 4x64-10 in Python integers, from the paper's definition."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(p1 >> 64) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 64) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def sign_by_definition(seed, step, direction, v):
    words = big_integer_philox((v // 256 + 1, 0, step, direction), (seed, SIGN_TAG))
    r = v % 256
    return 2 * (words[r // 64] >> (r % 64) & 1) - 1


def test_oracle_gives_the_known_answers():
    assert [f"{w:016x}" for w in big_integer_philox((0, 0, 0, 0), (0, 0))] == [
        "16554d9eca36314c", "db20fe9d672d0fdc", "d7e772cee186176b", "7e68b68aec7ba23b",
    ]  # fmt: skip
    assert [f"{w:016x}" for w in big_integer_philox([MASK] * 4, (MASK, MASK))] == [
        "87b092c3013fe90b", "438c3c67be8d0224", "9cc7d7c69cd777b6", "a09caebf594f0ba0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seed", "step", "direction", "start"),
    [(0, 0, 0, 0), (7, 3, 2, 256), (2**64 - 1, 2**63 - 1, 2**63 - 1, 512), (2**40 + 1, 2**33, 2**35 + 9, 2**34)],
)
def test_signs_equal_the_definition(seed, step, direction, start):
    got = rademacher(seed, step, direction, 700, start=start)
    chosen = [0, 1, 63, 64, 65, 255, 256, 511, 512, 699]
    assert [int(got[i]) for i in chosen] == [sign_by_definition(seed, step, direction, start + i) for i in chosen]


def test_torch_bytes_equal_numpy_stream():
    for seed, step, direction, block in [(1, 2, 3, 0), (2**63 + 5, 2**40, 2**41, 2**33), (9, 0, 0, 77)]:
        stream = SignStream(seed, step, direction, block)
        want = np.concatenate([stream.take(256 * 5), stream.take(256 * 12)])
        got = sign_bytes(seed, step, direction, block, 17, torch.device("cpu"))
        assert np.array_equal(got.numpy(), want)


def test_start_is_a_window_of_the_same_stream():
    whole = rademacher(5, 1, 1, 2000)
    assert torch.equal(rademacher(5, 1, 1, 1000, start=512), whole[512:1512])
    assert set(whole.unique().tolist()) == {-1.0, 1.0}
    assert rademacher(5, 1, 1, 3, dtype=torch.int8).dtype == torch.int8
    with pytest.raises(ValueError, match="`start` must be a multiple of 256"):
        rademacher(5, 1, 1, 3, start=8)


def z_scores(pairs):
    size = 1 << 16
    return np.array([float(s.sum()) / size**0.5 for s in pairs(size)])


# 400 standard normal scores: mean within 0.2 = 4 sigma, standard deviation within 0.1 = 2.8 sigma (false alarm < 1 %,
# and the seeds are fixed)
def check_scores(scores):
    assert abs(scores.mean()) < 0.2
    assert 0.9 < scores.std() < 1.1


def test_sums_of_signs_are_standard_normal():
    check_scores(z_scores(lambda n: (rademacher(11, t, d, n) for t in range(20) for d in range(20))))


def test_products_of_directions_and_of_neighbouring_seeds_are_standard_normal():
    def products(n):
        for t in range(20):
            rows = [rademacher(11, t, d, n) for d in range(11)]
            yield from (a * b for a, b in itertools.pairwise(rows))
        for bit in range(64):
            yield rademacher(11, 3, 1, n) * rademacher(11 ^ (1 << bit), 3, 1, n)
        for t in range(136):
            yield rademacher(11, t, 0, n) * rademacher(11, t + 1, 0, n)

    check_scores(z_scores(products))
