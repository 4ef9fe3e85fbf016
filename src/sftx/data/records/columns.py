"""Columns: which a file must have in each schema, by which names they go, and what to do when one is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sftx.data.records.cells import FLAGS, WEIGHTS, mapping, quoted
from sftx.data.records.dialogue import TOOLS
from sftx.errors import DataError, did_you_mean, nearest

SchemaName = Literal["auto", "human_assistant", "alpaca", "sharegpt", "messages", "firefly", "prompt_completion"]
MARKS = (*WEIGHTS, *FLAGS, "label")
"""Columns by which a row sets whether, and how much, it is trained on."""
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
"""Columns that hold what is not text; a row in which one is filled is refused."""


@dataclass(frozen=True)
class Schema:
    """The columns of one way to write a corpus."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ("category", "system", "history")

    @property
    def fields(self) -> tuple[str, ...]:
        """All columns that mean something."""
        return (*self.required, *(name for name in self.optional if name not in self.required), *MARKS, *MEDIA)


CHAT = ("category", "system", "tools")
ALPACA = ("category", "input", "history", "system")
PAIR = ("category", "system", "history", "tools")
PAIRS = {
    "prompt": ("completion", "response", "answer", "output"),
    "query": ("response", "answer", "output", "completion"),
    "question": ("answer", "response", "output", "completion"),
    "input": ("output", "target", "response", "answer"),
}
"""What a question is called, and what its answer is called beside it."""
SCHEMAS = (
    Schema("human_assistant", ("category", "human", "assistant")),
    Schema("messages", ("messages",), CHAT),
    Schema("sharegpt", ("conversations",), CHAT),
    Schema("firefly", ("conversation",), CHAT),
    *(Schema("alpaca", ("instruction", answer), ALPACA) for answer in ("output", "response", "answer", "completion")),
    *(Schema("prompt_completion", (prompt, answer), PAIR) for prompt, answers in PAIRS.items() for answer in answers),
)
"""In the order in which they are recognised: a file with the columns of several has the first one's schema."""
ALIASES = {
    "messages": ("messages", "contents"),
    "system": ("system", "system_prompt", "system_instruction", "systemInstruction"),
    "tools": TOOLS,
    "input": ("input", "context"),
}
"""Other names of a field, in the order in which they are looked for."""
FIELDS = tuple(dict.fromkeys(name for schema in SCHEMAS for name in schema.fields))
TURN_FIELDS = ("role", "content")
RESERVED = frozenset(
    name.casefold()
    for schema in (SCHEMAS[0], SCHEMAS[1])
    for field in (*schema.required, *schema.optional, *WEIGHTS)
    for name in ALIASES.get(field, (field,))
)
"""Columns that mean something in what `sftx data convert` writes; flags may stay beside the weight that they gave."""


def check_columns(schema: str, columns: Mapping[str, str | None]) -> None:
    """Raise DataError when `data.schema` or `data.columns` says what no schema has."""
    names = dict.fromkeys(s.name for s in SCHEMAS)
    if schema != "auto" and schema not in names:
        raise DataError(
            f"data.schema={schema}: is not known; use auto, {', '.join(names)}.{did_you_mean(schema, names)}"
        )
    for field, column in columns.items():
        if column is not None and field not in (*FIELDS, *TURN_FIELDS):  # of any name null says: it is not used
            wanted = ", ".join(f for f in (*FIELDS, *TURN_FIELDS) if f not in MEDIA)
            raise DataError(
                f"data.columns: `{field}` (for column `{column}`) is nothing a record has; use {wanted}."
                f"{did_you_mean(field, (*FIELDS, *TURN_FIELDS))}"
            )
    if not candidates(schema, columns):
        problem = "no schema has all of" if schema == "auto" else f"the schema {schema} has not all of"
        first = {s.name: s for s in reversed(SCHEMAS)}
        listed = "; ".join(f"{name} ({', '.join((*first[name].required, *first[name].optional))})" for name in names)
        raise DataError(f"data.columns: {problem} {', '.join(columns)}; schemas are {listed}")


