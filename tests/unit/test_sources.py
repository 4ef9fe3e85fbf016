"""`sftx.data.files.sources`: what a corpus name means."""

from __future__ import annotations

import json
import sys
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sftx import EMBEDDED_DATA
from sftx.data.corpus import Corpus, LoadedFile
from sftx.data.files.sources import Source, fetch, find_sources
from sftx.errors import DataError

HEADER = "category,human,assistant\n"
KEY = "train_file_name"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SFTX_CACHE", str(folder))
    return folder


def put(path: Path, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEADER + "".join(f"{row}\n" for row in rows or ("c,q,a",)), encoding="utf-8")
    return path


def arrow(path: Path, *humans: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"category": ["c"] * len(humans), "human": humans, "assistant": ["a"] * len(humans)})
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return path


def load(folder: Path, name: str | list[str], **how: Any) -> LoadedFile:
    return Corpus(**how).load(str(folder), name, key=KEY, keep_columns=True)


def found(folder: Path, name: str | list[str]) -> list[str]:
    return [str(s.path.relative_to(folder)) for s in find_sources(str(folder), name, key=KEY)]


def refused(folder: Path, name: str | list[str], *fragments: str) -> None:
    with pytest.raises(DataError) as caught:
        load(folder, name)
    for fragment in fragments:
        assert fragment in str(caught.value), caught.value


def test_patterns_are_sorted_and_look_in_csv_too(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "csv/c.csv", "x.txt", "a10.csv", "a9.csv"):
        put(tmp_path / name)
    assert found(tmp_path, "*.csv") == ["a.csv", "a10.csv", "a9.csv", "b.csv", "csv/c.csv"]
    assert found(tmp_path, "a?*.csv") == ["a10.csv", "a9.csv"]
    assert found(tmp_path, "[bx].*") == ["b.csv", "x.txt"]
    assert found(tmp_path, ["b.csv", "a*.csv"]) == ["b.csv", "a.csv", "a10.csv", "a9.csv"]


def test_a_whole_path_is_one_file(tmp_path: Path) -> None:
    file = put(tmp_path / "a.csv")
    assert [s.path for s in find_sources(".", str(file), key=KEY)] == [file]
    assert [s.path for s in find_sources(".", str(tmp_path), key=KEY)] == [file]


def test_a_file_whose_name_is_a_pattern_is_that_file(tmp_path: Path) -> None:
    put(tmp_path / "a[1].csv")
    put(tmp_path / "a1.csv")
    assert found(tmp_path, "a[1].csv") == ["a[1].csv"]


def test_a_folder_gives_its_corpus_files(tmp_path: Path) -> None:
    for name in (
        "part/b.jsonl.gz",
        "part/a.csv",
        "part/README.md",
        "part/.hidden.csv",
        "part/deep/c.csv",
        "csv/q/z.csv",
    ):
        put(tmp_path / name)
    assert found(tmp_path, "part") == ["part/a.csv", "part/b.jsonl.gz"]
    assert found(tmp_path / "part", ".") == ["a.csv", "b.jsonl.gz"]
    assert found(tmp_path, "q") == ["csv/q/z.csv"]
    (tmp_path / "none").mkdir()
    refused(tmp_path, "none", "train_file_name=none: the folder", "holds no corpus file. Files there: none.")


def test_the_embedded_corpus_is_found_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "aspcoder_train.csv"
    assert [s.path for s in find_sources("data", name, key=KEY)] == [EMBEDDED_DATA / name]
    put(tmp_path / "data/mine.csv")
    assert [s.path for s in find_sources("data", name, key=KEY)] == [EMBEDDED_DATA / name]
    assert [s.path for s in find_sources("data", "mine.csv", key=KEY)] == [Path("data/mine.csv")]
    refused(Path("data"), "mein.csv", "Did you mean `mine.csv`?")
    put(tmp_path / "data" / name)
    assert [s.path for s in find_sources("data", name, key=KEY)] == [Path("data") / name]
    refused(Path("other"), name, "there is no such folder")


