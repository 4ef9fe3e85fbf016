"""Text for a terminal: what it would obey, or would not show, is written out."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence

ESCAPED = frozenset(("Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp"))
"""Unicode categories of control, formatting, private-use and unassigned characters, and line separators."""
ZERO_WIDTH_JOINER = "\u200d"
"""Kept: emoji are joined by it."""


def counted(number: int | float, noun: str) -> str:
    """Return a number and its noun, in the plural unless there is one: `1 step`, `0 steps`."""
    return f"{number:g} {noun}" if number == 1 else f"{number} {noun}s"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with aligned columns; the last column is as wide as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def visible(text: str, keep: str = "") -> str:
    """Return text with control characters written as `<U+001B>`; file contents and names may hold any."""
    if text.isprintable():
        return text
    return "".join(letter if letter in keep or _is_harmless(letter) else _code(letter) for letter in text)


def visible_lines(text: str) -> str:
    """Return text with control characters written out, but for line ends and tabs."""
    return visible(text, keep="\n\t")


def visible_json(value: object) -> str:
    """Return JSON in which control characters are escaped and other letters are readable."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    return "".join(c if c == "\n" or _is_harmless(c) else json.dumps(c)[1:-1] for c in text)


def _is_harmless(letter: str) -> bool:
    return letter == ZERO_WIDTH_JOINER or unicodedata.category(letter) not in ESCAPED


def _code(letter: str) -> str:
    return "\\n" if letter == "\n" else f"<U+{ord(letter):04X}>"


def differing(one: str, other: str, *, most: int) -> tuple[str, str]:
    """Return two texts, of long ones the part where they begin to differ; `most` counts characters."""
    if max(len(one), len(other)) <= most:
        return one, other
    same = next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))
    start = max(0, same - most // 4)
    head = "..." if start else ""
    first, second = (head + t[start : start + most] + "..." * (len(t) > start + most) for t in (one, other))
    return first, second