def known_names(columns: Mapping[str, str | None]) -> tuple[str, ...]:
    """Return the names of columns that mean something, by which a header is recognised."""
    unsaid = {*MARKS[1:], *MEDIA}  # which headers of any kind may have
    usual = (name for field in FIELDS if field not in unsaid for name in ALIASES.get(field, (field,)))
    return (*usual, *(column for column in columns.values() if column))


def candidates(schema: str, columns: Mapping[str, str | None]) -> list[Schema]:
    """Return the schemas that have all that is mapped."""
    mapped = [field for field, column in columns.items() if column is not None]
    fields = [field for field in mapped if field not in TURN_FIELDS]
    chosen = [s for s in SCHEMAS if schema in ("auto", s.name) and all(f in s.fields for f in fields)]
    if len(fields) < len(mapped):
        chosen = [s for s in chosen if s.name in ("messages", "sharegpt")]
    return chosen


class Names:
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
        """Return the column of a name."""
        return name if name in self._exact else self._lowered.get(name.casefold())

    def field(self, field: str) -> str | None:
        """Return the column that holds a field, or None; one that is mapped to another field holds no other."""
        if field in self._columns:
            column = self._columns[field]
            return self.find(column) if column else None
        names = (name for name in ALIASES.get(field, (field,)) if self._columns.get(name, name))
        found = (self.find(name) for name in names)
        return next((name for name in found if name and name not in self._taken), None)


def repeated(names: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with a header in which a name stands twice."""
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        first = places.setdefault(name.casefold(), place)
        if first != place:
            where = f"columns {first + 1} and {place + 1}"
            yield f"the header name `{name}` is repeated ({where}); rename or delete one of them"


def missing(kind: str, absent: Mapping[str, str], names: Names, schema: Schema) -> str:
    """Say which columns are not there, and how `data.columns` names those that are meant.

    Args:
        kind: what a column is called: column or key.
        absent: of each field that is not there, the column that was looked for.
        names: the columns that are there.
        schema: the schema they were looked for in.
    """
    what = f"no {kind} {', '.join(f'`{column}`' for column in absent.values())}; found {quoted(names.names)}"
    if list(absent) == ["category"]:
        return f"{what}; to read it without categories set data.columns={{category:null}}, or add `category`"
    if names.find("chosen") and names.find("rejected"):
        return f"{what}; {preference(names)}"
    if len(absent) == len(schema.required) and (text := names.find("text")):
        return f"{what}; texts (`{text}`) alone are not trained on: a row has a question and its answer, or turns"
    spare = [name for name in names.names if name not in schema.fields]
    near = {field: found for field, column in absent.items() if (found := _near(column, spare))}
    rest = [name for name in spare if name not in near.values()]
    unknown = [field for field in absent if field not in near and field != "category"]
    guessed = dict(zip(unknown, rest, strict=True)) if len(rest) == len(unknown) else {}
    mapped: dict[str, str | None] = {f: near.get(f) or guessed.get(f, "COLUMN") for f in absent if f != "category"}
    if "category" in absent:
        mapped["category"] = near.get("category")
    hint = f", the nearest is `{next(iter(near.values()))}`: rename it, or" if near else "; add it, or"
    return f"{what}{hint} say which column is meant, such as {mapping(mapped)}"


def _near(column: str, spare: Sequence[str]) -> str | None:
    """Return the name that looks most like a column's, or like another usual name of a question or an answer."""
    answers = dict.fromkeys(name for usual in PAIRS.values() for name in usual)
    usual = next((group for group in (tuple(PAIRS), tuple(answers)) if column in group), ())
    return next((found for name in (column, *usual) if (found := nearest(name, spare))), None)


def preference(names: Names) -> str:
    """Say how to train on the better answers of a file that holds better and worse ones."""
    turns = names.find("conversations") or names.find("messages")
    columns: dict[str, str | None] = {"messages": "chosen"}
    if any(names.find(name) for name in (*PAIRS, "instruction")):
        columns = {"completion": "chosen"}
    elif turns:
        columns = {"prompt": turns, "completion": "chosen"}
    return (
        "this is preference data (`chosen`, `rejected`), and sftx trains on one answer; to train on `chosen` set "
        f"{mapping(columns)}"
    )
