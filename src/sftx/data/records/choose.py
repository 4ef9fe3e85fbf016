"""Which records of a corpus are used, and how often: duplicates, conflicts, caps, mixing.

Each policy is a key of group `data`, off unless set. Every record left out is reported with its file and line.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from sftx.data.records.record import Record
from sftx.data.store.record_store import answer_hash, before_hash, origin_of, stored
from sftx.errors import ConfigError, DataError, did_you_mean

Duplicates = Literal["keep", "drop_exact", "drop_near"]
Conflicts = Literal["keep", "keep_first", "drop", "error"]
SHINGLE, PERMUTATIONS = 5, 128
"""Characters of a shingle, and hash functions of a MinHash (datasketch)."""


@dataclass(frozen=True)
class Facts:
    """What the policies need of every record, without holding its text; one entry a record."""

    prompts: np.ndarray
    """Hash of all that stands before the last answer; uint64."""
    answers: np.ndarray
    """Hash of the last answer; uint64."""
    categories: list[str]
    sources: list[str]


@dataclass(frozen=True)
class ChoosePolicy:
    """The policies; weights multiply how often a category's or a source's records are seen in an epoch."""

    duplicates: Duplicates = "keep"
    near_threshold: float = 0.8
    conflicts: Conflicts = "keep"
    cap_per_category: int | None = None
    cap_per_source: int | None = None
    category_weights: Mapping[str, float] = field(default_factory=dict)
    source_weights: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 1.0

    @property
    def chooses(self) -> bool:
        """True when a policy is set, so that every record must be looked at."""
        return self != ChoosePolicy(near_threshold=self.near_threshold)


@dataclass
class Choice:
    """The records that are used, in the corpus's order, and why the others are not."""

    kept: np.ndarray
    left_out: list[tuple[int, str]]
    """(record, reason)."""


def facts_of(records: Sequence[Record]) -> Facts:
    """Return the facts of records; of those in a store its index knows them."""
    found = stored(records)
    if found is None:
        return Facts(
            np.array([before_hash(r) for r in records], np.uint64),
            np.array([answer_hash(r) for r in records], np.uint64),
            [r.category for r in records],
            [r.source for r in records],
        )
    store, indices = found
    return Facts(
        store.column("before")[indices],
        store.column("answer")[indices],
        [store.categories[n] for n in store.column("category")[indices].tolist()],
        [store.sources[n] for n in store.column("file")[indices].tolist()],
    )


def choose(facts: Facts, records: Sequence[Record], policy: ChoosePolicy, seed: int) -> Choice:
    """Apply the policies that leave records out, in the order duplicates, conflicts, caps.

    Raises:
        DataError: `conflicts=error` and there is one.
    """
    left: dict[int, str] = {}
    if policy.duplicates != "keep":
        left |= dict(exact_duplicates(facts, records))
    if policy.duplicates == "drop_near":
        left |= dict(near_duplicates(records, policy.near_threshold, skip=left))
    if policy.conflicts != "keep":
        left |= _conflicting(facts, records, policy.conflicts, left)
    for name, labels, cap in (
        ("category", facts.categories, policy.cap_per_category),
        ("source", facts.sources, policy.cap_per_source),
    ):
        if cap is not None:
            left |= dict.fromkeys(_over_cap(labels, cap, seed, left), f"over cap_per_{name}={cap}")
    kept = np.delete(np.arange(len(facts.categories)), list(left))
    if len(facts.categories) and not len(kept):
        raise DataError("the policies of group `data` leave no record to train on.")
    return Choice(kept, sorted(left.items()))


def exact_duplicates(facts: Facts, records: Sequence[Record]) -> Iterator[tuple[int, str]]:
    """Yield each record that repeats an earlier one, conversation and answer, and which."""
    order = np.lexsort((facts.answers, facts.prompts))  # it is stable: of equal ones the first in the corpus is first
    prompts, answers = facts.prompts[order], facts.answers[order]
    repeats = np.zeros(len(order), bool)
    repeats[1:] = (prompts[1:] == prompts[:-1]) & (answers[1:] == answers[:-1])
    begins = np.maximum.accumulate(np.where(repeats, 0, np.arange(len(order))))
    found = sorted(zip(order[repeats].tolist(), order[begins[repeats]].tolist(), strict=True))
    for i, first in found:
        yield i, f"is {origin_of(records, first)} again"


