"""A store process: serves the keys, follows the records into a journal, and starts again from one."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lightning_grad.spsa.auth import MAC_SIZE, Authenticator
from lightning_grad.spsa.errors import JournalError, SPSAConfigError
from lightning_grad.spsa.journal import Header, Journal
from lightning_grad.spsa.membership import Genesis, Membership, SharedRecord
from lightning_grad.spsa.store import Store

log = logging.getLogger(__name__)
_PAUSE_S = 0.1


def longest(journals: Mapping[str, Journal]) -> Journal | None:
    """The longest of several journals of one run; all others must be what it begins with.

    A record counts from the moment the store has it, so members may have applied some that a store which was killed
    had not yet written to its file. Each is in the journal of every member that applied it.

    Args:
        journals: By name, for the error.

    Raises:
        JournalError: Two of them part ways.
    """
    best = max(journals, key=lambda name: len(journals[name]), default=None)
    if best is None:
        return None
    whole = journals[best]
    for name, journal in journals.items():
        if journal.header != whole.header:
            raise JournalError(
                f"{name} and {best} differ: " + "; ".join(journal.header.differences(whole.header)) + "."
            )
        for step, (mine, theirs) in enumerate(zip(journal, whole, strict=False)):
            if mine != theirs:
                raise JournalError(
                    f"{name} and {best} part ways at record {step}, so they are not of one run; give only those of the"
                    " run to be continued."
                )
    return whole


def preload(store: Store, journal: Journal, auth: Authenticator) -> None:
    """Put a run back into an empty store. Its members count as gone; workers that come get new ids.

    Raises:
        JournalError: The journal has no record.
    """
    records = list(journal)
    if not records:
        raise JournalError("the journal has no record; start the store without it.")
    rosters: list[tuple[int, ...]] = []
    for record in records:
        rosters.append(record.roster if record.roster is not None else rosters[-1])
    highest = max(max(roster) for roster in rosters)
    for worker in rosters[-1]:
        store.put(f"l/{worker}", auth.seal("l", 0, worker, b"1"))
    store.count("n", highest + 1)
    for step, record in enumerate(records):
        members = dict.fromkeys(rosters[min(step + 1, len(rosters) - 1)], 0)
        store.first(f"r/{step}", auth.seal("r", step, 0, SharedRecord(record, members).to_bytes()))
    genesis = Genesis(journal.header, rosters[0])
    store.first("g", auth.seal("g", 0, 0, genesis.to_bytes()))  # last: workers wait for it


def read_genesis(store: Store, auth: Authenticator) -> Genesis | None:
    """The start of the run; ``None`` while there is none.

    Raises:
        SPSAConfigError: It was written with another key.
        JournalError: The store holds something else there.
    """
    data = store.get("g")
    if data is None:
        return None
    payload = auth.open("g", 0, 0, data)
    if payload is None:
        raise SPSAConfigError(f"the start of the run in the store cannot be read: {auth.advice}")
    try:
        return Genesis.from_bytes(payload)
    except JournalError:
        with suppress(JournalError):
            Genesis.from_bytes(payload[:-MAC_SIZE])
            raise SPSAConfigError(f"the start of the run in the store is sealed: {auth.advice}") from None
        raise


def read_record(
    store: Store, auth: Authenticator, members: Membership, header: Header, step: int
) -> SharedRecord | None:
    """The record of ``step``, the current one of ``members``; ``None`` while it is not decided.

    Raises:
        ValueError: The store holds something else there.
    """
    data = store.get(f"r/{step}")
    if data is None:
        return None
    payload = auth.open("r", step, 0, data)
    if payload is None:
        raise ValueError("its authentication code is wrong")
    return members.parse(payload, header)


class Observer:
    """Reads the records of a run as they come, without the weights.

    Args:
        store: Connection.
        auth: Authentication of messages.
        path: Journal file to keep; ``None``: in memory only.

    Attributes:
        journal: What was read so far; ``None`` before the run starts.
        finished: Whether the run has ended.
    """

    def __init__(self, store: Store, auth: Authenticator, path: Path | None = None) -> None:
        self._store, self._auth, self._path = store, auth, path
        self._members = Membership({})
        self._rejected = ""
        self.journal: Journal | None = None
        self.finished = False

    def poll(self, timeout_s: float) -> int:
        """Wait up to ``timeout_s`` for news; returns the number of records read.

        What cannot be read is logged once and left for the members to deal with: they need no observer.
        """
        deadline = time.monotonic() + timeout_s
        found = self._take()
        while not found and not self.finished and (left := deadline - time.monotonic()) > 0:
            there = self._store.wait(["g" if self.journal is None else f"r/{len(self.journal)}"], left)
            found = self._take()
            if there and not found:
                time.sleep(min(_PAUSE_S, left))
        return found

    def close(self) -> None:
        """Close the journal file."""
        if self.journal is not None:
            self.journal.close()

    def _take(self) -> int:
        """Read all records that are decided; returns how many."""
        new = self.journal is None
        if new:
            self._begin()
        if self.journal is None:
            return 0
        before = len(self.journal)
        while not self.finished and (shared := self._read()) is not None:
            self.journal.append(shared.record)
            self._members.advance(shared)
            self.finished = shared.record.stop
        if new and self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # only now: the store may hold no more than an older file does, and nothing of the file may be lost
            self.journal.open_append(self._path)
        return len(self.journal) - before

    def _begin(self) -> None:
        try:
            genesis = read_genesis(self._store, self._auth)
        except (SPSAConfigError, JournalError) as error:
            self._reject(str(error))
            return
        if genesis is not None:
            self._members = Membership(dict.fromkeys(genesis.roster, 0))
            self.journal = Journal(genesis.header)

    def _read(self) -> SharedRecord | None:
        assert self.journal is not None
        step = len(self.journal)
        try:
            return read_record(self._store, self._auth, self._members, self.journal.header, step)
        except ValueError as error:
            self._reject(f"the record of step {step} is not valid: {error}.")
            return None

    def _reject(self, text: str) -> None:
        if text != self._rejected:
            log.warning("SPSA: %s", text)
        self._rejected = text
