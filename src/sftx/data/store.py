"""Rows on disk and in memory: one Arrow file, mapped; a row is made when it is asked for.

What a plan needs of every row (lengths, weights, categories) is at hand as arrays; of a corpus of any
size only those, and the pages that are being read, lie in memory.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa

from sftx.data.block import Origin, Skipped, to_block
from sftx.data.record import origin_text
from sftx.data.rows import Row
from sftx.data.writer import COLUMNS, Totals
from sftx.errors import DataError

OPEN_BATCHES = 4096
"""So many record batches of a file are kept unwrapped; each is some twenty small Python objects."""


class Rows(Sequence[Row]):
    """The rows of a corpus, with what is to be known of all of them without making one."""

    lengths: np.ndarray
    """Tokens of each row; int32."""
    full_lengths: np.ndarray
    """Tokens of each row before truncation; int32."""
    loss_weights: np.ndarray
    """The sum of the weights of each row's tokens that carry loss; float64."""
    supervised: np.ndarray
    """How many tokens of each row carry loss; int32."""
    categories: list[str]
    """The categories' names."""
    category_numbers: np.ndarray
    """Each row's place in `categories`; int32."""
    records: np.ndarray
    """The place in the corpus of the record each row came from, never falling; int64."""

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, item: int) -> Row: ...
    @overload
    def __getitem__(self, item: slice) -> Rows: ...
    def __getitem__(self, item: int | slice) -> Row | Rows:
        if isinstance(item, slice):
            return self.select(np.arange(len(self))[item])
        at = int(item) + len(self) * (item < 0)
        if not 0 <= at < len(self):
            raise IndexError(f"row {item} of {len(self)}")
        return self.row(at)

    @abstractmethod
    def row(self, index: int) -> Row:
        """Make the row at `index`, which is one of them."""

    @abstractmethod
    def origin(self, index: int) -> str:
        """Return where the record of a row begins, as `file:line`."""

    @property
    @abstractmethod
    def skipped(self) -> list[Skipped]:
        """The records that gave no row, and why."""

    @property
    def truncated(self) -> np.ndarray:
        """The places of the rows that lost tokens."""
        return np.flatnonzero(self.full_lengths > self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.lengths.sum(dtype=np.int64))

    def select(self, indices: np.ndarray) -> Rows:
        """Return some of the rows, in the order given."""
        return SelectedRows(self, np.asarray(indices, dtype=np.int64), None)

    def of_records(self, records: Sequence[int] | np.ndarray) -> Rows:
        """Return the rows of some records of the corpus, in the corpus's order, as if there were no others."""
        wanted = np.asarray(records, dtype=np.int64)
        wanted = wanted if rises(wanted) else np.unique(wanted)
        return SelectedRows(self, np.flatnonzero(np.isin(self.records, wanted)), wanted)


def rises(numbers: np.ndarray) -> bool:
    """True when each number is greater than the one before, so that all are different; `np.unique` takes seconds."""
    return bool((numbers[1:] > numbers[:-1]).all())


class SelectedRows(Rows):
    """Some rows of others."""

    def __init__(self, base: Rows, indices: np.ndarray, records: np.ndarray | None) -> None:
        self.base, self.indices, self._of = base, indices, records
        self.lengths, self.full_lengths = base.lengths[indices], base.full_lengths[indices]
        self.loss_weights, self.supervised = base.loss_weights[indices], base.supervised[indices]
        self.categories, self.category_numbers = base.categories, base.category_numbers[indices]
        self.records = base.records[indices]

    def row(self, index: int) -> Row:
        """Make a row."""
        return self.base.row(int(self.indices[index]))

    def origin(self, index: int) -> str:
        """Return where the record of a row begins."""
        return self.base.origin(int(self.indices[index]))

    @property
    def skipped(self) -> list[Skipped]:
        """Of the chosen records, those that gave no row; none when rows were chosen."""
        chosen = set() if self._of is None else set(self._of.tolist())
        return [s for s in self.base.skipped if s.record in chosen]


class MemoryRows(Rows):
    """A list of rows in memory."""

    def __init__(
        self, rows: Sequence[Row], skipped: Sequence[Skipped] = (), records: Sequence[int] | None = None
    ) -> None:
        self._rows, self._skipped = list(rows), list(skipped)
        numbers = list(range(len(rows)) if records is None else records)
        block = to_block(self._rows, [Origin(n, "", 0) for n in numbers], [])
        self.lengths, self.full_lengths = block.lengths_R, block.full_lengths_R
        self.loss_weights, self.supervised = block.loss_weights_R, block.supervised_R
        self.categories, self.category_numbers = block.categories
        self.records = block.records_R

    def row(self, index: int) -> Row:
        """Return a row."""
        return self._rows[index]

    def origin(self, index: int) -> str:
        """Return where the record of a row begins."""
        return self._rows[index].origin

    @property
    def skipped(self) -> list[Skipped]:
        """The records that gave no row, and why."""
        return self._skipped


