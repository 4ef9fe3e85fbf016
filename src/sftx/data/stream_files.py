"""The files of a corpus that is streamed: opened in their order, row by row, without a copy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sftx.data.read import FileReader, How
from sftx.data.record import Record
from sftx.data.sources import Source
from sftx.data.streaming import Reader

SAMPLE = 1000
"""The first records, which are looked at before training."""


@dataclass
class StreamedFiles:
    """What is streamed; what is detected of a file is known once its first row is read."""

    sources: Sequence[Source]
    how: How
    keep_columns: bool
    skip_bad_rows: bool
    limit: int | None = None
    """Records of a pass at most."""
    detected: dict[str, str | None] = field(default_factory=dict)
    """Format, encoding, delimiter and shape of the first file."""
    skipped_rows: int = 0  # they are told with the steps

    @property
    def path(self) -> Path:
        """The file, or the folder of the first of them."""
        return self.sources[0].path if len(self.sources) == 1 else self.sources[0].path.parent

    @property
    def sha256(self) -> str:
        """A hash of the files' names and sizes: what is larger than a disk is not read twice to be hashed."""
        return hashlib.sha256(json.dumps(self._sizes()).encode()).hexdigest()

    def _sizes(self) -> list[tuple[str, int]]:
        return [(s.path.name, s.path.stat().st_size) for s in self.sources]

    def facts(self) -> dict[str, object]:
        """Return what the manifest says of the corpus."""
        files = [{"path": str(s.path), "bytes": s.path.stat().st_size} for s in self.sources]
        return {"path": str(self.path), "streamed": True, "names_and_sizes_sha256": self.sha256, "files": files} | (
            self.detected
        )

    @property
    def how_read(self) -> str:
        """What was detected of the first file, as it is said."""
        return described(*(self.detected.get(name) for name in ("format", "encoding", "delimiter")))

    def reader(self) -> Reader:
        """Return what reads them from the beginning."""
        return Reader([partial(self._open, source) for source in self.sources], self.limit)

    def sample(self) -> list[Record]:
        """Return the first records.

        Errors:
            DataError: there is none, or one is not sound.
        """
        records: list[Record] = []
        for item in self.reader().records(0):
            if not isinstance(item, str):
                records.append(item)
            if len(records) == SAMPLE:
                break
        return records

    def skipped(self) -> Iterator[str]:
        """Yield what was left out before training: nothing."""
        return iter(())

    def _open(self, source: Source) -> Iterator[Record | str]:
        unsound: list[str] = []
        on_skip: Callable[[int, str], None] | None = None
        if self.skip_bad_rows:
            on_skip = lambda line, why: unsound.append(f"{source.path}:{line}: {why}")  # noqa: E731
        reader = FileReader(source.path, self.how, keep_columns=self.keep_columns, source=source.name, on_skip=on_skip)
        for record in reader:
            if not self.detected:
                self.detected = _detected(reader)
            yield from unsound
            unsound.clear()
            yield record
        yield from unsound


def described(form: str | None, encoding: str | None, delimiter: str | None) -> str:
    """Say how a file is read: csv, utf-8, `,`."""
    mark = f"`{delimiter}`" if delimiter else None
    return ", ".join(part for part in (form, encoding, mark) if part)


def _detected(reader: FileReader) -> dict[str, Any]:
    return {name: getattr(reader, name) for name in ("format", "encoding", "delimiter", "shape")}