def near_duplicates(records: Sequence[Record], threshold: float, skip: Mapping[int, str]) -> Iterator[tuple[int, str]]:
    """Yield each record whose text is nearly an earlier one's: MinHash over shingles (Broder, 1997).

    Raises:
        ConfigError: datasketch is not installed.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise ConfigError(
            "near-duplicates (`data.duplicates=drop_near`, `--near`) need datasketch: "
            "pip install -c constraints.txt datasketch. Without it: data.duplicates=drop_exact."
        ) from error

    index = MinHashLSH(threshold=0.75 * threshold, num_perm=PERMUTATIONS)  # finds candidates, which are then compared
    sketches: dict[int, MinHash] = {}
    for i, record in enumerate(records):
        if i in skip:
            continue
        text = "\n".join(m.content for m in record.messages)
        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([s.encode("utf-8") for s in shingles(text)])
        found = [n for n in index.query(sketch) if sketch.jaccard(sketches[n]) >= threshold]
        if found:
            near = min(found)
            yield i, f"is nearly {origin_of(records, near)} (MinHash, near_threshold={threshold:g})"
        else:
            index.insert(i, sketch)
            sketches[i] = sketch


def shingles(text: str) -> set[str]:
    """Return the runs of characters that near-duplicates share, case and blanks aside."""
    plain = "".join(text.lower().split())
    return {plain[i : i + SHINGLE] for i in range(max(1, len(plain) - SHINGLE + 1))}


def conflicts(facts: Facts, skip: Mapping[int, str]) -> list[list[int]]:
    """Return the records that ask the same and answer differently, a list for each such prompt."""
    by_prompt: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(facts.prompts.tolist()):
        if i not in skip:
            by_prompt[prompt].append(i)
    return [g for g in by_prompt.values() if len({int(facts.answers[i]) for i in g}) > 1]


def _conflicting(facts: Facts, records: Sequence[Record], policy: Conflicts, skip: Mapping[int, str]) -> dict[int, str]:
    groups = conflicts(facts, skip)
    if groups and policy == "error":
        shown = [f"{origin_of(records, g[0])} and {origin_of(records, g[1])}" for g in groups[:10]]
        raise DataError(
            f"{len(groups)} prompts have several answers: {'; '.join(shown)}{'; ...' if len(groups) > 10 else ''}. "
            f"Keep one of each, or set data.conflicts=keep, keep_first or drop."
        )
    out: dict[int, str] = {}
    for group in groups:
        first = group[0]
        same = {i for i in group if facts.answers[i] == facts.answers[first]} if policy == "keep_first" else set()
        out |= {i: _otherwise(facts, records, group, i) for i in group if i not in same}
    return out


def _otherwise(facts: Facts, records: Sequence[Record], group: Sequence[int], index: int) -> str:
    other = next(i for i in group if facts.answers[i] != facts.answers[index])
    return f"answers otherwise than {origin_of(records, other)}"


def _over_cap(labels: Sequence[str], cap: int, seed: int, skip: Mapping[int, str]) -> set[int]:
    """Return a random part of each label's records, so large that `cap` are left."""
    by_label: dict[str, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        if i not in skip:
            by_label[label].append(i)
    generator = np.random.default_rng(seed)
    over: set[int] = set()
    for label in sorted(by_label):
        members = by_label[label]
        if len(members) > cap:
            over |= {members[i] for i in generator.permutation(len(members))[cap:].tolist()}
    return over


def mixed(labels: Facts, kept: np.ndarray, policy: ChoosePolicy, seed: int) -> np.ndarray:
    """Return the training records of an epoch: each as often as its weights say.

    A weight of 1.5 is once, and once more for a random half. `temperature` T makes the shares of the
    sources those of `size ** (1 / T)` at the same total (mT5, arXiv:2010.11934): above 1 small
    sources are seen more often.

    Raises:
        DataError: a weight names a category or a source that is not in the corpus.
    """
    for name, weights, present in (
        ("category", policy.category_weights, labels.categories),
        ("source", policy.source_weights, labels.sources),
    ):
        for unknown in sorted(set(weights) - set(present)):
            known = sorted(set(present))
            raise DataError(
                f"data.{name}_weights: no record has the {name} `{unknown}`.{did_you_mean(unknown, known)} "
                f"There are: {', '.join(known[:20])}."
            )
    often = np.ones(len(kept))
    if policy.category_weights:
        often *= [policy.category_weights.get(labels.categories[i], 1.0) for i in kept]
    if policy.source_weights:
        often *= [policy.source_weights.get(labels.sources[i], 1.0) for i in kept]
    if policy.temperature != 1.0:
        often *= _tempered([labels.sources[i] for i in kept], policy.temperature)
    whole = np.floor(often).astype(np.int64)
    drawn = np.random.default_rng(seed).random(len(kept)) < often - whole
    return np.repeat(kept, whole + drawn)


def _tempered(sources: Sequence[str], temperature: float) -> np.ndarray:
    names, numbers, sizes = np.unique(np.array(sources), return_inverse=True, return_counts=True)
    if len(names) < 2:
        return np.ones(len(sources))
    shares = sizes ** (1.0 / temperature)
    wanted = shares / math.fsum(shares.tolist()) * len(sources)
    return (wanted / sizes)[numbers]
