"""How far the ranks of a run have got, in memory that they share with their supervisor; without locks or waiting.

A *collective* is anything that all ranks do together: a sum, a broadcast, a barrier. Every rank enters
the same collectives in the same order, so a rank is behind when it has entered fewer than another.
"""

from __future__ import annotations

import mmap
import os

ALL_RANKS, MAIN_WRITES = 1, 2
"""What a collective waits for: for all ranks alike, or for the main rank, which writes files before it enters."""
CELLS = 2
"""Per rank: how many collectives it has entered, and what the last one waits for."""


class SharedState:
    """One cell for the rank that ended the run, then the cells of each rank; each is one aligned 64-bit number."""

    def __init__(self, descriptor: int, ranks: int) -> None:
        self.ranks = ranks
        self._cells = memoryview(mmap.mmap(descriptor, self.size(ranks))).cast("q")

    @staticmethod
    def size(ranks: int) -> int:
        """Return its size in bytes."""
        return 8 * (1 + CELLS * ranks)

    @classmethod
    def make(cls, ranks: int) -> tuple[SharedState, int]:
        """Return a new one, and the descriptor by which other processes open it."""
        descriptor = os.memfd_create("sftx-state", 0)
        os.ftruncate(descriptor, cls.size(ranks))
        return cls(descriptor, ranks), descriptor

    @property
    def root_cause(self) -> int | None:
        """The rank that ended the run, once that is known."""
        return self._cells[0] - 1 if self._cells[0] else None

    @root_cause.setter
    def root_cause(self, rank: int) -> None:
        self._cells[0] = rank + 1

    def enter(self, rank: int, kind: int) -> None:
        """Note that a rank enters its next collective."""
        at = 1 + CELLS * rank
        self._cells[at + 1] = kind
        self._cells[at] += 1

    def entered(self, rank: int) -> int:
        """Return how many collectives a rank has entered."""
        return self._cells[1 + CELLS * rank]

    def kind(self, rank: int) -> int:
        """Return what a rank's last collective waits for."""
        return self._cells[2 + CELLS * rank]
