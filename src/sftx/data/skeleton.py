"""What a template makes of a conversation whose texts are unknown: rendered once, filled in many times.

A text of the conversation is stood for by an `Unknown`. It can be written out, joined to other text and
trimmed, and it answers a yes-or-no question such as `'</think>' in content` with no, while the question is
noted; any other look at it ends the attempt. So what was rendered holds for every text that answers the
noted questions the same way. What could slip past (text that Python's C code copies) is refused by name of
the Jinja construct, or shows as a stand-in that was changed.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import nodes

from sftx.data.render import Marks, Renderer
from sftx.data.spans import Piece

FORBIDDEN = (nodes.Concat, nodes.Macro, nodes.FilterBlock, nodes.AssignBlock, nodes.Include, nodes.ImportedName)
"""Jinja constructs whose result is copied text: a later question about it would not be noticed."""
FORBIDDEN_NAMES = {"join", "replace", "format", "caller"}
FILTERS = {
    "capitalize", "count", "d", "default", "first", "items", "last", "length", "list", "lower", "rejectattr",
    "selectattr", "string", "tojson", "trim", "upper",
}  # fmt: skip
"""Filters that ask a text by its methods, or change its stand-in; others read it by ways of their own."""
TESTS = {
    "boolean", "callable", "defined", "divisibleby", "eq", "equalto", "even", "false", "float", "integer", "iterable",
    "mapping", "ne", "none", "number", "odd", "sameas", "sequence", "string", "true", "undefined",
}  # fmt: skip
EDGE = '\n É"\\&<'
"""Around a stand-in: whatever trims, escapes or changes the case of text changes it."""
Operation = tuple[str, tuple[Any, ...]]


class Peeked(Exception):
    """The template looks into a text."""


@dataclass(frozen=True)
class Slot:
    """Where a text goes: its number in the conversation, and how the template trims it."""

    number: int
    trims: tuple[Operation, ...] = ()

    def fill(self, cells: Sequence[str]) -> str:
        """Return the text as the template writes it."""
        text = cells[self.number]
        for name, arguments in self.trims:
            text = getattr(text, name)(*arguments)
        return text


@dataclass
class Notes:
    """What one attempt has found: its slots, and the questions that were answered with no."""

    nonce: str = field(default_factory=lambda: secrets.token_hex(8))
    slots: list[Slot] = field(default_factory=list)
    questions: set[tuple[Slot, str, Any]] = field(default_factory=set)

    def unknown(self, slot: Slot) -> Unknown:
        """Return the stand-in for a slot."""
        if slot not in self.slots:
            self.slots.append(slot)
        out = Unknown(f"{EDGE}\ue004{self.nonce}.{self.slots.index(slot)}\ue005{EDGE[::-1]}")
        out.notes, out.slot = self, slot
        return out

    @property
    def pattern(self) -> re.Pattern[str]:
        """Finds stand-ins in rendered text."""
        return re.compile(f"{re.escape(EDGE)}\ue004{self.nonce}\\.([0-9]+)\ue005{re.escape(EDGE[::-1])}")


class Unknown(str):
    """A text that is not known; `slot` is None for one that was joined with other text."""

    notes: Notes
    slot: Slot | None

    def _joined(self, text: str) -> Unknown:
        out = Unknown(text)
        out.notes, out.slot = self.notes, None
        return out

    def __add__(self, other: Any) -> Unknown:
        return self._joined(str.__str__(self) + str.__str__(other))

    def __radd__(self, other: Any) -> Unknown:
        return self._joined(str.__str__(other) + str.__str__(self))

    def __bool__(self) -> bool:
        if self.slot is None:
            raise Peeked
        if self.slot.trims:  # an empty text is never unknown, but trimming may make one
            self.notes.questions.add((self.slot, "__eq__", ""))
        return True

    def __hash__(self) -> int:
        raise Peeked


def _trim(name: str) -> Callable[..., Unknown]:
    def trim(self: Unknown, *arguments: Any) -> Unknown:
        if self.slot is None:
            raise Peeked
        return self.notes.unknown(Slot(self.slot.number, (*self.slot.trims, (name, arguments))))

    return trim


def _question(name: str, *, answer: bool = False) -> Callable[..., bool]:
    def ask(self: Unknown, *arguments: Any) -> bool:
        if self.slot is None or len(arguments) != 1 or type(arguments[0]) not in (str, tuple):
            raise Peeked
        self.notes.questions.add((self.slot, "__eq__" if name == "__ne__" else name, arguments[0]))
        return answer

    return ask


def _refuse(*_: Any, **__: Any) -> Any:
    raise Peeked


ALLOWED = {
    "__add__", "__bool__", "__class__", "__delattr__", "__dir__", "__doc__", "__getattribute__", "__hash__", "__init__",
    "__init_subclass__", "__new__", "__radd__", "__reduce__", "__reduce_ex__", "__repr__", "__setattr__", "__sizeof__",
    "__str__", "__subclasshook__",
}  # fmt: skip
for _name in {*dir(str), "__rmul__", "__rmod__", "__iter__", "__reversed__", "__html__"} - ALLOWED:
    if _name != "__html__":
        setattr(Unknown, _name, _refuse)
for _name in ("strip", "lstrip", "rstrip"):
    setattr(Unknown, _name, _trim(_name))
for _name in ("__contains__", "startswith", "endswith", "__eq__"):
    setattr(Unknown, _name, _question(_name))
Unknown.__ne__ = _question("__ne__", answer=True)  # type: ignore[method-assign]


class Probe:
    """A reader of a conversation whose texts are unknown."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.notes = Notes()

    def render(
        self, messages: list[dict[str, Any]], *, generation_prompt: bool, thinking: bool | None
    ) -> tuple[str, Marks | None]:
        """Render the conversation so far."""
        if self.renderer.has_marks and not generation_prompt:
            return self.renderer.marked(messages, tools=(), thinking=thinking)
        return self.renderer.compiled.render(**self.renderer.arguments(messages, generation_prompt, (), thinking)), None

    def starts(self, text: str, prefix: str) -> bool:
        """True when a text begins with another, whatever the unknown texts are; what false depends on is noted."""
        if text.startswith(prefix):
            return True
        differs = next((i for i, (a, b) in enumerate(zip(text, prefix, strict=False)) if a != b), None)
        if differs is None:
            return False
        cells = [
            next((m for m in self.notes.pattern.finditer(spelled) if m.start() <= differs < m.end()), None)
            for spelled in (text, prefix)
        ]
        if all(cells):
            raise Peeked
        for cell, other in zip(cells, (prefix, text), strict=True):
            if cell:  # a text that begins with another letter than the template's differs from it
                slot = self.notes.slots[int(cell.group(1))]
                self.notes.questions |= {(slot, "startswith", other[cell.start()]), (slot, "__eq__", "")}
        return False

    def follows(self, text: str, end: str) -> str | None:
        """Raise: where an unknown text occurs is not known."""
        raise Peeked

    def after(self, text: str, cell: str, start: int) -> int | None:
        """Return where a cell ends in `text`, in whatever way the template trimmed it."""
        if not isinstance(cell, Unknown):
            return start if not cell else None
        for found in self.notes.pattern.finditer(text, start):
            if cell.slot and self.notes.slots[int(found.group(1))].number == cell.slot.number:
                return found.end()
        return None


