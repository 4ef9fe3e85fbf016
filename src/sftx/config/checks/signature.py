"""What a component takes: its class is imported and inspected.

A component imports torch when it is built, not when its module is imported, so that a mistake is reported at once.
Only what the allowlist allows is imported (see `allowlist.refusal`).
"""

from __future__ import annotations

import inspect
import pkgutil
from dataclasses import InitVar, dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, get_type_hints

from sftx.errors import did_you_mean


@dataclass(frozen=True)
class Argument:
    """One argument of a component: its type if it has one, and whether it must be given."""

    name: str
    kind: Any
    required: bool


@dataclass(frozen=True)
class Signature:
    """The arguments of a class or function."""

    arguments: dict[str, Argument]
    open: bool
    """True when it takes `**kwargs`: any further key is allowed."""


class TargetNotFound(LookupError):
    """There is no such module, or nothing of that name in it, or it cannot be imported."""


def find(target: str) -> Any:
    """Import what a dotted path names.

    Raises:
        TargetNotFound: no module or no name of it is found, or the module cannot be imported.
    """
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = _module(".".join(parts[:cut]))
        if module is None:
            continue
        found: Any = module
        for name in parts[cut:]:
            if not hasattr(found, name):
                raise TargetNotFound(_missing(module, parts[cut:]))
            found = getattr(found, name)
        return found
    raise TargetNotFound(f"no module `{'.'.join(parts[:-1]) or target}` can be imported.")


def _module(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if name == error.name or name.startswith(f"{error.name}."):
            return None
        raise TargetNotFound(f"`{name}` cannot be imported: {error}.") from None
    except SyntaxError as error:
        raise TargetNotFound(f"{error.filename}:{error.lineno}: {error.msg}") from None
    except Exception as error:  # noqa: BLE001 - what a user's module raises
        raise TargetNotFound(f"`{name}` cannot be imported: {type(error).__name__}: {error}") from None


def _missing(module: ModuleType, names: list[str]) -> str:
    if len(names) > 1 and hasattr(module, "__path__") and not hasattr(module, names[0]):
        modules = [info.name for info in pkgutil.iter_modules(module.__path__)]
        return f"no module `{module.__name__}.{names[0]}` can be imported.{did_you_mean(names[0], modules)}"
    public = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
    return f"no class or function `{'.'.join(names)}` in {module.__name__}.{did_you_mean(names[0], public)}"


def defined_as(found: Any) -> str | None:
    """Return the dotted path where a class or a function is defined; None for anything else."""
    if inspect.isclass(found) or inspect.isroutine(found):
        return f"{getattr(found, '__module__', None)}.{found.__qualname__}"
    return None


def read_signature(target: str) -> Signature | None:
    """Return the signature of a dotted path, or None when only running it could tell (compiled code).

    Raises:
        TargetNotFound: it cannot be imported.
    """
    found = find(target)
    return _signature(found) if callable(found) else None


@cache
def _signature(found: Any) -> Signature | None:
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return None
    hints = _hints(found) | (_hints(found.__init__) if inspect.isclass(found) else {})
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    arguments = {p.name: Argument(p.name, hints.get(p.name), p.default is p.empty) for p in named}
    return Signature(arguments, any(p.kind is p.VAR_KEYWORD for p in parameters))


def _hints(found: Any) -> dict[str, Any]:
    """Return the types of a class's fields or of a function's arguments; none when one of them has no meaning here."""
    try:
        hints = get_type_hints(found, include_extras=True)
    except Exception:  # noqa: BLE001 - names that only a type checker imports
        return {}
    return {name: hint.type if isinstance(hint, InitVar) else hint for name, hint in hints.items()}
