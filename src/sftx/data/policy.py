"""What becomes of a record on its way to tokens; each field is a key of group `data`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TooLong = Literal["truncate_right", "truncate_prompt", "drop", "split", "error"]
Learn = Literal["all", "last"]


@dataclass(frozen=True)
class EncodePolicy:
    """How a conversation becomes rows of at most `max_length` tokens.

    `too_long`: cut the end of the last answer, cut the beginning of the prompt, leave the record out,
    split it into several rows, or refuse it. `learn`: all assistant turns or the last one; a turn's own
    `weight` has the last word.
    """

    max_length: int
    too_long: TooLong = "truncate_right"
    learn: Learn = "all"
