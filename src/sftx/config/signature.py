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
from importlib.util import find_spec
from pathlib import Path

from sftx.errors import did_you_mean, nearest


@dataclass(frozen=True)
class Argument:
    """One argument of a component: its written type, and whether it must be given."""

    name: str
    annotation: str | None
    required: bool


@dataclass(frozen=True)
class Signature:
    """The arguments of a class or function."""

    arguments: dict[str, Argument]
    open: bool
    """True when it takes `**kwargs`, or cannot be read in full: any further key is allowed."""


class TargetNotFound(LookupError):
    """There is no such module, or nothing of that name in it, or its source cannot be read."""


@cache
def read_signature(target: str) -> Signature | None:
    """Return the signature of a dotted path, or None when only running it could tell (compiled code).

    Errors:
        TargetNotFound: no module or no name of it is found, or the module has a syntax error.
    """
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        if module in sys.builtin_module_names:
            return None
        path = module_file(module)
        if path is None:
            continue
        if path.suffix != ".py":
            return None
        source = _Module(module, path)
        if path.stem == "__init__" and len(parts) - cut > 1 and not source.defines(parts[cut]):
            break  # what is missing is a module of the package
        return source.signature(parts[cut:])
    near = nearest_module(".".join(parts[:-1]))
    hint = f" Did you mean `{near}.{parts[-1]}`?" if near else ""
    raise TargetNotFound(f"no module `{'.'.join(parts[:-1]) or target}` can be imported.{hint}")


@cache
def definition(target: str, hops: int = 20) -> str | None:
    """Return the dotted path where a class or a function is defined, imports followed; None when no source says it."""
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        path = module_file(".".join(parts[:cut]))
        if path is None:
            continue
        if path.suffix != ".py" or not hops:  # compiled, or two modules that import from each other
            return None
        return _Module(".".join(parts[:cut]), path).place(parts[cut:], hops - 1)
    return None


@cache
def methods_of(target: str) -> frozenset[str] | None:
    """Return the methods and class attributes of a class, inherited ones too; None when no source says it."""
    module, _, name = (definition(target) or "").rpartition(".")
    path = module_file(module) if module else None
    node = None if path is None else _Module(module, path).statement(name)
    if isinstance(node, ast.FunctionDef):
        return frozenset()
    if not isinstance(node, ast.ClassDef):
        return None
    found = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    found |= {
        t.id for item in node.body if isinstance(item, ast.Assign) for t in item.targets if isinstance(t, ast.Name)
    }
    for base in map(_base_name, node.bases):
        if base.rpartition(".")[2] in PLAIN_BASES:
            continue
        inherited = methods_of(f"{module}.{base}")
        if inherited is None:
            return None
        found |= inherited
    return None if "__getattr__" in found else frozenset(found)


PLAIN_BASES = ("object", "ABC", "Generic", "Protocol")


def _base_name(base: ast.expr) -> str:
    return ast.unparse(base.value if isinstance(base, ast.Subscript) else base)


@cache
def public_names(module: str) -> tuple[str, ...]:
    """Return the names of the classes and functions that a module defines."""
    path = module_file(module)
    if path is None or path.suffix != ".py":
        return ()
    named = (n for n in _tree(path).body if isinstance(n, ast.ClassDef | ast.FunctionDef))
    return tuple(n.name for n in named if not n.name.startswith("_"))


def defines_class(target: str) -> bool:
    """Tell whether `package.module.Class` is a class that this very module defines."""
    module, _, name = target.rpartition(".")
    path = module_file(module) if module else None
    return path is not None and path.suffix == ".py" and _Module(module, path).is_class(name)


@cache
def module_file(module: str) -> Path | None:
    """Find a module's file by walking its packages' folders; runs none of their code."""
    first, *rest = module.split(".")
    try:
        spec = find_spec(first)  # a top-level name: nothing is imported
    except (ImportError, ValueError):
        return None
    for part in rest:
        search = list((spec and spec.submodule_search_locations) or [])
        spec = PathFinder.find_spec(part, search) if search else None  # the whole name would need its parent imported
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    return Path(spec.origin)


def nearest_module(module: str) -> str | None:
    """Return the module that exists and whose last part is spelled most like this one's, or None."""
    parent, _, name = module.rpartition(".")
    package = module_file(parent) if parent else None
    if package is None:
        return None
    found = nearest(name, (m.stem for m in package.parent.glob("*.py")))
    return f"{parent}.{found}" if found else None


