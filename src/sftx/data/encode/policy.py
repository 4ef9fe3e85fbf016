"""What becomes of a record on its way to tokens; each field is a key of group `data`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from sftx.data.records.record import Message, Record

TooLong = Literal["truncate_right", "truncate_prompt", "drop", "split", "error"]
TrainOn = Literal["all", "last"]
Weights = Sequence[float]
PAIR = (0.0, 1.0)


@dataclass(frozen=True)
class EncodePolicy:
    """How a conversation becomes rows of at most `max_length` tokens.

    `too_long`: cut the end of the last answer, cut the beginning of the prompt, leave the record out,
    split it into several rows, or refuse it. `train_on`: all assistant turns or the last one; a turn's own
    `weight` has the last word.
    """

    max_length: int
    too_long: TooLong = "truncate_right"
    train_on: TrainOn = "all"
    system: str | None = None
    """The system prompt of records that have none."""
    category_prefix: Mapping[str, str] = field(default_factory=dict)
    """Text put before the first thing the user says, by category."""

    faults: Literal["error", "skip", "ignore"] = "error"
    """What becomes of a record that the template does not teach whole and once; only tests ignore it."""

    def applied(self, record: Record) -> Record:
        """Return the record with the system prompt and the prefix of its category."""
        prefix = self.category_prefix.get(record.category, "")
        if not prefix and (self.system is None or record.messages[0].role == "system"):
            return record
        messages = list(record.messages)
        if prefix:
            first = next(i for i, m in enumerate(messages) if m.role == "user")
            messages[first] = replace(messages[first], content=prefix + messages[first].content)
        if self.system is not None and messages[0].role != "system":
            messages.insert(0, Message("system", self.system))
        return replace(record, messages=tuple(messages))

    def weights(self, record: Record) -> Weights:
        """Return what a token of each message weighs: 0 is not supervised."""
        if len(record.messages) == 2 and record.weight == 1.0:
            user, assistant = record.messages
            if user.role == "user" and assistant.role == "assistant" and assistant.weight is None:
                return PAIR
        last = max((i for i, m in enumerate(record.messages) if m.role == "assistant"), default=-1)
        out = []
        for i, m in enumerate(record.messages):
            usual = 1.0 if m.weight is None and (self.train_on == "all" or i == last) else m.weight or 0.0
            out.append(usual * record.weight if m.role == "assistant" else 0.0)
        return out
