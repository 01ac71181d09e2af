"""DiffGrad, AdamP and SGDP next to implementations that are not ours, where they are installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_grad.optim import SGDP, AdamP, DiffGrad
from tests.conformance.cases import gradient, largest_difference, make_params, run

# pytorch-optimizer adds eps to another sum (before the bias correction), and 1e-15 to the squares: eps is made
# negligible here, and gradients are kept away from zero.
EPS = 1e-20
SETTINGS = [
    (DiffGrad, {"lr": 1e-2}, {}, {}),
    (DiffGrad, {"lr": 1e-2, "betas": (0.8, 0.9)}, {"weight_decay": 0.1, "decoupled_weight_decay": True},
     {"weight_decay": 0.1, "weight_decouple": True}),
    (DiffGrad, {"lr": 1e-2}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "weight_decouple": False}),
    (AdamP, {"lr": 1e-2, "weight_decay": 0.1}, {}, {}),
    (AdamP, {"lr": 1e-2, "weight_decay": 0.1, "delta": 2.0, "wd_ratio": 0.5}, {}, {}),
    (AdamP, {"lr": 1e-2, "weight_decay": 0.1, "delta": 1e9, "nesterov": True}, {}, {}),
    (SGDP, {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9, "nesterov": True, "delta": 2.0}, {}, {}),
    (SGDP, {"lr": 1e-2, "momentum": 0.9, "delta": 0.0}, {}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "kwargs", "ours", "theirs"), SETTINGS)
def test_agrees_with_pytorch_optimizer(
    cls: Any, kwargs: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    package = pytest.importorskip("pytorch_optimizer")
    shapes = [(3, 4), (5,), (2, 3, 3, 3), (6, 1), (1, 7), (260, 130), (4, 4)]
    a, b = make_params(shapes=shapes), make_params(shapes=shapes)
    mine = cls(a, **kwargs, **ours, eps=EPS)
    other = getattr(package, cls.__name__)(b, **kwargs, **theirs, eps=EPS, foreach=False)
    for step in range(20):
        for index, (p, q) in enumerate(zip(a, b, strict=True)):
            g = gradient(step, index, p)
            p.grad = g + g.sign()
            q.grad = p.grad.clone()
        mine.step()
        with torch.no_grad():
            other.step()
    assert largest_difference(a, b) <= 1e-12


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (AdamP, {"weight_decay": 0.1}),
        (AdamP, {"weight_decay": 0.1, "delta": 2.0, "wd_ratio": 0.5}),
        (AdamP, {"weight_decay": 0.1, "delta": 1e9, "nesterov": True}),
        (AdamP, {"betas": (0.8, 0.9), "eps": 1e-3, "delta": 0.5}),
        (SGDP, {"momentum": 0.9, "weight_decay": 0.1, "delta": 2.0, "nesterov": True}),
        (SGDP, {"momentum": 0.9, "dampening": 0.5, "delta": 1e9, "nesterov": True}),
        (SGDP, {"momentum": 0.0, "weight_decay": 0.1, "delta": 0.5}),
    ],
)
def test_agrees_with_the_authors_package(cls: Any, kwargs: dict[str, Any]) -> None:
    package = pytest.importorskip("adamp")
    shapes = [(3, 4), (5,), (2, 3, 3, 3), (6, 1), (1, 7), (260, 130), (4, 4)]
    a, b = make_params(shapes=shapes), make_params(shapes=shapes)
    run(cls(a, lr=1e-2, **kwargs), a, range(60))
    theirs = getattr(package, cls.__name__)(b, lr=1e-2, **kwargs)
    with torch.no_grad():
        run(theirs, b, range(60))
    # 60 steps of about 20 roundings of numbers below 10
    assert largest_difference(a, b) <= 1e-12
