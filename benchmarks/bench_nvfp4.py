"""Forward and backward of a linear layer: NVFP4 on the torch backend against float32, on one thread.

    python benchmarks/bench_nvfp4.py [--compile] [--rounds N] [--calls]

The NVFP4 layers run as under the plugin: the weight is quantized once per optimizer step, here once per pass.
``--compile`` adds the compiled passes (the first calls compile for minutes on a slow machine).
``--calls`` shows instead why small layers are dear: operations in a pass, and what a call costs after a product.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from _harness import Bench
from torch import nn

from lightning_grad.nvfp4 import NVFP4Linear
from lightning_grad.nvfp4.linear import Session

SHAPES = ((2048, 1024, 1024), (512, 256, 256))
BARS = {SHAPES[0]: (2.5, 1.5), SHAPES[1]: (4.0, 2.2)}


def make_pass(m: int, k: int, n: int, backend: str | None) -> Callable[[], None]:
    layer = nn.Linear(k, n)
    session = Session(backend=backend or "torch", epoch=0)
    if backend is not None:
        NVFP4Linear.convert(layer, session)
    x, dy = torch.randn(m, k, requires_grad=True), torch.randn(m, n)

    def run() -> None:
        session.epoch = (session.epoch or 0) + 1
        session.step.add_(1)
        x.grad = layer.weight.grad = None
        layer(x).backward(dy)

    return run


def saved_bytes(m: int, k: int, n: int) -> int:
    layer = NVFP4Linear.convert(nn.Linear(k, n))
    total = 0

    def see(t: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += t.numel() * t.element_size() * (t.data_ptr() != layer.weight.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
        layer(torch.randn(m, k, requires_grad=True))
    return total


def operations(run: Callable[[], None]) -> int:
    """Operations that a pass calls, those that operations call included."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        run()
    return sum(event.count for event in profiled.key_averages() if event.key.startswith("aten::"))


def calls_after(before: Callable[[], object], count: int = 3, rounds: int = 200) -> list[float]:
    """Median microseconds of consecutive additions of 128 numbers, behind ``before``."""
    numbers = torch.randn(128)
    times: list[list[float]] = [[] for _ in range(count)]
    for _ in range(rounds):
        before()
        for each in times:
            start = time.perf_counter_ns()
            numbers + numbers
            each.append((time.perf_counter_ns() - start) / 1e3)
    return [statistics.median(each) for each in times]


def calls() -> None:
    m, k, n = SHAPES[1]
    print(f"operations in an eager pass of {m}x{k}x{n}: {operations(make_pass(m, k, n, 'torch'))}")
    a, b, large = torch.randn(m, k), torch.randn(k, n), torch.randn(1 << 23)
    works = {"nothing": lambda: None, "the product": lambda: a @ b, "a copy of 32 MB": large.clone}
    for name, before in works.items():
        print(f"additions after {name}: " + ", ".join(f"{t:.1f}" for t in calls_after(before)) + " us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.calls:
        calls()
        return
    for shape in SHAPES:
        variants = {"float32": make_pass(*shape, None), "NVFP4 eager": make_pass(*shape, "torch")}
        if args.compile:
            variants["NVFP4 compiled"] = make_pass(*shape, "torch+compile")
        bench = Bench("nvfp4", "x".join(map(str, shape)), "float32")
        ratios = bench.run(variants, rounds=args.rounds)
        bench.report()
        for name, bar in zip(list(variants)[1:], BARS[shape], strict=False):
            print(f"{name}: {ratios[name]:.2f} of float32, the bar is {bar}")
        kept = saved_bytes(*shape)
        print(f"kept for backward besides the weight: {kept:,} bytes, {kept / (shape[0] * shape[1]):.4f} per element")


if __name__ == "__main__":
    main()
