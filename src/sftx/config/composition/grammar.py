"""Values in Hydra's override grammar: how to write one, and how to read what a person typed.

Hydra's lexer refuses unquoted Chinese, parentheses and stray quotes. A value that it refuses is
quoted here and read again; one that it accepts keeps Hydra's meaning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from sftx.config.values import Deleted, Sweep, each

KEY = re.compile(r"(?P<prefix>\+\+|\+|~)?(?P<name>[\w./-]+(?:@[\w.:-]*)?)", re.ASCII)
PLAIN_TEXT = re.compile(r"[A-Za-z_/][\w./-]*", re.ASCII)
RESERVED = frozenset({"true", "false", "null", "nan", "inf"})


@dataclass(frozen=True)
class Typed:
    """One override as a person typed it: key with its prefix, and its plain value."""

    text: str
    prefix: str
    name: str
    value: Any


def quote(text: str) -> str:
    """Quote text for Hydra's grammar."""
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def grammar(value: Any) -> str:
    """Write a plain value, or a sweep of them, in Hydra's override grammar."""
    if isinstance(value, Sweep):
        return ",".join(map(grammar, value.values))
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(grammar, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_dict_key(k)}:{grammar(v)}" for k, v in value.items()) + "}"
    if isinstance(value, IntervalSweep):
        return f"interval({value.start!r},{value.end!r})"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if PLAIN_TEXT.fullmatch(value) and value.lower() not in RESERVED else quote(value)
    return repr(value)


def brings_keys(value: Any) -> bool:
    """Return True for a mapping, or a sweep over some: Hydra refuses its keys unless the override is an addition."""
    return any(isinstance(v, Mapping) for v in each(value))


def _dict_key(key: Any) -> str:
    """Write a dictionary's key: Hydra knows no quotes there, only backslashes."""
    return re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", key) if isinstance(key, str) else grammar(key)


def read_override(text: str, *, multirun: bool) -> Typed | None:
    """Read `key=value` or `~key`; None when it is neither.

    Commas in a value that Hydra refuses separate the points of a multirun, and are part of the value otherwise.
    """
    key, equals, raw = text.partition("=")
    match = KEY.fullmatch(key)
    if not match or not (equals or match["prefix"] == "~"):
        return None
    override = _parse(text)
    if override is None:
        pieces = split_commas(raw) if multirun else [raw]
        override = _parse(f"{key}={','.join(map(_fixed, pieces))}")
    if override is None:
        return None
    value = Deleted(override.value()) if override.is_delete() else _value(override)
    return Typed(text, match["prefix"] or "", match["name"], value)


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _parse(text: str) -> Override | None:
    try:
        return _parser().parse_override(text)
    except (HydraException, RecursionError):
        return None


def _fixed(text: str) -> str:
    """Quote what Hydra refuses, inside of lists and mappings too; a mapping's name it refuses cannot be quoted."""
    text = text.strip()
    if _parse(f"k={text}") is not None:
        return text
    if text.startswith("[") and text.endswith("]"):
        made = "[" + ",".join(map(_fixed, split_commas(text[1:-1]))) + "]"
        if _parse(f"k={made}") is not None:
            return made
    if text.startswith("{") and text.endswith("}"):
        pairs = [piece.partition(":") for piece in split_commas(text[1:-1])]
        made = "{" + ",".join(f"{_bare_name(key)}:{_fixed(value)}" for key, colon, value in pairs if colon) + "}"
        if all(colon for _, colon, _ in pairs) and _parse(f"k={made}") is not None:
            return made
    return quote(text)


def _bare_name(text: str) -> str:
    """Take the quotes from a mapping's name: JSON has them, Hydra's grammar knows none there."""
    text = text.strip()
    return text[1:-1] if len(text) > 2 and text[0] == text[-1] and text[0] in "'\"" else text


def unwritable_name(text: str) -> str | None:
    """Return the first name of a typed mapping that Hydra's grammar cannot hold."""
    if not (text.startswith("{") and text.endswith("}")):
        return None
    names = [_bare_name(name) for name, colon, _ in (p.partition(":") for p in split_commas(text[1:-1])) if colon]
    return next((name for name in names if _parse(f"k={{{name}:1}}") is None), None)


def split_commas(text: str) -> list[str]:
    """Split at the commas outside of quotes and brackets."""
    pieces, depth, quoted, start = [], 0, "", 0
    for i, char in enumerate(text):
        if quoted:
            quoted = "" if char == quoted and text[i - 1] != "\\" else quoted
        elif char in "'\"":
            quoted = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            pieces.append(text[start:i])
            start = i + 1
    if quoted or depth:  # a lone quote or bracket is part of a name
        return text.split(",")
    return [*pieces, text[start:]]


def _value(override: Override) -> Any:
    value = override.value()
    if override.is_sweep_override() and not isinstance(value, Glob | IntervalSweep):
        return Sweep(tuple(_plain(v) for v in override.sweep_iterator()))
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    return value
