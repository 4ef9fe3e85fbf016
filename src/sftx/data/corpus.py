"""Find the corpus, convert it to JSONL once, and hold part of it out for evaluation."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sftx.data.read import Reading, Record, read_file, sha256_file
from sftx.errors import DataError, nearest
from sftx.files import cache_root, write_json, write_text

READER_VERSION = 1
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
        stem = cache_root() / "jsonl" / f"{path.stem}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
        jsonl, meta = stem.with_suffix(".jsonl"), stem.with_suffix(".json")
        if not meta.is_file():  # written last: with it, the JSONL is whole
            reading = read_file(path, format=self.format, encoding=self.encoding, delimiter=self.delimiter)
            _write_jsonl(reading, jsonl, meta, keep_columns=keep_columns)
        facts = json.loads(meta.read_text(encoding="utf-8"))
        return LoadedFile(path, jsonl, digest, **facts, records=_read_jsonl(jsonl, path))


def find_file(folder: str, name: str, *, key: str) -> Path:
    """Return the corpus's path: directly in the folder, or in its `csv/` subfolder (the original layout).

    Errors:
        DataError: no such folder, no such file (the nearest name is given), or found in both places.
    """
    base = Path(folder).expanduser()
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


def _write_jsonl(reading: Reading, jsonl: Path, meta: Path, *, keep_columns: bool) -> None:
    lines = []
    for r in reading.records:
        row: dict[str, object] = {"category": r.category, "human": r.human, "assistant": r.assistant}
        if keep_columns:
            row |= r.extra
        lines.append(json.dumps(row | {"_line": r.line}, ensure_ascii=False))
    write_text(jsonl, "\n".join(lines) + "\n")
    write_json(meta, {"encoding": reading.encoding, "delimiter": reading.delimiter, "format": reading.format})


def _read_jsonl(jsonl: Path, origin: Path) -> list[Record]:
    records = []
    with jsonl.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            row = json.loads(line)
            category, human, assistant = row.pop("category"), row.pop("human"), row.pop("assistant")
            number = row.pop("_line")
            records.append(Record(category, human, assistant, str(origin), number, row))
    return records


def split(records: Sequence[Record], ratio: float, max_rows: int) -> tuple[list[Record], list[Record]]:
    """Hold out a share of each category; return (training rows, held-out rows), both in file order.

    The choice follows from the rows' text alone, not from `seed`, so that runs with other seeds are
    judged on the same rows. Rows with the same prompt go to the same side. A category gives a row
    when its share rounds to one; at least one row is held out when `ratio` is above 0 and two remain.
    """
    if ratio <= 0:
        return list(records), []
    by_category: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, record in enumerate(records):
        by_category[record.category][record.human].append(i)
    wanted = min(max_rows, max(1, round(len(records) * ratio)))
    share = wanted / len(records)
    order: list[tuple[float, str, list[int]]] = []
    for prompts in by_category.values():
        ranked = sorted(prompts.values(), key=lambda rows: _digest(records[rows[0]].human))
        seen = 0.0
        for rows in ranked:  # the k-th prompt of a category is due when its share reaches k
            order.append(((seen + len(rows) / 2) / share, _digest(records[rows[0]].human), rows))
            seen += len(rows)
    limits = {c: sum(map(len, p.values())) for c, p in by_category.items()}
    held: set[int] = set()
    taken: dict[str, int] = defaultdict(int)
    for _, _, rows in sorted(order, key=lambda o: (o[0], o[1])):
        category = records[rows[0]].category
        quota = share * limits[category]
        if len(held) + len(rows) <= wanted and taken[category] < max(quota, 1) and len(held) < len(records) - 1:
            held.update(rows)
            taken[category] += len(rows)
    return [r for i, r in enumerate(records) if i not in held], [r for i, r in enumerate(records) if i in held]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
