"""A corpus that is read, tokenised and shuffled as it is trained on, and never kept: for what no disk holds twice.

The corpus is cut into windows of so many records, at other positions in each pass (epoch); inside a window
the order is drawn from (seed, epoch, window). So the order of a whole pass is a pure function of (seed,
epoch), and any position in it is found again by reading one window. Every rank reads all of it and keeps its
own micro-batches: tokenising costs a hundredth of training, and the steps are those of one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from sftx.data.batches.feed import Layout, Step
from sftx.data.batches.plan import Batching, Pack, in_packs, share
from sftx.data.encode.row import Row
from sftx.data.records.record import Record
from sftx.errors import DataError
from sftx.processes import serve_parent
from sftx.seeds import key_of

Encoder = Callable[[Sequence[Record]], Sequence[list[Row] | str]]
"""Returns for each record its rows, or why it has none."""
BATCH = 64
"""Records that are encoded at a time where packs do not look beyond a row."""


class Reader:
    """The records of some files, opened at any of them; what is no record is reported as text, `file:line: why`.

    `counts` holds how many records the first files give to a pass, as far as they were read: by them a
    later opening passes over whole files unread.
    """

    def __init__(self, files: Sequence[Callable[[], Iterator[Record | str]]], limit: int | None = None) -> None:
        self._files, self._limit = files, limit
        self.counts: tuple[int, ...] = ()

    @property
    def total(self) -> int | None:
        """Records of a pass; None while it has not been read to its end."""
        known = sum(self.counts)
        return known if len(self.counts) == len(self._files) or known == self._limit else None

    def records(self, start: int) -> Iterator[Record | str]:
        """Yield the records from `start` on, counted from 0."""
        position = 0
        for number, open_file in enumerate(self._files):
            known = self.counts[number] if number < len(self.counts) else None
            if known is not None and position + known <= start:
                position += known
                continue
            first = position
            for item in open_file():
                if position == self._limit:
                    break
                if position >= start:
                    yield item
                position += not isinstance(item, str)
            if number == len(self.counts):
                self.counts = (*self.counts, position - first)
            if position == self._limit:
                return


@dataclass(frozen=True)
class Cursor:
    """Where a stream stands: so many packs of the pool that begins at a record, in the order of its pass, are given."""

    epoch: int = 0
    record: int = 0
    pack: int = 0
    counts: tuple[int, ...] = ()
    """What the reader knew of its files' lengths."""

    @classmethod
    def of(cls, state: dict[str, Any] | None) -> Cursor:
        """Return the cursor of a step, or the beginning."""
        return cls(**{**state, "counts": tuple(state["counts"])}) if state else cls()


@dataclass
class _Report:
    """What is to be reported of records with the next step; of the first pass only."""

    truncated: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def clear(self) -> None:
        """Forget what has been reported."""
        self.truncated, self.left_out = [], []


@dataclass(frozen=True)
class StreamOrder:
    """How the records of a stream become packs."""

    seed: int
    window: int
    """Records that are shuffled together; 1 keeps the corpus's order."""
    batching: Batching
    max_length: int
    sequences_per_step: int


