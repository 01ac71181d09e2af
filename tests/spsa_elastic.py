"""Elastic runs in real processes, with faults that are counted."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_grad.spsa import commands
from lightning_grad.spsa.auth import Authenticator
from lightning_grad.spsa.elastic import ElasticOptions, ElasticWorker, Schedule
from lightning_grad.spsa.errors import StoreLostError
from lightning_grad.spsa.options import Options
from lightning_grad.spsa.session import Session
from lightning_grad.spsa.store import Store
from tests.spsa_helpers import batches, loss_of, tiny_model

# Children come from a server without threads that has imported everything: a fork of this process could inherit a lock
# that a thread of a store or of gloo holds.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["tests.spsa_elastic", "tests.spsa_lightning"])
RUN = "test-run"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Plan:
    """What happens to one worker, and when it starts."""

    kill: tuple[str, int] | None = None
    """At this point of the first step from the given one on that gets there (only a proposer gets to "built")."""
    pause: tuple[int, float] | None = None
    nan: frozenset[int] = frozenset()
    leave: int | None = None
    start_at: int = 0
    """Start when the run has reached this step."""
    vote_stop: int | None = None
    corrupt: int | None = None
    """Flip a weight after this step."""


@dataclass
class Run:
    """A store in this process and workers in children."""

    folder: Path
    port: int = field(default_factory=free_port)
    total_steps: int = 40
    key: bytes | None = None
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    step_s: float = 0.01

    def __post_init__(self) -> None:
        self.results = FORK.Queue()
        self.fired = FORK.Array("i", 64)
        self.processes: list[Any] = []
        self.plans: list[Plan] = []
        self.store: Store | None = None

    def serve(self) -> Store:
        self.store = Store(f"127.0.0.1:{self.port}", RUN, serve=True)
        return self.store

    def start(self, plan: Plan | None = None) -> int:
        """Start a worker; returns its number."""
        number = len(self.processes)
        shared = {"port": self.port, "folder": self.folder, "total_steps": self.total_steps, "key": self.key}
        shared |= {"options": self.options, "settings": self.settings, "step_s": self.step_s}
        shared |= {"results": self.results, "fired": self.fired}
        process = FORK.Process(target=_work, args=(Child(number=number, **shared), plan or Plan()), daemon=True)
        self.plans.append(plan or Plan())
        self.processes.append(process)
        process.start()
        return number

    def wait_for_step(self, step: int, timeout_s: float = 30.0) -> None:
        assert self.store is not None
        assert self.store.wait([f"r/{step}"], timeout_s), f"the run did not reach step {step}"

    def finish(self, timeout_s: float = 45.0) -> dict[int, dict[str, Any]]:
        """Results of the workers that ended by themselves, by number."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.1))
        stuck = [i for i, p in enumerate(self.processes) if p.is_alive()]
        for i in stuck:
            os.kill(self.processes[i].pid, signal.SIGKILL)
        assert not stuck, f"workers {stuck} did not end"
        found = {}
        while not self.results.empty():
            result = self.results.get()
            found[result["number"]] = result
        return found

    def num_fired(self) -> int:
        return sum(self.fired)


@dataclass
class Child:
    """What a worker process knows of its run."""

    number: int
    port: int
    folder: Path
    total_steps: int
    key: bytes | None
    options: dict[str, Any]
    settings: dict[str, Any]
    step_s: float
    results: Any
    fired: Any

    def session(self) -> Session:
        settings = {"check_interval": 5, "normalize": True, "seed": 5, **self.settings}
        return Session(Options(**settings), tiny_model(), 1, RUN)

    def train(self, plan: Plan) -> dict[str, Any]:
        number = self.number
        data = batches(64, seed=100 + number)
        store = Store(f"127.0.0.1:{self.port}", RUN)
        if plan.start_at:
            store.wait([f"r/{plan.start_at}"], 60)
        session = self.session()
        worker = ElasticWorker(
            store,
            session,
            Schedule(2.0**-7, self.total_steps, "linear"),
            ElasticOptions(**{"step_timeout": 1.0, "join_timeout": 30.0, **self.options}),
            Authenticator(RUN, self.key),
            rescue=self.folder / f"rescue{number}.spsa",
        )

        def at(point: str, step: int) -> None:
            if plan.kill is not None and point == plan.kill[0] and step >= plan.kill[1]:
                self.fired[number] += 1
                os.kill(os.getpid(), signal.SIGKILL)

        worker.at = at
        result: dict[str, Any] = {}
        try:
            worker.join()
            while worker.prepare():
                step = worker.step
                if plan.leave is not None and step >= plan.leave:
                    self.fired[number] += 1
                    break
                if plan.pause is not None and step >= plan.pause[0]:
                    self.fired[number] += 1
                    time.sleep(plan.pause[1])
                    plan.pause = None
                at("measuring", step)
                time.sleep(self.step_s)
                bad = step in plan.nan
                self.fired[number] += bad
                session.measure(
                    worker.worker,
                    lambda b=data[step % 64], bad=bad: (
                        torch.tensor(float("nan")) if bad else loss_of(session.module, b)
                    ),
                )
                worker.finish(stop=plan.vote_stop is not None and step >= plan.vote_stop)
                if plan.corrupt is not None and step >= plan.corrupt:
                    self.fired[number] += 1
                    plan.corrupt = None
                    session.engine.params[0].detach()[0, 0] += 1.0
            worker.leave()
        except StoreLostError as error:
            result["lost"] = str(error)
        result |= {
            "digest": session.engine.digest64(), "step": worker.step, "journal": session.journal.to_bytes(),
            "worker": worker.worker, "stale": worker.stale, "missed": worker.missed, "replayed": worker.replayed,
            "rejected": worker.rejected, "stopped": worker.stopped,
        }  # fmt: skip
        return result


def start_store_command(port: int, journal: Path, also: Sequence[Path] = ()) -> Any:
    """`lightning-grad spsa store` in a process of its own."""
    words = ["store", "--port", str(port), "--run-id", RUN, "--journal", str(journal), "--until-finished"]
    words += ["--also", *map(str, also)] if also else []
    process = FORK.Process(target=commands.main, args=(words,), daemon=True)
    process.start()
    return process


def _work(child: Child, plan: Plan) -> None:
    torch.set_num_threads(1)
    result: dict[str, Any] = {"number": child.number}
    try:
        result |= child.train(plan)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    child.results.put(result)
