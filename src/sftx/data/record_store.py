"""Records on disk: one JSON object a line, of which only those asked for are ever in memory."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, overload

import numpy as np

from sftx.data.record import Message, Record, origin_text
from sftx.errors import DataError

RECORDS, INDEX = "records.jsonl", "index.bin"
ENTRY = np.dtype(
    [
        ("start", "<i8"),
        ("line", "<i8"),
        ("number", "<i8"),
        ("file", "<i4"),
        ("category", "<i4"),
        ("prompt", "u1", 32),
        ("before", "<u8"),
        ("answer", "<u8"),
    ]
)
"""What is known of a record without reading it: where it starts, where it came from, the numbers of its file and its
category, and the digests by which it is held out (`prompt_digest`) and compared (`before_hash`, `answer_hash`)."""
_pack = struct.Struct("<qqqii32sQQ").pack


class _Lazy(Sequence[Record]):
    """Records that are read one at a time, equal to any sequence of equal records."""

    @abstractmethod
    def origin(self, place: int) -> str:
        """Return where a record begins, as `file:line`, without reading it."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class RecordStore(_Lazy):
    """The records of a folder that `write_store` filled; `files` and `sources` say what their numbers mean."""

    def __init__(self, folder: Path, files: Sequence[str], sources: Sequence[str], categories: Sequence[str]) -> None:
        self.folder, self.files, self.sources = folder, tuple(files), tuple(sources)
        self.categories = tuple(categories)
        self._open()

    def _open(self) -> None:
        path = self.folder / INDEX  # an empty file cannot be mapped
        self.entries: np.ndarray = np.memmap(path, ENTRY, "r") if path.stat().st_size else np.zeros(0, ENTRY)
        self._starts = self.entries["start"]
        # Read at an offset, not mapped: where a mapped file is cut short the kernel kills the process.
        self._file = (self.folder / RECORDS).open("rb", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size

    def __eq__(self, other: object) -> bool:
        if isinstance(other, RecordStore) and self.folder == other.folder:  # a folder's name follows from its content
            return (self.files, self.sources) == (other.files, other.sources)
        return super().__eq__(other)

    __hash__ = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("entries", "_starts", "_file")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> RecordView: ...
    def __getitem__(self, place: int | slice) -> Record | RecordView:
        if isinstance(place, slice):
            return RecordView(self, np.arange(len(self))[place])
        count = len(self)
        i = place + count if place < 0 else place
        if not 0 <= i < count:
            raise IndexError(place)
        start, end = int(self._starts[i]), int(self._starts[i + 1]) if i + 1 < count else self._size
        line = os.pread(self._file.fileno(), end - start, start)
        if len(line) < end - start or not line.endswith(b"\n"):
            raise DataError(f"{self.folder / RECORDS}: was changed while it was used; run the same command again")
        return _from_line(line, self.files, self.sources)

    def origin(self, place: int) -> str:
        """Return where a record begins."""
        entry = self.entries[place]
        return origin_text(self.files[entry["file"]], entry["line"], entry["number"])


class RecordView(_Lazy):
    """Some records of a sequence, by their places in it."""

    def __init__(self, records: Sequence[Record], places: np.ndarray) -> None:
        self.records: Sequence[Record] = records
        self.places = places
        if isinstance(records, RecordView):
            self.records, self.places = records.records, records.places[places]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> RecordView: ...
    def __getitem__(self, place: int | slice) -> Record | RecordView:
        if isinstance(place, slice):
            return RecordView(self.records, self.places[place])
        return self.records[int(self.places[place])]

    def origin(self, place: int) -> str:
        """Return where a record begins."""
        return origin_of(self.records, int(self.places[place]))


def origin_of(records: Sequence[Record], place: int) -> str:
    """Return where one of some records begins, as `file:line`; read only where that is not known otherwise."""
    return records.origin(place) if isinstance(records, _Lazy) else records[place].origin


def entries_of(records: Sequence[Record]) -> tuple[RecordStore, np.ndarray] | None:
    """Return the store that records lie in, and what it knows of each; None when they lie in none."""
    base, places = (records.records, records.places) if isinstance(records, RecordView) else (records, slice(None))
    return (base, base.entries[places]) if isinstance(base, RecordStore) else None


def write_store(folder: Path, records: Iterable[tuple[int, Record]]) -> dict[str, Any]:
    """Write records, each with its file's number, into a folder; return what is to be known of them."""
    digest, start, rows = hashlib.sha256(), 0, 0
    categories: dict[str, int] = {}
    with ExitStack() as files:
        out, index = (files.enter_context((folder / n).open("wb", buffering=1 << 20)) for n in (RECORDS, INDEX))
        for number, record in records:
            line = _to_line(record, number)
            out.write(line)
            digest.update(line)
            category = categories.setdefault(record.category, len(categories))
            digests = prompt_digest(record), before_hash(record), answer_hash(record)
            index.write(_pack(start, record.line, record.number, number, category, *digests))
            start += len(line)
            rows += 1
    return {"jsonl_sha256": digest.hexdigest(), "rows": rows, "categories": list(categories)}


def prompt_digest(record: Record) -> bytes:
    """Return what tells prompts apart: rows with the same must not be both trained on and evaluated."""
    return hashlib.sha256(record.human.encode("utf-8", "surrogatepass")).digest()


def before_hash(record: Record) -> int:
    """Hash what stands before the last answer."""
    return _hash("\1".join([f"{m.role}\0{m.content}" for m in record.messages[:-1]]))


def answer_hash(record: Record) -> int:
    """Hash the last answer."""
    return _hash(record.messages[-1].content)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def message_dict(message: Message) -> dict[str, Any]:
    """Return a message in OpenAI's form, without what it has not."""
    made: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.weight is not None:
        made["weight"] = message.weight
    if message.reasoning is not None:
        made["reasoning_content"] = message.reasoning
    if message.tool_calls:
        made["tool_calls"] = list(message.tool_calls)
    if message.name is not None:
        made["name"] = message.name
    return made


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode


def json_line(value: object) -> bytes:
    """Return JSON and a line end."""
    try:
        return _encode(value).encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, in a column that is kept but not learned
        return json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"


def _to_line(record: Record, file: int) -> bytes:
    made: dict[str, Any] = {"messages": [message_dict(m) for m in record.messages], "category": record.category}
    if record.tools:
        made["tools"] = list(record.tools)
    if record.weight != 1.0:
        made["weight"] = record.weight
    if record.extra:
        made["extra"] = record.extra
    if record.number:
        made["number"] = record.number
    return json_line(made | {"line": record.line, "file": file})


_decode = json.JSONDecoder().decode


def _from_line(line: bytes, files: Sequence[str], sources: Sequence[str]) -> Record:
    row = _decode(line.decode("utf-8"))
    messages = [
        Message(m["role"], m["content"])
        if len(m) == 2
        else Message(
            m["role"],
            m["content"],
            m.get("weight"),
            m.get("reasoning_content"),
            tuple(m.get("tool_calls", ())),
            m.get("name"),
        )
        for m in row["messages"]
    ]
    number = row["file"]
    return Record(
        tuple(messages),
        row["category"],
        files[number],
        row["line"],
        row.get("extra", {}),
        tuple(row.get("tools", ())),
        row.get("weight", 1.0),
        sources[number],
        row.get("number", 0),
    )
