"""What the comparisons of the examples share: their options, and quiet."""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import NamedTuple

import torch


class Comparison(NamedTuple):
    """Options of a comparison."""

    short: bool
    plot: Path


def comparison(doc: str | None, script: str) -> Comparison:
    """Read ``--short`` and ``--out`` from the command line; let Lightning say little, and torch use one thread.

    Args:
        doc: The script's docstring; its text for ``--help``.
        script: The script's ``__file__``. ``compare.png`` is drawn beside it, with ``--short`` into the working
            directory: a few steps must not replace the plot of a whole run.

    Returns:
        ``short``, whether a few steps are enough, and ``plot``, the file to draw into.
    """
    options = parse_comparison(comparison_parser(doc), script)
    return Comparison(options.short, options.plot)


def comparison_parser(doc: str | None) -> argparse.ArgumentParser:
    """The parser of :func:`comparison`, for a script that adds options of its own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few steps, to see that everything works")
    parser.add_argument("--out", type=Path, help="folder for compare.png")
    return parser


def parse_comparison(parser: argparse.ArgumentParser, script: str) -> argparse.Namespace:
    """Do what :func:`comparison` does, and return all options; ``plot`` is one of them."""
    options = parser.parse_args()
    quiet()
    folder = options.out or (Path() if options.short else Path(script).parent)
    options.plot = folder / "compare.png"
    return options


def quiet() -> None:
    """Silence what repeats with each of many short runs; small models are faster on one thread."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)
