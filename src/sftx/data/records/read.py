"""One file to exact records, or one `DataError` that lists what is wrong and where.

Nothing is repaired: no cell is stripped, no text becomes a null, no byte becomes a replacement
character. What had to be detected (encoding, delimiter, format, schema) is handed back to be logged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sftx.data.files.blob import COMPRESSIONS, Blob, sha256_file
from sftx.data.files.csvtext import csv_rows, filled_down, find_delimiter, other_delimiter
from sftx.data.files.jsontext import is_jsonl, json_rows, jsonl_rows
from sftx.data.files.problems import MAX_LISTED, Problems
from sftx.data.files.tables import open_table
from sftx.data.files.text import Survey, survey, text_lines
from sftx.data.files.workbook import open_workbook
from sftx.data.records.record import Record
from sftx.data.records.schemas import RecordBuilder, SchemaName, UsedColumns, check_columns, known_names
from sftx.errors import DataError

__all__ = ["FORMATS", "MAX_LISTED", "FileReader", "Format", "How", "Reading", "is_known", "read_file", "sha256_file"]

Format = Literal["auto", "csv", "jsonl", "json", "parquet", "arrow", "xlsx"]
FORMATS = {
    ".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow",
    ".xlsx": "xlsx", ".xlsm": "xlsx",
}  # fmt: skip
OTHERS = {
    ".txt": "plain text has no questions and answers; for CSV or JSONL set data.format=csv or data.format=jsonl",
    ".xls": "an old Excel workbook; save it as .xlsx or as CSV in UTF-8",
    ".ods": "an OpenDocument table; save it as .xlsx or as CSV in UTF-8",
    ".ndjson": "JSONL by another name; set data.format=jsonl",
    ".pkl": "a Python pickle can run code when it is opened; save it as JSONL or Parquet",
}
"""What to do with files that people have and that are not read."""
NUL = "a NUL character; the file is damaged or binary, export it again"


@dataclass(frozen=True)
class How:
    """How a file is read; what is `auto` is detected."""

    format: Format = "auto"
    encoding: str = "auto"
    delimiter: str = "auto"
    schema: SchemaName = "auto"
    columns: dict[str, str | None] = field(default_factory=dict)
    fill_down: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """The records of one file and what was detected about it."""

    records: list[Record]
    encoding: str | None
    delimiter: str | None
    format: str
    schema: str | None


def suffixes(path: Path) -> tuple[str, str | None]:
    """Return a file's suffix and its compression."""
    last = path.suffix.lower()
    if last in COMPRESSIONS:
        return Path(path.stem).suffix.lower(), COMPRESSIONS[last]
    return last, None


def is_known(path: Path) -> bool:
    """Return True if a file's suffix names a format."""
    return suffixes(path)[0] in FORMATS


def source_name(path: Path) -> str:
    """Return a file's name without the suffixes that say its format."""
    name = Path(path.stem) if path.suffix.lower() in COMPRESSIONS else path
    return name.stem


