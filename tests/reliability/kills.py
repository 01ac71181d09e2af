"""Train in a process of its own, SIGKILL it, start it again, until the run is done.

The processes are forked from a server that has imported torch and Lightning once, so a restart costs a fraction of a
second. They are processes like any other: the kill is the kernel's, nothing of ours runs after it.
"""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import random
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from tests.reliability.runs import Case, fit

PHASES = ("start", "forward", "backward", "update", "after the step", "validation", "saving")
WAIT_S = 60.0


class Progress(ctypes.Structure):
    """Lives in shared memory, so it can be read after the process is dead. Written by rank 0."""

    _fields_ = (("global_step", ctypes.c_int64), ("phase", ctypes.c_int64), ("hooks", ctypes.c_int64))


class Report(pl.Callback):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def mark(self, trainer: pl.Trainer, phase: str) -> None:
        self.progress.phase = PHASES.index(phase)
        self.progress.global_step = trainer.global_step
        self.progress.hooks += 1  # last: who waits for it sees the other two

    def on_train_start(self, trainer, pl_module):
        self.mark(trainer, "start")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.mark(trainer, "forward")

    def on_before_backward(self, trainer, pl_module, loss):
        self.mark(trainer, "backward")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.mark(trainer, "update")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.mark(trainer, "after the step")

    def on_validation_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.mark(trainer, "validation")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.mark(trainer, "saving")


@dataclass(frozen=True)
class Run:
    case: Case
    folder: Path
    steps: int = 40
    every: int = 3
    seed: int = 0
    num_workers: int = 0
    world_size: int = 1


@dataclass
class Outcome:
    weights: dict[str, Tensor]
    #: one entry per kill that fired: optimizer steps taken, phase, hooks passed since that process began
    kills: list[tuple[int, str, int]] = field(default_factory=list)
    resumed_from: list[int] = field(default_factory=list)


def _context() -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lightning.pytorch", "lightning_grad"])
    return context


def _train(run: Run, progress: Progress, rank: int, port: int) -> None:
    log = os.open(run.folder / f"log_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # for the loader's workers; a child of the server would ask it for each
    settings: dict[str, Any] = {}
    if run.world_size > 1:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(run.world_size),
            "LOCAL_RANK": str(rank), "RANK": str(rank), "NODE_RANK": "0",
        }  # fmt: skip
        settings = {"strategy": "ddp", "devices": run.world_size}
    last = run.folder / "last.ckpt"
    weights = fit(
        run.case, run.folder, steps=run.steps, every=run.every, seed=run.seed, num_workers=run.num_workers,
        ckpt_path=last if last.exists() else None, callbacks=(Report(progress),) if rank == 0 else (), **settings,
    )  # fmt: skip
    if rank == 0:
        torch.save(weights, run.folder / "final.pt")


class Attempt:
    """One process (or one per rank), from start to its death or end."""

    def __init__(self, run: Run) -> None:
        context = _context()
        self.run = run
        self.progress = context.Value(Progress, lock=False)  # a killed process would never release a lock
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = [
            context.Process(target=_train, args=(run, self.progress, rank, port)) for rank in range(run.world_size)
        ]
        for process in self.processes:
            process.start()

    def wait_for(self, step: int, phase: str | None) -> None:
        give_up = time.monotonic() + WAIT_S
        wanted = None if phase is None else PHASES.index(phase)
        while self.progress.global_step < step or (wanted is not None and self.progress.phase != wanted):
            if not self.processes[0].is_alive() or time.monotonic() > give_up:
                self.fail(f"never reached step {step}, phase {phase}")
            time.sleep(0.0002)

    def kill(self) -> tuple[int, str, int]:
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: none may notice that another one is dead
            for process in self.processes:
                assert process.pid is not None
                os.kill(process.pid, number)
        for process in self.processes:
            process.join(WAIT_S)
            if process.exitcode != -signal.SIGKILL:
                self.fail(f"ended with {process.exitcode} before the kill")
        return self.progress.global_step, PHASES[self.progress.phase], self.progress.hooks

    def finish(self) -> dict[str, Tensor]:
        for process in self.processes:
            process.join(WAIT_S)
            if process.exitcode != 0:
                self.fail(f"ended with {process.exitcode}")
        weights: dict[str, Tensor] = torch.load(self.run.folder / "final.pt", weights_only=True)
        return weights

    def fail(self, what: str) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
        logs = "\n".join(path.read_text()[-3000:] for path in sorted(self.run.folder.glob("log_*.txt")))
        raise AssertionError(f"{self.run.case.name}: {what}\n{logs}")


def train(run: Run) -> Outcome:
    """The run without interruption, in a process of its own too."""
    run.folder.mkdir(parents=True)
    return Outcome(Attempt(run).finish())


def train_with_kills(run: Run, num_kills: int, rng: random.Random) -> Outcome:
    """Kill at ``num_kills`` random points, every second of them while a checkpoint is being written."""
    run.folder.mkdir(parents=True)
    outcome = Outcome({})
    # room between the targets, so that a kill that comes a little late still has its point for itself
    slots = sorted(rng.sample(range((run.steps - 2 * run.every) // run.every), num_kills))
    for index, slot in enumerate(slots):
        attempt = Attempt(run)
        attempt.wait_for(run.every * (slot + 1) + rng.randrange(run.every), "saving" if index % 2 else None)
        time.sleep(rng.random() * 0.004)
        outcome.kills.append(attempt.kill())
    outcome.weights = Attempt(run).finish()
    return outcome
