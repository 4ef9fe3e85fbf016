"""A disk that refuses: one message, exit code 2, nothing half-written, and the run goes on once the disk is mended."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.faults.kill import FINAL, RUN, SAVE, Zygote
from tests.faults.runs import composed, leftovers, outcome, words
from tests.faults.test_kill import Make, Straight, at_write, finish, published, said
from tests.faults.test_kill import straight as straight

from sftx.errors import RunFolderError
from sftx.files import check_writable, remove_folder, write_folder, write_text
from sftx.logs import RunLog, ThirdPartyLog
from sftx.training.saving import checkpoint

CAUSES = {
    "ENOSPC+": r"the disk is full.*bytes free",
    "EROFS+": "the disk is read-only",
    "EACCES+": "permission denied",
    "EIO": "the disk failed",
    "EIO+": "the disk failed",
}
"""With `+` every later write of the run is refused too."""


@pytest.fixture(scope="module")
def stopped(zygote: Zygote, straight: Make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run with the checkpoints of steps 2 and 4, which was killed before it saved the last, 6."""
    folder, one = tmp_path_factory.mktemp("stopped") / "run", straight("lora")
    report = zygote.run(folder, words(folder, *one.typed), **at_write(SAVE, one.saves()[-1].start))
    assert report["code"] == -signal.SIGKILL
    assert [checkpoint.step_of(f) for f in checkpoint.listed(folder / "checkpoints")] == [2, 4]
    yield folder
    shutil.rmtree(folder)


def refused(
    zygote: Zygote, folder: Path, one: Straight, where: str, number: int, how: str, *, costs_nothing: bool = False
) -> None:
    """Go on with a run whose disk refuses a write, and look at what it says and leaves."""
    stage = f"{how} at {where} {number}"
    report = zygote.run(folder, words(folder, *one.typed), **at_write(where, number, how))
    text = said(folder)
    if costs_nothing and report["code"] == 0:
        assert outcome(folder) == one.end, stage
        assert leftovers(folder) == [], stage
        return
    assert report["code"] == 2, f"{stage}: exit code {report['code']}\n{text}"
    anywhere = costs_nothing or where == RUN  # a later write is the first that fails
    place = r"\S+" if anywhere else {SAVE: r"checkpoints/step-\d+", FINAL: "final"}[where]
    messages = re.findall(rf"^sftx: {re.escape(str(folder))}/{place}: .*{CAUSES[how]}.*$", text, re.MULTILINE)
    assert len(messages) == 1, f"{stage}: {text}"
    assert text.count("sftx: ") == 1, f"{stage}: {text}"
    assert "Traceback" not in text, f"{stage}: {text}"
    assert "Logging error" not in text, f"{stage}: {text}"
    if how != "EROFS+":  # which refuses to remove, too
        left = leftovers(folder)
        assert not left, f"{stage}: {left}"
    if where == SAVE:
        steps = [checkpoint.step_of(f) for f in checkpoint.listed(folder / "checkpoints")]
        assert steps[:2] == [2, 4] or 6 in steps, f"{stage}: {steps}: the older was removed before the newer was there"
    published(folder)


def costs_nothing(calls: list[tuple[str, str]], number: int, how: str) -> bool:
    """Return True if a write may be refused without harm: a folder made that is there, or a removal left to the sweep.

    A full disk refuses neither a new name nor new rights: a later write is the first that fails.
    """
    call, path = calls[number - 1]
    if how == "ENOSPC+" and call in ("rename", "chmod"):
        return True
    made_before = path == "checkpoints" or (call, path) in calls[: number - 1]
    return call in ("remove", "rmdir") or (call == "mkdir" and made_before)


