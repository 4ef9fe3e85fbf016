"""Off a terminal a run says at least every minute where it stands."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tests.conftest import SMALL, over

import sftx.training.measure.progress as progress
from sftx.run import run
from sftx.training.measure.progress import Progress


def trial(step: int = 0, total: int = 120, tokens: int = 0, loss: float | None = None) -> Any:
    made = None if loss is None else SimpleNamespace(loss=loss)
    config = SimpleNamespace(disable_tqdm=False)
    return SimpleNamespace(
        config=config, step=step, steps=SimpleNamespace(total=total), tokens_seen=tokens, last_result=made
    )


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(progress.log, "info", lambda text, *values: lines.append(text % values))
    return lines


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [1000.0]
    monkeypatch.setattr(progress, "clock", lambda: time[0])
    return time


def test_a_line_every_minute(now: list[float], said: list[str]) -> None:
    one = trial()
    with Progress(SimpleNamespace(engine=SimpleNamespace(is_main=True)), [one]) as shown:
        for second in range(150):
            now[0] = 1000.0 + second
            shown.tick(one)
            if second % 10 == 9:
                one.step, one.tokens_seen = one.step + 1, one.tokens_seen + 5000
                one.last_result = SimpleNamespace(loss=2.0)
                shown.update(one)
    assert said == [
        "step 6/120  loss 2.0000  500 tokens/s  19 min left",
        "step 12/120  loss 2.0000  500 tokens/s  18 min left",
    ]


def test_a_step_that_takes_longer_says_what_is_known(now: list[float], said: list[str]) -> None:
    one = trial()
    shown = Progress(SimpleNamespace(engine=SimpleNamespace(is_main=True)), [one])
    now[0] += 61
    shown.tick(one)
    assert said == ["step 0/120"]


def test_other_ranks_say_nothing(now: list[float], said: list[str]) -> None:
    shown = Progress(SimpleNamespace(engine=SimpleNamespace(is_main=False)), [trial()])
    now[0] += 61
    shown.tick(trial())
    assert said == []


def test_a_run_says_it_in_steps_and_in_evaluations(monkeypatch, make_config, capsys) -> None:
    """The clock advances by a minute whenever it is asked: at each micro-batch and each batch of an evaluation."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(progress, "clock", lambda: 60.0 * next(ticks))
    run([make_config(*over(SMALL, "mode=lora", "max_steps=2", "eval_steps=2", "logging_steps=100"), small=False)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len([line for line in lines if line.startswith("step 1/2  loss") and "left" in line]) >= 4, lines
    assert [line for line in lines if line.startswith("step 0/2") and "eval" not in line], lines
