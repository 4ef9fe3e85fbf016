"""Checkpoints are published whole, verified, and never silently ignored."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sftx.data.records.read import sha256_file
from sftx.errors import CheckpointError, RunFolderError
from sftx.run import run
from sftx.training.saving import checkpoint


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
    with pytest.raises(CheckpointError, match="no checkpoint of this run is intact"):
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


@pytest.mark.parametrize("inside", [".", "checkpoints"])
def test_resume_from_a_run_is_from_its_newest_whole_checkpoint(finished, make_config, captured, inside: str) -> None:
    before = Path(finished.output_dir)
    damage(before / "checkpoints" / "step-000002" / "optimizer.safetensors", "flip")
    run([make_config(f"resume={before / inside}", "max_steps=3", "eval_ratio=0", output="elsewhere")])
    assert captured.trial.step == 3
    log = (before.parent / "elsewhere" / "train.log").read_text()
    assert "damaged, not used: " in log
    assert f"{before / 'checkpoints' / 'step-000001'} (step 1 of 3)" in log


def test_resume_from_a_run_without_a_checkpoint_is_refused(finished, make_config) -> None:
    shutil.rmtree(Path(finished.output_dir) / "checkpoints")
    with pytest.raises(CheckpointError, match="this run has no checkpoint yet"):
        run([make_config(f"resume={finished.output_dir}", "eval_ratio=0", output="elsewhere")])


def write_manifest(folder: Path, **changed: Any) -> None:
    """Write the manifest of a sound checkpoint; what is None is left out."""
    facts = {"format": checkpoint.FORMAT, "step": checkpoint.step_of(folder)} | changed
    facts["sha256"] = {p.name: sha256_file(p) for p in sorted(folder.iterdir()) if p.name != "manifest.json"}
    facts = {k: v for k, v in facts.items() if v is not None}
    own = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(facts | {"self": own}, indent=2))


FORMATS = {None: "no format number: an older version", 1: "format 1, of an older", 99: "format 99, of a newer"}


@pytest.mark.parametrize(("number", "said"), FORMATS.items())
@pytest.mark.parametrize("by_path", [False, True])
def test_a_checkpoint_of_another_format_is_refused_and_it_is_said(
    finished, make_config, number: int | None, said: str, by_path: bool
) -> None:
    newest = Path(finished.output_dir) / "checkpoints" / "step-000002"
    write_manifest(newest)
    assert checkpoint.problem_of(newest) is None
    write_manifest(newest, format=number)
    typed = [f"resume={newest}", "output_dir=" + str(newest.parents[2] / "elsewhere")] if by_path else []
    with pytest.raises(CheckpointError) as caught:
        run([make_config(*typed, "max_steps=3", "save_strategy=steps", "eval_ratio=0")])
    text = str(caught.value)
    assert text.startswith(f"{newest}: it has {said}")
    assert "this version reads format 3. Continue it with the version that wrote it, or start over" in text


@pytest.mark.parametrize(("number", "said"), FORMATS.items())
def test_a_run_folder_of_another_format_is_refused_and_it_is_said(
    finished, make_config, number: int | None, said: str
) -> None:
    path = Path(finished.output_dir) / "manifest.json"
    facts = json.loads(path.read_text()) | {"format": number}
    path.write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))
    with pytest.raises(RunFolderError) as caught:
        run([make_config("max_steps=3", "save_strategy=steps", "eval_ratio=0")])
    assert str(caught.value).startswith(f"{path}: it has {said}")
    assert "this version reads format 2. Continue the run with the version that made it" in str(caught.value)


@pytest.mark.parametrize("lacking", ["step", "faults", "schedule", "eval_loss"])
def test_a_state_that_lacks_something_is_named(finished, make_config, lacking: str) -> None:
    newest = Path(finished.output_dir) / "checkpoints" / "step-000002"
    state = json.loads((newest / "state.json").read_text())
    del state[lacking]
    (newest / "state.json").write_text(json.dumps(state))
    write_manifest(newest)
    with pytest.raises(CheckpointError, match=rf"state\.json: does not hold what this version reads.*'{lacking}'"):
        run([make_config("max_steps=3", "save_strategy=steps", "eval_ratio=0")])


def test_no_pickle_is_in_a_checkpoint(finished) -> None:
    for path in (Path(finished.output_dir) / "checkpoints").rglob("*"):
        assert path.is_dir() or path.suffix in (".json", ".safetensors")
    state = json.loads((Path(finished.output_dir) / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["step"] == 2
