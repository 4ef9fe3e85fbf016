"""Check a plain value against a type such as `int | None` or `Literal["a", "b"]`, and write the type in words."""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from sftx.config.bounds import Bounds

WORDS = {
    int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "null", Any: "anything",
}  # fmt: skip
MANY = {"an integer": "integers", "a number": "numbers", "a string": "strings", "true or false": "booleans"}


def options_of(kind: Any) -> list[str]:
    """Return the choices of the `Literal`s in a type."""
    if get_origin(kind) is Literal:
        return [str(option) for option in get_args(kind)]
    return [option for part in get_args(kind) for option in options_of(part)]


def bounds_of(kind: Any) -> list[Bounds]:
    """Return the bounds in a type."""
    own = [b for b in getattr(kind, "__metadata__", ()) if isinstance(b, Bounds)]
    return own + [b for part in get_args(kind) if get_origin(kind) is not Literal for b in bounds_of(part)]


def is_text(kind: Any) -> bool:
    """Return True if a type takes any text and no number: `str`, `str | None`."""
    return matches("", kind) and not matches(0, kind)


def matches(value: Any, kind: Any) -> bool:
    """Return True if a plain value is of the type and within its bounds; an integer is also a number."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(matches(value, part) for part in parts)
    if origin is Annotated:
        bounds = (b for b in kind.__metadata__ if isinstance(b, Bounds))
        return matches(value, parts[0]) and all(b.allow(value) for b in bounds)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in parts)
    if kind in (None, type(None)):
        return value is None
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind in (int, float):
        is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    container = origin or kind
    if _is(container, Mapping):
        return isinstance(value, dict) and (not parts or all(matches(v, parts[-1]) for v in value.values()))
    if container is tuple and parts and parts[-1] is not Ellipsis:
        return isinstance(value, list) and len(value) == len(parts) and all(map(matches, value, parts))
    if _is(container, Iterable):
        return isinstance(value, list) and (not parts or all(matches(v, parts[0]) for v in value))
    return True  # a type we do not know is the component's own business


def describe(kind: Any) -> str:
    """Write a type in words: `null or an integer >= 1`; numbers last, because bounds follow them."""
    origin, parts = get_origin(kind), get_args(kind)
    alternatives = parts if origin in (Union, types.UnionType) else (kind,)
    words = list(dict.fromkeys(map(_describe_one, alternatives)))
    if "a number" in words and "an integer" in words:
        words.remove("an integer")
    return " or ".join(sorted(words, key=lambda w: 0 if w == "null" else 2 if w in ("a number", "an integer") else 1))


def _describe_one(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        between = ", each " if _is(get_origin(parts[0]), Iterable) else " "
        return describe(parts[0]) + "".join(f"{between}{b}" for b in kind.__metadata__ if isinstance(b, Bounds))
    if origin is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(map(str, parts))
    container = origin or kind
    if kind not in WORDS and _is(container, Mapping):
        return "a mapping"
    if container is tuple and parts and parts[-1] is not Ellipsis:
        each = list(map(describe, parts))
        same = MANY.get(each[0]) if len(set(each)) == 1 else None
        return f"a list of {len(parts)} {same}" if same else f"a list of {len(parts)}: {', '.join(each)}"
    if kind not in WORDS and _is(container, Iterable):
        one = describe(parts[0]) if parts else ""
        return f"a list of {MANY.get(one, one.removeprefix('a '))}" if one else "a list"
    return WORDS[kind] if kind in WORDS else str(getattr(kind, "__name__", kind))


def _is(container: Any, kind: type) -> bool:
    return isinstance(container, type) and issubclass(container, kind)
