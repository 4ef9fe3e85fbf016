"""Schemas: how a row of columns becomes a record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from sftx.data.files.problems import Problems
from sftx.data.files.tables import unwritable
from sftx.data.records.cells import (
    FLAGS,
    WEIGHTS,
    RowError,
    filled,
    flag_of,
    is_empty,
    mapping,
    quoted,
    show,
    text_of,
    weight_from,
)
from sftx.data.records.columns import (
    FIELDS,
    MARKS,
    MEDIA,
    SCHEMAS,
    Names,
    Schema,
    SchemaName,
    candidates,
    check_columns,
    known_names,
    missing,
    preference,
    repeated,
)
from sftx.data.records.dialogue import Turns, check_order, joined, rounds_of, tools_of, turns_of
from sftx.data.records.record import Message, Record

__all__ = ["DEFAULT_CATEGORY", "SCHEMAS", "RecordBuilder", "SchemaName", "UsedColumns", "check_columns", "known_names"]

T = TypeVar("T")
DEFAULT_CATEGORY = "default"
NAMED = 100
"""So many unused columns are kept by name: rows may have ever other keys."""


@dataclass(frozen=True)
class _Plan:
    """Where a row's fields are, and what else it has."""

    places: dict[str, str]
    marks: dict[str, str]
    """The columns by which a row sets how much it is trained on; they are kept as other columns are."""
    media: tuple[str, ...]
    others: tuple[str, ...]


@dataclass
class UsedColumns:
    """What became of a file's columns."""

    fields: dict[str, str] = field(default_factory=dict)
    """Of each field the column that holds it."""
    unused: dict[str, None] = field(default_factory=dict)
    weights: dict[str, tuple[float, float]] = field(default_factory=dict)
    """The least and the largest weight, of rows and of turns; empty when none are given."""

    def weigh(self, what: str, weight: float) -> None:
        """Widen a range of weights."""
        low, high = self.weights.get(what, (weight, weight))
        self.weights[what] = (min(low, weight), max(high, weight))

    def facts(self) -> dict[str, Any]:
        """Return what is kept of it."""
        return {"columns": self.fields, "unused": list(self.unused), "weights": self.weights}


def describe_columns(facts: Mapping[str, Any]) -> str:
    """Say in one line which column became what, which are unused, and which weights are in use."""
    parts = [", ".join(name if name == column else f"{column} as {name}" for name, column in facts["columns"].items())]
    if facts["unused"]:
        parts.append(f"unused: {quoted(facts['unused'])}")
    for what, (low, high) in facts["weights"].items():
        parts.append(f"weights of {what}: {low:g}" + (f" to {high:g}" if high != low else ""))
    return "; ".join(parts)