@pytest.mark.parametrize(
    ("how", "call"),
    [
        ("ENOSPC+", "serialize"),
        pytest.param("ENOSPC+", "open", marks=pytest.mark.faults),
        ("EROFS+", "mkdir"),
        pytest.param("EACCES+", "rename", marks=pytest.mark.faults),
        ("EIO", "fsync"),
    ],
)
def test_a_save_that_the_disk_refuses(
    zygote: Zygote, straight: Make, stopped: Path, tmp_path: Path, how: str, call: str
) -> None:
    one, folder = straight("lora"), tmp_path / "run"
    shutil.copytree(stopped, folder)
    calls = [c for place, c, _ in one.calls if place == SAVE][one.saves()[-1].start - 1 :]
    refused(zygote, folder, one, SAVE, calls.index(call, 1) + 1, how)
    assert published(folder) == 4
    finish(zygote, folder, one)


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", CAUSES)
def test_every_stage_may_be_refused(zygote: Zygote, straight: Make, stopped: Path, tmp_path: Path, how: str) -> None:
    """Each write of a save, its rotation, and of final/; each tenth run is brought to its end."""
    one, failures = straight("lora"), []
    calls = {place: [(call, path) for where, call, path in one.calls if where == place] for place in (SAVE, FINAL)}
    calls[SAVE] = calls[SAVE][one.saves()[-1].start - 1 :]
    moments = [(where, at) for where in (SAVE, FINAL) for at in range(1, len(calls[where]) + 1)]
    for number, (where, at) in enumerate(moments):
        folder = tmp_path / f"{where}-{at}"
        shutil.copytree(stopped, folder)
        try:
            refused(zygote, folder, one, where, at, how, costs_nothing=costs_nothing(calls[where], at, how))
            if number % 10 == 0:
                finish(zygote, folder, one)
        except AssertionError as error:
            failures.append(str(error))
        shutil.rmtree(folder)
    assert not failures, f"{len(failures)} of {len(moments)}:\n" + "\n\n".join(failures)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        pytest.param("ENOSPC+", ".manifest.json", marks=pytest.mark.faults),
        ("EROFS+", ".lock"),
        pytest.param("EIO", "train.log", marks=pytest.mark.faults),
        ("ENOSPC+", "metrics.jsonl"),
    ],
)
def test_another_file_of_the_run_that_the_disk_refuses(
    zygote: Zygote, straight: Make, stopped: Path, tmp_path: Path, how: str, name: str
) -> None:
    """The last time that it is opened, by a run that goes on."""
    one, looked, folder = straight("lora"), tmp_path / "looked", tmp_path / "run"
    shutil.copytree(stopped, looked)
    shutil.copytree(stopped, folder)
    report = zygote.run(looked, words(looked, *one.typed), calls=True)
    calls = [(call, path) for place, call, path in report["calls"] if place == RUN]
    at = max(n for n, (call, path) in enumerate(calls, 1) if call == "open" and path.startswith(name))
    refused(zygote, folder, one, RUN, at, how)
    finish(zygote, folder, one)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of six megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def fill_up(disk: Path, after: Path) -> None:
    """Take all that is left of a disk once a checkpoint is there."""
    until = time.monotonic() + 120
    while not after.exists() and time.monotonic() < until:
        time.sleep(0.005)
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_disk_that_is_full_in_truth(zygote: Zygote, straight: Make, small_disk: Path) -> None:
    """Something else fills it while the run is under way."""
    one, folder = straight("lora"), small_disk / "run"
    argv = words(folder, *one.typed)
    outside = {"said": str(small_disk.parent / "run.said")}
    other = threading.Thread(target=fill_up, args=(small_disk, folder / "checkpoints" / "step-000002"))
    other.start()
    report = zygote.run(folder, argv, **outside)
    other.join()
    text = (small_disk.parent / "run.said").read_text()
    assert report["code"] == 2, text
    assert re.search(rf"^sftx: {folder}/.*: the disk is full \([\d,]+ bytes free", text, re.MULTILINE), text
    assert text.count("sftx: ") == 1
    assert "Traceback" not in text
    assert leftovers(folder) == []
    before = published(folder)
    assert before >= 2
    (small_disk / "filler").unlink()
    report = zygote.run(folder, argv, **outside)
    assert report["code"] == 0
    assert f"(step {before} of 6)" in (folder / "train.log").read_text()
    assert outcome(folder) == one.end


def test_a_disk_that_is_too_small_in_truth(zygote: Zygote, small_disk: Path) -> None:
    """It is refused before the first step."""
    subprocess.run(["mount", "-o", "remount,size=1500k", str(small_disk)], check=True)
    said_there = small_disk.parent / "run.said"
    report = zygote.run(small_disk / "run", words(small_disk / "run"), said=str(said_there))
    assert report["code"] == 2
    assert re.search(
        r"^sftx: output_dir=.*: [\d,]+ bytes are free on its disk, about", said_there.read_text(), re.MULTILINE
    )
    assert not list(small_disk.iterdir())


# Without a run: what files.py does when it is refused.


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "sealed"
    folder.mkdir()
    if os.geteuid() == 0:
        if subprocess.run(["chattr", "+i", str(folder)], capture_output=True, check=False).returncode:
            pytest.skip("nothing is forbidden to root here")
        yield folder
        subprocess.run(["chattr", "-i", str(folder)], check=True)
    else:
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)


def test_a_folder_that_may_not_be_written_is_named(sealed: Path) -> None:
    for attempt in (
        lambda: check_writable(sealed / "run"),
        lambda: write_text(sealed / "a.txt", "a"),
        lambda: write_folder(sealed / "b", lambda into: None),
    ):
        with pytest.raises(RunFolderError, match=rf"{sealed}.*permission denied"):
            attempt()
    assert list(sealed.iterdir()) == []
    with pytest.raises(RunFolderError, match="permission denied"):
        composed_run(sealed)


def composed_run(folder: Path) -> None:
    from sftx.run import run

    run([composed(folder / "run")])


def test_a_folder_that_cannot_be_removed_is_left_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "step-000002"
    folder.mkdir()
    (folder / "a").write_text("a")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(5, "Input/output error", str(self)) if self == folder else AssertionError(rename)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(RunFolderError, match="step-000002: cannot be written: the disk failed"):
        remove_folder(folder)
    assert [p.name for p in tmp_path.rglob("*")] == ["step-000002", "a"]


def test_a_log_that_the_disk_refuses_is_done_without(capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    log = RunLog(ThirdPartyLog(), is_main=True)
    log.to_file(Path("/dev/full"), "default")
    for number in range(3):
        log.logger.info("message %d", number)
    log.close()
    said = capsys.readouterr()
    assert [line.split(":")[0] for line in said.out.splitlines()] == [
        "message 0",
        "/dev/full",
        "message 1",
        "message 2",
    ]
    assert said.err == ""
