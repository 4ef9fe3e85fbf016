"""Starts the ranks of a run on this machine, watches them, and says which one ended it and why.

A rank that fails takes the others with it: they would wait for it in their next collective, or fail there
with an error that names only the connection. So the root cause is the first error that was not raised by a
collective; a rank that was killed, or ended before its work was done, reports none.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from sftx.errors import EXIT_FAULT, RankError, SftxError, StoppedError
from sftx.parallel.hang import Hang, HangWatch
from sftx.parallel.rank_process import RankProcess, first_frame
from sftx.parallel.shared_state import SharedState
from sftx.signals import blocked, install, restore

POLL_SECONDS = 0.1
SETTLE_SECONDS = 0.5
"""After the first end, until the cause is chosen: another one may have been earlier, and be noticed later."""
DOUBT_SECONDS = 2.0
"""The same, while all known errors were raised by collectives."""
GRACE_SECONDS = 4.0
"""What the others get to end by themselves, once one has ended the run."""
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Failure:
    """How a rank ended that did not finish; `text` follows `rank 2 ` in the message."""

    rank: int
    time: float
    doubt: int
    """0: it is a cause; 1: it may follow from another's end; 2: it was raised by a collective."""
    text: str
    exit_code: int = EXIT_FAULT
    printed: str = ""
    stopped: bool = False
    """By a signal."""


