"""What can go wrong, by kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_grad.spsa.journal import Journal


class SPSAError(Exception):
    """Any of those below. The text says what to do and needs no traceback: the commands print it alone."""


class SPSAConfigError(SPSAError, ValueError):
    """The run is set up in a way that cannot work. The Lightning layer raises a subclass that Lightning knows too."""


class NoFiniteLossError(SPSAError, RuntimeError):
    """No worker has had a finite loss for too many steps in a row."""


class UpdateOverflowError(SPSAError, OverflowError):
    """An update is not finite or too large."""


class JoinTimeoutError(SPSAError, TimeoutError):
    """Not enough workers came to start an elastic run, or nobody let this one in."""


class JournalError(SPSAError, ValueError):
    """A journal file is damaged or does not fit; the text names the record and the byte offset.

    Attributes:
        intact: The journal of the records before the damage, if the header could be read.
    """

    def __init__(self, message: str, intact: Journal | None = None) -> None:
        super().__init__(message)
        self.intact = intact


class ReplicaMismatchError(SPSAError, RuntimeError):
    """Two replicas that must be bitwise equal are not.

    Attributes:
        step: Journal step after which the digests differ.
        expected: Digest in the journal, or of the other replica.
        got: Digest found here.
    """

    def __init__(self, message: str, step: int = -1, expected: int = 0, got: int = 0) -> None:
        super().__init__(message)
        self.step, self.expected, self.got = step, expected, got


class StoreLostError(SPSAError, RuntimeError):
    """The key-value store of an elastic run does not answer any more."""
