"""Checkpoints that are verified before anything in them is read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_grad._checksum import (
    ChecksumError,
    check_file,
    is_zip_file,
    replace_file,
    seal_file,
    unsealed_copy,
)


class ChecksumCheckpointIO(CheckpointIO):
    """Write checkpoints whole or not at all, with a checksum, and verify it before unpickling.

    ``torch.load`` notices a file that was cut short, but not flipped bits: it returns other numbers. Here the SHA-256
    of the file is kept in its zip comment, so ``torch.load``, Lightning without this plugin and every zip tool read the
    file as before, and a file that was copied or renamed can still be verified. The file is written under a temporary
    name, flushed to the disk and then renamed. For asynchronous saving use
    ``AsyncCheckpointIO(ChecksumCheckpointIO())``.

    Args:
        inner: What writes and reads the file itself; ``None``: Lightning's ``TorchCheckpointIO``. If it does not write
            zip files, they get the checksum appended, which it never sees.
        require_checksum: Refuse a file without a checksum; otherwise load it with one warning.

    Raises:
        TypeError: ``inner`` is not a ``CheckpointIO``, or is one that returns before the file is written.
        ChecksumError: On loading: the file is damaged. Says which other checkpoint of the directory is intact.
    """

    def __init__(self, inner: CheckpointIO | None = None, require_checksum: bool = False) -> None:
        if inner is not None and not isinstance(inner, CheckpointIO):
            raise TypeError(f"`inner` must be a CheckpointIO, got {type(inner).__name__}.")
        if isinstance(inner, AsyncCheckpointIO | ChecksumCheckpointIO):
            raise TypeError(
                f"`inner` must not be {type(inner).__name__}. For asynchronous saving use"
                " AsyncCheckpointIO(ChecksumCheckpointIO())."
            )
        self.inner = TorchCheckpointIO() if inner is None else inner
        self.require_checksum = require_checksum
        self._warned = False

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        system, location = url_to_fs(str(path))
        if not isinstance(system, LocalFileSystem):
            with tempfile.TemporaryDirectory() as folder:
                local = Path(folder) / "checkpoint"
                self.inner.save_checkpoint(checkpoint, str(local), storage_options)
                seal_file(local)
                system.makedirs(os.path.dirname(location), exist_ok=True)
                system.put_file(str(local), location)
            return
        target = Path(location)
        target.parent.mkdir(parents=True, exist_ok=True)
        # the name depends on the target only: what a killed process left behind is overwritten by the resumed run
        partial = target.with_name(f".{target.name}.partial")
        try:
            self.inner.save_checkpoint(checkpoint, str(partial), storage_options)
            if partial.is_dir():
                raise TypeError(
                    f"ChecksumCheckpointIO: {type(self.inner).__name__} writes a directory, and only a single file can"
                    " carry a checksum. Use it without ChecksumCheckpointIO."
                )
            seal_file(partial)
            replace_file(partial, target)
        except BaseException:
            if partial.is_file():
                partial.unlink()
            raise

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        options = {"map_location": map_location, "weights_only": weights_only}
        system, location = url_to_fs(str(path))
        if isinstance(system, LocalFileSystem):
            return self._load_local(Path(location), str(path), options)
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / os.path.basename(location)
            if system.exists(location):
                system.get_file(location, str(local))
            return self._load_local(local, str(path), options)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        self.inner.remove_checkpoint(path)

    @override
    def teardown(self) -> None:
        self.inner.teardown()

    def _load_local(self, path: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
        if not path.exists():
            raise FileNotFoundError(f"Checkpoint file not found: {name}")
        seal = "absent" if path.is_dir() else _check(path, name)
        if seal == "absent":
            self._accept_without_checksum(name)
            return self.inner.load_checkpoint(path, **options)
        if is_zip_file(path):
            return self.inner.load_checkpoint(path, **options)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / path.name
            with open(copy, "wb") as file:
                unsealed_copy(path, file)
            return self.inner.load_checkpoint(copy, **options)

    def _accept_without_checksum(self, name: str) -> None:
        if self.require_checksum:
            raise ChecksumError(
                f"{name}: the file has no checksum, and ChecksumCheckpointIO(require_checksum=True) asks for one. Set"
                " require_checksum=False to load it unverified, or choose a checkpoint written by ChecksumCheckpointIO."
            )
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{name} has no checksum, so damage would go unnoticed; it was not written by ChecksumCheckpointIO.",
                category=UserWarning,
            )


def checkpoint_fault(path: str) -> str | None:
    """Say in one sentence why a run cannot resume from ``path``, before anything is read from it.

    ``None``: nothing speaks against it. A remote path is not looked at, nor is a word that Lightning resolves itself.
    """
    if "://" in path or path in ("best", "last", "hpc") or path.partition(":")[0].lower() == "registry":
        return None
    file = Path(path)
    if not file.exists():
        return f"there is no checkpoint {path!r}."
    if file.is_dir():  # a sharded checkpoint is a directory, with one of these inside
        if any((file / name).exists() for name in (".metadata", "meta.pt", "checkpoint")):
            return None
        return f"{path!r} is a directory. Name a checkpoint file in it."
    try:
        _check(file, path)
    except ChecksumError as error:
        return str(error)
    with open(file, "rb") as stream:
        legacy = stream.read(1) == b"\x80"  # a bare pickle, which torch.save wrote before version 1.6
    return None if legacy or is_zip_file(file) else f"{path!r} is not a file that torch.save wrote."


def _check(path: Path, name: str) -> str:
    try:
        return check_file(path)
    except ChecksumError as error:
        what = str(error).replace(str(path), name)
        raise ChecksumError(f"{what} Nothing was loaded from it. {_advice(path)}") from None


def _advice(damaged: Path) -> str:
    """Name the newest checkpoint in the same directory that is intact."""
    others = [path for path in damaged.parent.glob("*.ckpt") if path.is_file() and not path.samefile(damaged)]
    for path in sorted(others, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            if check_file(path) == "intact":
                return f"Resume from {path}, the newest intact checkpoint in this directory."
        except (ChecksumError, OSError):
            continue
    return "No other checkpoint beside it is known to be intact: restore the file from a copy."
