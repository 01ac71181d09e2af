"""Every optimizer: the update is the paper's, in every mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance.cases import (
    CASES,
    SHAPES,
    Case,
    gradient,
    largest_difference,
    make_params,
    run,
    to_numpy,
)
from tests.conformance.common import (
    MODES,
    all_equal,
    arguments,
    clones,
    every,
    every_setting,
    still,
)


@every_setting
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_follows_the_recurrence_step_by_step(case: Case, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    params = make_params(dtype)
    optimizer = case.cls(params, **kwargs)
    expected = to_numpy(params)
    recurrence = case.recurrence(expected, kwargs)
    # float64: roundings of about 100 operations on numbers near 1; float32: the same, 2^29 times larger
    tolerance = 1e-13 if dtype is torch.float64 else 3e-5
    for step in range(12):
        for index, param in enumerate(params):
            param.grad = gradient(step, index, param)
        optimizer.step()
        expected = recurrence(expected, to_numpy([p.grad for p in params]))
        for shape, got, want in zip(SHAPES, to_numpy(params), expected, strict=True):
            assert abs(got - want).max() <= tolerance, (step, shape)


@pytest.mark.parametrize(
    ("case", "limit"), [pytest.param(c, x, id=f"{c.cls.__name__}-{i}") for c in CASES for i, x in enumerate(c.limits)]
)
def test_reduces_to_a_torch_optimizer(case: Case, limit: Any) -> None:
    ours, theirs = make_params(), make_params()
    optimizer, twin = case.cls(ours, **limit.kwargs), limit.twin(theirs)
    for step in range(60):
        for index, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = limit.gradient(step, p) if limit.gradient else gradient(step, index, p)
            q.grad = p.grad.clone()
        optimizer.step()
        twin.step()
    assert largest_difference(ours, theirs) <= limit.tolerance


@every_setting
@pytest.mark.parametrize("mode", [m for m in MODES if m != "eager"])
def test_modes_agree(case: Case, kwargs: dict[str, Any], mode: str) -> None:
    a, b = make_params(), make_params()
    run(case.cls(a, **kwargs), a, range(8))
    run(case.cls(b, **kwargs, **MODES[mode]), b, range(8))
    assert largest_difference(a, b) <= 1e-12


@every_setting
def test_differentiable_agrees(case: Case, kwargs: dict[str, Any]) -> None:
    a, b = make_params(), [p.detach() for p in make_params()]
    run(case.cls(a, **kwargs), a, range(8))
    run(case.cls(b, **kwargs, differentiable=True), b, range(8))
    assert largest_difference(a, b) <= 1e-12


@every
def test_differentiable_carries_the_derivative_of_the_learning_rate(case: Case) -> None:
    def final(lr: Any, **switches: Any) -> Tensor:
        p = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
        optimizer = case.cls([p], **{**case.kwargs[0], "lr": lr}, **switches)
        torch.manual_seed(3)
        for step in range(3):
            p.grad = gradient(step, 0, p.detach())
            optimizer.step()
        return p.square().sum()

    lr = torch.tensor(case.kwargs[0]["lr"], dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(final(lr, differentiable=True), lr)
    size = 1e-6 * case.kwargs[0]["lr"]
    want = (final(lr.item() + size) - final(lr.item() - size)) / (2 * size)
    assert got.item() == pytest.approx(want.item(), rel=1e-6, abs=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float64) for case in CASES),
        # what differs with the precision is the base's, not the rule's
        *((case, torch.float32) for case in CASES if case.cls.__name__ in ("AdaGradNorm", "AdamP", "DiffGrad", "SGLD")),
    ],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else value.cls.__name__,
)
def test_compiled_agrees(case: Case, dtype: torch.dtype, recwarn: pytest.WarningsRecorder) -> None:
    a, b = make_params(dtype), make_params(dtype)
    run(case.cls(a, **case.kwargs[0]), a, range(6))
    run(case.cls(b, **case.kwargs[0], compile=True), b, range(6))
    assert not [w for w in recwarn if "torch.compile failed" in str(w.message)]
    assert largest_difference(a, b) <= (1e-12 if dtype is torch.float64 else 2e-5)


@every
def test_maximize_ascends(case: Case) -> None:
    a, b = make_params(), make_params()
    up, down = case.cls(a, **still(case), maximize=True), case.cls(b, **still(case))
    torch.manual_seed(0)
    run(up, a, range(4))
    torch.manual_seed(0)
    for step in range(4):
        for index, p in enumerate(b):
            p.grad = -gradient(step, index, p)
        down.step()
    assert largest_difference(a, b) <= 1e-14


@every
def test_no_gradient_means_no_change(case: Case) -> None:
    a, b = make_params(), make_params()
    optimizer = case.cls(a, **case.kwargs[0])
    optimizer.step()
    assert all_equal(a, b)
    a[0].grad = gradient(0, 0, a[0])
    optimizer.step()
    assert not torch.equal(a[0], b[0])
    assert all_equal(a[1:], b[1:])
    assert all("step" not in optimizer.state[p] for p in a[1:])
    assert optimizer.state[a[0]]["step"] == 1


@every
def test_zero_gradient_without_decay_means_no_change(case: Case) -> None:
    a, b = make_params(), make_params()
    optimizer = case.cls(a, **still(case))
    for p in a:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all_equal(a, b)


@every
def test_a_parameter_with_a_gradient_only_sometimes_keeps_its_own_count(case: Case) -> None:
    if not case.elementwise:
        pytest.skip("the other parameters' gradients count")
    a, b = make_params(), make_params()
    together, alone = case.cls(a, **case.kwargs[0]), case.cls(b[1:2], **case.kwargs[0])
    for step in range(9):
        for index, p in enumerate(a):
            p.grad = gradient(step, index, p) if index != 1 or step % 3 == 1 else None
        together.step()
        if step % 3 == 1:
            b[1].grad = gradient(step, 1, b[1])
            alone.step()
    assert together.state[a[1]]["step"] == 3
    assert largest_difference(a[1:2], b[1:2]) <= 1e-15


@every
def test_groups_and_scheduler_are_honoured(case: Case) -> None:
    if not case.elementwise:
        pytest.skip("groups share a norm")
    a, b = make_params(), make_params()
    grouped = case.cls([{"params": a[:3]}, {"params": a[3:], "lr": 0.5}], **case.kwargs[0])
    parts = [case.cls(b[:3], **case.kwargs[0]), case.cls(b[3:], **{**case.kwargs[0], "lr": 0.5})]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (grouped, *parts)]
    for step in range(5):
        for index, (p, q) in enumerate(zip(a, b, strict=True)):
            p.grad, q.grad = gradient(step, index, p), gradient(step, index, p)
        for optimizer in (grouped, *parts):
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert largest_difference(a, b) <= 1e-14
    assert grouped.param_groups[1]["lr"] == 0.5 * 0.5**5


@every
def test_decay_can_leave_out_vectors(case: Case) -> None:
    if "weight_decay" not in arguments(case):
        pytest.skip("has no weight decay")
    params = make_params()
    start = clones(params)
    optimizer = case.cls(params, **{**case.kwargs[0], "weight_decay": 0.5}, decay_1d=False)
    before = case.cls(start, **still(case))
    run(optimizer, params, range(3))
    run(before, start, range(3))
    for p, q in zip(params, start, strict=True):
        # in OptimisticOMD the decay of one changes the step size of all
        assert torch.equal(p, q) == (p.ndim <= 1) or case.cls.__name__ == "OptimisticOMD"
