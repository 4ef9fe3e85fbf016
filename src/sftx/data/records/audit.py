"""What is in a corpus, and what training would make of it: the figures of `sftx data check`."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sftx.config.derive import propose_length
from sftx.data.records.choose import Facts, conflicts, exact_duplicates, near_duplicates
from sftx.data.records.record import Record
from sftx.data.store.record_store import origin_of
from sftx.data.store.rows import Rows

SHARE = 0.99
"""The share of rows that the proposed `max_seq_length` covers."""
LISTED = 10
"""So many are listed of each kind of finding; `--json` names all."""
SCRIPTS = {"CJK": "zh", "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko", "CYRILLIC": "ru", "ARABIC": "ar"}


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows before any is cut."""

    median: int
    p90: int
    p99: int
    longest: int
    max_seq_length: int
    covered: float
    """The share of rows within `max_seq_length`."""
    proposed: int
    proposed_covers: float
    histogram: list[tuple[int, int, int]]
    """(from, up to and with, rows)."""


@dataclass(frozen=True)
class Category:
    """One line of the table of categories."""

    rows: int
    tokens: int
    supervised_tokens: int
    languages: dict[str, int]


@dataclass(frozen=True)
class Audit:
    """All that is found."""

    records: int
    rows: int
    tokens: int
    supervised_tokens: int
    lengths: Lengths
    categories: dict[str, Category]
    untrainable: list[str]
    """Records without supervised tokens, as `file:line: why`."""
    truncated: list[str]
    duplicates: list[str]
    near_duplicates: list[str]
    conflicts: list[str]
    leaks: list[str]
    """Held-out records whose question is in the training data."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)


def audit(
    records: Sequence[Record],
    facts: Facts,
    rows: Rows,
    max_seq_length: int,
    *,
    training: Sequence[Record] = (),
    held_out: Sequence[Record] = (),
    near: float | None = None,
) -> Audit:
    """Look a corpus through; `near` is the similarity from which rows are near-duplicates, None does not look.

    `training` are those of its records that a run would train on, `held_out` what it would be evaluated on.
    """
    repeated = dict(exact_duplicates(facts, records))
    nearly = dict(near_duplicates(records, near, skip=repeated)) if near is not None else {}
    return Audit(
        records=len(records),
        rows=len(rows),
        tokens=int(rows.lengths.sum()),
        supervised_tokens=int(rows.supervised.sum()),
        lengths=lengths_of(rows.full_lengths, max_seq_length),
        categories=_categories(records, rows),
        untrainable=[str(s) for s in rows.skipped],
        truncated=[f"{rows.origin(i)}: {rows.full_lengths[i]} tokens, {rows.lengths[i]} kept" for i in rows.truncated],
        duplicates=[f"{origin_of(records, i)}: {why}" for i, why in repeated.items()],
        near_duplicates=[f"{origin_of(records, i)}: {why}" for i, why in nearly.items()],
        conflicts=[" and ".join(origin_of(records, i) for i in g) for g in conflicts(facts, repeated)],
        leaks=list(leaks(training, held_out)),
    )


def lengths_of(full_lengths: np.ndarray, max_seq_length: int) -> Lengths:
    """Return the distribution of the rows' lengths."""
    ordered = np.sort(full_lengths)
    median, p90, p99 = (int(ordered[min(len(ordered) - 1, int(share * len(ordered)))]) for share in (0.5, 0.9, 0.99))
    proposed = propose_length(ordered.tolist(), SHARE)
    return Lengths(
        median,
        p90,
        p99,
        longest=int(ordered[-1]),
        max_seq_length=max_seq_length,
        covered=float((ordered <= max_seq_length).mean()),
        proposed=proposed,
        proposed_covers=float((ordered <= proposed).mean()),
        histogram=_histogram(ordered),
    )


def _histogram(ordered: np.ndarray, bins: int = 20) -> list[tuple[int, int, int]]:
    """Count rows in bins of one width, a round one; the last holds the longest percent."""
    reach = int(ordered[min(len(ordered) - 1, int(SHARE * len(ordered)))])
    width = max(1, -(-reach // bins))
    for round_width in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        if round_width >= width:
            width = round_width
            break
    edges = list(range(0, reach + width, width))
    counts = [int(((ordered > lo) & (ordered <= lo + width)).sum()) for lo in edges]
    found = [(lo + 1, lo + width, n) for lo, n in zip(edges, counts, strict=True)]
    beyond = int((ordered > edges[-1] + width).sum())
    if beyond:
        found.append((edges[-1] + width + 1, int(ordered[-1]), beyond))
    full = [i for i, (*_, count) in enumerate(found) if count]
    return found[full[0] : full[-1] + 1]


def language_of(text: str) -> str:
    """Name a text's language by its script: exact enough for a table, no more."""
    counts: Counter[str] = Counter()
    for c in text[:400]:
        if c.isalpha():
            script = "latin" if c < "\u0250" else unicodedata.name(c, "?").split()[0]
            counts[SCRIPTS.get(script, script.lower())] += 1
    if not counts:
        return "none"
    if counts["ja"]:
        return "ja"
    characters = sum(counts.values())
    for language, count in counts.most_common():
        if language != "latin" and count > 0.15 * characters:
            return language
    return "latin" if counts["latin"] else counts.most_common(1)[0][0]


def _categories(records: Sequence[Record], rows: Rows) -> dict[str, Category]:
    languages: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        languages[record.category][language_of(record.human + record.assistant)] += 1
    tokens: Counter[str] = Counter()
    supervised: Counter[str] = Counter()
    for number, length, count in zip(rows.category_numbers, rows.lengths, rows.supervised, strict=True):
        tokens[rows.categories[number]] += int(length)
        supervised[rows.categories[number]] += int(count)
    return {
        c: Category(n.total(), tokens[c], supervised[c], dict(n.most_common()))
        for c, n in sorted(languages.items(), key=lambda item: (-item[1].total(), item[0]))
    }


def leaks(training: Sequence[Record], held_out: Sequence[Record]) -> Iterator[str]:
    """Yield the held-out records whose question is in the training data, also in other case and spacing."""
    if not held_out:
        return
    questions: dict[bytes, int] = {}
    for i, record in enumerate(training):
        questions.setdefault(_plain(record.human), i)
    for record in held_out:
        first = questions.get(_plain(record.human))
        if first is not None:
            yield f"{record.origin}: its question is trained on, {training[first].origin}"


def _plain(text: str) -> bytes:
    """Return a digest: the questions of a large corpus are not held in memory."""
    return hashlib.blake2b("".join(text.lower().split()).encode(), digest_size=16).digest()
