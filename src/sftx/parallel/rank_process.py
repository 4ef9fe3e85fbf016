"""A rank as its supervisor sees it: a process, its messages, its output, and how it ended."""

from __future__ import annotations

import json
import marshal
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from selectors import EVENT_READ, BaseSelector
from typing import Any

from sftx.parallel.activity import kill_session

WHERE = signal.SIGQUIT
"""Asks a rank for its stack; answered even by one whose main thread waits for a lock."""
WHERE_SECONDS = 1.0
TAIL_LINES = 40
"""What is kept of what a rank prints, other than the main one."""


class Lines:
    """One end of a pipe, read as far as there is something to read."""

    def __init__(self, descriptor: int, take: Callable[[str], None]) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor: int | None = descriptor
        self._take, self._rest = take, b""

    def listen(self, selector: BaseSelector) -> None:
        """Register with a selector."""
        assert self._descriptor is not None
        selector.register(self._descriptor, EVENT_READ, self)

    def read(self, selector: BaseSelector) -> None:
        """Take the lines that have come."""
        while self._descriptor is not None:
            try:
                piece = os.read(self._descriptor, 1 << 16)
            except BlockingIOError:
                return
            *lines, self._rest = (self._rest + piece).split(b"\n")
            for line in lines:
                self._take(line.decode("utf-8", "replace"))
            if not piece:
                self.close(selector)

    def close(self, selector: BaseSelector) -> None:
        """Take what is left without an end of line, and close."""
        if self._descriptor is None:
            return
        if self._rest:
            self._take(self._rest.decode("utf-8", "replace"))
        selector.unregister(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None


class RankProcess:
    """One rank's process, which leads its own session: a terminal's signals reach the supervisor alone."""

    def __init__(
        self, module: str, number: int, count: int, order: Mapping[str, Any], environment: Mapping[str, str],
        state: int, rendezvous: int | None, selector: BaseSelector,
    ) -> None:  # fmt: skip
        self.number = number
        self.messages: dict[str, Any] = {}
        """Those it sent: `failed` or `finished`, among others."""
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.ended: int | None = None
        """Its exit code, or the negative number of the signal that killed it."""
        self.ended_at = 0.0
        self._where = os.memfd_create("sftx-where", 0)
        reading, reports = os.pipe()
        printing, output = os.pipe()
        handed = [state, reports, self._where, *([] if rendezvous is None else [rendezvous])]
        is_main = number == 0  # the terminal is the main rank's
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(number), "of", str(count)],
            env={**environment, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            pass_fds=handed,
            stdin=subprocess.PIPE,
            stdout=None if is_main else output,
            stderr=None if is_main else output,
            start_new_session=True,
        )
        os.close(reports)
        os.close(output)
        self._lines = [Lines(reading, self._receive), Lines(printing, self.tail.append)]
        for lines in self._lines:
            lines.listen(selector)
        handles = {"state": state, "reports": reports, "where": self._where, "rendezvous": rendezvous}
        plain = marshal.dumps({**order, **handles, "parent": os.getpid()})  # plain values: nothing in them can run
        assert self.process.stdin is not None
        with suppress(BrokenPipeError), self.process.stdin as pipe:  # it has ended already, which will be noticed
            pipe.write(plain)

    @property
    def runs(self) -> bool:
        """True until its process has ended."""
        return self.ended is None

    @property
    def finished(self) -> bool:
        """True when its work is done."""
        return "finished" in self.messages

    def _receive(self, line: str) -> None:
        with suppress(ValueError):  # half a line of one that was killed
            self.messages |= json.loads(line)

    def reap(self, selector: BaseSelector) -> None:
        """Notice the end of the process, and end what it started and did not end."""
        if (
            self.ended is not None
            or os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            return
        self.ended_at = time.monotonic()
        for lines in self._lines:
            lines.read(selector)
        if not self.finished:
            kill_session(self.process.pid)
        for lines in self._lines:
            lines.close(selector)
        self.ended = self.process.wait()

    def send(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.ended is None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def suspend(self, number: int) -> None:
        """Stop it and its loaders, or let them continue."""
        if self.ended is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Kill it and whatever it started."""
        if self.ended is None:
            kill_session(self.process.pid)

    def where(self) -> str:
        """Return the stack of its main thread, the last call first; empty when it does not answer."""
        self.send(WHERE)
        until = time.monotonic() + WHERE_SECONDS
        while not (text := self._stack()) and time.monotonic() < until:
            time.sleep(0.05)
        return text

    def _stack(self) -> str:
        text = os.pread(self._where, 1 << 16, 0).decode("utf-8", "replace")
        return "\n".join(line for line in text.splitlines() if line.startswith("  "))

    def close(self) -> None:
        """Close the file of its stack."""
        os.close(self._where)


def first_frame(stack: str) -> str:
    """Return `file.py:9 (function)` of a stack that `where` returned, or an empty text."""
    found = re.search(r'File "(.*)", line (\d+) in (.*)', stack)
    return f"{Path(found[1]).name}:{found[2]} ({found[3]})" if found else ""
