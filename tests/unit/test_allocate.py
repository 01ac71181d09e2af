"""Integer allocation: budget to the unit, bounds, exact optimum, the published rounding."""

import itertools

import pytest
import torch

from lightning_grad.allocation.integer import allocate, is_degenerate


def cases(number, seed=0):
    gen = torch.Generator().manual_seed(seed)
    for _ in range(number):
        m = int(torch.randint(1, 9, (), generator=gen))
        weights = torch.rand(m, generator=gen).double() ** 4
        weights[torch.rand(m, generator=gen) < 0.2] = 0.0
        low = torch.randint(0, 4, (m,), generator=gen)
        high = low + torch.randint(0, 9, (m,), generator=gen)
        budget = int(torch.randint(int(low.sum()), int(high.sum()) + 1, (), generator=gen))
        yield weights, budget, low, high


@pytest.mark.parametrize("rounding", ["optimal", "largest_remainder"])
def test_budget_and_bounds_are_met_exactly(rounding):
    for weights, budget, low, high in cases(5000):
        n = allocate(weights, budget, min_samples=low, max_samples=high, rounding=rounding)
        assert int(n.sum()) == budget
        assert bool((n >= low).all() and (n <= high).all())


def cost(weights, n):
    terms = torch.where(weights > 0, weights.square() / n.double(), 0.0)
    return float(terms.sum())


def test_optimal_equals_exhaustive_search():
    gen = torch.Generator().manual_seed(1)
    searched = 0
    for _ in range(150):
        m = int(torch.randint(1, 6, (), generator=gen))
        weights = torch.rand(m, generator=gen).double() ** 3
        high = torch.randint(1, 9, (m,), generator=gen)
        budget = min(16, int(torch.randint(m, int(high.sum()) + 1, (), generator=gen)))
        n = allocate(weights, budget, max_samples=high)
        every = itertools.product(*[range(1, int(h) + 1) for h in high])
        best = min(cost(weights, torch.tensor(c)) for c in every if sum(c) == budget)
        assert cost(weights, n) == pytest.approx(best, rel=1e-12)
        searched += 1
    assert searched == 150


def test_optimal_is_never_worse_than_largest_remainder():
    for weights, budget, low, high in cases(500, seed=2):
        lower = torch.maximum(low, torch.ones_like(low))
        high = torch.maximum(high, lower)
        budget = max(budget, int(lower.sum()))
        both = [
            allocate(weights, budget, min_samples=lower, max_samples=high, rounding=r)
            for r in ("optimal", "largest_remainder")
        ]
        assert cost(weights, both[0]) <= cost(weights, both[1]) * (1 + 1e-12)


@pytest.mark.parametrize("rounding", ["optimal", "largest_remainder"])
def test_invariances(rounding):
    weights = torch.rand(40, generator=torch.Generator().manual_seed(3)).double() + 0.01
    n = allocate(weights, 333, rounding=rounding)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4))
    assert torch.equal(allocate(weights[order], 333, rounding=rounding), n[order])
    assert torch.equal(allocate(weights * 1024.0, 333, rounding=rounding), n)  # a power of two changes no rounding
    assert bool((n[weights.argsort()].diff() >= 0).all())
    assert allocate(torch.ones(7), 21, rounding=rounding).tolist() == [3] * 7
    assert allocate(torch.ones(7), 23, rounding=rounding).tolist() == [4, 4, 3, 3, 3, 3, 3]  # ties: lower index


def test_two_prompts_by_hand():
    assert allocate(torch.tensor([0.25, 1.0]).rsqrt(), 30).tolist() == [20, 10]


def test_zero_weights_and_small_budgets():
    assert allocate(torch.tensor([0.0, 1.0, 3.0]), 8).tolist() == [0, 2, 6]
    assert allocate(torch.tensor([5.0, 0.0, 1.0, 3.0]), 2).tolist() == [1, 0, 0, 1]
    # every weighted prompt is full, so the rest goes where the weight is 0
    assert allocate(torch.tensor([0.0, 1.0, 0.0]), 9, max_samples=4).tolist() == [3, 4, 2]


