"""Oracles of AdamP and SGDP that the conformance suite does not cover."""

import pytest
import torch

from lightning_grad.optim import SGDP, AdamP


def parameter(values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("weight_decay", "expected"), [(0.0, [[2.888, 4.084]]), (0.5, [[2.873, 4.064]])])
def test_adamp_first_step_by_hand(weight_decay, expected):
    p = parameter([[3.0, 4.0]])
    p.grad = torch.tensor([[4.0, -3.0]], dtype=torch.float64)
    AdamP([p], lr=0.1, weight_decay=weight_decay).step()
    assert torch.allclose(p, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-9)  # eps = 1e-8


def test_sgdp_first_step_removes_the_radial_part():
    p, g = parameter([[3.0, 4.0]]), torch.tensor([[4.1, -3.0]], dtype=torch.float64)
    start = p.detach().clone()
    p.grad = g
    SGDP([p], lr=0.1, delta=10.0).step()
    radial = start * (start * g).sum() / start.square().sum()
    assert torch.allclose(p, start - 0.1 * (g - radial), rtol=0, atol=1e-8)


@pytest.mark.parametrize("cls", [AdamP, SGDP])
def test_zero_gradient_counts_as_scale_invariant(cls):
    p = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    p.grad = torch.zeros_like(p)
    cls([p], lr=0.1, weight_decay=1.0).step()
    assert torch.allclose(p, torch.full_like(p, 0.99), rtol=0, atol=1e-15)


def test_projected_steps_grow_the_norm_by_the_step_alone():
    torch.manual_seed(0)
    p = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
    optimizer = AdamP([p], lr=0.1, delta=1e9, eps=1e-12)
    for step in range(1, 6):
        before = p.detach().clone()
        p.grad = torch.randn(5, 40, dtype=torch.float64)
        optimizer.step()
        moved = p.detach() - before
        # Pythagoras in every row: the step is orthogonal to the weight
        assert torch.allclose(p.detach().square().sum(1), before.square().sum(1) + moved.square().sum(1), rtol=1e-9), (
            step
        )


def test_scale_of_an_invariant_weight_does_not_change_its_direction():
    def train(scale):
        torch.manual_seed(1)
        p = (scale * torch.randn(4, 30, dtype=torch.float64)).requires_grad_()
        target = torch.randn(4, 30, dtype=torch.float64)
        optimizer = SGDP([p], lr=0.1 * scale**2, momentum=0.9)
        for _ in range(20):
            optimizer.zero_grad()
            (torch.nn.functional.normalize(p, dim=1) * target).sum().backward()
            optimizer.step()
        return torch.nn.functional.normalize(p.detach(), dim=1)

    # the gradient is 1/scale times as large and must move the weight by scale times as much
    assert torch.allclose(train(1.0), train(7.0), rtol=0, atol=1e-8)


def test_a_row_gradient_of_one_tensor_does_not_decide_for_another_in_its_bucket():
    tangential = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    radial = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    ps = [parameter([[1.0, 0.0], [1.0, 0.0]]) for _ in range(2)]
    ps[0].grad, ps[1].grad = tangential, radial
    SGDP(ps, lr=0.1, weight_decay=1.0).step()
    assert torch.allclose(ps[0], torch.tensor([[0.99, -0.1], [0.99, -0.1]], dtype=torch.float64))
    assert torch.allclose(ps[1], torch.tensor([[0.8, 0.0], [0.8, 0.0]], dtype=torch.float64))