class FileReader:
    """Reads one file's records in bounded memory; what is detected is known once they are read.

    `on_skip` gets each row that is not valid, as line, record number (see `Record.number`) and reason;
    without it any such row, and always what concerns the whole file, raises one DataError at the end.
    """

    def __init__(
        self,
        path: Path,
        how: How | None = None,
        *,
        keep_columns: bool = True,
        source: str | None = None,
        on_skip: Callable[[int, int, str], None] | None = None,
    ) -> None:
        self.path, self._how, self._keep = Path(path), how or How(), keep_columns
        self._source = source_name(self.path) if source is None else source
        self._problems = Problems(self.path, on_skip)
        self.format, compression = _format(self.path, self._how.format)
        self._blob = Blob(self.path, compression)
        self._skips = on_skip is not None
        self.encoding: str | None = None
        self.delimiter: str | None = None
        self.schema: str | None = None
        self.used = UsedColumns()
        """What became of its columns, as far as its rows are read."""
        check_columns(self._how.schema, self._how.columns)
        if self._how.fill_down and self.format not in ("csv", "xlsx"):
            raise DataError(f"{self.path}: data.fill_down is for CSV and workbooks, this is {self.format}")

    @property
    def notes(self) -> list[str]:
        """What was left out or chosen, to be stated."""
        return self._problems.notes

    def __iter__(self) -> Iterator[Record]:
        count = 0
        readers = {"parquet": self._table, "arrow": self._table, "xlsx": self._workbook}
        for record in readers.get(self.format, self._text)():
            count += 1
            if not self._problems.count:  # else only the problems are still wanted
                yield record
        self._problems.check(count)
        if not count:
            raise DataError(f"{self.path}: no row is valid: all were skipped; read it with data.on_bad_rows=error")

    def _builder(self, kind: str) -> RecordBuilder:
        how = self._how
        builder = RecordBuilder(
            self._problems, source=self._source, schema=how.schema, columns=how.columns, keep=self._keep, kind=kind
        )
        self.used = builder.used
        return builder

    def _text(self) -> Iterator[Record]:
        how, only = self._how, {"jsonl": "JSONL", "json": "JSON"}.get(self.format)
        text = survey(self._blob, how.encoding, utf8_only=only, names=known_names(how.columns))
        self.encoding = text.encoding
        if text.blank:
            size = sum(map(len, self._blob.chunks()))
            found = "it has only blank lines" if text.characters else f"{size} bytes"
            raise DataError(
                f"{self.path}: the file is empty ({found}); it needs category, human, assistant and at least one row"
            )
        if text.nul:
            with text_lines(self._blob, text.encoding) as lines:
                for number, line in enumerate(lines, 1):
                    if "\0" in line:
                        self._problems.file(number, NUL)
        if self.format == "csv":
            yield from self._csv(text)
            return
        if self.format == "json" and how.format == "auto":
            self.format = "jsonl" if is_jsonl(self._blob, text.encoding, known_names(how.columns)) else "json"
        rows = jsonl_rows if self.format == "jsonl" else json_rows
        yield from self._records(self._builder("key"), rows(self._blob, text.encoding, self._problems))

    def _csv(self, text: Survey) -> Iterator[Record]:
        mark = find_delimiter(self._blob, text.encoding, self._how.delimiter, known_names(self._how.columns))
        self.delimiter = mark
        rows = csv_rows(self._blob, text, mark, self._problems)
        line, names = next(rows)
        other = other_delimiter(names, known_names(self._how.columns))
        if other:
            one = f"the header is one cell, `{names[0]}`, with the delimiter {mark!r}"
            self._problems.stop(line, f"{one}; set data.delimiter={other!r}")
        if text.nul:  # a problem of the file, noted above: it is not noted again for the row
            rows = ((line, [cell.replace("\0", "?") for cell in row]) for line, row in rows)
        yield from self._cells(line, names, rows, f"; the delimiter is {mark!r}")

    def _cells(self, line: int, names: list[str], rows: Iterator[tuple[int, list[Any]]], hint: str) -> Iterator[Record]:
        """Yield the records of rows of cells under a header."""
        builder = self._builder("column")
        builder.header(names, line, hint)
        self.schema = builder.schema
        if self._how.fill_down:
            rows = filled_down(line, names, rows, self._how.fill_down, self._problems)
        for number, cells in rows:
            record = builder.record(number, dict(zip(names, cells, strict=True)))
            if record is not None:
                yield record

    def _workbook(self) -> Iterator[Record]:
        with open_workbook(self._blob, self._problems) as rows:
            header = next(rows, None)
            if header is not None:
                yield from self._cells(*header, rows, "")

    def _table(self) -> Iterator[Record]:
        with open_table(self._blob, self.format) as (names, rows):
            builder = self._builder("column")
            builder.header(names, 1)
            first = None
            for first in self._records(builder, enumerate(rows, 1)):
                yield first
            if first is None and not self._problems.count and not self._skips:
                self._problems.file(1, "no rows: the file has only its columns; add at least one row")

    def _records(self, builder: RecordBuilder, rows: Iterator[tuple[int, object]]) -> Iterator[Record]:
        for line, row in rows:
            record = builder.record(line, row)
            if record is not None:
                self.schema = builder.schema
                yield replace(record, number=self._problems.record) if self._problems.record else record


def _format(path: Path, wanted: str) -> tuple[str, str | None]:
    suffix, compression = suffixes(path)
    kind = FORMATS.get(suffix) if wanted == "auto" else wanted
    if kind is None:
        known = f"use one of {', '.join(FORMATS)} (each also .gz or .zst)"
        if suffix in OTHERS:
            raise DataError(f"{path}: {OTHERS[suffix]}")
        raise DataError(f"{path}: the suffix `{suffix}` is not known; {known}")
    if kind not in FORMATS.values():
        raise DataError(f"{path}: format `{wanted}` is not known; use auto, csv, jsonl, json, parquet, arrow or xlsx")
    return kind, compression


def read_file(path: Path, **how: object) -> Reading:
    """Read all records of a file exactly; takes the settings of `How`.

    Raises DataError when the file, its format or its encoding is not known, or any row is invalid.
    """
    reader = FileReader(path, How(**how))  # type: ignore[arg-type]
    records = list(reader)
    return Reading(records, reader.encoding, reader.delimiter, reader.format, reader.schema)


def described(form: str | None, encoding: str | None, delimiter: str | None) -> str:
    """Say how a file is read: csv, utf-8, `,`."""
    mark = f"`{delimiter}`" if delimiter else None
    return ", ".join(part for part in (form, encoding, mark) if part)
