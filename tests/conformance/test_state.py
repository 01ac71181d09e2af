"""Every optimizer: state is saved, loaded, copied and kept without loss."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_grad.optim import AdamP, DiffGrad
from tests.conformance.cases import (
    CASES,
    Case,
    gradient,
    make_params,
    run,
)
from tests.conformance.common import (
    DTYPES,
    MODES,
    all_equal,
    arguments,
    clones,
    every,
    every_mode,
    every_setting,
    heat,
    through_file,
)

COMPILED = {
    DiffGrad: [torch.bfloat16, torch.float16, torch.float64, torch.complex64],
    AdamP: [torch.bfloat16, torch.complex64],
}
SOME = [(3, 4), (5,), (), (260, 130)]  # a bucket of rows, one of vectors, and a large one


@every
@every_mode
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", ["param", "float32"])
def test_resume_is_bit_exact(case: Case, mode: str, dtype: torch.dtype, state_dtype: str) -> None:
    switches = {**MODES[mode], "state_dtype": state_dtype, **heat(case, dtype)}
    if dtype is torch.bfloat16:
        switches["stochastic_rounding"] = True
    a = make_params(dtype)
    first = case.cls(a, **{**case.kwargs[0], **switches})
    run(first, a, range(3))
    b = clones(a)
    second = case.cls(b, **{**case.kwargs[0], "lr": 7.0, **switches})
    second.load_state_dict(through_file(first.state_dict()))
    random_state = torch.get_rng_state()
    run(first, a, range(3, 7))
    torch.set_rng_state(random_state)
    run(second, b, range(3, 7))
    assert all_equal(a, b)
    for p, q in zip(a, b, strict=True):
        for name, value in first.state[p].items():
            assert torch.equal(value, second.state[q][name])
            assert value.dtype is second.state[q][name].dtype


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(case, torch.float32, id=case.cls.__name__) for case in CASES]
    # how a dtype is read and written is the same code for all: one rule of each kind that has some of its own
    + [
        pytest.param(case, dtype, id=f"{case.cls.__name__}-{dtype}")
        for case in CASES
        for cls, dtypes in COMPILED.items()
        if case.cls is cls
        for dtype in dtypes
    ],
)
def test_resume_is_bit_exact_compiled(case: Case, dtype: torch.dtype, recwarn: pytest.WarningsRecorder) -> None:
    switches = {"compile": True, **heat(case, dtype)}
    if dtype is torch.bfloat16:
        switches |= {"stochastic_rounding": True, "state_dtype": "float32"}
    a = make_params(dtype, SOME)
    first = case.cls(a, **{**case.kwargs[0], **switches})
    run(first, a, range(3))
    b = clones(a)
    second = case.cls(b, **{**case.kwargs[0], **switches})
    second.load_state_dict(through_file(first.state_dict()))
    random_state = torch.get_rng_state()
    run(first, a, range(3, 6))
    torch.set_rng_state(random_state)
    run(second, b, range(3, 6))
    assert all_equal(a, b)
    assert not [w for w in recwarn if "torch.compile failed" in str(w.message)]
    if dtype is torch.bfloat16:  # the rounding is random: with other numbers the result is another
        c = clones(a)
        third = case.cls(c, **{**case.kwargs[0], **switches})
        third.load_state_dict(through_file(first.state_dict()))
        run(first, a, range(6, 7))
        run(third, c, range(6, 7))
        assert not all_equal(a, c)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resume_is_bit_exact_differentiable(case: Case, dtype: torch.dtype) -> None:
    switches = {"differentiable": True, "stochastic_rounding": dtype is torch.bfloat16, **heat(case, dtype)}
    a = [p.detach() for p in make_params(dtype)]
    first = case.cls(a, **{**case.kwargs[0], **switches})
    run(first, a, range(3))
    b = [p.clone() for p in a]
    second = case.cls(b, **{**case.kwargs[0], **switches})
    second.load_state_dict(through_file(first.state_dict()))
    random_state = torch.get_rng_state()
    run(first, a, range(3, 6))
    torch.set_rng_state(random_state)
    run(second, b, range(3, 6))
    assert all_equal(a, b)


@every
def test_resume_is_bit_exact_where_gradients_come_and_go(case: Case) -> None:
    def go(optimizer: Any, params: list[Tensor], steps: range) -> None:
        for step in steps:
            for index, p in enumerate(params):
                p.grad = gradient(step, index, p) if (step + index) % 3 else None
            optimizer.step()

    a = make_params(torch.float32)
    first = case.cls(a, **{**case.kwargs[0], **heat(case)})
    go(first, a, range(5))
    b = clones(a)
    second = case.cls(b, **{**case.kwargs[0], **heat(case)})
    second.load_state_dict(through_file(first.state_dict()))
    go(first, a, range(5, 12))
    go(second, b, range(5, 12))
    assert all_equal(a, b)


@every
def test_resume_where_the_first_parameter_is_frozen(case: Case) -> None:
    # what all parameters share is kept with the first
    a = make_params()
    first = case.cls(a, **{**case.kwargs[0], **heat(case)})
    run(first, a[1:], range(2))
    b = clones(a)
    second = case.cls(b, **{**case.kwargs[0], **heat(case)})
    second.load_state_dict(through_file(first.state_dict()))
    run(first, a[1:], range(2, 4))
    run(second, b[1:], range(2, 4))
    assert all_equal(a, b)


@every
def test_copies_and_pickles_go_on_alike(case: Case) -> None:
    a = make_params()
    first = case.cls(a, **{**case.kwargs[0], **heat(case)})
    run(first, a, range(2))
    copied, q = copy.deepcopy((first, a))
    unpickled, r = pickle.loads(pickle.dumps((first, a)))
    for optimizer, params in ((first, a), (copied, q), (unpickled, r)):
        run(optimizer, params, range(2, 5))
    assert all_equal(a, q)
    assert all_equal(a, r)


@every
@every_mode
def test_nothing_is_shared_after_loading(case: Case, mode: str) -> None:
    a, b = make_params(), make_params()
    first, second = case.cls(a, **case.kwargs[0], **MODES[mode]), case.cls(b, **case.kwargs[0], **MODES[mode])
    run(first, a, range(2))
    saved = first.state_dict()
    second.load_state_dict(saved)

    def storages(tensors: Any) -> set[int]:
        return {t.untyped_storage().data_ptr() for t in tree_leaves(tensors) if isinstance(t, Tensor)}

    live, copied, loaded = (storages(x) for x in (dict(first.state), saved["state"], dict(second.state)))
    assert not live & copied
    assert not live & loaded
    assert not copied & loaded
    for t in tree_leaves(saved["state"]):  # a view of a bucket would be written with the whole bucket
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size()


@every
def test_state_keeps_its_values_through_a_change_of_device_and_dtype(case: Case) -> None:
    params = make_params(torch.float32)
    optimizer = case.cls(params, **case.kwargs[0])
    run(optimizer, params, range(2))
    untouched = clones(params)
    uninterrupted = case.cls(untouched, **case.kwargs[0])
    uninterrupted.load_state_dict(optimizer.state_dict())
    for p in params:  # what Lightning does after loading
        for name, value in optimizer.state[p].items():
            optimizer.state[p][name] = value.to("cpu", copy=True) if name != "step" else value
    reference = clones(params)
    other = case.cls(reference, **case.kwargs[0])
    other.load_state_dict(optimizer.state_dict())
    run(optimizer, params, range(2, 4))
    run(other, reference, range(2, 4))
    run(uninterrupted, untouched, range(2, 4))
    assert all_equal(params, reference)
    assert all_equal(params, untouched)


@every
def test_foreign_checkpoints_are_refused_by_key(case: Case) -> None:
    params = make_params()
    optimizer = case.cls(params, **case.kwargs[0])
    run(optimizer, params, range(1))
    saved = optimizer.state_dict()
    saved["state"][0]["momentum_of_another"] = torch.zeros(3)
    with pytest.raises(KeyError, match=f"{case.cls.__name__}: .* unknown `momentum_of_another`"):
        optimizer.load_state_dict(saved)
    saved = optimizer.state_dict()
    key = next((k for k in case.cls.state_spec), "step")
    if len(saved["state"][1]) > 1:
        del saved["state"][1][key]
        with pytest.raises(KeyError, match=f"{case.cls.__name__}: .* parameter 1 has no `{key}`"):
            optimizer.load_state_dict(saved)


TORCH = [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad]


@cache
def state_dict_of(cls: Any, **kwargs: Any) -> dict[str, Any]:
    params = make_params(shapes=[(3, 4), (5,)])
    optimizer = cls(params, **kwargs)
    run(optimizer, params, range(1))
    return optimizer.state_dict()


@every
def test_every_other_optimizer_is_refused(case: Case) -> None:
    # AdamP and Adam, for example, have the same state: the hyperparameters tell them from each other
    others = [(c.cls, kwargs) for c in CASES if c is not case for kwargs in c.kwargs] + [(t, {}) for t in TORCH]
    for cls, kwargs in others:
        optimizer = case.cls(make_params(shapes=[(3, 4), (5,)]), **case.kwargs[0])
        with pytest.raises(KeyError, match=rf"{case.cls.__name__}: (parameter group 0|the state of parameter 0) has "):
            optimizer.load_state_dict(state_dict_of(cls, **kwargs))
        assert not optimizer.state


@every
def test_what_a_state_dict_may_lack_or_have_beside(case: Case) -> None:
    a, b = make_params(), make_params()
    first, second = case.cls(a, **case.kwargs[0]), case.cls(b, **case.kwargs[0])
    run(first, a, range(2))
    run(second, b, range(2))
    saved = first.state_dict()
    for group in saved["param_groups"]:
        del group["stochastic_rounding"]  # a switch that came later
        group["initial_lr"] = 1.0  # a scheduler's
    second.load_state_dict(saved)
    assert second.param_groups[0]["stochastic_rounding"] is False
    assert second.param_groups[0]["initial_lr"] == 1.0
    run(first, a, range(2, 4))
    run(second, b, range(2, 4))
    assert all_equal(a, b)
    for name in (name for name in second.defaults if name in arguments(case)):
        saved = first.state_dict()
        del saved["param_groups"][0][name]
        with pytest.raises(KeyError, match=f"{case.cls.__name__}: parameter group 0 has no `{name}`"):
            second.load_state_dict(saved)


@every_setting
def test_a_group_that_sits_out_while_its_storage_changes_goes_on(case: Case, kwargs: dict[str, Any]) -> None:
    a, b = make_params(), make_params()
    moved, left = (case.cls([{"params": p[:4]}, {"params": p[4:]}], **kwargs) for p in (a, b))
    for optimizer, params in ((moved, a), (left, b)):
        torch.manual_seed(0)
        run(optimizer, params[:4], range(1))
        for p in params[:4]:
            p.grad = None
            if optimizer is moved:
                p.data = p.data.clone()  # as module.to() does
        run(optimizer, params[4:], range(1, 2))  # the first state of this group
        run(optimizer, params, range(2, 4))
    assert all_equal(a, b)


@every_setting
def test_the_first_group_may_be_empty(case: Case, kwargs: dict[str, Any]) -> None:
    a, b = make_params(), make_params()
    first, plain = case.cls([{"params": []}, {"params": a}], **{**kwargs, **heat(case)}), case.cls(b, **kwargs)
    first.stats()
    run(first, a, range(2))
    assert all(torch.as_tensor(value).isfinite() for value in first.stats().values())
    if not case.noisy:
        run(plain, b, range(2))
        assert all_equal(a, b)
    c = clones(a)
    second = case.cls([{"params": []}, {"params": c}], **{**kwargs, **heat(case)})
    second.load_state_dict(through_file(first.state_dict()))
    run(first, a, range(2, 4))
    run(second, c, range(2, 4))
    assert all_equal(a, c)
