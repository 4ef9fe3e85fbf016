"""Which rank ended a run, and when the others are ended: with ranks that have no processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from sftx.errors import EXIT_STOPPED, EXIT_USER, RankError, StoppedError, printed
from sftx.parallel.rank_process import first_frame
from sftx.parallel.shared_state import ALL_RANKS
from sftx.parallel.supervisor import DOUBT_SECONDS, GRACE_SECONDS, SETTLE_SECONDS, Supervisor


@dataclass
class FakeRank:
    """A rank without a process."""

    number: int
    messages: dict[str, Any] = field(default_factory=dict)
    tail: list[str] = field(default_factory=list)
    ended: int | None = None
    ended_at: float = 0.0
    killed: bool = False
    sent: list[int] = field(default_factory=list)
    process: Any = field(default_factory=lambda: SimpleNamespace(pid=0))

    @property
    def runs(self) -> bool:
        return self.ended is None

    @property
    def finished(self) -> bool:
        return "finished" in self.messages

    def kill(self) -> None:
        self.killed = True

    def send(self, number: int) -> None:
        self.sent.append(number)

    def fail(self, time: float, summary: str, *, is_cause: bool = True, stopped: bool = False, code: int = 1) -> None:
        said = f"sftx: {summary}" if stopped else f"Traceback\n{summary}"
        self.messages["failed"] = {
            "time": time, "is_cause": is_cause, "stopped": stopped, "exit_code": code, "summary": summary,
            "printed": said,
        }  # fmt: skip

    def end(self, time: float, code: int) -> None:
        self.ended, self.ended_at = code, time


@pytest.fixture
def three() -> tuple[Supervisor, list[FakeRank]]:
    supervisor = Supervisor(3, module="", hang_seconds=None, timeout_seconds=1800)
    ranks = [FakeRank(n) for n in range(3)]
    supervisor.ranks = ranks  # type: ignore[assignment]
    return supervisor, ranks


def verdict(supervisor: Supervisor) -> str | None:
    return None if supervisor.failure is None else str(supervisor._error(supervisor.failure))


def test_what_came_out_of_a_meeting_is_not_the_cause(three) -> None:
    """That a rank was killed is noticed after the connections to it broke."""
    supervisor, ranks = three
    ranks[0].fail(10.0, "RuntimeError: Connection closed by peer", is_cause=False)
    supervisor._decide(10.1)
    ranks[2].end(10.2, -9)
    supervisor._decide(10.2)
    assert verdict(supervisor) is None
    supervisor._decide(10.1 + SETTLE_SECONDS)
    assert (verdict(supervisor) or "").startswith("rank 2 was killed by SIGKILL (perhaps by the kernel")
    assert supervisor.state.root_cause == 2


def test_the_first_of_several_causes_is_the_one(three) -> None:
    supervisor, ranks = three
    ranks[1].fail(10.2, "ValueError: second")
    ranks[2].fail(10.1, "ValueError: first")
    ranks[0].end(10.0, -6)  # an abort may follow from a connection that broke
    supervisor._decide(10.3)
    assert verdict(supervisor) == "rank 2 failed: ValueError: first"


def test_without_a_cause_the_first_meeting_that_broke_is_named(three) -> None:
    supervisor, ranks = three
    ranks[1].fail(10.0, "RuntimeError: timed out", is_cause=False)
    supervisor._decide(10.0)
    supervisor._decide(10.0 + SETTLE_SECONDS)
    assert verdict(supervisor) is None
    supervisor._decide(10.0 + DOUBT_SECONDS)
    assert verdict(supervisor) == "rank 1 failed: RuntimeError: timed out"


@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_must_say_that_it_has_finished(three, code: int) -> None:
    supervisor, ranks = three
    ranks[1].end(10.0, code)
    supervisor._decide(10.0)
    supervisor._decide(11.0)
    assert verdict(supervisor) == f"rank 1 ended with exit code {code} before its work was done"


def test_what_comes_after_the_end_of_the_work_is_no_failure(three) -> None:
    supervisor, ranks = three
    for rank in ranks:
        rank.messages["finished"] = {}
        rank.end(10.0, -11)
    supervisor._decide(20.0)
    assert supervisor.failure is None


def test_the_last_rank_to_end_is_heard(three) -> None:
    """Nobody comes back to decide when no rank runs any more."""
    supervisor, ranks = three
    for rank in ranks[:2]:
        rank.messages["finished"] = {}
        rank.end(10.0, 0)
    ranks[2].end(10.0, 0)
    supervisor._decide(10.0)
    assert verdict(supervisor) == "rank 2 ended with exit code 0 before its work was done"


def test_the_others_get_a_moment_and_then_are_killed(three) -> None:
    supervisor, ranks = three
    ranks[1].fail(10.0, "ValueError: x")
    ranks[1].end(10.0, 1)
    for now in (10.0, 11.0, 10.0 + GRACE_SECONDS - 0.1):
        supervisor._decide(now)
    assert not any(rank.killed for rank in ranks)
    supervisor._decide(10.0 + GRACE_SECONDS)
    assert [rank.killed for rank in ranks] == [True, False, True]


def test_after_a_signal_nobody_is_killed_who_may_still_save(three) -> None:
    supervisor, ranks = three
    ranks[1].fail(10.0, "SIGTERM: stopped", stopped=True, code=EXIT_STOPPED)
    ranks[1].end(10.0, EXIT_STOPPED)
    for now in range(10, 1000):
        supervisor._decide(now)
    assert not any(rank.killed for rank in ranks)
    assert [len(rank.sent) for rank in ranks] == [1, 1, 1], "the others are asked too, once"
    supervisor.state.enter(2, ALL_RANKS)  # to which rank 1 will not come
    supervisor._decide(1000)
    supervisor._decide(1000 + GRACE_SECONDS)
    assert [rank.killed for rank in ranks] == [False, False, True]
    ranks[0].fail(1001.0, "SIGTERM: stopped after step 3", stopped=True, code=EXIT_STOPPED)
    error = supervisor._error(supervisor.failure)
    assert isinstance(error, StoppedError)
    assert str(error) == "SIGTERM: stopped after step 3", "the main rank knows more"


def test_what_the_cause_has_printed_comes_first_and_its_name_last(three) -> None:
    supervisor, ranks = three
    ranks[1].tail.append("loading")
    ranks[1].fail(10.0, "my.csv:3: bad", code=EXIT_USER)
    supervisor._decide(10.0)
    supervisor._decide(11.0)
    error = supervisor._error(supervisor.failure)
    assert isinstance(error, RankError)
    assert error.exit_code == EXIT_USER
    assert printed(error).splitlines() == [
        "[rank 1] loading", "Traceback", "my.csv:3: bad", "sftx: rank 1 failed: my.csv:3: bad"
    ]  # fmt: skip


def test_where_a_rank_stands_is_said_in_a_few_words() -> None:
    stack = '  File "/a/b/my_parts.py", line 9 in on_step\n  File "/a/loop.py", line 80 in _advance'
    assert first_frame(stack) == "my_parts.py:9 (on_step)"
    assert first_frame("") == ""
