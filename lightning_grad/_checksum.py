"""Files that know whether they are intact, and writes that happen whole or not at all.

A sealed file ends with a footer: a mark and the SHA-256, in hex, of every byte before the digest. A zip archive (what
``torch.save`` writes) takes the footer as its archive comment, so every zip reader and ``torch.load`` still open it.
The footer travels with the file: a copy under another name can be checked by itself.

In a sealed zip archive every flipped bit and every truncation is found. A sealed file of another kind that has lost its
whole footer looks like a file that never had one.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path
from typing import BinaryIO, Literal

Seal = Literal["intact", "absent"]

_MARK = b"\nlightning-grad:sha256"
_DIGEST_SIZE = 64
FOOTER_SIZE = len(_MARK) + _DIGEST_SIZE
_ZIP_START = b"PK\x03\x04"
_ZIP_END = b"PK\x05\x06"
_ZIP_END_SIZE = 22  # end-of-archive record: signature, 16 bytes of counts and offsets, length of the comment
_CHUNK = 1 << 20


class ChecksumError(ValueError):
    """A file is not what was written."""


def seal_file(path: str | os.PathLike[str]) -> None:
    """Append the footer to a file and flush it to the disk.

    Args:
        path: File that nobody else writes to. A zip archive must have no comment yet.

    Raises:
        ValueError: The file has a footer or a zip comment already.
    """
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        tail = _read_at(file, max(0, size - FOOTER_SIZE - _ZIP_END_SIZE), size)
        if _mark_distance(tail) == 0 or (_is_zip(file) and _zip_comment_length(tail) != 0):
            raise ValueError(
                f"{path}: cannot add a checksum, the file has one already or is a zip file with a comment."
            )
        if _is_zip(file):
            file.seek(size - 2)
            file.write(FOOTER_SIZE.to_bytes(2, "little"))
        file.seek(size)
        file.write(_MARK)
        file.flush()
        digest = _sha256(file, size + len(_MARK))
        file.seek(size + len(_MARK))
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def check_file(path: str | os.PathLike[str]) -> Seal:
    """Compare a file with its footer, without interpreting anything in it.

    Returns:
        ``"intact"``, or ``"absent"`` if the file was never sealed.

    Raises:
        ChecksumError: The file is damaged or cut short; says where.
        FileNotFoundError: There is no such file.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        tail = _read_at(file, max(0, size - FOOTER_SIZE - _ZIP_END_SIZE), size)
        distance = _mark_distance(tail)
        if distance == 0:
            stored = tail[-_DIGEST_SIZE:]
            if _sha256(file, size - _DIGEST_SIZE) != stored:
                raise ChecksumError(f"{path}: the contents do not match the SHA-256 at the end of the file.")
            return "intact"
        # Bits of the mark itself may have flipped. Random data differs from it in half of its bits; being within a
        # quarter by chance has a probability below 1e-10.
        if distance <= 8 * len(_MARK) // 4:
            raise ChecksumError(f"{path}: the checksum at the end of the file is damaged.")
        if size == 0:
            raise ChecksumError(f"{path}: the file is empty.")
        if _is_zip(file) and _zip_comment_length(tail) != 0 and not _has_foreign_comment(file, size):
            raise ChecksumError(f"{path}: the end of the file is missing or overwritten ({size} bytes are there).")
    return "absent"


def unsealed_copy(path: str | os.PathLike[str], target: BinaryIO) -> None:
    """Write what was in the file before it was sealed, for formats that tolerate nothing after their end."""
    with open(path, "rb") as file:
        left = file.seek(0, os.SEEK_END) - FOOTER_SIZE
        file.seek(0)
        while left > 0:
            left -= target.write(file.read(min(left, _CHUNK)))


def is_zip_file(path: str | os.PathLike[str]) -> bool:
    """Whether the file begins like a zip archive."""
    with open(path, "rb") as file:
        return _is_zip(file)


def replace_file(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Move ``source`` over ``target`` so that after a crash ``target`` is the old or the new file, never a mixture."""
    os.replace(source, target)
    if os.name == "posix":  # the rename itself must reach the disk; Windows cannot open a directory
        folder = os.open(Path(target).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def chained_crc32(payload: bytes, previous: int = 0) -> int:
    """CRC-32 of a record and of all records before it: detects every single flipped bit, and records out of order.

    Args:
        payload: Bytes of this record.
        previous: Value of the record before, 0 for the first.
    """
    return zlib.crc32(payload, previous)


def _sha256(file: BinaryIO, stop: int) -> bytes:
    digest = hashlib.sha256()
    file.seek(0)
    left = stop
    while left > 0:
        chunk = file.read(min(left, _CHUNK))
        if not chunk:
            break
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest().encode()


def _read_at(file: BinaryIO, start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(stop - start)


def _is_zip(file: BinaryIO) -> bool:
    return _read_at(file, 0, len(_ZIP_START)) == _ZIP_START


def _mark_distance(tail: bytes) -> int:
    """Number of bits in which the place of the mark differs from the mark."""
    found = tail[-FOOTER_SIZE:-_DIGEST_SIZE]
    if len(found) < len(_MARK):
        return 8 * len(_MARK)
    return sum((a ^ b).bit_count() for a, b in zip(found, _MARK, strict=True))


def _zip_comment_length(tail: bytes) -> int | None:
    """0 if the file ends like a zip archive without a comment; ``None`` if that cannot be told."""
    end = tail[-_ZIP_END_SIZE:]
    return int.from_bytes(end[-2:], "little") if end.startswith(_ZIP_END) else None


def _has_foreign_comment(file: BinaryIO, size: int) -> bool:
    """Whether the archive has a complete comment that is not ours, as other tools may write."""
    start = max(0, size - _ZIP_END_SIZE - 65535)
    tail = _read_at(file, start, size)
    at = tail.rfind(_ZIP_END)
    if at < 0 or len(tail) - at < _ZIP_END_SIZE:
        return False
    length = int.from_bytes(tail[at + _ZIP_END_SIZE - 2 : at + _ZIP_END_SIZE], "little")
    return length == len(tail) - at - _ZIP_END_SIZE and length != FOOTER_SIZE
