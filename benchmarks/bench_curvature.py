"""Curvature: products to the largest eigenvalue of a 1 M-parameter network, and what watching costs a training run.

    python benchmarks/bench_curvature.py

Prints three tables; rows of the second go to benchmarks/results/curvature.csv.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from _harness import Bench  # noqa: E402

from lightning_grad.callbacks.stability import StabilityMonitor  # noqa: E402
from lightning_grad.demos import DigitsData  # noqa: E402
from lightning_grad.statistics.curvature import HessianOperator, rademacher  # noqa: E402
from lightning_grad.statistics.curvature_lanczos import lanczos  # noqa: E402
from lightning_grad.statistics.curvature_trace import hutchinson  # noqa: E402


def network() -> nn.Sequential:
    """1.1 M parameters on 64 pixels."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 992), nn.ReLU(), nn.Linear(992, 992), nn.ReLU(), nn.Linear(992, 10)
    )


def batch_of(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = DigitsData(batch_size=size)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    return images, labels


def products_to_one_percent() -> None:
    """Relative error of the largest Ritz value after k products, against 150 products in float64."""
    images, labels = batch_of(256)
    print(f"{'training steps':>15s} {'lambda_max':>11s} " + " ".join(f"{f'k={k}':>9s}" for k in (3, 5, 8, 10, 15, 20)))
    for steps in (0, 50, 300):
        torch.manual_seed(0)
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
        params = list(net.parameters())
        with HessianOperator(lambda net=net: F.cross_entropy(net(images), labels), params) as hessian:
            start = rademacher(hessian.size, 1)
            found = {k: float(lanczos(hessian, start, k).ritz()[0][-1]) for k in (3, 5, 8, 10, 15, 20)}
        exact_net = network().double()
        exact_net.load_state_dict(net.state_dict())
        x = images.double()
        with HessianOperator(lambda n=exact_net, x=x: F.cross_entropy(n(x), labels), list(exact_net.parameters())) as h:
            exact = float(lanczos(h, rademacher(h.size, 2, dtype=torch.float64), 60).ritz()[0][-1])
        errors = " ".join(f"{1 - value / exact:9.1e}" for value in found.values())
        print(f"{steps:15d} {exact:11.5f} {errors}")


def cost() -> None:
    """One training step and one measurement of StabilityMonitor, interleaved."""
    images, labels = batch_of(64)
    monitor = StabilityMonitor()
    torch.manual_seed(0)
    for name, make, measurements in (
        ("SGD", lambda p: torch.optim.SGD(p, lr=0.01), 1), ("AdamW", lambda p: torch.optim.AdamW(p, lr=1e-3), 2),
    ):  # fmt: skip
        net = network()
        params = list(net.parameters())
        optimizer = make(params)

        def step(net: nn.Module = net, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()

        def measure(net: nn.Module = net, params: list[torch.Tensor] = params) -> None:
            with HessianOperator(lambda: F.cross_entropy(net(images), labels), params) as hessian:
                lanczos(hessian, rademacher(hessian.size, 0), monitor.k)
                hutchinson(hessian, hessian.size, monitor.num_probes - 1, seed=1)

        def scaled(net: nn.Module = net, params: list[torch.Tensor] = params) -> None:
            scale = torch.ones(sum(p.numel() for p in params))
            with HessianOperator(lambda: F.cross_entropy(net(images), labels), params, scale=scale) as hessian:
                lanczos(hessian, rademacher(hessian.size, 0), monitor.k)

        def both(parts: tuple[Callable[[], None], ...] = (measure, scaled)[:measurements]) -> None:
            for part in parts:
                part()

        bench = Bench("curvature", f"MLP 1.06 M, batch 64, {name}", "training step")
        ratios = bench.run({"training step": step, "StabilityMonitor, one measurement": both}, rounds=12)
        bench.report()
        ratio = ratios["StabilityMonitor, one measurement"]
        share = ratio / monitor.every_n_steps
        print(
            f"{name}: a measurement costs {ratio:.1f} steps; every {monitor.every_n_steps} steps: {100 * share:.2f} %"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    started = time.perf_counter()
    products_to_one_percent()
    cost()
    print(f"{time.perf_counter() - started:.0f} s")
