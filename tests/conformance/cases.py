"""One line per optimizer: joining this list is all a new optimizer does to get every test of the suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf, nan
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad.optim import (
    PSGLD,
    SGDP,
    SGHMC,
    SGLD,
    AdaGradNorm,
    AdamP,
    DiffGrad,
    NormalizedGD,
    OptimisticAdam,
    OptimisticFTRL,
    OptimisticOMD,
)
from tests.conformance import recurrences as paper


@dataclass(frozen=True)
class Limit:
    """Values at which the optimizer is one of torch's, and the gradients (default: random) for which it is."""

    kwargs: dict[str, Any]
    twin: Callable[..., Optimizer]
    tolerance: float  # absolute, after 60 steps in float64
    gradient: Callable[[int, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Case:
    """An optimizer and what the suite needs to know about it."""

    cls: type[Optimizer]
    recurrence: Callable[..., paper.Recurrence]
    kwargs: tuple[dict[str, Any], ...]  # settings to run; the first is also used where one is enough
    limits: tuple[Limit, ...] = ()
    refused: tuple[tuple[str, Any, str], ...] = ()  # argument, value, text; the common arguments are known
    elementwise: bool = True  # the update of an element depends on nothing else
    noisy: bool = False  # has a temperature; the settings have temperature 0


def alternating(size: float) -> Callable[[int, Tensor], Tensor]:
    return lambda t, p: torch.full_like(p, size * (-1) ** t)


adamw = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
rmsprop = partial(torch.optim.RMSprop, lr=1e-2, alpha=0.99, eps=1e-8)
nesterov = partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True)

# Common arguments: values that every optimizer with such an argument refuses, and the text.
REFUSED = {
    "lr": [(v, f"lr must be >= 0 and finite, got {v}") for v in (-1.0, nan, inf, -inf)]
    + [("1e-3", "lr must be >= 0 and finite, got '1e-3' (type str, not a number)")],
    "betas": [
        ((1.0, 0.9), "betas[0] must lie in [0, 1), got 1.0"),
        ((0.9, 1.0), "betas[1] must lie in [0, 1), got 1.0"),
        ((0.9, -0.1), "betas[1] must lie in [0, 1), got -0.1"),
        ((nan, 0.9), "betas[0] must lie in [0, 1), got nan"),
    ],
    "momentum": [(v, f"momentum must lie in [0, 1), got {v}") for v in (1.0, -0.1, nan)],
    "wd_ratio": [(v, f"wd_ratio must lie in [0, 1], got {v}") for v in (1.1, -0.1, nan)],
    **{
        name: [(v, f"{name} must be >= 0, got {v}") for v in (-1.0, nan, -inf)]
        for name in ("eps", "weight_decay", "delta", "b0", "temperature", "v_init", "lipschitz", "smoothness")
    },
}
REFUSED["eps"].append((None, "eps must be >= 0, got None (type NoneType, not a number)"))

CASES = [
    Case(
        DiffGrad,
        paper.diffgrad,
        (
            {"lr": 1e-2, "weight_decay": 0.1},
            {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "decoupled_weight_decay": True},
        ),
        limits=(Limit({"lr": 1e-2}, partial(torch.optim.Adam, lr=1e-2), 1e-14, alternating(1e3)),),
    ),
    Case(
        AdaGradNorm,
        paper.adagrad_norm,
        ({"lr": 0.3, "weight_decay": 0.1}, {"lr": 0.3, "b0": 0.0}),
        refused=(("scope", "tensor", "`scope` must be one of 'global', 'group', got 'tensor'."),),
        elementwise=False,
    ),
    Case(
        AdamP,
        paper.adamp,
        (
            {"lr": 1e-2, "weight_decay": 0.1, "delta": 2.0},  # random gradients: some weights of each kind
            {"lr": 1e-2, "betas": (0.8, 0.9), "weight_decay": 0.1, "delta": 0.5, "wd_ratio": 0.5, "nesterov": True},
            {"lr": 1e-2, "delta": 1e9},  # all weights are projected
        ),
        limits=(
            Limit({"lr": 1e-2, "delta": 0.0, "weight_decay": 0.1}, adamw, 1e-14),
            Limit({"lr": 1e-2, "weight_decay": 0.1, "delta": 0.5}, adamw, 1e-14, lambda t, p: p.detach() * (t + 1)),
        ),
        elementwise=False,
    ),
    Case(
        SGDP,
        paper.sgdp,
        (
            {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1, "delta": 2.0},
            {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "delta": 1.0, "nesterov": True},
            {"lr": 1e-2, "weight_decay": 0.1, "delta": 1e9},
        ),
        limits=(
            Limit({"lr": 1e-2, "delta": 0.0, "momentum": 0.9}, partial(torch.optim.SGD, lr=1e-2, momentum=0.9), 0.0),
            Limit({"lr": 1e-2, "delta": 0.0, "momentum": 0.9, "nesterov": True}, nesterov, 1e-14),
        ),
        refused=(("dampening", 1.5, "dampening must lie in [0, 1], got 1.5"),),
        elementwise=False,
    ),
    Case(
        NormalizedGD,
        paper.normalized_gd,
        (
            {"lr": 0.3, "weight_decay": 0.1},
            {"lr": 0.3, "norm": "tensor", "eps": 0.1, "weight_decay": 0.1},
        ),
        refused=(("norm", "logistic", "`norm` must be one of 'global', 'tensor', got 'logistic'."),),
        elementwise=False,
    ),
    Case(
        OptimisticAdam,
        paper.optimistic_adam,
        ({"lr": 1e-2, "weight_decay": 0.1}, {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-3}),
    ),
    Case(
        OptimisticOMD,
        paper.optimistic_omd,
        (
            {"lr": 0.5, "weight_decay": 0.1},
            {"lr": 0.5, "lipschitz": 9.0, "smoothness": 0.3, "diameter": 3.0, "project": True},
            {"lr": 0.1, "step_rule": "strongly_convex", "strong_convexity": 0.4, "diameter": 3.0, "project": True},
            {"lr": 0.1, "step_rule": "constant"},
        ),
        refused=(
            ("step_rule", "fast", "`step_rule` must be one of 'convex', 'strongly_convex', 'constant', got 'fast'."),
            ("step_rule", "strongly_convex", "strong_convexity must be > 0 for step_rule='strongly_convex', got 0.0"),
            ("diameter", 0.0, "diameter must be > 0, got 0.0"),
        ),
        elementwise=False,
    ),
    Case(
        OptimisticFTRL,
        paper.optimistic_ftrl,
        (
            {"diameter": 3.0, "lr": 1.0},
            {"diameter": 20.0, "lipschitz": 9.0, "lr": 1.0},
            {"nu": 5.0, "project": False, "lr": 1.0},
        ),
        refused=(("nu", 0.0, "nu must be >= 1e-10, got 0.0"),),
        elementwise=False,
    ),
    Case(
        SGLD,
        paper.sgld,
        ({"lr": 1e-2, "weight_decay": 0.1, "temperature": 0.0}, {"lr": 1e-2, "temperature": 0.0, "sphere": True}),
        limits=(Limit({"lr": 1e-2, "temperature": 0.0}, partial(torch.optim.SGD, lr=1e-2), 0.0),),
        refused=(("n_data", -1, "n_data must be an integer >= 0, got -1"),),
        noisy=True,
    ),
    Case(
        PSGLD,
        paper.psgld,
        (
            {"lr": 1e-2, "weight_decay": 0.1, "temperature": 0.0},
            {"lr": 1e-2, "temperature": 0.0, "alpha": 0.9, "lam": 0.1, "v_init": 1.0},
        ),
        limits=(Limit({"lr": 1e-2, "temperature": 0.0, "lam": 1e-8}, rmsprop, 1e-13),),
        refused=tuple(("lam", v, f"lam must be >= 1e-12, got {v}") for v in (0.0, -1.0, nan)),
        noisy=True,
    ),
    Case(
        SGHMC,
        paper.sghmc,
        ({"lr": 1e-2, "weight_decay": 0.1, "temperature": 0.0}, {"lr": 1e-2, "temperature": 0.0, "friction": 0.7}),
        limits=(Limit({"lr": 1e-2, "temperature": 0.0}, partial(torch.optim.SGD, lr=1e-2, momentum=0.9), 1e-13),),
        refused=(("friction", 0.0, "friction must lie in (0, 1], got 0.0"),),
        noisy=True,
    ),
]

SHAPES = [(3, 4), (5,), (), (2, 3, 3, 3), (6, 1), (1, 7), (260, 130), (4, 4)]  # (260, 130) is not put in a bucket


def make_params(
    dtype: torch.dtype = torch.float64, shapes: list[tuple[int, ...]] = SHAPES, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def gradient(step: int, index: int, param: Tensor) -> Tensor:
    """A gradient that depends on the step and the parameter's index only."""
    generator = torch.Generator().manual_seed(1000 * (step + 1) + index)
    dtype = torch.complex128 if param.is_complex() else torch.float64
    return torch.randn(param.shape, generator=generator, dtype=dtype).to(param.dtype)


def run(optimizer: Optimizer, params: list[Tensor], steps: range) -> None:
    for step in steps:
        for index, param in enumerate(params):
            param.grad = gradient(step, index, param)
        optimizer.step()


def to_numpy(tensors: list[Tensor]) -> list[np.ndarray]:
    return [t.detach().to(torch.float64).numpy().copy() for t in tensors]


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    pairs = zip(a, b, strict=True)
    return max((p.detach().to(q.dtype) - q.detach()).abs().max().item() for p, q in pairs if p.numel())
