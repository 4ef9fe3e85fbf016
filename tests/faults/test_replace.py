"""A folder that is replaced is there under its name at any time, or is put back: the old one whole, or the new one."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.faults.kill import FINAL, SAVE, Watch, Zygote
from tests.faults.runs import composed, leftovers, outcome, words
from tests.faults.test_signals import interrupt

from sftx.errors import RunFolderError, StoppedError
from sftx.files import sweep, write_folder
from sftx.run import run
from sftx.training.saving import checkpoint


def filled(text: str) -> Callable[[Path], None]:
    def fill(into: Path) -> None:
        for name in ("a.txt", "b.txt"):
            (into / name).write_text(text)

    return fill


def content(folder: Path) -> set[str]:
    assert {p.name for p in folder.iterdir()} == {"a.txt", "b.txt"}
    return {p.read_text() for p in folder.iterdir()}


def killed_at(number: int, root: Path, action: Callable[[], None]) -> bool:
    """Do something in a process of its own that is killed before its n-th write; return whether it came to that."""
    child = os.fork()
    if not child:
        Watch(root, mmap.mmap(-1, 256), "kill", number, SAVE).install()
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_kill_at_each_write_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-000004"
    kills = found = 0
    for number in range(1, 100):
        shutil.rmtree(folder.parent, ignore_errors=True)
        write_folder(folder, filled("old"))
        if not killed_at(number, tmp_path, lambda: write_folder(folder, filled("new"), replace=True)):
            break
        kills += 1
        found += not folder.exists()
        sweep(folder.parent)
        assert content(folder) in ({"old"}, {"new"}), number
        assert [p.name for p in folder.parent.iterdir()] == ["step-000004"], number
    assert content(folder) == {"new"}
    assert leftovers(tmp_path) == []
    assert kills > 8
    assert found == 1, "between its two renames"


def test_when_the_new_folder_cannot_get_its_name_the_old_one_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "final"
    write_folder(folder, filled("old"))
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if Path(target) == folder and "replaced" not in self.name:
            raise OSError(errno.EROFS, "Read-only file system")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(RunFolderError, match="the disk is read-only"):
        write_folder(folder, filled("new"), replace=True)
    assert content(folder) == {"old"}
    assert leftovers(tmp_path) == []


def test_a_postponed_evaluation_saves_nothing_again(tmp_path: Path, one_thread: None) -> None:
    """Not when it is made, and not when it is put off once more; it is recorded once."""
    straight, folder = tmp_path / "straight", tmp_path / "run"
    typed = ["keep_best=true", "eval_steps=1", "scheduler=reduce_lr_on_plateau"]
    run([composed(straight, *typed)])
    for call in (2, 1):  # the second evaluation, that of step 1, then the same again
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, "sftx.training.measure.evaluate", "token_losses", call, signal.SIGTERM)
            with pytest.raises(StoppedError, match="after step 1 of 6"):
                run([composed(folder, *typed)])
        before = inodes(folder)
    run([composed(folder, *typed, "save_total_limit=null")])
    after = inodes(folder)
    assert before.items() <= after.items()
    assert outcome(folder) == outcome(straight)


def inodes(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_ino for p in (folder / "checkpoints").rglob("*")}


def test_an_evaluation_that_a_kill_made_postponed_twice_is_recorded_once(tmp_path: Path, one_thread: None) -> None:
    straight, folder = tmp_path / "straight", tmp_path / "run"
    run([composed(straight)])
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "sftx.training.measure.evaluate", "token_losses", 2, signal.SIGTERM)
        with pytest.raises(StoppedError, match="after step 2 of 6"):
            run([composed(folder)])
    for _ in range(2):  # it is made and recorded, and the run ends before another checkpoint is there
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sftx.training.loop._advance", killed)
            with pytest.raises(KeyboardInterrupt):
                run([composed(folder)])
    run([composed(folder)])
    assert outcome(folder) == outcome(straight)


def killed(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_kill_while_final_is_replaced(zygote: Zygote, tmp_path: Path) -> None:
    """A run that is extended has one already: between its renames, and before it is removed."""
    first, second = "max_steps=2", "max_steps=4"
    straight = tmp_path / "straight"
    for length in (first, second):
        report = zygote.run(straight, words(straight, length), calls=True)
        assert report["code"] == 0
    writes = [(call, path) for place, call, path in report["calls"] if place == FINAL]
    renames = [n for n, (call, _) in enumerate(writes, 1) if call == "rename"]
    assert [".final" in writes[n - 1][1].split(" -> ")[0] for n in renames[-3:]]
    for number in renames:
        folder = tmp_path / str(number)
        assert zygote.run(folder, words(folder, first))["code"] == 0
        watch = {"do": "kill", "at": number, "where": FINAL}
        assert zygote.run(folder, words(folder, second), watch=watch)["code"] == -signal.SIGKILL
        assert any((p / "adapter_model.safetensors").is_file() for p in folder.glob("*final*"))
        assert zygote.run(folder, words(folder, second))["code"] == 0
        assert outcome(folder)["final"] == outcome(straight)["final"]
        assert leftovers(folder) == []
        assert checkpoint.newest_verified(folder / "checkpoints")[1] == []
