"""Signals that ask a run to end: a scheduler's, a terminal's, a colleague's `kill`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from sftx.errors import StoppedError
from sftx.processes import STOP_SIGNALS


class EndNow(BaseException):
    """Raised wherever the program stands, before there is anything to save; no `except Exception` swallows it."""


class Signals:
    """Notes the first signal that asks for the end; `at_once` raises, later ones change nothing.

    `whole_program`: nothing comes after the block, so that later signals change nothing until the process is gone.

    Errors:
        StoppedError: in place of what the block raised after a signal.
    """

    def __init__(self, *, whole_program: bool = False) -> None:
        self.received: str | None = None
        self.at_once = True
        self.seen_to = False
        """A block inside this one has received it, and has said what became of it."""
        self._whole_program = whole_program
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._before = take(self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        give_back(self._before, self.received, deaf=self._whole_program)
        if self.received is None or self.seen_to or error is None or isinstance(error, StoppedError):
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


def take(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Set a handler of the signals and return those of before.

    Errors:
        EndNow: a surrounding block has received a signal, and what it raised was lost on the way.
    """
    before: dict[int, Any] = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    for owner in _owners(before):
        if owner.received is not None and not owner.seen_to:
            raise EndNow(owner.received)
    return before


def give_back(before: Mapping[int, Any], received: str | None, *, deaf: bool = False) -> None:
    """Set the handlers of before, whose owner learns what was received; `deaf`: after a signal, let none be heard."""
    for owner in _owners(before) if received is not None else ():
        owner.received, owner.seen_to = owner.received or received, True
    for number, handler in before.items():
        signal.signal(number, signal.SIG_IGN if deaf and received is not None else handler)


def _owners(handlers: Mapping[int, Any]) -> list[Signals]:
    found = (getattr(handler, "__self__", None) for handler in handlers.values())
    return [owner for owner in found if isinstance(owner, Signals)]


@contextmanager
def put_off() -> Iterator[None]:
    """Let the signals wait until the block is left; processes that are started inside let them wait as well."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def heard() -> Iterator[None]:
    """Let the signals come in, those that have waited first, in a process that was started in `put_off`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_unmoved() -> None:
    """Let signals change nothing outside of `Signals`' blocks, in a process that was started in `put_off`.

    Those that wait already are not lost, as they would be if they were ignored. A signal that comes after the block
    ends a process that handles none, by any of its threads that does not put it off.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