@cache
def _tree(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise TargetNotFound(f"{path}:{error.lineno}: {error.msg}") from None


@dataclass(frozen=True)
class _Module:
    """A module's source, in which names are looked up."""

    name: str
    path: Path

    def defines(self, name: str) -> bool:
        """Tell whether the module binds a name."""
        return self.statement(name) is not None

    def signature(self, names: list[str]) -> Signature | None:
        """Return the signature of `Class`, `function` or `Class.method`."""
        node = self.statement(names[0])
        if node is None:
            hint = did_you_mean(names[0], public_names(self.name))
            raise TargetNotFound(f"no class or function `{names[0]}` in {self.name}.{hint}")
        match node, names[1:]:
            case ast.FunctionDef(), []:
                return _of_function(node, skip_first=False)
            case ast.ClassDef(), []:
                return self._of_class(node)
            case ast.ClassDef(), [method]:
                return self._of_method(node, method)
            case ((ast.Import() | ast.ImportFrom()), rest):
                return self._imported(node, names[0], rest)
            case ast.Assign(value=ast.Name(id=other)), rest if other != names[0]:
                return self.signature([other, *rest])
        return None

    def place(self, names: list[str], hops: int) -> str | None:
        """Return where `Class`, `function` or `Class.method` is defined, or None."""
        node = self.statement(names[0])
        match node, names[1:]:
            case ((ast.FunctionDef() | ast.ClassDef()), []):
                return f"{self.name}.{names[0]}"
            case ast.ClassDef(), [method] if any(
                isinstance(i, ast.FunctionDef) and i.name == method for i in node.body
            ):
                return f"{self.name}.{names[0]}.{method}"
            case ((ast.Import() | ast.ImportFrom()), rest):
                imported = self._import_of(node, names[0])
                return definition(".".join([imported, *rest]), hops) if "." in imported or rest else None
            case ast.Assign(value=ast.Name(id=other)), rest if hops:
                return self.place([other, *rest], hops - 1)
        return None

    def is_class(self, name: str) -> bool:
        """Tell whether the module itself defines a class of this name."""
        return isinstance(self.statement(name), ast.ClassDef)

    def statement(self, name: str) -> ast.stmt | None:
        """Return the last statement that binds a name, also inside `if` and `try` blocks."""
        found: ast.stmt | None = None
        waiting: list[ast.stmt] = list(_tree(self.path).body)
        while waiting:
            node = waiting.pop(0)
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() if node.name == name:
                    found = node
                case ast.Import() | ast.ImportFrom() if any((a.asname or a.name) == name for a in node.names):
                    found = node
                case ast.Assign() if any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                    found = node
                case ast.If() | ast.Try():
                    handlers = node.handlers if isinstance(node, ast.Try) else []
                    waiting = [*node.body, *(s for h in handlers for s in h.body), *node.orelse, *waiting]
        return found

    def _imported(self, node: ast.Import | ast.ImportFrom, name: str, rest: list[str]) -> Signature | None:
        if isinstance(node, ast.Import) and not rest:
            return None
        return read_signature(".".join([self._import_of(node, name), *rest]))

    def _import_of(self, node: ast.Import | ast.ImportFrom, name: str) -> str:
        """Return the dotted path of what an import statement binds to a name."""
        alias = next(a for a in node.names if (a.asname or a.name) == name)
        if isinstance(node, ast.Import):
            return alias.name
        module = node.module or ""
        if node.level:
            levels = self.name.split(".")
            keep = len(levels) - node.level + (self.path.stem == "__init__")
            module = ".".join([*levels[:keep], *([module] if module else [])])
        return f"{module}.{alias.name}"

    def _of_method(self, owner: ast.ClassDef, name: str) -> Signature | None:
        for item in owner.body:
            if isinstance(item, ast.FunctionDef) and item.name == name:
                static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in item.decorator_list)
                return _of_function(item, skip_first=not static)
        return None

    def _of_class(self, node: ast.ClassDef) -> Signature | None:
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name in ("__init__", "__new__"):
                return _of_function(item, skip_first=True)
        arguments: dict[str, Argument] = {}
        is_open = False
        for base in reversed(node.bases):  # Python's order: the first base wins
            inherited = self._of_base(base)
            if inherited is None:
                is_open = True  # what it takes cannot be read
            else:
                arguments |= inherited.arguments
                is_open |= inherited.open
        if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            fields = arguments | _fields(node)
            arguments = {name: argument for name, argument in fields.items() if argument is not None}
        return Signature(arguments, is_open)

    def _of_base(self, base: ast.expr) -> Signature | None:
        name = _base_name(base)
        if name.rpartition(".")[2] in PLAIN_BASES:
            return Signature({}, False)
        try:
            return self.signature(name.split("."))
        except TargetNotFound:
            return None


def _fields(node: ast.ClassDef) -> dict[str, Argument | None]:
    """Return a dataclass's own fields; None for one that its constructor does not take, inherited or not."""
    arguments: dict[str, Argument | None] = {}
    for item in node.body:
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
            continue
        name, written = item.target.id, ast.unparse(item.annotation)
        given = ast.unparse(item.value) if item.value is not None else ""
        if "ClassVar" in written or "KW_ONLY" in written or "init=False" in given:
            arguments[name] = None
            continue
        is_bare_field = given.startswith(("field(", "dataclasses.field(")) and "default" not in given
        if written.startswith(("InitVar[", "dataclasses.InitVar[")):
            written = written.partition("[")[2][:-1]
        arguments[name] = Argument(name, written, not given or is_bare_field)
    return arguments


def _of_function(node: ast.FunctionDef, *, skip_first: bool) -> Signature:
    plain = node.args.posonlyargs + node.args.args
    optional_from = len(plain) - len(node.args.defaults)
    arguments = {
        a.arg: Argument(a.arg, ast.unparse(a.annotation) if a.annotation else None, i < optional_from)
        for i, a in enumerate(plain)
    }
    if skip_first and plain:
        arguments.pop(plain[0].arg)
    for a, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        arguments[a.arg] = Argument(a.arg, ast.unparse(a.annotation) if a.annotation else None, default is None)
    return Signature(arguments, node.args.kwarg is not None)
