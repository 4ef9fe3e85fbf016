"""CSV and TSV to rows: every cell as it stands, each row with the line it begins at."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence

from sftx.data.blob import Blob
from sftx.data.problems import Problems
from sftx.data.text import Survey, open_text, text_lines
from sftx.errors import DataError

DELIMITERS = (",", ";", "\t", "|")
MAX_CELL = 1 << 27
"""Characters: an open quote would otherwise swallow the rest of any file into memory."""
MAX_HEADER = 1 << 20


def find_delimiter(blob: Blob, encoding: str, wanted: str, known: Iterable[str]) -> str:
    """Return the delimiter given, or the one by which the header has most of the known names."""
    if wanted != "auto":
        mark = {"\\t": "\t", "tab": "\t"}.get(wanted, wanted)
        if len(mark) != 1 or mark in '"\r\n\0':
            raise DataError(f"{blob.path}: the delimiter {wanted!r} must be one character, not a quote or a newline")
        return mark
    with open_text(blob, encoding) as text:
        top = list(io.StringIO(text.read(MAX_HEADER).lstrip("\ufeff"), newline=""))
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

    Raises DataError when a quote makes the rest unreadable.
    """
    # The limit is csv's own and for the whole process: raise it, never lower it.
    csv.field_size_limit(max(csv.field_size_limit(), min(text.characters, MAX_CELL) + 1))
    width = header_line = rows = 0
    names: list[str] = []
    with text_lines(blob, text.encoding) as lines:
        reader = csv.reader(lines, delimiter=mark, strict=True)
        while True:
            first = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                # Where the next row begins cannot be told any more.
                problems.stop(first, _quote_problem(error, reader.line_num))
            if row is None:
                break
            if row and not width:
                width, header_line, names = len(row), first, [_bare(name) for name in row]
                yield first, names
            elif row:
                rows += 1
                if row == names or [_bare(name) for name in row] == names:
                    problems.row(first, "the header again, as where files were joined; delete this row")
                elif len(row) == width:
                    yield first, row
                else:
                    problems.row(first, _ragged(len(row), width, mark, first, reader.line_num))
    if not rows:
        problems.file(header_line, "no rows: the file has only its header; add at least one row")


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
