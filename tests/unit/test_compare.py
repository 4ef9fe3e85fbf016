"""`sftx diff`: two run folders, of any origin and ending."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftx import cli
from sftx.commands.run_report import difference_lines
from sftx.config.checks.check import freeze
from sftx.config.composition.prepare import compose_checked
from sftx.errors import RunFolderError
from sftx.files import write_json, write_text
from sftx.runs.saved.comparison import ABSENT, Difference, compare, compare_records, first_change, judge, same
from sftx.runs.saved.saved_run import open_run
from sftx.training.saving.run_folder import RunFolder

MANIFEST: dict[str, Any] = {
    "command": "python train.py",
    "directory": "/home/me/sftx",
    "ranks": 1,
    "environment": {
        "sftx": "0.1.0",
        "packages": {"torch": "2.13.0"},
        "git": {"commit": "a" * 40, "dirty": False, "diff": ""},
        "hardware": {"torch_threads": 2, "host": "here"},
        "started": "2026-01-01T10:00:00+00:00",
    },
    "identity": {"config": {}, "data": [], "model": "f" * 16, "adapter": None},
    "model": {"name": "qwen-tiny", "folder": "/cache/one", "parameters": 5},
    "data": [{"path": "data/x.csv", "sha256": "1" * 64, "rows": 10, "jsonl": "/cache/1.jsonl"}],
    "rows": {"train": 9, "eval": 1},
    "attempts": [{}],
    "effective": {"settings": {"compute_dtype": "float32"}, "fallbacks": [], "remarks": ["x"]},
    "result": {"steps": 2, "eval_loss": 3.0},
}
RECORDS = [
    {"step": 0, "eval/loss": 4.0, "eval/seconds": 0.1},
    {"step": 1, "train/loss": 4.5, "train/grad_norm": 1.0, "perf/tokens_per_second": 100.0},
    {"step": 2, "train/loss": 4.25, "train/grad_norm": 1.5, "perf/tokens_per_second": 120.0},
    {"step": 2, "eval/loss": 3.0, "eval/seconds": 0.2},
]
Leave = Callable[..., Path]


@pytest.fixture
def leave(tmp_path: Path) -> Leave:
    """Return a function that leaves the folder of a run: a manifest, changed at dotted keys, metrics and weights."""

    def make(
        name: str,
        changes: dict[str, Any] | None = None,
        *typed: str,
        records: list[Any] | None = None,
        weights: bytes | None = b"w",
        status: str = "completed",
    ) -> Path:
        manifest = copy.deepcopy(MANIFEST)
        for key, value in (changes or {}).items():
            *parts, last = key.split(".")
            tree = manifest
            for part in parts:
                tree = tree[part]
            tree[last] = value
        folder = RunFolder(tmp_path / name)
        folder.open(freeze(compose_checked([f"output_dir={folder.path}", *typed])), manifest)
        folder.update(status=status)
        write_text(folder.metrics, "".join(json.dumps(r) + "\n" for r in (RECORDS if records is None else records)))
        if weights is not None:
            write_text(folder.final / "adapter_model.safetensors", weights.decode())
        return folder.path

    return make


def told(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    code = cli.run(["diff", *map(str, words)])
    return code, capsys.readouterr().out


SECTIONS = ("config", "environment", "data", "model", "effective", "metrics", "weights", "result")


def test_time_folder_and_speed_are_no_difference(leave: Leave, capsys: pytest.CaptureFixture[str]) -> None:
    slower = [r | {k: 9.0 for k in r if k.startswith("perf/") or k == "eval/seconds"} for r in RECORDS]
    later = {"environment.started": "2027-02-02T10:00:00+00:00", "attempts": [{}, {}], "model.folder": "/cache/two"}
    code, out = told(capsys, leave("a"), leave("b", later, records=slower))
    assert code == 0
    assert out.count(": no difference") == len(SECTIONS)
    assert "attempts: 1 -> 2  (does not count)" in out
    code, out = told(capsys, leave("a"), leave("b", later, records=slower), "--json")
    assert code == 0
    assert json.loads(out)["differs"] is False


@pytest.mark.parametrize(
    ("section", "changes", "line"),
    [
        ("environment", {"environment.packages": {"torch": "2.12.0"}}, "packages.torch: 2.13.0 -> 2.12.0"),
        ("environment", {"environment.hardware": {"torch_threads": 1, "host": "here"}}, "torch_threads: 2 -> 1"),
        ("environment", {"environment.hardware": {"torch_threads": 2, "host": "there"}}, "host: here -> there"),
        ("environment", {"environment.git": {"commit": "a" * 40, "dirty": True, "diff": "x\ny"}}, "git.diff: none -> 2 lines of changes, sha256"),
        ("environment", {"environment.git": {"commit": "b" * 40}}, "git.commit: aaaa"),
        ("environment", {"ranks": 2}, "ranks: 1 -> 2"),
        ("data", {"data": [{"path": "data/x.csv", "sha256": "2" * 64, "rows": 10}]}, "training corpus: data/x.csv:"),
        ("data", {"data": []}, "training corpus: data/x.csv -> (not there)"),
        ("data", {"rows": {"train": 8, "eval": 2}}, "rows.train: 9 -> 8"),
        ("model", {"identity.model": "e" * 16}, "fingerprint: ffffffffffffffff -> eeeeeeeeeeeeeeee"),
        ("effective", {"effective.settings": {"compute_dtype": "bfloat16"}}, "compute_dtype: float32 -> bfloat16"),
        ("effective", {"effective.fallbacks": [{"key": "fp16", "requested": "true", "effective": "fp32", "reason": "r"}]}, "fallback of fp16: (not there) -> true -> fp32: r"),
        ("result", {"result": {"steps": 2, "eval_loss": 3.5}}, "eval_loss: 3.0 -> 3.5"),
    ],
)  # fmt: skip
def test_each_section_shows_its_own_difference(
    leave: Leave, capsys: pytest.CaptureFixture[str], section: str, changes: dict[str, Any], line: str
) -> None:
    a, b = leave("a"), leave("b", changes)
    code, out = told(capsys, a, b)
    assert code == 1
    assert line in out
    assert [s.name for s in compare(open_run(a), open_run(b)) if s.differs] == [section]
    assert f"{section}: 1 difference" in out or f"{section}: 2 differences" in out


def test_settings_are_dotted_and_paths_come_last(leave: Leave, capsys: pytest.CaptureFixture[str]) -> None:
    b = leave("b", None, "train_file_path=data/csv", "lora_rank=8", "scheduler=cosine")
    code, out = told(capsys, leave("a"), b)
    lines = [line.strip() for line in out[: out.index("environment:")].splitlines()]
    assert code == 1
    assert {"lora_rank: 64 -> 8", "mode.rank: 64 -> 8"} <= set(lines)
    assert lines[-1] == "train_file_path: data -> data/csv"
    assert "output_dir" not in out, "the headings say it"


def test_a_path_to_the_same_place_is_no_difference(leave: Leave) -> None:
    a = leave("a", None, "train_file_path=data")
    b = leave("b", {"directory": "/elsewhere"}, "train_file_path=/home/me/sftx/data")
    c = leave("c", {"directory": "/elsewhere"}, "train_file_path=/elsewhere/data")
    assert not compare(open_run(a), open_run(b))[0].differs
    assert compare(open_run(a), open_run(c))[0].differs


def test_metrics_say_where_they_part(leave: Leave, capsys: pytest.CaptureFixture[str]) -> None:
    other = copy.deepcopy(RECORDS)
    other[2]["train/loss"] += 1e-12
    other.append({"step": 3, "train/loss": 4.0, "train/grad_norm": 1.0})
    a, b = leave("a"), leave("b", records=other)
    code, out = told(capsys, a, b)
    assert code == 1
    assert "step 2: 4.25 -> 4.250000000001 " in out, "as many digits as it takes"
    assert "1e-12 (step 2)" in out
    assert "eval loss of a: first 4.0000 (step 0), best 3.0000 (step 2), last 3.0000 (step 2)" in out
    found = {m.name: m for m in compare_records(open_run(a).records, open_run(b).records)}
    assert (found["train/loss"].steps_a, found["train/loss"].steps_b, found["train/loss"].shared) == (2, 3, 2)
    assert not found["eval/loss"].differs
    assert "perf/tokens_per_second" not in found
    change = first_change(list(found.values()))
    assert change is not None
    assert (change.metric, change.step) == ("train/loss", 2)


def test_the_same_bits_are_the_same() -> None:
    nan = float("nan")
    assert same(nan, nan)
    assert not same(0.0, -0.0)
    assert not same(0.1 + 0.2, 0.3)
    changed = compare_records({1: {"train/loss": 1.0}}, {1: {"train/loss": nan}})[0]
    assert changed.largest == float("inf")


def test_weights_are_compared_by_content(leave: Leave) -> None:
    a, b, c = leave("a"), leave("b", weights=b"other"), leave("c", weights=None)
    weights = {name: compare(open_run(a), open_run(x))[6].differences for name, x in (("b", b), ("c", c))}
    assert [d.key for d in weights["b"]] == ["final/adapter_model.safetensors"]
    assert weights["c"][0].b == ABSENT


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ({}, {}, True),
        ({}, {"weights": b"other"}, False),
        ({}, {"records": RECORDS[:3]}, False),
        ({"records": [*RECORDS, {"step": 1, "eval/loss": 3.5}]}, {}, False),
        ({"changes": {"attempts": [{}, {}]}, "records": [*RECORDS, {"step": 1, "eval/loss": 3.5}]}, {}, True),
        ({"changes": {"attempts": [{}, {}]}}, {"records": [*RECORDS, {"step": 1, "eval/loss": 3.5}]}, False),
        ({"weights": None}, {}, True),
        ({"status": "stopped", "records": RECORDS[:2], "weights": None}, {}, True),
        ({"status": "stopped", "records": [{"step": 1, "train/loss": 4.6}], "weights": None}, {}, False),
        ({"status": "failed", "records": [], "weights": None}, {}, False),
    ],
    ids=[
        "alike",
        "weights",
        "a record",
        "another",
        "went on",
        "never went there",
        "none kept",
        "stopped",
        "stopped, other",
        "nothing",
    ],
)
def test_what_are_the_same_bits(leave: Leave, old: dict[str, Any], new: dict[str, Any], same: bool) -> None:
    assert judge(open_run(leave("a", **old)), open_run(leave("b", **new))).same is same


def test_a_run_that_goes_on_or_was_killed(leave: Leave, capsys: pytest.CaptureFixture[str]) -> None:
    b = leave("b", status="running", weights=None, records=RECORDS[:2])
    with (b / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "train/lo')
    code, out = told(capsys, leave("a"), b)
    assert code == 1
    assert "(running, 1 step, started 2026-01-01 10:00:00)" in out
    assert "status: completed -> running" in out


@pytest.mark.parametrize("text", ["", '{"status": "compl', "[1]", '{"environment": 3, "data": {"x": 1}, "ranks": "9"}'])
def test_a_damaged_manifest_is_said_and_the_rest_compared(
    leave: Leave, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    a, b = leave("a"), leave("b", None, "seed=1")
    (b / "manifest.json").write_text(text)
    code, out = told(capsys, a, b)
    assert code == 1
    assert "seed: 42 -> 1" in out
    assert "metrics: no difference" in out
    if not text.startswith('{"environment"'):
        assert f"{b}/manifest.json: cannot be read" in out
        assert out.count("not compared, see above") == 5


@pytest.mark.parametrize("text", ["a: [", "- 1", "a: 1\na: 2", "1: 2"])
def test_a_damaged_config_is_said(leave: Leave, capsys: pytest.CaptureFixture[str], text: str) -> None:
    a, b = leave("a"), leave("b")
    (b / "config.yaml").write_text(text)
    code, out = told(capsys, a, b)
    assert code == 1
    assert f"{b}/config.yaml" in out
    assert "config: not compared" in out


def test_a_text_that_looks_like_a_number_stays_a_text(leave: Leave) -> None:
    a = leave("a", None, "data.system='1e5'")
    assert (open_run(a).config or {})["data"]["system"] == "1e5"


def test_a_folder_that_is_no_run_says_what_is_near(leave: Leave, tmp_path: Path) -> None:
    run = leave("10-00-00-lora")
    write_json(tmp_path / "sweep/0/trial.json", {"error": "DataError: no such file"})
    for number in ("1", "2", "10"):
        leave(f"sweep/{number}")
        write_json(tmp_path / "sweep" / number / "trial.json", {})
    for path, words in {
        tmp_path / "10-00-00-lara": f"there is no such folder. Did you mean `{run}`?",
        tmp_path / "gone/deeper": "there is no such folder",
        tmp_path / "sweep": f"is a sweep's folder, not a run's. Its trials: 1, 2, 10. Name one: {tmp_path}/sweep/1",
        tmp_path / "sweep/0": "this trial ended before it was a run: DataError: no such file",
        tmp_path: "is a folder of runs, not a run's. Its runs: 10-00-00-lora.",
        run / "final": f"It lies in the run {run}: name that.",
        run / "config.yaml": f"is a file, expected a run folder. It lies in the run {run}",
    }.items():
        with pytest.raises(RunFolderError) as raised:
            open_run(path)
        assert words in str(raised.value)
    assert open_run(tmp_path / "sweep/2").status == "completed"


def test_a_terminal_obeys_nothing_that_a_folder_holds(leave: Leave, capsys: pytest.CaptureFixture[str]) -> None:
    b = leave("b", {"result": {"eval_loss": "\x1b[2J\u202e[bold]x"}}, records=[{"step": 1, "\x1b]0;x\x07": 1}])
    _, out = told(capsys, leave("a"), b)
    assert not {"\x1b", "\x07", "\u202e"} & set(out)
    assert "<U+001B>[2J<U+202E>[bold]x" in out


def test_long_values_are_shown_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = list(difference_lines(Difference("k", "x" * 900 + "left", "x" * 900 + "right")))
    assert lines[0] == "  k:"
    assert any(line.endswith("left") for line in lines)
    assert any(line.endswith("right") for line in lines)
    assert list(difference_lines(Difference("k", None, True))) == ["  k: null -> true"]
