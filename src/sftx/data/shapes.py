"""Shapes: which columns a file has, and how a row of them becomes a record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sftx.data.dialogue import (
    RowError,
    check_order,
    filled,
    history_of,
    pairs_of,
    show,
    text_of,
    tools_of,
    turns_of,
    weight_of,
)
from sftx.data.problems import Problems
from sftx.data.record import Message, Record
from sftx.data.tables import unwritable
from sftx.errors import DataError, did_you_mean, nearest

ShapeName = Literal["auto", "human_assistant", "alpaca", "sharegpt", "messages", "firefly", "prompt_completion"]
DEFAULT_CATEGORY = "default"


@dataclass(frozen=True)
class Shape:
    """The columns of one way to write a corpus."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ("category", "system", "weight")

    @property
    def fields(self) -> tuple[str, ...]:
        """All columns that mean something."""
        return (*self.required, *(name for name in self.optional if name not in self.required))


CHAT = ("category", "system", "tools", "weight")
SHAPES = (
    Shape("human_assistant", ("category", "human", "assistant")),
    Shape("messages", ("messages",), CHAT),
    Shape("sharegpt", ("conversations",), CHAT),
    Shape("firefly", ("conversation",), CHAT),
    Shape("alpaca", ("instruction", "output"), ("category", "input", "history", "system", "weight")),
    Shape("prompt_completion", ("prompt", "completion")),
    Shape("prompt_completion", ("prompt", "response")),
    Shape("prompt_completion", ("question", "answer")),
)
"""In the order in which they are recognised: a file with the columns of several has the first one's shape."""
FIELDS = tuple(dict.fromkeys(name for shape in SHAPES for name in shape.fields))
TURN_FIELDS = ("role", "content")


def check_columns(shape: str, columns: Mapping[str, str | None]) -> None:
    """Raise DataError when `data.shape` or `data.columns` says what no shape has."""
    names = dict.fromkeys(s.name for s in SHAPES)
    if shape != "auto" and shape not in names:
        raise DataError(f"data.shape={shape}: is not known; use auto, {', '.join(names)}.{did_you_mean(shape, names)}")
    for field, column in columns.items():
        if field not in (*FIELDS, *TURN_FIELDS):
            wanted = ", ".join((*FIELDS, *TURN_FIELDS))
            raise DataError(
                f"data.columns: `{field}` (for column `{column}`) is nothing a record has; use {wanted}."
                f"{did_you_mean(field, (*FIELDS, *TURN_FIELDS))}"
            )
    if not _candidates(shape, columns):
        asked = "no shape has all of" if shape == "auto" else f"the shape {shape} has not all of"
        listed = "; ".join(s.name + " (" + ", ".join(s.fields) + ")" for s in SHAPES)
        raise DataError(f"data.columns: {asked} {', '.join(columns)}; shapes are {listed}")


def known_names(columns: Mapping[str, str | None]) -> tuple[str, ...]:
    """Return the names of columns that mean something, by which a header is recognised."""
    return (*FIELDS, *(column for column in columns.values() if column))


def _candidates(shape: str, columns: Mapping[str, str | None]) -> list[Shape]:
    fields = [field for field in columns if field not in TURN_FIELDS]
    chosen = [s for s in SHAPES if shape in ("auto", s.name) and all(f in s.fields for f in fields)]
    if len(fields) < len(columns):
        chosen = [s for s in chosen if s.name in ("messages", "sharegpt")]
    return chosen


class _Names:
    """The names of a row's columns, looked up in any case."""

    def __init__(self, names: Sequence[str], columns: Mapping[str, str | None]) -> None:
        self.names, self._columns = names, columns
        self._exact = set(names)
        self._lowered: dict[str, str] = {}
        for name in names:
            self._lowered.setdefault(name.casefold(), name)
        mapped = (self.find(column) for column in columns.values() if column)
        self._taken = {name for name in mapped if name}

    def find(self, name: str) -> str | None:
        return name if name in self._exact else self._lowered.get(name.casefold())

    def field(self, field: str) -> str | None:
        """Return the column that holds a field, or None; one that is mapped to another field holds no other."""
        if field in self._columns:
            column = self._columns[field]
            return self.find(column) if column else None
        found = self.find(field)
        return None if found in self._taken else found


