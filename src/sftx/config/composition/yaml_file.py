"""Read a YAML file with everything that is wrong with it, and with the line of each key."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sftx import INSTALLED, PROJECT_ROOT
from sftx.config.trees import leaves, remove

Lines = dict[str, tuple[int, "Lines"]]
"""key (or index in a list) -> its line, and the lines below it."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """OmegaConf's reading of scalars (`2e-4` is a number, a date is a string), in C where PyYAML has it."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the base class's name
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""[-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?$
        |[-+]?[0-9]+(?:_[0-9]+)*[eE][-+]?[0-9]+$
        |\.[0-9]+(?:_[0-9]+)*(?:[eE][-+][0-9]+)?$
        |[-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*$
        |[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class YamlFile:
    """A YAML file's plain values, the lines of its keys, and its problems with file and line."""

    path: Path
    text: str = ""
    body: dict[str, Any] = field(default_factory=dict)
    lines: Lines = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def line_of(self, key: str) -> int | None:
        """Return the line of a dotted key, whether its parts are nested or written with dots; or None."""
        return _line_of(self.lines, key)

    def settings(self) -> list[str]:
        """Return the dotted keys of its values; of Hydra's own and of the defaults list, none."""
        own = {k: v for k, v in self.body.items() if k not in ("defaults", "hydra")}
        return [key for key, _ in leaves(own)]

    def place(self, key: str) -> str:
        """Return `file:line` of a dotted key, or the file's name."""
        line = self.line_of(key)
        return f"{shown(self.path)}:{line}" if line else shown(self.path)

    def comment(self) -> str:
        """Return the first line of comment that is not Hydra's `@package`."""
        for line in self.text.splitlines():
            if line.startswith("#") and "@package" not in line:
                return line.lstrip("# ").strip()
        return ""


_read: dict[tuple[str, int, int], YamlFile] = {}


def read_yaml(path: Path) -> YamlFile:
    """Read a YAML file; what is wrong is in `problems`, the rest in `body`. Unchanged files are read once."""
    try:
        stat = path.stat()
        key = (str(path), stat.st_mtime_ns, stat.st_size)
        if key not in _read:
            _read[key] = _parse(path, path.read_bytes().decode("utf-8-sig"))
        kept = _read[key]
    except UnicodeDecodeError as error:
        return YamlFile(path, problems=(f"{shown(path)}: byte {error.start} is not UTF-8: save the file as UTF-8.",))
    except OSError as error:
        return YamlFile(path, problems=(f"{shown(path)}: cannot be read: {error.strerror}.",))
    return YamlFile(kept.path, kept.text, copy.deepcopy(kept.body), kept.lines, kept.problems)


def shown(path: Path) -> str:
    """Return a path as a message names it: relative to the checkout when inside it."""
    path = path.resolve()
    inside = not INSTALLED and path.is_relative_to(PROJECT_ROOT)
    return str(path.relative_to(PROJECT_ROOT)) if inside else str(path)


def _parse(path: Path, text: str) -> YamlFile:
    where = shown(path)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        body = loader.construct_document(node) if node is not None else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).split("\n")[0]
        line = f":{mark.line + 1}" if mark else ""
        return YamlFile(path, text, problems=(f"{where}{line}: not valid YAML: {what}.",))
    finally:
        loader.dispose()
    if not isinstance(body, dict):
        found = "a list" if isinstance(body, list) else repr(str(body))
        return YamlFile(path, text, problems=(f"{where}:1: expected `key: value` lines, got {found}.",))
    problems = list(_twice(node, where)) if node is not None else []
    lines = _lines(node) if node is not None else {}
    body = {str(k): v for k, v in body.items()}
    for key, value in list(leaves(body)):
        reason = interpolation_problem(value)
        if reason:
            problems.append(f"{where}:{_line_of(lines, key) or 1}: `{key}`: {value} is no interpolation: {reason}.")
            remove(body, key)
    return YamlFile(path, text, body, lines, tuple(problems))


def _twice(node: yaml.Node, where: str) -> Iterator[str]:
    """Yield the keys that are repeated in one mapping: YAML itself would silently take the last."""
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in first and key.value != "<<":
                yield f"{where}:{line}: `{key.value}` is repeated, first in line {first[key.value]}: keep one."
            first.setdefault(str(key.value), line)
            yield from _twice(value, where)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _twice(item, where)


def _lines(node: yaml.Node) -> Lines:
    if isinstance(node, yaml.MappingNode):
        return {str(k.value): (k.start_mark.line + 1, _lines(v)) for k, v in node.value}
    if isinstance(node, yaml.SequenceNode):
        return {str(i): (v.start_mark.line + 1, _lines(v)) for i, v in enumerate(node.value)}
    return {}


def _line_of(lines: Lines, key: str) -> int | None:
    for name, (line, below) in lines.items():
        if name == key:
            return line
        if key.startswith(name + "."):
            deeper = _line_of(below, key[len(name) + 1 :])
            if deeper:
                return deeper
    return None


def interpolation_problem(value: Any) -> str | None:
    """Return what is wrong with the grammar of `${...}` in a text, or None."""
    if "${" not in str(value):
        return None
    try:
        OmegaConf.create({"value": value})
    except OmegaConfBaseException as error:
        return str(error).split("\n")[0].rstrip(".")
    return None
