"""A block: rows as a few long arrays, the form in which they cross a process border and reach the disk.

No Arrow here: the processes that tokenise load as little as they can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sftx.data.record import origin_text
from sftx.data.rows import Row

Names = tuple[list[str], np.ndarray]
"""Distinct strings, and for each row the number of its own."""


@dataclass(frozen=True)
class Skipped:
    """A record that gave no row: its place in the corpus, where it begins, and why."""

    record: int
    file: str
    line: int
    reason: str
    number: int = 0

    def __str__(self) -> str:
        return f"{origin_text(self.file, self.line, self.number)}: {self.reason}"


@dataclass(frozen=True)
class Block:
    """Some rows that follow each other; `_R` counts rows, `_N` tokens, `_S` spans of tokens that weigh alike."""

    ids_N: np.ndarray
    lengths_R: np.ndarray
    starts_S: np.ndarray
    ends_S: np.ndarray
    weights_S: np.ndarray
    spans_R: np.ndarray
    """How many spans each row has; what lies in none weighs nothing."""
    categories: Names
    files: Names
    lines_R: np.ndarray
    numbers_R: np.ndarray
    records_R: np.ndarray
    full_lengths_R: np.ndarray
    loss_weights_R: np.ndarray
    supervised_R: np.ndarray
    skipped: list[Skipped]


@dataclass(frozen=True)
class Origin:
    """The record that a row came from."""

    record: int
    file: str
    line: int
    number: int = 0


def to_block(rows: Sequence[Row], origins: Sequence[Origin], skipped: list[Skipped]) -> Block:
    """Return rows as one block; `origins` says for each where it came from."""
    lengths_R = np.fromiter((len(row.ids_T) for row in rows), np.int32, len(rows))
    starts_S, ends_S, weights_S, spans_R = _spans([row.weights_T for row in rows], lengths_R)
    return Block(
        ids_N=_joined([row.ids_T for row in rows], np.int32),
        lengths_R=lengths_R,
        starts_S=starts_S,
        ends_S=ends_S,
        weights_S=weights_S,
        spans_R=spans_R,
        categories=_numbered([row.category for row in rows]),
        files=_numbered([origin.file for origin in origins]),
        lines_R=np.fromiter((origin.line for origin in origins), np.int64, len(rows)),
        numbers_R=np.fromiter((origin.number for origin in origins), np.int64, len(rows)),
        records_R=np.fromiter((origin.record for origin in origins), np.int64, len(rows)),
        full_lengths_R=np.fromiter((row.full_length for row in rows), np.int32, len(rows)),
        loss_weights_R=np.fromiter((row.loss_weight for row in rows), np.float64, len(rows)),
        supervised_R=np.fromiter((row.supervised_tokens for row in rows), np.int32, len(rows)),
        skipped=skipped,
    )


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)


def _spans(weights: Sequence[np.ndarray], lengths_R: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return start, end and weight of each run of equal weights other than 0, and how many each row has."""
    weights_N = _joined(weights, np.float32)
    row_starts_R = np.cumsum(lengths_R, dtype=np.int64) - lengths_R
    begins_N = np.ones(len(weights_N), dtype=bool)
    begins_N[1:] = weights_N[1:] != weights_N[:-1]
    begins_N[row_starts_R[lengths_R > 0]] = True  # a run ends with its row
    starts = np.flatnonzero(begins_N)
    ends = np.append(starts[1:], len(weights_N))[: len(starts)]
    weighs = weights_N[starts] != 0
    starts, ends = starts[weighs], ends[weighs]
    row_of = np.searchsorted(row_starts_R + lengths_R, starts, side="right")
    spans_R = np.bincount(row_of, minlength=len(lengths_R)).astype(np.int32)
    first = row_starts_R[row_of]
    return (starts - first).astype(np.int32), (ends - first).astype(np.int32), weights_N[starts], spans_R


def _numbered(names: Sequence[str]) -> Names:
    distinct = list(dict.fromkeys(names))
    number = {name: i for i, name in enumerate(distinct)}
    return distinct, np.fromiter((number[name] for name in names), np.int32, len(names))
