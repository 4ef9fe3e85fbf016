"""Damage to what a run left: found to the last bit, named, and the run goes on from what is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tests.faults.runs import composed, leftovers, outcome

from sftx.errors import CheckpointError, RunFolderError, SftxError
from sftx.run import run
from sftx.training import loop
from sftx.training.saving import checkpoint
from sftx.training.saving.metrics import read_metrics
from sftx.training.saving.run_folder import RunFolder

MODES = ("lora", "full")


def flip(data: bytes, bit: int) -> bytes:
    made = bytearray(data)
    made[bit // 8] ^= 1 << bit % 8
    return bytes(made)


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "half is cut off": rewrite(lambda d: d[: len(d) // 2]),
    "the last byte is cut off": rewrite(lambda d: d[:-1]),
    "a byte more": rewrite(lambda d: d + b"\n"),
    "emptied": rewrite(lambda d: b""),
    "zeroed": rewrite(lambda d: bytes(len(d))),
    "the first bit": rewrite(lambda d: flip(d, 0)),
    "a bit in the middle": rewrite(lambda d: flip(d, 4 * len(d))),
    "the last bit": rewrite(lambda d: flip(d, 8 * len(d) - 1)),
    "other JSON": rewrite(lambda d: b'{"step": 4, "sha256": {}}'),
    "removed": Path.unlink,
    "a folder": to_folder,
    "a link to nothing": lambda path: to_link(path, Path("nothing")),
    "a link to the checkpoint before": lambda path: to_link(path, Path("..", "step-000002", path.name)),
    "a link to itself": lambda path: to_link(path, Path(path.name)),
    "a pipe": to_pipe,
}


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def stopped(mode: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run with the checkpoints of steps 2 and 4, and beside it `straight`, which made all six."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(mode) / "stopped"
    run([composed(folder.parent / "straight", f"mode={mode}")])
    run([composed(folder, f"mode={mode}", "max_steps=4")])
    shutil.rmtree(folder / "final")
    yield folder
    torch.set_num_threads(before)


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run", symlinks=True))


def test_every_damage_to_every_file_is_found(copy: Path) -> None:
    root = copy / "checkpoints"
    older, newest = checkpoint.listed(root)
    assert checkpoint.newest_verified(root) == (newest, [])
    files = sorted(p.name for p in newest.iterdir())
    assert {"manifest.json", "optimizer.json", "optimizer.safetensors", "state.json"} < set(files)
    kept = copy.parent / "kept"
    shutil.copytree(newest, kept)
    missed = []
    for name in files:
        for how, damage in DAMAGE.items():
            damage(newest / name)
            chosen, problems = checkpoint.newest_verified(root)
            if chosen != older or len(problems) != 1 or str(newest) not in problems[0] or name not in problems[0]:
                missed.append((name, how, chosen, problems))
            if (newest / name).is_dir() and not (newest / name).is_symlink():
                (newest / name).rmdir()
            (newest / name).unlink(missing_ok=True)
            shutil.copyfile(kept / name, newest / name)
    assert not missed
    assert checkpoint.newest_verified(root) == (newest, [])


def test_a_file_that_the_disk_does_not_give_is_damage(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older, newest = checkpoint.listed(copy / "checkpoints")
    opened = Path.open

    def refuse(self: Path, *arguments: Any, **named: Any) -> Any:
        if self == newest / "optimizer.safetensors":
            raise OSError(5, "Input/output error", str(self))
        return opened(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    found = checkpoint.newest_verified(copy / "checkpoints")
    assert found == (older, [f"{newest}: optimizer.safetensors cannot be read"])


def test_every_bit_of_a_manifest_counts(copy: Path, mode: str) -> None:
    newest = checkpoint.listed(copy / "checkpoints")[-1]
    path = newest / "manifest.json"
    whole = path.read_bytes()
    missed = []
    for bit in range(0, 8 * len(whole), 1 if mode == "lora" else 37):
        path.write_bytes(flip(whole, bit))
        if checkpoint.problem_of(newest) is None:
            missed.append((bit, whole[max(0, bit // 8 - 20) :][:40]))
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert checkpoint.problem_of(newest) is not None, length
    assert not missed
    path.write_bytes(whole.replace(b'"step": 4', b'"step": 2'))
    assert checkpoint.problem_of(newest) == "manifest.json is damaged"
    told = json.loads(whole)
    del told["sha256"]["state.json"]
    path.write_text(json.dumps(told, indent=2))
    assert checkpoint.problem_of(newest) == "manifest.json is damaged"


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def file_instead(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


def half_removed(folder: Path) -> None:
    for file in sorted(folder.iterdir())[::2]:
        file.unlink()


def weights_added(folder: Path) -> None:
    """What full mode would read beside its own."""
    source = next(p for p in folder.iterdir() if p.name in ("adapter_model.safetensors", "model.safetensors"))
    shutil.copyfile(source, folder / "model-00002.safetensors")


def that_of_another_step(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-000002"), folder)


@pytest.mark.parametrize("damage", [emptied, file_instead, half_removed, weights_added, that_of_another_step])
def test_damage_to_the_folder_itself_is_found(copy: Path, damage: Callable[[Path], None]) -> None:
    older, newest = checkpoint.listed(copy / "checkpoints")
    damage(newest)
    chosen, problems = checkpoint.newest_verified(copy / "checkpoints")
    assert chosen == older
    assert len(problems) == 1
    assert problems[0].startswith(f"{newest}: ")


def test_what_is_no_checkpoint_is_no_damage(copy: Path) -> None:
    """A half-written one under its temporary name, and a user's own note."""
    newest = checkpoint.listed(copy / "checkpoints")[-1]
    half = newest.with_name(".step-000006.abcdefgh.sftx-tmp")
    half.mkdir()
    shutil.copyfile(newest / "state.json", half / "state.json")
    (newest / "note.txt").write_text("the good one")
    assert checkpoint.newest_verified(copy / "checkpoints") == (newest, [])


