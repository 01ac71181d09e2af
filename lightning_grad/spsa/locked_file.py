"""A file that one process at a time writes to."""

from __future__ import annotations

import os
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO

from lightning_grad.spsa.errors import JournalError

# a worker that was killed leaves data-loader processes behind, which hold its lock until they notice: up to 5 s
_PATIENCE_S = 6.0
_PAUSE_S = 0.1


def open_locked(path: Path) -> IO[bytes]:
    """Open a file for reading and appending, made if it is not there, and lock it against other writers.

    The lock is on the open file: it holds against every other opening, in this process too, until
    :func:`close_locked` or the end of the process. Systems and file systems without ``flock`` get no lock.

    Raises:
        JournalError: Somebody else has had it locked for 6 s.
    """
    file = open(path, "a+b")  # noqa: SIM115  the caller's
    try:
        _lock(file, path)
    except BaseException:
        file.close()
        raise
    return file


def close_locked(file: IO[bytes]) -> None:
    """Flush a file to the disk, unlock and close it."""
    file.flush()
    os.fsync(file.fileno())
    if sys.platform != "win32":
        import fcntl

        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough while a forked process has the file open, too
    file.close()


def _lock(file: IO[bytes], path: Path) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise JournalError(
                    f"another process writes to {path}: give every worker and the store a file of its own"
                    " (`journal_path`, --journal), or end that process."
                ) from None
            time.sleep(_PAUSE_S)
        except OSError as error:
            warnings.warn(f"{path} cannot be locked ({error}); let no other process write to it.", stacklevel=4)
            return
