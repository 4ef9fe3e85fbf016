"""A rank as its supervisor sees it: a process, its messages, its output, and how it ended."""

from __future__ import annotations

import fcntl
import json
import marshal
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sftx.parallel.activity import kill_session

WHERE = signal.SIGQUIT
"""Asks a rank for its stack; answered even by one whose main thread waits for a lock."""
WHERE_SECONDS = 1.0
TAIL_LINES = 40
"""Those that are shown of what a rank printed, other than the main one."""
MOST_BYTES = 1 << 20
"""Of what a rank prints; what is beyond is dropped with all before it."""
ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT


class RankProcess:
    """One rank's process, which leads its own session: a terminal's signals reach the supervisor alone."""

    def __init__(
        self, module: str, number: int, count: int, order: Mapping[str, Any], environment: Mapping[str, str],
        state: int, rendezvous: int | None,
    ) -> None:  # fmt: skip
        self.number = number
        self.messages: dict[str, Any] = {}
        """Those it sent: `failed` or `finished`, among others."""
        self.tail: list[str] = []
        """The last lines that it printed, once it has ended; the main rank has the terminal."""
        self.ended: int | None = None
        """Its exit code, or the negative number of the signal that killed it."""
        self.ended_at = 0.0
        self._reports, self._output, self._where = (_memory_file(name) for name in ("reports", "output", "where"))
        self._received = 0
        """Bytes of its messages that were read."""
        output = None if number == 0 else self._output
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(number), "of", str(count)],
            env={**environment, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            pass_fds=[state, self._reports, self._where, *([] if rendezvous is None else [rendezvous])],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        handles = {"state": state, "reports": self._reports, "where": self._where, "rendezvous": rendezvous}
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

    def receive(self) -> None:
        """Read the messages that have arrived, and keep its output small."""
        lines, end, _ = os.pread(self._reports, MOST_BYTES, self._received).rpartition(b"\n")
        self._received += len(lines + end)
        for line in lines.splitlines():
            self.messages |= json.loads(line)
        if os.fstat(self._output).st_size > MOST_BYTES:
            os.ftruncate(self._output, 0)

    def reap(self) -> None:
        """Notice the end of the process, and end what it started and did not end."""
        if self.ended is not None or os.waitid(os.P_PID, self.process.pid, ENDED) is None:
            return
        self.ended_at = time.monotonic()
        self.receive()
        if not self.finished:
            kill_session(self.process.pid)
        self.tail = os.pread(self._output, MOST_BYTES, 0).decode("utf-8", "replace").splitlines()[-TAIL_LINES:]
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
        """Close its files."""
        for descriptor in (self._reports, self._output, self._where):
            os.close(descriptor)


def _memory_file(name: str) -> int:
    """Return a file in memory to which any process that inherits it appends."""
    descriptor = os.memfd_create(f"sftx-{name}", 0)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
    return descriptor


def first_frame(stack: str) -> str:
    """Return `file.py:9 (function)` of a stack that `where` returned, or an empty text."""
    found = re.search(r'File "(.*)", line (\d+) in (.*)', stack)
    return f"{Path(found[1]).name}:{found[2]} ({found[3]})" if found else ""
