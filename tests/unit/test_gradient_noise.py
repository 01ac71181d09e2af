"""Gradient statistics against closed forms, invariants and autograd."""

import math

import pytest
import torch
from torch import nn

from lightning_grad.statistics.gradient_noise import GradStats, LeafGradients, squared_norms

# linear regression with Gaussian inputs: every population quantity in closed form
LAMBDA = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25, 0.125], dtype=torch.float64)
DELTA = torch.tensor([0.3, -0.2, 0.5, 0.4, -0.6, 0.8], dtype=torch.float64)
NOISE = 0.49
G = LAMBDA * DELTA
Q = float(DELTA @ (LAMBDA * DELTA) + NOISE)
TRACE = Q * float(LAMBDA.sum()) + float(G @ G)
INNER = Q * float(G @ (LAMBDA * G)) + float(G @ G) ** 2


def regression_grads(batches: int, b: int, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(batches, b, 6, generator=gen, dtype=torch.float64) * LAMBDA.sqrt()
    e = torch.randn(batches, b, generator=gen, dtype=torch.float64) * math.sqrt(NOISE)
    return x * (x @ DELTA + e)[..., None]


def test_closed_form_constants():
    assert float(G @ G) == pytest.approx(1.9225)
    assert pytest.approx(13.18375) == TRACE
    assert pytest.approx(12.7863375) == INNER
    assert TRACE / float(G @ G) == pytest.approx(6.857607, abs=1e-6)


def assert_mean(samples: torch.Tensor, expected: float, sigmas: float = 5.0) -> None:
    """At 5 sigmas a correct implementation fails about once in 1.7 million runs."""
    error = samples.std().item() / math.sqrt(samples.numel())
    assert abs(samples.mean().item() - expected) <= sigmas * error


def test_estimates_are_unbiased_on_linear_regression():
    stats = [GradStats.from_samples(g) for g in regression_grads(20_000, 64)]
    assert_mean(torch.tensor([s.trace_cov for s in stats]), TRACE)
    assert_mean(torch.tensor([s.grad_sq_norm for s in stats]), float(G @ G) + TRACE / 64)
    assert_mean(torch.tensor([s.grad_sq_norm_unbiased for s in stats]), float(G @ G))
    # the twin that must fail: the biased norm is not the population's
    with pytest.raises(AssertionError):
        assert_mean(torch.tensor([s.grad_sq_norm for s in stats]), float(G @ G))


def test_group_estimates_are_unbiased():
    grads = regression_grads(20_000, 64, seed=1).reshape(20_000, 8, 8, 6).mean(2)
    stats = [GradStats.from_groups(g, 8) for g in grads]
    assert_mean(torch.tensor([s.trace_cov for s in stats]), TRACE)
    assert_mean(torch.tensor([s.grad_sq_norm_unbiased for s in stats]), float(G @ G))


def test_variance_splits_into_inner_and_orthogonal_part():
    for seed in range(20):
        grads = regression_grads(1, 7 + seed, seed)[0]
        stats = GradStats.from_samples(grads)
        g = grads.mean(0)
        rest = grads - (grads @ g / (g @ g))[:, None] * g
        orth = float(rest.square().sum() / (len(grads) - 1))
        assert stats.orth_var == pytest.approx(orth, rel=1e-12)
        assert stats.trace_cov == pytest.approx(stats.inner_var / float(g @ g) + orth, rel=1e-12)


def test_groups_of_one_are_samples_and_two_batch_sizes_agree():
    grads = regression_grads(1, 24)[0]
    one, samples = GradStats.from_groups(grads, 1), GradStats.from_samples(grads)
    assert one == samples
    groups = grads.reshape(6, 4, 6).mean(1)
    stats = GradStats.from_groups(groups, 4)
    small, big = stats.mean_sq_norm, stats.grad_sq_norm
    assert stats.trace_cov == pytest.approx((small - big) / (1 / 4 - 1 / 24), rel=1e-12)
    assert stats.grad_sq_norm_unbiased == pytest.approx((24 * big - 4 * small) / 20, rel=1e-12)


def test_blocks_sum_to_the_whole_and_do_not_change_it():
    grads = regression_grads(1, 16)[0]
    whole, parts = GradStats.from_samples(grads), GradStats.from_samples(grads, blocks=[1, 3, 2])
    assert float(parts.tensor_trace_cov.sum()) == pytest.approx(whole.trace_cov, rel=1e-12)
    assert float(parts.tensor_grad_sq.sum()) == pytest.approx(whole.grad_sq_norm, rel=1e-12)
    assert parts.inner_var == whole.inner_var


@pytest.mark.parametrize("times", [2, 3, 5])
def test_duplicated_batch(times):
    grads = regression_grads(1, 12)[0]
    one, many = GradStats.from_samples(grads), GradStats.from_samples(grads.repeat(times, 1))
    b = len(grads)
    assert many.grad_sq_norm == pytest.approx(one.grad_sq_norm, rel=1e-12)
    assert many.trace_cov == pytest.approx(one.trace_cov * (times * b - times) / (times * b - 1), rel=1e-12)


def test_whole_population_has_no_noise_left():
    grads = regression_grads(1, 12)[0]
    stats = GradStats.from_samples(grads, population=12)
    assert stats.mean_noise == 0.0
    assert stats.grad_sq_norm_unbiased == stats.grad_sq_norm


def test_sampling_without_replacement_has_the_stated_variance():
    gen = torch.Generator().manual_seed(5)
    everyone = regression_grads(1, 40)[0]
    draws = torch.stack([everyone[torch.randperm(40, generator=gen)[:16]] for _ in range(4000)])
    truth = float(everyone.mean(0).square().sum())
    values = torch.tensor([GradStats.from_samples(g, population=40).grad_sq_norm_unbiased for g in draws])
    assert_mean(values, truth)


def test_one_row_has_no_variance():
    with pytest.raises(ValueError, match="at least 2 rows"):
        GradStats.from_samples(torch.ones(1, 3))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 7)

    def forward(self, x):
        return self.b(self.b(torch.tanh(self.a(x))))  # one layer used twice: its hook must see the sum