@dataclass(frozen=True)
class _Plan:
    """Where a row's fields are, and what else it has."""

    places: dict[str, str]
    others: tuple[str, ...]


class Shaper:
    """Turns the rows of one file into records."""

    def __init__(
        self,
        problems: Problems,
        *,
        source: str,
        shape: str = "auto",
        columns: Mapping[str, str | None] | None = None,
        keep: bool = True,
        kind: str = "key",
    ) -> None:
        self._problems, self._file, self._source = problems, str(problems.path), source
        self._columns, self._keep, self._kind = columns or {}, keep, kind
        check_columns(shape, self._columns)
        self._candidates = _candidates(shape, self._columns)
        self._shape: Shape | None = None
        self._pinned: dict[str, str] = {}
        self._plans: dict[tuple[str, ...], _Plan | list[str]] = {}

    @property
    def shape(self) -> str | None:
        """The name of the shape, once a row or header has shown it."""
        return self._shape.name if self._shape else None

    def header(self, names: Sequence[str], line: int, told: str = "") -> None:
        """Take the columns of all rows; raises DataError when one is missing or any is repeated."""
        plan = self._plan(tuple(names))
        missing = plan if isinstance(plan, list) else []
        wrong = [*_repeated(names), *(reason + told for reason in missing)]
        for reason in wrong:
            self._problems.file(line, reason)
        if wrong:
            self._problems.check()

    def record(self, line: int, row: object) -> Record | None:
        """Return a row's record, or note what is wrong with it."""
        try:
            return self._record(line, row)
        except RowError as error:
            for reason in error.args:
                self._problems.row(line, reason)
        return None

    def _record(self, line: int, row: object) -> Record:
        if not isinstance(row, dict):
            wanted = ", ".join(self._wanted(self._shape or self._candidates[0]))
            raise RowError(f"{show(row)} is not an object; write one object with the keys {wanted}")
        plan = self._plan(tuple(row))
        if isinstance(plan, list):
            raise RowError(*plan)
        cells = {field: row[column] for field, column in plan.places.items()}
        assert self._shape is not None
        category = DEFAULT_CATEGORY
        if self._shape.name == "human_assistant":
            messages, category = _human_assistant(cells)
        else:
            messages = self._messages(self._shape, cells)
            if cells.get("category") is not None:
                category = text_of(cells["category"], "`category`")
        weight = weight_of(cells.get("weight"), "`weight`")
        tools = tools_of(cells.get("tools"))
        extra = {name: row[name] for name in plan.others} if self._keep else {}
        for name, value in extra.items():
            if (kind := unwritable(value)) is not None:
                raise RowError(
                    f"column `{name}` holds {kind}, which JSON cannot say; set remove_unused_columns=true or drop it"
                )
        weight = 1.0 if weight is None else weight
        return Record(tuple(messages), category, self._file, line, extra, tools, weight, self._source)

    def _plan(self, names: tuple[str, ...]) -> _Plan | list[str]:
        plan = self._plans.get(names)
        if plan is None:
            plan = self._make_plan(_Names(names, self._columns))
            if len(self._plans) < 1000:  # rows of ever other keys must not fill the memory
                self._plans[names] = plan
        return plan

    def _make_plan(self, names: _Names) -> _Plan | list[str]:
        shape = self._shape or self._detect(names)
        places: dict[str, str] = {}
        wrong: list[str] = []
        for field in shape.fields:
            # What the first row calls a column, all rows call it.
            column = self._pinned.get(field) or names.field(field)
            required = field in self._wanted(shape) or self._columns.get(field)
            if column in names.names and column is not None:
                places[field] = column
            elif required:
                wrong.append(
                    _missing(self._kind, self._pinned.get(field) or self._columns.get(field) or field, names, shape)
                )
        if wrong:
            return wrong
        if self._shape is None:
            self._shape = shape
            self._pinned = {field: places[field] for field in self._wanted(shape)}
        used = set(places.values())
        return _Plan(places, tuple(name for name in names.names if name not in used))

    def _wanted(self, shape: Shape) -> tuple[str, ...]:
        """Return what must be there; who maps columns and no category has none."""
        if "category" in self._columns or (self._columns and shape.name == "human_assistant"):
            return tuple(f for f in shape.required if f != "category" or self._columns.get(f))
        return shape.required

    def _detect(self, names: _Names) -> Shape:
        """Return the first shape of which everything is there, else the one of which most is."""
        for shape in self._candidates:
            if all(names.field(field) for field in self._wanted(shape)):
                return shape
        return max(
            self._candidates, key=lambda s: sum(names.field(f) is not None for f in s.required) / len(s.required)
        )

    def _messages(self, shape: Shape, cells: Mapping[str, object]) -> list[Message]:
        if shape.name == "alpaca":
            messages = _alpaca(cells)
        elif shape.name == "firefly":
            messages = pairs_of(cells["conversation"], "`conversation`")
        elif shape.name == "prompt_completion":
            messages = _question(cells, *shape.required)
        else:
            (field,) = shape.required
            messages = turns_of(cells[field], f"`{field}`", self._columns)
        messages = _with_system(cells, messages)
        check_order(messages)
        return messages


