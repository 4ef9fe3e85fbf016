"""One of several ranks fails, is killed, ends too early or hangs: the run ends within seconds and names it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from tests.conftest import ROOT, SMALL, over

from sftx.config.checks.check import freeze
from sftx.config.composition.prepare import compose_checked
from sftx.errors import EXIT_FAULT, EXIT_STOPPED, EXIT_USER
from sftx.run import run

PARTS = str(Path(__file__).parent)
HERE = ["allow_targets=[faulty.*]"]
SHARED = ["save_strategy=steps", "save_steps=2", "eval_steps=2", "max_train_rows=24", "max_steps=6", "mode=lora"]
HANG = 6
"""Seconds until a rank that hangs is given up, where the default would take a test too long."""
SAID = {
    "raises": "failed: ValueError: boom",
    "refuses": "failed: my.csv:7: a row that only this rank minds",
    "killed": "was killed by SIGKILL (perhaps by the kernel, out of memory: see dmesg)",
    "crashes": "was killed by SIGSEGV",
    "aborts": "was killed by SIGABRT",
    "exits": "ended with exit code 0 before its work was done",
    "leaves": "failed: sys.exit(0) was called before its work was done",
    "sleeps": "hangs: the others have waited for it for {wait} s, and it does nothing at faulty.py:",
    "stopped": "hangs: the others have waited for it for {wait} s, and it was stopped by a signal",
}


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float
    """From the fault to the end."""

    @property
    def last(self) -> str:
        return self.err.splitlines()[-1]


def words(count: int, folder: Path, *typed: str) -> list[str]:
    """Four sequences a step, however many ranks share them."""
    share = [f"gradient_accumulation_steps={4 // count}", f"output_dir={folder / 'run'}"]
    return over(SMALL, *over(SHARED, "parallel=ddp", f"parallel.num_processes={count}", *share, *typed))


def fault(kind: str, rank: int, folder: Path, moment: str = "step") -> list[str]:
    node = {"kind": kind, "rank": rank, "mark": folder / "mark"}
    if moment == "group":
        return [*HERE, "parallel._target_=faulty.FaultyDdp", *(f"+parallel.{k}={v}" for k, v in node.items())]
    node |= {"_target_": "faulty.Fault", "moment": moment}
    return [*HERE, *(f"+callback.fault.{k}={v}" for k, v in node.items())]


class Command:
    """A command that is running; what belongs to it is known by a variable of its environment."""

    def __init__(self, argv: list[str], **env: str) -> None:
        self.name = uuid.uuid4().hex
        path = os.pathsep.join(filter(None, [PARTS, os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "SFTX_TEST_NAME": self.name} | env
        self.process = subprocess.Popen(
            [sys.executable, "train.py", *argv], cwd=ROOT, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SFTX_TEST_NAME") == self.name and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def rank(self, number: int) -> psutil.Process:
        (found,) = [p for p in self.processes() if "sftx.runs.rank" in p.cmdline() and f"{number}" in p.cmdline()]
        return found

    def wait_for(self, what: Callable[[], bool], seconds: float = 90) -> None:
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, "it did not come"
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)

    def wait_for_steps(self, folder: Path, count: int = 2) -> None:
        metrics = folder / "run" / "metrics.jsonl"
        self.wait_for(lambda: metrics.is_file() and metrics.read_text().count("train/loss") >= count)

    def end(self, since: Callable[[], float], timeout: float = 120) -> Ended:
        out, err = self.process.communicate(timeout=timeout)
        ended = Ended(self.process.returncode, out, err, time.monotonic() - since())
        assert not self.processes(), "an orphan is left"
        return ended


def mark(folder: Path) -> Callable[[], float]:
    return lambda: float((folder / "mark").read_text())


def assert_goes_on(folder: Path) -> None:
    """One process goes on from the last checkpoint, and ends."""
    (saved,) = (folder / "run" / "checkpoints").glob("step-*")
    typed = ["parallel=single", "gradient_accumulation_steps=4", f"output_dir={folder / 'run'}"]
    run([freeze(compose_checked(over(SMALL, *over(SHARED, *typed))))])
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    assert manifest["status"] == "completed"
    assert manifest["attempts"][-1]["from_step"] == int(saved.name.partition("-")[2]) > 0


def assert_named(ended: Ended, kind: str, rank: int, wait: int = HANG) -> None:
    assert ended.last.startswith(f"sftx: rank {rank} {SAID[kind].format(wait=wait)}"), ended.err[-3000:]
    assert ended.code == (EXIT_USER if kind == "refuses" else EXIT_FAULT)
    hangs = kind in ("sleeps", "stopped")
    assert ended.seconds < (wait + 10 if hangs else 10), ended.seconds
    assert ended.err.count("Traceback") == (kind in ("raises", "leaves")), ended.err[-3000:]


QUICK = [("raises", 2, "step", 1), ("killed", 2, "step", 0)]
MATRIX = [
    (kind, count, "step", rank)
    for kind in ("raises", "killed", "exits", "sleeps", "stopped")
    for count, rank in ((2, 0), (2, 1), (4, 2))
    if (kind, count, "step", rank) not in QUICK
]
MOMENTS = [
    (kind, 2, moment, rank)
    for kind in ("raises", "killed", "exits", "stopped")
    for moment in ("group", "evaluation", "save")
    for rank in (0, 1)
]
OTHERS = [
    ("sleeps", 2, "evaluation", 0), ("sleeps", 4, "save", 3), ("sleeps", 2, "group", 1), ("refuses", 2, "step", 1),
    ("refuses", 4, "save", 0), ("crashes", 2, "step", 1), ("aborts", 2, "step", 1), ("leaves", 2, "evaluation", 1),
]  # fmt: skip
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS]
LONG = [pytest.param(*case, marks=pytest.mark.faults) for case in [*MATRIX, *MOMENTS]]


@pytest.mark.parametrize(("kind", "count", "moment", "rank"), [*QUICK, *SLOW, *LONG])
def test_a_rank_brings_the_run_down_by_name(tmp_path: Path, kind: str, count: int, moment: str, rank: int) -> None:
    command = Command(words(count, tmp_path, f"parallel.hang_seconds={HANG}", *fault(kind, rank, tmp_path, moment)))
    ended = command.end(mark(tmp_path))
    assert_named(ended, kind, rank)
    if rank and kind != "stopped":
        assert f"[rank {rank}] about to misbehave" in ended.err
    if moment == "group":
        assert not (tmp_path / "run").exists()
        return
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert "boom" in manifest["error"] if kind == "raises" else f"rank {rank}" in manifest["error"] or rank == 0
    assert "ERROR failed: " in (tmp_path / "run" / "train.log").read_text()
    if (kind, count, moment, rank) not in QUICK:
        assert_goes_on(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count", "rank"), [("sleeps", 2, 1), ("stopped", 4, 0)])
def test_a_rank_that_hangs_is_given_up_within_a_minute(tmp_path: Path, kind: str, count: int, rank: int) -> None:
    command = Command(words(count, tmp_path, *fault(kind, rank, tmp_path)))
    ended = command.end(mark(tmp_path))
    assert_named(ended, kind, rank, wait=45)
    assert ended.seconds < 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "moment", "rank"), [("works", "step", 1), ("works", "evaluation", 0), ("waits", "save", 0)]
)
def test_a_rank_that_is_late_is_not_one_that_hangs(tmp_path: Path, kind: str, moment: str, rank: int) -> None:
    """It works for twice as long as one may hang; or the main one waits as long for the disk, in a save."""
    command = Command(words(2, tmp_path, f"parallel.hang_seconds={HANG}", *fault(kind, rank, tmp_path, moment)))
    ended = command.end(mark(tmp_path))
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "completed"


@pytest.mark.slow
def test_a_signal_to_the_command_ends_all_ranks_in_order(tmp_path: Path) -> None:
    command = Command(words(2, tmp_path, "max_steps=5000", "save_steps=5000", "eval_steps=5000"))
    command.wait_for_steps(tmp_path)
    asked = time.monotonic()
    os.killpg(command.process.pid, signal.SIGTERM)  # as a terminal or a scheduler does
    time.sleep(0.05)
    os.killpg(command.process.pid, signal.SIGTERM)
    ended = command.end(lambda: asked)
    assert ended.code == EXIT_STOPPED, ended.err
    assert "sftx: SIGTERM: stopped after step " in ended.err
    assert len(ended.err.splitlines()) == 2, "what became of it, and the command that continues it"
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "stopped"
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("seconds", [0.2, 2.0, None])
def test_a_signal_while_the_ranks_start_is_not_lost(
    tmp_path: Path, number: signal.Signals, seconds: float | None
) -> None:
    """So many seconds after the ranks are there; or while one of them waits for the other, that is late to join."""
    late = fault("is_late", 1, tmp_path, "group") if seconds is None else []
    command = Command(words(2, tmp_path, *late))
    if seconds is None:
        command.wait_for((tmp_path / "mark").exists)
    else:
        command.wait_for(lambda: len([p for p in command.processes() if "sftx.runs.rank" in p.cmdline()]) == 2)
        time.sleep(seconds)
    asked = time.monotonic()
    command.process.send_signal(number)
    ended = command.end(lambda: asked)
    assert ended.code == EXIT_STOPPED, ended.err
    assert ended.last == f"sftx: {number.name}: stopped before the first step; there was nothing to save."
    assert ended.seconds < 15
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_ends_all_in_order(tmp_path: Path, rank: int) -> None:
    command = Command(words(2, tmp_path, "max_steps=5000", "save_steps=5000"))
    command.wait_for_steps(tmp_path)
    asked = time.monotonic()
    command.rank(rank).send_signal(signal.SIGUSR1)
    ended = command.end(lambda: asked)
    assert ended.code == EXIT_STOPPED, ended.err
    assert "stopped after step" in ended.err
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "stopped"


@pytest.mark.slow
def test_a_killed_command_takes_its_ranks_and_their_loaders_along(tmp_path: Path) -> None:
    command = Command(words(2, tmp_path, "max_steps=5000", "dataloader_num_workers=2", "save_steps=5000"))
    command.wait_for_steps(tmp_path)
    assert len(command.processes()) >= 7
    killed = time.monotonic()
    command.process.kill()
    while command.processes():
        assert time.monotonic() - killed < 10, [p.cmdline() for p in command.processes()]
        time.sleep(0.1)
    command.process.communicate()


@pytest.mark.slow
def test_a_paused_command_pauses_its_ranks(tmp_path: Path) -> None:
    """Ctrl-Z comes to the command alone; nobody takes a pause for a hang."""
    command = Command(words(2, tmp_path, "max_steps=5000", "save_steps=5000", f"parallel.hang_seconds={HANG}"))
    command.wait_for_steps(tmp_path)
    command.process.send_signal(signal.SIGTSTP)
    command.wait_for(lambda: command.rank(0).status() == command.rank(1).status() == psutil.STATUS_STOPPED)
    time.sleep(2 * HANG)
    seen = (tmp_path / "run" / "metrics.jsonl").read_text().count("train/loss")
    command.process.send_signal(signal.SIGCONT)
    command.wait_for_steps(tmp_path, seen + 5)
    asked = time.monotonic()
    command.process.send_signal(signal.SIGTERM)
    assert command.end(lambda: asked).code == EXIT_STOPPED


@pytest.mark.slow
def test_each_trial_of_a_sweep_starts_its_ranks(tmp_path: Path) -> None:
    """Two commands at once on one machine, too: they meet at ports of their own."""
    argv = [w for w in words(2, tmp_path, "max_steps=2") if not w.startswith(("max_seq_length", "output_dir"))]
    sweeps = [tmp_path / "one", tmp_path / "other"]
    commands = [Command([*argv, "-m", "max_seq_length=96,8", f"hydra.sweep.dir={folder}"]) for folder in sweeps]
    started = time.monotonic()
    for command, folder in zip(commands, sweeps, strict=True):
        ended = command.end(lambda: started, timeout=240)
        assert ended.code == EXIT_USER, ended.err
        outcomes = [json.loads((folder / str(i) / "trial.json").read_text()) for i in range(2)]
        assert [o["status"] for o in outcomes] == ["completed", "failed"]
        assert outcomes[1]["error"].startswith("RankError: rank ")
        assert outcomes[0]["eval_loss"] < outcomes[0]["eval_loss_before"] + 1
        assert (folder / "0" / "final" / "adapter_model.safetensors").is_file()
        assert ended.out.index("--- trial 0") < ended.out.index("step 1/2") < ended.out.index("--- trial 1")
