"""Hold part of a corpus out for evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sftx.data.records.record import Record
from sftx.data.store.record_store import RecordView, categories_of, prompt_digest, stored


def split(records: Sequence[Record], ratio: float, max_rows: int) -> tuple[RecordView, RecordView]:
    """Hold out a share of each category; return (training rows, held-out rows), both in the order given.

    The choice follows from the rows' text alone, not from their order or `seed`, so that runs with
    other seeds are judged on the same rows. `ratio` of all rows is rounded, to one at least and
    `max_rows` at most, and each category gives its part of that to within one row. Rows with the same
    prompt go to the same side: then it may be some rows fewer, but one prompt at least.
    """
    total = len(records)
    held = np.zeros(total, bool)
    if total and ratio > 0 and max_rows > 0:
        digests, categories, names = _keys(records)
        group, sizes = _groups(digests)
        if len(sizes) > 1:
            wanted = min(max_rows, max(1, round(total * ratio)), total - 1)
            chosen = _choose(_categories_of(group, categories, names, len(sizes)), sizes, total, wanted)
            held = chosen[group]
    return RecordView(records, np.flatnonzero(~held)), RecordView(records, np.flatnonzero(held))


def _keys(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return each record's prompt digest and category number, and the categories' names."""
    if found := stored(records):
        store, indices = found
        digests = store.column("prompt")[indices]
    else:
        digests = np.array([prompt_digest(record) for record in records], "V32")
    return digests.view("u1").reshape(-1, 32), *categories_of(records)


def _groups(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the prompts in the order of their digests; return each row's number, and the rows of each."""
    words = np.ascontiguousarray(digests).view(">u8")
    order = np.lexsort(words.T[::-1])
    ordered = words[order]
    first = np.ones(len(ordered), bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    group = np.empty(len(ordered), np.int64)
    group[order] = np.cumsum(first) - 1
    return group, np.bincount(group)


def _categories_of(group: np.ndarray, categories: np.ndarray, names: list[str], count: int) -> np.ndarray:
    """Return each prompt's category as its rank by name: the first one of its rows."""
    rank = np.empty(len(names), np.int64)
    rank[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
    least = np.full(count, len(names), np.int64)
    np.minimum.at(least, group, rank[categories])
    return least


def _choose(ranks: np.ndarray, sizes: np.ndarray, total: int, wanted: int) -> np.ndarray:
    """Return which prompts are held out."""
    chosen = np.zeros(len(sizes), bool)
    room = 0  # counted in 1/total of a row; what one category leaves, the next may use
    by_category = np.argsort(ranks, kind="stable")
    bounds = np.flatnonzero(np.diff(ranks[by_category])) + 1
    for prompts in np.split(by_category, bounds):
        room += wanted * int(sizes[prompts].sum())
        for prompt in prompts.tolist():
            size = int(sizes[prompt]) * total
            if size <= room:
                chosen[prompt] = True
                room -= size
    if not chosen.any():
        chosen[int(np.argmin(sizes))] = True
    return chosen
