"""Which rank hangs: the others wait for it, and it does nothing.

Ranks are often behind one another for good reasons: one reads a corpus that the others find in the
cache, the main one writes a checkpoint. So a rank is not killed for being late, only for being idle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sftx.parallel.activity import Activity, activity
from sftx.parallel.shared_state import MAIN_WRITES, SharedState

IDLE_SHARE = 0.05
"""A rank and its children that take a smaller share of one core than this do nothing."""
LOOK_SECONDS = 1.0
PAUSE_SECONDS = 10.0
"""When the supervisor itself was away for so long, the machine or the run was suspended: clocks begin anew."""


@dataclass
class Behind:
    """A rank that others wait for."""

    entered: int
    since: float
    idle_since: float
    cpu_seconds: float


@dataclass(frozen=True)
class Hang:
    """A rank that hangs."""

    rank: int
    seconds: float
    """The limit that it passed."""
    stopped: bool
    """By a signal."""
    worked: bool
    """It was not idle, but took too long."""


class HangWatch:
    """Looks once a second for a rank that hangs."""

    def __init__(
        self,
        state: SharedState,
        idle_limit: float | None,
        work_limit: float,
        activity_of: Callable[[int], Activity] = activity,
    ) -> None:
        self.state, self.idle_limit, self.work_limit, self.activity_of = state, idle_limit, work_limit, activity_of
        self._behind: dict[int, Behind] = {}
        self._looked = float("-inf")

    def look(self, now: float, processes: Mapping[int, int]) -> Hang | None:
        """Return the rank that hangs, of those that run (rank and process), or None."""
        if self.idle_limit is None or now - self._looked < LOOK_SECONDS:
            return None
        if now - self._looked > PAUSE_SECONDS:
            self._behind.clear()
        self._looked = now
        most = max(self.state.entered(r) for r in range(self.state.ranks))
        found = [self._look_at(r, p, now) for r, p in processes.items() if self._is_behind(r, most)]
        return next((hang for hang in found if hang is not None), None)

    def _is_behind(self, rank: int, most: int) -> bool:
        if self.state.entered(rank) < most:
            return True
        self._behind.pop(rank, None)
        return False

    def _look_at(self, rank: int, process: int, now: float) -> Hang | None:
        does = self.activity_of(process)
        entered = self.state.entered(rank)
        behind = self._behind.get(rank)
        if behind is None or behind.entered != entered:
            self._behind[rank] = Behind(entered, now, now, does.cpu_seconds)
            return None
        assert self.idle_limit is not None
        if does.on_disk or does.cpu_seconds - behind.cpu_seconds >= IDLE_SHARE * self.idle_limit:
            behind.idle_since, behind.cpu_seconds = now, does.cpu_seconds
        waited, idle = now - behind.since, now - behind.idle_since
        if idle >= self.idle_limit and (does.stopped or not self._writes(rank, entered)):
            return Hang(rank, self.idle_limit, does.stopped, worked=False)
        if waited >= self.work_limit:
            return Hang(rank, self.work_limit, does.stopped, worked=True)
        return None

    def _writes(self, rank: int, entered: int) -> bool:
        """True when the others wait for the main rank to write: a disk or a tracker may keep it long without work."""
        others = (r for r in range(self.state.ranks) if self.state.entered(r) == entered + 1)
        return rank == 0 and any(self.state.kind(r) == MAIN_WRITES for r in others)
