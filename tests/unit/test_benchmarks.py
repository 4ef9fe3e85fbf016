"""`benchmarks/`: which runs are made again, what a run's figures are, and what the report says of them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sftx import PROJECT_ROOT


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(PROJECT_ROOT / "benchmarks"))
    return importlib.import_module


def row(peer: str, number: int = 1, case: str = "base", kind: str = "timed", **figures: Any) -> dict[str, Any]:
    facts = {"case": case, "peer": peer, "kind": kind, "round": number, "commit": "abc", "status": "done"}
    measured = {
        "tokens": 1000, "rate_tokens_cpu": 100.0, "rate_tokens_wall": 90.0, "peak_rss_mb": 900, "start_cpu_s": 9.0,
        "loss_mean": 10.0, "load": 0.5, "versions": {"torch": "2"}, "machine": "a machine",
    }  # fmt: skip
    return facts | measured | figures


def line(text: str, start: str) -> list[str]:
    """Return the cells of the first line of a table that begins so."""
    found = next(each for each in text.splitlines() if each.startswith(f"| {start}"))
    return [cell.strip() for cell in found.strip("|").split("|")]


# --- bookkeeping -----------------------------------------------------------------------------------------------------


@pytest.fixture
def runner(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`peers.main` that makes no runs but says which it would make."""
    peers, made = load("peers"), []

    def run(spec: dict[str, Any], python: str, *, seconds: float) -> dict[str, Any]:
        made.append((spec["peer"], spec["rate"]))
        return {"wall_s": 60.0} | ({"status": "failed", "error": "no"} if spec["peer"] == "trl" else {"status": "done"})

    monkeypatch.setattr(peers.launch, "run", run)
    monkeypatch.setattr(peers.launch, "make_work", lambda case: None)
    monkeypatch.setattr(peers, "model_folder", lambda name: tmp_path)
    spec_of: Callable[..., dict[str, Any]] = lambda case, peer, model: (  # noqa: E731
        case.facts() | {"peer": peer, "batching": "padded"}
    )
    monkeypatch.setattr(peers.launch, "spec_of", spec_of)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    file = tmp_path / "peers.jsonl"

    def call(*words: str) -> list[tuple[str, float]]:
        made.clear()
        venvs = [f"--venv={peer}={tmp_path}" for peer in ("trl", "plain")]
        assert peers.main(["--file", str(file), "--peers", "sftx,trl,plain", *venvs, *words]) == 0
        return list(made)

    call.file = file  # type: ignore[attr-defined]
    return call


def test_rounds_alternate_and_what_is_there_is_not_made_again(runner: Any) -> None:
    once = [("sftx", 2e-4), ("trl", 2e-4), ("plain", 2e-4)]
    check = [("sftx", 1e-12), ("trl", 1e-12), ("plain", 1e-12)]
    assert runner("--rounds", "1") == once + check
    assert runner("--rounds", "1") == []  # also the one that failed
    assert runner("--rounds", "2") == once
    assert runner("--rounds", "1", "--again") == once + check
    rows = [json.loads(text) for text in runner.file.read_text().splitlines()]
    assert [r["status"] for r in rows if r["peer"] == "trl"] == ["failed"] * 5


def test_without_time_a_line_says_so_and_the_run_is_made_later(runner: Any) -> None:
    assert runner("--rounds", "1", "--minutes", "0") == []
    rows = [json.loads(text) for text in runner.file.read_text().splitlines()]
    assert [r["status"] for r in rows] == ["not run"] * 6
    assert len(runner("--rounds", "1")) == 6
    assert runner("--rounds", "2", "--minutes", "0.5") == []  # a run took a minute before


def test_what_a_trainer_cannot_do_is_a_row(runner: Any) -> None:
    made = runner("--rounds", "1", "--cases", "packed")
    assert {peer for peer, _ in made} == {"sftx", "trl"}
    rows = [json.loads(text) for text in runner.file.read_text().splitlines()]
    assert {r["error"] for r in rows if r["peer"] == "plain"} == {"transformers' Trainer has no packing"}


