"""Allocation weights, predicted variances and estimator weights against closed forms and an enumerated policy."""

import pytest
import torch

from lightning_grad.allocation import estimators, importance
from lightning_grad.allocation import prompt_weights as pw
from lightning_grad.allocation.integer import allocate
from tests.unit.tabular import TabularPolicy


def published_sizes(rates, norms, budget, alpha, beta):
    """The rule of the published pipeline: weight, share, round, repair by the largest remainders."""
    weights = [
        g / (p + alpha / p ** (beta - 1)) ** 0.5 if p > 0 and g > 0 else 0.0 for p, g in zip(rates, norms, strict=True)
    ]
    total = sum(weights)
    shares = [budget * w / total for w in weights]
    sizes = [int(s) for s in shares]
    order = sorted(range(len(shares)), key=lambda i: (-(shares[i] - sizes[i]), i))
    for i in order[: budget - sum(sizes)]:
        sizes[i] += 1
    return sizes


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 1e-2, 0.5])
@pytest.mark.parametrize("beta", [1.0, 2.0, 3.0])
def test_published_pipeline(alpha, beta):
    gen = torch.Generator().manual_seed(int(alpha * 1000 + beta))
    for _ in range(20):
        p = torch.randint(0, 9, (30,), generator=gen).double() / 8
        norm = torch.where(p > 0, torch.rand(30, generator=gen, dtype=torch.float64) * 9, 0.0)
        weights = pw.allocation_weights(p, norm, alpha=alpha, beta=beta, zero_policy="drop")
        n = allocate(weights, 240, rounding="largest_remainder")
        assert n.tolist() == published_sizes(p.tolist(), norm.tolist(), 240, alpha, beta)


def test_limits_and_peak():
    p = torch.linspace(0.05, 1, 40, dtype=torch.float64)
    ones = torch.ones(40)
    torch.testing.assert_close(pw.allocation_weights(torch.ones(3), ones[:3], alpha=0.0), torch.ones(3).double())
    torch.testing.assert_close(pw.allocation_weights(p, ones, alpha=0.0), p.rsqrt())
    torch.testing.assert_close(pw.allocation_weights(p, p + 2, alpha=0.3, beta=1.0), (p + 2) / (p + 0.3).sqrt())
    grid = torch.linspace(1e-4, 1, 1_000_000, dtype=torch.float64)
    for alpha, beta in [(1e-3, 2.0), (0.02, 3.0)]:
        top = float(grid[pw.allocation_weights(grid, torch.ones_like(grid), alpha=alpha, beta=beta).argmax()])
        assert top == pytest.approx((alpha * (beta - 1)) ** (1 / beta), abs=2e-6)  # two grid steps


def test_missing_norms_shrink_and_cost():
    p = torch.full((4,), 0.5)
    norm = torch.tensor([1.0, float("nan"), 3.0, 0.0])
    keep = pw.allocation_weights(p, norm, alpha=0.0)
    assert keep[1] == keep[0]  # torch's median of (1, 3) is the lower one
    drop = pw.allocation_weights(p, norm, alpha=0.0, zero_policy="drop", shrink=0.5)
    assert drop[1] == 0
    assert drop[3] == 0
    uniform = pw.allocation_weights(p, norm, shrink=1.0)
    torch.testing.assert_close(uniform, torch.ones(4).double())
    priced = pw.allocation_weights(p, torch.ones(4), alpha=0.0, cost=torch.tensor([1.0, 4.0, 9.0, 16.0]))
    torch.testing.assert_close(priced / priced[0], torch.tensor([1, 1 / 2, 1 / 3, 1 / 4]).double())
    assert torch.equal(pw.fill_missing_norms(torch.zeros(3)), torch.ones(3).double())


def test_smoothing():
    torch.testing.assert_close(
        pw.smooth_acceptance(torch.tensor([0, 3]), torch.tensor([0, 8])), torch.tensor([0.5, 3.5 / 9]).double()
    )
    assert pw.smooth_acceptance(torch.tensor([0, 2]), torch.tensor([0, 8]), None).tolist() == [0.0, 0.25]


@pytest.fixture(scope="module")
def policy():
    return TabularPolicy()


def true_variance(policy, n, coefficient):
    """Trace of the covariance of ``1/m sum_i 1/n_i sum_j c(y_ij) score(y_ij)`` by enumeration of one draw."""
    draw = coefficient[..., None] * policy.score
    mean = (policy.pi[..., None] * draw).sum(1)
    second = (policy.pi * draw.square().sum(2)).sum(1)
    return float(((second - mean.square().sum(1)) / n).sum()) / policy.m**2


