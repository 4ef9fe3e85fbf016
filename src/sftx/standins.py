"""Stand-ins for modules that others import and a plain run never uses: a quarter of what its start would cost.

transformers, PEFT and torch itself import SciPy, SymPy, tensors split over processes, and TorchDynamo, for a class to
compare with, to keep a function uncompiled, to check a size that is known. A stand-in is what they find instead. It
hands out names, and becomes the real module as soon as a name is called, looked into or inherited from, or anything
else is wanted of it. While a module is not there nothing can be an instance of its classes: `isinstance` needs no
import either. `real` is the one place where a stand-in becomes what it stands for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection
from functools import cache, partial, wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType
from typing import Any, Union

DYNAMO = "torch._dynamo"
SHAPES = "torch.fx.experimental.symbolic_shapes"
EXPORT = "torch.export"
ALL = None
MODULES: dict[str, Collection[str] | None] = {
    "bitsandbytes": {"nn"},
    "bitsandbytes.nn": ALL,
    "scipy.optimize": ALL,
    "sympy": {"Basic"},
    "torch._dynamo._trace_wrapped_higher_order_op": ALL,
    "torch._dynamo.config": {"error_on_nested_fx_trace"},
    "torch._dynamo.eval_frame": {"OptimizedModule"},
    "torch.distributed._composable.fsdp": ALL,
    "torch.distributed._functional_collectives": ALL,
    "torch.distributed.checkpoint.hf_storage": ALL,
    "torch.distributed.fsdp": ALL,
    "torch.distributed.fsdp.fully_sharded_data_parallel": ALL,
    "torch.distributed.tensor": ALL,
    "torch.distributed.tensor._utils": ALL,
    "torch.distributed.tensor.placement_types": ALL,
    "transformers.distributed.expert_parallel": ALL,
    "transformers.distributed.tensor_parallel": ALL,
}
"""Which names of a module are handed out, those of classes and functions; another one imports it."""
MARKS = ("allow_in_graph", "assume_constant_result")
"""TorchDynamo's functions that note something of a function and return it."""
ANSWERS: dict[str, Callable[..., Any]] = {
    "expect_true": lambda value: value,
    "guard_or_false": lambda value: value,
    "guard_or_true": lambda value: value,
    "is_nested_int": lambda value: False,
    "statically_known_true": lambda value: value,
    "sym_and": lambda *values: all(values),
    "sym_eq": lambda value, other: value == other,
    "sym_or": lambda *values: any(values),
}
"""What torch asks about sizes, which is easily answered where they are numbers and truth values of Python's."""


def stand_in() -> None:
    """Let stand-ins take the places of modules that are not imported yet, in a process that computes alone."""
    export = StandIn(EXPORT, ALL)
    if "torch" not in sys.modules:
        sys.modules[EXPORT] = export  # torch imports it itself
    import torch  # noqa: F401 - imports the packages that the modules are in

    if sys.modules.get(EXPORT) is export:
        _put_into_package(export)
    modules = [Dynamo(DYNAMO), SymbolicShapes(SHAPES), *(StandIn(name, names) for name, names in MODULES.items())]
    for module in modules:
        if module.__name__ not in sys.modules:
            sys.modules[module.__name__] = module
            _put_into_package(module)
    if not any(isinstance(finder, Inside) for finder in sys.meta_path):
        sys.meta_path.insert(0, Inside())


def real(name: str) -> ModuleType:
    """Import a module; where it is a stand-in, those of its package leave together, as they import each other."""
    left: list[StandIn] = []
    if isinstance(sys.modules.get(name), StandIn):
        package = name.partition(".")[0]
        there = list(sys.modules.items())  # other threads import, too
        left = [m for n, m in there if isinstance(m, StandIn) and n.partition(".")[0] == package]
    for gone in left:
        sys.modules.pop(gone.__name__, None)
    module = importlib.import_module(name)
    _put_into_package(module)
    for dynamo in (m for m in left if isinstance(m, Dynamo)):
        compiler = importlib.import_module(DYNAMO)
        for mark, function in dynamo.marked:
            getattr(compiler, mark)(function)
    return module


