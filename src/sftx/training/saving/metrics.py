"""Metrics: `metrics.jsonl` is the record, full precision, each step once; trackers are copies of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from sftx.files import append_line, write_bytes

log = logging.getLogger("sftx")


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
    """Return the intact records of a `metrics.jsonl`; a line that a crash cut off or damaged is left out."""
    return [record for _, record in _lines(path) if record is not None]


def drop_after(path: Path, step: int, *, evaluation_due: bool = False) -> None:
    """Remove the records after a step, which a resumed run writes again, and lines that cannot be read.

    `evaluation_due`: the step's own evaluation is among those that are written again.
    """
    found = _lines(path)
    unread = [number for number, (_, record) in enumerate(found, 1) if record is None]
    if unread:
        log.warning("%s: lines that cannot be read are left out: %d, first line %d", path, len(unread), unread[0])

    def stays(record: dict[str, float]) -> bool:
        return record["step"] < step or (record["step"] == step and not (evaluation_due and "eval/loss" in record))

    kept = [line for line, record in found if record is not None and stays(record)]
    if len(kept) < len(found):
        write_bytes(path, b"".join(line + b"\n" for line in kept))


def _lines(path: Path) -> list[tuple[bytes, dict[str, float] | None]]:
    """Return each line of a file with its record, None where it holds none."""
    return [(line, _record(line)) for line in (path.read_bytes().splitlines() if path.is_file() else [])]


def _record(line: bytes) -> dict[str, float] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
