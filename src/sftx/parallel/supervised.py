"""A rank's side of its supervision: it reports how far it is and what ended it. Without a supervisor, nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sftx.errors import EXIT_FAULT, SftxError, StoppedError, printed, summary
from sftx.parallel.shared_state import ALL_RANKS, MAIN_WRITES, SharedState

VERDICT_SECONDS = 3.0
"""How long a rank that failed in a collective waits to learn whether another rank's end was the cause."""


class Supervised:
    """What one rank reports to its supervisor."""

    def __init__(self, rank: int, state: SharedState, reports: int, rendezvous: int | None) -> None:
        self.rank, self.state = rank, state
        self.rendezvous = rendezvous
        """The socket at which the main rank gathers the others; only the main rank has it."""
        self._reports = os.fdopen(reports, "wb")
        self._broken_by: BaseException | None = None
        """The error of the first collective that failed."""
        self._reported = False

    def send(self, **facts: Any) -> None:
        """Send one message."""
        self._reports.write(json.dumps(facts).encode() + b"\n")
        self._reports.flush()

    @contextmanager
    def collective(self, kind: int) -> Iterator[None]:
        """Surround a collective; one that fails may do so because another rank has ended."""
        self.state.enter(self.rank, kind)
        try:
            yield
        except BaseException as error:
            self._broken_by = self._broken_by or error
            raise

    def report(self, error: BaseException) -> None:
        """Report what ended this rank; only the first call counts."""
        if self._reported:
            return
        self._reported = True
        message, text = printed(error), summary(error)
        if isinstance(error, SystemExit):
            text = f"sys.exit({error.code}) was called before its work was done"
        stopped = isinstance(error, StoppedError)
        self.send(
            failed={
                "time": time.monotonic(),
                "is_cause": not self.follows(error),
                "stopped": stopped,
                "exit_code": error.exit_code if isinstance(error, SftxError) else EXIT_FAULT,
                "summary": text,
                "printed": "" if message == f"sftx: {text}" and not stopped else message,  # not twice
            }
        )

    def follows(self, error: BaseException) -> bool:
        """Return True if an error was raised by a collective that failed."""
        link: BaseException | None = error
        while link is not None and link is not self._broken_by:
            link = link.__cause__ or link.__context__
        return link is not None


current: Supervised | None = None
"""This process's, when it is a rank with a supervisor."""


@contextmanager
def collective(*, for_main: bool = False) -> Iterator[None]:
    """Surround what all ranks do together; `for_main`: the main rank may write files before it enters."""
    if current is None:
        yield
        return
    with current.collective(MAIN_WRITES if for_main else ALL_RANKS):
        yield


def send(**facts: Any) -> None:
    """Send the supervisor a message, if there is one."""
    if current is not None:
        current.send(**facts)


def failed_by_another(error: BaseException) -> bool:
    """Report what ended this rank; return True if another rank's end was the cause, which is noted then."""
    if current is None:
        return False
    current.report(error)
    if not current.follows(error):
        return False
    until = time.monotonic() + VERDICT_SECONDS
    while current.state.root_cause is None and time.monotonic() < until:
        time.sleep(0.02)
    return current.state.root_cause not in (None, current.rank)
