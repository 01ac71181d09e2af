"""Philox against published known answers, a big-integer Philox and numpy's implementation."""

import numpy as np
import pytest
import torch

from lightning_grad import random as lgr

M64, M32 = (1 << 64) - 1, (1 << 32) - 1


def big_philox(counter, key, width, multipliers, increments):
    """Philox on Python integers, straight from the SC11 paper."""
    mask = (1 << width) - 1
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * multipliers[0], c2 * multipliers[1]
        c0, c1, c2, c3 = (p1 >> width) ^ c1 ^ k0, p1 & mask, (p0 >> width) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + increments[0]) & mask, (k1 + increments[1]) & mask
    return c0, c1, c2, c3


def signed(word):
    return word - (1 << 64) if word >> 63 else word


# Random123's kat_vectors file, the entries for philox4x32 10 and philox4x64 10
@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (M32, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox4x32_known_answers(word, expected):
    counter = tuple(torch.tensor([word]) for _ in range(4))
    assert tuple(int(w) for w in lgr.philox4x32(counter, word | word << 32)) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)),
        (M64, (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0)),
    ],
)
def test_philox4x64_known_answers(word, expected):
    counter = tuple(torch.tensor([signed(word)]) for _ in range(4))
    assert tuple(int(w) & M64 for w in lgr.philox4x64(counter, (word, word))) == expected
    assert tuple(int(w) for w in lgr.philox4x64_stream((word, word), (word,) * 4, 1)) == expected


def test_philox4x32_equals_big_integers():
    rng = np.random.default_rng(0)
    for _ in range(200):
        counter = [int(w) for w in rng.integers(0, 1 << 32, 4)]
        key = [int(w) for w in rng.integers(0, 1 << 32, 2)]
        want = big_philox(counter, key, 32, lgr._M32, lgr._W32)
        got = lgr.philox4x32(tuple(torch.tensor([w]) for w in counter), key[0] | key[1] << 32)
        assert tuple(int(w) for w in got) == want


def test_philox4x64_equals_big_integers():
    rng = np.random.default_rng(1)
    for _ in range(200):
        counter = [int(w) for w in rng.integers(0, 1 << 64, 4, dtype=np.uint64)]
        key = tuple(int(w) for w in rng.integers(0, 1 << 64, 2, dtype=np.uint64))
        want = big_philox(counter, key, 64, lgr._M64, lgr._W64)
        got = lgr.philox4x64((torch.tensor([signed(counter[0])]), *counter[1:]), key)
        assert tuple(int(w) & M64 for w in got) == want


def test_stream_is_consecutive_counters_and_broadcasts():
    key, first = (3, 0x4C47535053410001), (2**64 - 2, 5, 7, 11)
    stream = lgr.philox4x64_stream(key, first, 4).reshape(4, 4)
    for i in range(4):
        value = first[0] + i
        counter = (value & M64, first[1] + (value >> 64), 7, 11)
        assert tuple(int(w) for w in stream[i]) == big_philox(counter, key, 64, lgr._M64, lgr._W64)
    low = torch.arange(6)
    words = lgr.philox4x64((low, 0, 9, torch.tensor([[0], [1]])), key)
    assert all(w.shape == (2, 6) for w in words)


def test_words_are_uniform():
    # Pearson on 256 byte values, 4*4*65536 bytes; 420 is exceeded once in about 1e-9 runs at 255 degrees of freedom
    words = torch.stack(lgr.philox4x32((torch.arange(65536), 1, 2, 3), 42)).flatten()
    data = torch.stack([words >> s & 255 for s in (0, 8, 16, 24)]).flatten()
    counts = torch.bincount(data, minlength=256).double()
    expected = data.numel() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 420
