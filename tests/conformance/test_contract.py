"""Every optimizer: closures, hooks and memory, as torch.optim has them."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_grad.optim import SGDP, AdamP, DiffGrad
from tests.conformance.cases import (
    Case,
    make_params,
    run,
)
from tests.conformance.common import (
    MODES,
    every,
    every_setting,
    heat,
)


@every
def test_closure_is_called_once_with_gradients_and_its_loss_returned(case: Case) -> None:
    params = make_params()
    optimizer = case.cls(params, **case.kwargs[0])
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss is not None
    assert loss.item() > 0
    assert optimizer.step() is None
    assert optimizer.state[params[0]]["step"] == 2


@every
def test_torch_hooks_and_schedulers_see_a_torch_optimizer(case: Case) -> None:
    params = make_params()
    optimizer = case.cls(params, **case.kwargs[0])
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("step"))
    run(optimizer, params, range(2))
    assert seen == ["step", "step"]
    assert set(case.kwargs[0]) <= set(optimizer.param_groups[0])
    assert {"maximize", "foreach", "capturable", "differentiable"} <= set(optimizer.param_groups[0])
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


class Memory(TorchDispatchMode):
    """Bytes of the tensors that operators have made and that are still alive; ``peak`` is the largest such number."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known_before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.device.type != "meta":
                storage = t.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known and key not in known_before:
                    self.known.add(key)
                    self.live += size
                    weakref.finalize(storage, self.forget, key, size)
        self.peak = max(self.peak, self.live)
        return out

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


# A step's temporaries on CPU, whatever the size of the model: arrays of the size of a bucket, 2^18 numbers in float32.
# Also told in docs/methods/index.md. Numbers of another dtype are copied to float32 first, so that they need more.
BUCKET = 4 << 18
ARRAYS = {torch.float32: 6, torch.bfloat16: 14}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_setting
def test_memory_is_state_and_a_fixed_number_of_bytes(case: Case, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and kwargs is not case.kwargs[0]:
        pytest.skip("one setting is enough")
    # 40 parameters that share buckets, and a large one of 16 blocks
    params = [torch.randn(120, 100).to(dtype).requires_grad_() for _ in range(40)]
    params.append(torch.randn(2048, 2048).to(dtype).requires_grad_())
    for p in params:
        p.grad = torch.randn_like(p)
    switches = {"stochastic_rounding": True} if dtype is torch.bfloat16 else {}
    optimizer = case.cls(params, **{**kwargs, **heat(case, dtype), **switches})
    size = params[0].element_size()
    state = size * sum(p.numel() for p in params) * len(optimizer.state_names(optimizer.param_groups[0]))
    memory = Memory()
    for _ in range(2):
        with memory:
            memory.peak = memory.live
            optimizer.step()
        assert memory.peak <= state + ARRAYS[dtype] * BUCKET
        assert state <= memory.live <= state + max(size, 4) * 2 * optimizer.capacity + 4096 * 50


@pytest.mark.slow
@pytest.mark.parametrize("cls", [DiffGrad, AdamP, SGDP])
def test_memory_compiled(cls: Any) -> None:
    """By torch's allocator, which sees what compiled code takes."""
    params = [torch.randn(1024, 1024, requires_grad=True) for _ in range(4)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = cls(params, compile=True)
    optimizer.step()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    changes = [e.self_cpu_memory_usage for e in profile.events() if e.name != "[memory]"]
    assert sum(c for c in changes if c > 0) <= 4 * BUCKET


@every
def test_nothing_is_compiled_unless_asked_for(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr("lightning_grad.optim._executors._compiled", {})
    params = make_params(torch.float32)
    for switches in MODES.values():
        run(case.cls(params, **case.kwargs[0], **switches), params, range(2))
    with pytest.raises(AssertionError, match="compiled"):  # what shows that the test would notice
        run(case.cls(params, **case.kwargs[0], compile=True), params, range(1))


@every
def test_sharded_parameters_are_refused_by_name(case: Case) -> None:
    class Shard(torch.Tensor):  # what DTensor and its like have
        def to_local(self) -> torch.Tensor:
            return self

    param = torch.nn.Parameter(torch.ones(2, 2).as_subclass(Shard))
    with pytest.raises(NotImplementedError, match=f"{case.cls.__name__} does not support DTensor parameters"):
        case.cls([param], **case.kwargs[0])
