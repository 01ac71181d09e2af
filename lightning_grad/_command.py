"""The front of the command ``lightning-grad``: answers what it can without Lightning, which takes seconds to load."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module, reload
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, NoReturn

PROG = "lightning-grad"
_QUESTIONS = ("-h", "--help", "--version")
_BEFORE_A_COMMAND = ("-c", "--config", "--print_config", "--print_completion")
_SCRIPTS = (PROG, f"{PROG}.exe", f"{PROG}-script.py")
SUMMARY = "Train with research-frontier SGD methods: LightningCLI with the classes of lightning_grad."

_classes_wanted = False


class Tool(NamedTuple):
    """A command that is no Trainer run."""

    target: str
    """``module:function``, imported when the tool is called: ``function(arguments) -> exit status or None``."""
    help: str


TOOLS: dict[str, Tool] = {
    "advise": Tool("lightning_grad.scaling.commands:advise", "learning rate and batch size for a model size"),
    "scaling": Tool("lightning_grad.scaling.commands:scaling", "fit a scaling law to a table of runs"),
    "spsa": Tool("lightning_grad.spsa.commands:main", "journals and stores of shared-seed SPSA runs"),
}
"""Tools by the name they have on the command line. They must not need Lightning."""

TRAINER_COMMANDS: dict[str, str] = {
    "fit": "train",
    "validate": "one pass over the validation set",
    "test": "one pass over the test set",
    "predict": "run the model on data and keep its answers",
}
"""Commands of LightningCLI, by name."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command ``lightning-grad``.

    Args:
        args: Words of the command line; ``None`` takes those of the process.

    Returns:
        0, or the status of a tool. A mistake in the input raises ``SystemExit(2)`` after one line on stderr; a crash
        keeps its traceback.
    """
    words = list(sys.argv[1:] if args is None else args)
    first = words[0] if words else ""
    if first in _QUESTIONS:
        print(f"{PROG} {version_text()}" if first == "--version" else help_text())
        return 0
    names = [*TRAINER_COMMANDS, *TOOLS]
    if not first:
        refuse(PROG, f"say what to do: {', '.join(names)}. `{PROG} --help` has a line about each.")
    if first in TOOLS:
        module, _, function = TOOLS[first].target.partition(":")
        return int(getattr(import_module(module), function)(words[1:]) or 0)
    if not first.startswith("-") and first not in names:
        near = difflib.get_close_matches(first, names, n=1)
        hint = f"Did you mean `{near[0]}`?" if near else f"There are {', '.join(names)}."
        refuse(PROG, f"`{first}` is no command. {hint}")
    if first.startswith("-") and not first.startswith(_BEFORE_A_COMMAND):
        command = next((word for word in words if word in TRAINER_COMMANDS), "fit")
        refuse(PROG, f"the command comes before its options: `{PROG} {command} {first} ...`.")
    if any(word.startswith("--print_completion") for word in words) and find_spec("shtab") is None:
        refuse(PROG, 'shell completion needs the package shtab: pip install "lightning-grad[completion]".')
    load_classes()
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` does, so that a model in this directory can be named
    from lightning_grad.cli import run_trainer_command

    run_trainer_command(words)
    return 0


def answers_alone() -> bool:
    """Whether this process is the command, called for something that needs no Lightning.

    The package imports all its classes, so that they are known by name in YAML; then it need not.
    """
    if _classes_wanted:
        return False
    called = list(zip(sys.orig_argv, sys.orig_argv[1:], strict=False))
    # while Python looks for the module of `-m`, argv[0] is "-m"
    as_module = sys.argv[:1] == ["-m"] and ("-m", "lightning_grad") in called
    if not as_module and Path(sys.argv[0] if sys.argv else "").name not in _SCRIPTS:
        return False
    return not "".join(sys.argv[1:2]).startswith((*TRAINER_COMMANDS, *_BEFORE_A_COMMAND))


def load_classes() -> None:
    """Import the classes of the package in a process that looked as if it needed none."""
    global _classes_wanted
    package = sys.modules["lightning_grad"]
    if not vars(package).keys() >= set(package.__all__):
        _classes_wanted = True
        reload(package)


def help_text() -> str:
    """What ``--help`` prints."""
    return "\n".join(
        [
            f"usage: {PROG} COMMAND [-c CONFIG.yaml] [OPTIONS]",
            "",
            SUMMARY,
            "",
            f"train and evaluate, with every option of LightningCLI (`{PROG} fit --help` lists them):",
            *(f"  {name:<10} {text}" for name, text in TRAINER_COMMANDS.items()),
            "",
            f"tools (each has its own --help, e.g. `{PROG} advise --help`):",
            *(f"  {name:<10} {tool.help}" for name, tool in TOOLS.items()),
            "",
            "options:",
            "  -h, --help                 show this text and exit",
            "  --version                  print the versions of this package, Lightning and torch, and exit",
            "  --print_completion SHELL   print the completion script for shtab-bash, shtab-zsh, ... and exit",
            "",
            "options of train and evaluate that a first run needs:",
            "  -c CONFIG.yaml             a config file; several merge in order",
            "  --optimizer CLASS          a class of lightning_grad or torch.optim by its bare name",
            "  --optimizer.help CLASS     the arguments of that class",
            "  --print_config             print the merged config and exit",
        ]
    )


def version_text() -> str:
    """Versions of this package and of what it stands on, read without importing them."""
    from lightning_grad import __version__

    return f"{__version__} (lightning {_installed('lightning')}, torch {_installed('torch')})"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a build that was put on the path, not installed
        return str(import_module(package).__version__)


def refuse(prog: str, text: str, status: int = 2) -> NoReturn:
    """Print one line on stderr and exit."""
    print(f"{prog.split()[0]}: error: {' '.join(text.split())}", file=sys.stderr)
    raise SystemExit(status)