@pytest.mark.parametrize("objective", ["em", "reward", "reward_baseline"])
def test_variance_formulas_equal_enumeration(policy, objective):
    n = torch.arange(1, policy.m + 1)
    right, p = policy.right.double(), policy.p[:, None]
    coefficient = {"em": right / p, "reward": right, "reward_baseline": right - p}[objective]
    got = pw.predicted_variance(
        n,
        policy.p,
        policy.norm2,
        objective=objective,
        mean_grad_norm2=policy.mean2,
        grad_norm2_rejected=policy.norm2_rejected,
        exact=True,
    )
    assert got == pytest.approx(true_variance(policy, n, coefficient), rel=1e-10)


@pytest.mark.parametrize("objective", ["em", "reward", "reward_baseline"])
def test_weights_minimise_their_own_bound(policy, objective):
    """At the real-valued optimum every other allocation of the same budget has a larger bound."""
    kw = {"objective": objective}
    weights = pw.allocation_weights(
        policy.p, policy.norm2.sqrt(), alpha=0.0, grad_norm_rejected=policy.norm2_rejected.sqrt(), **kw
    )
    best = 96 * weights / weights.sum()

    def bound(n):
        return pw.predicted_variance(n, policy.p, policy.norm2, grad_norm2_rejected=policy.norm2_rejected, **kw)

    scale = 10_000  # the function takes counts; large ones make the rounding negligible
    least = bound((best * scale).round().long())
    gen = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = best * torch.exp(0.3 * torch.randn(policy.m, generator=gen, dtype=torch.float64))
        assert bound((other / other.sum() * 96 * scale).round().long()) > least * (1 - 1e-6)


def test_wrong_objective_costs_more_than_uniform(policy):
    uniform = torch.full((policy.m,), 8)
    wrong = allocate(pw.allocation_weights(policy.p, policy.norm2.sqrt()), 8 * policy.m)
    right = allocate(pw.allocation_weights(policy.p, policy.norm2.sqrt(), objective="reward"), 8 * policy.m)
    values = [
        pw.predicted_variance(n, policy.p, policy.norm2, objective="reward", mean_grad_norm2=policy.mean2, exact=True)
        for n in (right, uniform, wrong)
    ]
    assert values[0] < values[1] < values[2]


REPETITIONS = 20_000


@pytest.mark.parametrize("objective", ["em", "reward"])
def test_estimates_are_unbiased_with_the_predicted_variance(policy, objective):
    """Mean within 4.5 standard errors in each of 6 coordinates (false alarm 4e-5); trace variance within 3 %."""
    n = allocate(pw.allocation_weights(policy.p, policy.norm2.sqrt(), objective=objective), 8 * policy.m, min_samples=1)
    index, answer = policy.draw(n, REPETITIONS)
    accepted = policy.right[index].expand(REPETITIONS, -1, -1).gather(2, answer[..., None])[..., 0]
    kw = {"num_prompts": policy.m, "objective": objective}
    # the weight of a sample, were it accepted; horvitz_thompson and reward weights depend on nothing else
    v = estimators.sample_weights(
        index, torch.ones_like(index, dtype=torch.bool), estimator="horvitz_thompson", p=policy.p, **kw
    )
    score = policy.score[index[None], answer]
    estimate = (torch.where(accepted, v, 0.0)[..., None] * score).sum(1)
    truth = (policy.mean if objective == "em" else policy.p[:, None] * policy.mean).mean(0)
    error = estimate.std(0) / REPETITIONS**0.5
    assert bool(((estimate.mean(0) - truth).abs() < 4.5 * error).all())
    predicted = pw.predicted_variance(
        n, policy.p, policy.norm2, objective=objective, mean_grad_norm2=policy.mean2, exact=True
    )
    assert float(estimate.var(0).sum()) == pytest.approx(predicted, rel=0.03)


def test_self_normalised_error_formula(policy):
    n = torch.full((policy.m,), 4)
    index, answer = policy.draw(n, REPETITIONS, seed=1)
    accepted = policy.right[index].expand(REPETITIONS, -1, -1).gather(2, answer[..., None])[..., 0]
    score = policy.score[index[None], answer] * accepted[..., None]
    total = torch.zeros(REPETITIONS, policy.m, policy.d, dtype=torch.float64).index_add_(1, index, score)
    found = torch.zeros(REPETITIONS, policy.m, dtype=torch.float64).index_add_(1, index, accepted.double())
    estimate = (total / found.clamp_min(1)[..., None]).mean(1)
    mse = (estimate - policy.mean.mean(0)).square().sum(1).mean()
    predicted = pw.predicted_sn_mse(n, policy.p, policy.norm2 - policy.mean2, policy.mean)
    assert float(mse) == pytest.approx(predicted, rel=0.03)