def test_several_files_are_one_corpus(tmp_path: Path) -> None:
    put(tmp_path / "b.csv", "c,q1,a", "c,q2,a")
    (tmp_path / "a.v2.jsonl").write_text(json.dumps({"prompt": "q3", "completion": "a"}) + "\n", encoding="utf-8")
    loaded = load(tmp_path, ["b.csv", "a.v2.jsonl"])
    assert [(r.human, r.source, Path(r.file).name, r.line) for r in loaded.records] == [
        ("q1", "b", "b.csv", 2),
        ("q2", "b", "b.csv", 3),
        ("q3", "a.v2", "a.v2.jsonl", 1),
    ]
    facts = loaded.facts()
    assert facts["path"] == str(tmp_path)
    assert (facts["format"], facts["schema"], facts["rows"]) == ("csv, jsonl", "human_assistant, prompt_completion", 3)
    assert [(f["rows"], f["source"], f["encoding"]) for f in facts["files"]] == [
        (2, "b", "utf-8"),
        (1, "a.v2", "utf-8"),
    ]
    other = load(tmp_path, ["a.v2.jsonl", "b.csv"])
    assert [r.human for r in other.records] == ["q3", "q1", "q2"]
    assert other.sha256 != loaded.sha256
    put(tmp_path / "b.csv", "c,new,a")
    assert load(tmp_path, ["b.csv", "a.v2.jsonl"]).records[0].human == "new"


def test_refusals(tmp_path: Path) -> None:
    put(tmp_path / "a.csv")
    put(tmp_path / "csv" / "b.csv")
    refused(tmp_path, "*.json", "train_file_name=*.json: no file in", "has such a name. Files there: a.csv, b.csv.")
    refused(tmp_path, "aa.csv", "no such file in", "Did you mean `a.csv`?")
    refused(tmp_path, "sub/aa.csv", "no such file in")
    refused(tmp_path, ["a.csv", "*.csv"], "a.csv is named twice; leave one out")
    refused(tmp_path, [], "names no file")
    refused(tmp_path, "/etc/*.csvx", "is not a pattern of names inside")
    put(tmp_path / "csv" / "a.csv")
    refused(tmp_path, "*.csv", "train_file_name=a.csv: found both as")
    (tmp_path / "d").mkdir()
    (tmp_path / "csv" / "d").mkdir()
    refused(tmp_path, "d", "train_file_name=d: found both as")
    refused(tmp_path / "nowhere", "a/b.csv", "there is no such folder")


def test_one_bad_file_among_several_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a.csv")
    put(tmp_path / "b.csv", "c,q")
    refused(tmp_path, "*.csv", f"{tmp_path / 'b.csv'}:2: 2 cells found, 3 expected")
    loaded = load(tmp_path, "a*.csv", on_bad_rows="skip")
    assert (loaded.skipped_rows, list(loaded.skipped()), "skipped_rows" in loaded.facts()) == (0, [], False)


# Datasets


def saved(folder: Path, *parts: tuple[str, ...], **state: Any) -> Path:
    names = [f"data-{i:05}-of-{len(parts):05}.arrow" for i in range(len(parts))]
    for name, humans in zip(names, parts, strict=True):
        arrow(folder / name, *humans)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None} | state
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    return folder


def test_a_saved_dataset(tmp_path: Path) -> None:
    saved(tmp_path / "mine", ("q2", "q1"), ("q3",))
    loaded = load(tmp_path, "mine")
    assert [(r.human, r.source, r.line) for r in loaded.records] == [
        ("q2", "mine", 1),
        ("q1", "mine", 2),
        ("q3", "mine", 1),
    ]
    assert load(tmp_path / "mine", ".").records[0].source == "mine"


def test_a_saved_dataset_of_splits(tmp_path: Path) -> None:
    saved(tmp_path / "all" / "train", ("q1",))
    saved(tmp_path / "all" / "test", ("q2",))
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["test", "train"]}', encoding="utf-8")
    assert [(r.human, r.source) for r in load(tmp_path, "all").records] == [("q1", "all")]
    assert load(tmp_path, "all/test").records[0].human == "q2"
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["test", "val"]}', encoding="utf-8")
    refused(tmp_path, "all", "holds the splits test, val; name one: train_file_name=all/test")


def test_a_saved_dataset_that_is_not_whole(tmp_path: Path) -> None:
    folder = saved(tmp_path / "mine", ("q1",))
    (folder / "data-00000-of-00001.arrow").unlink()
    refused(tmp_path, "mine", "data-00000-of-00001.arrow: is missing", "copy the whole folder again")
    for text in ("{", "[]", '{"_data_files": []}', "{}", '{"_data_files": [1]}'):
        (folder / "state.json").write_text(text, encoding="utf-8")
        refused(tmp_path, "mine", "state.json: ", "save the dataset again")
    saved(folder, ("q1",), _indices_files=[{"filename": "x"}])
    refused(tmp_path, "mine", "call flatten_indices()")


