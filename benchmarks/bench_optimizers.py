"""Step time of our optimizers next to torch's AdamW and the same algorithms in pytorch-optimizer.

``python benchmarks/bench_optimizers.py [--case large|small|all] [--rounds 20] [--others] [--no-compile]``

- large: 50 tensors of 200,000, as (400, 500)
- small: 1000 tensors, 0.27 M parameters: vectors, small matrices and small convolutions

One thread. The gradients are random, so AdamP and SGDP find nearly all weights not scale invariant; the variants marked
"projected" use ``delta=1e9``, which projects every weight. ``--others``: the optimizers without such a counterpart.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from _harness import Bench, copy_bandwidth  # noqa: E402

from lightning_grad.optim import (  # noqa: E402
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

SHAPES = {
    "large": [(400, 500)] * 50,
    "small": [(16,), (16, 16), (32, 16), (8, 4, 3, 3)] * 250,
}
# float32 words per parameter that must move in a step
WORDS = {
    "AdamW": 7, "DiffGrad": 9, "AdamP": 10, "SGDP": 6, "AdaGradNorm": 4, "NormalizedGD": 4, "OptimisticOMD": 6,
    "OptimisticFTRL": 8, "OptimisticAdam": 9, "PSGLD": 5, "SGLD": 3, "SGHMC": 5,
}  # fmt: skip
OURS: dict[str, Callable[..., Optimizer]] = {
    "DiffGrad": DiffGrad,
    "AdamP": AdamP,
    "SGDP": partial(SGDP, momentum=0.9),
}


OTHERS: dict[str, Callable[..., Optimizer]] = {
    "AdaGradNorm": AdaGradNorm,
    "NormalizedGD": NormalizedGD,
    "OptimisticOMD": OptimisticOMD,
    "OptimisticFTRL": lambda params, lr, weight_decay: OptimisticFTRL(params, lr=lr),
    "OptimisticAdam": OptimisticAdam,
    "SGLD": partial(SGLD, n_data=50000),
    "PSGLD": partial(PSGLD, n_data=50000),
    "SGHMC": partial(SGHMC, n_data=50000),
}


def make_step(factory: Callable[..., Optimizer], shapes: list[tuple[int, ...]], device: str, **kwargs: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    params: list[Tensor] = []
    for shape in shapes:
        params.append(torch.randn(shape, generator=generator).to(device).requires_grad_())
        params[-1].grad = torch.randn(shape, generator=generator).to(device)
    return factory(params, lr=1e-4, weight_decay=1e-2, **kwargs).step


def third_party(name: str, shapes: list[tuple[int, ...]], device: str, compiled: bool) -> dict[str, Any]:
    try:
        import pytorch_optimizer
    except ModuleNotFoundError:
        print("pytorch-optimizer is not installed: no comparison with it")
        return {}
    cls = getattr(pytorch_optimizer, name)
    more = {"momentum": 0.9} if name == "SGDP" else {}
    modes: dict[str, dict[str, Any]] = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}}
    if compiled and name == "DiffGrad":  # the other two fail in the compiler on CPU
        modes["compiled"] = {"foreach": True, "compile": True}
    steps = {}
    for mode, switches in modes.items():
        try:
            step = make_step(cls, shapes, device, **more, **switches)
            step()
        except Exception as error:
            print(f"pytorch-optimizer {name} {mode}: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
            continue
        steps[f"pytorch-optimizer {name} {mode}"] = step
    return steps


def variants(shapes: list[tuple[int, ...]], device: str, compiled: bool, others: bool) -> dict[str, Any]:
    steps = {
        "AdamW fused": make_step(AdamW, shapes, device, fused=True),
        "AdamW for-loop": make_step(AdamW, shapes, device, foreach=False),
        "AdamW foreach": make_step(AdamW, shapes, device, foreach=True),
    }
    if others:
        return steps | {name: make_step(factory, shapes, device) for name, factory in OTHERS.items()}
    for name, factory in OURS.items():
        steps[name] = make_step(factory, shapes, device)
        if compiled:
            steps[f"{name} compiled"] = make_step(factory, shapes, device, compile=True)
        if name != "DiffGrad":
            steps[f"{name} projected"] = make_step(factory, shapes, device, delta=1e9)
            if compiled:
                steps[f"{name} projected compiled"] = make_step(factory, shapes, device, delta=1e9, compile=True)
        steps |= third_party(name, shapes, device, compiled)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=(*SHAPES, "all"), default="all")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--others", action="store_true")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    bandwidth = copy_bandwidth(args.device)
    print(f"copy bandwidth: {bandwidth / 1e9:.1f} GB/s")
    for case, shapes in SHAPES.items():
        if args.case not in (case, "all"):
            continue
        count = sum(torch.Size(shape).numel() for shape in shapes)
        steps = variants(shapes, args.device, args.compile, args.others)
        words = {name: next(w for key, w in WORDS.items() if key in name) for name in steps}
        moved = {name: 4.0 * count * words[name] for name in steps}
        bench = Bench("optimizers", f"{len(shapes)} tensors, {count / 1e6:.2f} M", "AdamW fused", device=args.device)
        bench.run(steps, moved, bandwidth, args.rounds)
        bench.report()


if __name__ == "__main__":
    main()
