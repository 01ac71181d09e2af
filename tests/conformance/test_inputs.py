"""Every optimizer: layouts, dtypes and gradients of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_grad.optim import (
    SGDP,
    SGLD,
    AdaGradNorm,
    AdamP,
    DiffGrad,
    NormalizedGD,
    OptimisticAdam,
    OptimisticFTRL,
    OptimisticOMD,
    _buckets,
    _math,
)
from tests.conformance.cases import (
    Case,
    gradient,
    largest_difference,
    make_params,
    run,
)
from tests.conformance.common import (
    MODES,
    all_equal,
    clones,
    every,
    every_mode,
    every_setting,
    still,
)


@every
@every_mode
def test_layout_does_not_change_the_result(case: Case, mode: str) -> None:
    shapes = [(4, 3, 5, 2), (7, 6), (8, 3), (250, 160), (40, 2, 30, 20)]
    plain, odd = make_params(shapes=shapes), make_params(shapes=shapes)
    odd[0].data = odd[0].data.contiguous(memory_format=torch.channels_last)
    odd[1].data = odd[1].data.t().contiguous().t()
    odd[2].data = torch.stack([odd[2].data, odd[2].data], -1)[..., 0]  # gaps
    odd[3].data = odd[3].data.t().contiguous().t()
    odd[4].data = odd[4].data.contiguous(memory_format=torch.channels_last)
    a, b = (case.cls(p, **case.kwargs[0], **MODES[mode]) for p in (plain, odd))
    run(a, plain, range(4))
    run(b, odd, range(4))
    # sums over a tensor may be taken in another order
    assert largest_difference(plain, odd) <= (0.0 if case.elementwise and mode != "foreach" else 1e-12)
    assert odd[0].is_contiguous(memory_format=torch.channels_last)
    for p in odd:
        assert all(v.shape == p.shape for k, v in b.state[p].items() if k in type(b).state_spec)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_a_number_becomes_does_not_depend_on_its_place(case: Case, dtype: torch.dtype) -> None:
    if not case.elementwise:
        pytest.skip("the update of an element depends on others")
    # in buckets, at the ends of vectors, and in a tensor of two blocks
    shapes = [(5,), (37,), (3, 11), (1,), (16,), (1003,), (262144 + 37,)]
    together, alone = make_params(dtype, shapes), make_params(dtype, shapes)
    run(case.cls(together, **case.kwargs[0]), together, range(3))
    optimizers = [case.cls([p], **case.kwargs[0], foreach=False) for p in alone]
    for step in range(3):
        for index, (p, optimizer) in enumerate(zip(alone, optimizers, strict=True)):
            p.grad = gradient(step, index, p)
            optimizer.step()
    assert all_equal(together, alone)
    # a part of a tensor, starting where a vector does not
    whole, part = make_params(dtype, [(1003,)]), [make_params(dtype, [(1003,)])[0].detach()[501:].clone()]
    part[0].requires_grad_()
    optimizers = [case.cls(whole, **case.kwargs[0]), case.cls(part, **case.kwargs[0])]
    for step in range(3):
        whole[0].grad = gradient(step, 0, whole[0])
        part[0].grad = whole[0].grad[501:].clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(whole[0][501:], part[0])


@pytest.mark.parametrize("cls", [DiffGrad, AdamP, OptimisticAdam])
def test_a_torch_without_the_fused_kernel_makes_the_same_step(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = make_params(torch.float64), make_params(torch.float64)
    run(cls(fused, lr=1e-2), fused, range(3))
    monkeypatch.setattr(_math, "_FUSED", None)
    run(cls(plain, lr=1e-2), plain, range(3))
    assert largest_difference(fused, plain) <= 1e-12


@every
@every_mode
def test_empty_parameters_are_passed_over(case: Case, mode: str) -> None:
    params = make_params(shapes=[(0, 4), (3,), (0,)])
    grouped = [{"params": params[:1]}, {"params": params[1:]}]
    for groups in (params, grouped, params[:1]):  # also where a group, or all there is, is empty
        run(case.cls(groups, **case.kwargs[0], **MODES[mode]), params, range(2))
    assert all(p.isfinite().all() for p in params)


@every
@every_mode
def test_complex_parameters_are_pairs_of_real_ones(case: Case, mode: str) -> None:
    pairs = make_params(shapes=[(6, 2), (2,), (150, 150, 2)])
    numbers = [torch.view_as_complex(p.detach()).clone().requires_grad_() for p in pairs]
    a, b = (case.cls(p, **case.kwargs[0], **MODES[mode]) for p in (pairs, numbers))
    for step in range(4):
        for index, (p, z) in enumerate(zip(pairs, numbers, strict=True)):
            z.grad = gradient(step, index, z)
            p.grad = torch.view_as_real(z.grad).clone()
        a.step()
        b.step()
    if case.cls not in (AdamP, SGDP):  # whose rows are not those of the pairs
        assert largest_difference([torch.view_as_real(z) for z in numbers], pairs) <= (
            1e-14 if case.elementwise else 1e-13
        )
    assert all(v.is_complex() for z in numbers for k, v in b.state[z].items() if k in type(b).state_spec)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_computes_in_float32_and_rounds_once(case: Case, dtype: torch.dtype) -> None:
    low = make_params(dtype)
    high = [p.detach().float().requires_grad_() for p in low]
    a, b = case.cls(low, **case.kwargs[0]), case.cls(high, **case.kwargs[0])
    torch.manual_seed(0)
    run(a, low, range(1))
    torch.manual_seed(0)
    for index, (p, q) in enumerate(zip(low, high, strict=True)):
        q.grad = gradient(0, index, p).float()
    b.step()
    # equal but for values that lie at a rounding boundary, where the last bit of float32 decides
    for p, q in zip(low, high, strict=True):
        assert (p != q.to(dtype)).double().mean() <= 1e-3


@every
@every_mode
def test_float32_state_makes_bfloat16_follow_float32(case: Case, mode: str) -> None:
    params = make_params(torch.bfloat16)
    optimizer = case.cls(params, **case.kwargs[0], **MODES[mode], state_dtype="float32")
    run(optimizer, params, range(3))
    for p in params:
        for name, value in optimizer.state[p].items():
            assert value.dtype is torch.float32 or optimizer._is_shared(name), name
    assert all(p.dtype is torch.bfloat16 for p in params)


@every
def test_stochastic_rounding_moves_bfloat16_by_steps_below_its_resolution(case: Case) -> None:
    switches = {"state_dtype": "float32", "stochastic_rounding": True}
    params = [torch.ones(40000, dtype=torch.bfloat16, requires_grad=True)]
    exact = [torch.ones(40000, requires_grad=True)]
    kwargs = {**still(case), "lr": 1e-4 * (200 if not case.elementwise else 1)}
    a, b = case.cls(params, **kwargs, **switches), case.cls(exact, **kwargs)
    for p, o in ((params[0], a), (exact[0], b)):
        torch.manual_seed(0)
        for _ in range(3):
            p.grad = torch.ones_like(p)
            o.step()
    moved = 1 - exact[0].double().mean().item()
    assert moved > 0
    # the variance of one rounding is at most (2^-8 / 2)^2, and there are three
    error = 3**0.5 * 2**-9 / 40000**0.5
    assert abs((1 - params[0].double().mean().item()) - moved) <= 5 * error


@every
def test_stochastic_rounding_needs_bfloat16(case: Case) -> None:
    params = make_params(torch.float32)
    optimizer = case.cls(params, **case.kwargs[0], stochastic_rounding=True)
    params[2].grad = torch.ones_like(params[2])
    with pytest.raises(ValueError, match=r"stochastic_rounding needs bfloat16 .* got torch.float32 for parameter 2"):
        optimizer.step()


@every
def test_sparse_gradients_are_refused_by_name(case: Case) -> None:
    p = torch.ones(4, 3, requires_grad=True)
    p.grad = torch.eye(4)[:, :3].to_sparse()
    with pytest.raises(
        RuntimeError, match=f"{case.cls.__name__} does not support sparse gradients; use torch.optim.Sp"
    ):
        case.cls([p], **case.kwargs[0]).step()
    assert torch.equal(p, torch.ones(4, 3))


@every_setting
@every_mode
@pytest.mark.parametrize("bad", [float("nan"), 1e25], ids=["nan", "too large to square"])
def test_a_gradient_that_is_no_number_stops_nothing_in_silence(
    case: Case, kwargs: dict[str, Any], mode: str, bad: float
) -> None:
    params = [torch.full((6,), 0.5, requires_grad=True), torch.full((3, 4), 0.5, requires_grad=True)]
    decay = {"weight_decay": 0.0} if "weight_decay" in kwargs else {}  # which moves them too
    optimizer = case.cls(params, **{**kwargs, **decay}, **MODES[mode])
    for step in range(4):
        before = clones(params)
        for index, p in enumerate(params):
            p.grad = gradient(step, index, p)
        if step == 1:
            params[0].grad[1] = bad
        optimizer.step()
        # the number itself may stand still, as in torch's Adam; every other moves on or shows that it cannot
        seen = [p.isnan() | ((p - old).abs() > 1e-6) for p, old in zip(params, before, strict=True)]
        seen[0][1] = True
        assert all(s.all() for s in seen), step


@every
def test_nan_gradients_spread_only_where_they_are(case: Case) -> None:
    params = [torch.ones(6, requires_grad=True), torch.ones(5, requires_grad=True)]
    optimizer = case.cls(params, **case.kwargs[0])
    for step in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        params[0].grad[1] = float("nan") if step == 1 else 1.0
        optimizer.step()
    assert params[0][1].isnan()
    assert not case.elementwise or sum(int(p.isnan().sum()) for p in params) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25], ids=["nan", "inf", "too large to square"])
@pytest.mark.parametrize(
    ("cls", "kwargs", "of_a_tensor"),
    [
        (AdaGradNorm, {}, False),
        (NormalizedGD, {}, False),
        (NormalizedGD, {"norm": "tensor", "eps": 0.1}, True),
        (OptimisticOMD, {}, False),
        (OptimisticOMD, {"step_rule": "constant", "project": True}, False),
        (OptimisticFTRL, {}, False),
        (OptimisticFTRL, {"project": False}, False),
        (SGLD, {"temperature": 0.0, "sphere": True}, True),
    ],
)
def test_a_norm_that_is_no_number_makes_all_it_scales_nan(
    cls: Any, kwargs: dict[str, Any], of_a_tensor: bool, bad: float
) -> None:
    params = [torch.ones(6, requires_grad=True), torch.ones(5, requires_grad=True)]
    optimizer = cls(params, **{"lr": 0.1, **kwargs})
    run(optimizer, params, range(1))
    params[0].grad[1] = bad
    optimizer.step()
    assert params[0].isnan().all()
    assert params[1].isfinite().all() if of_a_tensor else params[1].isnan().all()


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert all(t.dtype is not torch.float64 for t in tree_leaves(out) if isinstance(t, torch.Tensor)), func
        return out


@every_setting
@every_mode
def test_a_device_without_float64_makes_the_same_step(
    case: Case, kwargs: dict[str, Any], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, narrow = make_params(torch.float32), make_params(torch.float32)
    run(case.cls(wide, **kwargs, **MODES[mode]), wide, range(3))
    grads = [[gradient(step, index, p) for index, p in enumerate(narrow)] for step in range(3)]
    saved = case.cls(clones(narrow), **kwargs, **MODES[mode])
    run(saved, saved.param_groups[0]["params"], range(1))
    state = saved.state_dict()  # of a device that has it
    monkeypatch.setattr(_buckets, "WITHOUT_FLOAT64", ("mps", "cpu"))
    optimizer = case.cls(narrow, **kwargs, **MODES[mode])
    with NoFloat64():
        for step in range(3):
            for p, g in zip(narrow, grads[step], strict=True):
                p.grad = g
            optimizer.step()
        apart = [(p - q).abs().max() for p, q in zip(narrow, wide, strict=True)]
        assert max(apart) <= 3e-5
        optimizer.load_state_dict(state)
        optimizer.step()
    assert all(p.isfinite().all() for p in narrow)


@every
def test_gradients_are_untouched_and_may_be_reused(case: Case) -> None:
    a, b = make_params(), make_params()
    fresh, reused = case.cls(a, **case.kwargs[0], maximize=True), case.cls(b, **case.kwargs[0], maximize=True)
    for p in b:
        p.grad = torch.empty_like(p)
    torch.manual_seed(0)
    run(fresh, a, range(4))
    torch.manual_seed(0)
    for step in range(4):
        for index, p in enumerate(b):
            p.grad.copy_(gradient(step, index, p))
        reused.step()
        assert all(torch.equal(p.grad, gradient(step, i, p)) for i, p in enumerate(b))
    assert all_equal(a, b)


@every
def test_a_parameter_may_change_its_storage_between_steps(case: Case) -> None:
    a, b = make_params(), make_params()
    moved, left = case.cls(a, **case.kwargs[0]), case.cls(b, **case.kwargs[0])
    torch.manual_seed(0)
    run(left, b, range(4))
    torch.manual_seed(0)
    run(moved, a, range(2))
    for p in a:
        p.data = p.data.clone()
    run(moved, a, range(2, 4))
    assert all_equal(a, b)
    for p in a:
        p.data = p.data.float()
        p.grad = None
    run(moved, a, range(4, 5))
    assert all(p.isfinite().all() for p in a)
