"""Formats beside CSV and JSONL: JSON, Parquet, Arrow and compressed files, sound and damaged."""

from __future__ import annotations

import datetime
import gzip
import io
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftx.data.corpus import Corpus
from sftx.data.files.jsontext import CHUNK
from sftx.data.files.problems import SKIP
from sftx.data.files.sources import Source
from sftx.data.records.read import FileReader, How, read_file
from sftx.data.store.record_store import message_dict
from sftx.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"category": "数学", "human": " 问\n\u2028?\r\n", "assistant": 'NULL "x"', "id": 7, "tags": ["a", {"b": None}]},
    {"category": " -", "human": "😀", "assistant": "NaN", "id": None, "tags": []},
    {"category": "NULL", "human": "null", "assistant": "N/A", "id": -1, "tags": ["a"]},
]
PLAIN = [{"category": r["category"], "human": r["human"], "assistant": r["assistant"]} for r in ROWS]
GOOD = '{"category": "c", "human": "q", "assistant": "a"}'


def write(folder: Path, raw: bytes | str, name: str) -> Path:
    path = folder / name
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return path


def table(rows: list[dict[str, Any]], kind: str = "parquet", size: int = 2) -> bytes:
    out, made = io.BytesIO(), pa.Table.from_pylist(rows)
    if kind == "parquet":
        pq.write_table(made, out, row_group_size=size)
        return out.getvalue()
    maker = {"file": pa.ipc.new_file, "stream": pa.ipc.new_stream}[kind]
    with maker(out, made.schema) as writer:
        writer.write_table(made, max_chunksize=size)
    return out.getvalue()


def zstd(raw: bytes) -> bytes:
    return bytes(pa.compress(raw, "zstd", asbytes=True))


def back(path: Path, **how: Any) -> list[dict[str, Any]]:
    return [
        {"category": r.category, "human": r.human, "assistant": r.assistant} | r.extra
        for r in read_file(path, **how).records
    ]


