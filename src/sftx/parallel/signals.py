"""Signals that ask a run to end: a scheduler's, a terminal's, a colleague's `kill`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from sftx.errors import StoppedError
from sftx.parallel.proc import die_with_parent

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class EndNow(BaseException):
    """Raised wherever the program stands, before there is anything to save; no `except Exception` swallows it."""


class Signals:
    """Notes the first signal that asks for the end; `at_once` raises, later ones change nothing.

    Errors:
        StoppedError: in place of what the block raised after a signal.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.at_once = True
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._before = {number: signal.signal(number, self._note) for number in ASKING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.received is None or error is None or isinstance(error, StoppedError):
            return
        if self.at_once:
            raise StoppedError(f"{self.received}: stopped before the first step; there was nothing to save.") from error
        # The checkpoint failed, or a process that the same signal had ended was missed first.
        raise StoppedError(f"{self.received}: stopped without a checkpoint of the last step: {error}") from error

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            return
        self.received = signal.Signals(number).name
        if self.at_once:
            raise EndNow(self.received)


@contextmanager
def put_off() -> Iterator[None]:
    """Let the signals wait until the block is left; processes that are started inside let them wait as well."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def heard() -> Iterator[None]:
    """Let the signals come in, those that have waited first, in a process that was started in `put_off`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore(_worker: int = 0) -> None:
    """Let a loader process outlive a signal that goes to all processes, but not the trainer, which ends it."""
    die_with_parent()
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
