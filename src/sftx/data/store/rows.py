"""Rows on disk and in memory: one Arrow file, mapped; a row is made when it is requested.

What a plan needs of every row (lengths, weights, categories) is at hand as arrays; of a corpus of any
size only those, and the pages that are being read, lie in memory.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from sftx.data.encode.policy import EncodePolicy
from sftx.data.encode.row import Row
from sftx.data.encode.template import ChatTemplate
from sftx.data.records.record import Record
from sftx.data.store.arrow import column, numbers
from sftx.data.store.cache import SKIPPED, Names, entry_folder, open_entry
from sftx.data.store.record_store import categories_of, origin_of
from sftx.data.store.token_store import ROWS, to_batch, token_key, write_rows
from sftx.errors import DataError

KINDS = {
    "length": np.int32,
    "full_length": np.int32,
    "supervised": np.int32,
    "record": np.int64,
    "loss_weight": np.float64,
}
"""The columns that are known of every row."""


@dataclass(frozen=True)
class Skipped:
    """A record that gave no row: its index in the corpus, where it begins, and why."""

    record: int
    origin: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


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
    """Each row's index in `categories`; int32."""
    records: np.ndarray
    """The index in the corpus of the record each row came from, never falling; int64."""

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
        """The indices of the rows that lost tokens."""
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

    def __init__(self, rows: Sequence[Row], records: Sequence[int] | None = None) -> None:
        self._rows = list(rows)
        batch = to_batch(self._rows, range(len(rows)) if records is None else records)
        _set_columns(self, {name: [batch.column(name)] for name in KINDS})
        names: dict[str, int] = {}
        self.category_numbers = np.array([names.setdefault(row.category, len(names)) for row in rows], np.int32)
        self.categories = list(names)

    def row(self, index: int) -> Row:
        """Return a row."""
        return self._rows[index]

    def origin(self, index: int) -> str:
        """Return where the record of a row begins."""
        return self._rows[index].origin

    @property
    def skipped(self) -> list[Skipped]:
        """None: the rows were chosen."""
        return []


class TokenRows(Rows):
    """The rows in a folder that `write_rows` filled, and the records they were made of."""

    def __init__(self, folder: Path, records: Sequence[Record]) -> None:
        self.folder, self._corpus = folder, records
        self._open()

    def _open(self) -> None:
        path = self.folder / ROWS
        try:
            self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        self._first_rows = np.cumsum([0, *(len(chunk) for chunk in self._table["ids"].chunks)])
        _set_columns(self, {name: self._table[name].chunks for name in KINDS})
        numbers_of_records, self.categories = categories_of(self._corpus)
        self.category_numbers = numbers_of_records[self.records]

    def __getstate__(self) -> tuple[Path, Sequence[Record]]:
        return self.folder, self._corpus

    def __setstate__(self, state: tuple[Path, Sequence[Record]]) -> None:
        self.folder, self._corpus = state
        self._open()

    def row(self, index: int) -> Row:
        """Make a row."""
        number = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        at = index - int(self._first_rows[number])
        ids, spans = (self._table[name].chunk(number)[at].values for name in ("ids", "supervised_spans"))
        ids_T = numbers(ids, np.int32).copy()  # the file cannot be written to
        weights_T = np.zeros(len(ids_T), dtype=np.float32)
        kinds = (np.int32, np.int32, np.float32)
        for start, end, weight in zip(*(numbers(spans.field(i), kinds[i]) for i in range(3)), strict=True):
            weights_T[start:end] = weight
        category = self.categories[self.category_numbers[index]]
        return Row(ids_T, weights_T, category, self.origin(index), int(self.full_lengths[index]))

    def origin(self, index: int) -> str:
        """Return where the record of a row begins."""
        return origin_of(self._corpus, int(self.records[index]))

    @property
    def skipped(self) -> list[Skipped]:
        """The records that gave no row, and why; read anew each time."""
        lines = (self.folder / SKIPPED).read_text(encoding="utf-8").split("\n")[:-1]
        return [Skipped(index, origin_of(self._corpus, index), reason) for index, reason in map(json.loads, lines)]


def open_rows(
    corpus: str,
    records: Sequence[Record],
    template: ChatTemplate,
    policy: EncodePolicy,
    *,
    workers: int | None = None,
    names: Names | None = None,
) -> TokenRows:
    """Return the rows of the first records of a corpus, tokenising it when no process has done so before.

    Args:
        corpus: the key of the corpus: records of the same key are the same.

    Raises:
        DataError: no record can be trained on, or the policy refuses one.
        SftxError: a process that tokenises was ended; or the cache cannot be written.
    """

    def fill(into: Path) -> dict[str, Any]:
        from sftx.data.store.tokenise import encode_blocks

        with closing(encode_blocks(records, template, policy, workers)) as blocks:
            facts = write_rows(into, blocks)
        if len(records) and not facts["rows"]:
            index, reason = json.loads((into / SKIPPED).read_text(encoding="utf-8").partition("\n")[0])
            raise DataError(
                f"no row can be trained on. The first of {len(records)}: {origin_of(records, index)}: {reason}"
            )
        return facts

    key = token_key(corpus, len(records), template, policy)
    open_entry(key, fill, names or Names())
    return TokenRows(entry_folder(key), records)


def _set_columns(rows: Rows, columns: Mapping[str, Sequence[pa.Array]]) -> None:
    """Give rows what is known of all of them."""
    rows.lengths, rows.full_lengths, rows.supervised, rows.records, rows.loss_weights = (
        column(columns[name], kind) for name, kind in KINDS.items()
    )
