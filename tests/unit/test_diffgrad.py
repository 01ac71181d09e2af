"""Oracles of DiffGrad that the conformance suite does not cover."""

import math

import pytest
import torch

from lightning_grad.optim import DiffGrad


def test_scalar_trace():
    # by hand: p0=1, lr=0.1, eps=0, gradients 1, 0.5, -2, -2
    p = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = DiffGrad([p], lr=0.1, eps=0.0)
    trace = []
    for g in (1.0, 0.5, -2.0, -2.0):
        p.grad = torch.full_like(p, g)
        optimizer.step()
        trace.append(p.item())
    assert trace == pytest.approx(
        [0.9268941421369995, 0.8688697506835463, 0.8879400665516021, 0.9134205354254898], rel=0, abs=4e-16
    )


def test_constant_gradient_is_adam_at_half_the_rate_after_the_first_step():
    c, lr = 0.37, 1e-2
    p, q = (torch.ones(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, adam = DiffGrad([p], lr=lr), torch.optim.Adam([q], lr=lr / 2)
    for _ in range(60):
        p.grad, q.grad = torch.full_like(p, c), torch.full_like(q, c)
        ours.step()
        adam.step()
    offset = lr * (1 / (1 + math.exp(-c)) - 0.5)
    assert offset == pytest.approx(9.1458978e-4, rel=1e-7)
    assert torch.allclose(q - p, torch.full_like(p, offset), rtol=0, atol=1e-10)  # eps moves the last digits


def test_in_place_gradients_are_not_taken_for_the_previous_ones():
    # an alias of the gradient as previous gradient would make the friction exactly 0.5 from step 2 on
    p, q = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    fresh, reused = DiffGrad([p], lr=0.1), DiffGrad([q], lr=0.1)
    q.grad = torch.zeros_like(q)
    for g in (1.0, -3.0, 2.0):
        p.grad = torch.full_like(p, g)
        q.grad.fill_(g)
        fresh.step()
        reused.step()
    assert torch.equal(p, q)
