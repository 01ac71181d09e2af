"""Forward and backward of a linear layer: NVFP4 on the torch backend against float32, on one thread.

    python benchmarks/bench_nvfp4.py [--compile] [--rounds N]

The NVFP4 layers run as under the plugin: the weight is quantized once per optimizer step, here once per pass.
``--compile`` adds the compiled passes (the first calls compile for minutes on a slow machine).
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
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
