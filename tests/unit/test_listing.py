"""`sftx ls` and `outputs/latest`."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from sftx import cli
from sftx.errors import RunFolderError
from sftx.runs.saved.listing import list_runs
from sftx.training.saving.run_folder import LATEST, RunFolder, point_latest


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def leave(name: str, started: str = "2026-01-01T10:00:00+00:00", losses: tuple[float, ...] = (), **facts: Any) -> Path:
    path = Path("outputs") / name
    (path / "checkpoints/step-000002").mkdir(parents=True)
    (path / "checkpoints/step-000002/manifest.json").write_text("{}")
    facts = {"status": "completed", "command": "python train.py", "environment": {"started": started}} | facts
    (path / "manifest.json").write_text(json.dumps(facts))
    (path / "config.yaml").write_text("seed: 42\n")
    records = [json.dumps({"step": step, "eval/loss": loss}) + "\n" for step, loss in enumerate(losses)]
    (path / "metrics.jsonl").write_text("".join(records))
    return path


def test_runs_and_trials_are_listed_newest_first(capsys: pytest.CaptureFixture[str]) -> None:
    leave("runs/a", losses=(3.0, 2.5, 2.75))
    trial = leave("sweeps/x/0", "2026-01-02T10:00:00+00:00", (float("nan"), 4.0), status="stopped") / "trial.json"
    trial.write_text(json.dumps({"status": "failed", "overrides": ["seed=1", "data.columns={a: b}"]}))
    Path("outputs/sweeps/x/1").mkdir()
    Path("outputs/sweeps/x/1/trial.json").write_text(json.dumps({"status": "failed", "overrides": ["seed=2"]}))
    point_latest(Path("outputs/runs/a"))
    assert cli.run(["ls"]) == 0
    assert capsys.readouterr().out == (
        "state      best loss  started           run                 command\n"
        "stopped    4.0000     2026-01-02 10:00  outputs/sweeps/x/0  seed=1 'data.columns={a: b}'\n"
        "completed  2.5000     2026-01-01 10:00  outputs/runs/a      python train.py\n"
        "failed     -          -                 outputs/sweeps/x/1  seed=2\n"
    )
    assert cli.run(["ls", "outputs/sweeps", "--json"]) == 0
    assert [run["path"] for run in json.loads(capsys.readouterr().out)] == ["outputs/sweeps/x/0", "outputs/sweeps/x/1"]


def test_a_run_without_a_process_was_killed() -> None:
    path = leave("runs/a", status="running")
    assert [run.state for run in list_runs(path)] == ["killed"]
    run = RunFolder(path)
    assert run.lock() is None
    assert [run.state for run in list_runs(path)] == ["running"]
    owner = (path / ".lock").read_text()
    gone = os.spawnlp(os.P_WAIT, "sh", "sh", "-c", "echo $$ > pid") or int(Path("pid").read_text())
    (path / ".lock").write_text(owner.replace(f"process {os.getpid()} ", f"process {gone} "))
    assert [run.state for run in list_runs(path)] == ["killed"]
    (path / ".lock").write_text(f"process {gone} on not-{socket.gethostname()}, since then")
    assert [run.state for run in list_runs(path)] == ["running"], "nothing is known of another host"
    run.unlock()


def test_damaged_runs_are_listed_and_control_characters_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    (leave("runs/a") / "manifest.json").write_text("{")
    leave("runs/b", command="python train.py \x1b[31m", losses=(1.0,))
    assert cli.run(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("outputs/runs/b  python train.py <U+001B>[31m")
    assert lines[2].startswith("unknown ")


def test_nothing_to_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunFolderError, match="outputs: no such folder"):
        cli.run(["ls"])
    Path("outputs").mkdir()
    assert cli.run(["ls"]) == 0
    assert capsys.readouterr().err == "outputs: no runs\n"


def test_latest_leads_to_the_newest_run_in_outputs(tmp_path: Path) -> None:
    first, second = leave("runs/a"), leave("sweeps/x/0")
    assert point_latest(first) is None
    assert LATEST.readlink() == Path("runs/a"), "relative: the folder may be moved"
    assert point_latest(second.absolute()) is None
    assert LATEST.resolve() == second.resolve()
    (tmp_path / "elsewhere").mkdir()
    assert point_latest(tmp_path / "elsewhere") is None
    assert LATEST.resolve() == second.resolve(), "a run elsewhere is not in outputs/"
    assert {p.name for p in Path("outputs").iterdir()} == {"runs", "sweeps", "latest"}


def test_a_run_goes_on_where_there_can_be_no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    path = leave("runs/a")
    LATEST.write_text("the user's own")
    assert point_latest(path) == "outputs/latest: does not lead to this run: exists and is not a link"
    assert LATEST.read_text() == "the user's own"
    LATEST.unlink()

    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert point_latest(path) == "outputs/latest: does not lead to this run: Operation not permitted"
    assert not LATEST.exists()
