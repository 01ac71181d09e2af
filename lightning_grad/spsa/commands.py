"""The commands ``lightning-grad spsa inspect | verify | replay | store``."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from lightning_grad.spsa.errors import JournalError, SPSAConfigError, SPSAError
from lightning_grad.spsa.journal import MAGIC, Journal
from lightning_grad.spsa.replayer import Progress, replay
from lightning_grad.spsa.rule import UpdateRule
from lightning_grad.spsa.session import journal_of

_GRACE_S = 5.0


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (1: the input is damaged or does not fit, in one line on stderr)."""
    options = _parser().parse_args(args)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        status: int = options.run(options)
    except (SPSAError, OSError, ModuleNotFoundError) as error:
        print(f"lightning-grad spsa: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-grad spsa", description="Journals and stores of shared-seed SPSA runs."
    )
    commands = parser.add_subparsers(required=True)
    inspect = commands.add_parser("inspect", help="print what a journal says")
    inspect.set_defaults(run=_inspect)
    verify = commands.add_parser("verify", help="replay a journal and compare its digests")
    verify.set_defaults(run=_verify)
    rebuild = commands.add_parser("replay", help="rebuild the weights of a run")
    rebuild.set_defaults(run=_replay)
    serve = commands.add_parser("store", help="serve an elastic run and keep its journal")
    serve.set_defaults(run=_store)
    serve.add_argument("--host", default="127.0.0.1", help="address to serve at; the store has no encryption")
    serve.add_argument("--port", type=int, default=29777)
    serve.add_argument("--run-id", help="name of the run; not needed with an existing journal")
    serve.add_argument("--journal", type=Path, help="file to keep; an existing one starts the run again where it ends")
    serve.add_argument(
        "--also",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="journals of workers: a store that was killed may be some records behind them; the longest is continued",
    )
    serve.add_argument("--auth-key-env", default="LIGHTNING_GRAD_SPSA_KEY", help="environment variable with the key")
    serve.add_argument("--until-finished", action="store_true", help="exit some seconds after the last step")
    for command in (inspect, verify, rebuild):
        command.add_argument("--journal", required=True, type=Path, help="journal file, or a checkpoint that holds one")
    for command in (verify, rebuild):
        command.add_argument(
            "--base", required=True, type=Path, help="weights before the run: .ckpt, .safetensors or .pt"
        )
        command.add_argument("--upto", type=int, help="use this many records only")
        command.add_argument("--kernel", default="auto", choices=("auto", "numpy", "torch", "triton"))
        command.add_argument("--no-progress", action="store_true", help="no progress bar")
    rebuild.add_argument("--out", required=True, type=Path, help=".safetensors, or a Lightning checkpoint")
    rebuild.add_argument("--no-verify", action="store_true", help="do not compare digests")
    return parser


