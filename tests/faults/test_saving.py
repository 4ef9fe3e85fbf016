"""Checkpoints are written beside training, at a pace that costs little, and where there is room for them."""

from __future__ import annotations

import errno
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import over
from tests.invariance.test_invariance import assert_same_weights, curve

from sftx.errors import RunFolderError, TrainingError
from sftx.files import bytes_in, write_folder
from sftx.run import run
from sftx.training import loop
from sftx.training.saving import checkpoint, preflight
from sftx.training.saving import saver as saving
from sftx.training.saving.saver import MAX_SAVE_OVERHEAD, SaveInterval

SHARED = [
    "mode=lora", "eval_ratio=0", "max_steps=6", "save_strategy=steps", "save_steps=2", "save_total_limit=null",
]  # fmt: skip


def hashes(folder: Path) -> dict[str, Any]:
    return {p.name: json.loads((p / "manifest.json").read_text()) for p in (folder / "checkpoints").iterdir()}


@pytest.mark.parametrize("mode", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_steps_go_on_while_a_slow_disk_writes_and_the_bytes_are_the_same(
    make_config, monkeypatch: pytest.MonkeyPatch, captured, one_thread: None, mode: str
) -> None:
    shared = over(SHARED, f"mode={mode}")
    waiting = make_config(*shared, "async_save=false", output="waiting")
    run([waiting])
    went_on = []

    def slow(folder: Path, *arguments: Any, **named: Any) -> None:
        time.sleep(1.5)
        went_on.append(captured.trial.step - checkpoint.step_of(folder))
        write_folder(folder, *arguments, **named)

    monkeypatch.setattr(checkpoint, "write_folder", slow)
    beside = make_config(*shared, output="beside")
    run([beside])
    assert went_on[0] >= 1, "the first checkpoint was being written while the next step was made"
    one, other = Path(waiting.output_dir), Path(beside.output_dir)
    assert hashes(one) == hashes(other)
    assert curve(one) == curve(other)
    assert_same_weights(one, other)


def failing(call: int) -> Any:
    """Return a `write_folder` that finds the disk full at its n-th call."""
    calls = itertools.count(1)

    def full(folder: Path, fill: Any, **named: Any) -> None:
        def fill_more(into: Path) -> None:
            fill(into)
            if next(calls) == call:
                raise OSError(errno.ENOSPC, "No space left on device")

        write_folder(folder, fill_more, **named)

    return full


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_ends_the_run_with_the_bytes_it_needs(
    make_config, monkeypatch: pytest.MonkeyPatch, asynchronous: str
) -> None:
    config = make_config(*SHARED, f"async_save={asynchronous}")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_folder", failing(2))
        with pytest.raises(RunFolderError, match=r"step-000004: the disk is full \([\d,]+ bytes free, [\d,]+ needed\)"):
            run([config])
    folder = Path(config.output_dir)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000002"]
    run([config])
    assert "resumed from" in (folder / "train.log").read_text()


def test_a_save_that_fails_beside_another_fault_is_said_too(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(*SHARED)
    monkeypatch.setattr(checkpoint, "write_folder", failing(1))
    monkeypatch.setattr(saving.Saver, "check", lambda self, trial: None)
    calls = itertools.count(1)
    monkeypatch.setattr(loop, "recover", _raise)
    original = loop._launch
    monkeypatch.setattr(loop, "_launch", lambda *a: original(*a) if next(calls) < 3 else _raise())
    with pytest.raises(TrainingError, match="another fault"):
        run([config])
    assert "a checkpoint could not be published" in (Path(config.output_dir) / "train.log").read_text()


def _raise(*_: Any) -> None:
    raise TrainingError("another fault")


def test_the_interval_keeps_to_the_work_that_may_be_lost_and_to_the_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    interval = SaveInterval(lost_seconds=60, last=0)
    interval.took(0.3)
    assert interval.interval == 60
    now[0] = 59
    assert not interval.due
    now[0] = 60
    assert interval.due
    interval.took(9.3)  # 4.8 s on average
    assert interval.interval == pytest.approx(4.8 / MAX_SAVE_OVERHEAD)
    assert not interval.due


def test_save_steps_auto(make_config) -> None:
    """Nothing may be lost, but 3 % is not enough time to save at each step; the end is saved whatever the interval."""
    words = over(SHARED, "save_steps=auto", "max_steps=30", "gradient_accumulation_steps=1", "save_total_limit=null")
    often = make_config(*words, "lost_work_minutes=1e-9", output="often")
    run([often])
    saved = [checkpoint.step_of(p) for p in checkpoint.listed(Path(often.output_dir) / "checkpoints")]
    assert saved[-1] == 30
    assert len(saved) < 15
    log = (Path(often.output_dir) / "train.log").read_text()
    assert "at most 3% of the time" in log
    seldom = make_config(*words, output="seldom")
    run([seldom])
    assert hashes(Path(seldom.output_dir)).keys() == {"step-000030"}
    assert "every 10 minutes (0." in (Path(seldom.output_dir) / "train.log").read_text()


def test_eval_steps_auto_is_a_tenth_of_the_run(make_config) -> None:
    config = make_config("eval_steps=auto", "max_steps=15", "max_train_rows=16", "gradient_accumulation_steps=1")
    run([config])
    records = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "eval/loss" in r] == [0, 2, 4, 6, 8, 10, 12, 14, 15]


@pytest.mark.parametrize(
    ("mode", "optimizer"),
    [("lora", "adamw_8bit"), ("lora", "lion"), ("full", "adamw"), ("full", "adafactor"), ("lora", "sgd")],
)
def test_the_room_that_is_asked_for_is_the_room_that_is_used(make_config, captured, optimizer: str, mode: str) -> None:
    config = make_config(*over(SHARED, f"mode={mode}", f"optimizer={optimizer}", "max_steps=1", "lora_rank=64"))
    run([config])
    room = preflight.room_of(captured.trial)
    folder = Path(config.output_dir)
    used = bytes_in(folder / "checkpoints")
    assert room.checkpoint == pytest.approx(used, rel=0.1, abs=100_000)  # JSON and headers
    tokenizer = 450_000
    assert room.weights == pytest.approx(bytes_in(folder / "final"), rel=0.1, abs=tokenizer)


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ("save_total_limit=null", 3), ("save_total_limit=1", 2), ("save_total_limit=2", 3), ("save_total_limit=9", 3),
        ("save_strategy=no", 1), ("save_strategy=epoch", 2),
    ],
)  # fmt: skip
def test_the_checkpoints_that_are_there_at_once(make_config, captured, words: str, kept: int) -> None:
    run([make_config(*over(SHARED, "max_train_rows=12", words))])  # 3 steps a pass
    assert captured.trial.steps.per_epoch == 3
    assert preflight.room_of(captured.trial).kept == kept


def test_a_disk_without_room_is_refused_before_anything_is_written(
    make_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(*SHARED)
    monkeypatch.setattr(preflight, "free_bytes", lambda _: (1_000_000, 1))
    with pytest.raises(
        RunFolderError, match=r"1,000,000 bytes are free on its disk, about [\d,]+ needed: 3 checkpoints of .* GB, and "
    ):
        run([config])
    assert not Path(config.output_dir).exists()


def test_what_cannot_be_written_is_found_before_the_first_step(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(*SHARED)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", refuse)
        with pytest.raises(RunFolderError, match="cannot be written: the disk is read-only"):
            run([config])
    assert not [p for p in Path(config.output_dir).rglob("*") if p.is_file()]
    run([config])
