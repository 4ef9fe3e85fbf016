"""Read a component's arguments from its source text, without importing it.

`python train.py scheduler.poewr=2` must be refused within a second, and importing the class that
would say so takes torch with it. The argument names, types and defaults are in the source.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path


@dataclass(frozen=True)
class Argument:
    """One argument of a component: its written type, and whether it must be given."""

    name: str
    annotation: str | None
    required: bool


@dataclass(frozen=True)
class Signature:
    """The arguments of a class or function, and the first sentence of its docstring."""

    arguments: dict[str, Argument]
    open: bool
    """True when it takes `**kwargs`: any further key is allowed."""
    doc: str


class TargetNotFound(LookupError):
    """There is no such module, or nothing of that name in it."""


@cache
def read_signature(target: str) -> Signature | None:
    """Return the signature of a dotted path, or None when only running it could tell (compiled code).

    Errors:
        TargetNotFound: no module or no name of it is found.
    """
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        path = _module_file(".".join(parts[:cut]))
        if path is None:
            continue
        if path.suffix != ".py":
            return None
        if len(parts) - cut != 1:
            raise TargetNotFound(f"nothing called `{'.'.join(parts[cut:])}` in {'.'.join(parts[:cut])}")
        found = _signature_in(path, parts[cut])
        if found is None:
            raise TargetNotFound(f"no class or function `{parts[cut]}` in {'.'.join(parts[:cut])}")
        return found
    raise TargetNotFound(f"no module `{'.'.join(parts[:-1])}` can be imported")


@cache
def public_names(module: str) -> tuple[str, ...]:
    """Return the names of the classes and functions that a module defines."""
    path = _module_file(module)
    if path is None or path.suffix != ".py":
        return ()
    return tuple(n.name for n in _tree(path).body if isinstance(n, ast.ClassDef | ast.FunctionDef))


def _module_file(module: str) -> Path | None:
    """Find a module's file by walking its packages' folders; runs none of their code."""
    search: list[str] = sys.path
    spec = None
    done = ""
    for part in module.split("."):
        done = f"{done}.{part}" if done else part
        spec = PathFinder.find_spec(done, search)
        if spec is None:
            return None
        search = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec and spec.origin else None


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _signature_in(path: Path, name: str) -> Signature | None:
    for node in _tree(path).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _of_function(node, skip_self=False)
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _of_class(path, node)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return read_signature(f"{node.module}.{alias.name}")
    return None


def _of_class(path: Path, node: ast.ClassDef) -> Signature:
    doc = _first_sentence(ast.get_docstring(node))
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            inner = _of_function(item, skip_self=True)
            return Signature(inner.arguments, inner.open, doc)
    arguments: dict[str, Argument] = {}
    is_open = False
    for base in node.bases:
        inherited = _signature_in(path, base.id) if isinstance(base, ast.Name) else None
        if inherited:
            arguments |= inherited.arguments
            is_open |= inherited.open
    for item in node.body:  # a dataclass's fields
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            written = ast.unparse(item.annotation)
            computed = item.value is not None and "init=False" in ast.unparse(item.value)
            if not written.startswith("ClassVar") and not computed:
                arguments[item.target.id] = Argument(item.target.id, written, item.value is None)
    return Signature(arguments, is_open, doc)


def _of_function(node: ast.FunctionDef, *, skip_self: bool) -> Signature:
    plain = node.args.posonlyargs + node.args.args
    optional_from = len(plain) - len(node.args.defaults)
    arguments = {
        a.arg: Argument(a.arg, ast.unparse(a.annotation) if a.annotation else None, i < optional_from)
        for i, a in enumerate(plain)
    }
    if skip_self:
        arguments.pop(plain[0].arg)
    for a, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        arguments[a.arg] = Argument(a.arg, ast.unparse(a.annotation) if a.annotation else None, default is None)
    return Signature(arguments, node.args.kwarg is not None, _first_sentence(ast.get_docstring(node)))


def _first_sentence(doc: str | None) -> str:
    paragraph = " ".join((doc or "").split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".")
