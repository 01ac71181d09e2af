"""DiffGrad, AdamP and SGDP next to implementations that are not ours, where they are installed."""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from lightning_grad.optim import SGDP, AdamP, DiffGrad
from tests.conformance.cases import gradient, largest_difference, make_params, run

SHAPES = [(3, 4), (5,), (2, 3, 3, 3), (6, 1), (1, 7), (260, 130), (4, 4)]
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


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Executor]:
    """A process of its own: once these packages are loaded, `AdamP` is the name of several optimizers."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        yield executor


def apart_from_pytorch_optimizer(cls: Any, ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    a, b = make_params(shapes=SHAPES), make_params(shapes=SHAPES)
    mine = cls(a, **ours, eps=EPS)
    other = getattr(importlib.import_module("pytorch_optimizer"), cls.__name__)(b, **theirs, eps=EPS, foreach=False)
    for step in range(20):
        for index, (p, q) in enumerate(zip(a, b, strict=True)):
            g = gradient(step, index, p)
            p.grad = g + g.sign()
            q.grad = p.grad.clone()
        mine.step()
        with torch.no_grad():
            other.step()
    return largest_difference(a, b)


def apart_from_the_authors(cls: Any, kwargs: dict[str, Any]) -> float:
    a, b = make_params(shapes=SHAPES), make_params(shapes=SHAPES)
    run(cls(a, **kwargs), a, range(60))
    with torch.no_grad():
        run(getattr(importlib.import_module("adamp"), cls.__name__)(b, **kwargs), b, range(60))
    return largest_difference(a, b)


def apart_after_a_checkpoint_of_the_authors() -> float:
    a, b = make_params(shapes=SHAPES), make_params(shapes=SHAPES)
    theirs = importlib.import_module("adamp").AdamP(b, lr=1e-2, weight_decay=0.1, delta=0.5)
    with torch.no_grad():
        run(theirs, b, range(3))
        for p, q in zip(a, b, strict=True):
            p.copy_(q)
    ours = AdamP(a)
    ours.load_state_dict(theirs.state_dict())
    run(ours, a, range(3, 6))
    with torch.no_grad():
        run(theirs, b, range(3, 6))
    return largest_difference(a, b)


@pytest.mark.skipif(not find_spec("pytorch_optimizer"), reason="pytorch-optimizer is not installed")
@pytest.mark.parametrize(("cls", "kwargs", "ours", "theirs"), SETTINGS)
def test_agrees_with_pytorch_optimizer(
    elsewhere: Executor, cls: Any, kwargs: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    apart = elsewhere.submit(apart_from_pytorch_optimizer, cls, {**kwargs, **ours}, {**kwargs, **theirs})
    assert apart.result() <= 1e-12


@pytest.mark.skipif(not find_spec("adamp"), reason="adamp is not installed")
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
def test_agrees_with_the_authors_package(elsewhere: Executor, cls: Any, kwargs: dict[str, Any]) -> None:
    # 60 steps of about 20 roundings of numbers below 10
    assert elsewhere.submit(apart_from_the_authors, cls, {"lr": 1e-2, **kwargs}).result() <= 1e-12


@pytest.mark.skipif(not find_spec("adamp"), reason="adamp is not installed")
def test_goes_on_from_a_checkpoint_of_the_authors_package(elsewhere: Executor) -> None:
    assert elsewhere.submit(apart_after_a_checkpoint_of_the_authors).result() <= 1e-12
