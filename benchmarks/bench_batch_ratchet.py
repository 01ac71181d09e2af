"""What it costs that the batch may not shrink: the batch reached on a problem whose right answer is known.

``python benchmarks/bench_batch_ratchet.py [--runs 30] [--tests 400]``

Linear regression with Gaussian inputs and frozen weights. The closed form says which batch the norm test with
``eta=0.5`` should ask for; each run starts from 8 samples, tests the gradient of every batch, and takes the answer as
the next batch. Printed: mean over runs, and standard deviation, of the mean batch of the last quarter. Not timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_grad.allocation.batch_size import BatchSizeController, NormTest
from lightning_grad.statistics.gradient_noise import GradStats

ETA = 0.5
SPECTRUM = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25, 0.125], dtype=torch.float64)
ERROR = torch.tensor([0.3, -0.2, 0.5, 0.4, -0.6, 0.8], dtype=torch.float64)  # weights minus the right ones
NOISE = 0.49  # variance of the targets

PAPER: dict[str, Any] = {"denominator": "biased", "ema": 0.0, "max_growth": None, "min_change": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults and allow_decrease: true": {"allow_decrease": True},
    "defaults": {},
    "denominator: biased": {"denominator": "biased"},
    "ema: 0.99": {"ema": 0.99},
    "ema: 0": {"ema": 0.0},
    "ema: 0 and allow_decrease: true": {"ema": 0.0, "allow_decrease": True},
    "preset: paper": PAPER,
}


def right_answer() -> float:
    """The target of the norm test on the whole population: ``tr Sigma / (eta^2 ||G||^2)``."""
    gradient = SPECTRUM * ERROR
    signal = float(gradient.square().sum())
    residual = float((ERROR * gradient).sum()) + NOISE
    return (residual * float(SPECTRUM.sum()) + signal) / (ETA**2 * signal)


def reached(seed: int, tests: int, settings: dict[str, Any]) -> float:
    gen = torch.Generator().manual_seed(seed)
    controller = BatchSizeController(NormTest(ETA), 4096, 2, **settings)
    batch, seen = 8, []
    for _ in range(tests):
        x = torch.randn(batch, len(SPECTRUM), generator=gen, dtype=torch.float64) * SPECTRUM.sqrt()
        noise = torch.randn(batch, generator=gen, dtype=torch.float64) * NOISE**0.5
        decision = controller.decide(GradStats.from_samples(x * (x @ ERROR + noise)[:, None]), batch)
        assert decision is not None
        batch = decision.batch_size
        seen.append(batch)
    return statistics.mean(seen[-(tests // 4) :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--tests", type=int, default=400)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"right answer: {right_answer():.1f}")
    print("| settings | batch reached | standard deviation |\n|---|---|---|")
    for name, settings in SETTINGS.items():
        ends = [reached(seed, args.tests, settings) for seed in range(args.runs)]
        print(f"| `{name}` | {statistics.mean(ends):.1f} | {statistics.stdev(ends):.1f} |", flush=True)


if __name__ == "__main__":
    main()
