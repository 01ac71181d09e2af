"""The corpus of the demos: Python source files that are on the machine anyway."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

# Folders that distributions package apart or leave out, so that the corpus would differ between machines, and folders
# of tests, tables and installed packages.
_SKIPPED = {
    "__pycache__",
    "dist-packages",
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
}
# _sysconfigdata_* and config-*/ hold the paths and compiler flags of one machine
_SKIPPED_PREFIXES = ("test_", "_sysconfigdata", "config-", ".")


def standard_library() -> Path:
    """Return the folder of the interpreter's own library; in a virtual environment, that of the base interpreter."""
    folder = Path(sysconfig.get_path("stdlib"))
    if not (folder / "os.py").is_file():
        raise FileNotFoundError(
            f"There are no Python source files in {folder}; is this a zipped Python?"
            " SourceText takes a folder with *.py files as `root`."
        )
    return folder


def source_files(root: Path) -> list[str]:
    """Return the ``*.py`` files below ``root``, without tests, as sorted POSIX paths relative to it."""
    found = []
    for folder, subfolders, files in os.walk(root):
        # in place: os.walk then does not enter them (site-packages alone can hold 10^5 files)
        subfolders[:] = [name for name in subfolders if _is_wanted(name)]
        found += [Path(folder, name) for name in files if name.endswith(".py") and _is_wanted(name)]
    return sorted(path.relative_to(root).as_posix() for path in found)


def _is_wanted(name: str) -> bool:
    return name not in _SKIPPED and not name.startswith(_SKIPPED_PREFIXES)


def in_validation(relative_path: str, fraction: float) -> bool:
    """Decide by a hash of the path: a file stays on its side whatever the other files and the Python version."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def read_corpus(root: Path, max_bytes: int, val_fraction: float) -> tuple[Tensor, Tensor]:
    """Return the training bytes and the validation bytes, each 1-D uint8: file after file, in order of the path.

    Args:
        root: Folder with ``*.py`` files.
        max_bytes: Read at most this much, ``val_fraction`` of it for the validation part; a file is cut at the limit.
        val_fraction: Expected fraction of the files in the validation part, in (0, 1).
    """
    parts = {False: bytearray(), True: bytearray()}
    val_limit = round(max_bytes * val_fraction)
    left = {False: max_bytes - val_limit, True: val_limit}
    for name in source_files(root):
        side = in_validation(name, val_fraction)
        if left[side]:
            content = (root / name).read_bytes()[: left[side]]
            parts[side].extend(content)
            left[side] -= len(content)
    return _to_tensor(parts[False]), _to_tensor(parts[True])


def _to_tensor(content: bytearray) -> Tensor:
    # frombuffer refuses empty buffers
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