def test_leaf_hooks_see_each_micro_batch_whole_and_keep_no_copies():
    net = Net().double()
    params = dict(net.named_parameters())
    leaves = LeafGradients(params)
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    each = []
    for part in x:
        loss = net(part).square().sum(1).mean()
        each.append(torch.autograd.grad(loss, list(params.values()), retain_graph=True))
    leaves.start()
    for part in x:
        (net(part).square().sum(1).mean() / 4).backward()
        leaves.next_pass()
    expected = torch.stack([torch.stack([g.square().sum() for g in grads]) for grads in each]).sum(0)
    torch.testing.assert_close(leaves.sq_norms() * 16, expected, rtol=1e-12, atol=0)
    assert all(t.numel() == 1 for norms in leaves._norms for t in norms)
    assert not leaves._kept
    full = torch.stack([torch.cat([g.reshape(-1) for g in grads]) for grads in each])
    stats = GradStats.from_groups(full, 6)
    measured = GradStats(
        4, 6, float(leaves.sq_norms().sum()) * 16 / 4, float(squared_norms([p.grad for p in net.parameters()]).sum())
    )
    assert measured.trace_cov == pytest.approx(stats.trace_cov, rel=1e-10)
    assert measured.grad_sq_norm == pytest.approx(stats.grad_sq_norm, rel=1e-12)


def test_leaf_copies_give_inner_products_and_elements():
    net = Net().double()
    params = dict(net.named_parameters())
    leaves = LeafGradients(params)
    leaves.start(copies=True, elements=True)
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    separate = [torch.autograd.grad(net(part).sum(), list(params.values())) for part in x]
    rows = [torch.cat([g.reshape(-1) for g in grads]) for grads in separate]
    leaves.start(copies=True, elements=True)
    for part in x:
        net(part).sum().backward()
        leaves.next_pass()
    stacked = torch.stack(rows)
    direction = [p.grad for p in net.parameters()]
    flat = torch.cat([g.reshape(-1) for g in direction])
    torch.testing.assert_close(leaves.inner_products(direction), stacked @ flat, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(leaves.element_squares(), stacked.square().sum(0), rtol=1e-12, atol=1e-12)


def test_inactive_hooks_do_nothing_and_can_be_removed():
    net = Net()
    leaves = LeafGradients(dict(net.named_parameters()))
    net(torch.randn(2, 5)).sum().backward()
    assert leaves.sq_norms().sum() == 0
    leaves.start()
    leaves.remove()
    net(torch.randn(2, 5)).sum().backward()
    assert leaves.sq_norms().sum() == 0
