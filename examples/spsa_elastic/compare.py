"""An elastic run on one machine: one of three workers is killed, another joins; the survivors have the same bits.

    python examples/spsa_elastic/compare.py [--short] [--out FOLDER]

Prints the table of the README and draws compare.png (with --short: few steps).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_grad import ElasticSPSAStrategy
from lightning_grad.demos import DigitsData, DigitsMLP
from lightning_grad.demos.comparison import comparison_parser, parse_comparison
from lightning_grad.spsa import Journal, digest64, replay
from lightning_grad.spsa.auth import Authenticator
from lightning_grad.spsa.observer import Observer
from lightning_grad.spsa.store import Store

HERE = Path(__file__).parent
ABSTAINED = (0x7F, 0xFF)
RUN, KEY = "digits", "LIGHTNING_GRAD_SPSA_KEY"


def base_model() -> DigitsMLP:
    """The weights every worker starts from."""
    pl.seed_everything(0, verbose=False)
    return DigitsMLP(hidden=32)


def work(port: int, steps: int, out: Path) -> None:
    """One worker, in a process of its own."""
    model = base_model()
    strategy = ElasticSPSAStrategy(
        run_id=RUN,
        store=f"127.0.0.1:{port}",
        lr=2e-2,
        lr_schedule="linear",
        total_steps=steps,
        directions=4,
        normalize=True,
        min_workers=3,
        step_timeout=1.0,
        check_interval=50,
    )
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=DigitsData(seed=port))
    out.write_text(json.dumps({"digest": digest64(model.parameters()), "own_steps": trainer.global_step}))


class Nursery:
    """A process that has imported everything once and forks the workers."""

    def __init__(self, port: int, steps: int, folder: Path) -> None:
        words = ["--nursery", str(port), "--steps", str(steps), "--out", str(folder)]
        root = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "compare.py"), *words],
            env={**os.environ, "PYTHONPATH": root},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def order(self, what: str, number: int) -> None:
        print(what, number, file=self._process.stdin, flush=True)

    def wait(self) -> None:
        self._process.communicate()

    @staticmethod
    def serve(port: int, steps: int, folder: Path) -> None:
        children: dict[str, int] = {}
        for line in sys.stdin:
            what, number = line.split()
            if what == "kill":
                os.kill(children[number], signal.SIGKILL)
                continue
            children[number] = os.fork()
            if children[number] == 0:
                try:
                    work(port, steps, folder / f"{number}.json")
                finally:
                    os._exit(0)
        for child in children.values():
            os.waitpid(child, 0)


def run(steps: int) -> tuple[Journal, dict[int, dict[str, int]]]:
    os.environ[KEY] = "a key of the example, sixteen bytes or more"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    store = Store(f"127.0.0.1:{port}", RUN, serve=True)
    watching = Observer(store, Authenticator.from_environment(RUN, KEY))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def follow() -> None:
            while not watching.finished:
                watching.poll(0.5)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        nursery = Nursery(port, steps, folder)
        for number in range(3):
            nursery.order("start", number)

        def wait_for(step: int) -> None:
            while watching.journal is None or len(watching.journal) < step:
                time.sleep(0.01)

        wait_for(steps // 4)
        nursery.order("kill", 1)
        wait_for(steps // 2)
        nursery.order("start", 3)
        nursery.wait()
        thread.join()
        found = {n: json.loads((folder / f"{n}.json").read_text()) for n in (0, 2, 3)}
    assert watching.journal is not None
    return watching.journal, found


def accuracy(model: DigitsMLP) -> float:
    data = DigitsData()
    data.setup("fit")
    model.eval()
    with torch.no_grad():
        hits = [(model(x).argmax(1) == y).float() for x, y in data.val_dataloader()]
    return float(torch.cat(hits).mean())


def main() -> None:
    parser = comparison_parser(__doc__)
    parser.add_argument("--nursery", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=1000, help="steps of the run")
    args = parse_comparison(parser, __file__)
    if args.nursery:
        Nursery.serve(args.nursery, args.steps, args.out)
        return
    import matplotlib.pyplot as plt

    journal, found = run(40 if args.short else args.steps)
    steps = len(journal)
    per_worker = journal.header.directions
    answers = [sum(code not in ABSTAINED for code in record.codes) / per_worker for record in journal]
    points = sorted({steps * i // 8 for i in range(9)})
    curve = []
    for point in points:
        model = base_model()
        engine = replay(model.named_parameters(), journal, point)
        curve.append(accuracy(model))
    digest = engine.digest64()
    print(f"{'worker':22s} {'own steps':>9s} {'digest':>18s}")
    for number, row in sorted(found.items()):
        name = f"{number}{' (joined late)' if number == 3 else ''}"
        print(f"{name:22s} {row['own_steps']:9d}   {row['digest']:016x}")
    print(f"{'1 (killed)':22s} {'-':>9s}   -")
    print(f"{'replay of the journal':22s} {steps:9d}   {digest:016x}")
    assert {row["digest"] for row in found.values()} == {digest}, "the replicas differ"
    print(f"validation accuracy {curve[0]:.3f} -> {curve[-1]:.3f}; journal {journal.num_bytes} bytes")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    axes[0].plot(points, curve, "o-")
    axes[0].set(xlabel="step", title="validation accuracy, replayed from the journal")
    axes[1].step(range(steps), answers, where="post")
    axes[1].set(xlabel="step", title="workers that answered", ylim=(0, 4))
    figure.tight_layout()
    figure.savefig(args.plot, dpi=110)


if __name__ == "__main__":
    main()
