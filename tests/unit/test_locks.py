"""Locks between processes, also on a disk without flock."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sftx.locks import Locked, exclusive

SLOT = "import sys; from pathlib import Path; from sftx.locks import exclusive; lock = Path(sys.argv[1]) / 'x.lock'\n"


def test_a_lock_is_one_processes_at_a_time(tmp_path: Path) -> None:
    lock = tmp_path / "deep" / "x.lock"
    for _ in range(2):
        with exclusive(lock, wait=True), lock.open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert not lock.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_flock_is_refused_a_file_is_created_exclusively(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    warnings: list[str] = []
    monkeypatch.setattr(logging.getLogger("sftx"), "warning", lambda text, *_: warnings.append(text))
    for _ in range(2):
        with exclusive(tmp_path / "x.lock", wait=False):
            with pytest.raises(Locked, match=f"process {os.getpid()} on "), exclusive(tmp_path / "x.lock", wait=False):
                pass
            assert (tmp_path / "x.lock.soft").exists()
        assert list(tmp_path.iterdir()) == []
    assert len(warnings) == 1
    assert "has no file locks" in warnings[0]


def test_a_killed_holder_keeps_nobody_out(tmp_path: Path) -> None:
    code = SLOT + "held = exclusive(lock, wait=True)\nheld.__enter__()\nprint(1, flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, str(tmp_path)]
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(Locked, match=f"process {holder.pid} on "), exclusive(tmp_path / "x.lock", wait=False):
        pass
    holder.kill()
    holder.wait()
    with exclusive(tmp_path / "x.lock", wait=False):
        pass


def test_a_forked_process_neither_holds_nor_removes_its_parents_lock(tmp_path: Path) -> None:
    held = exclusive(tmp_path / "x.lock", wait=False)
    held.__enter__()
    child = multiprocessing.get_context("fork").Process(target=held.__exit__, args=(None, None, None))
    child.start()
    child.join()
    assert (tmp_path / "x.lock").exists()
    held.__exit__(None, None, None)
    assert not (tmp_path / "x.lock").exists()
