"""The same command continues an unfinished run, leaves a finished one alone, and a stopped run says how to go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import ROOT, SMALL, TWO_RANKS, over
from tests.faults.test_signals import interrupt
from tests.invariance.test_invariance import assert_same_weights, curve

from sftx.config.checks.check import freeze
from sftx.config.composition.prepare import compose_checked
from sftx.config.schema import TrainConfig
from sftx.errors import EXIT_STOPPED, RunFolderError, StoppedError
from sftx.run import run
from sftx.training.saving.run_folder import LOCK

WORDS = over(SMALL, "mode=lora", "save_strategy=steps", "save_steps=2", "eval_steps=2", "max_steps=4",
             "max_train_rows=24", "scheduler=constant", f"train_file_path={ROOT / 'data'}")  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """Let `outputs/` be in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def composed(*typed: str) -> TrainConfig:
    return replace(freeze(compose_checked(over(WORDS, *typed))), train_file_path=str(ROOT / "data"))


def folders() -> list[Path]:
    return sorted(Path("outputs/runs").glob("*/*"))


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def stop(config: TrainConfig, call: int = 10) -> Path:
    """Stop a run in its third step; return its folder."""
    before = folders()
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "sftx.training.loop", "token_losses", call, signal.SIGTERM)
        with pytest.raises(StoppedError):
            run([config])
    (made,) = set(folders()) - set(before)
    return made


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def test_without_an_output_dir_the_same_settings_continue_the_newest_unfinished_run(capsys) -> None:
    straight = run([composed("output_dir=straight")])[0].output_dir
    stopped = stop(composed())
    capsys.readouterr()
    run([composed("logging_steps=1", "disable_tqdm=false")])  # what only presents a run does not make it another
    shown = capsys.readouterr()
    said = (shown.out + shown.err).splitlines()
    assert said[0] == f"continuing {stopped} from step 2; resume=never starts fresh"
    assert folders() == [stopped]
    assert curve(straight) == curve(stopped)
    assert_same_weights(straight, stopped)
    run([composed()])
    assert len(folders()) == 2, "a finished run is not continued"
    assert manifest(folders()[1])["attempts"][0]["from_step"] == 0


def test_a_run_that_stopped_early_is_finished(capsys) -> None:
    """Also one that was killed before it had written what it came to."""
    typed = ["callback=early_stopping", "callback.early_stopping.patience=1", "callback.early_stopping.min_delta=9",
             "eval_steps=1", "output_dir=early"]  # fmt: skip
    first = run([composed(*typed)])[0]
    assert (first.steps, bool(first.stop_reason)) == (2, True)
    before = contents(first.output_dir)
    assert run([composed(*typed)])[0] == first
    assert run([composed(*typed, "max_steps=9")])[0] == first, "it has ended for another reason than its length"
    assert contents(first.output_dir) == before
    assert "is finished (2 steps, eval loss" in capsys.readouterr().out
    record = first.output_dir / "manifest.json"
    record.write_text(json.dumps(manifest(first.output_dir) | {"status": "running"}))
    assert run([composed(*typed)])[0] == first


def test_a_finished_run_is_left_as_it_is(cli, here: Path) -> None:
    config = composed("output_dir=done")
    first = run([config])[0]
    before = contents(first.output_dir)
    assert run([config])[0] == first
    with pytest.raises(
        RunFolderError, match=r"max_steps=3 ends at step 3, and done is at step 4 already\. Nothing was"
    ):
        run([composed("output_dir=done", "max_steps=3")])
    assert contents(first.output_dir) == before
    assert not (first.output_dir / LOCK).exists()
    assert run([composed("output_dir=done", "max_steps=5")])[0].steps == 5


def test_a_stopped_run_is_not_made_shorter_than_it_is() -> None:
    stopped = stop(composed())
    before = contents(stopped)
    with pytest.raises(RunFolderError, match=r"max_steps=1 ends at step 1, and .*step-000002 is at step 2 already"):
        run([composed(f"output_dir={stopped}", "max_steps=1")])
    assert contents(stopped) == before


def test_a_part_of_an_epoch_is_resumed_to_the_last_bit() -> None:
    """1.5 epochs of 5 steps are 8 steps; stopped in the third, it ends amid the second epoch."""
    typed = ("max_steps=null", "num_train_epochs=1.5", "scheduler=cosine", "lora_dropout=0.1")
    (whole,) = run([composed(*typed, "output_dir=whole")])
    stopped = stop(composed(*typed))
    assert [r.output_dir for r in run([composed(*typed)])] == [stopped]
    assert manifest(stopped)["result"]["steps"] == whole.steps == 8
    assert curve(stopped) == curve(whole.output_dir)
    assert_same_weights(stopped, whole.output_dir)


def started(launcher: tuple[str, ...], words: list[str], here: Path) -> subprocess.Popen[str]:
    """Start a run whose end is far, with paths that a shell must not take apart, and return when it has made steps."""
    process = subprocess.Popen(
        [*launcher, str(ROOT / "train.py"), *words], cwd=here, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if any(path.read_text().count("train/loss") > 2 for path in here.rglob("metrics.jsonl")):
            return process
        time.sleep(0.1)
    raise AssertionError(process.communicate())


@pytest.mark.parametrize(
    ("launcher", "typed"),
    [
        ((sys.executable,), ["resume=never"]),
        pytest.param((sys.executable, "-X", "utf8"), ["output_dir=it's here"], marks=pytest.mark.slow),
        pytest.param(
            (sys.executable,), ["parallel=ddp", "parallel.num_processes=2"], marks=pytest.mark.slow, id="two ranks"
        ),
        pytest.param(TWO_RANKS, ["parallel=ddp"], marks=pytest.mark.slow, id="torchrun"),
    ],
)
def test_a_stopped_run_ends_with_the_command_that_continues_it(
    here: Path, launcher: tuple[str, ...], typed: list[str]
) -> None:
    data = here / "my data"
    data.mkdir()
    (data / "$rows.csv").symlink_to(ROOT / "data" / "aspcoder_train.csv")
    words = over(WORDS, "max_steps=3000", "save_steps=3000", "eval_ratio=0", f"train_file_path={data}",
                 "train_file_name=$rows.csv", *typed)  # fmt: skip
    process = started(launcher, words, here)
    process.send_signal(signal.SIGTERM)
    shown, said = process.communicate(timeout=120)
    assert (shown + said).count("stopped after step") == 1, "it is said once"
    lines = said.splitlines()
    at = next(i for i, line in enumerate(lines) if line.endswith("To continue:")) + 1
    if launcher != TWO_RANKS:  # which says how its processes ended
        assert process.returncode == EXIT_STOPPED
        assert at == len(lines) - 1
    (folder,) = [path.parent for path in here.rglob("train.log")]
    made = int(max((folder / "checkpoints").iterdir()).name.removeprefix("step-"))
    assert "stopped after step" in (folder / "train.log").read_text()
    command = lines[at].replace("max_steps=3000", f"max_steps={made + 1}")
    done = subprocess.run(command, shell=True, cwd=here, text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done
    assert [path.parent for path in here.rglob("train.log")] == [folder]
    assert manifest(folder)["attempts"][1]["from_step"] == made
    assert manifest(folder)["ranks"] == (2 if "parallel=ddp" in typed else 1)