@dataclass(frozen=True)
class _Batch:
    """The arrays of one record batch; they lie in the mapped file."""

    ids_N: np.ndarray
    offsets_R: np.ndarray
    starts_S: np.ndarray
    ends_S: np.ndarray
    weights_S: np.ndarray
    span_offsets_R: np.ndarray


class TokenRows(Rows):
    """The rows in a folder that a StoreWriter filled; `files` are the corpus's, as they are called now.

    Errors:
        DataError: the file is not the one that was written there, or not all of it.
    """

    def __init__(self, folder: Path, key: str, files: Sequence[str], totals: Totals) -> None:
        self.folder, self.key, self.files, self.totals = folder, key, list(files), totals
        self._open()

    def _open(self) -> None:
        path = self.folder / "rows.arrow"
        try:
            if path.stat().st_size != self.totals.bytes:
                raise DataError(f"{path}: is {path.stat().st_size} bytes long, was {self.totals.bytes}.")
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        marked = (table.schema.metadata or {}).get(b"sftx", b"").decode("utf-8", "replace")
        if marked != self.key or not table.schema.equals(pa.schema(COLUMNS)) or table.num_rows != self.totals.rows:
            raise DataError(f"{path}: holds other rows (expected key {self.key}, got {marked or 'none'}).")
        self._table = table
        self._batches: dict[int, _Batch] = {}
        self._first_rows = np.cumsum([0, *(len(c) for c in table["ids"].chunks)])
        self.lengths, self.full_lengths, self.supervised, self._file = (
            _column(table, name, np.int32) for name in ("length", "full_length", "supervised", "file")
        )
        self.records, self._line, self._number = (
            _column(table, name, np.int64) for name in ("record", "line", "number")
        )
        self.loss_weights = _column(table, "loss_weight", np.float64)
        chunks = table["category"].chunks
        self.categories = max((c.dictionary for c in chunks), key=len).to_pylist() if chunks else []
        self.category_numbers = np.concatenate(
            [np.zeros(0, np.int32), *(_numbers(c.indices, np.int32) for c in chunks)]
        )

    def __getstate__(self) -> tuple[Path, str, list[str], Totals]:
        return self.folder, self.key, self.files, self.totals

    def __setstate__(self, state: tuple[Path, str, list[str], Totals]) -> None:
        self.folder, self.key, self.files, self.totals = state
        self._open()

    def row(self, index: int) -> Row:
        """Make a row."""
        number = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        batch, at = self._batch(number), index - int(self._first_rows[number])
        ids_T = batch.ids_N[batch.offsets_R[at] : batch.offsets_R[at + 1]].copy()  # the file cannot be written to
        weights_T = np.zeros(len(ids_T), dtype=np.float32)
        for s in range(batch.span_offsets_R[at], batch.span_offsets_R[at + 1]):
            weights_T[batch.starts_S[s] : batch.ends_S[s]] = batch.weights_S[s]
        category = self.categories[self.category_numbers[index]]
        return Row(ids_T, weights_T, category, self.origin(index), int(self.full_lengths[index]))

    def origin(self, index: int) -> str:
        """Return where the record of a row begins."""
        return origin_text(self.files[self._file[index]], self._line[index], self._number[index])

    @property
    def skipped(self) -> list[Skipped]:
        """The records that gave no row, and why; read anew each time."""
        lines = (self.folder / "skipped.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        told = [json.loads(line) for line in lines]
        return [Skipped(**t | {"file": self.files[t["file"]]}) for t in told]

    def verify(self) -> None:
        """Compare every byte with what was written.

        Errors:
            DataError: they differ.
        """
        with (self.folder / "rows.arrow").open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.totals.sha256:
            raise DataError(
                f"{self.folder / 'rows.arrow'}: is damaged (its hash is not the one written). "
                f"Remove it: sftx data cache rm {self.key[:12]}"
            )

    def _batch(self, number: int) -> _Batch:
        batch = self._batches.get(number)
        if batch is None:
            if len(self._batches) >= OPEN_BATCHES:
                self._batches.clear()
            ids, learned = self._table["ids"].chunk(number), self._table["learned"].chunk(number)
            start, end, weight = (learned.values.field(i) for i in range(3))
            batch = _Batch(
                ids_N=_numbers(ids.values, np.int32),
                offsets_R=_numbers(ids.offsets, np.int32),
                starts_S=_numbers(start, np.int32),
                ends_S=_numbers(end, np.int32),
                weights_S=_numbers(weight, np.float32),
                span_offsets_R=_numbers(learned.offsets, np.int32),
            )
            self._batches[number] = batch
        return batch


def _numbers(array: pa.Array, dtype: type) -> np.ndarray:
    """Return the numbers that an Arrow array holds, where they lie."""
    data = array.buffers()[1]
    if data is None or not len(array):
        return np.zeros(0, dtype)
    return np.frombuffer(data, dtype, len(array), array.offset * np.dtype(dtype).itemsize)


def _column(table: pa.Table, name: str, dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(_numbers(chunk, dtype) for chunk in table[name].chunks)])
