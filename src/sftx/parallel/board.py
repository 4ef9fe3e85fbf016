"""What the ranks of a run have come to, in memory that they share with their supervisor; no locks, no waiting.

A *meeting* is anything that all ranks do together: a sum, a broadcast, a barrier. Every rank comes to
the same meetings in the same order, so a rank is behind when it has come to fewer than another.
"""

from __future__ import annotations

import mmap
import os

TOGETHER, FOR_MAIN = 1, 2
"""What a meeting waits for: for all ranks alike, or for the main rank, which writes files before it comes."""
CELLS = 2
"""Of each rank: how many meetings it has come to, and what the last one waits for."""


class Board:
    """One cell for the rank that ended the run, then the cells of each rank; each is one aligned 64-bit number."""

    def __init__(self, descriptor: int, ranks: int) -> None:
        self.ranks = ranks
        self._cells = memoryview(mmap.mmap(descriptor, self.size(ranks))).cast("q")

    @staticmethod
    def size(ranks: int) -> int:
        """Return the bytes that it takes."""
        return 8 * (1 + CELLS * ranks)

    @classmethod
    def make(cls, ranks: int) -> tuple[Board, int]:
        """Return a new one, and the descriptor by which other processes open it."""
        descriptor = os.memfd_create("sftx-board", 0)
        os.ftruncate(descriptor, cls.size(ranks))
        return cls(descriptor, ranks), descriptor

    @property
    def culprit(self) -> int | None:
        """The rank that ended the run, once that is known."""
        return self._cells[0] - 1 if self._cells[0] else None

    @culprit.setter
    def culprit(self, rank: int) -> None:
        self._cells[0] = rank + 1

    def come(self, rank: int, kind: int) -> None:
        """Note that a rank comes to its next meeting."""
        at = 1 + CELLS * rank
        self._cells[at + 1] = kind
        self._cells[at] += 1

    def meetings(self, rank: int) -> int:
        """Return how many meetings a rank has come to."""
        return self._cells[1 + CELLS * rank]

    def kind(self, rank: int) -> int:
        """Return what a rank's last meeting waits for."""
        return self._cells[2 + CELLS * rank]
