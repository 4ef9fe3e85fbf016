"""A corpus that is streamed, of files or from the hub: opened in order, row by row, without a copy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sftx.data.batches.streaming import Reader
from sftx.data.files.hub import hub_rows
from sftx.data.files.problems import Problems
from sftx.data.files.sources import Source
from sftx.data.files.tables import without_filled
from sftx.data.records.read import FileReader, How, described, sha256_file
from sftx.data.records.record import Record, origin_text
from sftx.data.records.schemas import RecordBuilder, UsedColumns, describe_columns

SAMPLE = 1000
"""The first records, which are looked at before training."""


@dataclass
class StreamedFiles:
    """What is streamed; what is detected of a file is known once its first row is read."""

    sources: Sequence[Source]
    how: How
    keep_columns: bool
    skip_bad_rows: bool
    limit: int | None = None
    """Records of a pass at most."""
    detected: dict[str, str | None] = field(default_factory=dict)
    """Format, encoding, delimiter and schema of the first file."""
    used: UsedColumns = field(default_factory=UsedColumns)
    """What became of its columns, as far as it is read."""
    notes: Sequence[str] = ()
    """What was left out or chosen while the first file was read, to be stated."""
    skipped_rows: int = 0  # they are reported with the steps

    @property
    def path(self) -> Path:
        """The file, or the folder of the first of them."""
        return self.sources[0].path if len(self.sources) == 1 else self.sources[0].path.parent

    @property
    def sha256(self) -> str:
        """A hash of the files' names and sizes: what is larger than a disk is not read twice to be hashed."""
        parts = [(s.name if s.hub else s.path.name, _size(s)) for s in self.sources]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def holds(self, path: Path, sha256: str) -> bool:
        """Return True if a file is one of these, whatever its name; only files of its size are read for that."""
        size = path.stat().st_size
        return any(not s.hub and _size(s) == size and sha256_file(s.path) == sha256 for s in self.sources)

    def facts(self) -> dict[str, object]:
        """Return the manifest's entry for the corpus."""
        files = [{"path": str(s.path), "bytes": _size(s)} for s in self.sources]
        return {"path": str(self.path), "streamed": True, "names_and_sizes_sha256": self.sha256, "files": files} | (
            self.detected | {"columns": self.columns}
        )

    @property
    def how_read(self) -> str:
        """What was detected of the first file, as it is logged."""
        return described(*(self.detected.get(name) for name in ("format", "encoding", "delimiter")))

    @property
    def columns(self) -> list[str]:
        """What became of the columns of the first file, as it is logged."""
        return [describe_columns(self.used.facts())]

    def reader(self) -> Reader:
        """Return what reads them from the beginning."""
        return Reader([partial(self._open, source) for source in self.sources], self.limit)

    def sample(self) -> list[Record]:
        """Return the first records.

        Raises:
            DataError: there is none, or one is invalid.
        """
        records: list[Record] = []
        for item in self.reader().records(0):
            if not isinstance(item, str):
                records.append(item)
            if len(records) == SAMPLE:
                break
        return records

    def skipped(self) -> Iterator[str]:
        """Yield what was left out before training: nothing."""
        return iter(())

    def _open(self, source: Source) -> Iterator[Record | str]:
        invalid: list[str] = []
        on_skip: Callable[[int, int, str], None] | None = None
        if self.skip_bad_rows:
            on_skip = lambda line, n, why: invalid.append(f"{origin_text(source.path, line, n)}: {why}")  # noqa: E731
        reader: FileReader | HubReader
        if source.hub:
            reader = HubReader(source, self.how, keep_columns=self.keep_columns, on_skip=on_skip)
        else:
            reader = FileReader(
                source.path, self.how, keep_columns=self.keep_columns, source=source.name, on_skip=on_skip
            )
        for record in reader:
            if not self.detected:
                self.detected, self.used, self.notes = _detected(reader), reader.used, reader.notes
            yield from invalid
            invalid.clear()
            yield record
        yield from invalid


class HubReader:
    """Reads a hub dataset as a FileReader reads a file; its lines are the numbers of its rows, from 1."""

    format, encoding, delimiter = "hub", None, None

    def __init__(
        self, source: Source, how: How, *, keep_columns: bool, on_skip: Callable[[int, int, str], None] | None
    ) -> None:
        self.schema: str | None = None
        self._source = source
        self._problems = Problems(source.path, on_skip)
        self.notes = self._problems.notes
        self._builder = RecordBuilder(
            self._problems, source=source.name, schema=how.schema, columns=how.columns, keep=keep_columns, kind="column"
        )
        self.used = self._builder.used

    def __iter__(self) -> Iterator[Record]:
        name = self._source.path.as_posix()
        for number, row in enumerate(map(without_filled, hub_rows(name, f"train_file_name={name}")), 1):
            if number == 1:
                self._builder.header(list(row), 1)
                self.schema = self._builder.schema
            record = self._builder.record(number, row)
            self._problems.check(number - 1)  # the rest of what may have no end is not read for its problems
            if record is not None:
                yield record


def _size(source: Source) -> int | None:
    return None if source.hub else source.path.stat().st_size


def _detected(reader: FileReader | HubReader) -> dict[str, Any]:
    return {name: getattr(reader, name) for name in ("format", "encoding", "delimiter", "schema")}