def refused(path: Path, *fragments: str, **how: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_file(path, **how)
    message = str(caught.value).removesuffix(f"\n{SKIP}")
    assert all(line.startswith((f"{path}:", "and ")) for line in message.split("\n")), message
    for fragment in fragments:
        assert fragment in message, message
    return message.replace(f"{path}:", "")


# JSON


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("wrap", ["{}", '{{"version": {{"data": [1]}}, "data": {} , "z": [1, {{}}]}}', "\n\n {}\n"])
def test_json(tmp_path: Path, wrap: str, mark: str, indent: int | None) -> None:
    text = json.dumps(ROWS, ensure_ascii=False, indent=indent)
    path = write(tmp_path, mark + wrap.format(text), "a.json")
    assert back(path) == ROWS
    assert read_file(path).format == "json"
    assert back(write(tmp_path, mark + wrap.format(text), "a.txt"), format="json") == ROWS


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_json_lines_are_where_values_begin(tmp_path: Path, newline: str) -> None:
    text = f'[\n{GOOD},\n\n {GOOD}, {GOOD},\n{{"category":"c",\n"human":"q",\n"assistant":"a"}},{GOOD}\n]\n'
    path = write(tmp_path, text.replace("\n", newline), "a.json")
    assert [r.line for r in read_file(path).records] == [2, 4, 4, 5, 7]


def test_a_line_end_at_the_border_of_two_pieces_is_one(tmp_path: Path) -> None:
    for pad in range(3):
        text = "[" + " " * (CHUNK - len(GOOD) - 4 + pad) + f"{GOOD},\r\n{GOOD}]"
        assert [r.line for r in read_file(write(tmp_path, text, "a.json")).records] == [1, 2]


def test_a_json_file_that_holds_one_object_a_line(tmp_path: Path) -> None:
    reading = read_file(write(tmp_path, f"{GOOD}\n{GOOD}\n", "a.json"))
    assert ([r.line for r in reading.records], reading.format) == ([1, 2], "jsonl")
    assert len(read_file(write(tmp_path, GOOD, "a.json")).records) == 1
    refused(
        write(tmp_path, f"{GOOD}\n{GOOD}\n", "a.json"), ":1: one object with 3 keys", "data.format=jsonl", format="json"
    )


@pytest.mark.parametrize("size", [10, CHUNK - 200, CHUNK, 3 * CHUNK, 10_000_000])
def test_json_is_read_in_pieces(tmp_path: Path, size: int) -> None:
    rows = [{"category": "c", "human": "q", "assistant": f"{i}{'长' * (size // 3)}", "n": 12345 + i} for i in range(7)]
    for separators in ((", ", ": "), (",\r\n", ":\r\n")):
        path = write(tmp_path, json.dumps(rows, separators=separators, ensure_ascii=False), "a.json")
        assert back(path) == rows


@pytest.mark.parametrize(
    ("text", "line", "fragments"),
    [
        ("[]", 1, ["no rows: the list is empty"]),
        ('{"data": []}', 1, ["no rows: the list is empty"]),
        ("5", 1, ["found neither a list nor an object"]),
        ('{"rows": [1],\n"x": 2}', 1, ["one object with 2 keys (`rows`, `x`)", "the key `data` or `train`"]),
        ('{"data": 5,\n"x": 1}', 1, ["one object with 2 keys (`data`, `x`), not a list of rows"]),
        (json.dumps({f"data/{i}.json": {"problem": "p"} for i in range(999)}), 1, ["one object with 999 keys", "994 more"]),
        (f"[{GOOD},\n{GOOD}", 2, ["premature EOF"]),
        (f"[{GOOD},\n{GOOD[:-9]}", 2, ["bad JSON"]),
        (f"[{GOOD}\n{GOOD}]", 2, ["I expect ',' or ']'"]),
        (f"[{GOOD},\n]", 2, ["bad JSON", "unallowed token"]),
        (f"[{GOOD}]\n{GOOD}", 2, ["text after the end", "data.format=jsonl"]),
        (f"[{GOOD},\n'x']", 2, ["bad JSON near `", "'x']`: invalid char"]),
        (f'[{GOOD},\n{{"a": "b\tc"}}]', 2, ["invalid character inside string"]),
        (f'[{GOOD},\n{{"a" "b"}}]', 2, ["object key and value must be separated by a colon"]),
        (f"[{GOOD},\n" + "[" * 100_000, 2, ["premature EOF"]),
        (f"[{GOOD},\n" + "[" * 9_000 + "]" * 9_001, 2, ["nested more than 500 deep; fix the value"]),
        (f'[{GOOD},\n{{"a": 1, "a": 2}},{GOOD}]', 2, ["the key `a` is repeated; fix the value"]),
        (f'[{GOOD},\n{{"a": NaN}},{GOOD}]', 2, ["bad JSON near `", "NaN}", "invalid char"]),
        (f'[{GOOD},\n{{"a": {"1" * 5000}}},{GOOD}]', 2, ["limit"]),
        (f"[{GOOD},\n5,{GOOD}]", 2, ["5 is not an object"]),
        (f'[{GOOD},\n{{"category": "c", "human": null, "assistant": "a"}}]', 2, ["`human` is null, not a string"]),
    ],
)  # fmt: skip
def test_json_refusals(tmp_path: Path, text: str, line: int, fragments: list[str]) -> None:
    message = refused(write(tmp_path, text, "a.json"), *fragments)
    assert message.split("\n")[-1].startswith(f"{line}: "), message


def test_json_goes_on_behind_a_bad_value(tmp_path: Path) -> None:
    text = f'[{GOOD},\n{{"a": 1, "a": 1}},\n5,\n{{"b": 1, "b": 1}},\n{{"human": 1}},\n{GOOD}]'
    path = write(tmp_path, text, "a.json")
    assert [line.split(":")[0] for line in refused(path).split("\n")] == ["2", "3", "4", "5"]
    skipped: list[tuple[int, int, str]] = []
    reader = FileReader(path, How(), on_skip=lambda *found: skipped.append(found))
    assert [r.line for r in reader] == [1, 6]
    assert [(line, number) for line, number, _ in skipped] == [(2, 0), (3, 0), (4, 0), (5, 0)]


def test_records_that_share_a_line_are_numbered(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{i}", "output": "" if i in (3, 5, 7) else f"a{i}"} for i in range(10)]
    path = write(tmp_path, json.dumps(rows), "a.json")
    assert refused(path).split("\n") == [
        f"1 (record {n}): the `output` of this row is empty; fill it or delete the row" for n in (4, 6, 8)
    ]
    loaded = Corpus(on_bad_rows="skip").read([Source(path, "a")], keep_columns=True)
    assert loaded.skipped_rows == 3
    assert [s.split(": ")[0] for s in loaded.skipped()] == [f"{path}:1 (record {n})" for n in (4, 6, 8)]
    assert [loaded.records.origin(i) for i in range(2)] == [f"{path}:1 (record {n})" for n in (1, 2)]
    assert [r.origin for r in loaded.records] == [loaded.records.origin(i) for i in range(7)]
    apart = write(tmp_path, json.dumps(rows[:3], indent=1), "b.json")
    assert [r.origin for r in read_file(apart).records] == [f"{apart}:{line}" for line in (2, 6, 10)]


def test_a_row_with_several_faults_is_one_skipped_row(tmp_path: Path) -> None:
    rows = [PLAIN[0], {"category": "c", "human": "", "assistant": ""}]
    loaded = Corpus(on_bad_rows="skip").read(
        [Source(write(tmp_path, json.dumps(rows), "a.json"), "a")], keep_columns=True
    )
    assert loaded.skipped_rows == 1


def test_half_a_surrogate_pair_is_seen_wherever_a_piece_ends(tmp_path: Path) -> None:
    """ijson's C backend would read it as a question mark."""
    for text in ("\\ud83d", "\\ude00x", "\\ud83dx\\ude00", "\\uDE00\\uD83D"):
        for pad in range(15):
            raw = f'[{GOOD}, {" " * (CHUNK - len(GOOD) - 50 - pad)}{{"category": "c", "human": "{text}", "assistant": "a"}}]'
            refused(write(tmp_path, raw, "a.json"), ":1 (record 2): `human` holds")
    both = '[{"category": "\\\\ud83d", "human": "\\ud83d\\ude00", "assistant": "\\uD83D\\uDE00"}]'
    assert back(write(tmp_path, both, "a.json")) == [{"category": "\\ud83d", "human": "😀", "assistant": "😀"}]


def test_numbers_are_those_of_the_json_module(tmp_path: Path) -> None:
    numbers = "[0, -0, -0.0, 1.10, 1e5, 1E-7, 12345678901234567890123, 0.1, 2.5e+300, true, null]"
    path = write(tmp_path, f'[{GOOD[:-1]}, "n": {numbers}}}]', "a.json")
    found, wanted = back(path)[0]["n"], json.loads(numbers)
    assert list(map(repr, found)) == list(map(repr, wanted))


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("text", "name", "form"),
    [
        (json.dumps(TURNS) + "\n" + json.dumps(TURNS), "a.jsonl", "jsonl"),
        (json.dumps(TURNS) + "\n" + json.dumps(TURNS), "a.json", "jsonl"),
        (json.dumps([TURNS, TURNS]), "a.json", "json"),
        (json.dumps({"train": [TURNS, {"messages": TURNS}]}, indent=1), "a.json", "json"),
    ],
)
def test_a_row_may_be_a_list_of_turns(tmp_path: Path, text: str, name: str, form: str) -> None:
    reading = read_file(write(tmp_path, text, name))
    assert [(r.human, r.assistant) for r in reading.records] == [("q", "a")] * 2
    assert (reading.format, reading.schema) == (form, "messages")


def test_a_list_of_rows_in_a_jsonl_file_is_named(tmp_path: Path) -> None:
    refused(write(tmp_path, json.dumps(PLAIN, indent=None), "a.jsonl"), ":1: ", "name a JSON list of rows *.json")


def test_what_stands_beside_the_list_is_noted(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"version": 1, "train": PLAIN, "test": [5]}), "a.json")
    reader = FileReader(path)
    assert len(list(reader)) == len(PLAIN)
    assert reader.notes == ["read the list `train`; not read beside it: `version`, `test`"]


