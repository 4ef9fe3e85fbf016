"""A rank's side of its supervision: it says where it stands and what ended it; without a supervisor, nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sftx.errors import EXIT_FAULT, SftxError, StoppedError, printed, summary
from sftx.parallel.board import FOR_MAIN, TOGETHER, Board

VERDICT_SECONDS = 3.0
"""How long a rank that failed in a meeting waits to hear whether another one's end was the cause."""


class Watch:
    """What one rank tells its supervisor."""

    def __init__(self, rank: int, board: Board, reports: int, door: int | None) -> None:
        self.rank, self.board = rank, board
        self.door = door
        """The socket at which the main rank gathers the others; only the main rank has it."""
        self._pipe = os.fdopen(reports, "wb")
        self._broken_meeting: BaseException | None = None
        self._reported = False

    def tell(self, **facts: Any) -> None:
        """Send one message."""
        with suppress(OSError):  # the supervisor is gone: the kernel ends this process too
            self._pipe.write(json.dumps(facts).encode() + b"\n")
            self._pipe.flush()

    @contextmanager
    def meeting(self, kind: int) -> Iterator[None]:
        """Surround a meeting; one that fails may do so because another rank has ended."""
        self.board.come(self.rank, kind)
        try:
            yield
        except BaseException as error:
            self._broken_meeting = self._broken_meeting or error
            raise

    def report(self, error: BaseException) -> None:
        """Tell what ended this rank; the first call counts."""
        if self._reported:
            return
        self._reported = True
        said, text = printed(error), summary(error)
        if isinstance(error, SystemExit):
            text = f"sys.exit({error.code}) was called before its work was done"
        stopped = isinstance(error, StoppedError)
        self.tell(
            failed={
                "time": time.monotonic(),
                "is_cause": not self.follows(error),
                "stopped": stopped,
                "exit_code": error.exit_code if isinstance(error, SftxError) else EXIT_FAULT,
                "summary": text,
                "printed": "" if said == f"sftx: {text}" and not stopped else said,  # the supervisor says the summary
            }
        )

    def follows(self, error: BaseException) -> bool:
        """Tell whether an error came out of a meeting that broke."""
        link: BaseException | None = error
        while link is not None and link is not self._broken_meeting:
            link = link.__cause__ or link.__context__
        return link is not None


current: Watch | None = None
"""This process's, when it is a rank with a supervisor."""


@contextmanager
def meeting(*, for_main: bool = False) -> Iterator[None]:
    """Surround what all ranks do together; `for_main`: the main rank may write files before it comes."""
    if current is None:
        yield
        return
    with current.meeting(FOR_MAIN if for_main else TOGETHER):
        yield


def tell(**facts: Any) -> None:
    """Tell the supervisor something, if there is one."""
    if current is not None:
        current.tell(**facts)


def failed_by_another(error: BaseException) -> bool:
    """Report what ended this rank; return True when another rank's end was the cause: then that one is noted."""
    if current is None:
        return False
    current.report(error)
    if not current.follows(error):
        return False
    until = time.monotonic() + VERDICT_SECONDS
    while current.board.culprit is None and time.monotonic() < until:
        time.sleep(0.02)
    return current.board.culprit not in (None, current.rank)
