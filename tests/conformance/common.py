"""Marks and helpers that the conformance tests share."""

from __future__ import annotations

import inspect
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance.cases import CASES, Case

every = pytest.mark.parametrize("case", CASES, ids=lambda c: c.cls.__name__)
every_setting = pytest.mark.parametrize(
    ("case", "kwargs"),
    [pytest.param(c, k, id=f"{c.cls.__name__}-{i}") for c in CASES for i, k in enumerate(c.kwargs)],
)
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "foreach": {"foreach": True},
    "single": {"foreach": False},
    "capturable": {"capturable": True},
}
every_mode = pytest.mark.parametrize("mode", MODES)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def clones(params: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone().requires_grad_() for p in params]


def all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def still(case: Case) -> dict[str, Any]:
    """The first setting, without weight decay."""
    return {**case.kwargs[0], **({"weight_decay": 0.0} if "weight_decay" in arguments(case) else {})}


def arguments(case: Case) -> list[str]:
    return [name for name in inspect.signature(case.cls).parameters if name not in ("params", "switches")]


def heat(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Arguments that switch the noise of a sampler on, where the dtype can hold it."""
    if not case.noisy or dtype is torch.float16:
        return {}
    return {"temperature": 1.0, "n_data": 10, "seed": 5}
