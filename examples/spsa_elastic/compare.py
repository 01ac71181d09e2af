"""An elastic run on one machine: one of three workers is killed, another joins; the survivors have the same bits.

    python examples/spsa_elastic/compare.py [--short] [--out FOLDER]

Prints the table of the README and draws compare.png (with --short: few steps).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_grad import ElasticSPSAStrategy
from lightning_grad.demos import DigitsData, DigitsMLP
from lightning_grad.demos.comparison import comparison_parser, parse_comparison
from lightning_grad.spsa import Journal, digest64, replay
from lightning_grad.spsa.auth import Authenticator
from lightning_grad.spsa.observer import Observer
from lightning_grad.spsa.store import Store

ABSTAINED = (0x7F, 0xFF)
RUN, KEY = "digits", "a key of the example, sixteen bytes or more"
# workers are forks of a process without threads that has imported everything once
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["lightning_grad.demos.comparison", "lightning_grad.strategies"])


def base_model() -> DigitsMLP:
    """The weights every worker starts from."""
    pl.seed_everything(0, verbose=False)
    return DigitsMLP(hidden=32)


def work(port: int, steps: int, out: Path) -> None:
    """One worker, in a process of its own; what it says goes to a file."""
    log = os.open(out.with_suffix(".log"), os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["LIGHTNING_GRAD_SPSA_KEY"] = KEY
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


def run(steps: int) -> tuple[Journal, dict[int, dict[str, int]]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    store = Store(f"127.0.0.1:{port}", RUN, serve=True)
    watching = Observer(store, Authenticator(RUN, KEY.encode()))
    workers: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def start(number: int) -> None:
            (folder / f"{number}.log").touch()
            workers[number] = FORK.Process(target=work, args=(port, steps, folder / f"{number}.json"), daemon=True)
            workers[number].start()

        def check() -> None:
            for number, process in workers.items():
                if process.exitcode:
                    said = (folder / f"{number}.log").read_text().splitlines()[-10:]
                    raise SystemExit("\n".join([f"worker {number} ended with status {process.exitcode}:", *said]))

        def follow(upto: int) -> None:
            while len(watching.journal or ()) < upto and not watching.finished:
                watching.poll(0.05)
                check()

        for number in range(3):
            start(number)
        follow(steps // 4)
        workers.pop(1).kill()
        follow(steps // 2)
        start(3)
        follow(steps)
        for process in workers.values():
            process.join()
        check()
        found = {number: json.loads((folder / f"{number}.json").read_text()) for number in sorted(workers)}
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
    parser.add_argument("--steps", type=int, default=1000, help="steps of the run")
    args = parse_comparison(parser, __file__)
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