def test_json_is_utf8(tmp_path: Path) -> None:
    text = json.dumps(PLAIN, ensure_ascii=False)
    refused(write(tmp_path, text.encode("utf-16"), "a.json"), "JSON must be UTF-8, this is utf-16")
    refused(write(tmp_path, text.encode("gb18030"), "a.json"), ":1: byte 0x", "is not valid utf-8")
    with pytest.raises(DataError, match="is not valid utf-8"):
        read_file(write(tmp_path, json.dumps(PLAIN[:1], ensure_ascii=False).encode("gb18030"), "a.json"))


# Parquet and Arrow


@pytest.mark.parametrize(("kind", "name"), [("parquet", "a.parquet"), ("file", "a.arrow"), ("stream", "a.ARROW")])
@pytest.mark.parametrize("size", [1, 2, 100])
def test_tables(tmp_path: Path, kind: str, name: str, size: int) -> None:
    rows = [row | {"tags": ["a", "b"][:i]} for i, row in enumerate(ROWS)]
    path = write(tmp_path, table(rows, kind, size), name)
    reading = read_file(path)
    assert back(path) == rows
    assert [r.line for r in reading.records] == [1, 2, 3]
    assert (reading.encoding, reading.delimiter, reading.schema) == (None, None, "human_assistant")
    assert reading.format == ("parquet" if kind == "parquet" else "arrow")
    assert back(write(tmp_path, table(rows, kind), "a.bin"), format=reading.format) == rows


