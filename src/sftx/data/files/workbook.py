"""Excel workbooks to rows: the cells of one sheet, each row with its number in the sheet."""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from sftx.data.files.blob import Blob
from sftx.data.files.problems import Problems
from sftx.data.files.tables import on_disk
from sftx.errors import DataError

OLE = b"\xd0\xcf\x11\xe0"
NOT_A_WORKBOOK = (
    zipfile.BadZipFile, zlib.error, EOFError, KeyError, IndexError, ValueError, TypeError, AttributeError, SyntaxError,
    NotImplementedError, RuntimeError, OSError,
)  # fmt: skip
"""What openpyxl raises for files that are damaged or no workbook."""


@contextmanager
def open_workbook(blob: Blob, problems: Problems) -> Iterator[Iterator[tuple[int, list[Any]]]]:
    """Open the first sheet as its header, then its rows of as many cells; other sheets are noted.

    Raises:
        DataError: openpyxl is not installed, or the file is not a valid workbook.
    """
    try:
        from openpyxl import load_workbook  # an extra
    except ImportError as error:
        raise DataError(
            f"{blob.path}: reading a workbook needs openpyxl: pip install 'sftx[xlsx]'; or save it as CSV in UTF-8"
        ) from error
    if blob.head(4) == OLE:
        raise DataError(f"{blob.path}: is an old or password-protected workbook; save it as .xlsx without a password")
    with on_disk(blob) as path, path.open("rb") as file, ExitStack() as stack:
        with _explained(blob), warnings.catch_warnings(action="ignore"):
            book = load_workbook(file, read_only=True, data_only=True)
            stack.callback(book.close)
            sheet, *others = book.worksheets
        if others:
            names = ", ".join(f"`{other.title}`" for other in others)
            problems.notes.append(f"read the sheet `{sheet.title}`; not read: {names}")
        yield _rows(_sheet_rows(sheet, blob), problems)


@contextmanager
def _explained(blob: Blob) -> Iterator[None]:
    try:
        yield
    except NOT_A_WORKBOOK as error:
        what = str(error).split("\n")[0].rstrip(".") or type(error).__name__
        raise DataError(f"{blob.path}: is not a valid workbook: {what}; save it again as .xlsx or CSV") from error


def _sheet_rows(sheet: Any, blob: Blob) -> Iterator[Any]:
    rows = iter(sheet.iter_rows())
    while True:
        with _explained(blob):
            row = next(rows, None)
        if row is None:
            return
        yield row


def _rows(sheet: Iterator[Any], problems: Problems) -> Iterator[tuple[int, list[Any]]]:
    """Yield the first row that is not empty as the header, and each further one with its number."""
    width = header = rows = 0
    for number, row in enumerate(sheet, 1):
        cells = [_value(cell) for cell in row]
        while cells and cells[-1] == "":
            cells.pop()
        if not cells:
            continue
        if not width:
            width, header = len(cells), number
            yield number, [str(cell).strip() for cell in cells]
            continue
        rows += 1
        wrong = next((cell for cell in row if cell.data_type == "e"), None)
        if wrong is not None:
            problems.row(
                number, f"cell {wrong.coordinate} holds the Excel error {wrong.value}; fill it or delete the row"
            )
        elif len(cells) > width:
            problems.row(number, f"cell {len(cells)} is filled, its column has no name; name it or empty the cell")
        else:
            yield number, cells + [""] * (width - len(cells))
    if not rows:
        problems.file(header or 1, "no rows: the sheet has only its header; add at least one row")


def _value(cell: Any) -> Any:
    """Return a cell as the text that Excel shows, or its value where a format makes that another."""
    value = cell.value
    if value is None:
        return ""
    if isinstance(value, str):
        from openpyxl.utils.escape import unescape

        return unescape(value) if "_x" in value else value
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, int | float) and cell.number_format in ("General", "@", "0"):
        return f"{value:.15g}" if isinstance(value, float) else str(value)
    return value
