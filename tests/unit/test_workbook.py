"""Excel workbooks: cells as Excel shows them, or refused with their row."""

from __future__ import annotations

import datetime
import gzip
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sftx.data.corpus import Corpus
from sftx.data.files.sources import Source
from sftx.data.records.read import FileReader, How, read_file
from sftx.errors import DataError

openpyxl = pytest.importorskip("openpyxl")
HEADER = ["category", "human", "assistant"]


def write(folder: Path, rows: Sequence[Sequence[Any]], *, merged: str = "", others: Sequence[str] = ()) -> Path:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(list(row))
    if merged:
        book.active.merge_cells(merged)
    for name in others:
        book.create_sheet(name).append(["x"])
    book.save(folder / "a.xlsx")
    return folder / "a.xlsx"


def refused(path: Path, **how: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_file(path, **how)
    return str(caught.value)


def test_cells_are_what_excel_shows(tmp_path: Path) -> None:
    rows = [
        [None], HEADER, ["数学", "2+2?", 4], ["a", " x\ny ", 0.1 + 0.2], [], ["b", "true?", True], ["c", "007", "=1", None],
    ]  # fmt: skip
    path = write(tmp_path, rows)
    book = openpyxl.load_workbook(path)
    book.active["C7"].data_type = "s"
    book.active["C7"].value = "line_x000D_\nend"
    book.save(path)
    reading = read_file(path)
    assert [(r.category, r.human, r.assistant, r.line) for r in reading.records] == [
        ("数学", "2+2?", "4", 3), ("a", " x\ny ", "0.3", 4), ("b", "true?", "TRUE", 6), ("c", "007", "line\r\nend", 7),
    ]  # fmt: skip
    assert (reading.format, reading.encoding, reading.delimiter, reading.schema) == (
        "xlsx",
        None,
        None,
        "human_assistant",
    )
    packed = tmp_path / "b.xlsx.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert len(read_file(packed).records) == 4
    loaded = Corpus().read([Source(path, "a")], keep_columns=True)
    assert [r.origin for r in loaded.records] == [f"{path}:{line}" for line in (3, 4, 6, 7)]


def test_what_excel_shows_otherwise_is_refused(tmp_path: Path) -> None:
    day, when = datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 2)
    path = write(
        tmp_path, [HEADER, ["a", "q", 0.5], ["a", day, "x"], ["a", "q", "x"], ["a", "q", "b", "x"], ["a", "", "b"]]
    )
    book = openpyxl.load_workbook(path)
    book.active["C2"].number_format = "0.00%"
    book.active["C4"].value, book.active["C4"].data_type = "#N/A", "e"
    book.save(path)
    lines = refused(path).replace(f"{path}:", "").split("\n")
    assert [line[:1] for line in lines[:5]] == ["2", "3", "4", "5", "6"]
    assert "`assistant` is 0.5, not a string" in lines[0]
    assert "`human` is" in lines[1]
    assert "cell C4 holds the Excel error #N/A" in lines[2]
    assert "cell 4 is filled, its column has no name" in lines[3]
    assert "`human` of this row is empty" in lines[4]
    unused = write(tmp_path, [[*HEADER, "when"], ["a", "q", "b", when]])
    assert "column `when` holds a datetime" in refused(unused)
    assert len(list(FileReader(unused, keep_columns=False))) == 1


def test_merged_cells_and_other_sheets(tmp_path: Path) -> None:
    path = write(
        tmp_path, [HEADER, ["a", "q", "x"], ["", "r", "y"], ["b", "s", "z"]], merged="A2:A3", others=["Notes", "B"]
    )
    assert "data.fill_down=[category]" in refused(path)
    reader = FileReader(path, How(fill_down=("category",)))
    assert [r.category for r in reader] == ["a", "a", "b"]
    assert reader.notes == [
        "read the sheet `Sheet`; not read: `Notes`, `B`",
        "filled 1 empty cells of `category` with the cell above (data.fill_down)",
    ]


def test_what_is_no_workbook_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.xlsx"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "x")
    assert "is not a valid workbook" in refused(path)
    good = write(tmp_path, [HEADER, ["a", "q", "x"]]).read_bytes()
    for size in (0, 3, 100, len(good) // 2, len(good) - 5):
        path.write_bytes(good[:size])
        assert "is not a valid workbook" in refused(path)
    path.write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1")
    assert "old or password-protected" in refused(path)
    assert ":1: no rows: the sheet has only its header" in refused(write(tmp_path, [HEADER]))
    assert ":1: no rows" in refused(write(tmp_path, []))
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    assert "pip install 'sftx[xlsx]'" in refused(path)
