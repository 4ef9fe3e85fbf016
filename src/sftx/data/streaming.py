"""Rows of a corpus that is tokenised as it is read, and never kept: for what no disk holds twice.

The corpus is cut into windows of so many records, at other places in each epoch; inside a window the
order is drawn from (seed, epoch, window). So the order of a whole pass is a pure function of (seed,
epoch), and any place in it is found again by reading one window. The ranks deal it out like cards:
each record goes to one rank. How many rows a record gives is known only when it is encoded, so the
ranks need not end a pass with equally many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch

from sftx.data.record import Record
from sftx.data.rows import Row
from sftx.model.dropout import key_of

Reader = Callable[[int], Iterator[Record]]
"""Opens the corpus at a record, counted from 0, and goes on to its end."""
Encoder = Callable[[Sequence[Record]], Sequence[list[Row] | str]]
"""Returns for each record its rows, or why it has none."""
BATCH = 64
"""Records that are encoded at a time."""


class Cursor(NamedTuple):
    """Where a rank stands in a pass: at a record, in the order of the pass; so many of its rows have been given."""

    record: int = 0
    row: int = 0


def reader_of(records: Sequence[Record]) -> Reader:
    """Return the reader of records that can be asked for by number."""
    return lambda start: (records[i] for i in range(start, len(records)))


class StreamRows(Iterator[Row]):
    """One rank's rows of one pass (epoch); `window=1` keeps the corpus's order.

    `state` and `restore` go on at the very row, on the same number of ranks. `on_skip` hears of each
    record that gives no row; a pass may be empty.
    """

    def __init__(
        self,
        reader: Reader,
        encoder: Encoder,
        *,
        seed: int,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        window: int = 10_000,
        on_skip: Callable[[Record, str], None] = lambda record, reason: None,
    ) -> None:
        self._reader, self._encoder, self._on_skip = reader, encoder, on_skip
        self._seed, self._epoch, self._rank, self._world_size = seed, epoch, rank, world_size
        self._window = window
        # The windows begin elsewhere in each epoch, or the same records would stay together for ever.
        self._first = 1 + key_of(seed, epoch) % window
        self.restore(Cursor())

    def state(self) -> Cursor:
        """Return where the next row stands; two integers."""
        return self._cursor

    def restore(self, state: tuple[int, int]) -> None:
        """Go on where `state` was taken."""
        self._cursor = Cursor(*state)
        self._rows = self._pass(self._cursor)

    def __next__(self) -> Row:
        row, self._cursor = next(self._rows)
        return row

    def _pass(self, start: Cursor) -> Iterator[tuple[Row, Cursor]]:
        """Yield each row from `start` on, with the place after it."""
        for batch in _batched(self._mine(start.record)):
            encodings = self._encoder([record for _, record in batch])
            for (place, record), encoded in zip(batch, encodings, strict=True):
                if isinstance(encoded, str):
                    self._on_skip(record, encoded)
                    continue
                done = start.row if place == start.record else 0
                for number, row in enumerate(encoded[done:], start=done + 1):
                    yield row, Cursor(place, number) if number < len(encoded) else Cursor(place + 1)

    def _mine(self, start: int) -> Iterator[tuple[int, Record]]:
        """Yield this rank's records from a place in the order of the pass on, each with its place."""
        number = 0 if start < self._first else 1 + (start - self._first) // self._window
        begin = 0 if number == 0 else self._first + (number - 1) * self._window
        records = self._reader(begin)
        while window := list(islice(records, self._window if number else self._first)):
            for i, chosen in enumerate(self._order(number, len(window))):
                place = begin + i
                if place >= start and place % self._world_size == self._rank:
                    yield place, window[chosen]
            begin, number = begin + len(window), number + 1

    def _order(self, number: int, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(key_of(self._seed, self._epoch, number))
        return torch.randperm(count, generator=generator).tolist()


def _batched(items: Iterator[tuple[int, Record]]) -> Iterator[list[tuple[int, Record]]]:
    while batch := list(islice(items, BATCH)):
        yield batch
