"""CSV and TSV to rows: every cell as it stands, each row with the line it begins at."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from sftx.data.files.blob import Blob
from sftx.data.files.problems import Problems
from sftx.data.files.text import Survey, open_text, text_lines
from sftx.errors import DataError

DELIMITERS = (",", ";", "\t", "|")
MAX_CELL = 1 << 27
"""Characters: an open quote would otherwise swallow the rest of any file into memory."""
MAX_HEADER = 1 << 20
MAX_FIRST_CELLS = 1000
"""Values of the first column that are kept, by which swallowed rows are recognised."""
_SEP = re.compile(r'"?sep=([^"\r\n\0])"?[\r\n]*', re.I)
_LINE_END = re.compile(r"\r\n|\r|\n")


def declared_delimiter(line: str) -> str | None:
    """Return the delimiter that a first line `sep=;` declares, as Excel reads and writes it."""
    found = _SEP.fullmatch(line)
    return found[1] if found else None


def find_delimiter(blob: Blob, encoding: str, wanted: str, known: Iterable[str]) -> str:
    """Return the delimiter given, that of a line `sep=`, or the one by which the header has most of the known names."""
    if wanted != "auto":
        mark = {"\\t": "\t", "tab": "\t"}.get(wanted, wanted)
        if len(mark) != 1 or mark in '"\r\n\0':
            raise DataError(f"{blob.path}: the delimiter {wanted!r} must be one character, not a quote or a newline")
        return mark
    with open_text(blob, encoding) as text:
        top = list(io.StringIO(text.read(MAX_HEADER).lstrip("\ufeff"), newline=""))
    if top and (declared := declared_delimiter(top[0])):
        return declared
    names = {name.casefold() for name in known}
    best, best_score = DELIMITERS[0], (0, 1)
    for mark in DELIMITERS:
        try:
            row = next((row for row in csv.reader(top, delimiter=mark, strict=True) if row), [])
        except csv.Error:
            continue  # a quote that one delimiter cannot read, another may
        score = (len({_bare(name).casefold() for name in row} & names), len(row))
        if score > best_score:
            best, best_score = mark, score
    return best


def csv_rows(blob: Blob, text: Survey, mark: str, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """Yield the header, then each row of as many cells, with the line where it begins.

    Columns at the end that have neither a name nor content are dropped, which is noted.

    Raises:
        DataError: a quote makes the rest unreadable.
    """
    # The limit is csv's own and for the whole process: raise it, never lower it.
    csv.field_size_limit(max(csv.field_size_limit(), min(text.characters, MAX_CELL) + 1))
    table, rows = _Table(mark, problems), 0
    with text_lines(blob, text.encoding) as lines:
        top = next(lines, "")
        above = declared_delimiter(top) is not None
        reader = csv.reader(lines if above else chain([top], lines), delimiter=mark, strict=True)
        while True:
            first = reader.line_num + above + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                # Where the next row begins is not known any more.
                problems.stop(first, _quote_problem(error, reader.line_num + above))
            if row is None:
                break
            if row and not table.names:
                table.header(first, row)
                yield first, table.names
            elif row:
                rows += 1
                cells = table.cells(first, reader.line_num + above, row)
                if cells is not None:
                    yield first, cells
    table.finish()
    if not rows:
        problems.file(table.line, "no rows: the file has only its header; add at least one row")


class _Table:
    """The header of a CSV file, and what is wrong with rows that do not fit it."""

    def __init__(self, mark: str, problems: Problems) -> None:
        self.line = 0
        self.names: list[str] = []
        self._mark, self._problems = mark, problems
        self._columns = 0
        """As many as the header has cells, with those at its end that have no name."""
        self._first_cells: set[str] = set()
        self._doubtful: list[int] = []

    def header(self, line: int, row: list[str]) -> None:
        """Take the header."""
        names = [_bare(name) for name in row]
        named = max((i for i, name in enumerate(names, 1) if name), default=len(names))
        self.line, self.names, self._columns = line, names[:named], len(names)

    def cells(self, first: int, last: int, row: list[str]) -> list[str] | None:
        """Return the cells of the named columns, or None with the problem noted."""
        width = len(self.names)
        if len(row) != width:
            if len(row) < width or len(row) > self._columns:
                self._problems.row(first, _ragged(len(row), width, self._mark, first, last))
                return None
            if any(row[width:]):
                place = next(i for i, cell in enumerate(row) if i >= width and cell) + 1
                self._problems.row(first, f"cell {place} is filled, its column has no name; name it or empty the cell")
                return None
            del row[width:]
        if _bare(row[0]) == self.names[0] and [_bare(name) for name in row] == self.names:
            self._problems.row(first, "the header again, as where files were joined; delete this row")
            return None
        if last > first and self._swallows(first, last, row):
            return None
        if len(self._first_cells) < MAX_FIRST_CELLS:
            self._first_cells.add(row[0])
        return row

    def _swallows(self, first: int, last: int, row: list[str]) -> bool:
        """Note a row whose every line has as many cells as the header: a stray quote may have swallowed rows."""
        text, marks = self._mark.join(row), len(self.names) - 1
        if text.count(self._mark) != marks * (last - first + 1):  # nearly always
            return False
        lines = _LINE_END.split(text)
        if any(line.count(self._mark) != marks for line in lines):
            return False
        begins = {line.split(self._mark)[0].strip(' "') for line in lines[1:]} - {""}
        if begins & {row[0], *self._first_cells}:
            self._problems.row(
                first,
                f"a cell runs to line {last}, and each of these lines has {len(self.names)} cells like the header: a "
                'quote swallowed rows; remove it, or write it twice ("") in a quoted cell',
            )
            return True
        if len(lines) > 2:
            self._doubtful.append(first)
        return False

    def finish(self) -> None:
        """Note what was dropped and what is doubtful."""
        empty = self._columns - len(self.names)
        if empty:
            self._problems.notes.append(f"dropped {empty} empty column{'s' * (empty > 1)} without a name at the end")
        if self._doubtful:
            self._problems.notes.append(
                f"{len(self._doubtful)} rows run over several lines that each have {len(self.names)} cells like the "
                f"header, the first at line {self._doubtful[0]}: look whether a stray quote has swallowed rows"
            )


def filled_down(
    header: int, names: Sequence[str], rows: Iterator[tuple[int, list[Any]]], columns: Sequence[str], problems: Problems
) -> Iterator[tuple[int, list[Any]]]:
    """Fill empty cells of some columns with the cell above, as merged cells of a spreadsheet need; it is noted.

    Raises:
        DataError: the header has no such column.
    """
    lowered = [name.casefold() for name in names]
    places = {column: lowered.index(column.casefold()) for column in columns if column.casefold() in lowered}
    for column in columns:
        if column not in places:
            problems.stop(header, f"data.fill_down: no column `{column}`; found {', '.join(f'`{n}`' for n in names)}")
    filled = dict.fromkeys(places, 0)
    above: dict[str, Any] = {}
    for line, row in rows:
        for column, place in places.items():
            if str(row[place]).strip():
                above[column] = row[place]
            elif column in above:
                row[place] = above[column]
                filled[column] += 1
        yield line, row
    for column, count in filled.items():
        problems.notes.append(f"filled {count} empty cells of `{column}` with the cell above (data.fill_down)")


def other_delimiter(names: Sequence[str], known: Iterable[str]) -> str | None:
    """Return what seems to stand between the names of a header that was read as one cell."""
    if len(names) != 1:
        return None
    wanted = {name.casefold() for name in known}
    marks = dict.fromkeys(c for c in names[0] if not c.isalnum() and c not in "_ \"'")
    return next((m for m in marks if len({_bare(n).casefold() for n in names[0].split(m)} & wanted) > 1), None)


def _bare(name: str) -> str:
    return name.strip().strip("\ufeff").strip()


def _quote_problem(error: csv.Error, line: int) -> str:
    if "unexpected end" in str(error):
        return "a quote opens in the row that begins here and is never closed; close it (no row after it was read)"
    if "field limit" in str(error):
        return f"a cell of the row that begins here is over {MAX_CELL:,} characters; close its quote or shorten it"
    where = f"a quote in the row that begins here closes before its cell ends (at line {line})"
    return f'{where}; inside a quoted cell write each quote twice (""), no row after it was read'


def _ragged(found: int, expected: int, mark: str, first: int, last: int) -> str:
    span = f" (the row runs to line {last})" if last > first else ""
    many = f"a cell that holds the delimiter {mark!r} must be quoted, an unquoted one splits it"
    few = f"add the missing cell, or close a quote that swallowed an unquoted delimiter {mark!r}"
    return f"{found} cells found, {expected} expected{span}; {many if found > expected else few}"
