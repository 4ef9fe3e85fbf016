"""Who hangs: not who is late, but who does nothing while others wait."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sftx.parallel.activity import Activity
from sftx.parallel.hang import Hang, HangWatch
from sftx.parallel.shared_state import ALL_RANKS, MAIN_WRITES, SharedState

IDLE, LIMIT = 45, 1800
PROCESSES = {0: 100, 1: 101, 2: 102}


def first_hang(
    behind: int, does: Callable[[int], Activity], kind: int = ALL_RANKS, idle: float | None = IDLE, seconds: int = 2000
) -> tuple[int, Hang] | None:
    """Let all ranks but one be in a collective; return the second at which that one is given up."""
    state, _ = SharedState.make(3)
    for rank in PROCESSES:
        for _ in range(5 + (rank != behind)):
            state.enter(rank, kind)
    now = 0

    def activity_of(process: int) -> Activity:
        assert process == PROCESSES[behind], "who is not behind is not looked at"
        return does(now)

    watch = HangWatch(state, idle, LIMIT, activity_of)
    for now in range(seconds):
        hang = watch.look(now, PROCESSES)
        if hang is not None:
            return now, hang
    return None


def nothing(_: int) -> Activity:
    return Activity(7.0, on_disk=False, stopped=False)


def test_a_rank_that_does_nothing_hangs() -> None:
    assert first_hang(1, nothing) == (IDLE, Hang(1, IDLE, stopped=False, worked=False))


def test_a_little_of_the_processor_is_not_work() -> None:
    """A thread that flushes a log, a tracker's process that samples the machine."""
    found = first_hang(1, lambda now: Activity(0.02 * now, on_disk=False, stopped=False))
    assert found is not None
    assert found[0] < 2 * IDLE


@pytest.mark.parametrize(
    "does",
    [lambda now: Activity(0.3 * now, False, False), lambda now: Activity(0.0, now % 20 == 0, False)],
    ids=["processor", "disk"],
)
def test_a_rank_that_works_is_waited_for(does: Callable[[int], Activity]) -> None:
    assert first_hang(1, does) == (LIMIT, Hang(1, LIMIT, stopped=False, worked=True))


def test_a_rank_that_worked_and_stopped_working_hangs() -> None:
    found = first_hang(1, lambda now: Activity(min(now, 100.0), False, False))
    assert found is not None
    assert 100 + IDLE - 5 <= found[0] <= 100 + IDLE


def test_the_main_rank_may_write_for_long() -> None:
    """A disk of another machine takes its time, and no processor's."""
    assert first_hang(0, nothing, MAIN_WRITES) == (LIMIT, Hang(0, LIMIT, stopped=False, worked=True))
    assert first_hang(1, nothing, MAIN_WRITES) == (IDLE, Hang(1, IDLE, stopped=False, worked=False))


def test_one_that_was_stopped_writes_nothing() -> None:
    found = first_hang(0, lambda _: Activity(0.0, on_disk=False, stopped=True), MAIN_WRITES)
    assert found == (IDLE, Hang(0, IDLE, stopped=True, worked=False))


def test_null_never_gives_up() -> None:
    assert first_hang(1, nothing, idle=None) is None


def test_a_pause_of_the_machine_is_no_hang() -> None:
    state, _ = SharedState.make(2)
    state.enter(0, ALL_RANKS)
    watch = HangWatch(state, IDLE, LIMIT, nothing)
    assert watch.look(0, {0: 100, 1: 101}) is None
    assert watch.look(1000, {0: 100, 1: 101}) is None
    assert [watch.look(1000 + s, {0: 100, 1: 101}) is None for s in (10, 20, 30, 40)] == [True] * 4
    assert watch.look(1046, {0: 100, 1: 101}) is not None


def test_whoever_has_ended_in_order_is_behind_nobody() -> None:
    """The others may still be behind it."""
    state, _ = SharedState.make(2)
    state.enter(0, ALL_RANKS)
    watch = HangWatch(state, IDLE, LIMIT, nothing)
    assert [watch.look(s, {1: 101}) is None for s in range(IDLE)] == [True] * IDLE
    assert watch.look(IDLE, {1: 101}) == Hang(1, IDLE, stopped=False, worked=False)
