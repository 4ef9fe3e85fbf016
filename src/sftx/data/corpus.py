"""Find the corpus, convert it to JSONL once, and hold part of it out for evaluation."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sftx.data.read import Reading, read_file, sha256_file
from sftx.data.record import Record, pair
from sftx.errors import DataError, nearest
from sftx.files import cache_root, write_text

READER_VERSION = 2
"""Part of the cache key: raise it when the same file would be read differently."""


@dataclass(frozen=True)
class LoadedFile:
    """A corpus file as it was read: its rows, its JSONL, and what was detected on the way."""

    path: Path
    jsonl: Path
    sha256: str
    encoding: str
    delimiter: str | None
    format: str
    records: list[Record]

    def facts(self) -> dict[str, object]:
        """Return what the manifest says of the file."""
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "rows": len(self.records),
            "format": self.format,
            "encoding": self.encoding,
            "delimiter": self.delimiter,
            "jsonl": str(self.jsonl),
        }


@dataclass(frozen=True)
class Corpus:
    """How a corpus file is read; group `data`."""

    format: str = "auto"
    encoding: str = "auto"
    delimiter: str = "auto"

    def load(self, folder: str, name: str, *, key: str, keep_columns: bool) -> LoadedFile:
        """Read `name` in `folder` (or its `csv/`), through a JSONL that is cached by content.

        Errors:
            DataError: no such file, found twice, or a file that cannot be read exactly.
        """
        path = find_file(folder, name, key=key)
        digest = sha256_file(path)
        recipe = json.dumps([READER_VERSION, digest, keep_columns, asdict(self), path.suffix.lower()])
        stem = f"{path.stem[:40]}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
        jsonl, meta = cache_root() / "jsonl" / f"{stem}.jsonl", cache_root() / "jsonl" / f"{stem}.json"
        facts = _cached(jsonl, meta)
        if facts is None:
            reading = read_file(path, format=self.format, encoding=self.encoding, delimiter=self.delimiter)
            _write_jsonl(reading, jsonl, meta, keep_columns=keep_columns)
            facts = json.loads(meta.read_text(encoding="utf-8"))
        records = _read_jsonl(jsonl, path, facts["lines"])
        return LoadedFile(path, jsonl, digest, facts["encoding"], facts["delimiter"], facts["format"], records)


def find_file(folder: str, name: str, *, key: str) -> Path:
    """Return the corpus's path: directly in the folder, or in its `csv/` subfolder (the original layout).

    Errors:
        DataError: no such folder, no such file (the nearest name is given), or found in both places.
    """
    base = Path(folder).expanduser()
    if base.is_file():
        raise DataError(
            f"train_file_path={folder}: is a file, wanted its folder: "
            f"train_file_path={base.parent} train_file_name={base.name}."
        )
    if not base.is_dir():
        raise DataError(f"train_file_path={folder}: there is no such folder (looked at {base.absolute()}).")
    found = [p for p in (base / name, base / "csv" / name) if p.is_file()]
    if len(found) == 2:
        raise DataError(
            f"{key}={name}: found both as {found[0]} and as {found[1]}. "
            f"Remove one, or name the folder meant: train_file_path={found[1].parent}."
        )
    if not found:
        there = sorted(p.name for d in (base, base / "csv") if d.is_dir() for p in d.iterdir() if p.is_file())
        near = nearest(name, there)
        hint = f" Did you mean `{near}`?" if near else ""
        listing = ", ".join(there[:10]) + (", ..." if len(there) > 10 else "")
        raise DataError(
            f"{key}={name}: no such file in {base} or {base / 'csv'}.{hint} Files there: {listing or 'none'}."
        )
    return found[0]


def _cached(jsonl: Path, meta: Path) -> dict[str, Any] | None:
    """Return what is known of a JSONL that was converted earlier, or None when it is not there as it was left."""
    try:
        facts = json.loads(meta.read_text(encoding="utf-8"))
        return facts if facts["jsonl_sha256"] == sha256_file(jsonl) else None
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None


def _write_jsonl(reading: Reading, jsonl: Path, meta: Path, *, keep_columns: bool) -> None:
    """Write the rows, and beside them what else is to be known, so that no column's name is taken."""
    rows = [
        {"category": r.category, "human": r.human, "assistant": r.assistant} | (r.extra if keep_columns else {})
        for r in reading.records
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(jsonl, text)
    facts = {
        "encoding": reading.encoding,
        "delimiter": reading.delimiter,
        "format": reading.format,
        "jsonl_sha256": hashlib.sha256(text.encode("utf-8")).hexdigest(),
        "lines": [r.line for r in reading.records],
    }
    write_text(meta, json.dumps(facts) + "\n")


def _read_jsonl(jsonl: Path, origin: Path, lines: list[int]) -> list[Record]:
    records = []
    with jsonl.open(encoding="utf-8", newline="\n") as file:
        for number, text in zip(lines, file, strict=True):
            row = json.loads(text)
            category, human, assistant = row.pop("category"), row.pop("human"), row.pop("assistant")
            records.append(pair(category, human, assistant, str(origin), number, row))
    return records


def split(records: Sequence[Record], ratio: float, max_rows: int) -> tuple[list[Record], list[Record]]:
    """Hold out a share of each category; return (training rows, held-out rows), both in the order given.

    The choice follows from the rows' text alone, not from their order or `seed`, so that runs with
    other seeds are judged on the same rows. `ratio` of all rows is rounded, to one at least and
    `max_rows` at most, and each category gives its part of that to within one row. Rows with the same
    prompt go to the same side: then it may be some rows fewer, but one prompt at least.
    """
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        by_prompt[record.human].append(i)
    if ratio <= 0 or max_rows <= 0 or len(by_prompt) < 2:
        return list(records), []
    prompts = [by_prompt[human] for human in sorted(by_prompt, key=_digest)]
    by_category: dict[str, list[list[int]]] = defaultdict(list)
    for rows in prompts:
        by_category[min(records[i].category for i in rows)].append(rows)
    total = len(records)
    wanted = min(max_rows, max(1, round(total * ratio)), total - 1)
    held: set[int] = set()
    room = 0  # counted in 1/total of a row; what one category leaves, the next may use
    for category in sorted(by_category):
        room += wanted * sum(map(len, by_category[category]))
        for rows in by_category[category]:
            if len(rows) * total <= room:
                held.update(rows)
                room -= len(rows) * total
    smallest = min(prompts, key=len)
    held = held or set(smallest)
    return [r for i, r in enumerate(records) if i not in held], [r for i, r in enumerate(records) if i in held]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()
