"""`sftx.data.store.record_store` and the cache: records on disk, one conversion, bounded memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sftx.data.corpus import Corpus, LoadedFile, convert
from sftx.data.records.choose import ChoosePolicy, choose, facts_of
from sftx.data.records.record import Message, Record
from sftx.data.records.split import split
from sftx.data.store import record_store as record_store_module
from sftx.data.store.record_store import RecordStore, RecordView, write_records
from sftx.errors import DataError

HEADER = "category,human,assistant\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "corpora"


RICH = Record(
    (
        Message("system", ""),
        Message("user", "q\u2028\n\r\0 😀"),
        Message("assistant", "", 0.5, "hm", ({"type": "function", "function": {"name": "f", "arguments": {"a": None}}},)),
        Message("tool", "r", name="f"),
        Message("assistant", "a", 0.0),
    ),
    "c",
    "/x/a.csv",
    7,
    {"n": [1, None, 1.5, {"half": "\ud800"}]},
    ({"type": "function", "function": {"name": "f"}},),
    0.25,
    "a",
)  # fmt: skip


def store_of(folder: Path, records: list[Record]) -> RecordStore:
    folder.mkdir()
    facts = write_records(folder, [(0, r) for r in records])
    return RecordStore(folder, ["/x/a.csv"], ["a"], facts["categories"])


def plain(i: int) -> Record:
    return Record(
        (Message("user", f"q{i % 40}"), Message("assistant", f"a{i}")), f"c{i % 3}", "/x/a.csv", i, {}, source="a"
    )


def test_records_come_back_exactly(tmp_path: Path) -> None:
    assert list(store_of(tmp_path / "s", [RICH, plain(1), RICH])) == [RICH, plain(1), RICH]


def test_a_store_is_a_sequence(tmp_path: Path) -> None:
    records = [plain(i) for i in range(100)]
    store = store_of(tmp_path / "s", records)
    assert store == records
    assert store != records[1:]
    assert (store[0], store[-1], store[99], len(store)) == (records[0], records[-1], records[99], 100)
    for place in (100, -101):
        with pytest.raises(IndexError):
            store[place]
    for cut in (slice(None), slice(3, 50, 7), slice(None, None, -1), slice(5, None), slice(200, 300), slice(None, 5)):
        view = store[cut]
        assert isinstance(view, RecordView)
        assert view == records[cut]
        assert view[1:][::2] == records[cut][1:][::2]
    assert not store[5:5]
    assert store[10:20][-1] == records[19]
    again = pickle.loads(pickle.dumps(store[3:9]))
    assert again == records[3:9]


def test_splits_of_a_store_and_of_a_list_are_the_same(tmp_path: Path) -> None:
    records = [plain(i) for i in range(300)]
    store = store_of(tmp_path / "s", records)
    for ratio, most in ((0.1, 500), (0.5, 20), (0.0, 5), (0.9, 500)):
        assert split(store, ratio, most) == split(records, ratio, most)
        assert split(store[20:250], ratio, most) == split(records[20:250], ratio, most)
    assert split(store, 0.1, 500)[1], "some are held out"


def test_a_split_reads_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path / "s", [plain(i) for i in range(300)])
    monkeypatch.setattr("sftx.data.store.record_store._from_line", None)
    training, held = split(store[:200], 0.1, 500)
    assert len(training) + len(held) == 200


def test_what_the_policies_need_is_known_without_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [plain(i) for i in range(100)] + [plain(3), RICH]
    store = store_of(tmp_path / "s", records)
    monkeypatch.setattr("sftx.data.store.record_store._from_line", None)
    for some, same in ((store, records), (store[5:80][::2], records[5:80][::2])):
        known, read = facts_of(some), facts_of(same)
        assert (known.prompts.tolist(), known.answers.tolist()) == (read.prompts.tolist(), read.answers.tolist())
        assert (known.categories, known.sources) == (read.categories, read.sources)
    assert [store.origin(i) for i in range(len(store))] == [r.origin for r in records]
    assert store[10:][::3].origin(2) == records[16].origin
    choice = choose(facts_of(store), store, ChoosePolicy(duplicates="drop_exact", conflicts="drop"), 0)
    assert (100, "is /x/a.csv:3 again") in choice.left_out


def test_a_store_that_is_cut_short_while_it_is_used(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", [plain(i) for i in range(100)])
    path = tmp_path / "s" / "records.arrow"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match="was changed while it was used"):
        list(store)


# The cache


def put(path: Path, rows: str) -> Path:
    path.write_text(HEADER + rows, encoding="utf-8")
    return path


def load(path: Path, **how: object) -> LoadedFile:
    return Corpus(**how).load(str(path.parent), path.name, key="train_file_name", keep_columns=True)  # type: ignore[arg-type]


def test_skipped_rows_are_handed_back(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", "a,b\n" * 3 + "c,q,a\nc,,\n")
    for _ in ("converted", "from the cache"):
        loaded = load(path, on_bad_rows="skip")
        assert [(r.line, r.human) for r in loaded.records] == [(5, "q")]
        said = list(loaded.skipped())
        assert [line.split(": ")[0] for line in said] == [f"{path}:{n}" for n in (2, 3, 4, 6, 6)]
        assert "2 cells found, 3 expected" in said[0]
        assert (loaded.skipped_rows, loaded.facts()["skipped_rows"]) == (4, 4)
    with pytest.raises(DataError, match="2 cells found"):
        load(path)


def _convert(path: Path, start: object, out: object, built: object) -> None:
    whole = record_store_module.write_records

    def counting(*arguments: object) -> object:
        with built.get_lock():  # type: ignore[attr-defined]
            built.value += 1  # type: ignore[attr-defined]
        return whole(*arguments)  # type: ignore[arg-type]

    record_store_module.write_records = counting  # type: ignore[assignment]
    start.wait()  # type: ignore[attr-defined]
    loaded = load(path)
    out.put((len(loaded.records), loaded.records[-1].human))  # type: ignore[attr-defined]


def test_sixteen_processes_convert_a_file_once(tmp_path: Path, cache: Path) -> None:
    path = put(tmp_path / "a.csv", "".join(f'a,"q{i}\n{"x" * 200}",r\n' for i in range(5000)))
    context = multiprocessing.get_context("fork")
    start, out, built = context.Event(), context.Queue(), context.Value("i", 0)
    workers = [context.Process(target=_convert, args=(path, start, out, built)) for _ in range(16)]
    for worker in workers:
        worker.start()
    start.set()
    found = {out.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert found == {(5000, "q4999\n" + "x" * 200)}
    assert built.value == 1, "the others wait for the one that converts"
    assert len(list(cache.iterdir())) == 1, "a lock or a temporary folder was left"


def test_a_converter_that_was_killed_leaves_nothing_in_the_way(tmp_path: Path, cache: Path) -> None:
    path = put(tmp_path / "a.csv", "c,q,a\n")
    code = (
        "import os, sys, time; from pathlib import Path; from sftx.data import corpus; from sftx.data.store import record_store\n"
        "def hang(into, records): (into / 'records.arrow').write_text('half'); print('in', flush=True); time.sleep(60)\n"
        "record_store.write_records = hang\n"
        f"corpus.Corpus().load({str(tmp_path)!r}, 'a.csv', key='k', keep_columns=True)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    owner = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"in\n"
    assert any(p.name.endswith(".lock") for p in cache.iterdir())
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    began = time.monotonic()
    assert [r.human for r in load(path).records] == ["q"]
    assert time.monotonic() - began < 10
    assert [p.name for p in cache.iterdir()] == [load(path).records.key], "what the killed one left is gone"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.csv.gz"])
def test_memory_is_bounded(tmp_path: Path, name: str) -> None:
    """40 MB of rows are converted, split and read with far less than that in memory."""
    path = tmp_path / name
    code = f"""
