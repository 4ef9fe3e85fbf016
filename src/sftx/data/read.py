"""One file to exact records, or one `DataError` that lists what is wrong and where.

Nothing is repaired: no cell is stripped, no text becomes a null, no byte becomes a replacement
character. What had to be detected (encoding, delimiter, format) is handed back to be said.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn, TypeAlias

from sftx.data.record import Record, pair
from sftx.errors import DataError, did_you_mean, nearest

COLUMNS = ("category", "human", "assistant")
FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl"}
DELIMITERS = (",", ";", "\t", "|")
MAX_LISTED = 20
# Up to this share of bad sequences a file is UTF-8 with an odd bad byte; Chinese in GB18030 has 0.4 and more.
MAX_BAD_SHARE = 0.2
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# A strict decode proves little (GB18030 takes most Big5, Korean and Japanese bytes), so a legacy
# encoding must also yield enough of the letters that any text of its language is full of.
_CHINESE = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去"
    "法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点"
    "正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿"
    "這個們來時國說對學會過發後麼為與間問題從現進種關樣點還機體無業內開當沒動實長將兩應頭見產話給門東聲員論處義幾條係氣電數報結務場計"
)
_KANA = frozenset(map(chr, range(0x3041, 0x30FF)))
_HANGUL = frozenset("이다는을의에가고지하기로사한를은도서리나어대해인있수들자시아그일니요것정보원장안과만으")
# Encoding, letters, least share of them. Other encodings measure up to 0.06 as GB18030, 0.21 as Big5.
LEGACY = (
    ("gb18030", _CHINESE, 0.15),
    ("big5hkscs", _CHINESE, 0.4),
    ("cp932", _KANA, 0.4),
    ("cp949", _HANGUL, 0.3),
)
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_NEWLINE = re.compile(r"\r\n|\r|\n")
_FOREIGN_LETTER = re.compile(r"[^\W\x00-\x7f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Line and what is wrong there.
Problems: TypeAlias = list[tuple[int, str]]


@dataclass(frozen=True)
class Reading:
    """The records of one file and what was detected about it."""

    records: list[Record]
    encoding: str
    delimiter: str | None
    format: str


def _raise(path: Path, problems: Problems) -> NoReturn:
    """Raise one DataError that lists the problems in the order of their lines."""
    listed = sorted(problems, key=lambda problem: problem[0])
    said = [f"{path}:{line}: {text}" for line, text in listed[:MAX_LISTED]]
    if len(listed) > MAX_LISTED:
        said.append(f"and {len(listed) - MAX_LISTED} more")
    raise DataError("\n".join(said))


def read_file(path: Path, *, format: str = "auto", encoding: str = "auto", delimiter: str = "auto") -> Reading:  # noqa: A002
    """Read a CSV, TSV or JSONL file exactly.

    Raises DataError when the file, its format or its encoding is not known, or any row is not sound.
    """
    path = Path(path)
    kind = FORMATS.get(path.suffix.lower()) if format == "auto" else format
    if kind is None:
        raise DataError(f"{path}: the suffix `{path.suffix}` is not known; use one of {', '.join(FORMATS)}")
    if kind not in FORMATS.values():
        raise DataError(f"{path}: format `{format}` is not known; use auto, csv or jsonl")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if raw.startswith(b"PK\x03\x04"):
        raise DataError(f"{path}: this is an Excel workbook or a zip file, not text; save it as CSV in UTF-8")
    text, used = _decode(path, raw, encoding, kind)
    # A second mark (or an explicit "utf-8") leaves one here; it is never part of the first name.
    text = text.lstrip("\ufeff")
    if not text.strip("\r\n"):
        found = "it has only blank lines" if text else f"{len(raw)} bytes"
        raise DataError(f"{path}: the file is empty ({found}); it needs {', '.join(COLUMNS)} and at least one row")
    problems: Problems = []
    if "\0" in text:
        nul = "a NUL character; the file is damaged or binary, export it again"
        problems += [(number, nul) for number, line in enumerate(_lines(text), 1) if "\0" in line]
    # The limit is csv's own and for the whole process: raise it, never lower it.
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    mark = _delimiter(path, text, delimiter) if kind == "csv" else None
    records = _read_csv(path, text, mark, problems) if mark else _read_jsonl(path, text, problems)
    if problems:
        _raise(path, problems)
    return Reading(records, used, mark, kind)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hex; raises DataError when it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _lines(text: str) -> Iterator[str]:
    """Yield lines with their endings: CRLF, CR and LF only, where str.splitlines breaks at U+2028 too."""
    return (match.group() for match in _LINE.finditer(text))


def _decode(path: Path, raw: bytes, encoding: str, kind: str) -> tuple[str, str]:
    """Return the text and its encoding; raises DataError when the bytes do not prove one."""
    if encoding != "auto":
        return _strict(path, raw, encoding), encoding
    for mark, name in BOMS:
        if raw.startswith(mark):
            if kind == "jsonl" and name != "utf-8-sig":
                raise DataError(f"{path}: JSONL must be UTF-8, this is {name}; save it as UTF-8 or give its encoding")
            return _strict(path, raw, name), name
    if kind == "jsonl":
        return _strict(path, raw, "utf-8"), "utf-8"
    wide = _utf16_without_bom(raw)
    if wide:
        return _strict(path, raw, wide), wide
    try:
        return raw.decode("utf-8"), "utf-8"
    except UnicodeDecodeError as error:
        return _decode_legacy(path, raw, error)


def _utf16_without_bom(raw: bytes) -> str | None:
    """Recognise UTF-16 by a required name in the header, each letter with its NUL."""
    head = raw[:4096].lower()
    for name in ("utf-16-le", "utf-16-be"):
        # In the other byte order the same bytes stand at an odd offset; "not found" (-1) is odd too.
        if any(head.find(column.encode(name)) % 2 == 0 for column in COLUMNS):
            return name
    return None


def _decode_legacy(path: Path, raw: bytes, error: UnicodeDecodeError) -> tuple[str, str]:
    """Decode what is not UTF-8 by the first legacy encoding that proves itself; else raise DataError."""
    if _bad_share(raw, "utf-8") <= MAX_BAD_SHARE:
        raise DataError(_bad_byte(path, raw, "utf-8", error)) from error
    possible: list[str] = []
    for name, letters, share in LEGACY:
        try:
            text = raw.decode(name)
        except UnicodeDecodeError as bad:
            if _bad_share(raw, name) <= MAX_BAD_SHARE and _looks_like(raw.decode(name, "ignore"), letters, share):
                raise DataError(_bad_byte(path, raw, name, bad)) from bad
        else:
            if _looks_like(text, letters, share):
                return text, name
            possible.append(name)
    import charset_normalizer  # only an undecided file pays for it

    guess = charset_normalizer.from_bytes(raw[max(error.start - 4096, 0) :][:65536]).best()
    likely = dict.fromkeys(possible[:1] + ([guess.encoding] if guess else []))
    hint = f" (it may be {' or '.join(likely)})" if likely else ""
    raise DataError(f"{_bad_byte(path, raw, 'utf-8', error)}, or give its encoding{hint}: it cannot be told for sure")


def _bad_share(raw: bytes, encoding: str) -> float:
    """Return the share of bad sequences among all that are not ASCII."""
    text = raw.decode(encoding, "replace")
    foreign = len(text) - len(text.encode("ascii", "ignore"))
    # A U+FFFD that the file really holds is not a bad sequence.
    bad = text.count("\ufffd") - raw.decode(encoding, "ignore").count("\ufffd")
    return bad / max(foreign, 1)


def _looks_like(text: str, letters: frozenset[str], share: float) -> bool:
    sample = [match.group() for match in islice(_FOREIGN_LETTER.finditer(text), 20_000)]
    return bool(sample) and sum(letter in letters for letter in sample) >= share * len(sample)


def _strict(path: Path, raw: bytes, encoding: str) -> str:
    """Decode all bytes; raises DataError with the line and the byte that the encoding does not allow."""
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(_bad_byte(path, raw, encoding, error)) from error
    except (LookupError, ValueError) as error:
        import encodings.aliases

        hint = did_you_mean(encoding, encodings.aliases.aliases)
        raise DataError(f"{path}: `{encoding}` is not a text encoding that Python knows.{hint}") from error


def _bad_byte(path: Path, raw: bytes, encoding: str, error: UnicodeDecodeError) -> str:
    # Codecs that eat a byte order mark count from behind it.
    offset = len(raw) - len(error.object) + error.start
    line = len(_NEWLINE.findall(raw[:offset].decode(encoding, "ignore"))) + 1
    what = f"byte 0x{raw[offset]:02X} at byte offset {offset} is not valid {encoding} ({error.reason})"
    return f"{path}:{line}: {what}; mend that place, or save the whole file as UTF-8"


def _read_csv(path: Path, text: str, mark: str, problems: Problems) -> list[Record]:
    """Read the rows, noting what is wrong with each; raises DataError when the header is not sound."""
    reader = csv.reader(_lines(text), delimiter=mark, strict=True)
    names: list[str] = []
    places: dict[str, int] = {}
    others: list[int] = []
    records: list[Record] = []
    header_line = rows = 0
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            # Where the next row begins cannot be told any more.
            problems.append((first, _quote_problem(error, reader.line_num)))
            _raise(path, problems)
        if row is None:
            break
        if row and not names:
            names, header_line = [_bare(name) for name in row], first
            places = _header(path, names, first, mark, problems)
            others = [place for place in range(len(names)) if place not in places.values()]
        elif row:
            rows += 1
            if len(row) != len(names):
                problems.append((first, _ragged(len(row), len(names), mark, first, reader.line_num)))
                continue
            cells = [row[places[column]] for column in COLUMNS]
            extra: dict[str, object] = {names[place]: row[place] for place in others}
            records.append(_record(path, first, cells, extra, problems))
    if not rows:
        problems.append((header_line, "no rows: the file has only its header; add at least one row"))
    return records


def _record(path: Path, line: int, cells: list[str], extra: dict[str, object], problems: Problems) -> Record:
    category, human, assistant = cells
    for name, cell in (("human", human), ("assistant", assistant)):
        if not cell.strip():
            state = "only white space" if cell else "empty"
            problems.append((line, f"the `{name}` of this row is {state}; fill it or delete the row"))
    return pair(category, human, assistant, str(path), line, extra)


def _quote_problem(error: csv.Error, line: int) -> str:
    if "unexpected end" in str(error):
        return "a quote opens in the row that begins here and is never closed; close it (no row after it was read)"
    where = f"a quote in the row that begins here closes before its cell ends (at line {line})"
    return f'{where}; inside a quoted cell write each quote twice (""), no row after it was read'


def _ragged(found: int, expected: int, mark: str, first: int, last: int) -> str:
    span = f" (the row runs to line {last})" if last > first else ""
    many = f"a cell that holds the delimiter {mark!r} must be quoted, an unquoted one splits it"
    few = f"add the missing cell, or close a quote that swallowed an unquoted delimiter {mark!r}"
    return f"{found} cells found, {expected} expected{span}; {many if found > expected else few}"


def _bare(name: str) -> str:
    return name.strip().strip("\ufeff").strip()


def _header(path: Path, names: list[str], line: int, mark: str, problems: Problems) -> dict[str, int]:
    """Return the place of each required column; raises DataError when one is missing or any is repeated."""
    places: dict[str, int] = {}
    wrong: Problems = []
    for place, name in enumerate(names):
        first = places.setdefault(name.casefold(), place)
        if first != place:
            where = f"columns {first + 1} and {place + 1}"
            wrong.append((line, f"the header name `{name}` is repeated ({where}); rename or delete one of them"))
    missing = [column for column in COLUMNS if column not in places]
    wrong += [(line, f"{_missing('column', column, names)}; cells were told by {mark!r}") for column in missing]
    if wrong:
        _raise(path, problems + wrong)
    return {column: places[column] for column in COLUMNS}


def _missing(kind: str, column: str, names: Iterable[str]) -> str:
    near = nearest(column, [name for name in names if name not in COLUMNS])
    hint = f", the nearest is `{near}`: rename it" if near else "; rename the one that is meant"
    found = ", ".join(f"`{name}`" for name in names) or "none"
    return f"no {kind} `{column}`; found {found}{hint} or add `{column}`"


def _delimiter(path: Path, text: str, wanted: str) -> str:
    """Return the delimiter given, or the one by which the header has most of the required columns."""
    if wanted != "auto":
        mark = {"\\t": "\t", "tab": "\t"}.get(wanted, wanted)
        if len(mark) != 1 or mark in '"\r\n\0':
            raise DataError(f"{path}: the delimiter {wanted!r} must be one character, not a quote or a newline")
        return mark
    best, best_score = DELIMITERS[0], (0, 1)
    for mark in DELIMITERS:
        try:
            row = next((row for row in csv.reader(_lines(text), delimiter=mark, strict=True) if row), [])
        except csv.Error:
            continue  # a quote that one delimiter cannot read, another may
        score = (len({_bare(name).casefold() for name in row} & set(COLUMNS)), len(row))
        if score > best_score:
            best, best_score = mark, score
    return best


def _read_jsonl(path: Path, text: str, problems: Problems) -> list[Record]:
    """Read one object per line, noting what is wrong with each."""
    records = []
    rows = 0
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        rows += 1
        wrong: Problems = []
        try:
            row = json.loads(line, object_pairs_hook=_object, parse_constant=_no_constant)
        except json.JSONDecodeError as error:
            wrong = [(number, f"bad JSON at column {error.colno}: {error.msg}; write one whole object per line")]
        except (ValueError, RecursionError) as error:
            wrong = [(number, f"bad JSON: {error}; mend the line")]
        else:
            wrong = [(number, what) for what in _json_problems(row)]
        if not wrong:
            cells = [row[column] for column in COLUMNS]
            extra = {key: value for key, value in row.items() if key not in COLUMNS}
            records.append(_record(path, number, cells, extra, problems))
        problems += wrong
    if not rows:
        problems.append((1, "no rows: the file has only blank lines; add at least one object"))
    return records


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"the key `{next(key for key in keys if keys.count(key) > 1)}` is repeated")
    return dict(pairs)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _json_problems(row: object) -> Iterator[str]:
    if not isinstance(row, dict):
        yield f"{json.dumps(row)[:40]} is not an object; write one object with the keys {', '.join(COLUMNS)}"
        return
    for column in COLUMNS:
        if column not in row:
            yield _missing("key", column, row)
        elif not isinstance(row[column], str):
            yield f"`{column}` is {json.dumps(row[column])[:40]}, not a string; write it as a string"
        elif "\0" in row[column] or _SURROGATE.search(row[column]):
            yield f"`{column}` holds \\u0000 or half a surrogate pair (\\ud800 to \\udfff); delete that escape"
