"""Check a plain value against a written type such as `int | None` or `Literal["a", "b"]`.

The types are read as text, from the schema and from the source of components, so that nothing has
to be imported to check a configuration.
"""

from __future__ import annotations

import ast
import math
from typing import Any

WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "None": "null",
    "Any": "anything",
}


def options_of(annotation: str) -> list[str]:
    """Return the choices of the `Literal`s in a written type."""
    found = []
    for node in ast.walk(ast.parse(annotation, mode="eval")):
        if isinstance(node, ast.Subscript) and _name(node.value) == "Literal":
            found += [str(ast.literal_eval(e)) for e in _elements(node.slice)]
    return found


def matches(value: Any, annotation: str) -> bool:
    """Tell whether a plain value is of the written type; a whole number is also a number."""
    return _matches(value, ast.parse(annotation, mode="eval").body)


def describe(annotation: str) -> str:
    """Say a written type in words: `a whole number or null`."""
    return _describe(ast.parse(annotation, mode="eval").body)


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _elements(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def _matches(value: Any, node: ast.expr) -> bool:
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _matches(value, left) or _matches(value, right)
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str(quoted)):
            return matches(value, quoted)
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
    if name in ("list", "tuple", "Sequence"):
        return isinstance(value, list)
    if name in ("dict", "Node", "Mapping"):
        return isinstance(value, dict)
    return True  # a type we do not know is the component's own business


def _matches_generic(value: Any, name: str, inner: list[ast.expr]) -> bool:
    if name == "Literal":
        return any(value == ast.literal_eval(e) and type(value) is type(ast.literal_eval(e)) for e in inner)
    if name in ("list", "Sequence"):
        return isinstance(value, list) and all(_matches(v, inner[0]) for v in value)
    if name == "tuple":
        if len(inner) == 2 and isinstance(inner[1], ast.Constant) and inner[1].value is Ellipsis:
            return isinstance(value, list) and all(_matches(v, inner[0]) for v in value)
        return isinstance(value, list) and len(value) == len(inner) and all(map(_matches, value, inner))
    if name in ("dict", "Mapping"):
        return isinstance(value, dict) and all(_matches(v, inner[1]) for v in value.values())
    if name == "Optional":
        return value is None or _matches(value, inner[0])
    return True


def _describe(node: ast.expr) -> str:
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            words = [_describe(left), _describe(right)]
            return "a number" if set(words) == {"a whole number", "a number"} else " or ".join(words)
        case ast.Constant(value=None):
            return "null"
        case ast.Subscript(value=outer, slice=inner):
            name, parts = _name(outer), _elements(inner)
            if name == "Literal":
                return "one of " + ", ".join(str(ast.literal_eval(e)) for e in parts)
            if name in ("list", "Sequence"):
                return f"a list of {_describe(parts[0]).removeprefix('a ')}"
            if name == "tuple":
                return f"a list of {len(parts)} values"
            return "a mapping"
    return WORDS.get(_name(node), ast.unparse(node))
