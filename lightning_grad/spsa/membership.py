"""What members of an elastic run say to each other, as bytes, and who is a member: a function of the records alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

from lightning_grad.spsa.codec import CODECS
from lightning_grad.spsa.errors import JournalError, SPSAConfigError
from lightning_grad.spsa.journal import Header, Record, RecordReader, Truncated

_STOP = 2
_MAX_GENESIS = 1 << 26
_MAX_ROSTER = 65535


@dataclass(frozen=True)
class Contribution:
    """Codes of one worker for one step, and its vote.

    Attributes:
        codes: ``directions`` units of the codec.
        stop: The worker votes for the end of the run.
    """

    codes: bytes
    stop: bool = False

    def to_bytes(self) -> bytes:
        """One byte of flags and the codes."""
        return bytes([_STOP * self.stop]) + self.codes

    @classmethod
    def from_bytes(cls, data: bytes, size: int) -> Contribution | None:
        """Parse; ``None`` if the length or a flag is wrong."""
        if len(data) != 1 + size or data[0] & ~_STOP:
            return None
        return cls(data[1:], bool(data[0]))


@dataclass(frozen=True)
class SharedRecord:
    """A journal record and the members of the next step with the number of steps each has missed in a row."""

    record: Record
    members: dict[int, int]

    def to_bytes(self) -> bytes:
        """u32 length, journal record, u16 count, count x (u32 id, u8 missed)."""
        body = self.record.to_bytes()
        rows = b"".join(struct.pack("<IB", worker, missed) for worker, missed in sorted(self.members.items()))
        return struct.pack("<I", len(body)) + body + struct.pack("<H", len(self.members)) + rows


@dataclass(frozen=True)
class Genesis:
    """First entry of a run: its constants and first members.

    Attributes:
        header: Constants of the journal.
        roster: Members of step 0, ascending.
        schedule: Settings of the learning rate, which every proposer must share; ``None`` in a store that was
            restarted.
    """

    header: Header
    roster: tuple[int, ...]
    schedule: dict[str, Any] | None = None

    def to_bytes(self) -> bytes:
        """JSON."""
        fields = {"header": self.header.to_json().decode(), "roster": list(self.roster), "schedule": self.schedule}
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Genesis:
        """Parse; what is not a genesis raises ``JournalError``."""
        try:
            if len(data) > _MAX_GENESIS:
                raise ValueError("too long")
            raw = json.loads(data)
            roster = tuple(int(worker) for worker in raw["roster"])
            if not roster or list(roster) != sorted(set(roster)):
                raise ValueError("its roster is empty or not ascending")
            schedule = raw["schedule"]
            if schedule is not None and not isinstance(schedule, dict):
                raise ValueError("its schedule is not a mapping")
            return cls(Header.from_json(raw["header"].encode()), roster, schedule)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JournalError(f"the store's entry for the start of the run is not valid: {error}") from error

    def check_against(self, header: Header, schedule: dict[str, Any]) -> None:
        """Raise ``SPSAConfigError`` with the list of fields in which a worker differs."""
        wrong = header.differences(self.header)
        for name, value in (self.schedule or {}).items():
            if schedule.get(name) != value:
                wrong.append(f"{name}: {schedule.get(name)} != {value}")
        if wrong:
            raise SPSAConfigError("this worker differs from the run it joins: " + "; ".join(wrong) + ".")


@dataclass
class Membership:
    """Members of the current step, and everyone who ever was one.

    Attributes:
        missed: Steps missed in a row, by member.
        admitted: Ids that were in a roster at some time; an id is never admitted twice.
        previous: Roster of the step before; empty at step 0. A record names the roster only where it changed.
    """

    missed: dict[int, int]
    admitted: set[int] = field(default_factory=set)
    previous: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.admitted |= set(self.missed)

    @property
    def roster(self) -> tuple[int, ...]:
        """Members, ascending."""
        return tuple(sorted(self.missed))

    def advance(self, shared: SharedRecord) -> None:
        """Take in the record of the current step."""
        self.previous = self.roster
        self.missed = dict(shared.members)
        self.admitted |= set(self.missed)

    def parse(self, data: bytes, header: Header) -> SharedRecord:
        """Read the record of the current step.

        Args:
            data: Payload from the store.
            header: Constants of the run.

        Raises:
            ValueError: The bytes are no record of this step.
        """
        unit = CODECS[header.codec]
        limit = 64 + 4 * len(self.missed) + len(self.missed) * header.directions * unit
        if len(data) < 4:
            raise ValueError("too short")
        (size,) = struct.unpack("<I", data[:4])
        if size > limit or len(data) < 4 + size + 2:
            raise ValueError("its length is wrong")
        reader = RecordReader(unit, header.directions, len(self.missed), first=not self.previous)
        try:
            record, end = reader.read(data[4 : 4 + size], 0)
        except Truncated:
            raise ValueError("the record inside is cut off") from None
        expected = self.roster if self.roster != self.previous else None
        if end != size or record.roster != expected:
            raise ValueError("its roster is not that of the step")
        (count,) = struct.unpack("<H", data[4 + size : 6 + size])
        rows = data[6 + size :]
        if len(rows) != 5 * count:
            raise ValueError("its member list has the wrong length")
        members: dict[int, int] = dict(struct.iter_unpack("<IB", rows))
        if len(members) != count or not members:
            raise ValueError("its member list is empty or repeats an id")
        if any(worker in self.admitted and worker not in self.missed for worker in members):
            raise ValueError("it brings back a member that had left")
        return SharedRecord(record, members)


def next_members(
    membership: Membership, seen: Container[int], gone: Container[int], ready: list[int], max_missed: int
) -> dict[int, int]:
    """Members of the next step: those who answered or have not missed too much, and the newcomers.

    Args:
        membership: Of the current step.
        seen: Members who contributed.
        gone: Members who said that they are leaving.
        ready: Newcomers that have caught up.
        max_missed: Steps in a row after which a silent member is dropped.
    """
    members: dict[int, int] = {}
    for worker, missed in membership.missed.items():
        count = 0 if worker in seen else missed + 1
        if worker not in gone and count < max_missed:
            members[worker] = count
    for worker in ready:
        if worker not in membership.admitted and len(members) < _MAX_ROSTER:
            members[worker] = 0
    return members


def vote(stops: int, members: int, policy: str) -> bool:
    """Whether ``stops`` of ``members`` votes end the run under "majority", "any" or "all"."""
    return {"majority": 2 * stops > members, "any": stops > 0, "all": stops == members}[policy] and stops > 0
