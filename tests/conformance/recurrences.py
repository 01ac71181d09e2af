"""The papers' recurrences in float64 numpy, one tensor at a time, written from the formulas and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = list[np.ndarray]
Recurrence = Callable[[Arrays, Arrays], Arrays]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def squared_norm(arrays: Arrays) -> float:
    return math.fsum(float(np.sum(a * a)) for a in arrays)


def diffgrad(start: Arrays, h: dict[str, Any]) -> Recurrence:
    b1, b2 = h.get("betas", (0.9, 0.999))
    lr, eps, wd = h["lr"], h.get("eps", 1e-8), h.get("weight_decay", 0.0)
    m, v, previous = ([np.zeros_like(p) for p in start] for _ in range(3))
    t = 0

    def step(params: Arrays, grads: Arrays) -> Arrays:
        nonlocal t
        t += 1
        out = []
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            if h.get("decoupled_weight_decay", False):
                p = p * (1 - lr * wd)
            else:
                g = g + wd * p
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            friction = sigmoid(np.abs(previous[i] - g))
            m_hat, v_hat = m[i] / (1 - b1**t), v[i] / (1 - b2**t)
            out.append(p - lr * friction * m_hat / (np.sqrt(v_hat) + eps))
            previous[i] = g
        return out

    return step


def adagrad_norm(start: Arrays, h: dict[str, Any]) -> Recurrence:
    lr, wd = h["lr"], h.get("weight_decay", 0.0)
    total = h.get("b0", 1e-2) ** 2

    def step(params: Arrays, grads: Arrays) -> Arrays:
        nonlocal total
        total += squared_norm(grads)
        return [p * (1 - lr * wd) - lr / math.sqrt(total) * g for p, g in zip(params, grads, strict=True)]

    return step
