"""Every optimizer: closures, hooks and memory, as torch.optim has them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conformance.cases import (
    Case,
    make_params,
    run,
)
from tests.conformance.common import (
    every,
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
            if isinstance(t, Tensor):
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


@every
def test_memory_is_state_and_one_bucket_of_temporaries(case: Case) -> None:
    # 40 parameters in four buckets and a large one that is cut into four blocks
    params = [torch.randn(120, 100, requires_grad=True) for _ in range(40)]
    params.append(torch.randn(1024, 512, requires_grad=True))
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = case.cls(params, **case.kwargs[0])
    memory = Memory()
    with memory:
        optimizer.step()
    total = 4 * sum(p.numel() for p in params)
    state = total * len(optimizer.state_names(optimizer.param_groups[0]))
    bucket = 4 * optimizer.capacity
    assert state <= memory.live <= state + 2 * bucket + 4096 * 50
    assert memory.peak <= state + 12 * bucket  # scratch, and what the rule makes for one block
    with memory:
        before = memory.live
        memory.peak = before
        optimizer.step()
    assert memory.peak - before <= 10 * bucket
    assert 10 * bucket < total + 4 * total // 2  # the bound means something: less than copies of all parameters
