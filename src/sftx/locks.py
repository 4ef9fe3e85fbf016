"""Locks between processes: a file that one process at a time holds, until it ends, however it ends."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from sftx.files import explained

log = logging.getLogger("sftx")
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of a disk without flock, as some NFS and Lustre mounts are."""


class Locked(Exception):
    """Another process holds the lock; `holder` names it."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


@contextmanager
def exclusive(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock file at `path`, which names its holder and is removed at the end.

    Raises:
        Locked: another process holds it and `wait` is false.
        RunFolderError: the file cannot be made.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = _acquired(path, wait=wait)
        except Timeout:
            raise Locked(_holder(path)) from None
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}")
    try:
        yield
    finally:
        if lock.is_locked:  # not in a forked process, which must leave its parent's lock alone
            with suppress(OSError):  # the disk may have become read-only: an unlocked file keeps no process out
                path.unlink(missing_ok=True)  # before the release: waiting processes then lock a new file
            lock.release()


def _acquired(path: Path, *, wait: bool) -> BaseFileLock:
    """Take the lock by flock, or by exclusive creation of a file where the disk has no flock."""
    lock: BaseFileLock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(blocking=wait)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn_once(path.parent, os.strerror(error.errno))
        lock = SoftFileLock(path.with_name(f"{path.name}.soft"), thread_local=False)
        lock.acquire(blocking=wait)
    return lock


@cache
def _warn_once(folder: Path, reason: str) -> None:
    log.warning("%s: the disk has no file locks (%s); lock files are created exclusively instead", folder, reason)


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:200].strip() or "another process"
    except FileNotFoundError:
        return "another process"
