"""What is wrong with a file: the first problems by line, a count of the others, one error at the end."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from sftx.errors import DataError

MAX_LISTED = 20


class Problems:
    """Collects problems while a file is read; rows may be skipped, what concerns the whole file never."""

    def __init__(self, path: Path, on_skip: Callable[[int, str], None] | None = None) -> None:
        self.path = path
        self.count = 0
        self._on_skip = on_skip
        self._listed: list[tuple[int, str]] = []

    def row(self, line: int, text: str) -> None:
        """Note what is wrong with one row, or hand it to whoever skips rows."""
        if self._on_skip is not None:
            self._on_skip(line, text)
        else:
            self.file(line, text)

    def file(self, line: int, text: str) -> None:
        """Note what makes the whole file unusable."""
        self.count += 1
        # By line, and in the order noted within one; only those that will be listed are held.
        insort(self._listed, (line, text), key=lambda problem: problem[0])
        del self._listed[MAX_LISTED:]

    def stop(self, line: int, text: str) -> NoReturn:
        """Note a problem after which nothing more can be read, and raise all."""
        self.file(line, text)
        self.check()
        raise AssertionError("a problem was noted")

    def check(self) -> None:
        """Raise one DataError that lists the problems, if there are any."""
        if not self.count:
            return
        said = [f"{self.path}:{line}: {text}" for line, text in self._listed]
        if self.count > len(said):
            said.append(f"and {self.count - len(said)} more")
        raise DataError("\n".join(said))
