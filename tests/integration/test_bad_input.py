"""Input that cannot be used: one clear message, exit code 2, and nothing half-written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sftx import PROJECT_ROOT
from sftx.config.checks.check import freeze
from sftx.config.composition.prepare import compose_checked
from sftx.data.files.problems import SKIP
from sftx.errors import EXIT_USER, SftxError
from sftx.model.loading.builtin import ensure_builtin
from sftx.run import run

HEADER = "category,human,assistant\n"
ROWS = "".join(f"c{i % 2},question {i},answer {i}\n" for i in range(20))
QUICK = ["max_steps=1", "gradient_accumulation_steps=1", "report_to=none", "disable_tqdm=true"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The run folder of a test; not there yet."""
    return tmp_path / "run"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a sound corpus, `a.csv`."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.csv").write_text(HEADER + ROWS, encoding="utf-8")
    return folder


def words(out: Path, data: Path, *more: str, name: str = "a.csv") -> list[str]:
    return [f"output_dir={out}", f"train_file_path={data}", f"train_file_name={name}", *QUICK, *more]


def start(arguments: Sequence[str]) -> None:
    """Run what `train.py` would run, in this process."""
    run([freeze(compose_checked(list(arguments)))], command="python train.py")


def tree(folder: Path) -> dict[str, str]:
    """Return every path below a folder with its content's hash."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in folder.rglob("*")
    }


def refused(arguments: Sequence[str], untouched: Path) -> str:
    """Return the message; the folder that holds all of the test's files must be as before."""
    before = tree(untouched)
    with pytest.raises(SftxError) as caught:
        start(arguments)
    assert caught.value.exit_code == EXIT_USER
    assert tree(untouched) == before, "something was written"
    return str(caught.value)


# The corpus


def test_rows_that_are_skipped_are_told(out: Path, data: Path) -> None:
    path = data / "a.csv"
    path.write_text(HEADER + "a,b\n" + ROWS + "c,,\n", encoding="utf-8")
    refused(words(out, data), data)
    start(words(out, data, "data.on_bad_rows=skip"))
    said = (out / "skipped_rows.txt").read_text(encoding="utf-8").splitlines()
    assert said[0].startswith(f"{path}:2: 2 cells found, 3 expected")
    assert len(said) == 3
    log = " ".join((out / "train.log").read_text(encoding="utf-8").split())
    assert "skipped 2 invalid rows (data.on_bad_rows=skip; see skipped_rows.txt), e.g. " in log
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8"))["data"][0]["skipped_rows"] == 2