def _put_into_package(module: ModuleType) -> None:
    package, _, child = module.__name__.rpartition(".")
    if package in sys.modules:
        setattr(sys.modules[package], child, module)


def _is_there(module: str) -> bool:
    return not isinstance(sys.modules.get(module), StandIn | None)


class StandIn(ModuleType):
    """A module that is imported when more than some of its names is wanted."""

    def __init__(self, name: str, names: Collection[str] | None = ()) -> None:
        super().__init__(name)
        self._names = names
        self.__spec__ = ModuleSpec(name, None)  # looked at when a module is imported again
        self.__path__: list[str] = []  # what is inside is found by `Inside`

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # others look for these in all modules
            raise AttributeError(name)
        handed_out = self._names is ALL or name in self._names
        return Name(self.__name__, name) if handed_out else getattr(real(self.__name__), name)


class SymbolicShapes(StandIn):
    """What reasons about sizes that are not known yet; torch asks it about all."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return (Question if name in ANSWERS else Name)(self.__name__, name)


class Dynamo(StandIn):
    """TorchDynamo, which need not be told how to compile before it is there."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.marked: list[tuple[str, Callable[..., Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name in MARKS and not _is_there(DYNAMO):
            return partial(self._mark, name)
        return super().__getattr__(name)

    def _mark(self, mark: str, function: Callable[..., Any]) -> Callable[..., Any]:
        self.marked.append((mark, function))
        return function

    def graph_break(self, *args: Any, **kwargs: Any) -> None:
        """Let what comes not be compiled with what was."""
        if _is_there(DYNAMO):
            real(DYNAMO).graph_break(*args, **kwargs)

    def disable(self, function: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Keep a function from being compiled, or return what does."""
        if function is None:
            return lambda chosen: self.disable(chosen, *args, **kwargs)
        if not isinstance(function, FunctionType):
            return real(DYNAMO).disable(function, *args, **kwargs)

        @cache
        def disabled() -> Callable[..., Any]:
            return real(DYNAMO).disable(function, *args, **kwargs)

        @wraps(function)
        def call(*inputs: Any, **named: Any) -> Any:
            return (disabled() if _is_there(DYNAMO) else function)(*inputs, **named)

        return call


class Inside(MetaPathFinder, Loader):
    """Finds modules inside those that a stand-in is for: these are imported, and may import the wanted on the way."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        """Return how to import a module inside a stand-in's."""
        package = name.rpartition(".")[0]
        if not isinstance(sys.modules.get(package), StandIn):
            return None
        path = real(package).__path__
        return ModuleSpec(name, self) if name in sys.modules else PathFinder.find_spec(name, path)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module that is there."""
        module = sys.modules[spec.name]
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Leave it as it is."""
        module.__spec__ = self.spec


class Name:
    """A class or function whose module is imported when it is used."""

    def __init__(self, module: str, name: str) -> None:
        self._of = module, name

    def _real(self) -> Any:
        module, name = self._of
        return getattr(real(module), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real(),)

    def __instancecheck__(self, other: object) -> bool:
        return _is_there(self._of[0]) and isinstance(other, self._real())

    def __subclasscheck__(self, other: type) -> bool:
        return _is_there(self._of[0]) and issubclass(other, self._real())

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007 - of objects that stand for types

    def __ror__(self, other: Any) -> Any:
        return Union[other, self]  # noqa: UP007


class Question(Name):
    """One of ANSWERS."""

    def __call__(self, *values: Any, **kwargs: Any) -> Any:
        """Answer, or let that answer whose work it is."""
        if kwargs or not all(map(_is_plain, values)):
            return super().__call__(*values, **kwargs)
        return ANSWERS[self._of[1]](*values)


def _is_plain(value: object) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else type(value) in (bool, int)
