"""What measuring the gradient noise adds to a training step.

``python benchmarks/bench_adaptive_batch.py [--rounds 12] [--samples 8] [--length 64] [--only step|trainer]``

The step of a 10.8 M-parameter byte transformer (forward, backward, fused AdamW), with and without the statistics of a
test. "test step" is one that measures; its cost is also given per step at the default interval (2 for micro-batches, 8
for ghost norms, 50 for vmap). The last two variants are the same step in a Trainer, without the callback and with it at
its defaults: the median of the ratios of the times of whole intervals.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from _harness import Bench, interleave  # noqa: E402

from lightning_grad.allocation.batch_size import BatchSizeController, NormTest  # noqa: E402
from lightning_grad.callbacks import AdaptiveBatchSize  # noqa: E402
from lightning_grad.callbacks._batch_probe import AUTO_INTERVAL  # noqa: E402
from lightning_grad.callbacks._step_loss import step_loss  # noqa: E402
from lightning_grad.demos import TinyGPT  # noqa: E402
from lightning_grad.statistics.collector import NoiseCollector  # noqa: E402
from lightning_grad.statistics.sample_grads import per_sample_grads  # noqa: E402


def make_model() -> TinyGPT:
    torch.manual_seed(0)
    model = TinyGPT(num_layers=6, dim=384, num_heads=6, block_size=128)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return model


def step_function(
    batch: tuple[Tensor, Tensor], accumulate: int, estimator: str | None, names: list[str] | None = None
) -> Callable[[], None]:
    """One optimizer step on ``batch`` in ``accumulate`` parts, measured or not."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    controller = BatchSizeController(NormTest(0.5), 4096)
    names = [n for n, _ in model.named_parameters()] if names is None else names
    collector = NoiseCollector(model, names, frozenset(), step_loss(model))
    parts = list(zip(*(t.chunk(accumulate) for t in batch), strict=True))

    def step() -> None:
        optimizer.zero_grad()
        if estimator is not None:
            collector.begin(estimator)  # type: ignore[arg-type]
        for part in parts:
            if estimator is not None:
                collector.before_forward(part, len(part[0]))
            (model.training_step(part, 0) / accumulate).backward()
            if estimator is not None:
                collector.after_backward(accumulate)
        if estimator is not None:
            controller.decide(collector.finish(), len(batch[0]))
        optimizer.step()

    return step


class Steps:
    """The optimizer steps of a Trainer, one at a time, so that two Trainers can be interleaved: each in a thread."""

    def __init__(self, batch: tuple[Tensor, Tensor], accumulate: int, callbacks: list[pl.Callback]) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        thread = threading.Thread(target=self._fit, args=(batch, accumulate, callbacks), daemon=True)
        thread.start()

    def _fit(self, batch: tuple[Tensor, Tensor], accumulate: int, callbacks: list[pl.Callback]) -> None:
        go, done = self.go, self.done

        class Pause(pl.Callback):
            def on_train_start(self, *args: Any) -> None:
                go.acquire()

            def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
                if trainer.fit_loop.batch_idx % accumulate == accumulate - 1:
                    done.release()
                    go.acquire()

        torch.set_num_threads(1)
        rows = len(batch[0]) // accumulate
        data = torch.utils.data.TensorDataset(*(t.repeat(200, 1) for t in batch))
        loader = torch.utils.data.DataLoader(data, batch_size=rows)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=-1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=accumulate,
            callbacks=[*callbacks, Pause()],
        )  # fmt: skip
        trainer.fit(make_model(), loader)

    def __call__(self) -> None:
        self.go.release()
        self.done.acquire()


def reference(batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """The published way: a copy of the model and per-sample gradients by vmap on every tested batch."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model.training_step(batch, 0).backward()
        twin = copy.deepcopy(model)
        for grads in per_sample_grads(step_loss(twin), dict(twin.named_parameters()), batch, memory_mb=1024):
            _ = sum(g.var(0).sum() for g in grads.values())
        optimizer.step()

    return step


def step_variants(batch: tuple[Tensor, Tensor]) -> Iterator[tuple[str, dict[str, Callable[[], None]]]]:
    yield "k=2", {"plain": step_function(batch, 2, None), "micro_batch": step_function(batch, 2, "micro_batch")}
    yield (
        "k=1",
        {
            "plain": step_function(batch, 1, None),
            "ghost": step_function(batch, 1, "ghost", layers()),
            "vmap": step_function(batch, 1, "vmap"),
            "reference (copy + vmap)": reference(batch),
        },
    )


def layers() -> list[str]:
    """What ghost norms can measure: the position table is looked up once for the whole batch."""
    return [n for n, _ in make_model().named_parameters() if n != "position.weight"]


def compare_steps(batch: tuple[Tensor, Tensor], shape: str, rounds: int) -> None:
    for name, functions in step_variants(batch):
        bench = Bench("adaptive_batch", f"{shape}, {name}, test step", "plain")
        ratios = bench.run(functions, rounds=rounds, warmup=2)
        bench.report()
        for variant in functions.keys() & AUTO_INTERVAL.keys():
            each, interval = (ratios[variant] - 1) / AUTO_INTERVAL[variant], AUTO_INTERVAL[variant]
            print(f"{variant}: {each:+.1%} of a step at the default interval of {interval}")


def compare_trainers(batch: tuple[Tensor, Tensor], shape: str, rounds: int) -> None:
    for k, interval in ((2, AUTO_INTERVAL["micro_batch"]), (1, AUTO_INTERVAL["ghost"])):
        callback = AdaptiveBatchSize(4096, scope="all" if k > 1 else layers(), monitor_only=True)
        functions = {"no callback": Steps(batch, k, []), "AdaptiveBatchSize": Steps(batch, k, [callback])}
        times = interleave(functions, rounds=rounds // interval * interval, warmup=2)
        sums = {
            name: [sum(each[i : i + interval]) for i in range(0, len(each), interval)] for name, each in times.items()
        }
        pairs = zip(sums["AdaptiveBatchSize"], sums["no callback"], strict=True)
        ratios = sorted(mine / theirs for mine, theirs in pairs)
        print(
            f"{shape}, Trainer, k={k}: median ratio {statistics.median(ratios):.3f} with the callback"
            f" ({ratios[0]:.3f} to {ratios[-1]:.3f}, {len(ratios)} intervals of {interval} steps)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--only", choices=("step", "trainer"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    gen = torch.Generator().manual_seed(0)
    size = (args.samples, args.length)
    batch = (torch.randint(0, 256, size, generator=gen), torch.randint(0, 256, size, generator=gen))
    shape = f"10.8M transformer, {args.samples}x{args.length}"
    if args.only != "trainer":
        compare_steps(batch, shape, args.rounds)
    if args.only != "step":
        compare_trainers(batch, shape, 4 * args.rounds)


if __name__ == "__main__":
    main()
