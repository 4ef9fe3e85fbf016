"""A component's arguments: what a user's own class may look like."""

import sys

import pytest

from sftx.config.checks.signature import TargetNotFound, read_signature
from sftx.config.checks.types import describe

OWN = '''
import abc
import collections
import dataclasses
import json as js
from abc import ABC
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import ClassVar, Generic, TypeVar

import torch.nn as nn
from own_base import Base as Parent
from own_base import Base

T = TypeVar("T")

class Plain:
    def __init__(self, rate: float, steps: int = 3, *, name: "str | None" = None, untyped=1): ...

class Open:
    def __init__(self, a: int, **kwargs): ...

@dataclass
class Data(Generic[T]):
    kind: ClassVar[str] = "x"
    a: int
    b: list[str] = field(default_factory=list)
    _: KW_ONLY
    c: InitVar[float] = 1.0
    d: int = dataclasses.field(init=False)
    e: float = field(repr=False)

@dataclasses.dataclass
class Child(Data):
    a: str = "changed"
    f: bool = False

class FromElsewhere(Parent):
    pass

class Overridden(Base):
    def __init__(self, only: int): ...

class Module(nn.Module):
    """Its base takes `*args` and `**kwargs`: whatever it takes is allowed."""

class Annotated:
    not_an_argument: int = 3

class Factory:
    @classmethod
    def build(cls, depth: int): ...

    @staticmethod
    def make(width: int): ...

def function(x: int, y=None): ...

Alias = Plain

if True:
    class Conditional:
        def __init__(self, z: int): ...

try:
    import nothing_here
except ImportError:
    def nothing_here(q: int): ...
'''
BASE = """
class Base:
    def __init__(self, inherited: int, other: float = 2.0): ...
"""


@pytest.fixture(scope="module", autouse=True)
def own(tmp_path_factory):
    """A user's own modules on sys.path."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_parts.py").write_text(OWN, encoding="utf-8")
    (folder / "own_base.py").write_text(BASE, encoding="utf-8")
    (folder / "own_broken.py").write_text("class Half:\n    def __init__(self:\n", encoding="utf-8")
    (folder / "own_raises.py").write_text("raise RuntimeError('no')\n", encoding="utf-8")
    (folder / "own_needs.py").write_text("import nothing_here\n", encoding="utf-8")
    package = folder / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import Deep\nfrom . import inner\n", encoding="utf-8")
    (package / "inner.py").write_text("class Deep:\n    def __init__(self, d: int): ...\n")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


CASES = {
    "own_parts.Plain": "rate: a number!, steps: an integer, name: null or a string, untyped: None",
    "own_parts.Alias": "rate: a number!, steps: an integer, name: null or a string, untyped: None",
    "own_parts.Open": "a: an integer!, **",
    "own_parts.Data": "a: an integer!, b: a list of strings, c: a number, e: a number!",
    "own_parts.Child": "a: a string, b: a list of strings, f: true or false, c: a number, e: a number!",
    "own_parts.FromElsewhere": "inherited: an integer!, other: a number",
    "own_parts.Overridden": "only: an integer!",
    "own_parts.Module": "**",
    "own_parts.Annotated": "",
    "own_parts.Factory.build": "depth: an integer!",
    "own_parts.Factory.make": "width: an integer!",
    "own_parts.function": "x: an integer!, y: None",
    "own_parts.Conditional": "z: an integer!",
    "own_parts.nothing_here": "q: an integer!",
    "own_package.Deep": "d: an integer!",
    "own_package.inner.Deep": "d: an integer!",
}


@pytest.mark.parametrize(("target", "wanted"), CASES.items(), ids=CASES)
def test_arguments(target, wanted):
    signature = read_signature(target)
    kinds = {name: a.kind and describe(a.kind) for name, a in signature.arguments.items()}
    written = [f"{a.name}: {kinds[a.name]}{'!' * a.required}" for a in signature.arguments.values()]
    assert ", ".join(written + ["**"] * signature.open) == wanted


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("own_parts.Plian", "no class or function `Plian` in own_parts. Did you mean `Plain`?"),
        (
            "own_package.iner.Deep",
            "no module `own_package.iner` can be imported. Did you mean `inner`?",
        ),
        ("own_nothing.Thing", "no module `own_nothing` can be imported"),
        ("own_raises.Thing", "`own_raises` cannot be imported: RuntimeError: no"),
        ("own_needs.Thing", "`own_needs` cannot be imported: No module named 'nothing_here'"),
        ("justaname", "no module `justaname` can be imported"),
        ("own_broken.Half", "own_broken.py:2: "),
    ],
)
def test_target_not_found(target, said):
    with pytest.raises(TargetNotFound) as error:
        read_signature(target)
    assert said in str(error.value)


@pytest.mark.parametrize("target", ["builtins.dict", "_json.make_encoder"])
def test_compiled_code_is_left_to_python(target):
    assert read_signature(target) is None
