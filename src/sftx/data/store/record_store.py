"""Records on disk: an Arrow file of JSON lines, of which only those asked for are ever in memory."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from sftx.data.records.record import Message, Record, origin_text
from sftx.data.store.arrow import column, to_arrow, to_binary
from sftx.errors import DataError

RECORDS, INDEX = "records.arrow", "index.arrow"
TEXT = pa.schema([("record", pa.binary())])
"""A record as a line of JSON."""
SCHEMA = pa.schema(
    [
        ("line", pa.int64()),
        ("number", pa.int64()),
        ("file", pa.int32()),
        ("category", pa.int32()),
        ("prompt", pa.binary(32)),
        ("before", pa.uint64()),
        ("answer", pa.uint64()),
    ]
)
"""What is known of a record without reading it: where it came from, the numbers of its file and its category, and the
digests by which it is held out (`prompt_digest`) and compared (`before_hash`, `answer_hash`)."""
DTYPES = {"line": "i8", "number": "i8", "file": "i4", "category": "i4", "prompt": "V32", "before": "u8", "answer": "u8"}
BATCH_BYTES = 1 << 20
"""Text of a batch: the least that is read of the file."""


class _Lazy(Sequence[Record]):
    """Records that are read one at a time, equal to any sequence of equal records."""

    @abstractmethod
    def origin(self, index: int) -> str:
        """Return where a record begins, as `file:line`, without reading it."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class RecordStore(_Lazy):
    """The records of a folder that `write_records` filled; `files` and `sources` say what their numbers mean."""

    def __init__(self, folder: Path, files: Sequence[str], sources: Sequence[str], categories: Sequence[str]) -> None:
        self.folder, self.files, self.sources = folder, tuple(files), tuple(sources)
        self.categories = tuple(categories)
        self._open()

    @property
    def path(self) -> Path:
        """The file of the records' texts."""
        return self.folder / RECORDS

    def _open(self) -> None:
        # Read at an offset, not mapped: where a mapped file is cut short the kernel kills the process.
        self._reader = pa.ipc.open_file(pa.OSFile(str(self.path)))
        self._batches: dict[int, pa.BinaryArray] = {}
        lengths = [len(chunk) for chunk in self._chunks("line")]
        self._first = np.cumsum([0, *lengths])

    @property
    def key(self) -> str:
        """What follows from the records and where they lie in their files."""
        return self.folder.name

    def __eq__(self, other: object) -> bool:
        if isinstance(other, RecordStore) and self.key == other.key:
            return (self.files, self.sources) == (other.files, other.sources)
        return super().__eq__(other)

    __hash__ = None

    def __getstate__(self) -> tuple[Any, ...]:
        return self.folder, self.files, self.sources, self.categories

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __len__(self) -> int:
        return int(self._first[-1])

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> RecordView: ...
    def __getitem__(self, index: int | slice) -> Record | RecordView:
        if isinstance(index, slice):
            return RecordView(self, np.arange(len(self))[index])
        i = index + len(self) if index < 0 else index
        if not 0 <= i < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._first, i, side="right")) - 1
        return _from_line(self._batch(number)[i - int(self._first[number])].as_py(), self.files, self.sources)

    def column(self, name: str) -> np.ndarray:
        """Return what is known of every record without reading one: a column of `SCHEMA`."""
        return column(self._chunks(name), DTYPES[name])

    def origin(self, index: int) -> str:
        """Return where a record begins."""
        lines, numbers_in_lines, files = self._origins
        return origin_text(self.files[files[index]], lines[index], numbers_in_lines[index])

    @cached_property
    def _origins(self) -> tuple[np.ndarray, ...]:
        return tuple(self.column(name) for name in ("line", "number", "file"))

    def _batch(self, number: int) -> pa.BinaryArray:
        if number not in self._batches:
            self._batches.clear()
            with self._explained():
                self._batches[number] = self._reader.get_batch(number).column("record")
        return self._batches[number]

    def _chunks(self, name: str) -> list[pa.Array]:
        options = pa.ipc.IpcReadOptions(included_fields=[SCHEMA.get_field_index(name)])
        with self._explained(), pa.OSFile(str(self.folder / INDEX)) as file:
            return pa.ipc.open_file(file, options=options).read_all().column(name).chunks

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.path}: was changed while it was used; run the same command again") from error


class RecordView(_Lazy):
    """Some records of a sequence, by their indices in it."""

    def __init__(self, records: Sequence[Record], indices: np.ndarray) -> None:
        self.records: Sequence[Record] = records
        self.indices = indices
        if isinstance(records, RecordView):
            self.records, self.indices = records.records, records.indices[indices]

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> RecordView: ...
    def __getitem__(self, index: int | slice) -> Record | RecordView:
        if isinstance(index, slice):
            return RecordView(self.records, self.indices[index])
        return self.records[int(self.indices[index])]

    def origin(self, index: int) -> str:
        """Return where a record begins."""
        return origin_of(self.records, int(self.indices[index]))


def origin_of(records: Sequence[Record], index: int) -> str:
    """Return where one of some records begins, as `file:line`; read only where that is not known otherwise."""
    return records.origin(index) if isinstance(records, _Lazy) else records[index].origin


def stored(records: Sequence[Record]) -> tuple[RecordStore, np.ndarray | slice] | None:
    """Return the store that records lie in, and their indices in it; None when they lie in none."""
    base, indices = (records.records, records.indices) if isinstance(records, RecordView) else (records, slice(None))
    return (base, indices) if isinstance(base, RecordStore) else None


def categories_of(records: Sequence[Record]) -> tuple[np.ndarray, list[str]]:
    """Return the number of each record's category, and the categories' names."""
    if found := stored(records):
        store, indices = found
        return store.column("category")[indices], list(store.categories)
    names: dict[str, int] = {}
    return np.array([names.setdefault(r.category, len(names)) for r in records], np.int32), list(names)


def write_records(folder: Path, records: Iterable[tuple[int, Record]]) -> dict[str, Any]:
    """Write records, each with its file's number, into a folder; return what is to be known of them."""
    rows, size = 0, 0
    categories: dict[str, int] = {}
    lines: list[bytes] = []
    known: list[tuple[Any, ...]] = []
    with _writing(folder / RECORDS, TEXT) as texts, _writing(folder / INDEX, SCHEMA) as known_of:
        for number, record in records:
            line = _to_line(record, number)
            category = categories.setdefault(record.category, len(categories))
            digests = prompt_digest(record), before_hash(record), answer_hash(record)
            lines.append(line)
            known.append((record.line, record.number, number, category, *digests))
            rows, size = rows + 1, size + len(line)
            if size >= BATCH_BYTES:
                _write_batch(texts, known_of, lines, known)
                lines, known, size = [], [], 0
        if lines:
            _write_batch(texts, known_of, lines, known)
    return {"rows": rows, "categories": list(categories)}


@contextmanager
def _writing(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatchWriter]:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        yield writer


def _write_batch(
    texts: pa.RecordBatchWriter, known_of: pa.RecordBatchWriter, lines: list[bytes], known: list[tuple[Any, ...]]
) -> None:
    texts.write_batch(pa.record_batch([to_binary(lines)], schema=TEXT))
    columns = [
        to_arrow(np.array(values, dtype), field.type)
        for values, dtype, field in zip(zip(*known, strict=True), DTYPES.values(), SCHEMA, strict=True)
    ]
    known_of.write_batch(pa.record_batch(columns, schema=SCHEMA))


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
    except UnicodeEncodeError:  # half a surrogate pair, in a column that is kept but not trained on
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
