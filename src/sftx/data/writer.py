"""Blocks to an Arrow file: its columns, and the one who writes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sftx.data.block import Block

SPAN = pa.struct([("start", pa.int32()), ("end", pa.int32()), ("weight", pa.float32())])
COLUMNS = [
    ("ids", pa.list_(pa.int32())),
    ("learned", pa.list_(SPAN)),
    ("category", pa.dictionary(pa.int32(), pa.string())),
    ("file", pa.int32()),
    ("line", pa.int64()),
    ("number", pa.int64()),
    ("record", pa.int64()),
    ("length", pa.int32()),
    ("full_length", pa.int32()),
    ("loss_weight", pa.float64()),
    ("supervised", pa.int32()),
]


@dataclass(frozen=True)
class Totals:
    """What is known of a store as a whole; `bytes` and `sha256` are the Arrow file's."""

    rows: int
    skipped: int
    truncated: int
    tokens: int
    supervised: int
    longest: int
    bytes: int
    sha256: str


class _Hashed:
    """A file that knows the hash and the size of what was written to it."""

    closed = False

    def __init__(self, path: Path) -> None:
        self._file, self.sha256, self.bytes = path.open("wb"), hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Write."""
        self.sha256.update(data)
        self.bytes += memoryview(data).nbytes
        return self._file.write(data)

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()

    def close(self) -> None:
        """Close."""
        self._file.close()
        self.closed = True


class StoreWriter:
    """Writes blocks, in the order they come, as `rows.arrow` and `skipped.jsonl` in a folder."""

    def __init__(self, folder: Path, key: str, files: Sequence[str]) -> None:
        self._schema = pa.schema(COLUMNS, metadata={"sftx": key})
        self._sink = _Hashed(folder / "rows.arrow")
        options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
        self._writer = pa.ipc.new_file(pa.PythonFile(self._sink, mode="w"), self._schema, options=options)
        self._skipped = (folder / "skipped.jsonl").open("w", encoding="utf-8", newline="\n")
        self._files = {name: i for i, name in enumerate(files)}
        self._categories: dict[str, int] = {}
        self._names = _strings([])
        self._sums = dict.fromkeys(("rows", "skipped", "truncated", "tokens", "supervised", "longest"), 0)
        self.first_skipped: str | None = None

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._skipped.close()
        self._sink.close()

    def add(self, block: Block) -> None:
        """Write one block."""
        for skip in block.skipped:
            self.first_skipped = self.first_skipped or str(skip)
            told = asdict(skip) | {"file": self._files[skip.file]}
            self._skipped.write(json.dumps(told, ensure_ascii=False) + "\n")
        sums = self._sums
        sums["skipped"] += len(block.skipped)
        if not len(block.lengths_R):
            return
        self._writer.write_batch(self._batch(block))
        sums["rows"] += len(block.lengths_R)
        sums["truncated"] += int((block.full_lengths_R > block.lengths_R).sum())
        sums["tokens"] += len(block.ids_N)
        sums["supervised"] += int(block.supervised_R.sum(dtype=np.int64))
        sums["longest"] = max(sums["longest"], int(block.full_lengths_R.max()))

    def finish(self) -> Totals:
        """Write the footer and return the sums."""
        self._writer.close()
        self.__exit__()
        return Totals(**self._sums, bytes=self._sink.bytes, sha256=self._sink.sha256.hexdigest())

    def _batch(self, block: Block) -> pa.RecordBatch:
        names, numbers_R = block.categories
        known = len(self._categories)
        place = np.array([self._categories.setdefault(n, len(self._categories)) for n in names], dtype=np.int32)
        if len(self._categories) > known:
            self._names = _strings(list(self._categories))
        files, file_numbers_R = block.files
        file_place = np.array([self._files[f] for f in files], dtype=np.int32)
        spans = pa.StructArray.from_arrays(
            [
                _array(block.starts_S, pa.int32()),
                _array(block.ends_S, pa.int32()),
                _array(block.weights_S, pa.float32()),
            ],
            fields=list(SPAN),
        )
        columns = [
            pa.ListArray.from_arrays(_offsets(block.lengths_R), _array(block.ids_N, pa.int32())),
            pa.ListArray.from_arrays(_offsets(block.spans_R), spans),
            pa.DictionaryArray.from_arrays(_array(place[numbers_R], pa.int32()), self._names),
            _array(file_place[file_numbers_R], pa.int32()),
            _array(block.lines_R, pa.int64()),
            _array(block.numbers_R, pa.int64()),
            _array(block.records_R, pa.int64()),
            _array(block.lengths_R, pa.int32()),
            _array(block.full_lengths_R, pa.int32()),
            _array(block.loss_weights_R, pa.float64()),
            _array(block.supervised_R, pa.int32()),
        ]
        return pa.record_batch(columns, schema=self._schema)


def _offsets(counts_R: np.ndarray) -> pa.Array:
    return _array(np.cumsum([0, *counts_R], dtype=np.int32), pa.int32())


def _array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Return numbers as Arrow holds them; `pa.array` and `to_numpy` would load pandas, where that is installed."""
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def _strings(values: Sequence[str]) -> pa.Array:
    encoded = [value.encode("utf-8") for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), len(encoded), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))])