def test_a_corpus_of_several_files_and_shapes_trains(out: Path, data: Path) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]}
    row["mood"] = "x"
    (data / "b.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    start(words(out, data, name="[a.csv,b.jsonl]"))
    log = " ".join((out / "train.log").read_text(encoding="utf-8").split())
    assert "columns a.csv: category, human, assistant | b.jsonl: messages; unused: `mood`; weights of turns: 0.5" in log
    told = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["data"][0]
    assert [file["schema"] for file in told["files"]] == ["human_assistant", "messages"]


def test_a_missing_file(out: Path, data: Path, tmp_path: Path) -> None:
    message = refused(words(out, data, name="b.csv"), tmp_path)
    assert message.startswith(f"train_file_name=b.csv: no such file in {data} or {data / 'csv'}. Did you mean `a.csv`?")


def test_a_missing_file_to_evaluate_on(out: Path, data: Path, tmp_path: Path) -> None:
    message = refused(words(out, data, "eval_file_name=aa.csv"), tmp_path)
    assert message.startswith("eval_file_name=aa.csv: no such file in ")


def test_a_missing_folder(out: Path, tmp_path: Path) -> None:
    message = refused(words(out, tmp_path / "nowhere"), tmp_path)
    assert message.startswith(f"train_file_path={tmp_path / 'nowhere'}: there is no such folder")


def test_a_corpus_found_in_both_places(out: Path, data: Path, tmp_path: Path) -> None:
    (data / "csv").mkdir()
    shutil.copy(data / "a.csv", data / "csv")
    message = refused(words(out, data), tmp_path)
    assert message.startswith(f"train_file_name=a.csv: found both as {data / 'a.csv'} and as {data / 'csv' / 'a.csv'}.")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", ": the file is empty (0 bytes)"),
        (HEADER.encode(), ":1: no rows: the file has only its header"),
        (b"category,human,answer\na,b,c\n", ":1: no column `assistant`; found"),
        (HEADER.encode() + b"a,b,c\na,\xff\xfe,c\n", ":3: byte 0xFF at byte offset 33 is not valid utf-8"),
        (HEADER.encode() + b"a,b,c\na,b,\na,b,c\n", ":3: the `assistant` of this row is empty"),
        (HEADER.encode() + b"a,b,c\na,b\n", ":3: 2 cells found, 3 expected"),
        (HEADER.encode() + b'a,b,"c\n', ":2: a quote opens in the row that begins here and is never closed"),
        (HEADER.encode() + b"a,same,c\n" * 5, "eval_ratio=0"),
    ],
)
def test_a_corpus_that_cannot_be_read_exactly(out: Path, data: Path, tmp_path: Path, content: bytes, says: str) -> None:
    (data / "a.csv").write_bytes(content)
    message = refused(words(out, data), tmp_path)
    assert message.startswith(str(data / "a.csv"))
    assert says in message
    assert message.removesuffix(f"\n{SKIP}").count("\n") == 0


def test_a_corpus_of_which_no_row_fits(out: Path, data: Path, tmp_path: Path) -> None:
    message = refused(words(out, data, "max_seq_length=8"), tmp_path)
    assert f"{data / 'a.csv'}:2: " in message
    assert " prompt tokens leave no room for its answer in max_seq_length=" in message
    assert "raise max_seq_length to " in message


# The model


def test_a_model_folder_without_weights(out: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ensure_builtin(), folder)
    (folder / "model.safetensors").unlink()
    message = refused(words(out, data, f"model_name_or_path={folder}"), tmp_path)
    assert message.startswith(f"model_name_or_path={folder}: {folder} holds no weights")


def test_a_model_folder_that_is_not_there(out: Path, data: Path, tmp_path: Path) -> None:
    message = refused(words(out, data, f"model_name_or_path={tmp_path}/nothing"), tmp_path)
    assert message.startswith(f"model_name_or_path={tmp_path}/nothing: there is no such folder.")


def test_a_model_folder_with_damaged_weights(out: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ensure_builtin(), folder)
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    message = refused(words(out, data, f"model_name_or_path={folder}"), tmp_path)
    assert message.startswith(f"{folder}: its weights cannot be loaded: ")


def test_an_adapter_to_start_from_that_is_none(out: Path, data: Path, tmp_path: Path) -> None:
    message = refused(words(out, data, f"adapter={data}"), tmp_path)
    assert message.startswith(f"adapter={data}: ")


# The run folder


def test_a_folder_with_other_files(out: Path, data: Path, tmp_path: Path) -> None:
    out.mkdir()
    (out / "thesis.docx").write_text("years of work", encoding="utf-8")
    message = refused(words(out, data), tmp_path)
    assert message.startswith(f"output_dir={out}: holds other files (thesis.docx), but no run of sftx.")


def test_a_folder_with_another_run(out: Path, data: Path, tmp_path: Path) -> None:
    start(words(out, data))
    message = refused(words(out, data, "learning_rate=0.5"), tmp_path)
    assert message.startswith(f"output_dir={out}: holds another run, which would be overwritten.")
    assert "learning_rate" in message
    assert "Choose another output_dir" in message
    message = refused(words(out, data, "resume=never"), tmp_path)
    assert message.startswith(f"output_dir={out}: holds a run, and resume=never would overwrite it.")
    (data / "a.csv").write_text(HEADER + ROWS + "c0,one more,row\n", encoding="utf-8")
    message = refused(words(out, data), tmp_path)
    assert message.startswith(f"output_dir={out}: holds another run")


