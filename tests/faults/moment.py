"""Signals at a chosen moment of a phase: the run itself knows where it is, and has the signal sent from a thread.

The thread sends it a given share of the way through the n-th visit of a phase, or at the visit's very end when
that comes first: never before or after. Ranks are forked from the same warmed process as the runs of `kill.py`.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from sftx.processes import STOP_SIGNALS

PLACES = {
    "loading": [
        "sftx.runs.setup.open_data",
        "sftx.training.opening.find_model",
        "sftx.training.opening.load_template",
        "sftx.training.opening.load_base",
    ],
    "tokenising": ["sftx.data.prepare.open_rows"],
    "stepping": ["sftx.training.loop._advance"],
    "evaluating": ["sftx.training.loop.evaluate"],
    "saving": ["sftx.training.saving.checkpoint.publish"],
}
"""The phases, and the functions whose calls are visits of them, by the names under which sftx calls them."""
SHARED = ["sftx.training.saving.saver.snapshot"]
"""A save as a rank sees it that writes nothing."""


class Moments:
    """Notes each visit of a phase with the seconds it took in a file, and sends what was asked for.

    `to` is `self`, `group` (all processes of the session, as a terminal sends it) or `command` (the supervisor).
    """

    def __init__(
        self, log: str, phase: str = "", visit: int = 0, after: float = 0.0, number: int = 0,
        second: int = 0, later: float = 0.0, to: str = "self", rank: int = 0,
    ) -> None:  # fmt: skip
        self.log, self.phase, self.visit, self.after, self.number = log, phase, visit, after, number
        self.second, self.later, self.to, self.rank = second, later, to, rank
        self.inside: dict[int, list[str]] = {}
        self.visits = dict.fromkeys(PLACES, 0)
        self.trial: Any = None
        self.wanted = threading.Event()
        self.sent = threading.Event()
        self.lock = threading.Lock()

    def install(self) -> None:
        """Watch from now on; there is no way back."""
        for phase, names in PLACES.items():
            for name in SHARED if phase == "saving" and self.rank else names:
                module, _, function = name.rpartition(".")
                owner = importlib.import_module(module)
                setattr(owner, function, self._watched(phase, getattr(owner, function)))
        if self.phase:
            threading.Thread(target=self._send_both, daemon=True).start()

    def tell(self, **facts: Any) -> None:
        """Add a line to the log."""
        told = {"rank": self.rank, "made": self.trial.step if self.trial is not None else 0} | facts
        tell(self.log, **told)

    def _watched(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            if phase == "stepping":
                self.trial = arguments[1]
            self.visits[phase] += 1
            mine = self.inside.setdefault(threading.get_ident(), [])
            mine.append(phase)
            number, started = self.visits[phase], time.monotonic()
            here = (phase, number) == (self.phase, self.visit)
            if here:
                self.wanted.set()
            try:
                done = function(*arguments, **named)
                if here:
                    self._send(at_end=True)
                return done
            finally:
                mine.pop()
                self.tell(phase=phase, visit=number, seconds=time.monotonic() - started)

        return watched

    def _send_both(self) -> None:
        self.wanted.wait()
        time.sleep(self.after)
        self._send()
        if self.sent.wait(10) and self.second:
            time.sleep(self.later)
            self.tell(second=signal.Signals(self.second).name)
            self._kill(self.second)

    def _send(self, *, at_end: bool = False) -> None:
        """Send the signal, once, if the phase is what a thread is in just now."""
        with self.lock:
            here = [stack[-1] for stack in self.inside.values() if stack]
            if self.sent.is_set() or (self.phase not in here and not at_end):
                return
            self.sent.set()
            self.tell(sent=signal.Signals(self.number).name, time=time.monotonic(), here=here, at_end=at_end)
            self._kill(self.number)

    def _kill(self, number: int) -> None:
        if self.to == "group":
            os.killpg(0, number)
        else:
            os.kill(os.getppid() if self.to == "command" else os.getpid(), number)


def tell(log: str, **facts: Any) -> None:
    """Add a line to a log in one write."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.write(descriptor, json.dumps(facts).encode() + b"\n")
    os.close(descriptor)


def told(log: Path) -> list[dict[str, Any]]:
    """Return what a run has told."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


class ForkedRank:
    """Stands in for the `Popen` of a rank, with what its supervisor uses of one."""

    moment: Mapping[str, Any]

    def __init__(
        self, argv: Sequence[str], *, env: Mapping[str, str], pass_fds: Sequence[int], stdin: int,
        stdout: int | None, stderr: int | None, start_new_session: bool,
    ) -> None:  # fmt: skip
        assert argv[:4] == [sys.executable, "-P", "-m", "sftx.runs.rank"]
        self.number = int(argv[4])
        reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                os.close(writer)
                code = self._rank(reader, stdout, dict(env))
            finally:
                os._exit(code)
        os.close(reader)
        self.stdin: IO[bytes] = os.fdopen(writer, "wb")

    def _rank(self, order: int, output: int | None, env: dict[str, str]) -> int:
        """Be a rank, as if begun anew: with no handlers, and with its own input, output and environment."""
        os.setsid()
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        os.dup2(order, 0)
        for standard in (1, 2) if output is not None else ():
            os.dup2(output, standard)
        sys.stdin = os.fdopen(0)
        os.environ.clear()
        os.environ.update(env)
        from sftx.runs import rank

        asked = dict(self.moment)
        if asked.pop("in_rank", 0) != self.number:
            asked = {"log": asked["log"]}
        moments = Moments(**asked, rank=self.number)
        moments.install()
        code = 0
        try:
            rank.main()
        except SystemExit as left:
            code = int(left.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        moments.tell(code=code)
        return code

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def fork_ranks(moment: Mapping[str, Any]) -> None:
    """Let the supervisor of this process fork its ranks."""

    from sftx.parallel import rank_process

    ForkedRank.moment = moment
    rank_process.subprocess = SimpleNamespace(Popen=ForkedRank, PIPE=subprocess.PIPE)  # type: ignore[assignment]
