"""A record: one conversation of a corpus, whatever file and schema it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    content: str
    weight: float | None = None
    """What a token of this turn weighs in the loss: 0 is not supervised, None is left to the policy `train_on`."""
    reasoning: str | None = None
    """An assistant's thinking, for the templates that show it."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    """An assistant's calls, in OpenAI's form."""
    name: str | None = None
    """The tool that a `tool` turn answers for."""


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation; `file` and `line` (from 1) say where it begins, `extra` holds the other columns."""

    messages: tuple[Message, ...]
    category: str
    file: str
    line: int
    extra: dict[str, object]
    tools: tuple[dict[str, Any], ...] = ()
    """Definitions of the tools the assistant may call, in OpenAI's form."""
    weight: float = 1.0
    """Multiplies the weight of each supervised token."""
    source: str = ""
    """The part of the corpus it belongs to: its file's name without suffixes, or the dataset's name."""
    number: int = 0
    """Its number in a JSON list, from 1, where its line holds other records before it; else 0."""

    @property
    def origin(self) -> str:
        """Where it begins, as `file:line`."""
        return origin_text(self.file, self.line, self.number)

    @property
    def human(self) -> str:
        """The first thing the user says."""
        return next(m.content for m in self.messages if m.role == "user")

    @property
    def assistant(self) -> str:
        """The last answer."""
        return next(m.content for m in reversed(self.messages) if m.role == "assistant")


def origin_text(file: object, line: int, number: int) -> str:
    """Return a place as `file:line`, with the record's number where that is not enough."""
    return f"{file}:{line} (record {number})" if number else f"{file}:{line}"


def pair(category: str, human: str, assistant: str, file: str, line: int, extra: dict[str, object]) -> Record:
    """Return the record of one question and its answer."""
    return Record((Message("user", human), Message("assistant", assistant)), category, file, line, extra)
