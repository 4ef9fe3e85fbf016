"""Whatever rows are written, in whatever format, come back exactly; whatever bytes are read, only DataError comes."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftx.data.files.problems import SKIP
from sftx.data.records.read import FORMATS, FileReader, How, read_file
from sftx.errors import DataError

QUICK = settings(max_examples=60, deadline=None, database=None, derandomize=True)

LOOKALIKES = st.sampled_from(
    ["NULL", "NaN", "None", "", " ", "0", "\n", "\r", "\r\n", '"', ",", "\t", "\ufeff", "\u2028"]
)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20) | LOOKALIKES
FILLED = TEXT.filter(lambda text: bool(text.strip()))
ROW = st.tuples(FILLED, FILLED, FILLED, TEXT)
ROWS = st.lists(ROW, min_size=1, max_size=6)
NAMES = ("category", "human", "assistant", "note")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def read(raw: bytes, name: str, **how: Any) -> list[tuple[Any, ...]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(raw)
        return [(r.category, r.human, r.assistant, r.extra.get("note")) for r in read_file(path, **how).records]


def as_csv(rows: list[tuple[str, ...]], mark: str, end: str, quoting: Any) -> str:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=mark, lineterminator=end, quoting=quoting)
    writer.writerow(NAMES)
    writer.writerows(rows)
    return out.getvalue()


@given(
    ROWS, st.sampled_from(",;\t|"), st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from([".csv", ".tsv", ".csv.gz"])
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030", "utf-32"])
@QUICK
def test_csv(encoding: str, rows: list[tuple[str, ...]], mark: str, end: str, suffix: str) -> None:
    import gzip

    text = as_csv(rows, mark, end, csv.QUOTE_ALL)
    raw = text.encode(encoding)
    raw = gzip.compress(raw) if suffix.endswith("gz") else raw
    assert read(raw, f"a{suffix}", encoding=encoding) == rows
    if encoding not in ("gb18030", "utf-32"):  # GB18030 has to prove itself by its letters, UTF-32 is not detected
        assert read(raw, f"a{suffix}") == rows


@given(ROWS, st.sampled_from(",;\t|"))
@QUICK
def test_csv_with_as_few_quotes_as_can_be(rows: list[tuple[str, ...]], mark: str) -> None:
    assert read(as_csv(rows, mark, "\r\n", csv.QUOTE_MINIMAL).encode(), "a.csv") == rows


@given(ROWS.filter(lambda rows: not any(unicodedata.category(c) == "Co" for row in rows for cell in row for c in cell)))
@QUICK
def test_gb18030_is_recognised_by_its_letters(rows: list[tuple[str, ...]]) -> None:
    rows = [
        *rows,
        (
            "c",
            "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所"
            * 40,
            "a",
            "",
        ),
    ]
    assert read(as_csv(rows, ",", "\n", csv.QUOTE_ALL).encode("gb18030"), "a.csv") == rows


@given(
    st.lists(st.tuples(FILLED, FILLED, FILLED, JSON), min_size=1, max_size=6), st.booleans(), st.sampled_from([None, 1])
)
@QUICK
def test_json_and_jsonl(rows: list[tuple[Any, ...]], ascii_: bool, indent: int | None) -> None:
    objects = [dict(zip(NAMES, row, strict=True)) for row in rows]
    lines = "".join(json.dumps(row, ensure_ascii=ascii_) + "\n" for row in objects)
    assert read(lines.encode(), "a.jsonl") == rows
    assert read(lines.encode(), "a.json") == rows
    whole = json.dumps(objects, ensure_ascii=ascii_, indent=indent)
    assert read(whole.encode(), "a.json") == rows
    assert read(f'{{"x": [1], "data": {whole}}}'.encode(), "a.json") == rows


@given(ROWS, st.integers(1, 4))
@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
@QUICK
def test_tables(kind: str, rows: list[tuple[str, ...]], size: int) -> None:
    made, out = pa.table(dict(zip(NAMES, map(list, zip(*rows, strict=True)), strict=True))), io.BytesIO()
    if kind == "parquet":
        pq.write_table(made, out, row_group_size=size)
    else:
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(out, made.schema) as writer:
            writer.write_table(made, max_chunksize=size)
    assert read(out.getvalue(), "a.parquet" if kind == "parquet" else "a.arrow") == rows


@given(st.lists(st.tuples(TEXT, TEXT, TEXT, TEXT), min_size=1, max_size=6))
@QUICK
def test_blank_cells_are_refused_at_their_lines_and_no_others(rows: list[tuple[str, ...]]) -> None:
    objects = "".join(json.dumps(dict(zip(NAMES, row, strict=True))) + "\n" for row in rows)
    wanted = [i for i, row in enumerate(rows, 1) if not all(cell.strip() for cell in row[:3])]
    skipped: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        path.write_text(objects, encoding="utf-8")
        reader = FileReader(path, How(), on_skip=lambda line, *_: skipped.append(line))
        good = [row for row in rows if all(cell.strip() for cell in row[:3])]
        if good:
            assert [(r.category, r.human, r.assistant, r.extra["note"]) for r in reader] == good
            assert sorted({*skipped}) == wanted
        if wanted:
            with pytest.raises(DataError) as caught:
                read_file(path)
            assert (
                sorted({int(line.split(":")[1]) for line in str(caught.value).removesuffix(f"\n{SKIP}").split("\n")})
                == wanted
            )


PIECES = st.sampled_from(
    [b"category", b"human", b"assistant", b",", b";", b"\t", b"\n", b"\r", b'"', b"{", b"}", b"[", b"]", b":", b"\0", b"\xff",
     b"\xfe", b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"PK\x03\x04", b"PAR1", b"ARROW1", b"\x28\xb5\x2f\xfd", b"\\ud800",
     b'"messages"', b'"role"', b'"user"', b'"content"', b"null", b"NaN", b"1e999", b'"data"', "的是".encode("gb18030"),
     "一".encode(), b'{"category":"a","human":"b","assistant":"c"}', b"category,human,assistant\n", b"a,b,c\n"]
)  # fmt: skip


@given(
    st.lists(PIECES | st.binary(max_size=4), max_size=14).map(b"".join),
    st.sampled_from([None, "utf-16", "utf-7", "cp1252"]),
)
@pytest.mark.parametrize("name", [f"a{suffix}{packed}" for suffix in FORMATS for packed in ("", ".gz", ".zst")])
@settings(QUICK, max_examples=40)
def test_random_bytes_give_nothing_but_dataerror(name: str, raw: bytes, encoding: str | None) -> None:
    with contextlib.suppress(DataError):  # any other error fails the test
        assert read(raw, name, encoding=encoding or "auto")
