"""`sftx.data.store.digests`: the hash of a file that was not written to is known without reading it."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from sftx.data.corpus import Corpus
from sftx.data.store import digests
from sftx.data.store import record_store as record_store_module
from sftx.data.store.digests import known_sha256
from sftx.errors import DataError

OLD = 10**9
"""Seconds since 1970."""


@pytest.fixture(autouse=True)
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read, none of them too small to be kept, none too young."""
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SMALL", 0)
    monkeypatch.setattr(digests, "YOUNG_NS", -(1 << 62))
    seen: list[Path] = []
    whole = digests.sha256_file
    monkeypatch.setattr(digests, "sha256_file", lambda path: seen.append(path) or whole(path))
    return seen


def is_right(path: Path) -> bool:
    return known_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_stays_is_read_once(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert all(is_right(path) for _ in range(3))
    assert reads == [path]


def test_other_content_of_the_same_size_and_time_is_seen(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    os.utime(path, (OLD, OLD))
    assert is_right(path)
    time.sleep(0.02)  # the clock by which files are stamped ticks a hundred times a second
    path.write_bytes(b"two")
    os.utime(path, (OLD, OLD))
    assert is_right(path), "written anew, its time set back"
    other = tmp_path / "b"
    other.write_bytes(b"six")
    os.utime(other, (OLD, OLD))
    other.rename(path)
    assert is_right(path), "another file under its name"
    assert len(reads) == 3


def test_the_hash_of_a_young_file_is_not_kept(tmp_path: Path, reads: list[Path], monkeypatch) -> None:
    """Within one tick of the clock a file can change and keep its times; git calls that racily clean."""
    monkeypatch.setattr(digests, "YOUNG_NS", 3_000_000_000)
    path, same = tmp_path / "a", (1, 1, 3, OLD * 10**9, time.time_ns())
    monkeypatch.setattr(digests, "stamp", lambda _: same)
    for content in (b"one", b"two", b"six"):
        path.write_bytes(content)
        assert is_right(path)
    assert len(reads) == 3


def test_what_changes_while_it_is_read_is_not_kept(tmp_path: Path, reads: list[Path], monkeypatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    whole = digests.sha256_file

    def slow(file: Path) -> str:
        digest = whole(file)
        time.sleep(0.02)
        file.write_bytes(b"two")
        return digest

    monkeypatch.setattr(digests, "sha256_file", slow)
    known_sha256(path)
    monkeypatch.setattr(digests, "sha256_file", whole)
    assert is_right(path)


def test_small_files_are_always_read(tmp_path: Path, reads: list[Path], monkeypatch) -> None:
    monkeypatch.setattr(digests, "SMALL", 4)
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert is_right(path)
    assert is_right(path)
    assert len(reads) == 2


def test_a_damaged_note_and_a_cache_that_cannot_be_written(tmp_path: Path, reads: list[Path], monkeypatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert is_right(path)
    (note,) = (tmp_path / "cache" / "digests").iterdir()
    for damage in ("", "[]", "{}", '{"stamp": 1}'):
        note.write_text(damage)
        assert is_right(path)
    monkeypatch.setenv("SFTX_CACHE", str(path / "inside-a-file"))
    assert is_right(path)
    with pytest.raises(DataError, match="cannot be read"):
        known_sha256(tmp_path / "gone")


def test_a_warm_corpus_is_not_read_and_a_changed_one_is(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "a.csv"

    def human() -> str:
        return Corpus().load(str(tmp_path), "a.csv", key="k", keep_columns=True).records[0].human

    path.write_text("category,human,assistant\nc,one,a\n", encoding="utf-8")
    assert human() == "one"
    assert human() == "one"
    assert reads == [path], "what it wrote itself is known"
    path.write_text("category,human,assistant\nc,two,a\n", encoding="utf-8")
    assert human() == "two"
    for store in (tmp_path / "cache" / "corpora").glob("*/records.arrow"):
        time.sleep(0.02)
        store.write_bytes(store.read_bytes().replace(b"two", b"bad"))
    assert human() == "two", "a store that is not as it was left is made anew"


def test_a_corpus_that_changes_while_it_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    path.write_text("category,human,assistant\nc,one,a\n", encoding="utf-8")
    whole = record_store_module.write_records

    def slow(into: Path, records: object) -> object:
        facts = whole(into, records)  # type: ignore[arg-type]
        time.sleep(0.02)
        path.write_text("category,human,assistant\nc,two,a\n", encoding="utf-8")
        return facts

    monkeypatch.setattr(record_store_module, "write_records", slow)
    with pytest.raises(DataError, match="was changed while it was read"):
        Corpus().load(str(tmp_path), "a.csv", key="k", keep_columns=True)
