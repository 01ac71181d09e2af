"""Timing that survives a noisy machine: interleaved variants, medians, quantiles, and the floor they are compared with.

A benchmark is a dict of variants, each a function without arguments::

    bench = Bench("optimizers", shape="50 x 200k", baseline="AdamW fused")
    bench.run({"AdamW fused": step_a, "DiffGrad": step_b}, bytes_moved={"AdamW fused": 280e6, "DiffGrad": 360e6})
    bench.report()

Every round calls every variant once, in an order that rotates, so that drift hits all alike; ratios are taken within a
round. On CPU the clock counts the processor time of the process, which other programs on the machine do not add to.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One line of the CSV file and of the table. Times in milliseconds; ``ratio`` is to the baseline, per round."""

    what: str
    variant: str
    shape: str
    dtype: str
    device: str
    torch: str
    threads: int
    rounds: int
    median_ms: float
    q20_ms: float
    q80_ms: float
    ratio: float
    ratio_q20: float
    ratio_q80: float
    bytes_moved: int  # 0: not known
    floor_fraction: float  # bytes / copy bandwidth / median; 1 is the best possible, 0: not known


def quantile(values: list[float], q: float) -> float:
    """The ``q`` quantile, by linear interpolation."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def interleave(
    variants: Mapping[str, Callable[[], object]], rounds: int = 30, warmup: int = 3, device: str = "cpu"
) -> dict[str, list[float]]:
    """Milliseconds of every variant in every round.

    Args:
        variants: Name and function; called ``warmup + rounds`` times.
        rounds: Rounds that count.
        warmup: Calls of each variant before.
        device: ``"cpu"``: processor time is measured; else wall time between synchronizations.
    """
    clock = time.process_time_ns if device == "cpu" else time.perf_counter_ns
    for function in variants.values():
        for _ in range(warmup):
            function()
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            synchronize(device)
            start = clock()
            variants[name]()
            synchronize(device)
            times[name].append((clock() - start) / 1e6)
    return times


def copy_bandwidth(device: str = "cpu", megabytes: int = 256, repeats: int = 7) -> float:
    """Bytes per second that a copy moves (read plus written), median: the ceiling of any memory-bound step."""
    source = torch.empty(megabytes * 1_000_000 // 4, device=device)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, repeats, 2, device)["copy"]
    return 2 * source.numel() * 4 / (statistics.median(times) / 1e3)


class Bench:
    """Variants of one question, timed together.

    Args:
        what: Names the CSV file ``results/WHAT.csv``.
        shape: Describes the input.
        baseline: The variant that ratios are to.
        dtype: Of the data.
        device: Where it runs.
    """

    def __init__(self, what: str, shape: str, baseline: str, dtype: str = "float32", device: str = "cpu") -> None:
        self.what, self.shape, self.baseline, self.dtype, self.device = what, shape, baseline, dtype, device
        self.rows: list[Row] = []

    def run(
        self,
        variants: Mapping[str, Callable[[], object]],
        bytes_moved: Mapping[str, float] | None = None,
        bandwidth: float = 0.0,
        rounds: int = 30,
        warmup: int = 3,
    ) -> dict[str, float]:
        """Time the variants; returns the median ratio of each to the baseline.

        Args:
            variants: As for :func:`interleave`; the baseline must be one of them.
            bytes_moved: Bytes that each variant must move at least, where known.
            bandwidth: From :func:`copy_bandwidth`.
            rounds: Rounds that count.
            warmup: Calls before.
        """
        times = interleave(variants, rounds, warmup, self.device)
        for name, values in times.items():
            ratios = [value / base for value, base in zip(values, times[self.baseline], strict=True)]
            median, moved = statistics.median(values), int((bytes_moved or {}).get(name, 0))
            floor = moved / bandwidth / (median / 1e3) if bandwidth and moved else 0.0
            row = Row(
                what=self.what,
                variant=name,
                shape=self.shape,
                dtype=self.dtype,
                device=self.device,
                torch=torch.__version__,
                threads=torch.get_num_threads(),
                rounds=rounds,
                median_ms=round(median, 4),
                q20_ms=round(quantile(values, 0.2), 4),
                q80_ms=round(quantile(values, 0.8), 4),
                ratio=round(statistics.median(ratios), 3),
                ratio_q20=round(quantile(ratios, 0.2), 3),
                ratio_q80=round(quantile(ratios, 0.8), 3),
                bytes_moved=moved,
                floor_fraction=round(floor, 3),
            )
            self.rows.append(row)
        return {row.variant: row.ratio for row in self.rows}

    def report(self) -> None:
        """Print the table and append the rows to ``benchmarks/results/WHAT.csv``."""
        print(f"\n{self.what}: {self.shape}, {self.dtype}, {self.device}, {torch.get_num_threads()} thread(s)")
        print(f"{'variant':40s} {'median ms':>10s} {'20%':>8s} {'80%':>8s} {'ratio':>7s} {'of floor':>9s}")
        for r in self.rows:
            floor = f"{r.floor_fraction:9.2f}" if r.floor_fraction else f"{'':9s}"
            print(f"{r.variant:40s} {r.median_ms:10.3f} {r.q20_ms:8.3f} {r.q80_ms:8.3f} {r.ratio:7.2f} {floor}")
        write_rows(self.what, self.rows)


def write_rows(what: str, rows: list[Row]) -> None:
    """Append rows to ``benchmarks/results/WHAT.csv``, with a header if the file is new."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{what}.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
