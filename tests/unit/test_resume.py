"""Which folder a run without an `output_dir` takes, and what a longer run says of its schedule."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sftx.config.checks.check import freeze
from sftx.config.composition.prepare import compose_checked
from sftx.config.derive import config_hash
from sftx.config.schema import TrainConfig
from sftx.effective import Effective
from sftx.errors import RunFolderError
from sftx.files import REPLACED
from sftx.locks import Locked, exclusive
from sftx.runs.resume import choose_folder, refuse_shorter, remark_on_length, resume_command
from sftx.training.recovery import Faults
from sftx.training.saving.run_folder import FORMAT, LOCK, RunFolder
from sftx.training.schedulers import Constant, Cosine, Schedule, WarmupStableDecay

WHO = {"config": {"seed": 42}, "data": ["a"], "model": "m", "adapter": None}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def composed(*typed: str) -> TrainConfig:
    return freeze(compose_checked(["mode=lora", *typed]))


def leave(name: str, status: str = "stopped", *, who: dict[str, Any] = WHO, saved: bool = True, **typed: str) -> Path:
    """Leave a run folder as a run would."""
    config = composed(*(f"{k}={v}" for k, v in typed.items()))
    folder = Path("outputs/runs/2026-01-01") / f"{name}-lora-{config_hash(config)}"
    (folder / "checkpoints" / "step-000002").mkdir(parents=True)
    if not saved:
        (folder / "checkpoints" / "step-000002").rmdir()
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "status": status, "identity": who}))
    return folder


def chosen(*typed: str) -> RunFolder:
    return choose_folder(composed(*typed), WHO)


@pytest.mark.parametrize("status", ["stopped", "failed", "running"])
def test_the_newest_unfinished_run_is_continued(status: str) -> None:
    leave("10-00-00")
    newest = leave("11-00-00", status)
    leave("12-00-00", who=WHO | {"data": ["b"]})
    leave("12-00-01", learning_rate="1e-3")
    leave("12-00-02", max_steps="7")
    leave("12-00-03", saved=False)
    leave("12-00-04").joinpath("manifest.json").write_text("{")
    found = chosen("logging_steps=1", "resume=auto", "keep_best=true")
    assert (found.path, found.was_chosen) == (newest, True)
    with pytest.raises(Locked), exclusive(newest / LOCK, wait=False):
        pass
    found.unlock()


def test_a_run_that_was_killed_while_its_only_checkpoint_was_being_replaced_is_continued() -> None:
    newest = leave("11-00-00", "running")
    published = newest / "checkpoints" / "step-000002"
    published.rename(published.with_name(f".{published.name}{REPLACED}"))
    found = chosen()
    assert (found.path, found.was_chosen) == (newest, True)
    assert published.is_dir()
    found.unlock()


def test_a_run_that_another_process_holds_is_left_to_it() -> None:
    older, newest = leave("10-00-00"), leave("11-00-00", "running")
    with exclusive(newest / LOCK, wait=False):
        found = chosen()
        assert found.path == older
        found.unlock()
        with exclusive(older / LOCK, wait=False):
            new = chosen()
            assert not new.was_chosen
            assert new.path not in (older, newest)
            new.unlock()
    assert not new.path.exists(), "nothing was written to it"


@pytest.mark.parametrize("case", ["completed", "never", "none"])
def test_otherwise_the_run_has_a_new_folder(case: str) -> None:
    before = [] if case == "none" else [leave("10-00-00"), leave("11-00-00", case if case == "completed" else "failed")]
    found = chosen("resume=never") if case == "never" else chosen()
    assert not found.was_chosen
    assert found.path not in before
    found.unlock()


@pytest.mark.parametrize("unfinished", [True, False])
def test_two_copies_at_the_same_moment_never_get_the_same_folder(unfinished: bool) -> None:
    if unfinished:
        leave("10-00-00")
    config, found, at_once = composed(), list[RunFolder](), threading.Barrier(4)

    def copy() -> None:
        at_once.wait()
        found.append(choose_folder(config, WHO))

    copies = [threading.Thread(target=copy) for _ in range(4)]
    for thread in copies:
        thread.start()
    for thread in copies:
        thread.join()
    assert len({folder.path for folder in found}) == 4
    assert sum(folder.was_chosen for folder in found) == unfinished
    for folder in found:
        folder.unlock()


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (Cosine(), "200 steps instead of 100 change the schedule cosine: after step 90 lr 2.4e-6 -> 5.8e-5"),
        (WarmupStableDecay(), "200 steps instead of 100 change the schedule cosine: after step 90 lr 5.0e-5 -> 1.0e-4"),
        (Constant(), None),
    ],
)
def test_a_longer_run_says_what_becomes_of_a_decaying_schedule(schedule: Schedule, said: str | None) -> None:
    config = SimpleNamespace(learning_rate=1e-4, lr_scheduler_type="cosine")
    trial: Any = SimpleNamespace(
        config=config, schedule=schedule, faults=Faults(), step=90, steps=SimpleNamespace(total=200)
    )
    effective = Effective()
    remark_on_length(trial, 100, effective)
    remark_on_length(trial, 200, effective)
    remark_on_length(trial, None, effective)
    assert effective.remarks == ([said] if said else [])


@pytest.mark.parametrize(
    ("max_steps", "said"), [(None, "num_train_epochs=2 ends at step 30, and x is at step 31 already"),
                            (30, "max_steps=30 ends at step 30, and x is at step 31 already")]
)  # fmt: skip
def test_a_run_is_not_made_shorter_than_it_is(max_steps: int | None, said: str) -> None:
    config = SimpleNamespace(max_steps=max_steps, num_train_epochs=2)
    trial: Any = SimpleNamespace(config=config, steps=SimpleNamespace(total=30))
    refuse_shorter(trial, 30, "x")
    with pytest.raises(RunFolderError, match=said):
        refuse_shorter(trial, 31, "x")


def test_the_command_that_continues_has_the_folder_and_no_other_resume() -> None:
    folder = Path("outputs/runs/x")
    typed = "python train.py 'a=b c' resume=outputs/runs/y/checkpoints/step-000002"
    assert resume_command(typed, composed("resume=never"), folder) == (
        "python train.py 'a=b c' output_dir=outputs/runs/x resume=auto"
    )
    assert resume_command("python train.py output_dir=x", composed("output_dir=x"), Path("x")) == (
        "python train.py output_dir=x"
    )
    assert resume_command("sftx train seed=1", composed("seed=1"), folder) == (
        "sftx train seed=1 output_dir=outputs/runs/x"
    )
    assert resume_command("sftx repro x --output_dir y", composed("output_dir=y"), Path("y")) == (
        "sftx repro x --output_dir y"
    )
