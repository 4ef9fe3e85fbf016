"""One of several ranks fails, is killed, ends too early or hangs: the run ends within seconds and names it."""

from __future__ import annotations

import json
import os
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

from sftx.config.check import freeze
from sftx.config.compose import compose_checked
from sftx.errors import EXIT_FAULT, EXIT_USER
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
        (found,) = [p for p in self.processes() if "sftx.parallel.rank" in p.cmdline() and f"{number}" in p.cmdline()]
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
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in [*MATRIX, *MOMENTS, *OTHERS]]


@pytest.mark.parametrize(("kind", "count", "moment", "rank"), [*QUICK, *SLOW])
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
    assert_goes_on(tmp_path)
