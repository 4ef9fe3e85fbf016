"""What the kernel knows of a rank and of the processes that it started (Linux: /proc)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Activity:
    """What a rank and its children have done so far, and how they stand at this moment."""

    cpu_seconds: float
    on_disk: bool
    """A thread of the rank waits for a disk."""
    stopped: bool
    """The rank itself was stopped by a signal."""


def activity(rank: int) -> Activity:
    """Return what a rank does; its process leads its own session."""
    ticks = sum(sum(map(int, words[11:15])) for _, words in _session(rank))
    states = [words[0] for words in _threads(rank)]
    return Activity(ticks / TICKS, "D" in states, bool(states) and set(states) == {"T"})


def kill_session(rank: int) -> None:
    """Kill a rank and whatever it started, as long as the rank is not reaped: until then its number is its own."""
    for process, _ in _session(rank):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _session(leader: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the words of every process of a session, its leader included."""
    for name in os.listdir("/proc"):  # noqa: PTH208 - names are enough, and there are hundreds
        words = _stat(Path("/proc", name, "stat")) if name.isdigit() else None
        if words and int(words[3]) == leader:
            yield int(name), words


def _threads(process: int) -> Iterator[list[str]]:
    with suppress(OSError):
        for task in Path("/proc", str(process), "task").iterdir():
            words = _stat(task / "stat")
            if words:
                yield words


def _stat(path: Path) -> list[str] | None:
    """Return the fields after the name: state, parent, group, session, ...; None when the process is gone."""
    try:
        return path.read_text().rpartition(")")[2].split()
    except OSError:
        return None