import gzip, json, re
from pathlib import Path
def peak():  # of this process; ru_maxrss would include what its parent had
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
path = Path({str(path)!r})
row = {{"category": "c", "human": "问" * 300, "assistant": "答" * 1000}}
def rows():
    for i in range(10_000):
        yield row | {{"human": f"{{i}}" + row["human"]}}
with (gzip.open(path, "wt", encoding="utf-8", newline="") if path.suffix == ".gz" else path.open("w", encoding="utf-8", newline="")) as out:
    if "csv" in path.name:
        out.write("category,human,assistant\\n")
        out.writelines(f"{{r['category']}},{{r['human']}},{{r['assistant']}}\\n" for r in rows())
    elif path.suffix == ".json":
        out.write("[" + json.dumps(row, ensure_ascii=False))
        out.writelines("," + json.dumps(r, ensure_ascii=False) for r in rows())
        out.write("]")
    else:
        out.writelines(json.dumps(r, ensure_ascii=False) + "\\n" for r in rows())
from sftx.data.corpus import Corpus
from sftx.data.records.split import split
before = peak()
loaded = Corpus().load(str(path.parent), path.name, key="k", keep_columns=False)
training, held = split(loaded.records, 0.05, 500)
assert len(training) + len(held) == len(loaded.records) >= 10_000
assert sum(len(r.human) for r in held) > 0
print(peak() - before)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 25_000, f"{done.stdout} kB more than before"


# Conversion to plain JSONL


def test_convert_single_turns(tmp_path: Path) -> None:
    one = put(tmp_path / "a.csv", "c,q,a\n")
    two = tmp_path / "b.jsonl"
    two.write_text('{"instruction": "i", "input": "j", "output": "o", "id": 5, "weight": 0.5}\n', encoding="utf-8")
    out = tmp_path / "out" / "all.jsonl"
    done = convert([one, two], out)
    assert (done.rows, done.schema) == (2, "human_assistant")
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == [
        {"category": "c", "human": "q", "assistant": "a"},
        {"category": "default", "human": "i\nj", "assistant": "o", "weight": 0.5, "id": 5},
    ]
    assert [(r.human, r.weight, r.extra) for r in load(out).records] == [("q", 1.0, {}), ("i\nj", 0.5, {"id": 5})]
    convert([one, two], out, keep_columns=False)
    assert "id" not in out.read_text(encoding="utf-8")


def test_convert_conversations(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": "a", "system": "s"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "all.jsonl"
    assert convert([path], out).schema == "messages"
    first, second = (json.loads(line) for line in out.read_text(encoding="utf-8").splitlines())
    assert first == {
        "category": "default",
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    }
    assert second["messages"][0] == {"role": "system", "content": "s"}
    assert [r.messages for r in load(out).records] == [r.messages for r in load(path).records]


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", "c,q,a\n")
    with pytest.raises(DataError, match="is one of the files to convert"):
        convert([path], path)
    odd = tmp_path / "b.jsonl"
    odd.write_text('{"prompt": "q", "completion": "a", "Human": 5}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"b.jsonl:1: the column `Human` would be taken for something else"):
        convert([odd], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(DataError, match="no such file"):
        convert([tmp_path / "c.csv"], tmp_path / "out.jsonl")