class Supervisor:
    """The ranks of one run, from their start to their end."""

    def __init__(self, count: int, *, module: str, hang_seconds: float | None, timeout_seconds: float) -> None:
        self.count = count
        self._module = module
        self.ranks: list[RankProcess] = []
        self.failure: Failure | None = None
        """What ended the run, once it is known."""
        self.state, self._state_descriptor = SharedState.make(count)
        self._hangs = HangWatch(self.state, hang_seconds, timeout_seconds)
        self._forwarded: int | None = None
        self._handlers: dict[int, Any] = {}
        self._noticed: float | None = None
        """When the first rank ended that did not finish."""
        self._waiting_since: dict[int, float] = {}

    def supervise(self, order: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
        """Start the ranks, watch them to their end and return the main rank's messages.

        Raises:
            RankError: a rank failed, was killed, hung or ended too early.
            StoppedError: a signal stopped the run.
        """
        self._take_signals()
        try:
            self._start(order, environment)
            while any(rank.runs for rank in self.ranks):
                time.sleep(POLL_SECONDS)
                for rank in self.ranks:
                    rank.receive()
                    rank.reap()
                self._decide(time.monotonic())
        finally:
            self._close()
        if self.failure is not None:
            raise self._error(self.failure)
        return self.main.messages

    @property
    def main(self) -> RankProcess:
        """The rank that writes files and has the terminal."""
        return self.ranks[0]

    def _start(self, order: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        sys.stdout.flush()  # the main rank prints to the same place
        sys.stderr.flush()
        with blocked(), socket.socket() as rendezvous:  # no other run can take its port
            rendezvous.bind((LOOPBACK, 0))
            rendezvous.listen(self.count)
            shared = {
                **environment, "WORLD_SIZE": str(self.count), "LOCAL_WORLD_SIZE": str(self.count),
                "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(rendezvous.getsockname()[1]),
            }  # fmt: skip
            for number in range(self.count):
                own = shared | {"RANK": str(number), "LOCAL_RANK": str(number)}
                handed = rendezvous.fileno() if number == 0 else None
                state = self._state_descriptor
                self.ranks.append(RankProcess(self._module, number, self.count, order, own, state, handed))

    def _close(self) -> None:
        for rank in self.ranks:
            rank.kill()
            while rank.runs:  # only after an error of the supervisor's own
                rank.reap()
                time.sleep(POLL_SECONDS)
            rank.close()
        restore(self._handlers, None if self._forwarded is None else signal.Signals(self._forwarded).name)
        os.close(self._state_descriptor)

    def _take_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():  # no other thread may set handlers
            return
        self._handlers = install(self._forward)
        if signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            self._handlers[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._pause)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Ask every rank to end; they agree on a step, save and end by themselves."""
        if self._forwarded is None:
            self._forwarded = number
            for rank in self.ranks:
                rank.send(number)

    def _pause(self, number: int, frame: FrameType | None) -> None:
        """Stop with all ranks, which are in no terminal's foreground, and continue with them."""
        for rank in self.ranks:
            rank.suspend(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        for rank in self.ranks:
            rank.suspend(signal.SIGCONT)

    def _decide(self, now: float) -> None:
        """Choose the cause once ranks have ended, or hang, and end the others."""
        found = [failure for rank in self.ranks if (failure := self._failure_of(rank)) is not None]
        if found and self.failure is None:
            self._noticed = self._noticed or now
            cause = min(found, key=lambda f: (f.doubt, f.time))
            all_known = len(found) == self.count or not any(rank.runs for rank in self.ranks)
            if all_known or now - self._noticed >= (DOUBT_SECONDS if cause.doubt else SETTLE_SECONDS):
                self.failure = cause
                self.state.root_cause = cause.rank
                if self.failure.stopped:
                    self._forward(signal.SIGTERM, None)
        if self._noticed is None or (self.failure and self.failure.stopped):
            running = {rank.number: rank.process.pid for rank in self.ranks if rank.runs}
            hang = self._hangs.look(now, running)
            if hang is not None:
                self.failure = self._hung(hang, now)
                self._noticed = now - GRACE_SECONDS
        self._end_others(now)

    def _end_others(self, now: float) -> None:
        if self.failure is None or self._noticed is None or now - self._noticed < GRACE_SECONDS:
            return
        for rank in self.ranks:
            if rank.runs and (not self.failure.stopped or self._waits_forever(rank, now)):
                rank.kill()

    def _waits_forever(self, rank: RankProcess, now: float) -> bool:
        """Return True if a rank has waited for a while in a collective that an ended rank will never enter."""
        ended = (self.state.entered(other.number) for other in self.ranks if not other.runs)
        if self.state.entered(rank.number) <= min(ended, default=sys.maxsize):
            self._waiting_since.pop(rank.number, None)
            return False
        return now - self._waiting_since.setdefault(rank.number, now) >= GRACE_SECONDS

    def _failure_of(self, rank: RankProcess) -> Failure | None:
        """Return how a rank failed, from what it reported or from how it ended."""
        reported = rank.messages.get("failed")
        if reported is not None:
            return Failure(
                rank.number, reported["time"], 0 if reported["is_cause"] else 2, f"failed: {reported['summary']}",
                reported["exit_code"], reported["printed"], reported["stopped"],
            )  # fmt: skip
        if rank.ended is None or rank.finished:
            return None
        if rank.ended >= 0:
            return Failure(rank.number, rank.ended_at, 0, f"ended with exit code {rank.ended} before its work was done")
        name = signal.Signals(-rank.ended).name
        # What is written in C may abort when the connection to another rank breaks.
        doubt = 1 if -rank.ended == signal.SIGABRT else 0
        why = " (perhaps by the kernel, out of memory: see dmesg)" if -rank.ended == signal.SIGKILL else ""
        return Failure(rank.number, rank.ended_at, doubt, f"was killed by {name}{why}")

    def _hung(self, hang: Hang, now: float) -> Failure:
        rank = self.ranks[hang.rank]
        waited = f"hangs: the others have waited for it for {hang.seconds:.0f} s"
        if hang.stopped:
            return Failure(hang.rank, now, 0, f"{waited}, and it was stopped by a signal")
        stack = rank.where()
        place = f" at {first_frame(stack)}" if stack else ""
        printed = f"Where rank {hang.rank} stands (most recent call first):\n{stack}" if stack else ""
        cure = "parallel.timeout_seconds" if hang.worked else "parallel.hang_seconds"
        does = "works" if hang.worked else "does nothing"
        text = f"{waited}, and it {does}{place}. If it only needs longer: a larger {cure}."
        return Failure(hang.rank, now, 0, text, printed=printed)

    def _error(self, failure: Failure) -> SftxError:
        if failure.stopped:
            ours = self._failure_of(self.main)
            text = (ours if ours is not None and ours.stopped else failure).printed
            return StoppedError(text.removeprefix("sftx: "))
        tail = [] if failure.rank == 0 else [f"[rank {failure.rank}] {line}" for line in self.ranks[failure.rank].tail]
        printed = "\n".join([*tail, *([failure.printed] if failure.printed else [])])
        return RankError(f"rank {failure.rank} {failure.text}", failure.exit_code, printed)
