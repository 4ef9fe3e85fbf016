"""`sftx.data.records.read`: one file to exact records, or one error that says where and what."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import ROOT

from sftx.data.files.problems import SKIP
from sftx.data.records.read import MAX_LISTED, FileReader, How, Reading, read_file, sha256_file
from sftx.errors import DataError

HEADER = "category,human,assistant\n"
CHINESE = "数学,请问一加一是多少？,一加一等于二。\n历史,这个国家的首都在哪里？,在北京。\n"
CHINESE_ROWS = [("数学", "请问一加一是多少？", "一加一等于二。"), ("历史", "这个国家的首都在哪里？", "在北京。")]
BIG5_TEXT = "天氣,今天的天氣很好，我們可以出門嗎？,可以，這個時間最好。\n"
KOREAN = "날씨,오늘 날씨가 좋습니다. 이것은 무엇이고 어디에 있나요?,대한민국의 수도는 서울이며 사람이 많습니다.\n"
JAPANESE = "天気,こんにちは。今日はいい天気ですね。,はい、とてもいい天気です。\n"


def write(folder: Path, content: str | bytes, name: str = "a.csv", encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def triples(reading: Reading) -> list[tuple[str, str, str]]:
    return [(r.category, r.human, r.assistant) for r in reading.records]


def refused(path: Path, **options: str) -> list[str]:
    """Return the lines of the error without the path, which each of them must begin with."""
    with pytest.raises(DataError) as caught:
        read_file(path, **options)
    lines = str(caught.value).removesuffix(f"\n{SKIP}").split("\n")
    assert all(line.startswith((f"{path}:", "and ")) for line in lines), lines
    return [line.removeprefix(f"{path}:") for line in lines]


def check_one_line(path: Path, line: int, *fragments: str, **options: str) -> None:
    found = refused(path, **options)
    assert len(found) == 1, found
    assert found[0].startswith(f"{line}: "), found
    for fragment in fragments:
        assert fragment in found[0], found


# Encodings


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("codec", "mark", "said"),
    [
        ("utf-8", b"", "utf-8"),
        ("utf-8", codecs.BOM_UTF8, "utf-8-sig"),
        ("utf-8", codecs.BOM_UTF8 * 2, "utf-8-sig"),
        ("utf-16-le", codecs.BOM_UTF16_LE, "utf-16"),
        ("utf-16-be", codecs.BOM_UTF16_BE, "utf-16"),
        ("utf-16-le", b"", "utf-16-le"),
        ("utf-16-be", b"", "utf-16-be"),
        ("gb18030", b"", "gb18030"),
    ],
)
def test_each_encoding_with_each_newline(tmp_path: Path, codec: str, mark: bytes, said: str, newline: str) -> None:
    path = write(tmp_path, mark + (HEADER + CHINESE).replace("\n", newline).encode(codec))
    reading = read_file(path)
    assert triples(reading) == CHINESE_ROWS
    assert [r.line for r in reading.records] == [2, 3]
    assert (reading.encoding, reading.delimiter, reading.format) == (said, ",", "csv")


@pytest.mark.parametrize(
    ("text", "codec", "proposed"),
    [
        (JAPANESE, "euc_jp", "gb18030"),
        (JAPANESE * 40, "shift_jis", "cp932"),
        (BIG5_TEXT, "big5", "big5"),
        (BIG5_TEXT * 40, "big5", "big5"),
        (BIG5_TEXT, "gb18030", "gb18030"),
        (KOREAN, "cp949", "cp949"),
        (KOREAN * 40, "euc_kr", "cp949"),
        ("faq,제품 청소 방법,제품을 청소\n", "euc_kr", "cp949"),
        ("mot,Les élèves étonnés ?,Où est le garçon\n", "cp1252", "cp1252"),
        ("versand,Wie kann ich es zurückschicken?,Bitte drücken\n", "cp1252", "cp1252"),
        ("pytanie,Zażółć gęślą jaźń,Dziękuję bardzo\n" * 9, "cp1250", "cp1250"),
        ("слово,Привет как дела?,Сегодня хорошая погода\n", "cp1251", "cp1251"),
        ("слово,Привет как дела?,Сегодня хорошая погода\n" * 5, "koi8_r", "koi8_r"),
        ("λέξη,Τι κάνεις σήμερα;,Πολύ καλά ευχαριστώ\n", "cp1253", "cp1253"),
        ("x,玫瑰,芍药\n", "gb18030", "gb18030"),
        ("x,你好吗,我很好\n", "gb18030", "gb18030"),
    ],
)
def test_an_encoding_that_is_not_proved_is_refused_with_proposals(
    tmp_path: Path, text: str, codec: str, proposed: str
) -> None:
    path = write(tmp_path, HEADER + text, encoding=codec)
    check_one_line(path, 2, "is not valid utf-8", "byte 0x", "Save the file as UTF-8", f"data.encoding={proposed} ")
    with pytest.raises(DataError, match="is not valid utf-8"):
        read_file(write(tmp_path, '{"a": "' + text.replace("\n", " ") + '"}', "a.jsonl", codec))
    assert triples(read_file(path, encoding=codec)) == [tuple(line.split(",")) for line in text.split("\n") if line]


def test_one_letter_in_english_is_no_proof_of_chinese(tmp_path: Path) -> None:
    text = HEADER + "travel,Where is Rome?,In Italy.\n" * 200 + "travel,Where is Kraków airport?,Near it.\n"
    (found,) = refused(write(tmp_path, text, encoding="cp1252"))
    assert found.startswith("202: ")
    assert "data.encoding=cp1252 reads it as `l,Where is Kraków airport?" in found
    assert "data.encoding=gb18030 reads it as" in found


def test_a_private_use_letter_disproves_gb18030(tmp_path: Path) -> None:
    assert read_file(write(tmp_path, HEADER + CHINESE * 9, encoding="gb18030")).encoding == "gb18030"
    raw = (HEADER + CHINESE * 9).encode("gb18030") + b"a,\xaa\xa1,c\n"
    assert "data.encoding=" in refused(write(tmp_path, raw))[0]


@pytest.mark.parametrize("codec", ["utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_utf_32_is_named(tmp_path: Path, codec: str, name: str) -> None:
    text = HEADER + CHINESE if name == "a.csv" else '{"category": "c", "human": "q", "assistant": "a"}\n'
    path = write(tmp_path, text, name, codec)
    with pytest.raises(DataError, match=r"this is UTF-32; save it as UTF-8, or set data\.encoding=utf-32"):
        read_file(path)
    assert len(read_file(path, encoding=codec).records) == text.count("\n") - (name == "a.csv")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"<!DOCTYPE html><html>", "this is HTML"),
        (b"\xef\xbb\xbf\r\n<html xmlns:o=", "this is HTML"),
        (b"<table><tr><td>category", "this is HTML"),
        (b"<?xml version='1.0'?>", "HTML or XML"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old Excel"),
        (b"%PDF-1.7", "this is a PDF"),
        (b"PK\x03\x04\x14\0\x06\0", "Excel workbook or a zip"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_what_is_no_text_is_named(tmp_path: Path, raw: bytes, said: str, name: str) -> None:
    with pytest.raises(DataError, match=said):
        read_file(write(tmp_path, raw, name))


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_an_odd_bad_byte_in_utf8_is_an_error_with_its_place(tmp_path: Path, newline: str) -> None:
    good = (HEADER + CHINESE).replace("\n", newline).encode()
    raw = good + b"a,b\xff,c\n"
    check_one_line(
        write(tmp_path, raw), 4, f"byte 0xFF at byte offset {len(good) + 3}", "not valid utf-8", "fix that place"
    )


def test_a_replacement_character_of_the_file_itself_is_text(tmp_path: Path) -> None:
    assert triples(read_file(write(tmp_path, HEADER + "a,b\ufffd,c\n"))) == [("a", "b\ufffd", "c")]
    path = write(tmp_path, (HEADER + "a," + "\ufffd" * 99 + ",c\n").encode() + b"a,\xe4\xbd,c\n")
    check_one_line(path, 3, "byte 0xE4")
    assert "give its encoding" not in refused(path)[0]


def test_a_damaged_gb18030_file_is_said_to_be_one(tmp_path: Path) -> None:
    good = (HEADER + CHINESE).encode("gb18030")
    check_one_line(
        write(tmp_path, good + b"a,b\xff,c\n"), 4, f"byte 0xFF at byte offset {len(good) + 3} is not valid gb18030"
    )


@pytest.mark.parametrize(
    ("raw", "encoding", "line", "offset"),
    [
        (HEADER.encode() + b"a,\xff,c\n", "utf-8", 2, 27),
        (HEADER.encode() + b"a,\xff,c\n", "utf-8-sig", 2, 27),
        (codecs.BOM_UTF8 + HEADER.encode() + b"a,\xff,c\n", "auto", 2, 30),
        (codecs.BOM_UTF16_LE + HEADER.encode("utf-16-le") + b"a\0,\0\0\xd8,\0", "auto", 2, 56),
        (codecs.BOM_UTF16_LE + HEADER.encode("utf-16-le") + b"a", "auto", 2, 52),
        (HEADER.encode("utf-16-be") + b"\0a\0", "auto", 2, 52),
        (HEADER.encode() + "a,é,c\n".encode("latin-1"), "ascii", 2, 27),
        (HEADER.encode() + b"a,\xff,c\n", "gb18030", 2, 27),
    ],
)
def test_a_given_or_marked_encoding_is_strict(
    tmp_path: Path, raw: bytes, encoding: str, line: int, offset: int
) -> None:
    check_one_line(write(tmp_path, raw), line, f"byte 0x{raw[offset]:02X} at byte offset {offset} ", encoding=encoding)


def test_a_given_encoding_wins(tmp_path: Path) -> None:
    path = write(tmp_path, (HEADER + "x,é,ü\n").encode())
    assert triples(read_file(path, encoding="cp1252")) == [("x", "Ã©", "Ã¼")]
    path = write(tmp_path, HEADER + CHINESE, encoding="utf-8-sig")
    assert triples(read_file(path, encoding="utf-8")) == CHINESE_ROWS


@pytest.mark.parametrize("encoding", ["gb18o30", "base64", "", "a\0b"])
def test_an_unknown_encoding(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(DataError, match="not a text encoding") as caught:
        read_file(write(tmp_path, HEADER + CHINESE), encoding=encoding)
    assert encoding != "gb18o30" or "Did you mean `gb18030" in str(caught.value)


def test_nul_characters(tmp_path: Path) -> None:
    found = refused(write(tmp_path, HEADER + "a,b\0,c\nd,e,f\ng,h,i\0\0\n"))
    assert [line.split(":")[0] for line in found] == ["2", "4"]
    assert all("NUL character" in line for line in found)
    assert refused(write(tmp_path, '{"human": "a\0"}\n', "a.jsonl"))[0].startswith("1: a NUL character")


# Cells


@pytest.mark.parametrize(
    "cell",
    [
        *("NULL", "NaN", "NA", "None", "nan", "null", "N/A", "-", "0", "007", "1.0", "TRUE", "1e5", "#N/A"),
        *(" lead", "trail ", "\ttab\t", " \n edge \n", "nbsp\u00a0", "a\u2028b\u2029c\x0bd\x0ce\x85f", "\ufeffmark"),
        *(
            "a,b",
            'say "hi"',
            '"',
            '""',
            "\n",
            "one\ntwo",
            "one\r\ntwo",
            "one\rtwo",
            "\r\n\r\n",
            "a;b|c\td",
            "\\n",
            "\\",
        ),
        *("'", "=1+1", "# no comment", "😀 𠀀", "e\u0301", "\ufffd", "﷽", "\x1a", "`${x}` {{y}}"),
    ],
)
def test_cells_are_kept_exactly(tmp_path: Path, cell: str) -> None:
    filled = cell if cell.strip() else f"x{cell}y"
    rows = [(filled, "b", "c"), ("a", filled, "c"), ("a", "b", filled), ("d", "e", "f")]
    lines = [",".join('"' + c.replace('"', '""') + '"' for c in row) for row in rows]
    for newline in ("\n", "\r\n", "\r"):
        path = write(tmp_path, newline.join(["category,human,assistant", *lines]))
        assert triples(read_file(path)) == rows


def test_an_unquoted_cell_keeps_its_spaces_and_inner_quotes(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + ' a , say "hi" , NULL \n')
    assert triples(read_file(path)) == [(" a ", ' say "hi" ', " NULL ")]


def test_the_line_is_where_the_row_begins(tmp_path: Path) -> None:
    text = '\n\r\ncategory,human,assistant\n"a","1\n2\r\n3","c"\n\n\nd,e,f\r"g\n","h\n\n","i"\nj,k,l'
    assert [r.line for r in read_file(write(tmp_path, text)).records] == [4, 9, 10, 14]


def test_a_cell_of_ten_megabytes(tmp_path: Path) -> None:
    big = ('一 line, with "quotes"' + " " * 210 + "\r\n") * 45_000
    assert len(big.encode()) > 10_000_000
    path = write(tmp_path, HEADER + 'a,b,"' + big.replace('"', '""') + '"\nd,e,f\n')
    before = csv.field_size_limit(131_072)
    try:
        reading = read_file(path)
        csv.field_size_limit(1 << 40)
        read_file(write(tmp_path, HEADER + "a,b,c\n"))
        assert csv.field_size_limit() == 1 << 40
    finally:
        csv.field_size_limit(before)
    assert triples(reading) == [("a", "b", big), ("d", "e", "f")]
    assert reading.records[1].line == 45_003


# Header and delimiter


@pytest.mark.parametrize(
    "header",
    [
        *("assistant,category,human", " ASSISTANT , CATEGORY ,HUMAN", '"assistant","category","human"'),
        *(
            "\ufeffassistant, \ufeff category,human \ufeff",
            '"\n assistant",category,human',
        ),
    ],
)
def test_header_names_match_in_any_case_and_order(tmp_path: Path, header: str) -> None:
    for text in (f"{header}\nx,y,z\n", f"\n{header.replace(',', ';')}\nx;y;z\n"):
        assert triples(read_file(write(tmp_path, text))) == [("y", "z", "x")]
        assert triples(read_file(write(tmp_path, text.encode("utf-16-le")))) == [("y", "z", "x")]


def test_a_mark_before_a_quoted_name(tmp_path: Path) -> None:
    text = '"category","human","assistant"\na,b,c\n'
    assert triples(read_file(write(tmp_path, text, encoding="utf-8-sig"), encoding="utf-8")) == [("a", "b", "c")]


def test_other_columns_go_to_extra(tmp_path: Path) -> None:
    path = write(tmp_path, "id, Note ,human,assistant,category,\n7, n ,h,a,c,\n")
    (record,) = read_file(path).records
    assert (record.category, record.human, record.assistant, record.file) == ("c", "h", "a", str(path))
    assert record.extra == {"id": "7", "Note": " n "}


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["a.csv", "a.TSV"])
def test_the_delimiter_is_told_by_the_header(tmp_path: Path, mark: str, name: str) -> None:
    others = ",;\t|".replace(mark, "")
    path = write(tmp_path, mark.join(["category", "human", "assistant"]) + f"\na{mark}b{others}{mark}c\n", name)
    reading = read_file(path)
    assert triples(reading) == [("a", f"b{others}", "c")]
    assert (reading.delimiter, reading.format) == (mark, "csv")


def test_an_extra_column_does_not_mislead_the_delimiter(tmp_path: Path) -> None:
    path = write(tmp_path, "a|b|c|d|e;CATEGORY;HUMAN;ASSISTANT\n1;2;3;4\n")
    assert read_file(path).delimiter == ";"
    path = write(tmp_path, '"say; so",category,human,assistant\n1,2,3,4\n')
    assert triples(read_file(path)) == [("2", "3", "4")]


@pytest.mark.parametrize(("given", "mark"), [("^", "^"), ("\t", "\t"), ("\\t", "\t"), ("tab", "\t"), ("§", "§")])
def test_a_given_delimiter(tmp_path: Path, given: str, mark: str) -> None:
    path = write(tmp_path, f"category{mark}human{mark}assistant\na{mark}b,{mark}c\n")
    reading = read_file(path, delimiter=given)
    assert triples(reading) == [("a", "b,", "c")]
    assert reading.delimiter == mark


@pytest.mark.parametrize("given", ["", ",,", '"', "\n", "\r"])
def test_a_delimiter_that_cannot_be_one(tmp_path: Path, given: str) -> None:
    with pytest.raises(DataError, match="must be one character"):
        read_file(write(tmp_path, HEADER + "a,b,c\n"), delimiter=given)


def test_a_given_delimiter_is_not_second_guessed(tmp_path: Path) -> None:
    found = refused(write(tmp_path, HEADER + "a,b,c\n"), delimiter=";")
    assert len(found) == 1
    assert "one cell, `category,human,assistant`, with the delimiter ';'; set data.delimiter=','" in found[0]


def test_a_delimiter_that_is_not_known_is_named(tmp_path: Path) -> None:
    check_one_line(write(tmp_path, "category^human^assistant\na^b^c\n"), 1, "is one cell", "set data.delimiter='^'")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("declared", "mark"), [("sep=;", ";"), ('"sep=;"', ";"), ("SEP=\t", "\t"), ("sep=^", "^")])
def test_a_line_that_declares_the_delimiter(tmp_path: Path, declared: str, mark: str, newline: str) -> None:
    text = f"{declared}\n" + mark.join(["category", "human", "assistant"]) + f"\na{mark}b,|{mark}c\nd{mark}e\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path = write(tmp_path, text.replace("\n", newline), encoding=encoding)
        check_one_line(path, 4, "2 cells found, 3 expected")
        reader = FileReader(path, on_skip=lambda *_: None)
        assert [(r.category, r.human, r.assistant, r.line) for r in reader] == [("a", "b,|", "c", 3)]
        assert reader.delimiter == mark
    assert read_file(write(tmp_path, "category,human,assistant\nsep=;,b,c\n")).records[0].category == "sep=;"
    check_one_line(write(tmp_path, 'sep=;\ncategory;human;assistant\na;"b;c\n'), 3, "never closed")


def test_empty_columns_at_the_end_are_dropped_and_noted(tmp_path: Path) -> None:
    text = "category,human,assistant,,,\na,b,c,,,\nd,e,f\ng,h,i,\nj,k,l,,x,\nm,n,o,,,,\n"
    path = write(tmp_path, text)
    assert refused(path)[:2] == [
        "5: cell 5 is filled, its column has no name; name it or empty the cell",
        "6: 7 cells found, 3 expected; a cell that holds the delimiter ',' must be quoted, an unquoted one splits it",
    ]
    reader = FileReader(path, on_skip=lambda *_: None)
    assert [(r.category, r.human, r.assistant, r.extra) for r in reader] == [
        ("a", "b", "c", {}), ("d", "e", "f", {}), ("g", "h", "i", {})
    ]  # fmt: skip
    assert reader.notes == ["dropped 3 empty columns without a name at the end"]
    check_one_line(write(tmp_path, HEADER + "a,b,c,\n"), 2, "4 cells found, 3 expected")  # an answer `c,` may be meant


def test_a_quote_that_swallows_rows_is_named(tmp_path: Path) -> None:
    text = HEADER + 'a,"what is b,b\na,q2,a2\na,q3,a3\na,say c",c\na,q5,a5\n'
    check_one_line(write(tmp_path, text), 2, "a cell runs to line 5", "swallowed rows")
    text = HEADER + 'a,q,a\nb,"what is b,b\r\na,say c",c\r\na,q5,a5\n'
    check_one_line(write(tmp_path, text), 3, "a cell runs to line 4", "swallowed rows")
    for answer in ("one, two, a\nb, c\nd, e, f", "First,\nlast, and, c", "x\n,,"):
        path = write(tmp_path, HEADER + f'a,b,"{answer}"\n')
        reader = FileReader(path)
        assert [(r.category, r.human, r.assistant) for r in reader] == [("a", "b", answer)]
        assert reader.notes == []
    reader = FileReader(write(tmp_path, HEADER + 'a,"what is b,b\nx,y,z\nc, d",c\n'))
    assert len(list(reader)) == 1
    assert reader.notes[0].startswith(
        "1 rows run over several lines that each have 3 cells like the header, the first at"
    )


def test_merged_cells_are_filled_down_only_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path, "Category,human,assistant,topic\na,b,c,t\n,e,f,\n ,h,i,u\nj,k,l,\n")
    assert [line.split(":")[0] for line in refused(path)[:2]] == ["3", "4"]
    assert "data.fill_down=[category]" in refused(path)[0]
    reader = FileReader(path, How(fill_down=("category", "TOPIC")))
    assert [(r.category, r.extra["topic"]) for r in reader] == [("a", "t"), ("a", "t"), ("a", "u"), ("j", "u")]
    assert reader.notes == [
        "filled 2 empty cells of `category` with the cell above (data.fill_down)",
        "filled 2 empty cells of `TOPIC` with the cell above (data.fill_down)",
    ]
    check_one_line(path, 1, "data.fill_down: no column `kind`; found `Category`", fill_down=("kind",))
    check_one_line(write(tmp_path, HEADER + ",b,c\nd,e,f\n"), 2, "`category` of this row", fill_down=("category",))
    with pytest.raises(DataError, match=r"data.fill_down is for CSV and workbooks, this is jsonl"):
        read_file(
            write(tmp_path, '{"category": "", "human": "q", "assistant": "a"}', "a.jsonl"), fill_down=("category",)
        )


@pytest.mark.parametrize("again", ["category,human,assistant\n", " category,human , assistant\r\n"])
def test_a_header_that_comes_again_is_no_row(tmp_path: Path, again: str) -> None:
    check_one_line(write(tmp_path, HEADER + "a,b,c\n" + again + "d,e,f\n"), 3, "the header again")


@pytest.mark.parametrize(
    ("text", "line", "fragments"),
    [
        ("category,humna,assistant\n1,2,3\n", 1, ["no column `human`", "found `category`, `humna`", "is `humna`"]),
        ("category;humna;assistant\n1;2;3\n", 1, ["no column `human`", "nearest is `humna`", "the delimiter is ';'"]),
        ("\nhuman,assistant\n1,2\n", 2, ["no column `category`", "found `human`", "data.columns={category:null}"]),
        ("category,human,HUMAN,assistant\n1,2,3,4\n", 1, ["`HUMAN` is repeated", "columns 2 and 3", "rename or"]),
        ("x,category,human,assistant, x\n1,2,3,4,5\n", 1, ["`x` is repeated", "columns 1 and 5"]),
        ("\ncategory,human,assistant\n", 2, ["no rows", "add at least one row"]),
        ("category,human,assistant\r\n\r\n\r\n", 1, ["no rows"]),
        ('category,"human,assistant\na,b,c\n', 1, ["never closed"]),
    ],
)  # fmt: skip
def test_header_refusals(tmp_path: Path, text: str, line: int, fragments: list[str]) -> None:
    check_one_line(write(tmp_path, text), line, *fragments)


def test_each_missing_column_is_named(tmp_path: Path) -> None:
    (found,) = refused(write(tmp_path, "title;body\n1;2\n"))
    assert "no column `category`, `human`, `assistant`; found `title`, `body`" in found
    assert "'data.columns={human:title,assistant:body,category:null}'" in found


@pytest.mark.parametrize(
    ("name", "raw", "found"),
    [
        ("a.csv", b"", "0 bytes"),
        ("a.csv", codecs.BOM_UTF8, "3 bytes"),
        ("a.csv", codecs.BOM_UTF16_LE, "2 bytes"),
        ("a.csv", b"\r\n\n\r", "only blank lines"),
        ("a.jsonl", b"", "0 bytes"),
        ("a.jsonl", codecs.BOM_UTF8, "3 bytes"),
        ("a.jsonl", b"\n\n", "only blank lines"),
    ],
)
def test_an_empty_file(tmp_path: Path, raw: bytes, found: str, name: str) -> None:
    with pytest.raises(DataError, match=f"the file is empty .*{found}"):
        read_file(write(tmp_path, raw, name))


# Rows


@pytest.mark.parametrize(
    ("rows", "line", "fragments"),
    [
        ("a,b,c\nd,e,f,g\n", 3, ["4 cells found, 3 expected", "holds the delimiter ',' must be quoted"]),
        ("a,b,c\n\nd,e\n", 4, ["2 cells found, 3 expected", "add the missing cell"]),
        ('a,"b\n\nb",c\nd,"e\ne\n"\nf,g,h\n', 5, ["2 cells found, 3 expected", "(the row runs to line 7)"]),
        ("a,b,c\n \n", 3, ["1 cells found, 3 expected"]),
        ('a,b,c\n""\n', 3, ["1 cells found"]),
        ('a,"b\nb",c\nd,"e,f\ng,h,i\n', 4, ["a quote opens", "never closed"]),
        ('a,b,c\nd,e,"', 3, ["never closed"]),
        ('a,b,c\nd,"e\n" e,f\ng,h,i\n', 3, ["closes before its cell ends (at line 4)", 'each quote twice ("")']),
        ("a,,c\n", 2, ["`human` of this row is empty", "fill it or delete the row"]),
        ("a,b,\n", 2, ["`assistant` of this row is empty"]),
        ('a,b,c\na,b,"\n \t\u3000\u00a0"\n', 3, ["`assistant` of this row is only white space"]),
        ("a,  ,c\n", 2, ["`human` of this row is only white space"]),
    ],
)
def test_row_refusals(tmp_path: Path, rows: str, line: int, fragments: list[str]) -> None:
    check_one_line(write(tmp_path, HEADER + rows), line, *fragments)
    check_one_line(write(tmp_path, (HEADER + rows).encode("utf-16")), line, *fragments)


def test_all_problems_are_listed_in_order(tmp_path: Path) -> None:
    found = refused(write(tmp_path, HEADER + 'a,,\nb\nc,d,e\nf,g\0,h\n,,,\ni,j,"k\n'))
    assert [line.split(":")[0] for line in found] == ["2", "2", "3", "5", "6", "7"]


@pytest.mark.parametrize(("bad", "tail"), [(MAX_LISTED, None), (MAX_LISTED + 1, "and 1 more"), (500, "and 480 more")])
def test_at_most_twenty_are_listed(tmp_path: Path, bad: int, tail: str | None) -> None:
    found = refused(write(tmp_path, HEADER + "a,b\n" * bad))
    assert [line.split(":")[0] for line in found[:20]] == [str(line) for line in range(2, 22)]
    assert found[20:] == ([tail] if tail else [])


# JSONL


def objects(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_jsonl(tmp_path: Path, encoding: str, newline: str) -> None:
    rows: list[dict[str, object]] = [
        {"category": "数学", "human": " 问\n\u2028?\r\n", "assistant": 'NULL "x"', "id": 7, "tags": ["a", {"b": None}]},
        {"assistant": "NaN", "human": "😀", "category": " ."},
    ]
    text = "\n" + objects(rows[0]) + " \t\n\n" + objects(rows[1])
    path = write(tmp_path, text.replace("\n", newline), "a.JSONL", encoding)
    reading = read_file(path)
    assert triples(reading) == [(r["category"], r["human"], r["assistant"]) for r in rows]
    assert [r.line for r in reading.records] == [2, 5]
    assert [r.extra for r in reading.records] == [{"id": 7, "tags": ["a", {"b": None}]}, {}]
    assert (reading.encoding, reading.delimiter, reading.format) == (encoding, None, "jsonl")
    assert reading.records[0].file == str(path)


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("[1, 2]", ["[1, 2] is not an object"]),
        ('"text"', ['"text" is not an object']),
        ("null", ["null is not an object"]),
        ('{"category": "a" "human": 1}', ["bad JSON at column 18", "Expecting ',' delimiter"]),
        ('{"category": "a", ', ["bad JSON at column"]),
        ("{} {}", ["bad JSON at column 4", "Extra data"]),
        ('{"category": "a", "human": "tab\there", "assistant": "c"}', ["bad JSON at column 32", "control character"]),
        ('{"category": "a", "human": "b", "assistant": "c", "x": NaN}', ["bad JSON: NaN is not JSON"]),
        ('{"category": "a", "human": "b", "assistant": "c", "human": "d"}', ["the key `human` is repeated"]),
        ("[" * 100_000, ["bad JSON: ", "recursion"]),
        ('{"category": "a", "humam": "b", "assistant": "c"}', ["no key `human`", "found `category`", "is `humam`"]),
        ('{"category": "a", "Human": "b", "assistant": "c"}', ["no key `human`", "nearest is `Human`"]),
        ('{"human": "b", "assistant": "c"}', ["no key `category`", "data.columns={category:null}"]),
        ('{"category": "a", "human": 5, "assistant": "c"}', ["`human` is 5, not a string"]),
        ('{"category": null, "human": "b", "assistant": "c"}', ["the `category` of this row is empty"]),
        ('{"category": "a", "human": "b", "assistant": ["c"]}', ['`assistant` is ["c"], not a string']),
        ('{"category": "a", "human": "", "assistant": "c"}', ["`human` of this row is empty"]),
        ('{"category": "a", "human": "b", "assistant": " \\n"}', ["`assistant` of this row is only white space"]),
        ('{"category": "a", "human": "\\ud83d", "assistant": "c"}', ["`human` holds", "surrogate"]),
        ('{"category": "a", "human": "b", "assistant": "\\u0000"}', ["`assistant` holds", "\\u0000"]),
    ],
)  # fmt: skip
def test_jsonl_refusals(tmp_path: Path, line: str, fragments: list[str]) -> None:
    good = objects({"category": "a", "human": "b", "assistant": "c"})
    check_one_line(write(tmp_path, f"{good}\n{line}\n{good}", "a.jsonl"), 3, *fragments)


def test_jsonl_lists_all_problems(tmp_path: Path) -> None:
    found = refused(write(tmp_path, '{}\n{"category": "a", "human": "", "assistant": 1}\n{\n[]\n', "a.jsonl"))
    assert [line.split(":")[0] for line in found] == ["1", "2", "2", "3", "4"]
    assert "found none" in found[0]


def test_jsonl_of_blank_lines(tmp_path: Path) -> None:
    check_one_line(write(tmp_path, " \n\t\n", "a.jsonl"), 1, "no rows", "only blank lines")


def test_jsonl_is_utf8_unless_an_encoding_is_given(tmp_path: Path) -> None:
    text = objects(*({"category": c, "human": h, "assistant": a} for c, h, a in CHINESE_ROWS))
    legacy = write(tmp_path, text, "a.jsonl", "gb18030")
    check_one_line(legacy, 1, "is not valid utf-8", "byte offset 14")
    assert triples(read_file(legacy, encoding="gb18030")) == CHINESE_ROWS
    wide = write(tmp_path, text, "b.jsonl", "utf-16")
    with pytest.raises(DataError, match="JSONL must be UTF-8, this is utf-16"):
        read_file(wide)
    assert triples(read_file(wide, encoding="utf-16")) == CHINESE_ROWS


# Files


def test_format(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"suffix `.xyz` is not known; use one of .csv, .tsv, .jsonl"):
        read_file(tmp_path / "a.xyz")
    with pytest.raises(DataError, match=r"a.txt: plain text has no questions and answers; .* data.format=csv or"):
        read_file(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"a.XLS: an old Excel workbook; save it as .xlsx or as CSV"):
        read_file(tmp_path / "a.XLS")
    with pytest.raises(DataError, match=r"suffix `` is not known"):
        read_file(tmp_path / "a")
    with pytest.raises(
        DataError, match="format `tsv` is not known; use auto, csv, jsonl, json, parquet, arrow or xlsx"
    ):
        read_file(tmp_path / "a.csv", format="tsv")
    assert triples(read_file(write(tmp_path, HEADER + "a,b,c", "a.txt"), format="csv")) == [("a", "b", "c")]
    rows = objects({"category": "a", "human": "b", "assistant": "c"})
    assert triples(read_file(write(tmp_path, rows, "b.csv"), format="jsonl")) == [("a", "b", "c")]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for path in (tmp_path / "missing.csv", tmp_path / "folder.csv"):
        for read in (read_file, sha256_file):
            with pytest.raises(DataError, match=f"{path.name}: cannot be read"):
                read(path)


def test_sha256(tmp_path: Path) -> None:
    raw = bytes(range(256)) * 9000
    assert sha256_file(write(tmp_path, raw)) == hashlib.sha256(raw).hexdigest()


def test_reading_imports_nothing_heavy(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + CHINESE, encoding="gb18030")
    heavy = "{'torch', 'numpy', 'pandas', 'charset_normalizer', 'transformers'}"
    code = f"import sys; from sftx.data.records.read import read_file; read_file({str(path)!r}); print({heavy} & set(sys.modules))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Round trips

ALPHABET = ["的", "是", "我", "们", "好", "国", "。", "，", "a", "B", "7", " ", "\n", "\r\n", "\r", ",", ";", "\t", "|"]
ALPHABET += ['"', "'", "\\", "é", "😀", "\u2028", "\u3000", "NULL", "nan"]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_random_records_come_back(tmp_path: Path, encoding: str, seed: int) -> None:
    random_ = random.Random(seed)
    rows = []
    for _ in range(60):
        cells = ["".join(random_.choices(ALPHABET, k=random_.randint(0, 30))) for _ in range(4)]
        rows.append(["类" + cells[0], cells[1], "问" + cells[2], cells[3] + "。"])
    order = random_.sample(["category", "note", "human", "assistant"], 4)
    places = [["category", "note", "human", "assistant"].index(name) for name in order]
    mark, end = ",;\t|"[seed % 4], ("\r\n", "\n", "\r\n", "\r")[seed // 2]
    # With another line end the writer leaves a lone CR unquoted (Python 3.11 and 3.12), and that ends a row.
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL) if end == "\r\n" else (csv.QUOTE_ALL,):
        out = io.StringIO(newline="")
        writer = csv.writer(out, delimiter=mark, lineterminator=end, quoting=quoting)
        writer.writerow(order)
        writer.writerows([[row[place] for place in places] for row in rows])
        reading = read_file(write(tmp_path, out.getvalue(), encoding=encoding))
        assert [[r.category, r.extra["note"], r.human, r.assistant] for r in reading.records] == rows
        assert (reading.encoding, reading.delimiter) == (encoding, mark)


# The real files


@pytest.fixture(scope="module")
def shared() -> Path:
    if "SFTX_SHARED" not in os.environ:
        pytest.skip("SFTX_SHARED (the folder with the real data) is not set")
    return Path(os.environ["SFTX_SHARED"]) / "data"


@pytest.mark.parametrize(
    ("name", "rows", "encoding"),
    [
        ("alpaca_zh_demo.csv", 1000, "utf-8"),
        ("identity.csv", 91, "utf-8"),
        ("questions_gen_postgres.csv", 210, "utf-8"),
        ("self_instruct_seed.csv", 175, "utf-8"),
        ("alpaca_zh_200.gb18030.csv", 200, "gb18030"),
        ("alpaca_zh_200.utf16.csv", 200, "utf-16"),
    ],
)
def test_the_real_files(shared: Path, name: str, rows: int, encoding: str) -> None:
    reading = read_file(shared / name)
    assert (len(reading.records), reading.encoding) == (rows, encoding)
    with (shared / name).open(encoding=encoding, newline="") as file:
        oracle = [(row["category"], row["human"], row["assistant"]) for row in csv.DictReader(file)]
    assert triples(reading) == oracle


@pytest.mark.parametrize("name", ["alpaca_zh_200.gb18030.csv", "alpaca_zh_200.utf16.csv"])
def test_the_real_legacy_files_equal_the_utf8_one(shared: Path, name: str) -> None:
    def unified(path: Path) -> list[tuple[str, ...]]:
        return [tuple(c.replace("\r\n", "\n").replace("\r", "\n") for c in row) for row in triples(read_file(path))]

    assert unified(shared / name) == unified(shared / "alpaca_zh_demo.csv")[:200]