def tool_rows() -> list[dict[str, Any]]:
    """Calls of tools with other arguments each; `limit` of the first is really null, and its tool requires it."""

    def definition(name: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
        parameters = {"type": "object", "properties": properties, "required": required}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    def row(name: str, arguments: dict[str, Any], tools: Any) -> dict[str, Any]:
        call = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
        messages = [
            {"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "r", "name": name}, {"role": "assistant", "content": "z"},
        ]  # fmt: skip
        return {"messages": messages, "tools": tools}

    number, text = {"type": "integer", "minimum": 0}, {"type": "string", "enum": ["x", "y"]}
    return [
        row("f", {"a": 1, "limit": None}, [definition("f", {"a": number, "limit": number}, ["a", "limit"])]),
        row("g", {"b": "x", "in": {"c": 1.5}}, [definition("g", {"b": text, "in": {"type": "object"}}, [])]),
        row("h", {"in": {"d": [{"e": True}]}}, [definition("h", {}, [])]),
        row("f", {"a": 2, "limit": 3}, [definition("f", {"a": number}, ["a"])]),
    ]


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
@pytest.mark.parametrize("as_text", [False, True])
def test_names_of_other_rows_are_no_part_of_a_call_or_schema(tmp_path: Path, kind: str, as_text: bool) -> None:
    rows = tool_rows()
    if as_text:
        rows = [row | {"tools": json.dumps(row["tools"])} for row in rows]
    plain = read_file(write(tmp_path, "\n".join(map(json.dumps, rows)), "a.jsonl")).records
    stored = read_file(write(tmp_path, table(rows, kind), "a.parquet" if kind == "parquet" else "a.arrow")).records
    assert [json.dumps(message_dict(m)) for r in stored for m in r.messages] == [
        json.dumps(message_dict(m)) for r in plain for m in r.messages
    ]
    assert [json.dumps(r.tools) for r in stored] == [json.dumps(r.tools) for r in plain]


def test_a_null_that_may_be_filled_in_is_read_as_absent(tmp_path: Path) -> None:
    rows = tool_rows()
    rows[0]["tools"][0]["function"]["parameters"]["required"] = ["a"]
    (record, *_) = read_file(write(tmp_path, table(rows), "a.parquet")).records
    assert record.messages[1].tool_calls[0]["function"]["arguments"] == {"a": 1}
    text = [{"messages": [dict(m) for m in row["messages"]]} for row in tool_rows()]
    text[0]["messages"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": '{"a": 1, "limit": null}'}}]
    (record, *_) = read_file(write(tmp_path, table(text[:1]), "b.parquet")).records
    assert record.messages[1].tool_calls[0]["function"]["arguments"] == '{"a": 1, "limit": null}'


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_a_table_of_conversations(tmp_path: Path, kind: str) -> None:
    """Where a turn lacks a key that another has, Arrow says null."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.0}]
    name = "a.parquet" if kind == "parquet" else "a.arrow"
    path = write(tmp_path, table([{"messages": chat, "n": 1.5}], kind), name)
    (record,) = read_file(path).records
    assert [(m.role, m.content, m.weight) for m in record.messages] == [("user", "q", None), ("assistant", "a", 0.0)]
    assert record.extra == {"n": 1.5}


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
@pytest.mark.parametrize(
    ("rows", "fragments"),
    [
        ([{"category": "c", "human": "q", "assistnat": "a"}], [":1: no column `assistant`", "nearest is `assistnat`"]),
        ([{"category": "c", "human": "q", "Human": "q", "assistant": "a"}], [":1: the header name `Human` is repeated"]),
        ([*PLAIN, {"category": None, "human": "q", "assistant": "a"}], [":4: the `category` of this row is empty"]),
        ([*PLAIN, {"category": "c", "human": " ", "assistant": ""}], [":4: the `human` of", ":4: the `assistant` of"]),
        ([*PLAIN, {"category": "c", "human": "q", "assistant": "a\0"}], [":4: `assistant` holds \\u0000"]),
        ([{"category": 1, "human": "q", "assistant": "a"}], [":1: `category` is 1, not a string"]),
        ([PLAIN[0] | {"when": datetime.date(2020, 1, 2)}], [":1: column `when` holds a date", "remove_unused_columns=true"]),
        ([PLAIN[0] | {"raw": {"in": [b"x"]}}], [":1: column `raw` holds a bytes"]),
        ([PLAIN[0] | {"x": math.nan}], [":1: column `x` holds a number that is not finite"]),
    ],
)  # fmt: skip
def test_table_refusals(tmp_path: Path, kind: str, rows: list[dict[str, Any]], fragments: list[str]) -> None:
    name = "a.parquet" if kind == "parquet" else "a.arrow"
    refused(write(tmp_path, table(rows, kind), name), *fragments)


def test_a_column_that_is_dropped_may_hold_anything(tmp_path: Path) -> None:
    path = write(tmp_path, table([PLAIN[0] | {"when": datetime.date(2020, 1, 2), "x": math.nan}]), "a.parquet")
    (record,) = FileReader(path, keep_columns=False)
    assert record.extra == {}


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_an_empty_table(tmp_path: Path, kind: str) -> None:
    out, made = io.BytesIO(), pa.Table.from_pylist(PLAIN).slice(0, 0)
    if kind == "parquet":
        pq.write_table(made, out)
    else:
        with {"file": pa.ipc.new_file, "stream": pa.ipc.new_stream}[kind](out, made.schema) as writer:
            writer.write_table(made)
    name = "a.parquet" if kind == "parquet" else "a.arrow"
    refused(write(tmp_path, out.getvalue(), name), ":1: no rows: the file has only its columns")


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_a_table_that_is_cut_off(tmp_path: Path, kind: str) -> None:
    """Cut anywhere, also between two batches, nothing is read."""
    raw, name = table(PLAIN * 3, kind, 1), "a.parquet" if kind == "parquet" else "a.arrow"
    word = "Parquet" if kind == "parquet" else "Arrow"
    for size in range(0, len(raw), 7):
        refused(write(tmp_path, raw[:size], name), f": is not a valid {word} file: ", "write or copy it again")


@pytest.mark.parametrize(("name", "word"), [("a.parquet", "Parquet"), ("a.arrow", "Arrow")])
def test_text_under_the_name_of_a_table(tmp_path: Path, name: str, word: str) -> None:
    refused(write(tmp_path, "category,human,assistant\na,b,c\n", name), f"is not a valid {word} file")
    refused(tmp_path / f"missing{name}", "cannot be read: No such file")


@pytest.mark.parametrize(
    ("raw", "fragment"),
    [
        (table(PLAIN), "this is Parquet; name it *.parquet or set data.format=parquet"),
        (table(PLAIN, "file"), "this is Arrow"),
        (gzip.compress(b"x", mtime=0), "this is compressed by gzip; name it *.gz"),
        (zstd(b"x"), "this is compressed by zstd; name it *.zst"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_other_formats_under_the_name_of_text(tmp_path: Path, name: str, raw: bytes, fragment: str) -> None:
    refused(write(tmp_path, raw, name), fragment)


# Compressed


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstd)])
def test_compressed(tmp_path: Path, suffix: str, pack: Any) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in PLAIN).encode()
    rows = "category,human,assistant\n数学,请问一加一是多少？,一加一等于二。\n"
    for name, raw in {
        "a.jsonl": lines,
        "a.json": json.dumps(PLAIN).encode(),
        "a.parquet": table(PLAIN),
        "a.arrow": table(PLAIN, "file"),
        "b.arrow": table(PLAIN, "stream"),
    }.items():
        path = write(tmp_path, pack(raw), name + suffix)
        assert back(path) == PLAIN, name
        assert read_file(path).records[0].source == name[0]
    for codec in ("utf-8", "gb18030", "utf-16"):
        path = write(tmp_path, pack(rows.encode(codec)), f"a.CSV{suffix.upper()}")
        assert (read_file(path).records[0].human, read_file(path).encoding) == ("请问一加一是多少？", codec)
    assert len(back(write(tmp_path, pack(lines) + pack(lines), f"two.jsonl{suffix}"))) == 6
    with pytest.raises(DataError, match="suffix `` is not known"):
        read_file(write(tmp_path, pack(lines), f"a{suffix}"))


@pytest.mark.parametrize(("suffix", "pack", "word"), [(".gz", gzip.compress, "gzip"), (".zst", zstd, "zstd")])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.arrow"])
def test_damaged_compressed_files(tmp_path: Path, name: str, suffix: str, pack: Any, word: str) -> None:
    raw = pack(b"category,human,assistant\n" + b"".join(f"c,{i * 7919},x\n".encode() for i in range(3000)))
    for damaged in (raw[:-30], raw[: len(raw) // 2], raw[:11], b"category,human,assistant\na,b,c\n"):
        refused(write(tmp_path, damaged, name + suffix), f"the {word} file is damaged or cut off")


# What may be skipped


def test_skipped_rows_are_told_and_the_file_is_not(tmp_path: Path) -> None:
    path = write(tmp_path, 'category,human,assistant\na,b\nc,d,e\nf,,\n"g","h\nh",i\n', "a.csv")
    skipped: list[tuple[int, int, str]] = []
    reader = FileReader(path, How(), on_skip=lambda *found: skipped.append(found))
    assert [(r.line, r.human) for r in reader] == [(3, "d"), (5, "h\nh")]
    assert [line for line, *_ in skipped] == [2, 4, 4]
    assert "2 cells found, 3 expected" in skipped[0][2]
    for text, fragment in (
        ("category,human\na,b\n", "no column `assistant`"),
        ('category,human,assistant\na,b,c\nd,"e,f\n', ":3: a quote opens"),
        ("category,human,assistant\na,b,c\na,b\0,c\n", ":3: a NUL character"),
        ("category,human,assistant\na,b\n", "no row is valid: all were skipped"),
        ("category,human,assistant\n", "no rows"),
    ):
        with pytest.raises(DataError) as caught:
            list(FileReader(write(tmp_path, text, "b.csv"), How(), on_skip=lambda *_: None))
        assert fragment in str(caught.value)
    with pytest.raises(DataError, match="is not valid utf-8"):
        list(FileReader(write(tmp_path, b"category,human,assistant\na,\xff,c\n", "c.csv"), on_skip=lambda *_: None))


# The encoding that is never guessed


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_latin1_is_only_taken_when_it_is_given(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path, "category,human,assistant\nmot,Où est le garçon ?,À l'école.\n".encode(encoding), "a.csv")
    refused(path, "data.encoding=cp1252 reads it as `mot,Où est le garçon")
    assert back(path, encoding=encoding) == [
        {"category": "mot", "human": "Où est le garçon ?", "assistant": "À l'école."}
    ]


@pytest.mark.parametrize("codec", ["utf-8", "gb18030", "utf-16", "utf-16-be", "big5", "cp932", "cp949"])
def test_characters_and_bad_bytes_at_the_border_of_two_chunks(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {"big5": "這個時間我們來學會", "cp932": "こんにちは、ありがとう", "cp949": "이것은무엇이고어디에있나요"}
    row = f"{text.get(codec, '请问我们的一')},q,a\r\n"
    raw = ("category,human,assistant\r\n" + 3 * row).encode(codec)
    for size in (1, 2, 3, 5, 7):
        monkeypatch.setattr("sftx.data.files.blob.CHUNK", size)
        given = codec if codec in text else "auto"
        reading = read_file(write(tmp_path, raw, "a.csv"), encoding=given)
        assert reading.records[0].category == text.get(codec, "请问我们的一")
        if codec in ("utf-8", "gb18030"):
            refused(
                write(tmp_path, raw + b"x,\xff,y\r\n", "b.csv"),
                f":5: byte 0xFF at byte offset {len(raw) + 2} is not valid {codec}",
            )
