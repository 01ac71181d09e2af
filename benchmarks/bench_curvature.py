"""Curvature: products to the largest eigenvalue of a 1 M-parameter network, and what watching costs a training run.

    python benchmarks/bench_curvature.py [--only products|parts|trainer] [--rounds 3]

``products``: largest eigenvalue of a 1 M-parameter network. ``parts``: a training step and a measurement, bare; rows go
to benchmarks/results/curvature.csv. ``trainer``: steps that measure in a Trainer, with the callbacks at their defaults.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from _harness import Bench  # noqa: E402

from lightning_grad.callbacks.lanczos_learning_rate import LanczosLearningRate  # noqa: E402
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


class Model(pl.LightningModule):
    """The network on one batch again and again: no data loading in the times."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def step_times(callbacks: list[pl.Callback], steps: int) -> list[float]:
    """Processor time from the start of each step to that of the next, in a Trainer with a logger."""
    torch.manual_seed(0)
    images, labels = batch_of(64)
    marks: list[float] = []

    class Clock(pl.Callback):
        def on_train_batch_start(self, *args: object) -> None:
            marks.append(time.process_time())

    data = TensorDataset(images.repeat(100, 1, 1, 1), labels.repeat(100))
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=steps + 1, max_epochs=-1, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, logger=CSVLogger(folder),
            callbacks=[Clock(), *callbacks],
        )  # fmt: skip
        trainer.fit(Model(), DataLoader(data, 64))
    return [after - before for before, after in itertools.pairwise(marks)]


def trainers(rounds: int) -> None:
    """Runs at the literal defaults, in turns; the steps that measure against the median of those that do not."""
    early = [2**i - 1 for i in range(11)]  # 0, 1, 3, ..., 1023
    variants: dict[str, tuple[Callable[[], list[pl.Callback]], int, list[int]]] = {
        "plain": (list, 500, []),
        "StabilityMonitor": (lambda: [StabilityMonitor()], 1600, [0, 1500]),
        "LanczosLearningRate": (lambda: [LanczosLearningRate()], 2100, [*early, 2000]),
    }
    step_times([], 100)
    plain: dict[str, list[float]] = {name: [] for name in variants}
    costs: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds):
        names = list(variants)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            make, steps, measured = variants[name]
            times = step_times(make(), steps)
            median = statistics.median(t for step, t in enumerate(times) if step not in measured)
            plain[name].append(median)
            costs[name] += [times[step] / median - 1 for step in measured]
    for name, (make, _, measured) in variants.items():
        text = f"{name}: {1e3 * statistics.median(plain[name]):.2f} ms a step that does not measure"
        if measured:
            low, middle, high = min(costs[name]), statistics.median(costs[name]), max(costs[name])
            interval = make()[0].every_n_steps
            text += (
                f"; a measurement costs {middle:.1f} of them ({low:.1f} to {high:.1f}, {len(costs[name])} times),"
                f" every {interval} steps {100 * middle / interval:.2f} % of training"
            )
            if len(measured) > 2:
                text += (
                    f"; the {len(measured) - 1} in the first {interval} steps {len(measured[:-1]) * middle:.0f} steps"
                )
        print(text, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("products", "parts", "trainer"))
    parser.add_argument("--rounds", type=int, default=3, help="of the runs in a Trainer")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    started = time.perf_counter()
    if options.only in (None, "products"):
        products_to_one_percent()
    if options.only in (None, "parts"):
        cost()
    if options.only in (None, "trainer"):
        trainers(options.rounds)
    print(f"{time.perf_counter() - started:.0f} s")