def test_a_file_where_the_folder_should_be(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        message = refused(words(out, data), tmp_path)
        assert message.startswith(f"{out}: cannot be written: a file is where a folder should be.")


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small disk of its own, where that is allowed."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no disk can be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


needs_mount = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("mount") is None or os.geteuid() != 0, reason="only root can mount a disk"
)


@needs_mount
def test_a_read_only_disk(data: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro,size=1m") as disk:
        message = refused(words(disk / "run", data), tmp_path)
        assert message == f"{disk / 'run'}: cannot be written: the disk is read-only. Choose another output_dir."


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(data: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(0o500)
    message = refused(words(locked / "run", data), tmp_path)
    assert message.startswith(f"{locked / 'run'}: cannot be written: permission denied.")


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="there is no /sys")
def test_a_file_system_that_takes_no_files(data: Path, tmp_path: Path) -> None:
    message = refused(words(Path("/sys/sftx-run"), data), tmp_path)
    assert message.startswith("/sys/sftx-run: cannot be written: ")
    assert message.endswith(". Choose another output_dir.")


@needs_mount
@pytest.mark.parametrize("size", ["16k", "128k"])
def test_a_full_disk(data: Path, tmp_path: Path, size: str) -> None:
    with mounted(tmp_path / "disk", f"size={size}") as disk:
        with pytest.raises(SftxError) as caught:
            start(words(disk / "run", data))
        assert caught.value.exit_code == EXIT_USER
        assert re.search(r"[\d,]+ bytes (are )?free", str(caught.value))
        assert "Free some space" in str(caught.value)
        assert not [p for p in disk.rglob("*") if p.name.startswith(".")], "temporary files were left"
        assert not (disk / "run" / "final").exists()


# The program as a whole


@pytest.mark.parametrize(
    "what",
    ["missing file", "hub id without network", "file in the way", "folder set by JSON", "folder set by an experiment"],
)
def test_the_program_says_one_thing_and_exits_with_2(data: Path, tmp_path: Path, what: str) -> None:
    out = tmp_path / "run"
    (tmp_path / "args.json").write_text(json.dumps({"seed": 1, "adapter": f"{tmp_path}/nothing"}, indent=1))
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(f"model_name_or_path: {tmp_path}/nothing\n")
    arguments = {
        "missing file": words(out, data, name="b.csv"),
        "hub id without network": words(out, data, "model_name_or_path=Qwen/Qwen2.5-0.5B-Instruct"),
        "file in the way": words(data / "a.csv", data),
        "folder set by JSON": words(out, data, f"args_file={tmp_path}/args.json"),
        "folder set by an experiment": words(out, data, f"--config-dir={tmp_path}", "experiment=mine"),
    }[what]
    says = {
        "missing file": "sftx: train_file_name=b.csv: no such file in ",
        "hub id without network": "sftx: model_name_or_path=Qwen/Qwen2.5-0.5B-Instruct: there is no such folder. ",
        "file in the way": f"sftx: {data / 'a.csv'}: cannot be written: a file is where a folder should be. ",
        "folder set by JSON": f"sftx: {tmp_path}/args.json:3: adapter={tmp_path}/nothing: ",
        "folder set by an experiment": (
            f"sftx: {tmp_path}/experiment/mine.yaml:1: model_name_or_path={tmp_path}/nothing: there is no such folder. "
        ),
    }[what]
    before = tree(tmp_path)
    done = subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=PROJECT_ROOT,
        env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == EXIT_USER, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("Error executing job with overrides:")]
    assert len(said) == 1, done.stderr
    assert said[0].startswith(says)
    assert "Traceback" not in done.stdout + done.stderr
    assert tree(tmp_path) == before
