"""The JSON lines of record: what is there, what failed and what was not run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

Kind = Literal["timed", "check"]
Key = tuple[str, str, Kind, int, str]
"""Case, trainer, kind, round and the commit of what is measured."""
Row = dict[str, Any]
KEY = ("case", "peer", "kind", "round", "commit")


def key_of(row: Row) -> Key:
    """Return what a line is about."""
    return row["case"], row["peer"], row["kind"], row["round"], row["commit"]


class Records:
    """A file of JSON lines; of several about the same run the last one counts."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        self.rows: dict[Key, Row] = {}
        for line in lines:
            self._keep(json.loads(line))

    def has(self, key: Key) -> bool:
        """Whether a run was made, be it that it failed; one that was put off was not."""
        return key in self.rows and self.rows[key]["status"] != "not run"

    def longest(self, key: Key) -> float:
        """Return the seconds that the same work took before; 0 when that is not known."""
        same = (row for other, row in self.rows.items() if (other[:3], other[4]) == (key[:3], key[4]))
        return max((row.get("wall_s", 0.0) for row in same), default=0.0)

    def add(self, row: Row) -> None:
        """Write a line at once, so that what is stopped can go on."""
        self._keep(row)
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")

    def put_off(self, keys: Iterable[Key], why: str) -> None:
        """Write a line that says "not run" for each run of which there is none."""
        for key in keys:
            if key not in self.rows:
                self.add(dict(zip(KEY, key, strict=True)) | {"status": "not run", "error": why})

    def _keep(self, row: Row) -> None:
        self.rows.pop(key_of(row), None)  # so that the rows are in the order in which they were last written
        self.rows[key_of(row)] = row


def latest(rows: Iterable[Row]) -> list[Row]:
    """Return of each case the rows of the commit that was measured last."""
    rows = list(rows)
    commits = {row["case"]: row["commit"] for row in rows if row["status"] != "not run"}
    return [row for row in rows if row["commit"] == commits.get(row["case"], row["commit"])]
