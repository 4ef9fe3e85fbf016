"""JSON and JSONL to rows: each value as it stands, with the line it begins at, in bounded memory."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from typing import Any, NoReturn

from sftx.data.files.blob import Blob
from sftx.data.files.problems import Problems
from sftx.data.files.text import open_text, text_lines

CHUNK = 1 << 18
MAX_LINE = 1 << 21
MAX_DEPTH = 500
LISTS = ("data", "train")
"""Keys of an object under which a list of rows may stand."""
NAMED = 5
"""Keys that a message names at most."""
_STARTS: dict[str, Callable[[], Any]] = {"start_map": dict, "start_array": list}
_ENDS = ("end_map", "end_array")
Event = tuple[int, str, Any]
"""A line, and what ijson reports: an event and its value."""
# ijson's C backend reads half a surrogate pair as `?`, its Python backend as it stands.
_HALF_PAIR = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?=[\s\S]{6})(?!\\u[dD][c-fC-F])"
    r"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)


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
                problems.row(number, f"bad JSON: {error}; fix the line")
            else:
                if isinstance(value, list) and not _are_turns(value):
                    what = f"{line.strip()[:40]} is not an object but a list"
                    problems.row(number, f"{what}; name a JSON list of rows *.json, or set data.format=json")
                else:
                    yield number, _row(value)
    if not rows:
        problems.file(1, "no rows: the file has only blank lines; add at least one object")


def is_jsonl(blob: Blob, encoding: str, names: Iterable[str]) -> bool:
    """Return True if a file called .json holds one row per line, as many published ones do."""
    with open_text(blob, encoding) as text:
        first = ""
        while not first.strip("\ufeff \t\r\n") and (line := text.readline(MAX_LINE)):
            first = line
        more = any(line.strip() for line in iter(lambda: text.readline(CHUNK), ""))
    try:
        value = json.loads(first.lstrip("\ufeff"))
    except (ValueError, RecursionError):
        return False
    if isinstance(value, dict) and not any(isinstance(value.get(key), list) for key in LISTS):
        return more or not {key.casefold() for key in value}.isdisjoint(names)
    return more and isinstance(value, list) and _are_turns(value)


def _row(value: object) -> object:
    """Return a row; one that is itself a list of turns is read as an object with `messages`."""
    return {"messages": value} if isinstance(value, list) and _are_turns(value) else value


def _are_turns(value: list[object]) -> bool:
    return bool(value) and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)


def json_rows(blob: Blob, encoding: str, problems: Problems) -> Iterator[tuple[int, object]]:
    """Yield each value of a list, or of the list `data` or `train` of an object; after bad JSON nothing can be read.

    Sets `problems.record` to the number of the value in the list where the line holds what stands before it, too.
    """
    events = _events(blob, encoding, problems)
    last, event, _ = next(events)
    keys: list[str] = []
    if event == "start_map":
        last, keys = _find_list(events, problems)
    elif event != "start_array":
        problems.stop(last, "found neither a list nor an object; write a list of objects")
    rows = 0
    for line, value, wrong in _values(events):
        rows += 1
        problems.record = rows if line == last else 0
        last = line
        if wrong is None:
            yield line, _row(value)
        else:
            problems.row(line, f"bad JSON: {wrong}; fix the value")
    problems.record = 0
    others = keys[:-1] + _other_keys(events)
    if others:
        problems.notes.append(f"read the list `{keys[-1]}`; not read beside it: {_listed(others)}")
    if not rows:
        problems.file(1, "no rows: the list is empty; add at least one object")


def _events(blob: Blob, encoding: str, problems: Problems) -> Iterator[Event]:
    """Yield the events of a JSON text, each with its line; raises DataError where it is not JSON."""
    import ijson  # only JSON lists need it

    backend = ijson.get_backend("python") if _has_half_pair(blob, encoding) else ijson
    events, line = ijson.sendable_list(), 1
    parser = backend.basic_parse_coro(events)
    with open_text(blob, encoding) as text:
        for piece in _pieces(text):
            error = None
            try:
                parser.send(piece.encode()) if piece else parser.close()
            except ijson.JSONError as found:
                error = found
            except (ValueError, SystemError) as found:
                # A number of over 4,300 digits, which the C backend leaves as a damaged event: none is looked at.
                problems.stop(line, _bad_json(str(found.__cause__ or found)))
            for event, value in events:
                yield line, event, value
            if error is not None:
                problems.stop(line, _bad_json(str(error)))
            del events[:]
            line += piece.endswith(("\n", "\r"))


def _pieces(text: io.TextIOWrapper) -> Iterator[str]:
    """Yield the lines of a text, very long ones in pieces, and at its end nothing."""
    piece = text.readline(CHUNK).lstrip("\ufeff")
    while piece:
        if len(piece) == CHUNK and piece.endswith("\r"):
            piece += text.read(1)  # a CRLF is one line end
        yield piece
        piece = text.readline(CHUNK)
    yield ""


def _bad_json(error: str) -> str:
    """Return ijson's error in one line: its C backend shows the place in two more."""
    what, *shown = error.split("\n")
    if "trailing garbage" in what or "Additional data" in what:
        return "text after the end of the JSON value; delete it, or set data.format=jsonl for one object per line"
    near = ""
    if len(shown) > 1 and "^" in shown[1]:
        at = shown[1].index("^")
        near = shown[0][max(at - 15, 0) : at + 15].strip()
    what = what.removeprefix("lexical error: ").removeprefix("parse error: ").rstrip(".")
    return f"bad JSON{f' near `{near}`' if near else ''}: {what}; fix it (no row after it was read)"


