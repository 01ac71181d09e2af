"""Learning-rate factors against their closed forms and simulated spectra."""

import itertools
import math

import pytest
import torch

from lightning_grad.allocation.batch_lr import (
    RULES,
    effective_batch,
    lr_factor,
    lr_gain,
    regime_adaptation,
    rmt_top_eigenvalue,
)
from lightning_grad.statistics.curvature import rademacher
from lightning_grad.statistics.curvature_lanczos import lanczos


@pytest.mark.parametrize(
    ("b0", "b", "expected"), [(1, 2, 1.909), (1, 8, 6.0), (8, 64, 2.667), (64, 1024, 1.287), (1024, 64, 0.777)]
)
def test_gain(b0, b, expected):
    assert lr_gain(b, b0, 20.0) == pytest.approx(expected, abs=5e-4)
    assert lr_factor("gain", b, b0, 20.0) == lr_gain(b, b0, 20.0)
    sigma2, mu2 = 20.0 * 0.3, 0.3  # AdaScale's form
    assert lr_gain(b, b0, 20.0) == pytest.approx((sigma2 / b0 + mu2) / (sigma2 / b + mu2))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_one_at_the_reference_and_monotone(rule):
    factors = [lr_factor(rule, b, 8, 20.0) for b in range(1, 200)]
    assert factors[7] == pytest.approx(1.0)
    rising = all(x <= y + 1e-12 for x, y in itertools.pairwise(factors))
    assert rising == (rule != "surge")


def test_surge_peaks_at_the_critical_batch():
    factors = {b: lr_factor("surge", b, 8, 20.0) for b in range(1, 200)}
    assert max(factors, key=factors.get) == 20


def test_simple_rules():
    assert lr_factor("linear", 32, 8) == 4
    assert lr_factor("sqrt", 32, 8) == 2
    assert lr_factor("power", 32, 8, exponent=0.25) == pytest.approx(math.sqrt(2))
    assert lr_factor("none", 32, 8) == 1
    assert lr_factor("sqrt_gain", 32, 8, 20.0) == pytest.approx(math.sqrt(lr_gain(32, 8, 20.0)))
    with pytest.raises(ValueError, match="rule='gain' needs `critical_batch`"):
        lr_factor("gain", 2, 1)
    with pytest.raises(ValueError, match="`rule` must be one of"):
        lr_factor("cubic", 2, 1)


@pytest.mark.parametrize(("b", "theory"), [(25, 4.0), (50, 2.828), (100, 2.0), (200, 1.5), (400, 1.25), (1600, 1.0625)])
def test_wigner_closed_form(b, theory):
    assert rmt_top_eigenvalue(b, 1.0, model="wigner", total_variance=100.0) == pytest.approx(theory, abs=5e-4)
    bc = 100.0
    factor = lr_factor("wigner", b, 100, bc)
    tops = [rmt_top_eigenvalue(x, 1.0, model="wigner", total_variance=100.0) for x in (100, b)]
    assert factor == pytest.approx(tops[0] / tops[1])  # the factor is the ratio of the largest stable steps


def top_eigenvalue(matvec, size):
    """To 1e-3: thirty products."""
    return float(lanczos(matvec, rademacher(size, 0, dtype=torch.float64), 30).ritz()[0][-1])


@pytest.mark.parametrize("b", [25, 100, 400, 1600])
def test_wigner_simulation(b):
    gen = torch.Generator().manual_seed(0)
    size, variance = 800, 100.0
    tops = []
    for _ in range(5):
        noise = torch.randn(size, size, generator=gen, dtype=torch.float64) * math.sqrt(variance / size / b)
        matrix = noise.triu() + noise.triu(1).T
        matrix[0, 0] += 1.0
        tops.append(top_eigenvalue(lambda v, m=matrix: m @ v, size))
    expected = rmt_top_eigenvalue(b, 1.0, model="wigner", total_variance=variance)
    assert sum(tops) / 5 == pytest.approx(expected, rel=0.01)


def test_wishart_closed_form_and_simulation():
    assert rmt_top_eigenvalue(10, 1.0, bulk=0.01, num_params=2000) == pytest.approx(3.02, abs=5e-3)
    assert rmt_top_eigenvalue(100, 1.0, bulk=0.01, num_params=2000) == pytest.approx(1.202, abs=5e-4)
    assert rmt_top_eigenvalue(1000, 1.0, bulk=0.01, num_params=2000) == pytest.approx(1.0202, abs=5e-5)
    gen = torch.Generator().manual_seed(0)
    tops = []
    for _ in range(10):
        a = torch.randn(1000, 500, generator=gen, dtype=torch.float64) * 0.1
        a[:, 0] *= 10
        tops.append(top_eigenvalue(lambda v, a=a: a.T @ (a @ v) / 1000, 500))
    expected = rmt_top_eigenvalue(1000, 1.0, bulk=0.01, num_params=500)
    assert sum(tops) / 10 == pytest.approx(expected, rel=0.03)  # the spike's own spread: sqrt(2/1000/10) = 0.014


def test_arguments_of_the_models():
    with pytest.raises(ValueError, match="total_variance"):
        rmt_top_eigenvalue(1, 1.0, model="wigner")
    with pytest.raises(ValueError, match="`bulk` and `num_params`"):
        rmt_top_eigenvalue(1, 1.0)
    assert effective_batch(50, 100) == 100
    assert effective_batch(100, 100) == math.inf


def test_regime_adaptation_keeps_the_number_of_updates():
    milestones, epochs, factor = regime_adaptation([80, 120], 160, b=4096, b0=128)
    assert (milestones, epochs) == ([2560, 3840], 5120)
    assert factor == pytest.approx(math.sqrt(32))
    assert regime_adaptation([10], 20, b=129, b0=128)[1] == 40

    def updates(epochs, batch):  # with the last, smaller batch of each epoch
        return epochs * math.ceil(50_000 / batch)

    for b in (129, 256, 1000, 4096, 20_000):
        (first, second), epochs, _ = regime_adaptation([80, 120], 160, b, 128)
        for new, old in ((first, 80), (second, 120), (epochs, 160)):
            assert updates(new, b) >= updates(old, 128)
    assert updates(5120, 4096) == pytest.approx(updates(160, 128), rel=0.07)  # the last batches; else equal
    for name, bad in {"b": 0, "b0": 0, "max_epochs": 0, "milestones": [-1]}.items():
        with pytest.raises(ValueError, match=f"`{name}`"):
            regime_adaptation(**{"milestones": [1], "max_epochs": 2, "b": 2, "b0": 1, name: bad})
