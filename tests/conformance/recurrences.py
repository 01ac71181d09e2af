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


def project(p: np.ndarray, g: np.ndarray, u: np.ndarray, h: dict[str, Any]) -> tuple[np.ndarray, float]:
    """The projection of AdamP: the update, and the factor of the weight decay."""
    eps, delta = h.get("eps", 1e-8), h.get("delta", 0.1)
    if p.ndim < 2:
        return u, 1.0
    for rows in (p.shape[0], 1):
        p2, g2, u2 = (x.reshape(rows, -1) for x in (p, g, u))
        norms = np.maximum(np.linalg.norm(g2, axis=1), eps) * np.maximum(np.linalg.norm(p2, axis=1), eps)
        cosine = np.abs((p2 * g2).sum(1)) / norms
        if cosine.max() < delta / math.sqrt(p2.shape[1]):
            unit = p2 / (np.linalg.norm(p2, axis=1, keepdims=True) + eps)
            return (u2 - unit * (unit * u2).sum(1, keepdims=True)).reshape(p.shape), h.get("wd_ratio", 0.1)
    return u, 1.0


def adamp(start: Arrays, h: dict[str, Any]) -> Recurrence:
    b1, b2 = h.get("betas", (0.9, 0.999))
    lr, eps, wd = h["lr"], h.get("eps", 1e-8), h.get("weight_decay", 0.0)
    m, v = ([np.zeros_like(p) for p in start] for _ in range(2))
    t = 0

    def step(params: Arrays, grads: Arrays) -> Arrays:
        nonlocal t
        t += 1
        out = []
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            n = b1 * m[i] + (1 - b1) * g if h.get("nesterov", False) else m[i]
            u, q = project(p, g, n / (np.sqrt(v[i]) / math.sqrt(1 - b2**t) + eps), h)
            out.append(p * (1 - lr * wd * q) - lr / (1 - b1**t) * u)
        return out

    return step


def sgdp(start: Arrays, h: dict[str, Any]) -> Recurrence:
    lr, mu, wd = h["lr"], h.get("momentum", 0.0), h.get("weight_decay", 0.0)
    b = [np.zeros_like(p) for p in start]

    def step(params: Arrays, grads: Arrays) -> Arrays:
        out = []
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            b[i] = mu * b[i] + (1 - h.get("dampening", 0.0)) * g
            u, q = project(p, g, g + mu * b[i] if h.get("nesterov", False) else b[i], h)
            out.append(p * (1 - lr * wd * q / (1 - mu)) - lr * u)
        return out

    return step
