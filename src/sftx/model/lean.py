"""Imports that cost no more than what a run uses of them."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

from sftx.standins import StandIn, real

EXPORTS = "transformers.utils.import_utils"
"""The module by which transformers reads what the 1,600 files of its models export."""


def read_exports_once() -> None:
    """Let transformers, when it is imported, read each of its models' files once, not twice, and not line by line.

    Its own memory of what it has read holds 128 folders, and there are over 500.
    """
    if "transformers" not in sys.modules:
        sys.meta_path.insert(0, _Exports())


class _Exports(MetaPathFinder):
    """Finds the one module as it is found anyway, and changes two of its functions before they are used."""

    def find_spec(self, name: str, path: Any, target: object = None) -> ModuleSpec | None:
        if name != EXPORTS:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def execute_and_change(module: Any) -> None:
                execute(module)
                _read_quickly(module)

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def _read_quickly(module: Any) -> None:
    read_folder = getattr(getattr(module, "create_import_structure_from_path", None), "__wrapped__", None)
    read_names = getattr(module, "fetch__all__", None)
    if read_folder is None or read_names is None:  # another transformers
        return

    def names(text: str) -> Any:
        start = text.rfind("\n__all__") + 1
        return read_names(text[start:] if start or text.startswith("__all__") else "")

    module.create_import_structure_from_path = functools.cache(read_folder)
    module.fetch__all__ = names


def compile_patterns_later() -> None:
    """Let transformers compile, of a thousand patterns that rename the weights of all architectures, those it uses."""
    from transformers import core_model_loading as loading

    if getattr(loading, "re", None) is re:
        loading.re = _Patterns()


class _Patterns:
    """The module `re`, but for when it compiles."""

    def __getattr__(self, name: str) -> Any:
        return getattr(re, name)

    def compile(self, pattern: str, flags: int = 0) -> _Pattern:
        """Return what compiles itself."""
        return _Pattern(pattern, flags)


class _Pattern:
    """A regular expression that is compiled when it is looked at."""

    def __init__(self, pattern: str, flags: int) -> None:
        self._source = pattern, flags

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(re.compile(*self._source), name)

    def __deepcopy__(self, memo: object) -> _Pattern:
        return self


def import_peft() -> None:
    """Import PEFT, without TorchInductor."""
    _import("peft")


def bitsandbytes() -> Any:
    """Import bitsandbytes, without TorchInductor: a third of the start of a run.

    It decorates functions with `torch.compile`, which imports the compiler when it decorates.
    """
    return _import("bitsandbytes")


def _import(name: str) -> Any:
    if name in sys.modules and not isinstance(sys.modules[name], StandIn):
        return sys.modules[name]
    with _compiling_later():
        return real(name)


@contextmanager
def _compiling_later() -> Iterator[None]:
    """Let `torch.compile` do nothing until what it returned is called."""
    import torch

    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return functools.partial(compile_later, **options)

        @functools.cache
        def compiled() -> Callable[..., Any]:
            return compile_now(function, **options)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return call

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now