class StreamedFeed:
    """Feeds the steps of a corpus that is read as they are made, pass after pass."""

    sequences: int | None = None

    def __init__(self, reader: Reader, encoder: Encoder, order: StreamOrder, workers: int) -> None:
        self._reader, self._encoder, self._order, self._workers = reader, encoder, order, workers

    def steps(self, first: int, last: int, cursor: dict[str, Any] | None, layout: Layout) -> Generator[Step]:
        """Yield steps, made by another process when there may be one.

        Raises:
            DataError: a row cannot be read, or no record of a whole pass can be trained on.
        """
        make = lambda: islice(self._steps(Cursor.of(cursor), layout), last - first)  # noqa: E731
        if not self._workers:
            yield from make()
            return
        loader = DataLoader(
            _OneProcess(make),
            batch_size=None,
            num_workers=1,  # one after the other is what a stream is
            prefetch_factor=4,
            worker_init_fn=_settle,
            multiprocessing_context="fork",
            generator=torch.Generator().manual_seed(self._order.seed),
        )
        yield from loader

    def _steps(self, cursor: Cursor, layout: Layout) -> Iterator[Step]:
        self._reader.counts = max(self._reader.counts, cursor.counts, key=len)
        report = _Report()
        while True:
            given = False
            for packs, after in self._groups(cursor, report):
                given = True
                yield self._step(packs, after, report, layout)
                report.clear()
            if not given and cursor.record == 0:
                why = f" The first: {report.left_out[0]}" if report.left_out else ""
                raise DataError(f"no record of the whole corpus can be trained on.{why}")
            cursor = Cursor(cursor.epoch + 1)

    def _groups(self, start: Cursor, report: _Report) -> Iterator[tuple[list[list[Row]], Cursor]]:
        """Yield the packs of each step of a pass; the last one of a pass, or of a bucketed window, may be smaller."""
        buckets = self._order.batching == "length_bucketed"
        group: list[list[Row]] = []
        for pack, after in self._pass(start, report):
            group.append(pack)
            if len(group) == self._order.sequences_per_step or (buckets and after.pack == 0):
                yield group, after
                group = []
        if group:
            yield group, Cursor(start.epoch + 1, counts=self._reader.counts)

    def _step(self, packs: list[list[Row]], after: Cursor, report: _Report, layout: Layout) -> Step:
        rows = [row for pack in packs for row in pack]
        sequences, start = [], 0
        for pack in packs:
            sequences.append(tuple(range(start, start + len(pack))))
            start += len(pack)
        total = self._reader.total
        mine = share(sequences, layout.batch_size, layout.world_size, layout.rank)
        return Step(
            batches=[layout.batch(rows, indices, index) for index, indices in mine],
            weight=sum(row.loss_weight for row in rows),
            supervised_tokens=sum(row.supervised_tokens for row in rows),
            tokens=sum(len(row.ids_T) for row in rows),
            origins=[row.origin for row in rows],
            epoch=after.epoch + (after.record / total if total else 0),
            cursor=asdict(after),
            truncated=tuple(report.truncated),
            left_out=tuple(report.left_out),
        )

    def _pass(self, start: Cursor, report: _Report) -> Iterator[tuple[list[Row], Cursor]]:
        """Yield each pack of a pass from a cursor on, with the cursor after it."""
        for position, records, invalid in self._pools(start):
            rows, cut, left_out = self._encoded(records)
            goes_on = position == start.record and start.pack > 0
            if start.epoch == 0 and not goes_on:  # else it was reported before
                report.truncated += cut
                report.left_out += [*invalid, *left_out]
            packs = self._packs(rows, start.epoch, position)
            for given in range(start.pack if goes_on else 0, len(packs)):
                last = given + 1 == len(packs)
                after = (position + len(records), 0) if last else (position, given + 1)
                yield [rows[i] for i in packs[given]], Cursor(start.epoch, *after, self._reader.counts)

    def _pools(self, start: Cursor) -> Iterator[tuple[int, list[Record], list[str]]]:
        """Yield what is encoded together: its position in the order of the pass, and what else stood there."""
        order = self._order
        window = order.window if order.window > 1 else BATCH
        # The windows begin elsewhere in each epoch, or the same records would stay together for ever.
        first = 1 + key_of(order.seed, start.epoch) % window
        number = 0 if start.record < first else 1 + (start.record - first) // window
        begin = 0 if number == 0 else first + (number - 1) * window
        size = BATCH if order.batching in ("padding_free", "padded") else window
        items = self._reader.records(begin)
        while True:
            records, invalid = _taken(items, window if number else first)
            records = self._shuffled(records, start.epoch, number)
            for at in range(0, max(1, len(records)), size):
                if begin + at >= start.record:
                    yield begin + at, records[at : at + size], invalid if at == 0 else []
            if not records:
                return
            begin, number = begin + len(records), number + 1

    def _shuffled(self, records: list[Record], epoch: int, window: int) -> list[Record]:
        if self._order.window <= 1:
            return records
        generator = torch.Generator().manual_seed(key_of(self._order.seed, epoch, window))
        return [records[i] for i in torch.randperm(len(records), generator=generator).tolist()]

    def _encoded(self, records: list[Record]) -> tuple[list[Row], list[str], list[str]]:
        """Return the rows of records, those that lost tokens, and the records that gave none."""
        rows: list[Row] = []
        left_out = []
        for record, encoded in zip(records, self._encoder(records), strict=True):
            if isinstance(encoded, str):
                left_out.append(f"{record.origin}: {encoded}")
            else:
                rows += encoded
        cut = [f"{r.origin}: {r.full_length} tokens, {len(r.ids_T)} kept" for r in rows if r.truncated]
        return rows, cut, left_out

    def _packs(self, rows: list[Row], epoch: int, position: int) -> list[Pack]:
        order = self._order
        generator = torch.Generator().manual_seed(key_of(order.seed, epoch, position, 1))
        lengths = [len(row.ids_T) for row in rows]
        every = list(range(len(rows)))
        return in_packs(every, lengths, order.batching, order.max_length, order.sequences_per_step, generator)


def _taken(items: Iterator[Record | str], size: int) -> tuple[list[Record], list[str]]:
    """Take so many records, and the texts between them; behind the last record all texts that are left."""
    records: list[Record] = []
    texts: list[str] = []
    while len(records) < size:
        item = next(items, None)
        if item is None:
            break
        (texts if isinstance(item, str) else records).append(item)  # type: ignore[arg-type]
    return records, texts


class _OneProcess(IterableDataset[Step]):
    """Steps that are made one after the other, so by one process."""

    def __init__(self, start: Callable[[], Iterator[Step]]) -> None:
        self._start = start

    def __iter__(self) -> Iterator[Step]:
        return self._start()


def _settle(worker: int) -> None:
    serve_parent(worker)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads were left behind in the process that was forked
