"""The limits of a number, beside the field that holds it: `rank: Annotated[int, Bounds(at_least=1)]`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits that hold for every number of a value, in lists and mappings too; null and texts are not limited."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def allow(self, value: Any) -> bool:
        """Return True if every number of a value is within the limits."""
        return all(map(self._allows, _numbers(value)))

    def _allows(self, number: float) -> bool:
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        """Return the limits as a sentence has them: `>= 0 and < 1`."""
        return self._written(" and ", ">= ", "> ", "<= ", "< ")

    def symbols(self) -> str:
        """Return the limits in few letters: `>=0, <1`."""
        return self._written(", ", ">=", ">", "<=", "<")

    def _written(self, between: str, *words: str) -> str:
        limits = zip(words, (self.at_least, self.above, self.at_most, self.below), strict=True)
        return between.join(f"{word}{limit}" for word, limit in limits if limit is not None)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value
