"""JSON and JSONL to rows: each value as it stands, with the line it begins at, in bounded memory."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import NoReturn

from sftx.data.blob import Blob
from sftx.data.problems import Problems
from sftx.data.text import open_text, text_lines

CHUNK = 1 << 18
MAX_LINE = 1 << 24
_BLANK = re.compile(r"[ \t\r\n]*")
# What the decoder says of a value that is cut off may point this far before the end ("\\ud83d\\ude").
_NEAR = 16


def strict_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build an object; raises ValueError when a key is repeated."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key `{next(key for key in keys if keys.count(key) > 1)}` is repeated")
    return made


def no_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity."""
    raise ValueError(f"{name} is not JSON")


def jsonl_rows(blob: Blob, encoding: str, problems: Problems) -> Iterator[tuple[int, object]]:
    """Yield the value of each line that is not blank, noting what cannot be read."""
    rows = 0
    decode = json.JSONDecoder(object_pairs_hook=strict_object, parse_constant=no_constant).decode
    with text_lines(blob, encoding) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            rows += 1
            try:
                value = decode(line)
            except json.JSONDecodeError as error:
                problems.row(number, f"bad JSON at column {error.colno}: {error.msg}; write one whole object per line")
            except (ValueError, RecursionError) as error:
                problems.row(number, f"bad JSON: {error}; mend the line")
            else:
                yield number, value
    if not rows:
        problems.file(1, "no rows: the file has only blank lines; add at least one object")


def is_jsonl(blob: Blob, encoding: str) -> bool:
    """Tell whether a file called .json holds one object a line, as many published ones do."""
    with open_text(blob, encoding) as text:
        first = text.read(CHUNK).lstrip("\ufeff \t\r\n")
        first += "" if "\n" in first else text.readline(MAX_LINE)
    try:
        value = json.loads(first.split("\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and not isinstance(value.get("data"), list)


def json_rows(blob: Blob, encoding: str, problems: Problems) -> Iterator[tuple[int, object]]:
    """Yield each value of a list, or of the list `data` of an object; after bad JSON nothing can be read."""
    rows = 0
    with open_text(blob, encoding) as file:
        text = _JsonText(file, problems)
        first = text.peek()
        if first == "[":
            for row in text.items():
                rows += 1
                yield row
        elif first == "{":
            for row in _data(text, problems):
                rows += 1
                yield row
        else:
            text.stop("found neither a list nor an object; write a list of objects")
        if text.peek():
            text.stop("text after the end of the JSON value; delete it, or set data.format=jsonl for one object a line")
    if not rows:
        problems.file(1, "no rows: the list is empty; add at least one object")


def _data(text: _JsonText, problems: Problems) -> Iterator[tuple[int, object]]:
    """Yield the values of the list under the key `data`."""
    seen: list[str] = []
    text.take("{")
    while text.peek() != "}":
        if seen:
            text.take(",")
        line, key = text.value()
        if not isinstance(key, str):
            text.stop("a key must be a string")
        if key in seen:
            problems.stop(line, f"bad JSON: the key `{key}` is repeated; rename or delete one")
        seen.append(key)
        text.take(":")
        if key == "data":
            if text.peek() != "[":
                text.stop("`data` is not a list; write a list of objects")
            yield from text.items()
        else:
            text.value()
    text.take("}")
    if "data" not in seen:
        found = ", ".join(f"`{key}`" for key in seen) or "none"
        problems.stop(1, f"found an object with the keys {found}, wanted a list of objects or one under `data`")


class _JsonText:
    """A JSON text that is read piece by piece: one value and one chunk are held, never the whole."""

    def __init__(self, file: io.TextIOWrapper, problems: Problems) -> None:
        self._file, self._problems = file, problems
        self._text, self._place, self._line = self._read(CHUNK).lstrip("\ufeff"), 0, 1
        self._ended = False
        self._decoder = json.JSONDecoder(object_pairs_hook=strict_object, parse_constant=no_constant)

    def peek(self) -> str:
        """Return the next character that is not blank, or nothing at the end."""
        while True:
            found = _BLANK.match(self._text, self._place)
            self._move(found.end() if found else self._place)
            if self._place < len(self._text) or not self._more(CHUNK):
                return self._text[self._place : self._place + 1]

    def take(self, wanted: str) -> None:
        """Pass one character; raises DataError when another stands there."""
        if self.peek() != wanted:
            self.stop(f"expecting `{wanted}`")
        self._place += 1

    def items(self) -> Iterator[tuple[int, object]]:
        """Yield the values of a list, each with its line."""
        self.take("[")
        if self.peek() != "]":
            yield from self._item()
        while self.peek() != "]":
            self.take(",")
            yield from self._item()
        self.take("]")

    def value(self) -> tuple[int, object]:
        """Return the next value whatever it is; raises DataError when it is not sound."""
        for found in self._item(whole_file=True):
            return found
        raise AssertionError("a value that is not sound raises")

    def _item(self, *, whole_file: bool = False) -> Iterator[tuple[int, object]]:
        self.peek()
        line = self._line
        try:
            value, end = self._decode(self._decoder)
        except ValueError as error:  # JSON, but not as strict as is wanted: the values after it can be read
            wrong = f"bad JSON: {error}; mend the value"
            if whole_file:
                self._problems.stop(line, wrong)
            self._problems.row(line, wrong)
            self._move(self._decode(json.JSONDecoder(parse_int=str))[1])
        else:
            self._move(end)
            yield line, value

    def _decode(self, decoder: json.JSONDecoder) -> tuple[object, int]:
        size = CHUNK
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._place)
                if end < len(self._text) or not self._more(size):  # a number at the end may go on
                    return value, end
            except json.JSONDecodeError as error:
                cut_off = error.pos > len(self._text) - _NEAR or error.msg.startswith("Unterminated string")
                if not cut_off or not self._more(size):
                    self._move(error.pos)
                    self.stop(error.msg)
            except RecursionError as error:
                self.stop(str(error))
            size *= 2

    def _more(self, size: int) -> bool:
        """Read on, dropping what is behind; return False at the end."""
        more = self._read(size)
        self._ended = not more
        if self._ended:
            return False
        self._text, self._place = self._text[self._place :] + more, 0
        return True

    def _read(self, size: int) -> str:
        text = self._file.read(size)
        return text + self._file.read(1) if text.endswith("\r") else text  # so that a CRLF is counted once

    def _move(self, place: int) -> None:
        passed = self._text[self._place : place]
        self._line += passed.count("\n") + passed.count("\r") - passed.count("\r\n")
        self._place = place

    def stop(self, what: str) -> NoReturn:
        """Raise what is wrong at this place, after which nothing can be read."""
        near = self._text[self._place : self._place + 30].split("\n")[0]
        where = (
            f"at `{near}`" if near.strip() else "at the end of the file" if self._ended else "at the end of the line"
        )
        self._problems.stop(self._line, f"bad JSON {where}: {what}; mend it (no row after it was read)")