Parts = tuple[str | Slot, ...]


@dataclass(frozen=True)
class Skeleton:
    """The learned turns of all conversations of one shape, with slots for their texts."""

    rows: list[list[tuple[Piece, Parts, Parts, Parts]]]
    questions: tuple[tuple[Slot, str, Any], ...]

    def fill(self, cells: Sequence[str]) -> list[list[Piece]] | None:
        """Return the pieces for a conversation's texts; None when one answers a question otherwise."""
        for slot, name, argument in self.questions:
            if getattr(slot.fill(cells), name)(argument) is True:
                return None
        return [
            [
                Piece(_fill(head, cells), _fill(tail, cells), _fill(joint, cells), *piece[3:])
                for piece, head, tail, joint in row
            ]
            for row in self.rows
        ]


def _fill(parts: Parts, cells: Sequence[str]) -> str:
    if len(parts) == 1 and isinstance(parts[0], str):
        return parts[0]
    return "".join([p if isinstance(p, str) else cells[p.number] if not p.trims else p.fill(cells) for p in parts])


def skeleton(rows: Sequence[Sequence[Piece]], notes: Notes) -> Skeleton | None:
    """Return the skeleton of rendered pieces; None when a stand-in was changed, or parts of answers are marked."""
    if any(piece.marks is not None for row in rows for piece in row):
        return None
    try:
        out = [[(p, _parts(p.head, notes), _parts(p.tail, notes), _parts(p.joint, notes)) for p in row] for row in rows]
    except Peeked:
        return None
    return Skeleton(out, tuple(sorted(notes.questions, key=repr)))


def _parts(text: str, notes: Notes) -> Parts:
    found = notes.pattern.split(text)
    if any(notes.nonce in part for part in found[::2]):
        raise Peeked
    parts = [part if i % 2 == 0 else notes.slots[int(part)] for i, part in enumerate(found)]
    return tuple(p for p in parts if p != "")


def can_probe(renderer: Renderer) -> bool:
    """True when a template is made of constructs through which an unknown text can be followed."""
    tree = renderer.compiled.environment.parse(renderer.source)
    if "__" in renderer.source or next(tree.find_all(FORBIDDEN), None) is not None:
        return False
    if next(tree.find_all(nodes.CallBlock), None) is not None and not renderer.has_marks:
        return False
    attributes = list(tree.find_all(nodes.Getattr))
    compares = [c for c in tree.find_all(nodes.Compare) if any(o.op in ("in", "notin") for o in c.ops)]
    inside_known = any(isinstance(o.expr, nodes.Const) for c in compares for o in c.ops if not _known(c.expr))
    return (
        not FORBIDDEN_NAMES & {a.attr for a in attributes}
        and not any(_known(a.node) for a in attributes)
        and not inside_known
        and {f.name for f in tree.find_all(nodes.Filter)} <= FILTERS
        and {t.name for t in tree.find_all(nodes.Test)} <= TESTS
    )


def _known(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const)