def test_sample_weights_by_hand():
    index = torch.tensor([0, 0, 0, 1, 1, 2])
    accepted = torch.tensor([True, True, False, False, True, False])
    kw = {"num_prompts": 3, "objective": "em"}
    v = estimators.sample_weights(index, accepted, **kw)
    assert v.tolist() == [0.25, 0.25, 0, 0, 0.5, 0]
    assert float(v.sum()) == 1.0
    flat = estimators.sample_weights(index, accepted, estimator="flat", **kw)
    torch.testing.assert_close(flat, accepted.double() / 3.0)
    with pytest.raises(ValueError, match="needs `p`"):
        estimators.sample_weights(index, accepted, estimator="horvitz_thompson", **kw)
    # two processes that share prompt 0 agree with one that holds all
    counts, found = torch.tensor([3, 2, 1]), torch.tensor([2, 1, 0])
    parts = [
        estimators.sample_weights(index[s], accepted[s], counts=counts, accepted_counts=found, **kw)
        for s in (slice(0, 2), slice(2, 6))
    ]
    assert torch.equal(torch.cat(parts), v)


def test_advantages():
    gen = torch.Generator().manual_seed(0)
    index = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])
    reward = torch.rand(10, generator=gen)
    mean = estimators.group_advantages(reward, index, kind="mean")
    loo = estimators.group_advantages(reward, index)
    sums = torch.zeros(4).double().index_add_(0, index, mean)
    torch.testing.assert_close(sums, torch.zeros(4).double(), atol=1e-12, rtol=0)
    size = torch.bincount(index)[index]
    torch.testing.assert_close(loo[size > 1], (mean * size / (size - 1).clamp_min(1))[size > 1])
    assert loo[5] == 0
    first = estimators.group_advantages(reward, index, kind="mean_std", eps=0.0)[:3]
    torch.testing.assert_close(first, ((reward[:3] - reward[:3].mean()) / reward[:3].std()).double())
    direct = torch.stack([reward[i] - reward[(index == index[i]) & (torch.arange(10) != i)].mean() for i in (0, 3, 7)])
    torch.testing.assert_close(loo[[0, 3, 7]], direct.double())
    moments = sum(estimators.group_moments(reward[s], index[s], 4) for s in (slice(0, 2), slice(2, 10)))
    torch.testing.assert_close(estimators.group_advantages(reward[2:], index[2:], group_sums=moments), loo[2:])
    reward[1] = torch.nan
    assert estimators.group_advantages(reward, index)[1] == 0
    torch.testing.assert_close(estimators.group_advantages(reward, index)[0], (reward[0] - reward[2]).double())


def test_importance():
    gen = torch.Generator().manual_seed(0)
    grads = torch.randn(50, 7, generator=gen, dtype=torch.float64) * torch.rand(50, 1, generator=gen) ** 2 + 0.1
    scores, mean = grads.norm(dim=1), grads.mean(0)
    q = importance.importance_probs(scores, 0.1)
    assert float(q.sum()) == pytest.approx(1.0, abs=1e-14)
    assert float(q.min()) >= 0.1 / 50
    torch.testing.assert_close((q[:, None] * grads / (50 * q[:, None])).sum(0), mean)

    def variance(q):
        return float((grads.square().sum(1) / q).sum()) / 50**2 - float(mean.square().sum())

    best, uniform = variance(importance.importance_probs(scores, 0.0)), variance(torch.full((50,), 1 / 50))
    assert importance.importance_variance_ratio(scores, float(mean.square().sum())) == pytest.approx(best / uniform)
    assert variance(q) < uniform
    torch.testing.assert_close(importance.importance_probs(scores, 1.0), torch.full((50,), 1 / 50).double())
    torch.testing.assert_close(importance.importance_probs(torch.zeros(4)), torch.full((4,), 0.25).double())


def test_systematic_sample_is_low_variance_and_unbiased():
    q = importance.importance_probs(torch.arange(1, 8), 0.1)
    gen = torch.Generator().manual_seed(0)
    counts = torch.stack([torch.bincount(importance.systematic_sample(q, 20, gen), minlength=7) for _ in range(4000)])
    assert bool((counts.sum(1) == 20).all())
    assert bool(((counts >= (20 * q).floor()) & (counts <= (20 * q).ceil())).all())
    # counts are Bernoulli around the floor: standard error at most 0.5/sqrt(4000); 5 of them, 7 coordinates: 4e-6
    assert bool(((counts.double().mean(0) - 20 * q).abs() < 5 * 0.5 / 4000**0.5).all())
