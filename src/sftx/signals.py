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
    """Raised at any point of the program, before there is anything to save; no `except Exception` swallows it."""


class Signals:
    """Notes the first stop signal; with `raise_immediately` it raises; later ones change nothing.

    `whole_program`: nothing comes after the block, so that later signals change nothing until the process is gone.

    Raises:
        StoppedError: in place of what the block raised after a signal.
    """

    def __init__(self, *, whole_program: bool = False) -> None:
        self.received: str | None = None
        self.raise_immediately = True
        self.handled = False
        """A block inside this one has received it, and has reported the outcome."""
        self._whole_program = whole_program
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._before = install(self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        restore(self._before, self.received, ignore_later=self._whole_program)
        if self.received is None or self.handled or error is None or isinstance(error, StoppedError):
            return
        if self.raise_immediately:
            raise StoppedError(f"{self.received}: stopped before the first step; there was nothing to save.") from error
        # The checkpoint failed, or a process that the same signal had ended was missed first.
        raise StoppedError(f"{self.received}: stopped without a checkpoint of the last step: {error}") from error

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            return
        self.received = signal.Signals(number).name
        if self.raise_immediately:
            raise EndNow(self.received)


def install(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Set a handler of the signals and return those of before.

    Raises:
        EndNow: a surrounding block has received a signal, and what it raised was lost on the way.
    """
    before: dict[int, Any] = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    for owner in _owners(before):
        if owner.received is not None and not owner.handled:
            raise EndNow(owner.received)
    return before


def restore(before: Mapping[int, Any], received: str | None, *, ignore_later: bool = False) -> None:
    """Restore the handlers, and note in their owner what was received; `ignore_later`: after a signal, ignore all."""
    for owner in _owners(before) if received is not None else ():
        owner.received, owner.handled = owner.received or received, True
    for number, handler in before.items():
        signal.signal(number, signal.SIG_IGN if ignore_later and received is not None else handler)


def _owners(handlers: Mapping[int, Any]) -> list[Signals]:
    found = (getattr(handler, "__self__", None) for handler in handlers.values())
    return [owner for owner in found if isinstance(owner, Signals)]


@contextmanager
def blocked() -> Iterator[None]:
    """Block the signals until the block is left; processes that are started inside block them as well."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def unblocked() -> Iterator[None]:
    """Unblock the signals, pending ones first, in a process that was started in `blocked`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def disregard() -> None:
    """Handle signals outside of `Signals`' blocks by doing nothing, in a process that was started in `blocked`.

    Pending signals are not lost, as they would be if signals were ignored. Without a handler, a signal after the block
    would end the process, through any thread that does not block it.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
