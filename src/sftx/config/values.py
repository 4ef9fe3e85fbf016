"""Plain values of settings, several of them in a sweep, and how messages write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Origin = Callable[[str], str]
"""Names where a key got its value, for a message."""


@dataclass(frozen=True)
class Sweep:
    """Several values of one key, in the order they were typed."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Deleted:
    """`~key` or `~key=value`: the key is taken out."""

    value: Any = None


def each(value: Any) -> tuple[Any, ...]:
    """Return the values of a sweep, or the one value."""
    return value.values if isinstance(value, Sweep) else (value,)


def over(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to the value, or to each value of a sweep."""
    return Sweep(tuple(change(v) for v in value.values)) if isinstance(value, Sweep) else change(value)


def show(value: Any) -> str:
    """Write a value as a user types it."""
    if isinstance(value, Sweep):
        return ",".join(show(v) for v in value.values)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(show(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{show(v)}" for k, v in value.items()) + "}"
    return str(value)


def found(value: Any) -> str:
    """Write a value for `expected ..., got ...`; a string is quoted."""
    if value == "":
        return "an empty value"
    return repr(value) if isinstance(value, str) else show(value)
