"""What is wrong with a file: the first problems by line, a count of the others, one error at the end."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from sftx.data.records.record import origin_text
from sftx.errors import DataError

MAX_LISTED = 20
MAX_TEXT = 600
"""Characters of one problem: a row may have thousands of keys, a header one cell of a megabyte."""
LONG = 80
"""Characters beyond which a problem that the row before has too is not written out again."""
SKIP = "to train without these rows set data.on_bad_rows=skip"
"""The last line of an error about rows, where others of the file are valid."""


class Problems:
    """Collects problems while a file is read; rows may be skipped, what concerns the whole file never."""

    def __init__(self, path: Path, on_skip: Callable[[int, int, str], None] | None = None) -> None:
        self.path = path
        self.count = 0
        self._rows = 0
        self.record = 0
        """The number of the record being read where its line holds others before it, else 0."""
        self.notes: list[str] = []
        """What was left out or chosen while the file was read, to be stated."""
        self._on_skip = on_skip
        self._listed: list[tuple[int, int, str]] = []

    def row(self, line: int, text: str) -> None:
        """Note what is wrong with one row, or hand it to `on_skip`."""
        if self._on_skip is not None:
            self._on_skip(line, self.record, _shortened(text))
        else:
            self._rows += 1
            self.file(line, text)

    def file(self, line: int, text: str) -> None:
        """Note what makes the whole file unusable."""
        self.count += 1
        # By line, and in the order noted within one; only those that will be listed are held.
        insort(self._listed, (line, self.record, _shortened(text)), key=lambda problem: problem[:2])
        del self._listed[MAX_LISTED:]

    def stop(self, line: int, text: str) -> NoReturn:
        """Note a problem after which nothing more can be read, and raise all."""
        self.record = 0
        self.file(line, text)
        self.check()
        raise AssertionError("a problem was noted")

    def check(self, valid_rows: int = 0) -> None:
        """Raise one DataError that lists the problems, if there are any."""
        if not self.count:
            return
        lines: list[str] = []
        before = ""
        for line, record, text in self._listed:
            repeated = text == before and len(text) > LONG
            lines.append(f"{origin_text(self.path, line, record)}: {'the same' if repeated else text}")
            before = text
        if self.count > len(lines):
            lines.append(f"and {self.count - len(lines)} more")
        if valid_rows and self._rows == self.count and not any("data.on_bad_rows" in text for text in lines):
            lines.append(SKIP)
        raise DataError("\n".join(lines))


def _shortened(text: str) -> str:
    """Return text of bounded length: its beginning, and its end, which says what to do."""
    left_out = len(text) - MAX_TEXT
    return (
        text if left_out <= 0 else f"{text[: MAX_TEXT // 2]} [... {left_out} characters ...] {text[-MAX_TEXT // 2 :]}"
    )
