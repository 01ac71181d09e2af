"""Every optimizer: arguments are refused by name or lead to a finite step."""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_grad.optim import AdamP, DiffGrad, OptimisticFTRL, OptimisticOMD
from tests.conformance.cases import (
    CASES,
    REFUSED,
    Case,
    largest_difference,
    make_params,
    run,
)
from tests.conformance.common import (
    arguments,
    every,
)


@pytest.mark.parametrize(
    ("case", "name", "value", "text"),
    [
        pytest.param(c, name, value, text, id=f"{c.cls.__name__}-{name}-{value}")
        for c in CASES
        for name, values in REFUSED.items()
        if name in inspect.signature(c.cls).parameters
        for value, text in values
    ]
    + [pytest.param(c, *refused, id=f"{c.cls.__name__}-{refused[0]}") for c in CASES for refused in c.refused],
)
def test_values_out_of_range_are_refused_by_name(case: Case, name: str, value: Any, text: str) -> None:
    with pytest.raises(ValueError) as error:
        case.cls(make_params(), **{**case.kwargs[0], name: value})
    assert str(error.value) == text
    optimizer = case.cls(make_params(), **case.kwargs[0])
    with pytest.raises(ValueError) as error:
        optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)], name: value})
    assert str(error.value) == text


@every
def test_switches_that_exclude_each_other(case: Case) -> None:
    for other in ("foreach", "compile", "capturable"):
        with pytest.raises(ValueError) as error:
            case.cls(make_params(), **case.kwargs[0], differentiable=True, **{other: True})
        assert str(error.value) == f"differentiable cannot be combined with {other}"
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        case.cls([], **case.kwargs[0])
    with pytest.raises(TypeError, match="fused"):
        case.cls(make_params(), **case.kwargs[0], fused=True)


@pytest.mark.parametrize(
    ("cls", "kwargs", "text"),
    [
        (DiffGrad, {"betas": (0.9,)}, "betas must be a pair of numbers, got (0.9,)"),
        (DiffGrad, {"foreach": "yes"}, "foreach must be True, False or None, got 'yes'"),
        (DiffGrad, {"state_dtype": "bf16"}, "state_dtype must be 'param' or 'float32', got 'bf16'"),
        (DiffGrad, {"maximize": 1}, "maximize must be True or False, got 1"),
        (DiffGrad, {"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        (DiffGrad, {"weight_decay": 2e10}, "weight_decay must be >= 0 and at most 1e+10, got 20000000000.0"),
        (OptimisticOMD, {"delta": 1e-40}, "delta + 4 * lipschitz^2 must be 0 or at least 1e-30, got 1e-40"),
        (OptimisticOMD, {"delta": 0.0}, None),
        (OptimisticFTRL, {"nu": 2e20}, "nu must be >= 1e-10 and at most 1e+20, got 2e+20"),
        (DiffGrad, {"lr": torch.tensor(1.0), "capturable": True, "foreach": True, "weight_decay": 1e10}, None),
        (AdamP, {"wd_ratio": 1.0}, None),
        (OptimisticOMD, {"delta": None}, None),
    ],
)
def test_what_is_refused_and_what_is_not(cls: Any, kwargs: dict[str, Any], text: str | None) -> None:
    if text is None:
        cls(make_params(), **kwargs)
        return
    with pytest.raises(ValueError) as error:
        cls(make_params(), **kwargs)
    assert str(error.value) == text


@every
def test_a_tensor_learning_rate(case: Case) -> None:
    with pytest.raises(ValueError, match="lr as a Tensor is not supported for capturable=False and foreach=True"):
        case.cls(make_params(), **{**case.kwargs[0], "lr": torch.tensor(0.1)}, foreach=True)
    with pytest.raises(ValueError, match="lr must be >= 0 and finite, got -1"):
        case.cls(make_params(), **{**case.kwargs[0], "lr": torch.tensor(-1.0)})
    lr = torch.tensor(case.kwargs[0]["lr"], dtype=torch.float64)
    a, b = make_params(), make_params()
    run(case.cls(a, **{**case.kwargs[0], "lr": lr}), a, range(3))
    run(case.cls(b, **case.kwargs[0]), b, range(3))
    assert largest_difference(a, b) <= 1e-13
    for switches in ({}, {"capturable": True}, {"capturable": True, "foreach": True}, {"foreach": False}):
        c = make_params()
        optimizer = case.cls(c, **{**case.kwargs[0], "lr": lr.reshape(1)}, **switches)
        run(optimizer, c, range(2))
        optimizer.load_state_dict(optimizer.state_dict())
        run(optimizer, c, range(2, 3))
        assert largest_difference(c, b) <= 1e-12


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    if hint is float:
        return st.floats() | st.floats(0, 1) | st.sampled_from([0.0, 1e-45, 1e-300, 1e10, 1e300, 1.0 - 2**-53])
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(-3, 10**9)
    if hint is type(None):
        return st.none()
    if get_origin(hint) is tuple:
        return st.tuples(*map(values_of, get_args(hint)))
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    return st.one_of(*map(values_of, get_args(hint)))


@every
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_arguments_give_a_clear_error_or_a_finite_step(case: Case, data: st.DataObject) -> None:
    hints = get_type_hints(case.cls.__init__)
    some = [n for n in arguments(case) if data.draw(st.booleans(), label=f"set {n}")]
    kwargs = {name: data.draw(values_of(hints[name]), label=name) for name in some}
    params = [torch.tensor([[1.0, -2.0], [0.5, 0.0]], requires_grad=True), torch.ones((), requires_grad=True)]
    try:
        optimizer = case.cls(params, **kwargs)
        for p in params:
            p.grad = p.detach() + 0.25
        optimizer.step()
    except ValueError as error:
        if not any(name in str(error) for name in arguments(case)):
            raise
        return
    if kwargs.get("sphere") and kwargs.get("lr", 0.0) * max(1.0, kwargs.get("weight_decay", 0.0)) > 1e18:
        return  # the length of such a move is no float32, and NaN says so
    for p in params:
        assert p.isfinite().all()
        assert all(value.isfinite().all() for value in optimizer.state[p].values())