def _repeated(names: Sequence[str]) -> Iterator[str]:
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        first = places.setdefault(name.casefold(), place)
        if first != place:
            where = f"columns {first + 1} and {place + 1}"
            yield f"the header name `{name}` is repeated ({where}); rename or delete one of them"


def _missing(kind: str, column: str, names: _Names, shape: Shape) -> str:
    near = nearest(column, [name for name in names.names if name not in shape.fields])
    hint = f", the nearest is `{near}`: rename it" if near else "; rename the one that is meant"
    found = ", ".join(f"`{name}`" for name in names.names) or "none"
    return f"no {kind} `{column}`; found {found}{hint} or add `{column}`"


def _texts(cells: Mapping[str, object], names: Iterable[str]) -> list[str]:
    """Return cells that must be text; what is wrong with any of them is said at once."""
    texts: list[str] = []
    wrong: list[str] = []
    for name in names:
        try:
            texts.append(text_of(cells[name], f"`{name}`"))
        except RowError as error:
            wrong += error.args
    if wrong:
        raise RowError(*wrong)
    return texts


def _question(cells: Mapping[str, object], asked: str, answered: str) -> list[Message]:
    texts = _texts(cells, (asked, answered))
    wrong: list[str] = []
    for name, text in zip((asked, answered), texts, strict=True):
        try:
            filled(text, f"the `{name}` of this row")
        except RowError as error:
            wrong += error.args
    if wrong:
        raise RowError(*wrong)
    return [Message("user", texts[0]), Message("assistant", texts[1])]


def _human_assistant(cells: Mapping[str, object]) -> tuple[list[Message], str]:
    names = [name for name in ("category", "human", "assistant") if name in cells]
    category = _texts(cells, names)[0] if "category" in cells else DEFAULT_CATEGORY
    return _with_system(cells, _question(cells, "human", "assistant")), category


def _alpaca(cells: Mapping[str, object]) -> list[Message]:
    user, assistant = _question(cells, "instruction", "output")
    given = cells.get("input")
    more = "" if given is None else text_of(given, "`input`")
    if more:
        user = Message("user", f"{user.content}\n{more}")
    return [*history_of(cells.get("history")), user, assistant]


def _with_system(cells: Mapping[str, object], messages: list[Message]) -> list[Message]:
    """Put the text of a `system` column, unless it is empty, before the turns."""
    given = cells.get("system")
    system = "" if given is None else text_of(given, "`system`")
    if system and messages[0].role == "system":
        raise RowError("both a `system` column and a system turn; keep one")
    return [Message("system", system), *messages] if system else messages
