"""The manual's JSON argument file, read with everything that is wrong with it and the line of each key."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftx import train_command
from sftx.config.composition.grammar import KEY


@dataclass
class ArgsFile:
    """Dotted key -> plain value, the place of each, and what is wrong."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, key: str) -> str:
        """Return `file:line` of a key, or of the nearest one above it."""
        while key not in self.places and "." in key:
            key = key.rpartition(".")[0]
        return self.places.get(key, "args_file")


def read_args_file(name: str) -> ArgsFile:
    """Read a JSON object of the manual's names; nested objects become dotted keys."""
    out = ArgsFile()
    path = Path(name)
    if not name:
        out.problems.append("command line: `args_file` names no file. Wanted args_file=my.json.")
        return out
    try:
        text = path.read_bytes().decode("utf-8-sig")
        tree = json.loads(text, object_pairs_hook=_Pairs)
    except UnicodeDecodeError as error:
        out.problems.append(f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8.")
    except OSError as error:
        out.problems.append(f"args_file: cannot read {path}: {error.strerror or error}.")
    except json.JSONDecodeError as error:
        out.problems.append(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}.")
    else:
        if isinstance(tree, _Pairs):
            _flatten(tree, "", path, text, out)
        else:
            out.problems.append(
                f'{path}:1: expected an object such as {{"lora_rank": 32}}, got {json.dumps(tree)[:60]}.'
            )
    return out


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it stands: a repeated key is not lost."""


def _flatten(pairs: _Pairs, head: str, path: Path, text: str, out: ArgsFile) -> None:
    for key, value in pairs:
        dotted = f"{head}{key}"
        place = f"{path}:{_line_of(key, text, after=out.places.get(head.rstrip('.')))}"
        if dotted in out.places:
            lines = [n for n, _ in _lines_with(key, text)]
            out.problems.append(f"{path}:{lines[-1]}: `{dotted}` is repeated, first in line {lines[0]}: keep one.")
            continue
        out.places[dotted] = place
        match = KEY.fullmatch(dotted)
        if match is None and head and not key.isascii():  # Hydra's grammar has no way to write it
            out.problems.append(
                f"{place}: `{dotted}`: a name in a mapping must be ASCII here; write it in conf/experiment/mine.yaml, "
                "as YAML, and choose it by experiment=mine."
            )
        elif match is None or match["prefix"]:
            out.problems.append(f"{place}: unknown key {dotted!r}. All keys: {train_command()} --help")
        elif isinstance(value, _Pairs) and value:
            _flatten(value, f"{dotted}.", path, text, out)
        else:
            out.values[dotted] = _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return {k: _plain(v) for k, v in value}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _lines_with(key: str, text: str) -> list[tuple[int, str]]:
    pattern = re.compile(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:")
    return [(n, line) for n, line in enumerate(text.split("\n"), 1) if pattern.search(line)] or [(1, "")]


def _line_of(key: str, text: str, after: str | None) -> int:
    """Return the line of a key: of a nested one, the first at or after its parent's."""
    start = int(after.rpartition(":")[2]) if after else 1
    return next((n for n, _ in _lines_with(key, text) if n >= start), start)
