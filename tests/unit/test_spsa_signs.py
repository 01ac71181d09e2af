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


SIGNS = 1 << 20


def bits(seed, step, direction):
    """The direction's signs as bits. That they are those of `rademacher` is tested above, and once more here."""
    return SignStream(seed, step, direction).take(SIGNS)


def score(rows):
    """Sum of the 2**20 signs that the bytes stand for, in standard deviations."""
    return (2 * int(np.unpackbits(np.ascontiguousarray(rows).view(np.uint8)).sum()) - SIGNS) / SIGNS**0.5


# 400 scores a seed, as specified: mean within 0.2 = 4 sigma, standard deviation within 0.14 = 4 sigma. (Within 0.1 =
# 2.8 sigma, one right seed in 200 fails: 11 gives 0.897.) All 20 seeds: mean and deviation within 4.5 sigma. False
# alarm of a test below 3e-3 for another choice of seeds; these are fixed.
def check_scores(rows):
    scores = np.array(rows)
    assert scores.shape == (20, 400)
    assert abs(scores.mean(1)).max() < 0.2
    assert abs(scores.std(1) - 1).max() < 0.14
    assert abs(scores.mean()) < 4.5 / 8000**0.5
    assert abs(scores.std() - 1) < 4.5 / 16000**0.5


def test_scores_are_those_of_the_public_signs():
    a, b = rademacher(11, 3, 1, SIGNS), rademacher(11, 3, 2, SIGNS)
    assert score(bits(11, 3, 1)) == float(a.sum()) / SIGNS**0.5
    assert -score(bits(11, 3, 1) ^ bits(11, 3, 2)) == float((a * b).sum()) / SIGNS**0.5


def test_sums_of_signs_are_standard_normal():
    check_scores([[score(bits(s, t, d)) for t in range(20) for d in range(20)] for s in range(20)])


def test_products_of_directions_and_of_neighbouring_seeds_are_standard_normal():
    def products(seed):
        for t in range(20):
            rows = [bits(seed, t, d) for d in range(11)]
            yield from (a ^ b for a, b in itertools.pairwise(rows))
        yield from (bits(seed, 3, 1) ^ bits(seed ^ (1 << bit), 3, 1) for bit in range(64))
        yield from (bits(seed, t, 0) ^ bits(seed, t + 1, 0) for t in range(136))

    # different bits: the product is -1; the score of a xor b is that of the product with its sign turned
    check_scores([[-score(product) for product in products(s)] for s in range(100, 120)])
