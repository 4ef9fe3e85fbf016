"""Check a plain value against a written type such as `int | None` or `Literal["a", "b"]`.

The types are read as text, from the schema and from the source of components, so that nothing has
to be imported to check a configuration.
"""

from __future__ import annotations

import ast
import math
from functools import cache
from typing import Any

from sftx.config.bounds import Bounds

WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "None": "null",
    "Any": "anything",
}
MANY = {"an integer": "integers", "a number": "numbers", "a string": "strings", "true or false": "booleans"}
SEQUENCES = ("list", "List", "tuple", "Tuple", "Sequence", "Iterable")
MAPPINGS = ("dict", "Dict", "Mapping", "Node")


@cache
def parsed(annotation: str) -> ast.expr:
    """Return the syntax tree of a written type; one that cannot be read is taken for `Any`."""
    try:
        return ast.parse(annotation, mode="eval").body
    except SyntaxError:
        return ast.Name("Any")


def options_of(annotation: str) -> list[str]:
    """Return the choices of the `Literal`s in a written type."""
    found = []
    for node in ast.walk(parsed(annotation)):
        if isinstance(node, ast.Subscript) and _name(node.value) == "Literal":
            found += [str(ast.literal_eval(e)) for e in _elements(node.slice)]
    return found


def matches(value: Any, annotation: str) -> bool:
    """Return True if a plain value is of the written type and within its bounds; an integer is also a number."""
    return _matches(value, parsed(annotation))


def describe(annotation: str) -> str:
    """Say a written type in words: `null or an integer >= 1`; numbers last, because bounds follow them."""
    return _describe(parsed(annotation))


def bounds_of(annotation: str) -> list[Bounds]:
    """Return the bounds in a written type."""
    nodes = [n for n in ast.walk(parsed(annotation)) if isinstance(n, ast.Subscript) and _name(n.value) == "Annotated"]
    return [b for node in nodes for b in _bounds(_elements(node.slice)[1:])]


def is_text(annotation: str) -> bool:
    """Tell whether a written type takes any text and no number: `str`, `str | None`."""
    return matches("", annotation) and not matches(0, annotation)


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _elements(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def _bounds(annotations: list[ast.expr]) -> list[Bounds]:
    """Return the `Bounds(...)` among an `Annotated`'s annotations; one that is not written in numbers is left out."""
    out = []
    for node in annotations:
        if isinstance(node, ast.Call) and _name(node.func) == "Bounds":
            try:
                out.append(Bounds(**{str(k.arg): ast.literal_eval(k.value) for k in node.keywords}))
            except (ValueError, TypeError):
                continue
    return out


def _alternatives(node: ast.expr) -> list[ast.expr]:
    """Return the members of a union, however it is written; a list of one for any other type."""
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _alternatives(left) + _alternatives(right)
        case ast.Subscript(value=outer, slice=inner) if _name(outer) == "Union":
            return [a for e in _elements(inner) for a in _alternatives(e)]
        case ast.Subscript(value=outer, slice=inner) if _name(outer) == "Optional":
            return [*_alternatives(inner), ast.Constant(None)]
        case ast.Constant(value=str(quoted)):
            return _alternatives(parsed(quoted))
    return [node]


def _matches(value: Any, node: ast.expr) -> bool:
    return any(_matches_one(value, a) for a in _alternatives(node))


def _matches_one(value: Any, node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=None):
            return value is None
        case ast.Subscript(value=outer, slice=inner):
            return _matches_generic(value, _name(outer), _elements(inner))
    name = _name(node)
    if name == "bool":
        return isinstance(value, bool)
    if name == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if name == "float":
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if name == "str":
        return isinstance(value, str)
    if name in SEQUENCES:
        return isinstance(value, list)
    if name in MAPPINGS:
        return isinstance(value, dict)
    return True  # a type we do not know is the component's own business


def _matches_generic(value: Any, name: str, inner: list[ast.expr]) -> bool:
    if name == "Annotated":
        return _matches(value, inner[0]) and all(b.allow(value) for b in _bounds(inner[1:]))
    if name == "Literal":
        choices = [ast.literal_eval(e) for e in inner]
        return any(value == c and type(value) is type(c) for c in choices)
    if name in ("tuple", "Tuple") and not _is_ellipsis(inner[-1]):
        return isinstance(value, list) and len(value) == len(inner) and all(map(_matches, value, inner))
    if name in SEQUENCES:
        return isinstance(value, list) and all(_matches(v, inner[0]) for v in value)
    if name in MAPPINGS:
        return isinstance(value, dict) and all(_matches(v, inner[-1]) for v in value.values())
    return True


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is Ellipsis


def _is_collection(node: ast.expr) -> bool:
    return isinstance(node, ast.Subscript) and _name(node.value) in (*SEQUENCES, *MAPPINGS)


def _describe(node: ast.expr) -> str:
    words = list(dict.fromkeys(_describe_one(a) for a in _alternatives(node)))
    if "a number" in words and "an integer" in words:
        words.remove("an integer")
    return " or ".join(sorted(words, key=lambda w: 0 if w == "null" else 2 if w in ("a number", "an integer") else 1))


def _describe_one(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=None):
            return WORDS["None"]
        case ast.Subscript(value=outer, slice=inner):
            name, parts = _name(outer), _elements(inner)
            if name == "Annotated":
                between = ", each " if _is_collection(parts[0]) else " "
                return _describe(parts[0]) + "".join(f"{between}{b}" for b in _bounds(parts[1:]))
            if name == "Literal":
                return ("one of " if len(parts) > 1 else "") + ", ".join(str(ast.literal_eval(e)) for e in parts)
            if name in ("tuple", "Tuple") and not _is_ellipsis(parts[-1]):
                each = list(map(_describe, parts))
                same = MANY.get(each[0]) if len(set(each)) == 1 else None
                return f"a list of {len(parts)} {same}" if same else f"a list of {len(parts)}: {', '.join(each)}"
            if name in SEQUENCES:
                one = _describe(parts[0])
                return f"a list of {MANY.get(one, one.removeprefix('a '))}"
            if name in MAPPINGS:
                return "a mapping"
    name = _name(node)
    if name in SEQUENCES or name in MAPPINGS:
        return "a list" if name in SEQUENCES else "a mapping"
    return WORDS.get(name, ast.unparse(node))
