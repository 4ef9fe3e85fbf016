"""A component's arguments, read from its source: what a user's own class may look like."""

import sys
from pathlib import Path

import pytest

from sftx.config.signature import TargetNotFound, module_file, read_signature

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

raise RuntimeError("reading a signature must not run the module")

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

@dataclasses.dataclass(frozen=True)
class Child(Data):
    a: str = "changed"
    f: bool = False

class FromElsewhere(Parent):
    pass

class Overridden(Base):
    def __init__(self, only: int): ...

class Module(nn.Module):
    """Its base cannot be read: whatever it takes is allowed."""

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
    package = folder / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import Deep\nfrom . import inner\n", encoding="utf-8")
    (package / "inner.py").write_text("from ..own_base import X\nclass Deep:\n    def __init__(self, d: int): ...\n")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


CASES = {
    "own_parts.Plain": "rate: float!, steps: int, name: 'str | None', untyped: None",
    "own_parts.Alias": "rate: float!, steps: int, name: 'str | None', untyped: None",
    "own_parts.Open": "a: int!, **",
    "own_parts.Data": "a: int!, b: list[str], c: float, e: float!",
    "own_parts.Child": "a: str, b: list[str], c: float, e: float!, f: bool",
    "own_parts.FromElsewhere": "inherited: int!, other: float",
    "own_parts.Overridden": "only: int!",
    "own_parts.Module": "**",
    "own_parts.Annotated": "",
    "own_parts.Factory.build": "depth: int!",
    "own_parts.Factory.make": "width: int!",
    "own_parts.function": "x: int!, y: None",
    "own_parts.Conditional": "z: int!",
    "own_parts.nothing_here": "q: int!",
    "own_package.Deep": "d: int!",
    "own_package.inner.Deep": "d: int!",
}


@pytest.mark.parametrize(("target", "wanted"), CASES.items(), ids=CASES)
def test_arguments(target, wanted):
    signature = read_signature(target)
    written = [f"{a.name}: {a.annotation}{'!' * a.required}" for a in signature.arguments.values()]
    assert ", ".join(written + ["**"] * signature.open) == wanted
    assert not any(name.startswith("own_") for name in sys.modules), "the module was run"


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("own_parts.Plian", "no class or function `Plian` in own_parts. Did you mean `Plain`?"),
        (
            "own_package.iner.Deep",
            "no module `own_package.iner` can be imported. Did you mean `own_package.inner.Deep`?",
        ),
        ("own_nothing.Thing", "no module `own_nothing` can be imported"),
        ("sftx.training.schedulrs.Cosine", "Did you mean `sftx.training.schedulers.Cosine`?"),
        ("justaname", "no module `justaname` can be imported"),
        ("own_broken.Half", "own_broken.py:2: "),
    ],
)
def test_target_not_found(target, said):
    with pytest.raises(TargetNotFound) as error:
        read_signature(target)
    assert said in str(error.value)


@pytest.mark.parametrize("target", ["builtins.dict", "math.sqrt", "_json.make_encoder"])
def test_compiled_code_is_left_to_python(target):
    assert read_signature(target) is None


def test_a_module_in_folders_without_init_files_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without `__init__.py` inside a package, and inside such a folder."""
    file = tmp_path / "a_package" / "plain" / "deeper" / "parts.py"
    file.parent.mkdir(parents=True)
    file.write_text("class Mine:\n    def __init__(self, x: int) -> None: ...\n")
    (tmp_path / "a_package" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert module_file("a_package.plain.deeper.parts") == file
    assert module_file("a_package.plain.deeper.missing") is None
    assert module_file("a_package.plain") is None