@pytest.mark.parametrize(
    ("mode", "name", "how"),
    [
        ("lora", "state.json", "a bit in the middle"),
        ("lora", "optimizer.safetensors", "half is cut off"),
        ("lora", "manifest.json", "removed"),
        ("lora", "folder", "emptied"),
        ("full", "model.safetensors", "zeroed"),
    ],
    indirect=["mode"],
    scope="module",
)
def test_a_run_goes_on_from_the_older_checkpoint_bitwise(
    copy: Path, stopped: Path, mode: str, name: str, how: str, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    older, newest = checkpoint.listed(copy / "checkpoints")
    if name == "folder":
        emptied(newest)
    else:
        DAMAGE[how](newest / name)
    half = newest.with_name(".step-000006.abcdefgh.sftx-tmp")
    half.mkdir()
    run([composed(copy, f"mode={mode}")])
    for said in (capsys.readouterr().out, (copy / "train.log").read_text()):
        assert f"damaged, not used: {newest}: " in said
        assert f"resumed from {older} (step 2 of 6)" in said
    assert outcome(copy) == outcome(stopped.with_name("straight"))
    assert leftovers(copy) == []
    assert checkpoint.newest_verified(copy / "checkpoints") == (newest.with_name("step-000006"), [])


def test_when_all_are_damaged_the_run_refuses_to_start_over(copy: Path, mode: str) -> None:
    for folder in checkpoint.listed(copy / "checkpoints"):
        DAMAGE["a bit in the middle"](folder / "manifest.json")
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    with pytest.raises(
        CheckpointError, match=r"no checkpoint of this run is intact(.|\n)*step-000004(.|\n)*step-000002"
    ):
        run([composed(copy, f"mode={mode}")])
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("lora_rank=4", r"expected shape \[8, \d+\], got shape \[4, \d+\]"),
        ("mode", "its adapter cannot be read|its weights do not fit this model"),
        ("optimizer=sgd", "its optimizer is torch.SGD, and this run uses torch.AdamW"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(copy: Path, tmp_path: Path, mode: str, other: str, said: str) -> None:
    """Its manifest is whole: what is in it does not fit."""
    if mode == "full" and other == "lora_rank=4":
        pytest.skip("full mode has no rank")
    another = f"mode={'full' if mode == 'lora' else 'lora'}"
    typed = [another] if other == "mode" else [f"mode={mode}", other]
    run([composed(tmp_path / "foreign", *typed, "max_steps=4")])
    newest = copy / "checkpoints" / "step-000004"
    shutil.rmtree(newest)
    shutil.copytree(tmp_path / "foreign" / "checkpoints" / "step-000004", newest)
    with pytest.raises(CheckpointError, match=said) as caught:
        run([composed(copy, f"mode={mode}")])
    assert str(newest) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_the_best_state_is_verified_before_it_becomes_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = ["keep_best=true", "save_total_limit=1", "save_steps=1", "eval_steps=1", "max_steps=3"]
    config = composed(tmp_path, *best)
    evaluate, worse = loop.evaluate, count()

    def worse_each_time(*args: Any, **kwargs: Any) -> Any:
        found = evaluate(*args, **kwargs)
        return found and replace(found, loss=found.loss + next(worse))

    monkeypatch.setattr(loop, "evaluate", worse_each_time)
    run([config])
    chosen = json.loads((tmp_path / "manifest.json").read_text())["result"]["final_step"]
    assert chosen == 1
    shutil.rmtree(tmp_path / "final")
    DAMAGE["a bit in the middle"](tmp_path / "checkpoints" / f"step-{chosen:06d}" / "adapter_model.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"step-{chosen:06d}: adapter_model.safetensors is damaged.*keep_best=false"
    ):
        run([config])
    assert not (tmp_path / "final").exists()
    run([replace(config, keep_best=False)])
    assert json.loads((tmp_path / "manifest.json").read_text())["result"]["final_step"] == 3


# The run folder's own files. One mode is enough: they are alike.


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "run"
    run([composed(folder, "max_steps=2")])
    return folder


@pytest.fixture
def folder(lora: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lora, tmp_path / "run"))


UNREADABLE = ["half is cut off", "emptied", "zeroed", "other JSON", "removed", "a folder", "a link to itself", "a pipe"]


@pytest.mark.parametrize("how", UNREADABLE)
def test_a_run_folder_without_its_manifest_says_what_to_do(folder: Path, how: str) -> None:
    DAMAGE[how](folder / "manifest.json")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(RunFolderError) as caught:
        run([composed(folder)])
    said = str(caught.value)
    assert str(folder / "manifest.json") in said
    assert f"output_dir=NEW resume={folder / 'checkpoints' / 'step-000002'}" in said
    assert len(said) < 800
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_what_it_says_to_do_works(folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").unlink()
    run([composed(tmp_path / "new", f"resume={folder / 'checkpoints' / 'step-000002'}", "max_steps=3")])
    assert [r["step"] for r in read_metrics(tmp_path / "new" / "metrics.jsonl") if "train/loss" in r] == [3]


def test_a_flipped_bit_in_a_run_manifest_is_harmless_or_a_short_message(folder: Path) -> None:
    """It is there to be read by people; a run takes from it which run it is."""
    path = folder / "manifest.json"
    whole = path.read_bytes()
    identity = json.loads(whole)["identity"]
    for bit in range(0, 8 * len(whole), 8 * len(whole) // 500):
        path.write_bytes(flip(whole, bit))
        with suppress(SftxError):
            assert RunFolder(folder).earlier(identity) is not None


@pytest.mark.parametrize(
    "tail",
    [b'{"step": 4, "train/lo', b"\xff\xfe\n", b"12\n[]\n", b'{"no": "step"}\n', bytes(100), b"\n\n"],
    ids=["torn", "no text", "no records", "no step", "zeros", "empty lines"],
)
def test_a_torn_line_of_metrics_is_mended(folder: Path, tail: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole + tail)
    run([composed(folder, "max_steps=3")])
    assert metrics.read_bytes().startswith(whole)
    steps = [r["step"] for r in read_metrics(metrics)]
    assert steps[-2:] == [3, 3]
    assert "metrics.jsonl: lines that cannot be read are left out: " in capsys.readouterr().out
    assert all(json.loads(line) for line in metrics.read_text().splitlines())


def test_what_else_may_be_missing_or_left_behind(folder: Path) -> None:
    for name in ("config.yaml", "train.log", "README.md", "metrics.jsonl"):
        (folder / name).unlink()
    (folder / ".lock").write_text("process 4711 on a machine that is no more")
    (folder / ".config.yaml.abcdefgh.sftx-tmp").write_text("half")
    run([composed(folder, "max_steps=3")])
    assert "resumed from" in (folder / "train.log").read_text()
    assert (folder / "config.yaml").is_file()
    assert leftovers(folder) == []


@pytest.mark.parametrize("left", [[".manifest.json.abcdefgh.sftx-tmp"], [".lock", ".config.yaml.abcdefgh.sftx-tmp"]])
def test_a_run_that_was_killed_before_its_manifest_starts_anew(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).write_text("half")
    RunFolder(tmp_path).check("auto")
    folder = RunFolder(tmp_path)
    folder.lock()
    assert {p.name for p in tmp_path.iterdir()} == {".lock"}
