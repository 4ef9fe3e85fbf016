"""What sftx must know of a model family; group `model`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A family's facts: the model types it covers, its chat template, and the tokens that end a turn."""

    model_types: list[str]
    template: str | None
    stop_tokens: list[str]
