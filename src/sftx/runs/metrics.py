"""Metrics: `metrics.jsonl` is the record, full precision, each step once; trackers are copies of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from sftx.files import append_line, write_text


class Tracker(Protocol):
    """A place where metrics are shown."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step."""

    def finish(self) -> None:
        """Flush and close."""


class Recorder:
    """Writes the metrics of one run."""

    def __init__(self, path: Path, trackers: Sequence[Tracker]) -> None:
        self.path = path
        self.trackers = list(trackers)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one record."""
        append_line(self.path, json.dumps({"step": step, **metrics}, allow_nan=True))
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def finish(self) -> None:
        """Close the trackers."""
        for tracker in self.trackers:
            tracker.finish()


class SilentRecorder(Recorder):
    """The recorder of a rank that writes nothing."""

    def __init__(self) -> None:
        super().__init__(Path("/dev/null"), [])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the whole records of a `metrics.jsonl`; a line cut off by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def drop_after(path: Path, step: int) -> None:
    """Remove the records after a step: a resumed run will write them again."""
    if not path.is_file():
        return
    kept = [r for r in read_metrics(path) if r["step"] <= step]
    write_text(path, "".join(json.dumps(r) + "\n" for r in kept))