class RecordBuilder:
    """Turns the rows of one file into records."""

    def __init__(
        self,
        problems: Problems,
        *,
        source: str,
        schema: str = "auto",
        columns: Mapping[str, str | None] | None = None,
        keep: bool = True,
        kind: str = "key",
    ) -> None:
        self._problems, self._file, self._source = problems, str(problems.path), source
        self._columns, self._keep, self._kind = columns or {}, keep, kind
        check_columns(schema, self._columns)
        self._candidates = candidates(schema, self._columns)
        self._schema: Schema | None = None
        self._pinned: dict[str, str] = {}
        self._plans: dict[tuple[str, ...], _Plan | str] = {}
        self.used = UsedColumns()

    @property
    def schema(self) -> str | None:
        """The name of the schema, once a row or header has shown it."""
        return self._schema.name if self._schema else None

    def header(self, names: Sequence[str], line: int, hint: str = "") -> None:
        """Take the columns of all rows; raises DataError when one is missing or any is repeated."""
        plan = self._plan(tuple(names))
        wrong = [*repeated(names), *([plan + hint] if isinstance(plan, str) else [])]
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
            wanted = ", ".join(self._wanted(self._schema or self._candidates[0]))
            raise RowError(f"{show(row)} is not an object; write one object with the keys {wanted}")
        plan = self._plan(tuple(row))
        if isinstance(plan, str):
            raise RowError(plan)
        for column in plan.media:
            if not is_empty(row[column]):
                raise RowError(
                    f"`{column}` is filled, and sftx trains on text; leave such rows out with data.on_bad_rows=skip, "
                    f"or ignore the column with {mapping({column: None})}"
                )
        cells = {field: row[column] for field, column in plan.places.items()}
        assert self._schema is not None
        category = _category(cells, required="category" in self._schema.required)
        messages, tools = self._turns(self._schema, cells, row)
        weight = self._weight({field: row[column] for field, column in plan.marks.items()}, messages)
        extra = {name: row[name] for name in plan.others} if self._keep else {}
        for name, value in extra.items():
            if (kind := unwritable(value)) is not None:
                raise RowError(
                    f"column `{name}` holds {kind}, which JSON cannot say; set remove_unused_columns=true or drop it"
                )
        return Record(tuple(messages), category, self._file, line, extra, tools, weight, self._source)

    def _turns(self, schema: Schema, cells: Mapping[str, object], row: Mapping[str, object]) -> Turns:
        """Return a row's messages in order, and the definitions of its tools."""
        messages, own = self._messages(schema, cells)
        tools = _optional("tools", lambda: tools_of(cells["tools"])) if "tools" in cells else ()
        if tools and own and tools != own:
            raise RowError("tools are defined both beside the conversation and in its system turn; keep one of the two")
        if cells.get("system") is not None:
            messages = _optional("system", lambda: _with_system(cells["system"], messages))
        if messages[-1].role == "user":
            names = Names(tuple(row), self._columns)
            if names.find("chosen") and names.find("rejected"):
                raise RowError(preference(names))
        check_order(messages)
        return messages, tools or own

    def _weight(self, marks: Mapping[str, object], messages: Sequence[Message]) -> float:
        """Return a row's weight, noting the range of what rows and turns say."""
        for message in messages:
            if message.weight is not None:
                self.used.weigh("turns", message.weight)
        if not marks:
            return 1.0
        label = marks.get("label")
        if label is False or (isinstance(label, str) and label.casefold() == "false"):
            raise RowError(
                "`label` is false, as of an answer that is not to be imitated (KTO); leave such rows out with "
                "data.on_bad_rows=skip, or, where `label` means something else, set data.columns={label:null}"
            )
        given = {name: marks[name] for name in WEIGHTS if marks.get(name) is not None}
        given |= {name: marks[name] for name in FLAGS if flag_of(marks.get(name)) is not None}
        if not given:
            return 1.0
        weight = _optional(next(iter(given)), lambda: weight_from(given)) or 0.0
        for name in given:
            self.used.fields.setdefault(name, name)
            self.used.unused.pop(name, None)
        self.used.weigh("rows", weight)
        return weight

    def _plan(self, names: tuple[str, ...]) -> _Plan | str:
        plan = self._plans.get(names)
        if plan is None:
            plan = self._make_plan(Names(names, self._columns))
            if isinstance(plan, _Plan):
                self._note(plan)
            if len(self._plans) < 1000:  # rows of ever other keys must not fill the memory
                self._plans[names] = plan
        return plan

    def _make_plan(self, names: Names) -> _Plan | str:
        schema = self._schema or self._detect(names)
        places: dict[str, str] = {}
        absent: dict[str, str] = {}
        for name in (*schema.required, *schema.optional):
            # What the first row calls a column, all rows call it.
            column = self._pinned.get(name) or names.field(name)
            if column in names.names and column is not None:
                places[name] = column
            elif name in self._wanted(schema) or self._columns.get(name):
                absent[name] = self._pinned.get(name) or self._columns.get(name) or name
        if absent:
            return missing(self._kind, absent, names, schema)
        if self._schema is None:
            self._schema = schema
            self._pinned = {name: places[name] for name in self._wanted(schema)}
        used = set(places.values())
        marks = {name: column for name in MARKS if (column := names.field(name)) and column not in used}
        media = tuple(column for name in MEDIA if (column := names.field(name)) and column not in used)
        used |= {marks[name] for name in WEIGHTS if name in marks}
        return _Plan(places, marks, media, tuple(name for name in names.names if name not in used))

    def _note(self, plan: _Plan) -> None:
        """Note what the columns of some rows became."""
        self.used.fields |= {name: column for name, column in plan.places.items() if name not in self.used.fields}
        for name in plan.others:
            ignored = self._columns.get(name, name) is None or name in self.used.fields.values()
            if not ignored and len(self.used.unused) < NAMED:
                self.used.unused[name] = None

    def _wanted(self, schema: Schema) -> tuple[str, ...]:
        """Return what must be there; who maps columns and no category has none."""
        maps = any(self._columns.get(name) for name in FIELDS)
        if "category" in self._columns or (maps and schema.name == "human_assistant"):
            return tuple(f for f in schema.required if f != "category" or self._columns.get(f))
        return schema.required

    def _detect(self, names: Names) -> Schema:
        """Return the first schema of which everything is there, else the one of which most is."""
        for schema in self._candidates:
            if all(names.field(field) for field in self._wanted(schema)):
                return schema
        return max(
            self._candidates, key=lambda s: sum(names.field(f) is not None for f in s.required) / len(s.required)
        )

    def _messages(self, schema: Schema, cells: Mapping[str, object]) -> Turns:
        """Return the messages of a row without its `system` column, and the tools that they define."""
        if schema.name in ("messages", "sharegpt"):
            (name,) = schema.required
            return turns_of(cells[name], f"`{name}`", self._columns)
        if schema.name == "firefly":
            turns = rounds_of(cells["conversation"], "`conversation`", self._columns)
            if not turns[0]:
                raise RowError(
                    f"`conversation` is {show(cells['conversation'])}; expected a list of objects "
                    "with `human` and `assistant`"
                )
            return turns
        prompt, answer = schema.required[-2:]
        lists = any(isinstance(cells[name], list | dict) for name in (prompt, answer))
        if schema.name == "prompt_completion" and lists:
            messages, tools = _sides(cells, prompt, answer, self._columns)
        else:
            more = cells.get("input") if schema.name == "alpaca" else None
            messages, tools = _question(cells, prompt, answer, more), ()
        if "history" in cells:
            before, earlier = _optional("history", lambda: rounds_of(cells["history"], "`history`", self._columns))
            messages, tools = [*before, *messages], tools or earlier
        return messages, tools


