"""Oracles of AdaGradNorm that the conformance suite does not cover."""

import math

import pytest
import torch

from lightning_grad.optim import AdaGradNorm


def run(optimizer, params, steps=40, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        yield [p.grad.norm().item() for p in params]
        optimizer.step()


def test_one_scalar_is_torch_adagrad():
    p, q = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours = AdaGradNorm([p], lr=0.3, b0=0.05)
    torchs = torch.optim.Adagrad([q], lr=0.3, initial_accumulator_value=0.05**2, eps=0)
    for _ in run(ours, [p]):
        q.grad = p.grad.clone()
        torchs.step()
    # one rounding per step of numbers below 2
    assert p.item() == pytest.approx(q.item(), abs=40 * 2.3e-16)


def test_first_step_from_zero_has_length_lr():
    p = torch.zeros(50, dtype=torch.float64, requires_grad=True)
    p.grad = torch.randn(50, dtype=torch.float64)
    AdaGradNorm([p], lr=0.7, b0=0.0).step()
    assert p.norm().item() == pytest.approx(0.7, rel=1e-14)


def test_b_grows_and_the_normalized_gradients_have_a_logarithmic_sum():
    p = torch.zeros(50, dtype=torch.float64, requires_grad=True)
    optimizer = AdaGradNorm([p], lr=0.7, b0=0.0)
    norms, bs = [], []
    for (norm,) in run(optimizer, [p]):
        if norms:
            bs.append(optimizer.stats()["b"].item())
        norms.append(norm)
    bs.append(optimizer.stats()["b"].item())
    assert bs == sorted(bs)
    total = sum(norm**2 / b**2 for norm, b in zip(norms, bs, strict=True))
    assert total <= 1 + math.log(bs[-1] ** 2 / bs[0] ** 2)


def test_one_long_vector_or_many_tensors_in_groups_is_the_same():
    whole = torch.linspace(-1, 1, 30, dtype=torch.float64).requires_grad_()
    parts = [t.clone().requires_grad_() for t in whole.detach().split([3, 7, 20])]
    one = AdaGradNorm([whole], weight_decay=0.01)
    many = AdaGradNorm([{"params": parts[:1]}, {"params": parts[1:]}], weight_decay=0.01)
    for _ in run(one, [whole]):
        for p, g in zip(parts, whole.grad.split([3, 7, 20]), strict=True):
            p.grad = g.clone()
        many.step()
    assert torch.allclose(torch.cat(parts), whole, rtol=0, atol=1e-14)


def test_scope_group_keeps_one_sum_per_group():
    a, b = (torch.zeros(4, requires_grad=True) for _ in range(2))
    optimizer = AdaGradNorm([{"params": [a]}, {"params": [b]}], b0=0.0, scope="group")
    a.grad, b.grad = torch.full((4,), 2.0), torch.full((4,), 8.0)
    optimizer.step()
    assert optimizer.stats()["b_0"] == 4.0
    assert optimizer.stats()["b_1"] == 16.0


def test_no_gradient_seen_does_not_move():
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.zeros(3)
    optimizer = AdaGradNorm([p], b0=0.0)
    optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert optimizer.stats()["effective_lr"] == 0.0