@pytest.mark.parametrize("weights", [[0.0, 0.0, 0.0], [1.0, float("nan"), 1.0], [1.0, -1.0, 1.0]])
def test_degenerate_weights_give_an_even_split(weights):
    weights = torch.tensor(weights)
    assert is_degenerate(weights)
    n = allocate(weights, 8, seed=1)
    assert sorted(n.tolist()) == [2, 3, 3]
    assert torch.equal(n, allocate(weights, 8, seed=1))
    assert {tuple(allocate(weights, 8, seed=s).tolist()) for s in range(20)} == {(2, 3, 3), (3, 2, 3), (3, 3, 2)}


def test_impossible_budgets_say_so():
    with pytest.raises(ValueError, match="budget 96 is smaller than 128 prompts x min_samples 1; lower min_samples"):
        allocate(torch.ones(128), 96, min_samples=1)
    with pytest.raises(ValueError, match="budget 5000 exceeds 128 prompts x max_samples 32 = 4096"):
        allocate(torch.ones(128), 5000, max_samples=32)
    with pytest.raises(ValueError, match="min_samples <= max_samples"):
        allocate(torch.ones(3), 9, min_samples=4, max_samples=2)


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e160, 1e300])
def test_the_size_of_the_weights_does_not_matter(size):
    """Their squares overflow or vanish; and a weight beside which the others are nothing leaves them what they need."""
    weights = torch.rand(30, generator=torch.Generator().manual_seed(3)).double() + 0.01
    assert torch.equal(allocate(weights * size, 333, max_samples=20), allocate(weights, 333, max_samples=20))
    assert allocate(torch.tensor([1.0, 1e-300, 1e-200], dtype=torch.float64) * size, 9).tolist() in (
        [7, 1, 1],
        [9, 0, 0],
    )


HARD = {
    "just above one each": ({}, 200_005),
    "nearly full": ({"max_samples": 16}, 16 * 200_000 - 7),
    "ties": ({}, 1_660_001),
}


@pytest.mark.parametrize("case", HARD)
def test_hard_cases_are_greedy_and_quick(case, monkeypatch):
    """Neither a bound that nearly all prompts have reached nor ties may send it through the whole search."""
    rounds = []
    where = torch.where
    monkeypatch.setattr(torch, "maximum", lambda a, b: rounds.append(1) or where(a > b, a, b))
    kwargs, budget = HARD[case]
    weights = torch.exp(torch.randn(200_000, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    weights = where(weights > 1, 2.0, 1.0) if case == "ties" else weights
    n = allocate(weights, budget, **kwargs)
    assert int(n.sum()) == budget
    high = kwargs.get("max_samples", budget)
    best_next = where(n < high, weights.square() / (n * (n + 1)), 0.0).max()
    worst_last = where(n > 1, weights.square() / ((n - 1) * n), torch.inf).min()
    assert float(best_next) <= float(worst_last) * (1 + 1e-12)
    assert len(rounds) < 12, len(rounds)


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_a_large_allocation_is_the_greedy_one(spread):
    """No unit can move to where it would do more good: the optimality condition of the greedy rule, at size."""
    gen = torch.Generator().manual_seed(5)
    weights = torch.exp(spread * torch.randn(20_000, generator=gen, dtype=torch.float64))
    n = allocate(weights, 160_123, max_samples=5000)
    assert int(n.sum()) == 160_123
    best_next = torch.where(n < 5000, weights.square() / (n * (n + 1)), 0.0).max()
    worst_last = torch.where(n > 1, weights.square() / ((n - 1) * n), torch.inf).min()
    assert float(best_next) <= float(worst_last) * (1 + 1e-12)
