"""Checkpoints are published whole, verified, and never silently ignored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sftx.errors import CheckpointError, RunFolderError
from sftx.run import run
from sftx.training import checkpoint


def damage(path: Path, how: str) -> None:
    if how == "remove":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    if how == "truncate":
        data = data[: len(data) // 2]
    elif how == "zero":
        data = bytearray(len(data))
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def finished(make_config):
    config = make_config("save_steps=1", "save_strategy=steps", "save_total_limit=null", "max_steps=2", "eval_ratio=0")
    run([config])
    return config


def test_every_damage_to_every_file_is_found(finished) -> None:
    newest = checkpoint.folder_of(Path(finished.output_dir) / "checkpoints", 2)
    files = sorted(p for p in newest.iterdir())
    assert {p.name for p in files} == {
        "adapter_config.json", "adapter_model.safetensors", "manifest.json", "optimizer.json", "optimizer.safetensors", "state.json",
    }  # fmt: skip
    assert checkpoint.problem_of(newest) is None
    for path in files:
        for how in ("remove", "truncate", "zero", "flip"):
            before = path.read_bytes()
            damage(path, how)
            assert checkpoint.problem_of(newest) is not None, (path.name, how)
            path.write_bytes(before)
    assert checkpoint.problem_of(newest) is None


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(finished, make_config, captured) -> None:
    root = Path(finished.output_dir) / "checkpoints"
    damage(root / "step-000002" / "optimizer.safetensors", "flip")
    run([make_config("save_strategy=steps", "save_steps=1", "max_steps=3", "eval_ratio=0", "save_total_limit=null")])
    log = (Path(finished.output_dir) / "train.log").read_text()
    assert "damaged, not used" in log
    assert "step-000002: optimizer.safetensors is damaged" in log
    assert "resumed from" in log
    assert "step-000001 (step 1 of 3)" in log
    assert captured.trial.step == 3


def test_when_all_are_damaged_the_run_refuses_to_start_over(finished, make_config) -> None:
    for folder in checkpoint.listed(Path(finished.output_dir) / "checkpoints"):
        damage(folder / "state.json", "zero")
    with pytest.raises(CheckpointError, match="no checkpoint of this run is whole"):
        run(
            [make_config("save_strategy=steps", "save_steps=1", "max_steps=3", "eval_ratio=0", "save_total_limit=null")]
        )


def test_another_run_in_the_folder_is_refused_with_its_differences(finished, make_config) -> None:
    before = (Path(finished.output_dir) / "manifest.json").read_text()
    with pytest.raises(RunFolderError, match=r"holds another run(.|\n)*lora_rank: 8 -> 4(.|\n)*seed: 42 -> 43"):
        run([make_config("lora_rank=4", "seed=43", "eval_ratio=0")])
    assert (Path(finished.output_dir) / "manifest.json").read_text() == before


def test_resume_never_refuses_a_used_folder(finished, make_config) -> None:
    with pytest.raises(RunFolderError, match="resume=never"):
        run([make_config("resume=never", "eval_ratio=0")])


def test_resume_from_a_path(finished, make_config, captured) -> None:
    start = Path(finished.output_dir) / "checkpoints" / "step-000001"
    run([make_config(f"resume={start}", "max_steps=2", "eval_ratio=0", output="elsewhere")])
    assert captured.trial.step == 2
    log = (Path(finished.output_dir).parent / "elsewhere" / "train.log").read_text()
    assert "(step 1 of 2)" in log


def test_no_pickle_is_in_a_checkpoint(finished) -> None:
    for path in (Path(finished.output_dir) / "checkpoints").rglob("*"):
        assert path.is_dir() or path.suffix in (".json", ".safetensors")
    state = json.loads((Path(finished.output_dir) / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["step"] == 2
