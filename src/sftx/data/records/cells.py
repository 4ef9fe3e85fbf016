"""Single values of a row, checked: texts, JSON in a cell, weights and flags."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sftx.data.files.jsontext import no_constant, strict_object

WEIGHTS = ("weight", "loss_weight", "loss_scale")
"""Numbers by which other trainers, too, multiply a turn's loss."""
FLAGS = ("loss", "train")
"""Booleans by which others say whether a turn is supervised."""

PLAIN_NAME = re.compile(r"(?!(?:null|true|false|\d+)$)[\w-]+(?: [\w-]+)*", re.IGNORECASE)
"""A name that need not be quoted in a setting."""


class RowError(Exception):
    """What is wrong with a row; the text is the reason."""


def show(value: object) -> str:
    """Quote the beginning of a value."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode("utf-8")
    except (TypeError, ValueError):
        text = ascii(value)
    return text if len(text) <= 40 else text[:40]


def quoted(names: Iterable[str], most: int = 12) -> str:
    """Return names as they are listed in a message: the first, each shortened, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return (", ".join(f"`{name if len(name) <= 40 else name[:40] + '...'}`" for name in listed[:most]) or "none") + more


def mapping(columns: Mapping[str, str | None]) -> str:
    """Return the setting that maps columns, as it is typed in a shell."""

    def word(name: str | None) -> str:
        return "null" if name is None else name if PLAIN_NAME.fullmatch(name) else json.dumps(name, ensure_ascii=False)

    return f"'data.columns={{{','.join(f'{word(field)}:{word(column)}' for field, column in columns.items())}}}'"


def is_empty(value: object) -> bool:
    """Return True for an empty value; false and 0 are not empty."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def is_valid_text(text: str) -> bool:
    """Return True if text can be trained on and written: no NUL, no half of a surrogate pair."""
    if "\0" in text:
        return False
    try:
        text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def text_of(value: object, what: str) -> str:
    """Return a value that must be text."""
    if not isinstance(value, str):
        raise RowError(f"{what} is {show(value)}, not a string; write it as a string")
    if not is_valid_text(value):
        raise RowError(f"{what} holds \\u0000 or half a surrogate pair (\\ud800 to \\udfff); delete that escape")
    return value


def filled(text: str, what: str) -> str:
    """Return text that is not blank."""
    if not text.strip():
        raise RowError(f"{what} is {'only white space' if text else 'empty'}; fill it or delete the row")
    return text


def parsed(value: object, what: str) -> Any:
    """Return a value that may be written as JSON in a cell; an empty cell is nothing."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value, object_pairs_hook=strict_object, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what} is not JSON: {error}; write it as JSON (strings in double quotes)") from None


def weight_of(value: object, what: str) -> float | None:
    """Return a weight; a cell of text may hold it."""
    number: object = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    elif value is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number) or number < 0:
        raise RowError(f"{what} is {show(value)}; expected a number >= 0")
    return float(number)


def flag_of(value: object) -> bool | None:
    """Return a value that is true or false, also as a number or text; None for any other."""
    spelled = str(value).casefold() if isinstance(value, bool | int | str) else ""
    return {"true": True, "1": True, "false": False, "0": False}.get(spelled)


def weight_from(marks: Mapping[str, object], where: str = "") -> float | None:
    """Return the weight that some keys give a turn or a row: numbers, and flags of which false is 0.

    Raises:
        RowError: one is neither, or two contradict each other.
    """
    weights: dict[str, float] = {}
    for name, value in marks.items():
        if name in FLAGS:
            flag = flag_of(value)
            if flag is None:
                raise RowError(f"{where}`{name}` is {show(value)}; expected true or false")
            weights[name] = float(flag)
        else:
            weights[name] = weight_of(value, f"{where}`{name}`") or 0.0
    numbers = {w for name, w in weights.items() if name not in FLAGS}
    if len(numbers) > 1 or len({w > 0 for w in weights.values()}) > 1:
        listed = ", ".join(f"`{name}` {w:g}" for name, w in weights.items())
        raise RowError(f"{where}{listed} contradict each other; keep one of them")
    return next(iter(numbers or weights.values()), None)
