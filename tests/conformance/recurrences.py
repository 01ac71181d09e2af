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


def normalized_gd(start: Arrays, h: dict[str, Any]) -> Recurrence:
    lr, wd, eps = h["lr"], h.get("weight_decay", 0.0), h.get("eps", 0.0)

    def step(params: Arrays, grads: Arrays) -> Arrays:
        whole = math.sqrt(squared_norm(grads))
        norms = [math.sqrt(squared_norm([g])) if h.get("norm") == "tensor" else whole for g in grads]
        return [p * (1 - lr * wd) - lr * g / (n + eps) for p, g, n in zip(params, grads, norms, strict=True)]

    return step


def optimistic_adam(start: Arrays, h: dict[str, Any]) -> Recurrence:
    b1, b2 = h.get("betas", (0.5, 0.9))
    lr, eps, wd = h["lr"], h.get("eps", 1e-8), h.get("weight_decay", 0.0)
    m, v, last = ([np.zeros_like(p) for p in start] for _ in range(3))
    t = 0

    def step(params: Arrays, grads: Arrays) -> Arrays:
        nonlocal t
        t += 1
        out = []
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            u = m[i] / (1 - b1**t) / (np.sqrt(v[i] / (1 - b2**t)) + eps)
            out.append(p * (1 - lr * wd) - 2 * lr * u + lr * last[i])
            last[i] = u
        return out

    return step


def into_ball(x: Arrays, center: Arrays, radius: float) -> Arrays:
    length = math.sqrt(squared_norm([a - c for a, c in zip(x, center, strict=True)]))
    factor = min(1.0, radius / length) if length else 1.0
    return [c + factor * (a - c) for a, c in zip(x, center, strict=True)]


def optimistic_omd(start: Arrays, h: dict[str, Any]) -> Recurrence:
    """The form with two sequences: the played point, and the one that follows the gradients."""
    lr, wd, d = h["lr"], h.get("weight_decay", 0.0), h.get("diameter", 1.0)
    delta = h.get("delta") or 10 * d**2 * h.get("smoothness", 0.0) ** 2 or 1e-8
    base = delta + 4 * h.get("lipschitz", 0.0) ** 2
    center, xhat = [p.copy() for p in start], [p.copy() for p in start]
    previous = [np.zeros_like(p) for p in start]
    variation, t = 0.0, 0

    def eta(round_: int, v: float) -> float:
        if h.get("step_rule", "convex") == "convex":
            return lr * d / math.sqrt(base + v)
        return lr if h["step_rule"] == "constant" else lr * 2 / (h["strong_convexity"] * round_)

    def inside(x: Arrays) -> Arrays:
        return into_ball(x, center, d / 2) if h.get("project", False) else x

    def step(params: Arrays, grads: Arrays) -> Arrays:
        nonlocal variation, t, xhat, previous
        t += 1
        grads = [g + wd * p for g, p in zip(grads, params, strict=True)]
        before = variation
        variation += squared_norm([g - q for g, q in zip(grads, previous, strict=True)])
        scale_known = base > 1e-8 or h.get("delta") is not None
        now = eta(t, before if scale_known or t > 1 else variation)
        xhat = inside([x - now * g for x, g in zip(xhat, grads, strict=True)])
        previous = grads
        following = eta(t + 1, variation)
        return inside([x - following * g for x, g in zip(xhat, grads, strict=True)])

    return step


def optimistic_ftrl(start: Arrays, h: dict[str, Any]) -> Recurrence:
    d = h.get("diameter", 1.0)
    nu = h.get("nu") or (2 * d * h["lipschitz"] if h.get("lipschitz") else 1.0)
    total, previous = ([np.zeros_like(p) for p in start] for _ in range(2))
    center = [p.copy() for p in start]
    penalty = 0.0

    def step(params: Arrays, grads: Arrays) -> Arrays:
        nonlocal penalty, total, previous
        penalty += d**2 / (nu + penalty) * squared_norm([g - q for g, q in zip(grads, previous, strict=True)])
        total = [s + g for s, g in zip(total, grads, strict=True)]
        previous = grads
        eta = d**2 / (nu + penalty)
        x = [c - eta / 2 * (g + s) for c, g, s in zip(center, grads, total, strict=True)]
        return into_ball(x, center, d / 2) if h.get("project", True) else x

    return step


def sgld(start: Arrays, h: dict[str, Any]) -> Recurrence:
    """At temperature 0."""
    lr, wd = h["lr"], h.get("weight_decay", 0.0)
    radius = [np.linalg.norm(p) for p in start]

    def step(params: Arrays, grads: Arrays) -> Arrays:
        out = []
        for p, g, r in zip(params, grads, radius, strict=True):
            g = g + wd * p
            if h.get("sphere", False) and p.ndim:
                g = g - p * (p * g).sum() / (p * p).sum()
                x = p - lr * g
                out.append(x * r / np.linalg.norm(x))
            else:
                out.append(p - lr * g)
        return out

    return step


def psgld(start: Arrays, h: dict[str, Any]) -> Recurrence:
    """At temperature 0."""
    lr, wd, a = h["lr"], h.get("weight_decay", 0.0), h.get("alpha", 0.99)
    v = [np.full_like(p, h.get("v_init", 0.0)) for p in start]

    def step(params: Arrays, grads: Arrays) -> Arrays:
        out = []
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            g = g + wd * p
            v[i] = a * v[i] + (1 - a) * g * g
            out.append(p - lr * g / (h.get("lam", 1e-5) + np.sqrt(v[i])))
        return out

    return step


def sghmc(start: Arrays, h: dict[str, Any]) -> Recurrence:
    """At temperature 0."""
    lr, wd, f = h["lr"], h.get("weight_decay", 0.0), h.get("friction", 0.1)
    v = [np.zeros_like(p) for p in start]

    def step(params: Arrays, grads: Arrays) -> Arrays:
        out = []
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            v[i] = (1 - f) * v[i] - lr * (g + wd * p)
            out.append(p + v[i])
        return out

    return step