def test_datasets_itself_saves_what_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(5)
    ]
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": whole.select([3, 1])}).save_to_disk(tmp_path / "dict")
    assert [r.human for r in load(tmp_path, "one").records] == [f"q{i}" for i in range(5)]
    assert [r.human for r in load(tmp_path, "dict").records] == ["q3", "q1"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A substitute for `datasets`, and a hub that answers."""
    substitute = types.SimpleNamespace(config=types.SimpleNamespace(HF_HUB_OFFLINE=False))
    monkeypatch.setitem(sys.modules, "datasets", substitute)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr("sftx.data.files.hub.urllib.request.urlopen", lambda *_, **__: nullcontext())
    return substitute


def test_a_hub_dataset_is_fetched_when_nothing_local_has_its_name(tmp_path: Path, hub: types.SimpleNamespace) -> None:
    asked: list[object] = []

    def load_dataset(*names: str, split: str) -> object:
        asked.append((*names, split))
        return types.SimpleNamespace(cache_files=[{"filename": str(arrow(tmp_path / "hub" / "x.arrow", "q1"))}])

    hub.load_dataset = load_dataset
    assert find_sources(str(tmp_path), "owner/name", key=KEY) == [Source(Path("owner/name"), "owner/name", hub=True)]
    assert asked == [], "looking for the corpus fetches nothing"
    assert [(r.human, r.source) for r in load(tmp_path, "owner/name").records] == [("q1", "owner/name")]
    assert [r.source for r in load(tmp_path, "owner/name:test").records] == ["owner/name"]
    assert [r.source for r in load(tmp_path, "owner/name/main:test").records] == ["owner/name/main"]
    assert asked == [("owner/name", "train"), ("owner/name", "test"), ("owner/name", "main", "test")]
    put(tmp_path / "owner" / "name" / "a.csv", "c,local,a")
    assert load(tmp_path, "owner/name").records[0].human == "local"


def test_a_hub_dataset_that_cannot_be_had(
    tmp_path: Path, hub: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(name: str, split: str) -> object:
        raise ValueError("Unknown split \"tset\". Should be one of ['train', 'test'].\nmore")

    hub.load_dataset = load_dataset
    refused(tmp_path, "owner/name:tset", "train_file_name=owner/name:tset: no such file or folder", "['train', 'test']")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(tmp_path, "owner/name", "pip install 'sftx[datasets]'")


def test_without_a_way_to_the_hub_only_what_is_kept_is_read(
    tmp_path: Path, hub: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    def kept(*_: str, split: str) -> object:
        assert hub.config.HF_HUB_OFFLINE, "the clients would try again and again"
        return types.SimpleNamespace(cache_files=[{"filename": str(arrow(tmp_path / "hub" / "x.arrow", "q1"))}])

    def nothing(*_: str, split: str) -> object:
        raise ConnectionError("Couldn't find it")

    monkeypatch.setattr("sftx.data.files.hub.urllib.request.urlopen", unreachable)
    hub.load_dataset = kept
    assert load(tmp_path, "owner/name").records[0].human == "q1"
    assert not hub.config.HF_HUB_OFFLINE
    hub.load_dataset = nothing
    refused(tmp_path, "owner/other", "https://huggingface.co does not answer", "HF_ENDPOINT", "name that folder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(tmp_path, "owner/other", "HF_HUB_OFFLINE is set")


def test_local_files_need_no_hub(tmp_path: Path) -> None:
    assert fetch([Source(tmp_path, "x")], key=KEY) == [Source(tmp_path, "x")]


def test_what_became_of_columns_is_known_of_files_and_of_a_stream(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "response": "a", "id": 1, "weight": 2}\n' * 2, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"human": "q", "assistant": "a", "category": "c"}\n', encoding="utf-8")
    said = "prompt, response, weight; unused: `id`; weights of rows: 2"
    assert load(tmp_path, "a.jsonl").columns == [said]
    assert load(tmp_path, ["a.jsonl", "b.jsonl"]).columns == [
        f"a.jsonl: {said}",
        "b.jsonl: category, human, assistant",
    ]
    assert load(tmp_path, "a.jsonl", columns={"id": None, "weight": None}).columns == ["prompt, response"]
    stream = Corpus(streaming=True).stream(str(tmp_path), "a.jsonl", keep_columns=True, limit=None)
    assert len(stream.sample()) == 2
    assert stream.columns == stream.facts()["columns"] == [said]
    assert stream.detected["schema"] == "prompt_completion"