def _optional(field: str, read: Callable[[], T]) -> T:
    """Return what is read of an optional column; an error also says how to leave the column unused."""
    try:
        return read()
    except RowError as error:
        ignore = f", or ignore the column with {mapping({field: None})}"
        raise RowError(*(reason + ignore for reason in error.args)) from None


def _category(cells: Mapping[str, object], *, required: bool) -> str:
    """Return a row's category; where there need be none, an empty one is none."""
    given = cells.get("category")
    if "category" not in cells or (not required and is_empty(given)):
        return DEFAULT_CATEGORY
    category = "" if given is None else _optional("category", lambda: text_of(given, "`category`"))
    if not category.strip():
        raise RowError(
            "the `category` of this row is empty; fill it, take that of the row above (merged cells of a spreadsheet) "
            "with data.fill_down=[category], or read the file without categories: data.columns={category:null}"
        )
    return category


def _texts(cells: Mapping[str, object], names: Iterable[str]) -> list[str]:
    """Return cells that must be text and filled; what is wrong with any of them is reported at once."""
    texts: list[str] = []
    wrong: list[str] = []
    for name in names:
        try:
            texts.append(filled(text_of(cells[name], f"`{name}`"), f"the `{name}` of this row"))
        except RowError as error:
            wrong += error.args
    if wrong:
        raise RowError(*wrong)
    return texts


def _question(cells: Mapping[str, object], prompt: str, answer: str, more: object) -> list[Message]:
    asked, answered = _texts(cells, (prompt, answer))
    if more := "" if more is None else _optional("input", lambda: text_of(more, "`input`")):
        asked = f"{asked}\n{more}"
    return [Message("user", asked), Message("assistant", answered)]


def _sides(cells: Mapping[str, object], prompt: str, answer: str, columns: Mapping[str, str | None]) -> Turns:
    """Return the turns of a prompt and a completion, which may be lists; no turn of the prompt is supervised."""
    before, tools = _side(cells[prompt], prompt, "user", columns)
    after, more = _side(cells[answer], answer, "assistant", columns)
    if after[: len(before)] == before and len(after) > len(before):  # the completion repeats its prompt
        after = after[len(before) :]
    before = [replace(m, weight=0.0) if m.role == "assistant" and m.weight is None else m for m in before]
    return [*before, *after], tools or more


def _side(value: object, name: str, role: Any, columns: Mapping[str, str | None]) -> Turns:
    if not isinstance(value, list | dict):
        return [Message(role, filled(text_of(value, f"`{name}`"), f"the `{name}` of this row"))], ()
    return turns_of([value] if isinstance(value, dict) else value, f"`{name}`", columns)


def _with_system(given: object, messages: list[Message]) -> list[Message]:
    """Put the text of a `system` column, unless it is empty, before the turns."""
    given = given.get("parts", given) if isinstance(given, dict) else given
    system = text_of(joined(given, "`system`"), "`system`")
    if system and messages[0].role == "system":
        raise RowError("both a `system` column and a system turn; keep one")
    return [Message("system", system), *messages] if system else messages
