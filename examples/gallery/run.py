"""Run every example at full length and write a report: the papers' claims beside our numbers and plots.

    python examples/gallery/run.py [--short] [--only NAME,NAME] [--jobs 2] [--out runs/gallery]

`python3 run.py gallery` does the same and makes the environment first. An example that fails does not stop the others;
the report and the exit status say so.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from lightning_grad.demos.summary import tensorboard_command

sys.path.insert(0, str(Path(__file__).parent))
from report import Outcome, write_report

EXAMPLES = Path(__file__).parents[1]
SHORT = ["--trainer.max_steps=3", "--trainer.limit_val_batches=1"]


class Gallery:
    """Runs examples on threads, one subprocess each at a time."""

    def __init__(self, outcomes: Sequence[Outcome], short: bool) -> None:
        self.outcomes, self.short = outcomes, short
        self.started = time.perf_counter()
        self.running: dict[str, str] = {}  # example -> its command
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.stopped = threading.Event()

    def commands(self, outcome: Outcome) -> dict[str, list[str]]:
        folder, found = EXAMPLES / outcome.name, {}
        if (folder / "config.yaml").exists():
            quiet = ["--trainer.enable_progress_bar=false", *(SHORT if self.short else [])]
            found["fit"] = ["-m", "lightning_grad", "fit", "-c", str(folder / "config.yaml"), *quiet]
        if (folder / "compare.py").exists():
            found["compare"] = [str(folder / "compare.py"), "--out", ".", *(["--short"] if self.short else [])]
        return found

    def run(self, outcome: Outcome) -> None:
        outcome.folder.mkdir(parents=True, exist_ok=True)
        for left in ("compare.png", "outcome.json"):  # of an earlier gallery
            (outcome.folder / left).unlink(missing_ok=True)
        outcome.status = "running"
        for command, arguments in self.commands(outcome).items():
            if self.stopped.is_set():
                outcome.status = "stopped"
                break
            self.running[outcome.name] = command
            began = time.perf_counter()
            with open(outcome.folder / f"{command}.log", "wb") as log:
                process = subprocess.Popen(
                    [sys.executable, *arguments], cwd=outcome.folder, stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, env=environment(),
                )  # fmt: skip
                self.processes.add(process)
                status = process.wait()
                self.processes.discard(process)
            outcome.seconds[command] = time.perf_counter() - began
            if status:
                outcome.status = "stopped" if self.stopped.is_set() else "failed"
                break
        else:
            outcome.status = "passed"
        self.running.pop(outcome.name, None)
        outcome.save(self.short)
        self.say(f"{outcome.name} {outcome.status} after {sum(outcome.seconds.values()):.0f} s")

    def say(self, text: str) -> None:
        now = ", ".join(f"{name} ({command})" for name, command in list(self.running.items()))
        done = sum(outcome.status in ("passed", "failed") for outcome in self.outcomes)
        line = f"{time.perf_counter() - self.started:5.0f} s  {done}/{len(self.outcomes)} done"
        print(line + (f"  {text}" if text else "") + (f"; running: {now}" if now else ""), flush=True)

    def run_all(self, jobs: int, every_s: float = 30.0) -> None:
        order = sorted(self.outcomes, key=lambda outcome: -outcome.entry["seconds"])
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(self.run, outcome) for outcome in order]
            try:
                last = time.perf_counter()
                while not all(future.done() for future in futures):
                    time.sleep(0.2)
                    if time.perf_counter() - last > every_s:
                        last = time.perf_counter()
                        self.say("")
            except KeyboardInterrupt:
                self.stopped.set()
                for future in futures:
                    future.cancel()
                for process in list(self.processes):
                    process.terminate()
        for future in futures:
            if not future.cancelled():
                future.result()  # an error of this file is not an error of an example


def environment() -> dict[str, str]:
    """One thread for each example, since two run side by side; the package is found without being installed, too."""
    path = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}


def entries(only: str | None) -> list[dict[str, Any]]:
    known: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "entries.yaml").read_text(encoding="utf-8"))
    if not only:
        return known
    names = [entry["example"] for entry in known]
    unknown = sorted(set(only.split(",")) - set(names))
    if unknown:
        raise SystemExit(f"--only takes {', '.join(names)}, separated by commas; got {', '.join(unknown)}.")
    return [entry for entry in known if entry["example"] in only.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few steps of each, to see that everything works")
    parser.add_argument("--only", metavar="NAMES", help="comma-separated names of examples")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="examples at the same time")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gallery"), help="folder of the report, its plots and logs"
    )
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    out = options.out.resolve()
    every = {
        entry["example"]: Outcome(
            entry, (EXAMPLES / entry["example"] / "README.md").read_text(encoding="utf-8"), out / entry["example"]
        )
        for entry in entries(None)
    }
    outcomes = [every[entry["example"]] for entry in entries(options.only)]
    work = sum(outcome.entry["seconds"] for outcome in outcomes) / 60 / options.jobs
    if not options.short:
        print(f"{len(outcomes)} examples, {options.jobs} at a time: about {work:.0f} minutes on a quiet machine")
    gallery = Gallery(outcomes, options.short)
    gallery.run_all(options.jobs)
    target = out / "index.html"
    shown = [outcome for outcome in every.values() if outcome in outcomes or outcome.load(options.short)]
    write_report(shown, target, time.perf_counter() - gallery.started, options.short)
    bad = [outcome.name for outcome in outcomes if outcome.status != "passed"]
    print(f"\n{len(outcomes) - len(bad)} of {len(outcomes)} passed" + (f"; not: {', '.join(bad)}" if bad else ""))
    print(f"report: {target}\ncurves: {tensorboard_command()} --logdir {out}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
