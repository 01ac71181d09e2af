"""The run as bytes: a header that names everything constant, then one small record per step.

File (little-endian, append-only): magic, u32 header length, header JSON, u32 check; then per record u8 flags, [f64 lr],
[u16 n, n x u32 worker ids], [u64 digest], the codes (one unit per roster member and slot), u32 check. A check is the
CRC-32 of its bytes started from the check before it, so a flipped bit, a lost record and a swapped pair are all
found at the record where they happened. Nothing in a journal is executed or unpickled.
"""

from __future__ import annotations

import copy
import json
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import count, pairwise, takewhile
from pathlib import Path
from typing import IO

from lightning_grad._checksum import chained_crc32, replace_file
from lightning_grad._validate import check_choice, check_int, check_range
from lightning_grad.spsa.codec import CODECS
from lightning_grad.spsa.errors import JournalError
from lightning_grad.spsa.locked_file import close_locked, open_locked

MAGIC = b"LGSPSA\0\1"
FORMAT = 2
RNG = "philox4x64-10/256"
_LR, _ROSTER, _DIGEST, _STOP = 1, 2, 4, 8
_MAX_HEADER = 1 << 26
_CHECK = struct.Struct("<I")


@dataclass(frozen=True)
class Header:
    """Everything about a run that never changes; two replicas with equal headers and records have equal weights.

    Attributes:
        run_id: Name of the run.
        seed: Seed of the signs.
        eps_log2: Perturbation size as a power of two.
        codec: ``"e4m3"``, ``"sign"`` or ``"f32"``.
        directions: Slots ``K`` per worker and step.
        reduction: ``"mean"``, ``"rsqrt"`` or ``"sum"``.
        normalize: Whether updates are divided by the running root mean square.
        rho: Decay of the running mean square.
        scale_log2: First scale of the byte.
        clip: Bound in running root mean squares, or ``None``.
        momentum: Heavy-ball factor.
        momentum_horizon: Steps after which momentum is cut off.
        params: ``(name, shape, dtype)`` of the trainable parameters, in order.
        base: SHA-256 of the trainable parameters before the first step.
        rng: Generator of the signs.
        format: Version of the file format.
    """

    run_id: str
    seed: int
    eps_log2: int
    codec: str
    directions: int
    reduction: str
    normalize: bool
    rho: float
    scale_log2: int
    clip: float | None
    momentum: float
    momentum_horizon: int
    params: tuple[tuple[str, tuple[int, ...], str], ...]
    base: str
    rng: str = RNG
    format: int = FORMAT

    def to_json(self) -> bytes:
        """Canonical text: sorted keys, no spaces."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Header:
        """Parse and check; unknown, missing and out-of-range keys raise ``JournalError``."""
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise JournalError(f"the journal header is not JSON: {error}") from error
        names = {f.name for f in fields(cls)}
        if not isinstance(raw, dict) or raw.keys() != names:
            keys = raw.keys() if isinstance(raw, dict) else set()
            raise JournalError(
                f"the journal header has unknown keys {sorted(keys - names)} and lacks {sorted(names - keys)};"
                f" this version reads format {FORMAT}."
            )
        try:
            raw["params"] = tuple((str(n), tuple(int(s) for s in shape), str(dt)) for n, shape, dt in raw["params"])
            header = cls(**raw)
            header.check()
        except (TypeError, ValueError) as error:
            raise JournalError(f"the journal header is not valid: {error}") from error
        return header

    def check(self) -> None:
        """Raise ``ValueError`` if a value is outside its range."""
        check_int("format", self.format, FORMAT, FORMAT)
        check_choice("rng", self.rng, (RNG,))
        check_int("seed", self.seed, 0, 2**64 - 1)
        check_int("eps_log2", self.eps_log2, -20, -2)
        check_choice("codec", self.codec, CODECS)
        check_int("directions", self.directions, 1)
        check_choice("reduction", self.reduction, ("mean", "rsqrt", "sum"))
        check_range("rho", self.rho, 0.0, 1.0, "[)")
        check_int("scale_log2", self.scale_log2, -120, 120)
        if self.clip is not None:
            check_range("clip", self.clip, 0.0, float("inf"), "()")
        check_range("momentum", self.momentum, 0.0, 1.0, "[)")
        check_int("momentum_horizon", self.momentum_horizon, 1, 1024)

    def differences(self, other: Header) -> list[str]:
        """Field by field, ``"name: mine != theirs"``."""
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return [f"{name}: {_short(mine)} != {_short(theirs)}" for name, mine, theirs in pairs if mine != theirs]


@dataclass(frozen=True)
class Record:
    """One step: the codes of every roster member, and what changed.

    Attributes:
        codes: ``len(roster) * directions`` units of the codec, members ascending.
        lr: Learning rate, if it changed (always in the first record).
        roster: Ascending worker ids, if they changed (always in the first record).
        digest: Digest of the parameters after this step, if one was taken.
        stop: The run ends with this step.

    Raises:
        ValueError: The learning rate is not a finite number >= 0.
    """

    codes: bytes
    lr: float | None = None
    roster: tuple[int, ...] | None = None
    digest: int | None = None
    stop: bool = False

    def __post_init__(self) -> None:
        if self.lr is not None:
            check_range("lr", self.lr, 0.0, float("inf"), "[)")

    def to_bytes(self) -> bytes:
        """Record without its check."""
        flags = (_LR * (self.lr is not None)) | (_ROSTER * (self.roster is not None))
        flags |= (_DIGEST * (self.digest is not None)) | (_STOP * self.stop)
        parts = [bytes([flags])]
        if self.lr is not None:
            parts.append(struct.pack("<d", self.lr))
        if self.roster is not None:
            parts.append(struct.pack(f"<H{len(self.roster)}I", len(self.roster), *self.roster))
        if self.digest is not None:
            parts.append(struct.pack("<Q", self.digest))
        return b"".join([*parts, self.codes])


class Truncated(Exception):  # noqa: N818  not an error: a torn append
    """The bytes end inside a record."""


class RecordReader:
    """Parses records one after the other; remembers the roster's size.

    Args:
        unit: Bytes per code.
        slots: Codes per roster member.
        members: Roster size in force.
        first: Whether the first record read opens the journal, and so must carry a learning rate and a roster.
    """

    def __init__(self, unit: int, slots: int, members: int = 0, first: bool = True) -> None:
        self._per_member = unit * slots
        self._members = members
        self._first = first

    def read(self, data: bytes | bytearray | memoryview, begin: int) -> tuple[Record, int]:
        """Record that starts at ``begin`` and the offset behind it (behind its codes; a check is not read).

        Raises:
            Truncated: The bytes end first.
            ValueError: The record is malformed.
        """
        view = memoryview(data)
        position = begin

        def take(size: int) -> memoryview:
            nonlocal position
            if position + size > len(view):
                raise Truncated
            position += size
            return view[position - size : position]

        flags = take(1)[0]
        if flags > 15:
            raise ValueError(f"unknown flags {flags:#04x}")
        if self._first and flags & (_LR | _ROSTER) != _LR | _ROSTER:
            raise ValueError("the first record carries no learning rate or no roster")
        lr = roster = digest = None
        if flags & _LR:
            (lr,) = struct.unpack("<d", take(8))
        members = self._members
        if flags & _ROSTER:
            (members,) = struct.unpack("<H", take(2))
            roster = struct.unpack(f"<{members}I", take(4 * members))
            if not members or any(a >= b for a, b in pairwise(roster)):
                raise ValueError("the roster is empty or not ascending")
        if flags & _DIGEST:
            (digest,) = struct.unpack("<Q", take(8))
        codes = bytes(take(members * self._per_member))
        self._members, self._first = members, False
        return Record(codes, lr, roster, digest, bool(flags & _STOP)), position


class Journal:
    """Header and records of a run, in memory, and in a file if one is open.

    Args:
        header: Constants of the run.
    """

    def __init__(self, header: Header) -> None:
        self.header = header
        head = header.to_json()
        self._data = bytearray(MAGIC + struct.pack("<I", len(head)) + head)
        self._data += _CHECK.pack(chained_crc32(bytes(self._data)))
        self._start = len(self._data)
        self._count = 0
        self._reader = self._new_reader()
        self._file: IO[bytes] | None = None
        self.path: Path | None = None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Record]:
        reader, position = self._new_reader(), self._start
        for _ in range(self._count):
            record, position = reader.read(self._data, position)
            position += _CHECK.size
            yield record

    @property
    def num_bytes(self) -> int:
        """Size of the file form."""
        return len(self._data)

    @property
    def header_bytes(self) -> int:
        """Size of the part before the first record."""
        return self._start

    def append(self, record: Record) -> None:
        """Add the record of the next step; with an open file, the operating system has it when this returns.

        Raises:
            JournalError: Its codes do not fit its roster.
            ValueError: It is the first and has no learning rate or no roster.
        """
        body = record.to_bytes()
        reader = copy.copy(self._reader)
        try:
            _, end = reader.read(body, 0)
        except Truncated:
            end = -1
        if end != len(body):
            raise JournalError(f"record {self._count} has {len(record.codes)} code bytes, which do not fit the roster.")
        (before,) = _CHECK.unpack(self._data[-_CHECK.size :])
        entry = body + _CHECK.pack(chained_crc32(body, before))
        self._data += entry
        self._count += 1
        self._reader = reader
        if self._file is not None:
            self._file.write(entry)
            self._file.flush()

    def to_bytes(self) -> bytes:
        """The file form."""
        return bytes(self._data)

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "journal", *, on_torn: Callable[[str], None] | None = None) -> Journal:
        """Parse the file form.

        Args:
            data: Bytes of a journal.
            name: What errors call it.
            on_torn: Receives the text about an incomplete last record; default: a warning.

        Raises:
            JournalError: The header or a record is damaged. ``error.intact`` is the journal of the records before it.
        """
        header, start = _read_header(data, name)
        journal = cls(header)
        position = start
        while position < len(data):
            where = f"{name}: record {len(journal)} at byte offset {position}"
            try:
                record, end = copy.copy(journal._reader).read(data, position)
                if end + _CHECK.size > len(data):
                    raise Truncated
            except Truncated:
                text = f"{where} is incomplete ({len(data) - position} bytes); the {len(journal)} before it are intact."
                (on_torn or _warn)(text)
                break
            except ValueError as error:
                raise _damaged(f"{where} is malformed ({error})", journal) from None
            (before,) = _CHECK.unpack(journal._data[-_CHECK.size :])
            (check,) = _CHECK.unpack(data[end : end + _CHECK.size])
            if chained_crc32(data[position:end], before) != check:
                raise _damaged(f"{where} fails its check", journal)
            journal.append(record)
            position = end + _CHECK.size
        return journal

    def prefix(self, upto: int) -> Journal:
        """A journal of the first ``upto`` records."""
        out = Journal(self.header)
        for index, record in enumerate(self):
            if index == upto:
                break
            out.append(record)
        return out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole journal to a new file, atomically."""
        path = Path(path)
        partial = path.with_name(path.name + ".part")
        with open(partial, "wb") as file:
            file.write(self._data)
            file.flush()
            os.fsync(file.fileno())
        replace_file(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Journal:
        """Read a journal file. An incomplete last record is dropped with a warning.

        Raises:
            JournalError: The file is damaged elsewhere.
        """
        return cls.from_bytes(Path(path).read_bytes(), str(path))

    def open_append(self, path: str | os.PathLike[str]) -> None:
        """Keep ``path`` equal to this journal from now on: write what it lacks, then every appended record.

        The file is locked until :meth:`close`. If it has other records than this journal, or more of them, a copy of it
        is kept beside it as ``<path>.torn``, with a warning.

        Raises:
            JournalError: The file is no journal or one of another run, or another process writes to it.
        """
        self.close()
        path = Path(path)
        file = open_locked(path)
        try:
            file.seek(0)
            old = file.read()
            same = len(old)
            if not self._data.startswith(old):
                self._keep_what_differs(old, path)
                same = next(
                    (i for i, (a, b) in enumerate(zip(old, self._data, strict=False)) if a != b), len(self._data)
                )
            file.truncate(same)
            file.write(self._data[same:])
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            close_locked(file)
            raise
        self._file, self.path = file, path

    def _keep_what_differs(self, old: bytes, path: Path) -> None:
        damaged = False
        try:
            theirs = Journal.from_bytes(old, str(path), on_torn=lambda text: None)
        except JournalError as error:
            if error.intact is None:
                raise
            theirs, damaged = error.intact, True
        if theirs.header != self.header:
            raise JournalError(
                f"{path} is the journal of run {theirs.header.run_id!r}, not of run {self.header.run_id!r}"
                f" ({'; '.join(self.header.differences(theirs.header))}); choose another `journal_path`, or move that"
                " file away."
            )
        if not damaged and self._data.startswith(theirs._data):
            return  # nothing but a record that was cut off
        kept = next(p for i in count() if not (p := path.with_name(f"{path.name}.torn{i or ''}")).exists())
        kept.write_bytes(old)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(theirs, self, strict=False)))
        warnings.warn(
            f"{path} held {len(theirs)} records; this run goes on after the first {shared} of them. The file as it was"
            f" is kept as {kept}.",
            stacklevel=3,
        )

    def close(self) -> None:
        """Flush to the disk, unlock and close the file."""
        if self._file is not None:
            close_locked(self._file)
            self._file = None

    def _new_reader(self) -> RecordReader:
        return RecordReader(CODECS[self.header.codec], self.header.directions)


def _read_header(data: bytes, name: str) -> tuple[Header, int]:
    if data[: len(MAGIC)] != MAGIC:
        raise JournalError(f"{name}: not an SPSA journal (the first bytes are {data[:8]!r}).")
    begin = len(MAGIC) + 4
    size = struct.unpack("<I", data[begin - 4 : begin])[0] if len(data) >= begin else _MAX_HEADER
    end = begin + size
    if size >= _MAX_HEADER or end + _CHECK.size > len(data):
        raise JournalError(f"{name}: the header at byte offset {len(MAGIC)} is incomplete; no record is usable.")
    (check,) = _CHECK.unpack(data[end : end + _CHECK.size])
    if chained_crc32(data[:end]) != check:
        raise JournalError(f"{name}: the header at byte offset {len(MAGIC)} fails its check; no record is usable.")
    return Header.from_json(data[begin:end]), end + _CHECK.size


def _damaged(text: str, intact: Journal) -> JournalError:
    count = len(intact)
    return JournalError(
        f"{text}; the {count} records before it are intact. Use `--upto {count}` to replay those.", intact
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)
