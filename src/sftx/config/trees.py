"""Nested mappings whose values are named by dotted keys, as a configuration's are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MISSING = object()


def leaves(tree: Mapping[str, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key of each value that is not a mapping, or an empty one, with the value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{head}{key}.")
        else:
            yield f"{head}{key}", value


def flat(tree: Any) -> dict[str, Any]:
    """Return nested mappings as one, its keys dotted; of anything else, nothing."""
    return dict(leaves(tree)) if isinstance(tree, Mapping) else {}


def nodes(tree: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield every key of a tree, at any depth and in lists too, with its own name and its value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for name, value in items:
        key = f"{path}.{name}" if path else str(name)
        yield key, str(name), value
        yield from nodes(value, key)


def get(tree: Any, key: str, default: Any = None) -> Any:
    """Return the value of a dotted key."""
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return default
        tree = tree[part]
    return tree


def replaced(tree: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree with the values of some dotted keys replaced; the given one is left as it is."""
    out = dict(tree)
    for key, value in values.items():
        node, (*parents, leaf) = out, key.split(".")
        for part in parents:
            below = node.get(part)
            node[part] = dict(below) if isinstance(below, dict) else {}
            node = node[part]
        node[leaf] = value
    return out


def remove(tree: dict[str, Any], key: str) -> bool:
    """Take a dotted key out, and the mappings that it leaves empty; return False if it is gone already.

    The keys of a file may hold dots themselves. A value in a list stays.
    """
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        head, rest = ".".join(parts[:n]), ".".join(parts[n:])
        if head not in tree:
            continue
        if not rest:
            del tree[head]
            return True
        if isinstance(tree[head], dict):
            removed = remove(tree[head], rest)
            if not tree[head]:
                del tree[head]
            return removed
        return isinstance(tree[head], list)
    return False
