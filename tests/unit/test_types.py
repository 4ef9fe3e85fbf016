"""A plain value against a written type: what matches, and how the type is said."""

import math
import typing  # noqa: F401
from collections.abc import Mapping, Sequence  # noqa: F401 - named in the types below
from datetime import date  # noqa: F401
from typing import Annotated, Literal, Optional, Union  # noqa: F401

import pytest

from sftx.config.bounds import Bounds  # noqa: F401
from sftx.config.checks.types import describe, is_text, matches, options_of
from sftx.config.schema import Node  # noqa: F401

MATCHES = [
    ("int", [0, -3], [1.0, "1", True, None]),
    ("float", [0, 1.5], ["1.5", True, math.nan, math.inf]),
    ("bool", [True, False], [0, 1, "true", None]),
    ("str", ["", "x"], [1, None, ["x"]]),
    ("int | None", [3, None], [3.5, ""]),
    ("Optional[int]", [3, None], ["3"]),
    ("typing.Union[int, str]", [3, "x"], [3.5, None]),
    ("Literal['a', 8]", ["a", 8], ["b", "8", 8.0]),
    ("Literal[True, 1]", [True, 1], [False, 0]),
    ("list[int]", [[], [1, 2]], [[1, "2"], 1, None]),
    ("Sequence[str] | None", [None, ["a"]], ["a", [1]]),
    ("tuple[float, float]", [[0.9, 1]], [[0.9], [0.9, 1, 2], ["a", 1]]),
    ("tuple[int, ...]", [[], [1, 2, 3]], [["a"]]),
    ("dict[str, int]", [{}, {"a": 1}], [{"a": "x"}, []]),
    ("list", [[1, "a"]], [{}, "a"]),
    ("Mapping", [{"a": []}], [[]]),
    ("Annotated[int | None, Bounds(at_least=1)]", [1, None], [0, "1"]),
    ("date", ["anything", 3], []),
    ("typing.Any", ["anything", None], []),
]


@pytest.mark.parametrize(("annotation", "right", "wrong"), MATCHES, ids=[m[0] for m in MATCHES])
def test_matches(annotation, right, wrong):
    assert [v for v in right if not matches(v, eval(annotation))] == []
    assert [v for v in wrong if matches(v, eval(annotation))] == []


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        ("int", "an integer"),
        ("int | float", "a number"),
        ("float | None", "null or a number"),
        ("Optional[str]", "null or a string"),
        ("Union[int, bool]", "true or false or an integer"),
        ('Literal["steps", "no"]', "one of steps, no"),
        ('int | Literal["auto"]', "auto or an integer"),
        ("list[str]", "a list of strings"),
        ("tuple[float, float]", "a list of 2 numbers"),
        ("tuple[int, ...]", "a list of integers"),
        ("tuple[int, str]", "a list of 2: an integer, a string"),
        ("Annotated[int | None, Bounds(at_least=1)]", "null or an integer >= 1"),
        ("Annotated[tuple[float, float], Bounds(at_least=0, below=1)]", "a list of 2 numbers, each >= 0 and < 1"),
        ("dict[str, Node]", "a mapping"),
        ("list", "a list"),
        ("date", "date"),
    ],
)
def test_describe(annotation, words):
    assert describe(eval(annotation)) == words


def test_options_are_those_of_every_literal():
    assert options_of(Literal["a", "b"] | list[Literal["c"]] | None) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("annotation", "text"), [("str", True), ("str | None", True), ("int | str", False), ("Literal['a']", False)]
)
def test_is_text(annotation, text):
    assert is_text(eval(annotation)) is text