def test_an_unknown_case_is_refused(runner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runner("--cases", "bass")
    assert "no bass; there are base, padded" in capsys.readouterr().err


def test_only_the_last_measured_commit_of_a_case_counts(load: Callable[[str], ModuleType]) -> None:
    latest = load("peer_parts.records").latest
    rows = [row("sftx", commit="old"), row("trl", commit="old"), row("sftx", commit="new"), row("sftx", case="padded")]
    assert [(r["case"], r["peer"], r["commit"]) for r in latest(rows)] == [
        ("base", "sftx", "new"), ("padded", "sftx", "abc"),
    ]  # fmt: skip


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_of_a_run(load: Callable[[str], ModuleType]) -> None:
    figures = load("peer_parts.meter").figures
    loop = {"wall": 10.0, "cpu": 5.0}
    steps = [
        {"wall": 12.0, "cpu": 7.0, "tokens": 100, "supervised": 10, "slots": 120},
        {"wall": 16.0, "cpu": 10.0, "tokens": 400, "supervised": 40, "slots": 480},
    ]
    found = figures(loop, steps, [4.0, 2.0])
    assert (found["rate_tokens_cpu"], found["later_tokens_cpu"]) == (80.0, 100.0)
    assert (found["rate_tokens_wall"], found["rate_supervised_cpu"]) == (66.7, 8.0)
    assert (found["start_cpu_s"], found["first_step_wall_s"]) == (5.0, 12.0)
    assert (found["loss_first"], found["loss_mean"]) == (4.0, 2.5)  # weighted by 10 and 30 supervised tokens
    assert figures(loop, steps, [4.0])["loss_mean"] is None  # it is not known which step it is of
    assert figures(loop, steps[:1], [4.0])["later_tokens_cpu"] is None
    assert figures(None, [], []) == {"steps": 0}


# --- the report ------------------------------------------------------------------------------------------------------


def everyone(load: Callable[[str], ModuleType], **ours: Any) -> list[dict[str, Any]]:
    """Return two rounds of the base case and the check, in which sftx is three times as fast."""
    peers = load("peer_parts.cases").PEERS
    mine = {"rate_tokens_cpu": 300.0, "peak_rss_mb": 800, "start_cpu_s": 8.0} | ours
    rows = [row(peer, number, **(mine if peer == "sftx" else {})) for number in (1, 2) for peer in peers]
    return rows + [row(peer, 0, kind="check") for peer in peers] + [row("trl", case="padded", rate_tokens_cpu=50.0)]


def test_goals_that_are_met(load: Callable[[str], ModuleType]) -> None:
    text = load("report").Report(everyone(load)).text()
    assert line(text, "tokens/CPU-s against TRL, packed")[2].startswith("3.00")
    assert line(text, "tokens/CPU-s against TRL, padded")[2:] == ["6.00 (trl, padded)", "pass"]
    for start in ("peak memory", "CPU-seconds from", "tokens, of 5", "loss of the untrained"):
        assert line(text, start)[3] == "pass"


@pytest.mark.parametrize(
    ("ours", "start"),
    [
        ({"rate_tokens_cpu": 180.0}, "tokens/CPU-s against the best"),
        ({"peak_rss_mb": 901}, "peak memory"),
        ({"start_cpu_s": 9.0}, "CPU-seconds from"),
        ({"tokens": 1030}, "tokens, of 5"),
    ],
)
def test_goals_that_are_not_met(load: Callable[[str], ModuleType], ours: dict[str, Any], start: str) -> None:
    assert line(load("report").Report(everyone(load, **ours)).text(), start)[3] == "**fail**"


def test_unequal_work_is_said(load: Callable[[str], ModuleType]) -> None:
    rows = everyone(load)
    next(r for r in rows if r["peer"] == "plain" and r["kind"] == "check")["loss_mean"] = 10.002
    text = load("report").Report(rows).text()
    assert line(text, "loss of the untrained")[2:] == ["+0.002 (plain)", "**fail**"]
    assert line(text, " | plain | 100")[8] == "+0.0% tokens, loss +0.002: **unequal**"


def test_what_failed_or_was_not_run_is_a_row(load: Callable[[str], ModuleType]) -> None:
    rows = [r for r in everyone(load) if r["peer"] not in ("swift", "litgpt")]
    rows.append(row("swift", status="failed", error="ValueError: a|b"))
    text = load("report").Report(rows).text()
    assert line(text, " | swift |  |")[8] == "failed: ValueError: a/b"
    assert line(text, " | litgpt |  |")[8] == "not run"
    assert line(text, "2 threads")[1] == "all"
    assert "not known without litgpt (base)" in line(text, "peak memory")[3]  # swift failed, so it is not missing


def test_a_ratio_is_the_median_of_those_of_each_round(load: Callable[[str], ModuleType]) -> None:
    rows = [
        row("sftx", n, rate_tokens_cpu=ours) for n, ours in ((1, 300.0), (2, 100.0), (3, 90.0), (4, 9.0))
    ] + [row("trl", n, rate_tokens_cpu=theirs) for n, theirs in ((1, 100.0), (2, 50.0), (3, 90.0))]  # fmt: skip
    assert load("report").Report(rows).ratio("base", "base", "trl", "rate_tokens_cpu") == 2.0


def test_the_report_in_the_repository_is_that_of_its_lines(load: Callable[[str], ModuleType]) -> None:
    folder = PROJECT_ROOT / "benchmarks"
    rows = [json.loads(text) for text in (folder / "peers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert load("report").Report(rows).text() == (folder / "report.md").read_text(encoding="utf-8")