def load_journal(path: Path) -> Journal:
    """Journal of a file, or of a Lightning checkpoint of an SPSA run."""
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            return Journal.load(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return journal_of(checkpoint["optimizer_states"][0]["spsa"])
    except JournalError:
        raise
    except (KeyError, IndexError, TypeError, UnpicklingError) as error:
        raise JournalError(f"{path}: neither a journal nor a checkpoint of an SPSA run.") from error
    except Exception as error:
        raise JournalError(f"{path}: not an SPSA journal ({type(error).__name__}).") from error


def load_base(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict of a file, and the checkpoint around it (empty for other files).

    Raises:
        SPSAConfigError: There are no weights in it, or objects that are not loaded from a file one may not trust.
    """
    try:
        if path.suffix == ".safetensors":
            return _safetensors().load_file(str(path)), {}
        content = torch.load(path, map_location="cpu", weights_only=True)
        if "state_dict" in content:
            return dict(content["state_dict"]), content
        return dict(content), {}
    except (OSError, ModuleNotFoundError):
        raise
    except Exception as error:  # bytes that are something else can make a reader raise anything
        raise SPSAConfigError(
            f"{path}: no weights can be read from it ({type(error).__name__}). It must be a state dict, a Lightning"
            " checkpoint without objects of other classes, or .safetensors."
        ) from error


def save_weights(path: Path, state: dict[str, Tensor], around: dict[str, Any], steps: int) -> None:
    """Write safetensors, or a checkpoint that ``Trainer.test(ckpt_path=...)`` takes."""
    whole = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    if path.suffix == ".safetensors":
        _safetensors().save_file(whole, str(path))
        return
    kept = {k: v for k, v in around.items() if k not in ("optimizer_states", "lr_schedulers", "loops", "callbacks")}
    version = kept.pop("pytorch-lightning_version", "2.6.4")
    torch.save({**kept, "pytorch-lightning_version": version, "state_dict": whole, "global_step": steps}, path)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError('.safetensors files need safetensors: pip install "lightning-grad[hf]".') from None
    return safetensors.torch


def _progress(hidden: bool) -> Progress | None:
    if hidden:
        return None
    from tqdm import tqdm  # type: ignore[import-untyped]

    bar: Any = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, desc="replay", unit="part")
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


def _inspect(options: argparse.Namespace) -> int:
    damage: JournalError | None = None
    try:
        journal = load_journal(options.journal)
    except JournalError as error:
        if error.intact is None:
            raise
        journal, damage = error.intact, error
    header, rule = journal.header, UpdateRule(journal.header)
    rates: list[float] = []
    workers: set[int] = set()
    abstained = saturated = digests = 0
    stopped = False
    for record in journal:
        update = rule.advance(record)
        rates.append(update.lr)
        workers |= set(rule.roster)
        abstained += update.abstained
        saturated += update.saturated
        digests += record.digest is not None
        stopped = record.stop
    shapes = sum(int(torch.Size(shape).numel()) for _, shape, _ in header.params)
    rows = {
        "run": header.run_id,
        "parameters": f"{shapes} in {len(header.params)} tensors",
        "base": header.base,
        "seed": header.seed,
        "eps": f"2**{header.eps_log2}",
        "codec": header.codec,
        "directions": f"{header.directions} per worker and step",
        "update": f"reduction {header.reduction}, normalize {header.normalize}, clip {header.clip}",
        "momentum": f"{header.momentum} over {header.momentum_horizon} steps" if header.momentum else "none",
        "steps": f"{len(journal)}{' (finished)' if stopped else ''}",
        "workers": " ".join(map(str, sorted(workers))) or "-",
        "learning rate": f"{min(rates):g} to {max(rates):g}" if rates else "-",
        "abstained": abstained,
        "saturated": saturated,
        "digests": digests,
        "bytes": f"{journal.num_bytes} (header {journal.header_bytes})",
    }
    for name, value in rows.items():
        print(f"{name:14} {value}")
    if damage is not None:
        raise damage
    return 0


def _verify(options: argparse.Namespace) -> int:
    journal = load_journal(options.journal)
    state, _ = load_base(options.base)
    engine = replay(state, journal, options.upto, kernel=options.kernel, progress=_progress(options.no_progress))
    checked = sum(record.digest is not None for record in journal.prefix(_steps(options, journal)))
    print(f"{_steps(options, journal)} steps, {checked} digests equal, final digest {engine.digest64():016x}")
    return 0


def _replay(options: argparse.Namespace) -> int:
    journal = load_journal(options.journal)
    state, around = load_base(options.base)
    engine = replay(
        state,
        journal,
        options.upto,
        verify=not options.no_verify,
        kernel=options.kernel,
        progress=_progress(options.no_progress),
    )
    steps = _steps(options, journal)
    save_weights(options.out, state, around, steps)
    print(f"{steps} steps replayed to {options.out}, digest {engine.digest64():016x}")
    return 0


def _store(options: argparse.Namespace) -> int:
    from lightning_grad.spsa.auth import Authenticator
    from lightning_grad.spsa.observer import Observer, longest, preload
    from lightning_grad.spsa.store import Store

    own = [options.journal] if options.journal is not None and options.journal.exists() else []
    old = longest({str(path): load_journal(path) for path in (*own, *options.also)})
    run_id = options.run_id or (old.header.run_id if old is not None else None)
    if run_id is None:
        raise JournalError("a store needs `--run-id`, or `--journal` with the file of a run.")
    if old is not None and old.header.run_id != run_id:
        raise JournalError(f"{(own or options.also)[0]} is of run {old.header.run_id!r}, not {run_id!r}.")
    auth = Authenticator.from_environment(run_id, options.auth_key_env)
    store = Store(f"{options.host}:{options.port}", run_id, serve=True)
    if old is not None:
        preload(store, old, auth)
    print(
        f"store at {options.host}:{options.port}, run {run_id}, {len(old) if old is not None else 0} steps so far",
        flush=True,
    )
    observer = Observer(store, auth, options.journal)
    try:
        while not (observer.finished and options.until_finished):
            observer.poll(0.5)
        time.sleep(_GRACE_S)  # members still read the last records
    except KeyboardInterrupt:
        pass
    finally:
        observer.close()
    steps = len(observer.journal) if observer.journal is not None else 0
    print(f"{steps} steps{', finished' if observer.finished else ''}", flush=True)
    return 0


def _steps(options: argparse.Namespace, journal: Journal) -> int:
    return len(journal) if options.upto is None else min(options.upto, len(journal))
