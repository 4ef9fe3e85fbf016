"""The hash of a large file, kept for as long as the file is the same one and was not written to.

As git tells it: a file whose size, inode and times of change are those from before it was hashed has the
content it had then. The system's clock ticks in steps (of a hundredth of a second, on some disks two
seconds), so a file that is changed again within the step in which it was last changed keeps its times: the
hash of a file that young is not kept. `st_ctime` is among the times, which no program can set back.

What is given up by not reading the file again: damage on the disk that no program did, and what a program
writes through a mapping that it had written to before. Small files are cheap to read, and always are.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from sftx.data.files.blob import sha256_file
from sftx.errors import DataError, SftxError
from sftx.files import cache_root, write_text

SMALL = 1 << 24
"""Bytes; fewer are hashed each time, in some hundredths of a second."""
YOUNG_NS = 3_000_000_000
"""A file that was changed more recently could be changed again without a trace."""
Stamp = tuple[int, ...]


def stamp(path: Path) -> Stamp:
    """Return what changes when a file does.

    Raises:
        DataError: it cannot be looked at.
    """
    try:
        with Path(path).open("rb") as file:  # a network's disk tells the truth of a file when it is opened
            found = os.fstat(file.fileno())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def known_sha256(path: Path) -> str:
    """Return a file's SHA-256, without reading it when it is known.

    Raises:
        DataError: it cannot be read.
    """
    before, now = stamp(path), time.time_ns()
    if before[2] < SMALL:
        return sha256_file(path)
    with suppress(OSError, ValueError, KeyError, TypeError):  # without a note: hashed
        kept = json.loads(_note(path).read_text(encoding="utf-8"))
        if tuple(kept["stamp"]) == before:
            return str(kept["sha256"])
    digest = sha256_file(path)
    if max(before[3:]) < now - YOUNG_NS and stamp(path) == before:
        _keep(path, before, digest)
    return digest


def keep_sha256(path: Path, digest: str) -> None:
    """Keep the hash of a file that this process has just written: in a cache, where no other writes to it."""
    found = stamp(path)
    if found[2] >= SMALL:
        _keep(path, found, digest)


def _note(path: Path) -> Path:
    return cache_root() / "digests" / hashlib.sha256(os.fsencode(Path(path).absolute())).hexdigest()[:32]


def _keep(path: Path, found: Stamp, digest: str) -> None:
    with suppress(SftxError):  # a cache that cannot be written to: the file is read again the next time
        write_text(_note(path), json.dumps({"path": str(path), "stamp": found, "sha256": digest}) + "\n")
