"""A table of runs read from a CSV file, with the columns that scaling laws need."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ALIASES: dict[str, tuple[str, ...]] = {
    "params": ("params", "n", "parameters", "num_params", "model size"),
    "tokens": ("tokens", "d", "num_tokens"),
    "loss": ("loss", "l", "val_loss", "val/loss"),
    "compute": ("compute", "c", "flops", "training flop"),
    "ratio": ("ratio", "m", "tokens_per_param"),
    "error": ("error", "err"),
    "x": ("x",),
    "y": ("y",),
}
"""Names of columns, in any case, by what they mean."""


def read_runs(path: Path) -> dict[str, list[float]]:
    """Return the known columns of a CSV file with a header.

    Of ``params``, ``tokens`` and ``compute`` (6 times their product) one may be missing; ``ratio`` is worked out too.

    Raises:
        ValueError: Names the column and the line of the file.
        OSError: The file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8.") from None
    with io.StringIO(text, newline="") as file:
        rows = csv.reader(file)
        reader = _readable(rows, path)
        header = next(reader, [])
        names = {i: name for i, title in enumerate(header) if (name := _meaning(title)) is not None}
        twice = [name for name in names.values() if list(names.values()).count(name) > 1]
        if twice:
            raise ValueError(f"{path}: two columns mean {twice[0]}.")
        columns: dict[str, list[float]] = {name: [] for name in names.values()}
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            for i, name in names.items():
                columns[name].append(
                    _number(row[i] if i < len(row) else "", f"{path}, line {rows.line_num}", header[i])
                )
    if not columns:
        found = ", ".join(repr(title.strip()) for title in header) or "nothing"
        raise ValueError(f"{path}: no column has a known name; its first line has {found}. Known: {known_names()}.")
    for known, wanted in (("params", "tokens"), ("tokens", "params")):
        if {known, "compute"} <= columns.keys():
            pairs = list(zip(columns[known], columns["compute"], strict=True))
            columns.setdefault(wanted, [c / 6.0 / n for n, c in pairs])
    if {"params", "tokens"} <= columns.keys():
        pairs = list(zip(columns["params"], columns["tokens"], strict=True))
        columns.setdefault("compute", [6.0 * n * d for n, d in pairs])
        columns.setdefault("ratio", [d / n if n else math.inf for n, d in pairs])
    return columns


def _readable(rows: Any, path: Path) -> Iterator[list[str]]:
    try:
        yield from rows
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: not a CSV file ({error}).") from None


def known_names(columns: Iterable[str] = ALIASES) -> str:
    """The names each column may have, for a reader."""
    return "; ".join(" or ".join(ALIASES[name]) for name in columns)


def _meaning(title: str) -> str | None:
    return next((name for name, titles in ALIASES.items() if title.strip().lower() in titles), None)


def _number(text: str, place: str, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{place}: column {column} must be a positive number, got {text.strip()!r}.")
    return value


def needed(columns: dict[str, list[float]], names: tuple[str, ...], law: str) -> list[list[float]]:
    """Return the columns of a law.

    Raises:
        ValueError: One is missing.
    """
    missing = [name for name in names if name not in columns]
    if missing:
        raise ValueError(
            f"The law {law!r} needs the columns {', '.join(names)}; {', '.join(missing)} missing. Known in the file:"
            f" {', '.join(columns)}. A column may be called {known_names(missing)}."
        )
    return [columns[name] for name in names]