def _has_half_pair(blob: Blob, encoding: str) -> bool:
    """Return True if a text may hold the escape of half a surrogate pair."""
    end = ""
    with open_text(blob, encoding) as text:
        while piece := text.read(CHUNK):
            piece = end + piece
            if ("\\ud" in piece or "\\uD" in piece) and _HALF_PAIR.search(piece):
                return True
            end = piece[-12:]
    return bool(_HALF_PAIR.search(end + 6 * " "))


def _find_list(events: Iterator[Event], problems: Problems) -> tuple[int, list[str]]:
    """Pass an object's events up to its list of rows; return the line of its bracket, and the keys up to it."""
    keys: list[str] = []
    depth = 1
    for line, event, value in events:
        if depth == 1 and event == "map_key":
            keys.append(value)
        elif depth == 1 and event == "start_array" and keys[-1] in LISTS:
            return line, keys
        depth += (event in _STARTS) - (event in _ENDS)
        if depth == 0:
            break
    count = f"{len(keys)} key{'s' if len(keys) > 1 else ''}"
    problems.stop(
        1,
        f"one object with {count} ({_listed(keys)}), not a list of rows; write [{{...}}, {{...}}], put the list under "
        "the key `data` or `train`, or set data.format=jsonl for one object per line",
    )


def _other_keys(events: Iterator[Event]) -> list[str]:
    """Pass the events after the list; return the keys of the object that holds it."""
    depth, keys = 1, []
    for _, event, value in events:
        if depth == 1 and event == "map_key":
            keys.append(value)
        depth += (event in _STARTS) - (event in _ENDS)
    return keys


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(f"`{key[:60]}`" for key in keys[:NAMED]) + more or "none"


def _values(events: Iterator[Event]) -> Iterator[tuple[int, object, str | None]]:
    """Yield the values of a list up to its end, each with the line where it begins and what is wrong with it."""
    for line, event, value in events:
        if event == "end_array":
            return
        made, wrong = _value(event, value, events)
        yield line, made, wrong


def _value(event: str, value: Any, events: Iterator[Event]) -> tuple[object, str | None]:
    """Return the value that begins with an event, and what is wrong with it."""
    wrong, key = None, ""
    root: list[Any] = []
    inside: list[Any] = [root]
    while True:
        top = inside[-1]
        if event == "map_key":
            if value in top:
                wrong = f"the key `{value}` is repeated"
            key = value
        elif event in _ENDS:
            inside.pop()
        else:
            made: Any = value
            if event in _STARTS:
                made = _STARTS[event]()
                inside.append(made)
                if len(inside) > MAX_DEPTH:
                    wrong = f"nested more than {MAX_DEPTH} deep"
            elif event == "number" and isinstance(value, Decimal):
                made = float(value)
            if isinstance(top, list):
                top.append(made)
            else:
                top[key] = made
        if len(inside) == 1:
            return root[0], wrong
        _, event, value = next(events)
