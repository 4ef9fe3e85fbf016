"""Rows: records as tokens, with what each token weighs in the loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np


@dataclass(frozen=True)
class Row:
    """One record as tokens: `ids_T` int32, `weights_T` float32 (0 where a token is not learned, usually 1)."""

    ids_T: np.ndarray
    weights_T: np.ndarray
    category: str
    origin: str
    """`file:line` of the record."""
    full_length: int
    """Tokens before truncation."""

    @property
    def truncated(self) -> bool:
        """True when tokens were cut off."""
        return self.full_length > len(self.ids_T)

    @property
    def supervised_T(self) -> np.ndarray:  # noqa: N802 - a shape suffix
        """Bool: true where a token is learned."""
        return self.weights_T > 0

    @property
    def supervised_tokens(self) -> int:
        """Tokens that carry loss; the first token of a sequence never does, nothing predicts it."""
        return int(self.supervised_T[1:].sum())

    @property
    def loss_weight(self) -> float:
        """The sum of the weights of the tokens that carry loss."""
        return float(self.weights_T[1:].sum(dtype=np.float64))


class Rows(Sequence[Row]):
    """A corpus of rows, which may lie on disk, with what a plan must know of each without reading it."""

    lengths: np.ndarray
    """Tokens of each row, int32."""
    loss_weights: np.ndarray
    """`loss_weight` of each row, float64."""
    supervised: np.ndarray
    """`supervised_tokens` of each row, int32."""

    @abstractmethod
    def row(self, index: int) -> Row:
        """Return one row; `index` is not negative."""

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.row(index % len(self))


class MemoryRows(Rows):
    """Rows held in memory."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)
        self.lengths = np.array([len(r.ids_T) for r in rows], dtype=np.int32)
        self.loss_weights = np.array([r.loss_weight for r in rows], dtype=np.float64)
        self.supervised = np.array([r.supervised_tokens for r in rows], dtype=np.int32)

    def row(self, index: int) -> Row:
        """Return one row."""
        return self._rows[index]


@dataclass(frozen=True)
class Encoding:
    """The rows of a corpus, and those that could not be used, as `file:line: reason`."""

    rows: MemoryRows
    skipped: list[str]

    @property
    def truncated(self) -> list[Row]:
        """The rows that lost tokens."""
        return [r for r in self.rows if r.truncated]
